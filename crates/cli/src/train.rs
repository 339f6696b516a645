//! `bifocal train`: a small decoder on text.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use bifocal_lm::{
    AttentionKind, Budget, CHECKPOINT, Collapse, Corpus, Line, Outcome, Precision, Progress, Side, Trainer,
    TrainingConfig, metrics::mean_share,
};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::{DeviceName, output};

/// What a run is, in the run's folder.
const RUN: &str = "run.json";

#[derive(Args)]
pub(crate) struct Options {
    /// Files and folders to learn from; may be given several times.
    #[arg(long, value_name = "PATH", num_args = 1.., required_unless_present = "resume")]
    text: Vec<PathBuf>,
    /// The run's folder, for its checkpoint and its metrics.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Go on with the run in that folder. Its settings hold; one that is given has to be the same.
    #[arg(long)]
    resume: bool,
    /// Settings as JSON; options go before them.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to train. On `cpu` dense parts run on Burn's Flex and attention on the CPU runtime.
    #[arg(long)]
    device: Option<DeviceName>,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    training: TrainingOptions,
}

#[derive(Args)]
#[command(next_help_heading = "Model")]
struct ModelOptions {
    /// How layers attend: one kind for all, or one per layer.
    #[arg(long, value_delimiter = ',', value_name = "KIND")]
    attention: Vec<KindName>,
    /// Keys in the near branch, the query's own included; several for multi-window.
    #[arg(long, value_delimiter = ',', value_name = "N")]
    window: Vec<usize>,
    /// QAdA's threshold: a row stays near iff its near keys are predicted to hold this share of the softmax.
    #[arg(long, value_name = "X")]
    tau: Option<f64>,
    /// Tokens at the start of the text that QAdA shows to every query; 16 unless given.
    #[arg(long, value_name = "N")]
    sinks: Option<u32>,
    /// The share of token-heads that a random gate sends far.
    #[arg(long, value_name = "X")]
    far_share: Option<f64>,
    /// Layers.
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Length of a hidden state.
    #[arg(long, value_name = "N")]
    model_dim: Option<usize>,
    /// Query heads.
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Key and value heads.
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
    /// Channels inside the feed-forward block.
    #[arg(long, value_name = "N")]
    feed_forward: Option<usize>,
    /// Tokens (bytes) that the model sees at once.
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Where the bias of AHA's gates starts; none unless given.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    router_bias: Option<f32>,
}

#[derive(Args)]
#[command(next_help_heading = "Training")]
struct TrainingOptions {
    /// Optimiser steps.
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Windows of text in a pass.
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Passes in a step.
    #[arg(long, value_name = "N")]
    accumulation: Option<usize>,
    /// The learning rate after the warm-up.
    #[arg(long, value_name = "X")]
    learning_rate: Option<f64>,
    /// Steps over which the learning rate rises.
    #[arg(long, value_name = "N")]
    warm_up: Option<u64>,
    /// Where weights, windows of text and coins are drawn from.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// The element type of the pass; weights are f32.
    #[arg(long)]
    precision: Option<PrecisionName>,
    /// The weight of the penalty on looking far, for every kind of router in the model.
    #[arg(long, value_name = "X")]
    penalty: Option<f64>,
    /// Steer to this share of far by moving thresholds.
    #[arg(long, value_name = "X")]
    budget: Option<f64>,
    /// Steps between two lines of metrics.
    #[arg(long, value_name = "N")]
    log_every: Option<u64>,
    /// Steps between two validations.
    #[arg(long, value_name = "N")]
    validate_every: Option<u64>,
    /// Steps between two checkpoints.
    #[arg(long, value_name = "N")]
    save_every: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum KindName {
    Full,
    Window,
    Aha,
    MultiWindow,
    L2a,
    Qada,
    Rattention,
    AhaLinear,
    RandomGate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PrecisionName {
    F32,
    Bf16,
}

/// A run's settings, text and device, as its folder keeps them.
#[derive(Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) config: TrainingConfig,
    pub(crate) text: Vec<PathBuf>,
    pub(crate) device: DeviceName,
}

impl Run {
    /// What the run in a folder is.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(RUN);
        let json = fs::read(&path).with_context(|| format!("{} holds no run", folder.display()))?;
        serde_json::from_slice(&json).with_context(|| format!("{} describes no run", path.display()))
    }
}

/// The run was told to stop, and is saved.
#[derive(Debug)]
pub(crate) struct Interrupted {
    folder: PathBuf,
    step: u64,
}

impl Interrupted {
    /// What a shell expects of a program that SIGINT ended.
    pub(crate) const EXIT_CODE: u8 = 130;
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { folder, step } = self;
        write!(
            f,
            "interrupted after step {step}; go on with `bifocal train --resume --out {}`",
            folder.display()
        )
    }
}

impl std::error::Error for Interrupted {}

pub(crate) fn run(options: &Options) -> Result<()> {
    let run = describe(options)?;
    let corpus = Corpus::open(&run.text, run.config.seed)?;
    let device = run.device.burn()?;
    println!(
        "{} tokens in {} documents{}; {} on {}",
        corpus.tokens(),
        corpus.documents(),
        match corpus.skipped() {
            0 => String::new(),
            skipped => format!(" ({skipped} binary files left out)"),
        },
        kinds(&run.config),
        run.device.as_str(),
    );
    let checkpoint = options.out.join(CHECKPOINT);
    let mut trainer = match options.resume && checkpoint.exists() {
        true => Trainer::resume(run.config.clone(), corpus, &device, &checkpoint)?,
        false => Trainer::new(run.config.clone(), corpus, &device)?,
    };
    fs::create_dir_all(&options.out).with_context(|| format!("cannot create {}", options.out.display()))?;
    output::write_json(&options.out.join(RUN), &run)?;

    let signals = Signals::catch()?;
    let bar = bar(run.config.steps, trainer.steps_taken());
    let mut first = (trainer.steps_taken() < run.config.steps).then(Instant::now);
    if first.is_some() {
        println!("The first step compiles its kernels.");
        bar.set_message("compiling the kernels of the first step");
        bar.enable_steady_tick(Duration::from_millis(500));
    }
    let outcome = trainer.run(&options.out, &signals.stop, &mut |progress| {
        if let Some(start) = first.take() {
            // A step is launched before its last kernel is compiled. What fails here fails the run when a number is read.
            device.sync().ok();
            signals.at_once.store(false, Ordering::Relaxed);
            bar.set_message("");
            bar.suspend(|| println!("It took {:.1} s.", start.elapsed().as_secs_f64()));
        }
        show(&bar, progress);
    });
    bar.finish_and_clear();
    match outcome? {
        Outcome::Finished => {
            println!("done: {}", options.out.display());
            Ok(())
        }
        Outcome::Interrupted(step) => Err(Interrupted { folder: options.out.clone(), step }.into()),
    }
}

/// What is to be run: the settings of the run that is resumed, or of a file, or none, with the options over them.
fn describe(options: &Options) -> Result<Run> {
    let exists = options.out.join(RUN).exists();
    let mut run = match options.resume {
        true => Run::read(&options.out)?,
        false if exists => {
            bail!(
                "{} holds a run already: go on with it (--resume), or give another folder",
                options.out.display()
            )
        }
        false => Run { config: TrainingConfig::default(), text: Vec::new(), device: DeviceName::Cpu },
    };
    if let Some(path) = &options.config {
        let json = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        run.config = serde_json::from_slice(&json)
            .with_context(|| format!("{} holds no settings of a training", path.display()))?;
    }
    if !options.text.is_empty() {
        run.text = options.text.clone();
    }
    if let Some(device) = options.device {
        run.device = device;
    }
    options.model.apply(&mut run.config)?;
    options.training.apply(&mut run.config);
    run.config.check()?;
    Ok(run)
}

fn set<T>(field: &mut T, option: Option<T>) {
    if let Some(value) = option {
        *field = value;
    }
}

impl ModelOptions {
    fn apply(&self, config: &mut TrainingConfig) -> Result<()> {
        let model = &mut config.model;
        set(&mut model.layers, self.layers);
        set(&mut model.d_model, self.model_dim);
        set(&mut model.heads, self.heads);
        set(&mut model.kv_heads, self.kv_heads);
        set(&mut model.feed_forward, self.feed_forward);
        set(&mut model.context, self.context);
        if self.router_bias.is_some() {
            model.router_bias = self.router_bias;
        }
        if !self.attention.is_empty() {
            model.attention = self.attention.iter().map(|&kind| self.kind(kind)).collect::<Result<_>>()?;
        } else if !self.window.is_empty()
            || self.far_share.is_some()
            || self.tau.is_some()
            || self.sinks.is_some()
        {
            bail!("--window, --tau, --sinks and --far-share say more about --attention, which is not given");
        }
        Ok(())
    }

    fn kind(&self, kind: KindName) -> Result<AttentionKind> {
        let window = || match self.window.as_slice() {
            &[window] => Ok(window),
            _ => bail!("--window has {} numbers, expected one for {}", self.window.len(), name(kind)),
        };
        Ok(match kind {
            KindName::Full => AttentionKind::Full,
            KindName::Window => AttentionKind::Window { window: window()? },
            KindName::Aha => AttentionKind::Aha { window: window()? },
            KindName::L2a => AttentionKind::L2a { window: window()? },
            KindName::Rattention => AttentionKind::Rattention { window: window()? },
            KindName::AhaLinear => AttentionKind::AhaLinear { window: window()? },
            KindName::MultiWindow if self.window.is_empty() => bail!("multi-window needs --window N,N"),
            KindName::MultiWindow => AttentionKind::MultiWindow { windows: self.window.clone() },
            KindName::Qada => {
                let tau = self.tau.context("qada needs --tau")?;
                AttentionKind::Qada { window: window()?, tau, sinks: self.sinks.unwrap_or(16) }
            }
            KindName::RandomGate => {
                let far_share = self.far_share.context("random-gate needs --far-share")?;
                AttentionKind::RandomGate { window: window()?, far_share }
            }
        })
    }
}

fn name(kind: KindName) -> String {
    kind.to_possible_value().map_or(String::new(), |value| value.get_name().to_string())
}

impl TrainingOptions {
    fn apply(&self, config: &mut TrainingConfig) {
        set(&mut config.steps, self.steps);
        set(&mut config.batch, self.batch);
        set(&mut config.accumulation, self.accumulation);
        set(&mut config.learning_rate, self.learning_rate);
        set(&mut config.warm_up, self.warm_up);
        set(&mut config.seed, self.seed);
        let precision = self.precision.map(|precision| match precision {
            PrecisionName::F32 => Precision::F32,
            PrecisionName::Bf16 => Precision::Bf16,
        });
        set(&mut config.precision, precision);
        if let Some(weight) = self.penalty {
            let penalties = &mut config.penalties;
            (penalties.aha, penalties.multi_window, penalties.l2a) = (weight, weight, weight);
        }
        if let Some(target) = self.budget {
            // LoGo's step, unless a file says otherwise.
            let step = config.budget.map_or(5e-4, |budget| budget.step);
            config.budget = Some(Budget { target, step });
        }
        set(&mut config.log_every, self.log_every);
        set(&mut config.validate_every, self.validate_every);
        set(&mut config.save_every, self.save_every);
    }
}

/// The kinds of attention in a model, each once, with their windows.
pub(crate) fn kinds(config: &TrainingConfig) -> String {
    let mut names: Vec<String> = Vec::new();
    for kind in &config.model.attention {
        let name = match kind {
            AttentionKind::MultiWindow { windows } => {
                let windows: Vec<_> = windows.iter().map(usize::to_string).collect();
                format!("{} {}", kind.name(), windows.join("/"))
            }
            AttentionKind::Custom { name } => name.clone(),
            _ => match kind.window() {
                Some(window) => format!("{} {window}", kind.name()),
                None => kind.name().to_string(),
            },
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(" + ")
}

/// What Ctrl-C and requests to terminate do.
struct Signals {
    /// Becomes true at the first one.
    stop: Arc<AtomicBool>,
    /// Whether the next one ends the process then and there: before the first step, when nothing is lost by it, and once
    /// the run was told to stop.
    at_once: Arc<AtomicBool>,
}

impl Signals {
    fn catch() -> Result<Self> {
        let signals = Self { stop: Arc::default(), at_once: Arc::new(AtomicBool::new(true)) };
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first one finds the flags as they were.
            signal_hook::flag::register_conditional_shutdown(
                signal,
                i32::from(Interrupted::EXIT_CODE),
                Arc::clone(&signals.at_once),
            )?;
            signal_hook::flag::register(signal, Arc::clone(&signals.at_once))?;
            signal_hook::flag::register(signal, Arc::clone(&signals.stop))?;
        }
        Ok(signals)
    }
}

fn bar(steps: u64, taken: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {eta} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(steps).with_style(style).with_position(taken);
    // What is left takes as long per step as what is taken from here on.
    bar.reset_eta();
    bar
}

fn show(bar: &ProgressBar, progress: Progress<'_>) {
    match progress {
        Progress::Step(step) => bar.set_position(step),
        Progress::Line(Line::Step(line)) => {
            let far =
                mean_share(&line.far).map_or(String::new(), |far| format!(", {:.1} % far", far * 100.0));
            bar.set_message(format!("loss {:.3}{far}, {:.0} tokens/s", line.loss, line.tokens_per_s));
        }
        Progress::Line(Line::Validation(line)) => {
            let far =
                mean_share(&line.far).map_or(String::new(), |far| format!(", {:.1} % far", far * 100.0));
            bar.suspend(|| println!("step {}: validation loss {:.4}{far}", line.step, line.loss));
        }
        Progress::Line(Line::Collapse(collapse)) => bar.suspend(|| eprintln!("{}", warning(collapse))),
        Progress::Saved(_) => {}
    }
}

fn warning(collapse: &Collapse) -> String {
    let Collapse { step, layer, head, side, share } = collapse;
    let what = match side {
        Side::Near => "hardly ever looks far",
        Side::Far => "nearly always looks far",
    };
    format!("warning: head {head} of layer {layer} {what} ({:.1} % at step {step})", share * 100.0)
}
