//! `bifocal bench`: the operators at chosen shapes; `bifocal bench decode`: decode steps.

mod cases;
mod clock;
mod decode;
mod gates;
mod operators;
mod useful;

use std::path::PathBuf;

use anyhow::{Context, Result};
use bifocal::{DeviceProfile, Rattention, Window, cubecl::client::Client};
use clap::{Args, Subcommand};

use crate::{DeviceName, output, shape::Shape, timings::Report};
use cases::{CASES, CaseName};
use gates::Gates;
use operators::Bench;

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: Option<What>,
    /// The device to time.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    #[command(flatten)]
    shape: Shape,
    /// Keys in the window, the query's own included.
    #[arg(long, default_value_t = 256)]
    window: usize,
    /// Share of token-heads (AHA, QAdA) that look far.
    #[arg(long, default_value_t = 0.067)]
    far_share: f64,
    /// Share of tokens (L2A) that look far.
    #[arg(long, default_value_t = 0.2)]
    far_tokens: f64,
    /// How the routes of AHA and L2A are drawn.
    #[arg(long, default_value = "random")]
    gates: Gates,
    /// Cases to time; all that the routine asked for can run unless given, but for those that are portable by name.
    #[arg(long, value_delimiter = ',')]
    cases: Vec<CaseName>,
    /// Time attention's forward and backward pass together; routers learn in aha-exact alone.
    #[arg(long)]
    backward: bool,
    /// Timed runs per case; the median is reported.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Write the timings as JSON to this file (`-` for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Subcommand)]
enum What {
    /// Time decode steps over a full cache, by the bytes that they need.
    Decode(Box<decode::Options>),
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if let Some(What::Decode(options)) = &options.what {
        return decode::run(options);
    }
    let client = bifocal::open(options.device.as_str())?;
    let shape = &options.shape;
    let cases =
        if options.cases.is_empty() { default_cases(options, &client)? } else { options.cases.clone() };
    let bar = output::progress(shape.lengths.len() * cases.len());
    let mut timings = Vec::new();
    for &length in &shape.lengths {
        let mut bench = Bench::new(&client, options, length)?;
        if cases.iter().any(|case| case.knows_moments()) {
            bench.calibrate()?;
        }
        for &case in &cases {
            let message = format!("{} at {length}", bench.name(case));
            bar.set_message(message.clone());
            timings.push(bench.time(case).context(message)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let report = Report {
        device: options.device.as_str().into(),
        name: DeviceProfile::of(&client).name,
        library: None,
        element: shape.element().to_string(),
        batch: shape.batch,
        heads: shape.heads,
        kv_heads: shape.kv_heads(),
        head_dim: shape.head_dim,
        window: options.window,
        queries: None,
        page_size: None,
        softcap: shape.softcap,
        gates: Some(options.gates.name().into()),
        far_share: Some(options.far_share),
        far_tokens: Some(options.far_tokens),
        model_dim: Some(shape.model_dim),
        runs: options.runs,
        timings,
    };
    if let Some(path) = &options.json {
        output::write_json(path, &report)?;
    }
    if options.json.as_deref() != Some(std::path::Path::new("-")) {
        print(&report);
    }
    Ok(())
}

/// All cases, but for linear attention where a routine is asked for that it has no kernel of.
fn default_cases(options: &Options, client: &Client) -> Result<Vec<CaseName>> {
    let far = Rattention::new(Window::new(options.window)?).far();
    let problem = options.shape.problem(options.shape.lengths.first().copied().unwrap_or(1))?;
    let profile = DeviceProfile::of(client);
    let runs = match options.backward {
        true => far.choose_backward(&problem, &profile).is_ok(),
        false => far.choose(&problem, &profile).is_ok(),
    };
    // Nor is what moments do not know.
    let capped = options.shape.softcap.is_some();
    let fits = |case: &CaseName| (!case.has_states() || runs) && !(capped && case.knows_moments());
    Ok(CASES.into_iter().filter(fits).collect())
}

fn print(report: &Report) {
    println!(
        "{} ({}), {}, {} x {} heads ({} kv) x {}, window {}, {} gates",
        report.device,
        report.name,
        report.element,
        report.batch,
        report.heads,
        report.kv_heads,
        report.head_dim,
        report.window,
        report.gates.as_deref().unwrap_or("random"),
    );
    let mut table = output::table([
        "case",
        "length",
        "routine",
        "far",
        "median ms",
        "fastest ms",
        "replayed ms",
        "useful GFLOP/s",
        "MiB beside inputs",
        "first call ms",
    ]);
    for timing in &report.timings {
        table.add_row([
            timing.case.clone(),
            timing.length.to_string(),
            timing.routine.clone().unwrap_or_default(),
            timing.far_share.map_or("-".to_string(), |share| format!("{:.1} %", share * 100.0)),
            format!("{:.3}", timing.median_ms),
            format!("{:.3}", timing.fastest_ms),
            timing.replayed_ms.map_or("-".to_string(), |replayed| format!("{replayed:.3}")),
            timing.useful_gflops.map_or("-".to_string(), |rate| format!("{rate:.1}")),
            timing.memory_bytes.map_or("-".to_string(), |bytes| format!("{:.1}", bytes as f64 / 1048576.0)),
            format!("{:.0}", timing.first_call_ms),
        ]);
    }
    println!("{table}");
}
