//! Whole runs of a tiny decoder on Flex, and what it writes.

mod generation;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use bifocal_lm::{
    AttentionKind, Budget, CHECKPOINT, Checkpoint, Corpus, Error, Guard, Line, METRICS, Outcome, Progress,
    StepLine, Trainer, TrainingConfig, metrics,
};
use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Device, Tensor},
};
use rstest::rstest;

/// A folder with a text in it, in which words come back after a while.
struct Setting {
    folder: tempfile::TempDir,
}

impl Setting {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let words = ["near", "far", "window", "all", "here", "lens", "42", "focus"];
        let text: Vec<_> = (0..900).map(|n: usize| words[(n * n + n / 7) % words.len()]).collect();
        fs::write(folder.path().join("text.txt"), text.join(" ")).unwrap();
        Self { folder }
    }

    fn corpus(&self, config: &TrainingConfig) -> Corpus {
        Corpus::open(&[self.folder.path().join("text.txt")], config.seed).unwrap()
    }

    fn trainer(&self, config: &TrainingConfig) -> Trainer {
        Trainer::new(config.clone(), self.corpus(config), &Device::flex()).unwrap()
    }

    /// A new folder for a run.
    fn run(&self, name: &str) -> PathBuf {
        let run = self.folder.path().join(name);
        fs::create_dir(&run).unwrap();
        run
    }
}

/// Two layers that attend like `kind`.
fn config(kind: AttentionKind) -> TrainingConfig {
    let mut config = TrainingConfig::default();
    let model = &mut config.model;
    (model.layers, model.d_model, model.heads, model.kv_heads) = (2, 16, 2, 1);
    (model.feed_forward, model.context, model.attention) = (24, 24, vec![kind]);
    (config.steps, config.batch, config.accumulation, config.warm_up) = (6, 2, 2, 2);
    (config.learning_rate, config.validation_windows) = (3e-3, 4);
    (config.log_every, config.validate_every, config.save_every) = (1, 3, 100);
    config.penalties.l2a_warm_up = 2;
    config.penalties.l2a = 1e-2;
    config
}

fn aha() -> AttentionKind {
    AttentionKind::Aha { window: 4 }
}

/// Runs to the end; the lines that were told.
fn finish(trainer: &mut Trainer, run: &Path) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut watch = |progress: Progress<'_>| {
        if let Progress::Line(line) = progress {
            lines.push(line.clone());
        }
    };
    assert_eq!(trainer.run(run, &AtomicBool::new(false), &mut watch).unwrap(), Outcome::Finished);
    lines
}

/// Stops a run after a step.
fn stop_after(trainer: &mut Trainer, run: &Path, last: u64) -> Outcome {
    let stop = AtomicBool::new(false);
    let mut watch = |progress: Progress<'_>| {
        if matches!(progress, Progress::Step(step) if step == last) {
            stop.store(true, Ordering::Relaxed);
        }
    };
    trainer.run(run, &stop, &mut watch).unwrap()
}

/// All weights, bit for bit.
fn bits(module: &impl Module) -> Vec<u32> {
    struct Read(Vec<u32>);
    impl ModuleVisitor for Read {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.extend(param.val().into_data().iter::<f32>().map(f32::to_bits));
        }
    }
    let mut read = Read(Vec::new());
    module.visit(&mut read);
    read.0
}

/// The lines without what depends on the clock.
fn timeless(lines: Vec<Line>) -> Vec<Line> {
    let without = |line: Line| match line {
        Line::Step(mut step) => {
            assert!(step.tokens_per_s > 0.0);
            step.tokens_per_s = 0.0;
            Line::Step(step)
        }
        other => other,
    };
    lines.into_iter().map(without).collect()
}

/// The lines as a file would give them back: reading a number may cost its last bit.
fn as_read(lines: &[Line]) -> Vec<Line> {
    let again = |line: &Line| serde_json::from_str(&serde_json::to_string(line).unwrap()).unwrap();
    lines.iter().map(again).collect()
}

#[rstest]
#[case::full(AttentionKind::Full)]
#[case::window(AttentionKind::Window { window: 4 })]
#[case::aha(aha())]
#[case::multi_window(AttentionKind::MultiWindow { windows: vec![2, 6] })]
#[case::l2a(AttentionKind::L2a { window: 4 })]
#[case::rattention(AttentionKind::Rattention { window: 4 })]
#[case::aha_linear(AttentionKind::AhaLinear { window: 4 })]
#[case::random_gate(AttentionKind::RandomGate { window: 4, far_share: 0.3 })]
#[case::qada(AttentionKind::Qada { window: 4, tau: 0.6, sinks: 2 })]
fn a_resumed_run_is_the_uninterrupted_one(#[case] kind: AttentionKind) {
    let setting = Setting::new();
    let routed = !matches!(
        kind,
        AttentionKind::Full | AttentionKind::Window { .. } | AttentionKind::Rattention { .. }
    );
    let mut config = config(kind);
    if routed && matches!(config.model.attention[0], AttentionKind::Aha { .. } | AttentionKind::L2a { .. }) {
        config.budget = Some(Budget { target: 0.4, step: 0.01 });
    }
    let mut whole = setting.trainer(&config);
    let run = setting.run("whole");
    let lines = timeless(finish(&mut whole, &run));
    assert_eq!(as_read(&lines), timeless(metrics::read(&run.join(METRICS)).unwrap()));

    // The same again is the same again, to the bit.
    let mut again = setting.trainer(&config);
    let run = setting.run("again");
    assert_eq!(timeless(finish(&mut again, &run)), lines);
    assert_eq!(bits(again.decoder()), bits(whole.decoder()));

    // Interrupted, and gone on with from the file.
    let run = setting.run("parts");
    let mut first = setting.trainer(&config);
    assert_eq!(stop_after(&mut first, &run, 3), Outcome::Interrupted(3));
    assert_ne!(bits(first.decoder()), bits(whole.decoder()));
    let resume = || {
        let corpus = setting.corpus(&config);
        Trainer::resume(config.clone(), corpus, &Device::flex(), &run.join(CHECKPOINT)).unwrap()
    };
    let mut second = resume();
    assert_eq!(second.steps_taken(), 3);
    finish(&mut second, &run);
    assert_eq!(bits(second.decoder()), bits(whole.decoder()));
    assert_eq!(timeless(metrics::read(&run.join(METRICS)).unwrap()), as_read(&lines));

    // A finished run has nothing left to do, and its checkpoint is its decoder.
    let mut done = resume();
    assert!(finish(&mut done, &run).is_empty());
    let checkpoint = Checkpoint::load(&run.join(CHECKPOINT)).unwrap();
    assert_eq!(bits(&checkpoint.decoder(&Device::flex()).unwrap()), bits(whole.decoder()));

    for line in &lines {
        let far = match line {
            Line::Step(line) => &line.far,
            Line::Validation(line) => &line.far,
            Line::Collapse(_) => continue,
        };
        assert_eq!(far.iter().all(Option::is_some), routed, "{line:?}");
        assert!(far.iter().flatten().flatten().all(|share| (0.0..=1.0).contains(share)), "{line:?}");
    }
    if let Line::Validation(line) = &lines[lines.len() - 1] {
        assert_eq!(!line.kinds.is_empty(), routed);
    }
}

#[rstest]
#[case::full(AttentionKind::Full)]
#[case::aha(aha())]
#[case::l2a(AttentionKind::L2a { window: 4 })]
#[case::qada(AttentionKind::Qada { window: 4, tau: 0.6, sinks: 2 })]
#[case::rattention(AttentionKind::Rattention { window: 4 })]
fn loss_goes_down(#[case] kind: AttentionKind) {
    let setting = Setting::new();
    let mut config = config(kind);
    (config.steps, config.batch, config.accumulation, config.learning_rate) = (60, 4, 1, 1e-2);
    (config.log_every, config.validate_every) = (100, 100);
    let mut trainer = setting.trainer(&config);
    let before = trainer.validate().unwrap().loss;
    // Nothing is known at first: every token is as likely as any other.
    assert!((before - 257f64.ln()).abs() < 0.1, "{before}");
    finish(&mut trainer, &setting.run("run"));
    let after = trainer.validate().unwrap().loss;
    assert!(after < before - 2.0, "{before} before, {after} after");
}

/// Gradients add up: passes of one window each are one pass of all of them.
#[test]
fn accumulated_passes_are_one_batch() {
    let setting = Setting::new();
    let mut config = config(AttentionKind::Full);
    config.steps = 2;
    (config.batch, config.accumulation) = (4, 1);
    let mut batch = setting.trainer(&config);
    finish(&mut batch, &setting.run("batch"));
    (config.batch, config.accumulation) = (1, 4);
    let mut passes = setting.trainer(&config);
    finish(&mut passes, &setting.run("passes"));
    let of =
        |trainer: &Trainer| -> Vec<f32> { bits(trainer.decoder()).into_iter().map(f32::from_bits).collect() };
    for (one, other) in of(&batch).into_iter().zip(of(&passes)) {
        // Adam divides by the size of a gradient: where that is next to nothing, its rounding shows.
        assert!((one - other).abs() < 5e-4, "{one}, {other}");
    }
}

#[test]
fn a_budget_moves_thresholds_towards_its_share() {
    let setting = Setting::new();
    let mut config = config(aha());
    // The model stands still, so that thresholds alone move shares.
    (config.steps, config.learning_rate) = (40, 1e-9);
    config.budget = Some(Budget { target: 0.05, step: 2e-3 });
    let lines = finish(&mut setting.trainer(&config), &setting.run("run"));
    let share = |line: &StepLine| metrics::mean_share(&line.far).unwrap();
    let steps = lines.into_iter().filter_map(|line| match line {
        Line::Step(step) => Some(step),
        _ => None,
    });
    let steps: Vec<StepLine> = steps.collect();
    let last: f64 = steps[30..].iter().map(share).sum::<f64>() / 10.0;
    assert!(share(&steps[0]) > 0.2, "about half of the scores are above a half: {:?}", steps[0]);
    assert!(last < 0.15, "{last}");
    assert!(steps[39].thresholds.iter().all(|&threshold| threshold > 0.5), "{:?}", steps[39].thresholds);
}

#[test]
fn a_collapsed_gate_is_told_of() {
    let setting = Setting::new();
    let mut config = config(aha());
    // Every score is next to 1.
    config.model.router_bias = Some(8.0);
    config.guard = Guard { low: 0.0, high: 0.99, patience: 2 };
    let run = setting.run("run");
    finish(&mut setting.trainer(&config), &run);
    let lines = metrics::read(&run.join(METRICS)).unwrap();
    assert!(
        lines.iter().any(|line| matches!(line, Line::Collapse(collapse) if collapse.step == 3)),
        "{lines:?}"
    );
}

#[test]
fn another_configuration_or_text_is_not_resumed() {
    let setting = Setting::new();
    let mut config = config(aha());
    let run = setting.run("run");
    stop_after(&mut setting.trainer(&config), &run, 1);
    let checkpoint = run.join(CHECKPOINT);
    let resume = |config: &TrainingConfig| {
        Trainer::resume(config.clone(), setting.corpus(config), &Device::flex(), &checkpoint).err().unwrap()
    };
    config.learning_rate = 1.0;
    let error = resume(&config);
    assert!(matches!(&error, Error::OtherRun { setting, .. } if setting == "learning_rate"), "{error}");
    config.learning_rate = 3e-3;
    let slim = run.join("slim");
    Checkpoint::load(&checkpoint).unwrap().weights_alone().save(&slim).unwrap();
    let corpus = setting.corpus(&config);
    let error = Trainer::resume(config.clone(), corpus, &Device::flex(), &slim).err().unwrap();
    assert!(matches!(&error, Error::WeightsAlone { path } if *path == slim), "{error}");
    fs::write(setting.folder.path().join("text.txt"), "another text ".repeat(400)).unwrap();
    let error = resume(&config);
    assert!(matches!(&error, Error::OtherRun { setting, .. } if setting.starts_with("text")), "{error}");
}

#[test]
fn impossible_runs_are_refused() {
    let setting = Setting::new();
    let refused = |change: fn(&mut TrainingConfig)| {
        let mut config = config(aha());
        change(&mut config);
        Trainer::new(config.clone(), setting.corpus(&config), &Device::flex()).err().unwrap()
    };
    let error = refused(|config| config.model.context = 100_000);
    assert!(matches!(error, Error::TooShort { part: "training", .. }), "{error}");
    let error = refused(|config| config.model.kv_heads = 3);
    assert!(
        matches!(error, Error::Attention(bifocal_burn::Error::HeadRatio { heads: 2, kv_heads: 3 })),
        "{error}"
    );
    let error = refused(|config| config.model.attention = vec![AttentionKind::Aha { window: 0 }]);
    assert!(matches!(error, Error::Attention(bifocal_burn::Error::EmptyWindow)), "{error}");
    let gate = AttentionKind::RandomGate { window: 4, far_share: 1.5 };
    let error = Trainer::new(config(gate), setting.corpus(&config(aha())), &Device::flex()).err().unwrap();
    assert!(matches!(error, Error::Attention(bifocal_burn::Error::Option { .. })), "{error}");
    let error = refused(|config| config.steps = 0);
    assert!(matches!(error, Error::Setting { setting: "steps", .. }), "{error}");
}

#[test]
fn the_same_seed_gives_the_same_weights_in_every_kind_that_has_them() {
    let device = Device::flex();
    let decoder = |kind, seed| {
        let config = config(kind);
        bifocal_lm::Decoder::new(&config.model, seed, &device).unwrap()
    };
    let (full, window) = (decoder(AttentionKind::Full, 1), decoder(AttentionKind::Window { window: 3 }, 1));
    assert_eq!(bits(&full), bits(&window));
    assert_ne!(bits(&full), bits(&decoder(AttentionKind::Full, 2)));
    let routed = decoder(aha(), 1);
    let of = |layer: &bifocal_lm::Layer| (bits(&layer.gate), bits(&layer.down));
    assert_eq!(of(&full.layers[1]), of(&routed.layers[1]));
    let bifocal_lm::Attention::Aha(attention) = &routed.layers[0].attention else { panic!("AHA") };
    let bifocal_lm::Attention::Causal(causal) = &full.layers[0].attention else { panic!("full") };
    assert_eq!(bits(&attention.projections), bits(&causal.projections));
    // Layers differ, and L2A's routers start at zero.
    assert_ne!(of(&full.layers[0]), of(&full.layers[1]));
    let l2a = decoder(AttentionKind::L2a { window: 3 }, 1);
    let bifocal_lm::Attention::L2a(attention) = &l2a.layers[0].attention else { panic!("L2A") };
    assert!(bits(&attention.router).iter().all(|&bits| bits == 0));
}
