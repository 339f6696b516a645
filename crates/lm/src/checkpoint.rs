//! All that a run is resumed from, in one file.
//!
//! ```text
//! magic (8 bytes) | version (u32) | length of the header (u64) | header (JSON) | numbers (f32) | SHA-256 of all before
//! ```
//!
//! Little-endian. The numbers are, for each parameter in the header's order, its weights and, unless they were left out,
//! both moments.

use std::{fs, io::Write, path::Path as FilePath};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{DType, Device, Tensor, TensorData},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    BudgetController, CollapseDetector, Decoder, Error, Result, TrainingConfig, files,
    model::Path,
    optimiser::{AdamW, Moments},
};

const MAGIC: &[u8; 8] = b"bifocal\n";
/// Counts up whenever the header or the numbers change their meaning.
const VERSION: u32 = 2;
const PREFIX: usize = MAGIC.len() + 4 + 8;
const DIGEST: usize = 32;

/// A saved run: model, optimiser, thresholds, and how far it is. Nothing random has a state: what is drawn follows from
/// the seed and the step.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    header: Header,
    /// Per parameter: weights, and first and second moments if the header says so.
    numbers: Vec<Vec<Vec<f32>>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    config: TrainingConfig,
    text: String,
    step: u64,
    controller: Option<BudgetController>,
    detector: CollapseDetector,
    /// Whether moments are there, or weights alone.
    moments: bool,
    parameters: Vec<Parameter>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Parameter {
    name: String,
    shape: Vec<usize>,
}

/// What a checkpoint is taken of.
pub(crate) struct Snapshot<'a> {
    pub(crate) config: &'a TrainingConfig,
    /// The fingerprint of the text.
    pub(crate) text: &'a str,
    pub(crate) step: u64,
    pub(crate) controller: Option<&'a BudgetController>,
    pub(crate) detector: &'a CollapseDetector,
    pub(crate) decoder: &'a Decoder,
    pub(crate) optimiser: &'a AdamW,
}

impl Checkpoint {
    /// Reads everything back from the device.
    pub(crate) fn take(snapshot: &Snapshot<'_>) -> Result<Self> {
        let mut collect = Collect { path: Path::default(), parameters: Vec::new(), weights: Vec::new() };
        snapshot.decoder.visit(&mut collect);
        let numbers = collect
            .weights
            .into_iter()
            .zip(&snapshot.optimiser.moments)
            .map(|(weights, moments)| {
                let Moments { first, second } = moments.clone();
                Ok(vec![weights?, host(first)?, host(second)?])
            })
            .collect::<Result<_>>()?;
        let header = Header {
            config: snapshot.config.clone(),
            text: snapshot.text.to_string(),
            step: snapshot.step,
            controller: snapshot.controller.cloned(),
            detector: snapshot.detector.clone(),
            moments: true,
            parameters: collect.parameters,
        };
        Ok(Self { header, numbers })
    }

    /// Leaves out what only training needs: the model to use, at a third of the size.
    pub fn weights_alone(mut self) -> Self {
        self.header.moments = false;
        self.numbers.iter_mut().for_each(|numbers| numbers.truncate(1));
        self
    }

    /// Writes the file whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`], for a full disk among others; what was at `path` before is then still there.
    pub fn save(&self, path: &FilePath) -> Result<()> {
        let header = serde_json::to_vec(&self.header).map_err(Error::runtime)?;
        files::replace(path, |to| {
            let mut to = Hashing { to, digest: Sha256::new() };
            to.put(MAGIC)?;
            to.put(&VERSION.to_le_bytes())?;
            to.put(&(header.len() as u64).to_le_bytes())?;
            to.put(&header)?;
            for numbers in self.numbers.iter().flatten() {
                let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
                to.put(&bytes)?;
            }
            let Hashing { to, digest } = to;
            to.write_all(&digest.finalize())
        })
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NotACheckpoint`] for other files and other versions; [`Error::Truncated`];
    /// [`Error::Damaged`].
    pub fn load(path: &FilePath) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        Self::read(&bytes, path)
    }

    /// Checks the bytes of a file, which messages call `path`.
    ///
    /// # Errors
    /// As [`Checkpoint::load`].
    pub fn read(bytes: &[u8], path: &FilePath) -> Result<Self> {
        let damaged = |reason: String| Error::Damaged { path: path.to_path_buf(), reason };
        let not_ours = |reason: String| Error::NotACheckpoint { path: path.to_path_buf(), reason };
        let at_least = |expected: usize| match bytes.len() < expected {
            true => Err(Error::Truncated {
                path: path.to_path_buf(),
                found: bytes.len() as u64,
                expected: expected as u64,
            }),
            false => Ok(()),
        };
        if !bytes.starts_with(&MAGIC[..bytes.len().min(MAGIC.len())]) {
            return Err(not_ours("it begins with something else".to_string()));
        }
        at_least(PREFIX + DIGEST)?;
        let (version, length) = (number(&bytes[8..12]), number(&bytes[12..PREFIX]));
        if version != u64::from(VERSION) {
            return Err(not_ours(format!("it is of version {version}, expected {VERSION}")));
        }
        let start = usize::try_from(length).unwrap_or(usize::MAX).saturating_add(PREFIX);
        at_least(start.saturating_add(DIGEST))?;
        let header: Header = serde_json::from_slice(&bytes[PREFIX..start])
            .map_err(|error| damaged(format!("its header is no header: {error}")))?;
        let counts = header
            .parameters
            .iter()
            .map(|parameter| parameter.shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size)));
        let counts: Option<Vec<usize>> = counts.collect();
        let counts = counts.ok_or_else(|| damaged("a shape is beyond all memory".to_string()))?;
        let parts = if header.moments { 3 } else { 1 };
        let numbers =
            counts.iter().fold(0usize, |sum, count| sum.saturating_add(count.saturating_mul(4 * parts)));
        let end = start.saturating_add(numbers);
        at_least(end.saturating_add(DIGEST))?;
        if bytes.len() > end + DIGEST {
            let more = bytes.len() - end - DIGEST;
            return Err(damaged(format!("it has {more} bytes more than its header says")));
        }
        if Sha256::digest(&bytes[..end])[..] != bytes[end..] {
            return Err(damaged("its bytes do not have the hash that was written with them".to_string()));
        }
        let mut rest = bytes[start..end]
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
        let numbers = counts
            .iter()
            .map(|&count| (0..parts).map(|_| rest.by_ref().take(count).collect()).collect())
            .collect();
        Ok(Self { header, numbers })
    }

    /// Steps that had been taken.
    pub fn step(&self) -> u64 {
        self.header.step
    }

    /// The run's configuration.
    pub fn config(&self) -> &TrainingConfig {
        &self.header.config
    }

    pub(crate) fn controller(&self) -> Option<&BudgetController> {
        self.header.controller.as_ref()
    }

    pub(crate) fn detector(&self) -> &CollapseDetector {
        &self.header.detector
    }

    /// Checks that this is a checkpoint of a run with that configuration and text.
    ///
    /// # Errors
    /// [`Error::OtherRun`] naming the first difference.
    pub(crate) fn check(&self, config: &TrainingConfig, text: &str) -> Result<()> {
        let values = |config: &TrainingConfig| serde_json::to_value(config).map_err(Error::runtime);
        if let Some((setting, found, expected)) =
            difference("", &values(&self.header.config)?, &values(config)?)
        {
            return Err(Error::OtherRun { setting, found, expected });
        }
        if self.header.text != text {
            let short = |hash: &str| -> String { hash.chars().take(12).collect() };
            let (found, expected) = (short(&self.header.text), short(text));
            return Err(Error::OtherRun { setting: "text (by its hash)".to_string(), found, expected });
        }
        Ok(())
    }

    /// The decoder, thresholds included, on `device`.
    ///
    /// # Errors
    /// As [`Decoder::new`]; [`Error::Damaged`] when the parameters are not this decoder's.
    pub fn decoder(&self, device: &Device) -> Result<Decoder> {
        let Header { config, controller, parameters, .. } = &self.header;
        let decoder = Decoder::new(&config.model, config.seed, device)?;
        let mut load = Load {
            path: Path::default(),
            parameters: parameters.iter().zip(&self.numbers).collect::<Vec<_>>().into_iter(),
            misfit: None,
        };
        let mut decoder = decoder.map(&mut load);
        let left = load.parameters.next().map(|(parameter, _)| format!("nothing takes {}", parameter.name));
        if let Some(reason) = load.misfit.or(left) {
            return Err(Error::Damaged { path: "in memory".into(), reason });
        }
        if let Some(controller) = controller {
            for layer in 0..config.model.layers {
                decoder.set_threshold(layer, controller.threshold(layer));
            }
        }
        Ok(decoder)
    }

    /// The optimiser as it was; `None` when weights alone were kept.
    pub(crate) fn optimiser(&self, device: &Device) -> Option<AdamW> {
        let tensor = |values: &Vec<f32>| {
            let data = TensorData::new(values.clone(), [values.len()]);
            Tensor::<1>::from_data(data, (device, DType::F32))
        };
        let moments = self.numbers.iter().map(|numbers| match numbers.as_slice() {
            [_, first, second] => Some(Moments { first: tensor(first), second: tensor(second) }),
            _ => None,
        });
        Some(AdamW { moments: moments.collect::<Option<_>>()? })
    }
}

/// Little-endian bytes, at most eight, as a number.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| (number << 8) | u64::from(byte))
}

/// The values of a tensor in f32.
fn host<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    let data = tensor.try_into_data().map_err(Error::runtime)?;
    data.try_to_vec::<f32>().map_err(Error::runtime)
}

/// The first place where two JSON values differ: its path, and both values.
fn difference(path: &str, found: &Value, expected: &Value) -> Option<(String, String, String)> {
    match (found, expected) {
        (Value::Object(one), Value::Object(other)) => one.iter().find_map(|(key, found)| {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            difference(&path, found, other.get(key).unwrap_or(&Value::Null))
        }),
        _ if found == expected => None,
        _ => Some((path.to_string(), found.to_string(), expected.to_string())),
    }
}

/// Hashes what it passes on.
struct Hashing<'a> {
    to: &'a mut dyn Write,
    digest: Sha256,
}

impl Hashing<'_> {
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.digest.update(bytes);
        self.to.write_all(bytes)
    }
}

struct Collect {
    path: Path,
    parameters: Vec<Parameter>,
    weights: Vec<Result<Vec<f32>>>,
}

impl ModuleVisitor for Collect {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.exit(container);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        self.parameters.push(Parameter { name: self.path.name(), shape: tensor.dims().to_vec() });
        self.weights.push(host(tensor));
    }
}

struct Load<'a> {
    path: Path,
    parameters: std::vec::IntoIter<(&'a Parameter, &'a Vec<Vec<f32>>)>,
    misfit: Option<String>,
}

impl ModuleMapper for Load<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.exit(container);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (name, shape) = (self.path.name(), param.lazy_shape());
        match self.parameters.next() {
            Some((parameter, numbers)) if parameter.name == name && parameter.shape == shape.as_slice() => {
                let data = TensorData::new(numbers[0].clone(), shape);
                Param::from_tensor(Tensor::from_data(data, (&param.lazy_device(), DType::F32)))
            }
            found => {
                let found = found.map_or("nothing".to_string(), |(Parameter { name, shape }, _)| {
                    format!("{name} {shape:?}")
                });
                self.misfit
                    .get_or_insert(format!("it holds {found}, expected {name} {:?}", shape.as_slice()));
                param
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use rstest::rstest;

    use super::*;
    use crate::{AttentionKind, Budget, ModelConfig};

    fn config() -> TrainingConfig {
        let model = ModelConfig {
            layers: 2,
            d_model: 8,
            heads: 2,
            kv_heads: 1,
            feed_forward: 8,
            context: 8,
            attention: vec![AttentionKind::Aha { window: 2 }, AttentionKind::L2a { window: 3 }],
            router_bias: Some(0.5),
            ..Default::default()
        };
        let budget = Some(Budget { target: 0.1, step: 0.01 });
        TrainingConfig { model, budget, seed: 9, ..Default::default() }
    }

    fn checkpoint() -> Checkpoint {
        let device = Device::flex();
        let config = config();
        let decoder = Decoder::new(&config.model, config.seed, &device).unwrap();
        let mut optimiser = AdamW::new(&decoder);
        for (at, moments) in optimiser.moments.iter_mut().enumerate() {
            moments.first = moments.first.clone().add_scalar(at as f64 / 3.0);
        }
        let mut controller = BudgetController::new(config.budget.unwrap(), 2);
        controller.update(1, 1.0);
        let mut detector = CollapseDetector::new(config.guard, 2);
        detector.observe(4, 1, &[1.0]);
        let snapshot = Snapshot {
            config: &config,
            text: "0123456789abcdef",
            step: 4,
            controller: Some(&controller),
            detector: &detector,
            decoder: &decoder,
            optimiser: &optimiser,
        };
        Checkpoint::take(&snapshot).unwrap()
    }

    /// A folder with a checkpoint in it.
    fn saved() -> (tempfile::TempDir, PathBuf, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint");
        checkpoint().save(&path).unwrap();
        let bytes = fs::read(&path).unwrap();
        (folder, path, bytes)
    }

    #[test]
    fn everything_comes_back() {
        let (_folder, path, _) = saved();
        let (before, after) = (checkpoint(), Checkpoint::load(&path).unwrap());
        assert_eq!(before, after);
        assert_eq!((after.step(), after.config()), (4, &config()));
        let device = Device::flex();
        let decoder = after.decoder(&device).unwrap();
        let again = Checkpoint::take(&Snapshot {
            config: &config(),
            text: "0123456789abcdef",
            step: 4,
            controller: after.controller(),
            detector: after.detector(),
            decoder: &decoder,
            optimiser: &after.optimiser(&device).unwrap(),
        });
        assert_eq!(again.unwrap(), before);
        let crate::Attention::L2a(l2a) = &decoder.layers[1].attention else { panic!("the second layer") };
        assert_eq!(l2a.threshold, 0.51);
    }

    #[test]
    fn weights_alone_are_a_decoder_and_no_run() {
        let (_folder, path, bytes) = saved();
        checkpoint().weights_alone().save(&path).unwrap();
        let slim = fs::read(&path).unwrap();
        assert!(slim.len() < bytes.len() * 2 / 3, "{} bytes of {}", slim.len(), bytes.len());
        let loaded = Checkpoint::read(&slim, &path).unwrap();
        assert_eq!(loaded, checkpoint().weights_alone());
        assert_eq!((loaded.step(), loaded.config()), (4, &config()));
        let device = Device::flex();
        assert!(loaded.optimiser(&device).is_none());
        let weights = |checkpoint: &Checkpoint| {
            let mut collect = Collect { path: Path::default(), parameters: Vec::new(), weights: Vec::new() };
            checkpoint.decoder(&device).unwrap().visit(&mut collect);
            collect.weights.into_iter().collect::<Result<Vec<_>>>().unwrap()
        };
        assert_eq!(weights(&loaded), weights(&checkpoint()));
        fs::write(&path, &slim[..slim.len() - 5]).unwrap();
        assert!(matches!(Checkpoint::load(&path).unwrap_err(), Error::Truncated { .. }));
    }

    #[test]
    fn a_file_cut_off_anywhere_says_so() {
        let (_folder, path, bytes) = saved();
        let header = PREFIX + number(&bytes[12..20]) as usize;
        for length in [0, 5, 8, 19, PREFIX + 1, header - 1, header, header + 100, bytes.len() - 1] {
            fs::write(&path, &bytes[..length]).unwrap();
            match Checkpoint::load(&path).unwrap_err() {
                Error::Truncated { found, expected, .. } => {
                    assert_eq!(found, length as u64);
                    assert!((length as u64) < expected && expected <= bytes.len() as u64, "{expected}");
                }
                other => panic!("cut to {length} bytes: {other}"),
            }
        }
    }

    #[test]
    fn a_changed_byte_anywhere_is_noticed() {
        let (_folder, path, bytes) = saved();
        let header = PREFIX + number(&bytes[12..20]) as usize;
        for at in [0, 9, PREFIX, header - 1, header, header + 7, bytes.len() - 1] {
            let mut changed = bytes.clone();
            changed[at] ^= 4;
            fs::write(&path, &changed).unwrap();
            let error = Checkpoint::load(&path).unwrap_err();
            match at {
                0 | 9 => assert!(matches!(error, Error::NotACheckpoint { .. }), "{at}: {error}"),
                _ => assert!(matches!(error, Error::Damaged { .. }), "{at}: {error}"),
            }
        }
        fs::write(&path, [&bytes[..], b"x"].concat()).unwrap();
        assert!(matches!(Checkpoint::load(&path).unwrap_err(), Error::Damaged { .. }));
        fs::write(&path, "# not a checkpoint").unwrap();
        assert!(matches!(Checkpoint::load(&path).unwrap_err(), Error::NotACheckpoint { .. }));
        fs::remove_file(&path).unwrap();
        assert!(matches!(Checkpoint::load(&path).unwrap_err(), Error::Io { action: "read", .. }));
    }

    #[test]
    fn another_version_is_named() {
        let (_folder, path, mut bytes) = saved();
        bytes[8] = 7;
        fs::write(&path, bytes).unwrap();
        let error = Checkpoint::load(&path).unwrap_err().to_string();
        assert!(error.contains("version 7, expected 2"), "{error}");
    }

    #[rstest]
    #[case("steps", |config: &mut TrainingConfig| config.steps += 1)]
    #[case("model.heads", |config: &mut TrainingConfig| config.model.heads = 4)]
    #[case("model.attention", |config: &mut TrainingConfig| config.model.attention[0] = AttentionKind::Full)]
    #[case("budget", |config: &mut TrainingConfig| config.budget = None)]
    #[case("penalties.aha", |config: &mut TrainingConfig| config.penalties.aha = 1.0)]
    fn another_configuration_is_named(#[case] expected: &str, #[case] change: fn(&mut TrainingConfig)) {
        let checkpoint = checkpoint();
        let mut other = config();
        checkpoint.check(&other, "0123456789abcdef").unwrap();
        change(&mut other);
        match checkpoint.check(&other, "0123456789abcdef") {
            Err(Error::OtherRun { setting, .. }) => assert_eq!(setting, expected),
            found => panic!("{found:?}"),
        }
    }

    #[test]
    fn another_text_is_named() {
        let error = checkpoint().check(&config(), "fedcba9876543210").unwrap_err();
        assert!(
            error.to_string().contains("text (by its hash) is 0123456789ab, expected fedcba987654"),
            "{error}"
        );
    }

    #[test]
    fn a_full_disk_leaves_the_last_checkpoint() {
        let (folder, path, bytes) = saved();
        // A folder that is not there stands for any failure to write.
        let missing = folder.path().join("missing").join("checkpoint");
        assert!(matches!(checkpoint().save(&missing).unwrap_err(), Error::Io { action: "write", .. }));
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn parameters_of_another_decoder_are_damage() {
        let mut checkpoint = checkpoint();
        checkpoint.header.parameters[0].name = "something".to_string();
        let error = checkpoint.decoder(&Device::flex()).unwrap_err().to_string();
        assert!(error.contains("it holds something"), "{error}");
        checkpoint.header.parameters.pop();
        checkpoint.numbers.pop();
        checkpoint.header.parameters[0].name = "embedding.weight".to_string();
        let error = checkpoint.decoder(&Device::flex()).unwrap_err().to_string();
        assert!(error.contains("it holds nothing"), "{error}");
    }
}
