//! Training: weights in f32 on the device, a copy of them with autodiff for every step.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use bifocal_burn::Routing;
use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Device, Tensor},
};

use crate::{
    BudgetController, Checkpoint, Collapse, CollapseDetector, Corpus, Decoder, Error, Line, Pass, Precision,
    Result, Split, StepLine, TrainingConfig, ValidationLine,
    checkpoint::Snapshot,
    draws::{Draws, Purpose},
    metrics::{FarShares, Metrics, mean_share},
    optimiser::{AdamW, Gradients},
    penalty::penalty,
    schedule,
    validation::{Validation, batch, cross_entropy, scalar},
};

/// The name of the checkpoint in a run's folder.
pub const CHECKPOINT: &str = "checkpoint";
/// The name of the metrics file in a run's folder.
pub const METRICS: &str = "metrics.jsonl";

/// A run: everything that changes while a decoder is trained.
///
/// Deterministic: on Burn's Flex, the same configuration and text give the same weights bit for bit, and so does a run
/// that was saved and resumed.
pub struct Trainer {
    config: TrainingConfig,
    corpus: Corpus,
    split: Split,
    /// Without autodiff.
    device: Device,
    /// In f32, without autodiff.
    decoder: Decoder,
    optimiser: AdamW,
    controller: Option<BudgetController>,
    detector: CollapseDetector,
    /// Steps taken.
    step: u64,
    /// The step of the last good checkpoint, and where it is.
    kept: Option<(u64, PathBuf)>,
}

/// What [`Trainer::run`] tells while it runs.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// A step has been taken.
    Step(u64),
    /// A line has been added to the metrics.
    Line(&'a Line),
    /// A checkpoint has been written at that step.
    Saved(u64),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are taken.
    Finished,
    /// It was told to stop after this step, which is saved.
    Interrupted(u64),
}

impl Trainer {
    /// A run from its beginning. The device's autodiff setting does not matter.
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::TooShort`], [`Error::Attention`].
    pub fn new(config: TrainingConfig, corpus: Corpus, device: &Device) -> Result<Self> {
        config.check()?;
        let split = corpus.split(&config)?;
        let device = device.clone().inner();
        if config.precision == Precision::Bf16 && !device.supports_dtype(DType::BF16) {
            return Err(Error::setting("precision", "bf16", format!("f32: {device:?} has no bf16")));
        }
        let decoder = Decoder::new(&config.model, config.seed, &device)?;
        let layers = config.model.layers;
        Ok(Self {
            optimiser: AdamW::new(&decoder),
            controller: config.budget.map(|budget| BudgetController::new(budget, layers)),
            detector: CollapseDetector::new(config.guard, layers),
            config,
            corpus,
            split,
            device,
            decoder,
            step: 0,
            kept: None,
        })
    }

    /// A run from where the checkpoint at `path` left it.
    ///
    /// # Errors
    /// As [`Trainer::new`] and [`Checkpoint::load`]; [`Error::OtherRun`] when configuration or text differ;
    /// [`Error::WeightsAlone`].
    pub fn resume(config: TrainingConfig, corpus: Corpus, device: &Device, path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::load(path)?;
        checkpoint.check(&config, corpus.fingerprint())?;
        let trainer = Self::new(config, corpus, device)?;
        let optimiser = checkpoint.optimiser(&trainer.device);
        Ok(Self {
            decoder: checkpoint.decoder(&trainer.device)?,
            optimiser: optimiser.ok_or_else(|| Error::WeightsAlone { path: path.to_path_buf() })?,
            controller: checkpoint.controller().cloned(),
            detector: checkpoint.detector().clone(),
            step: checkpoint.step(),
            kept: Some((checkpoint.step(), path.to_path_buf())),
            ..trainer
        })
    }

    /// Steps taken.
    pub fn steps_taken(&self) -> u64 {
        self.step
    }

    /// The decoder as it is: f32, without autodiff.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Which tokens are for training and which for validation.
    pub fn split(&self) -> &Split {
        &self.split
    }

    /// Takes the steps that are left. Metrics go to `folder` as they come, a checkpoint every now and then and at the
    /// end. When `stop` becomes true, the step under way is finished and saved.
    ///
    /// # Errors
    /// [`Error::NotFinite`] when training diverges and [`Error::Io`] when something cannot be written; the last good
    /// checkpoint is intact then.
    pub fn run(
        &mut self,
        folder: &Path,
        stop: &AtomicBool,
        watch: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Outcome> {
        let mut metrics = Metrics::open(&folder.join(METRICS), (self.step > 0).then_some(self.step))?;
        let TrainingConfig { steps, log_every, validate_every, save_every, .. } = self.config;
        let (mut clock, mut since) = (Instant::now(), self.step);
        while self.step < steps {
            let taken = self.take_step()?;
            let step = self.step;
            watch(Progress::Step(step));
            let stopped = stop.load(Ordering::Relaxed);
            let due = |every: u64| step == steps || step.is_multiple_of(every);
            if let Some(controller) = &mut self.controller {
                // NaN scores have no share: the loss tells of them.
                check_finite("loss", taken.loss()?, step, &self.kept)?;
                steer(controller, &mut self.decoder, &taken.far()?);
            }
            if due(log_every) {
                let line = self.line(&taken)?;
                let seconds = clock.elapsed().as_secs_f64();
                let line = StepLine { tokens_per_s: self.tokens(step - since) / seconds, ..line };
                let collapsed = self.observe(&line);
                tell(&mut metrics, &Line::Step(line), watch)?;
                for collapse in collapsed {
                    tell(&mut metrics, &Line::Collapse(collapse), watch)?;
                }
                (clock, since) = (Instant::now(), step);
            }
            if due(validate_every) {
                tell(&mut metrics, &Line::Validation(self.validate()?), watch)?;
                (clock, since) = (Instant::now(), step);
            }
            if due(save_every) || stopped {
                // What is not finite is not saved.
                self.finite(&taken)?;
                self.save(&folder.join(CHECKPOINT))?;
                watch(Progress::Saved(step));
                (clock, since) = (Instant::now(), step);
            }
            if stopped && step < steps {
                return Ok(Outcome::Interrupted(step));
            }
        }
        Ok(Outcome::Finished)
    }

    /// Passes and an update. Nothing is read back (a random gate's own draws apart).
    fn take_step(&mut self) -> Result<Taken> {
        let config = &self.config;
        let (step, passes) = (self.step + 1, config.accumulation);
        let context = config.model.context;
        let mut windows = Draws::new(config.seed, Purpose::Windows, &[step]);
        let decoder = self.computing().train();
        let mut gradients = Gradients::default();
        let (mut losses, mut penalties, mut routings) = (Vec::new(), Vec::new(), Vec::new());
        for pass in 0..passes {
            let seed = Draws::new(config.seed, Purpose::Passes, &[step, pass as u64]).bits();
            let pass = Pass { seed, leak: config.penalties.l2a_leak };
            let tokens = self.corpus.sample(&self.split.training, config.batch, context + 1, &mut windows);
            let (inputs, targets) = batch(&tokens, context + 1, &decoder.device());
            let forward = decoder.forward(inputs, pass)?;
            let loss = cross_entropy(forward.logits, targets);
            let penalty = penalty(config, &decoder, &forward.routings, step)?;
            let total = match &penalty {
                Some(penalty) => loss.clone() + penalty.clone(),
                None => loss.clone(),
            };
            let total = total.div_scalar(passes as f64);
            gradients.add(Gradients::of(&decoder, total.backward()));
            losses.push(loss.inner());
            penalties.extend(penalty.map(Tensor::inner));
            routings.push(forward.routings);
        }
        let norm = gradients.clip(config.clip, &self.device);
        let rate = schedule::learning_rate(config, step);
        self.decoder = self.optimiser.step(self.decoder.clone(), gradients, step, rate, config);
        self.step = step;
        Ok(Taken { losses, penalties, norm, routings })
    }

    /// Loss and gradient norm of a step, which are finite. Then so are the weights that it left: they were before, or
    /// the loss would not be.
    fn finite(&self, taken: &Taken) -> Result<(f64, f64)> {
        let loss = check_finite("loss", taken.loss()?, self.step, &self.kept)?;
        let norm = check_finite("gradient norm", scalar(&taken.norm)?, self.step, &self.kept)?;
        Ok((loss, norm))
    }

    /// Reads back what a step measured.
    fn line(&self, taken: &Taken) -> Result<StepLine> {
        let (loss, gradient_norm) = self.finite(taken)?;
        let layers = 0..self.config.model.layers;
        Ok(StepLine {
            step: self.step,
            loss,
            penalty: taken.penalty()?,
            gradient_norm,
            learning_rate: schedule::learning_rate(&self.config, self.step),
            tokens_per_s: 0.0,
            far: taken.far()?,
            thresholds: match &self.controller {
                Some(controller) => layers.map(|layer| controller.threshold(layer)).collect(),
                None => Vec::new(),
            },
        })
    }

    /// Shows the shares of a step to the detector.
    fn observe(&mut self, line: &StepLine) -> Vec<Collapse> {
        let layers = line.far.iter().enumerate();
        let shares = layers.filter_map(|(layer, shares)| Some((layer, shares.as_ref()?)));
        shares.flat_map(|(layer, shares)| self.detector.observe(line.step, layer, shares)).collect()
    }

    /// The decoder on the validation text, as it is.
    ///
    /// # Errors
    /// [`Error::NotFinite`], [`Error::Attention`].
    pub fn validate(&self) -> Result<ValidationLine> {
        let part = &self.split.validation;
        let validation = Validation { config: &self.config, corpus: &self.corpus, part, step: self.step };
        let finite = |loss| check_finite("validation loss", loss, self.step, &self.kept);
        validation.run(&self.computing(), finite)
    }

    fn save(&mut self, path: &Path) -> Result<()> {
        let snapshot = Snapshot {
            config: &self.config,
            text: self.corpus.fingerprint(),
            step: self.step,
            controller: self.controller.as_ref(),
            detector: &self.detector,
            decoder: &self.decoder,
            optimiser: &self.optimiser,
        };
        Checkpoint::take(&snapshot)?.save(path)?;
        self.kept = Some((self.step, path.to_path_buf()));
        Ok(())
    }

    /// A copy of the decoder in the element type of the pass.
    fn computing(&self) -> Decoder {
        match self.config.precision {
            Precision::F32 => self.decoder.clone(),
            Precision::Bf16 => self.decoder.clone().map(&mut Rounded),
        }
    }

    /// Tokens that so many steps see.
    fn tokens(&self, steps: u64) -> f64 {
        steps as f64 * (self.config.batch * self.config.accumulation * self.config.model.context) as f64
    }
}

/// A step that has been taken, still on the device: per pass what there is to read of it.
struct Taken {
    losses: Vec<Tensor<1>>,
    penalties: Vec<Tensor<1>>,
    norm: Tensor<1>,
    routings: Vec<Vec<Option<Routing>>>,
}

impl Taken {
    /// The mean over passes.
    fn loss(&self) -> Result<f64> {
        self.mean(&self.losses)
    }

    fn penalty(&self) -> Result<f64> {
        self.mean(&self.penalties)
    }

    fn mean(&self, parts: &[Tensor<1>]) -> Result<f64> {
        Ok(parts.iter().map(scalar).sum::<Result<f64>>()? / self.routings.len() as f64)
    }

    /// The share of far per layer and router head, over all passes.
    fn far(&self) -> Result<FarShares> {
        let layers = self.routings.first().map_or(0, Vec::len);
        let layer = |layer: usize| {
            let passes = self.routings.iter().map(|pass| by_head(&pass[layer]));
            let passes: Option<Vec<Vec<f64>>> = passes.collect::<Result<_>>()?;
            Ok(passes.map(|passes| mean_by_head(&passes)))
        };
        (0..layers).map(layer).collect()
    }
}

/// The share of far per router head, over the batch; `None` without a router.
fn by_head(routing: &Option<Routing>) -> Result<Option<Vec<f64>>> {
    let Some(routing) = routing else { return Ok(None) };
    let [batch, heads, _] = routing.shape();
    let shares = routing.far_share()?;
    let of = |head| (0..batch).map(|b| shares[b * heads + head]).sum::<f64>() / batch as f64;
    Ok(Some((0..heads).map(of).collect()))
}

/// The mean over passes.
fn mean_by_head(passes: &[Vec<f64>]) -> Vec<f64> {
    let heads = passes.first().map_or(0, Vec::len);
    let of = |head: usize| passes.iter().map(|pass| pass[head]).sum::<f64>() / passes.len() as f64;
    (0..heads).map(of).collect()
}

/// Moves the thresholds of all gates by what they did.
fn steer(controller: &mut BudgetController, decoder: &mut Decoder, far: &[Option<Vec<f64>>]) {
    for (layer, shares) in far.iter().enumerate() {
        if let Some(share) = mean_share(std::slice::from_ref(shares)) {
            decoder.set_threshold(layer, controller.update(layer, share));
        }
    }
}

fn tell(metrics: &mut Metrics, line: &Line, watch: &mut dyn FnMut(Progress<'_>)) -> Result<()> {
    metrics.write(line)?;
    watch(Progress::Line(line));
    Ok(())
}

fn check_finite(what: &'static str, value: f64, step: u64, kept: &Option<(u64, PathBuf)>) -> Result<f64> {
    if value.is_finite() {
        return Ok(value);
    }
    let kept = match kept {
        Some((step, path)) => format!("{} holds step {step}", path.display()),
        None => "nothing was saved yet".to_string(),
    };
    Err(Error::NotFinite { what, value, step, kept })
}

/// Rounds weights for a pass.
struct Rounded;

impl ModuleMapper for Rounded {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(DType::BF16))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rstest::rstest;

    use super::*;
    use crate::{AttentionKind, Budget, metrics};

    /// Weights of NaN, as a training that diverged leaves them.
    struct Spoil;

    impl ModuleMapper for Spoil {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|tensor| tensor.mul_scalar(f32::NAN))
        }
    }

    #[rstest]
    #[case::full(AttentionKind::Full, None)]
    #[case::aha(AttentionKind::Aha { window: 3 }, None)]
    #[case::aha_with_a_budget(AttentionKind::Aha { window: 3 }, Some(Budget { target: 0.1, step: 0.01 }))]
    #[case::l2a(AttentionKind::L2a { window: 3 }, None)]
    fn a_loss_that_is_nan_stops_the_run_and_leaves_the_checkpoint(
        #[case] kind: AttentionKind,
        #[case] budget: Option<Budget>,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("text");
        fs::write(&text, "near and far ".repeat(40)).unwrap();
        let mut config = TrainingConfig { steps: 5, batch: 2, log_every: 1, budget, ..Default::default() };
        let model = &mut config.model;
        (model.layers, model.d_model, model.heads, model.kv_heads) = (1, 8, 2, 1);
        (model.feed_forward, model.context, model.attention) = (8, 16, vec![kind]);
        let corpus = Corpus::open(&[text], config.seed).unwrap();
        let mut trainer = Trainer::new(config, corpus, &Device::flex()).unwrap();
        // Told to stop from the beginning: one step.
        let stopped = trainer.run(folder.path(), &AtomicBool::new(true), &mut |_| {}).unwrap();
        assert_eq!(stopped, Outcome::Interrupted(1));
        let kept = fs::read(folder.path().join(CHECKPOINT)).unwrap();

        trainer.decoder = trainer.decoder.clone().map(&mut Spoil);
        let error = trainer.run(folder.path(), &AtomicBool::new(true), &mut |_| {}).unwrap_err();
        assert!(matches!(error, Error::NotFinite { what: "loss", step: 2, .. }), "{error}");
        assert!(error.to_string().contains("holds step 1"), "{error}");
        assert_eq!(fs::read(folder.path().join(CHECKPOINT)).unwrap(), kept);
        // The metrics are those of the good step.
        let lines = metrics::read(&folder.path().join(METRICS)).unwrap();
        assert_eq!(lines.iter().map(Line::step).max(), Some(1));
    }
}
