//! `bifocal check`: the property suite on one device.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Result, bail};
use bifocal_testing::{Device, Effort, Property, properties};
use clap::Args;
use serde::Serialize;

use crate::{DeviceName, output};

#[derive(Args)]
pub(crate) struct Options {
    /// The device to check.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    /// Random cases per property.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    cases: u32,
    /// Where the random cases start.
    #[arg(long, default_value_t = 2026)]
    seed: u64,
    /// Check this property alone; may be given several times.
    #[arg(long, value_name = "PROPERTY")]
    only: Vec<String>,
    /// List the properties and stop.
    #[arg(long)]
    list: bool,
    /// Write the results as JSON to this file (`-` for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    device: &'static str,
    name: String,
    elements: Vec<String>,
    cases: u32,
    seed: u64,
    results: Vec<Outcome>,
}

#[derive(Serialize)]
struct Outcome {
    property: &'static str,
    claim: &'static str,
    seconds: f64,
    /// Whether there is something on the device that the property is about.
    applies: bool,
    /// The case that refutes the property, if any.
    refutation: Option<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if options.list {
        for property in properties() {
            println!("{:36} {}", property.name, property.claim);
        }
        return Ok(());
    }
    if let Some(unknown) = options.only.iter().find(|name| bifocal_testing::property(name).is_none()) {
        bail!("no property is named {unknown}; `bifocal check --list` shows them");
    }
    let chosen: Vec<&Property> = properties()
        .filter(|property| options.only.is_empty() || options.only.iter().any(|name| name == property.name))
        .collect();
    let device = Device::open(options.device.as_str())?;
    let mut report = Report {
        device: options.device.as_str(),
        name: device.profile().name.clone(),
        elements: device.profile().elements.iter().map(ToString::to_string).collect(),
        cases: options.cases,
        seed: options.seed,
        results: Vec::new(),
    };
    let quiet = options.json.as_deref() == Some(Path::new("-"));
    if !quiet {
        announce(&report);
    }
    let bar = output::progress(chosen.len());
    let effort = Effort { cases: options.cases, seed: options.seed };
    for property in chosen {
        bar.set_message(property.name);
        let start = Instant::now();
        let applies = property.applies(&device);
        let refutation = if applies { property.check(&device, effort).err() } else { None };
        let seconds = start.elapsed().as_secs_f64();
        let outcome =
            Outcome { property: property.name, claim: property.claim, seconds, applies, refutation };
        if !quiet {
            bar.suspend(|| print(&outcome));
        }
        report.results.push(outcome);
        bar.inc(1);
    }
    bar.finish_and_clear();
    if let Some(path) = &options.json {
        output::write_json(path, &report)?;
    }
    let refuted = report.results.iter().filter(|outcome| outcome.refutation.is_some()).count();
    match refuted {
        0 => Ok(()),
        n => bail!("{n} of {} properties do not hold on {}", report.results.len(), report.device),
    }
}

/// What is checked, and what the lines that follow show.
fn announce(report: &Report) {
    println!(
        "{} ({}), {}, {} cases per property, seed {}",
        report.device,
        report.name,
        report.elements.join(" "),
        report.cases,
        report.seed
    );
    println!("{:40} {:9} {:>7}", "property", "holds", "seconds");
}

/// At once: a run may take an hour, or be stopped.
fn print(outcome: &Outcome) {
    let holds = match (outcome.applies, &outcome.refutation) {
        (false, _) => "not here",
        (true, None) => "yes",
        (true, Some(_)) => "NO",
    };
    println!("{:40} {holds:9} {:7.1}", outcome.property, outcome.seconds);
    if let Some(refutation) = &outcome.refutation {
        println!("{}\n{refutation}\n", outcome.claim);
    }
}
