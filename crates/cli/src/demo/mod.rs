//! `bifocal demo`: a small decoder with AHA layers over real text, checked against the oracle.

mod heat_map;
mod measure;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bifocal_lm::{Attention, AttentionKind, Decoder, ModelConfig, Pass};
use burn::{
    module::Param,
    tensor::{Device, Int, Tensor, TensorData},
};
use clap::Args;
use serde::Serialize;

use crate::{DeviceName, model, output};
use measure::{Attended, LayerReport};

/// What the demo reads unless it is given a file: pages of that book.
const BOOK: [&str; 4] = [
    include_str!("../../../../docs/src/introduction.md"),
    include_str!("../../../../docs/src/architecture.md"),
    include_str!("../../../../docs/src/semantics.md"),
    include_str!("../../../../docs/src/systems/aha.md"),
];

#[derive(Args)]
pub(crate) struct Options {
    /// The text to read (UTF-8); pages of Bifocal's book unless given.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// How many tokens (bytes) of the text to read.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=65536))]
    tokens: u32,
    /// Show what this run of `bifocal train` has learned: its folder, or what `bifocal export` made of it. In place of the
    /// small decoder inside, which has learned from Bifocal's book.
    #[arg(long, value_name = "RUN", conflicts_with = "random")]
    run: Option<PathBuf>,
    /// Show a larger decoder whose weights are random: the mechanism at any length, and nothing learned.
    #[arg(long)]
    random: bool,
    /// Keys in the near branch of the random decoder, the query's own included.
    #[arg(long, default_value_t = 64, requires = "random")]
    window: usize,
    /// Layers of the random decoder.
    #[arg(long, default_value_t = 4, requires = "random", value_parser = clap::value_parser!(u16).range(1..=64))]
    layers: u16,
    /// Seed of the random decoder's weights.
    #[arg(long, default_value_t = 7, requires = "random")]
    seed: u64,
    /// Where the model runs. On `cpu` its dense parts run on Burn's Flex and attention on the CPU runtime.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    /// Where to save the heat map of routes.
    #[arg(long, value_name = "FILE.svg", default_value = "bifocal-routes.svg")]
    plot: PathBuf,
    /// Write the measurements as JSON to this file (`-` for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    device: &'static str,
    text: String,
    tokens: usize,
    window: usize,
    layers: Vec<LayerReport>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let (name, mut tokens) = tokenise(options)?;
    let device = options.device.burn()?;
    let (decoder, model, weights) = decoder(options, tokens.len(), &device)?;
    let Some(window) = (0..model.layers).find_map(|index| match model.attention_of(index) {
        AttentionKind::Aha { window } => Some(*window),
        _ => None,
    }) else {
        bail!("the run has no AHA layer to show");
    };
    tokens.truncate(model.context);
    let quiet = options.json.as_deref() == Some(Path::new("-"));
    if !quiet {
        println!(
            "{} tokens of {name}, one per byte; {} layers x {} heads ({} kv) x {}, window {window}",
            tokens.len(),
            model.layers,
            model.heads,
            model.kv_heads,
            model.d_model / model.heads,
        );
        println!("{weights}\n");
    }

    let ids: Vec<i32> = tokens.iter().map(|&byte| i32::from(byte)).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, tokens.len()]), &device);
    let bar = output::progress(decoder.layers.len());
    let mut layers = Vec::new();
    let mut hidden = decoder.embedding.forward(ids);
    for (index, layer) in decoder.layers.iter().enumerate() {
        bar.set_message(format!("layer {index}: attending, timing, comparing with the oracle"));
        let attended = match &layer.attention {
            Attention::Aha(aha) => {
                let attended = Attended::new(aha, layer.normed(hidden.clone()))?;
                layers.push(measure::layer(index, aha, &attended)?);
                hidden + attended.output
            }
            _ => layer.attend(hidden, index, Pass::default())?.0,
        };
        hidden = layer.mix_channels(attended);
        bar.inc(1);
    }
    bar.finish_and_clear();

    output::write(&options.plot, heat_map::svg(&layers)?.as_bytes())?;
    let report = Report { device: options.device.as_str(), text: name, tokens: tokens.len(), window, layers };
    if let Some(path) = &options.json {
        output::write_json(path, &report)?;
    }
    if !quiet {
        print(&report, &options.plot);
    }
    match report.layers.iter().find(|layer| layer.error > layer.tolerance) {
        Some(layer) => bail!(
            "layer {} is {:.1e} off the oracle, more than {:.1e}",
            layer.layer,
            layer.error,
            layer.tolerance
        ),
        None => Ok(()),
    }
}

/// The text's name and its first tokens: bytes, the tokeniser that every text has.
fn tokenise(options: &Options) -> Result<(String, Vec<u8>)> {
    let (name, text) = match &options.text {
        None => ("Bifocal's book".to_string(), BOOK.concat()),
        Some(path) => {
            let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            let text =
                String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", path.display()))?;
            (path.display().to_string(), text)
        }
    };
    if text.len() < 2 {
        bail!("{name} has {} bytes of text, expected at least 2", text.len());
    }
    let mut tokens = text.into_bytes();
    tokens.truncate(options.tokens.max(2) as usize);
    Ok((name, tokens))
}

/// The decoder that is shown: one that has learned, or one with random weights. With what is to be said of its weights.
fn decoder(options: &Options, tokens: usize, device: &Device) -> Result<(Decoder, ModelConfig, String)> {
    if !options.random {
        let (checkpoint, whose) = model::read(options.run.as_deref())?;
        let weights = format!("The weights are those of {whose}, after {} steps.", checkpoint.step());
        return Ok((checkpoint.decoder(device)?, checkpoint.config().model.clone(), weights));
    }
    // Eight heads of 64 over four kv heads: enough for routes to differ, small enough for two cores.
    let mut model = ModelConfig::default();
    (model.layers, model.d_model, model.feed_forward) = (usize::from(options.layers), 512, 1024);
    model.context = tokens;
    model.attention = vec![AttentionKind::Aha { window: options.window }];
    let mut decoder = Decoder::new(&model, options.seed, device)?;
    for (index, layer) in decoder.layers.iter_mut().enumerate() {
        if let Attention::Aha(aha) = &mut layer.attention {
            // Later layers look far less often, so that the picture shows more than one share.
            let bias = Tensor::full([model.heads], -0.4 - 0.3 * index as f32, device);
            aha.router.bias = Some(Param::from_tensor(bias));
        }
    }
    let weights = "The weights are random, not trained: routes show the mechanism, not what language needs.";
    Ok((decoder, model, weights.to_string()))
}

fn print(report: &Report, plot: &Path) {
    let mut table = output::table(["layer", "far", "far by head, %", "routed", "dense", "off the oracle"]);
    for layer in &report.layers {
        let heads: Vec<String> =
            layer.far_by_head.iter().map(|share| format!("{:.0}", share * 100.0)).collect();
        table.add_row([
            layer.layer.to_string(),
            format!("{:.1} %", layer.far_share() * 100.0),
            heads.join(" "),
            format!("{:.1} ms", layer.routed_ms),
            format!("{:.1} ms ({:.1} x)", layer.dense_ms, layer.dense_ms / layer.routed_ms),
            format!("{:.1e}", layer.error),
        ]);
    }
    println!("{table}");
    println!("Largest error against the float64 oracle: {:.1e}", worst(report));
    println!("Where each head looks far: {}", plot.display());
}

fn worst(report: &Report) -> f64 {
    report.layers.iter().map(|layer| layer.error).fold(0.0, f64::max)
}
