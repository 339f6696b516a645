//! `bifocal masses`: how well moments of keys predict what queries would miss, on what a run has learned.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use bifocal::{
    AttentionOperator, Covariance, Element, Inputs, MomentGate, Partial, Qada, Rows, Tensor, Window,
    cubecl::client::Client,
};
use bifocal_lm::{CHECKPOINT, Checkpoint, Pass};
use burn::tensor::{Int, TensorData};
use clap::Args;
use serde::Serialize;

use crate::{
    DeviceName, output,
    plot::{self, Figure, Heat, Lines, Scatter, Series},
};

#[derive(Args)]
pub(crate) struct Options {
    /// The run whose queries and keys are looked at (`bifocal train`).
    #[arg(long, value_name = "FOLDER")]
    run: PathBuf,
    /// The text to read, up to the run's context; one token per byte.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Keys in the near branch, the query's own included.
    #[arg(long, default_value_t = 64)]
    window: usize,
    /// Tokens at the start of the text that every query sees.
    #[arg(long, default_value_t = 16)]
    sinks: u32,
    /// A row is local iff its near keys hold at least this share of the softmax.
    #[arg(long, default_value_t = 0.9)]
    tau: f32,
    /// Look at the variance of each channel only.
    #[arg(long)]
    diagonal: bool,
    /// Where the model runs.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    /// Draw shares over tau, mistakes by head, and predicted against true masses into this file.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Write the measurements as JSON to this file (`-` for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What a head's rows would miss, true and predicted.
#[derive(Serialize)]
struct Head {
    layer: usize,
    head: usize,
    /// Rows that have a bulk at all.
    rows: usize,
    /// The mean difference between predicted and true logarithm of the bulk's mass, and the mean of its size.
    bias_nats: f64,
    error_nats: f64,
    /// Shares of rows at `tau`.
    #[serde(flatten)]
    rates: Rates,
}

/// Shares of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Rates {
    /// That need to look far,
    far: f64,
    /// and are predicted to.
    predicted_far: f64,
    /// That need to and are not.
    false_local: f64,
    /// That are and need not.
    false_global: f64,
}

/// A row with a bulk: its true and its predicted mass over that of the near keys, in nats.
#[derive(Clone, Copy, Debug)]
struct Row {
    truth: f64,
    predicted: f64,
}

#[derive(Serialize)]
struct Report {
    window: usize,
    sinks: u32,
    tau: f32,
    diagonal: bool,
    tokens: usize,
    heads: Vec<Head>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let covariance = if options.diagonal { Covariance::Diagonal } else { Covariance::Full };
    let gate = MomentGate::new(Window::new(options.window)?, options.tau)?;
    let lens = Qada::new(gate.with_sinks(options.sinks).with_covariance(covariance));
    let client = bifocal::open(options.device.as_str())?;
    let device = options.device.burn()?;
    let checkpoint = Checkpoint::load(&options.run.join(CHECKPOINT))?;
    let decoder = checkpoint.decoder(&device)?;
    let text =
        std::fs::read(&options.text).with_context(|| format!("cannot read {}", options.text.display()))?;
    let ids: Vec<i32> = text.iter().take(checkpoint.config().model.context).copied().map(i32::from).collect();
    let tokens = ids.len();
    if tokens < 2 {
        bail!("{} has {tokens} bytes of text, expected at least 2", options.text.display());
    }

    let ids = burn::tensor::Tensor::<2, Int>::from_data(TensorData::new(ids, [1, tokens]), &device);
    let bar = output::progress(decoder.layers.len());
    let (mut heads, mut by_head) = (Vec::new(), Vec::new());
    let mut hidden = decoder.embedding.forward(ids);
    for (index, layer) in decoder.layers.iter().enumerate() {
        bar.set_message(format!("layer {index}"));
        if let Some((projections, rope)) = layer.attention.projections() {
            let [query, key, value] = projections.project(layer.normed(hidden.clone()), rope);
            let qkv = [upload(&client, query)?, upload(&client, key)?, upload(&client, value)?];
            for (head, rows) in measure(&client, &lens, &qkv)?.into_iter().enumerate() {
                heads.push(Head::new(index, head, &rows, f64::from(options.tau)));
                by_head.push(rows);
            }
        }
        hidden = layer.mix_channels(layer.attend(hidden, index, Pass::default())?.0);
        bar.inc(1);
    }
    bar.finish_and_clear();
    if by_head.iter().all(Vec::is_empty) {
        bail!(
            "no row of {tokens} tokens has keys beyond {} sinks and a window of {}",
            options.sinks,
            options.window
        );
    }

    if let Some(path) = &options.plot {
        output::write(path, plot::svg(&figures(&heads, &by_head, options.tau))?.as_bytes())?;
    }
    let Options { window, sinks, tau, diagonal, .. } = *options;
    let report = Report { window, sinks, tau, diagonal, tokens, heads };
    if let Some(path) = &options.json {
        output::write_json(path, &report)?;
    }
    if options.json.as_deref() != Some(std::path::Path::new("-")) {
        print(&report);
    }
    Ok(())
}

fn upload(client: &Client, tensor: burn::tensor::Tensor<4>) -> Result<Tensor<4>> {
    let shape = tensor.dims();
    let values = tensor.into_data().try_to_vec::<f32>()?;
    Ok(Tensor::from_f32(client, shape, Element::F32, &values)?)
}

/// The rows of each head that have a bulk.
fn measure(client: &Client, lens: &Qada, [query, key, value]: &[Tensor<4>; 3]) -> Result<Vec<Vec<Row>>> {
    let inputs = Inputs::new(query.view(), key.view(), value.view());
    let problem = inputs.problem()?;
    let masses = |branch: &dyn AttentionOperator| -> Result<Vec<f32>> {
        let partial = Partial::empty(client, &problem, Element::F32);
        branch.attend(client, &problem, &inputs, Rows::All, &partial)?;
        Ok(partial.lse.to_f32(client)?)
    };
    let (near, far) = (masses(&lens.near())?, masses(&lens.far())?);
    let predicted = lens.gate().predict(client, &problem, &inputs, None)?.to_f32(client)?;
    let rows: Vec<Row> = near
        .iter()
        .zip(far.iter().zip(&predicted))
        .map(|(&near, (&far, &predicted))| Row {
            truth: f64::from(far) - f64::from(near),
            predicted: f64::from(predicted) - f64::from(near),
        })
        .collect();
    let with_bulk = |head: &[Row]| head.iter().copied().filter(|row| row.truth > f64::NEG_INFINITY).collect();
    Ok(rows.chunks(problem.query_len).map(with_bulk).collect())
}

impl Head {
    fn new(layer: usize, head: usize, rows: &[Row], tau: f64) -> Self {
        let mean = |of: &dyn Fn(&Row) -> f64| rows.iter().map(of).sum::<f64>() / rows.len().max(1) as f64;
        Self {
            layer,
            head,
            rows: rows.len(),
            bias_nats: mean(&|row| row.predicted - row.truth),
            error_nats: mean(&|row| (row.predicted - row.truth).abs()),
            rates: Rates::new(rows, tau),
        }
    }
}

/// The logarithm of the mass beyond the near keys over theirs from which on a row looks far.
fn cut(tau: f64) -> f64 {
    (1.0 / tau - 1.0).ln()
}

impl Rates {
    fn new(rows: &[Row], tau: f64) -> Self {
        let cut = cut(tau);
        let share = |of: &dyn Fn(bool, bool) -> bool| {
            let count = rows.iter().filter(|row| of(row.truth > cut, row.predicted > cut)).count();
            count as f64 / rows.len().max(1) as f64
        };
        Self {
            far: share(&|truth, _| truth),
            predicted_far: share(&|_, predicted| predicted),
            false_local: share(&|truth, predicted| truth && !predicted),
            false_global: share(&|truth, predicted| !truth && predicted),
        }
    }
}

/// Points that a head has in a scatter plot at most.
const POINTS: usize = 64;

/// Shares over tau, both kinds of mistakes by layer and head, and for each layer what its heads predict.
fn figures(heads: &[Head], rows: &[Vec<Row>], tau: f32) -> Vec<Figure> {
    let mistakes = |title: &str, of: fn(&Rates) -> f64| {
        let layers = heads.chunk_by(|one, other| one.layer == other.layer);
        let row = |layer: &[Head]| {
            let cells = layer.iter().map(|head| of(&head.rates)).collect();
            (format!("layer {}", layer[0].layer), cells)
        };
        Figure::Heat(Heat {
            title: format!("{title} by layer and head, %, tau {tau}"),
            rows: layers.map(row).collect(),
        })
    };
    let mut figures = vec![
        over_tau(&rows.concat()),
        mistakes("falsely local", |rates| rates.false_local),
        mistakes("falsely far", |rates| rates.false_global),
    ];
    let all: Vec<(&Head, &Vec<Row>)> = heads.iter().zip(rows).collect();
    figures.extend(all.chunk_by(|(one, _), (other, _)| one.layer == other.layer).map(|layer| {
        let series = layer.iter().map(|(head, rows)| Series {
            label: format!("head {}", head.head),
            // A prediction that overflowed has no place.
            points: rows
                .iter()
                .step_by(rows.len().div_ceil(POINTS).max(1))
                .filter(|row| row.truth.is_finite() && row.predicted.is_finite())
                .map(|row| (row.truth, row.predicted))
                .collect(),
        });
        Figure::Scatter(Scatter {
            title: format!("layer {}: mass beyond the near keys over theirs, logarithm", layer[0].0.layer),
            x_title: "true, nats",
            y_title: "predicted, nats",
            // Everything looks far at a tau of 1.
            cut: Some(cut(f64::from(tau))).filter(|cut| cut.is_finite()),
            series: series.collect(),
        })
    }));
    figures
}

/// Shares of all heads' rows, by the share of the softmax that near keys have to hold.
fn over_tau(rows: &[Row]) -> Figure {
    let taus = (1..=99).map(f64::from);
    let line = |label: &str, of: fn(Rates) -> f64| Series {
        label: label.into(),
        points: taus.clone().map(|tau| (tau, 100.0 * of(Rates::new(rows, tau / 100.0)))).collect(),
    };
    let series = vec![
        line("need to look far", |rates| rates.far),
        line("predicted to", |rates| rates.predicted_far),
        line("falsely local", |rates| rates.false_local),
        line("falsely far", |rates| rates.false_global),
    ];
    let title = "token-heads that look far, and mistakes, over the share that near keys have to hold".into();
    Figure::Lines(Lines { title, x_title: "tau, %", y_title: "token-heads, %", log_x: false, series })
}

fn print(report: &Report) {
    println!(
        "{} tokens, window {}, {} sinks, tau {}, {} covariance",
        report.tokens,
        report.window,
        report.sinks,
        report.tau,
        if report.diagonal { "diagonal" } else { "full" },
    );
    let header =
        ["layer", "head", "rows", "off, nats", "bias, nats", "far", "predicted", "false local", "false far"];
    let mut table = output::table(header);
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    for head in &report.heads {
        table.add_row([
            head.layer.to_string(),
            head.head.to_string(),
            head.rows.to_string(),
            format!("{:.3}", head.error_nats),
            format!("{:+.3}", head.bias_nats),
            percent(head.rates.far),
            percent(head.rates.predicted_far),
            percent(head.rates.false_local),
            percent(head.rates.false_global),
        ]);
    }
    println!("{table}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_are_counted_on_their_side() {
        // At a tau of 0.5 a row is far iff more than the near keys hold lies beyond them.
        let row = |truth, predicted| Row { truth, predicted };
        let rows = [row(1.0, 2.0), row(1.0, -0.5), row(-1.0, 0.5), row(-1.0, -2.0)];
        let expected = Rates { far: 0.5, predicted_far: 0.5, false_local: 0.25, false_global: 0.25 };
        assert_eq!(Rates::new(&rows, 0.5), expected);
        assert_eq!(Rates::new(&[], 0.5), Rates::default());
        let head = Head::new(1, 2, &rows, 0.5);
        assert_eq!((head.bias_nats, head.error_nats), (0.0, 1.25));
        let svg = plot::svg(&figures(&[head], &[rows.to_vec()], 0.5)).unwrap();
        for text in
            ["need to look far", "falsely far by layer and head, %, tau 0.5", "layer 1: mass", "head 2"]
        {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        // A mark for each row, and one in the legend.
        assert_eq!(svg.matches("<circle").count(), 5, "{svg}");
    }
}
