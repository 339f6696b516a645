//! `bifocal prune`: a run's model without the far branches of layers that seldom look far.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bifocal_lm::{
    AttentionKind, CHECKPOINT, Corpus, METRICS, ModelConfig, Precision, PrunedLayer, Pruning, metrics,
};
use clap::Args;
use serde::Serialize;

use crate::{DeviceName, model, output};

#[derive(Args)]
pub(crate) struct Options {
    /// The folder of a run that `bifocal train` has made; with --text also the file that `bifocal export` made of it.
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Layers whose share of far is below this, from 0 to 1, lose their far branch.
    #[arg(long, value_name = "SHARE")]
    below: f64,
    /// Where the checkpoint goes: a folder that has none yet.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Files and folders to measure shares on, and the loss before and after. Unless given, the shares are those that
    /// training recorded.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    text: Vec<PathBuf>,
    /// How many recorded steps the shares are the mean of: the last ones.
    #[arg(long, value_name = "N", default_value_t = 20, conflicts_with = "text",
        value_parser = clap::value_parser!(u32).range(1..))]
    records: u32,
    /// The tokens of a sequence whose keys and values are counted; as many as the model sees at once unless given.
    #[arg(long, value_name = "N")]
    context: Option<u32>,
    /// Where the text is read.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    /// Write the table as JSON to this file (`-` for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A model before and after.
#[derive(Serialize)]
struct Report {
    step: u64,
    below: f64,
    context: usize,
    layers: Vec<Layer>,
    kv_bytes: BeforeAfter<usize>,
    /// On the text, if one was given, in nats per token.
    loss: Option<BeforeAfter<f64>>,
}

#[derive(Serialize)]
struct Layer {
    layer: usize,
    #[serde(flatten)]
    decided: PrunedLayer,
    pruned: bool,
    /// Bytes of keys and values of one sequence.
    kv_bytes: BeforeAfter<usize>,
}

#[derive(Clone, Copy, Serialize)]
struct BeforeAfter<T> {
    before: T,
    after: T,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let to = options.out.join(CHECKPOINT);
    if to.exists() {
        bail!("{} holds a checkpoint already: give another folder", options.out.display());
    }
    let (checkpoint, _) = model::read(Some(&options.run))?;
    let config = checkpoint.config();
    let corpus = match options.text.is_empty() {
        true => None,
        false => Some((Corpus::open(&options.text, config.seed)?, options.device.burn()?)),
    };
    let before = corpus.as_ref().map(|(corpus, device)| checkpoint.validate(corpus, device)).transpose()?;
    let far = match &before {
        Some(measured) => measured.far.clone(),
        None if options.run.is_dir() => {
            metrics::recorded_far(&options.run.join(METRICS), checkpoint.step(), options.records as usize)?
        }
        None => {
            bail!("{} is no folder with the metrics of a run: measure on a --text", options.run.display())
        }
    };
    let pruning = Pruning::new(&config.model, &far, options.below)?;
    let pruned = checkpoint.pruned(&pruning);
    let after = corpus.as_ref().map(|(corpus, device)| pruned.validate(corpus, device)).transpose()?;
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("cannot create {}", options.out.display()))?;
    pruned.save(&to)?;

    let context = options.context.map_or(config.model.context, |context| context as usize);
    let layers = layers(&pruning, context, config.precision);
    let report = Report {
        step: checkpoint.step(),
        below: options.below,
        context,
        kv_bytes: BeforeAfter {
            before: layers.iter().map(|layer| layer.kv_bytes.before).sum(),
            after: layers.iter().map(|layer| layer.kv_bytes.after).sum(),
        },
        layers,
        loss: before.zip(after).map(|(before, after)| BeforeAfter { before: before.loss, after: after.loss }),
    };
    if let Some(path) = &options.json {
        output::write_json(path, &report)?;
    }
    if options.json.as_deref() != Some(Path::new("-")) {
        print(&report, &to);
    }
    Ok(())
}

fn layers(pruning: &Pruning, context: usize, precision: Precision) -> Vec<Layer> {
    let &ModelConfig { d_model, heads, kv_heads, .. } = pruning.model();
    let element = match precision {
        Precision::Bf16 => 2,
        _ => 4,
    };
    let bytes =
        |kind: &AttentionKind| kind.cached_tokens(context) * 2 * kv_heads * (d_model / heads) * element;
    let layer = |(layer, decided): (usize, &PrunedLayer)| Layer {
        layer,
        pruned: decided.is_pruned(),
        kv_bytes: BeforeAfter { before: bytes(&decided.before), after: bytes(&decided.after) },
        decided: decided.clone(),
    };
    pruning.layers().iter().enumerate().map(layer).collect()
}

fn print(report: &Report, to: &Path) {
    let share = |share: Option<f64>| share.map_or("-".to_string(), |share| format!("{:.2} %", share * 100.0));
    let size = |bytes: usize| format!("{:.1} KiB", bytes as f64 / 1024.0);
    println!(
        "Keys and values of {} tokens, by the shares of far after step {}:",
        report.context, report.step
    );
    let header = ["layer", "attention", "far", "most far-sighted head", "becomes", "KV before", "KV after"];
    let mut table = output::table(header);
    for Layer { layer, decided, pruned, kv_bytes } in &report.layers {
        table.add_row([
            layer.to_string(),
            name(&decided.before),
            share(decided.far),
            share(decided.most),
            if *pruned { name(&decided.after) } else { "kept".to_string() },
            size(kv_bytes.before),
            size(kv_bytes.after),
        ]);
    }
    println!("{table}");
    let BeforeAfter { before, after } = report.kv_bytes;
    let saved = 100.0 * (1.0 - after as f64 / before.max(1) as f64);
    println!("In all {} before, {} after: {saved:.1} % less.", size(before), size(after));
    if let Some(BeforeAfter { before, after }) = report.loss {
        println!("Loss on the text: {before:.4} before, {after:.4} after ({:+.4}).", after - before);
    }
    let pruned = report.layers.iter().filter(|layer| layer.pruned).count();
    let below = share(Some(report.below));
    match pruned {
        0 => println!(
            "No layer looks far for less than {below} of its tokens: {} has the model as it was.",
            to.display()
        ),
        _ => println!("{}: the weights without the far branches of {pruned} layers", to.display()),
    }
}

/// The kind and its window, if it has one of them.
fn name(kind: &AttentionKind) -> String {
    match kind.window() {
        Some(window) if !matches!(kind, AttentionKind::MultiWindow { .. }) => {
            format!("{} {window}", kind.name())
        }
        _ => kind.name().to_string(),
    }
}
