//! `bifocal`: doctor, demo, train, report, export, generate, prune, masses, check, warm, bench, compare.

mod bench;
mod cache;
mod check;
mod compare;
mod demo;
mod doctor;
mod export;
mod generate;
mod masses;
mod model;
mod output;
mod plot;
mod prune;
mod report;
mod shape;
mod timings;
mod train;
mod warm;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use burn::tensor::{Device, DeviceKind};
use clap::{Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

/// Near vision and far vision in one lens: routed attention on any device.
#[derive(Parser)]
#[command(version, about, propagate_version = true, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Where compiled kernels are kept for later runs, or `off`; the user's cache folder unless given.
    #[arg(long, global = true, env = "BIFOCAL_KERNEL_CACHE", value_name = "FOLDER")]
    kernel_cache: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Show runtimes, devices, and what each routine can run there and why not.
    Doctor(doctor::Options),
    /// Run a small decoder with AHA layers, which has learned, over real text and check it against the oracle.
    Demo(demo::Options),
    /// Train a small decoder on text, with routers that learn when to look far.
    Train(Box<train::Options>),
    /// Show what training runs have measured, as a table and as plots.
    Report(report::Options),
    /// Write what a training run has learned to one file, without what only training needs.
    Export(export::Options),
    /// Go on from a text with what a training run has learned, token by token over a cache.
    Generate(generate::Options),
    /// Leave out the far branches of layers that seldom look far.
    Prune(prune::Options),
    /// Show how well QAdA predicts what queries of a run would miss, per head.
    Masses(masses::Options),
    /// Check every property of the operators on a device.
    Check(check::Options),
    /// Compile the kernels of a model's shapes, so that later runs only load them.
    Warm(warm::Options),
    /// Time the operators at chosen shapes.
    Bench(bench::Options),
    /// Join what `bench` and the scripts in benches/peers measured into a table and a plot.
    Compare(compare::Options),
}

/// Where kernels run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum DeviceName {
    /// The embedded CPU runtime: every core, no driver.
    Cpu,
    /// The first WebGPU device (Vulkan, Metal or Direct3D).
    Wgpu,
    /// The first NVIDIA GPU.
    Cuda,
}

impl DeviceName {
    const ALL: [DeviceName; 3] = [DeviceName::Cpu, DeviceName::Wgpu, DeviceName::Cuda];

    fn as_str(self) -> &'static str {
        match self {
            DeviceName::Cpu => "cpu",
            DeviceName::Wgpu => "wgpu",
            DeviceName::Cuda => "cuda",
        }
    }

    /// Burn's device: Flex for `cpu`. Asking Bifocal first turns a device that is not there into an error rather than a
    /// panic.
    fn burn(self) -> Result<Device> {
        let client = bifocal::open(self.as_str())?;
        if self != DeviceName::Cpu {
            cache::settle(&client);
        }
        Ok(match self {
            DeviceName::Cpu => Device::flex(),
            DeviceName::Wgpu => Device::wgpu(DeviceKind::DefaultDevice),
            DeviceName::Cuda => Device::cuda(0),
        })
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    output::quiet_driver_panics();
    let Cli { command, kernel_cache } = Cli::parse();
    let done = cache::turn_on(kernel_cache.as_deref()).and_then(|()| match command {
        Command::Doctor(options) => doctor::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Train(options) => train::run(&options),
        Command::Report(options) => report::run(&options),
        Command::Export(options) => export::run(&options),
        Command::Generate(options) => generate::run(&options),
        Command::Prune(options) => prune::run(&options),
        Command::Masses(options) => masses::run(&options),
        Command::Check(options) => check::run(&options),
        Command::Warm(options) => warm::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Compare(options) => compare::run(&options),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line: the whole chain of causes.
            eprintln!("bifocal: {error:#}");
            match error.is::<train::Interrupted>() {
                true => ExitCode::from(train::Interrupted::EXIT_CODE),
                false => ExitCode::FAILURE,
            }
        }
    }
}
