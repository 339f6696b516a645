//! All that a run is resumed from.

mod file;

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{DType, Device, Tensor, TensorData},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    BudgetController, CollapseDetector, Corpus, Decoder, Error, ModelConfig, Result, TrainingConfig,
    ValidationLine,
    model::Path,
    optimiser::{AdamW, Moments},
    validation::Validation,
};

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

    /// The same run's weights under another model, alone: every parameter under the name that `rename` gives it, those
    /// without a name left out. [`decoder`](Self::decoder) says if they are not what that model has.
    pub(crate) fn remodelled(self, model: ModelConfig, rename: impl Fn(&str) -> Option<String>) -> Self {
        let Self { mut header, numbers } = self.weights_alone();
        let renamed = header.parameters.into_iter().zip(numbers).filter_map(|(parameter, numbers)| {
            let name = rename(&parameter.name)?;
            Some((Parameter { name, ..parameter }, numbers))
        });
        let (parameters, numbers) = renamed.unzip();
        header.parameters = parameters;
        header.config.model = model;
        if !header.config.model.has_threshold() {
            // Nothing is left to steer.
            (header.config.budget, header.controller) = (None, None);
        }
        Self { header, numbers }
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

    /// Loss and shares on a text, in f32 on `device`: on the run's own text over the part that was kept for validation, on
    /// another one over all of it.
    ///
    /// # Errors
    /// As [`Checkpoint::decoder`]; [`Error::TooShort`]; [`Error::NotFinite`].
    pub fn validate(&self, corpus: &Corpus, device: &Device) -> Result<ValidationLine> {
        let Header { config, text, step, .. } = &self.header;
        let part = match corpus.fingerprint() == text {
            true => corpus.split(config)?.validation,
            false => corpus.whole(config.model.context)?,
        };
        let kept = "the checkpoint was saved as it is".to_string();
        let finite = |value: f64| match value.is_finite() {
            true => Ok(value),
            false => {
                Err(Error::NotFinite { what: "validation loss", value, step: *step, kept: kept.clone() })
            }
        };
        Validation { config, corpus, part: &part, step: *step }.run(&self.decoder(device)?, finite)
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
    use std::{fs, path::PathBuf};

    use rstest::rstest;

    use super::*;
    use crate::{AttentionKind, Budget};

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

    pub(super) fn checkpoint() -> Checkpoint {
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
    pub(super) fn saved() -> (tempfile::TempDir, PathBuf, Vec<u8>) {
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
