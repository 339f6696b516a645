//! `bifocal warm`: the kernels of a model's shapes, compiled before they are needed.

use std::{collections::HashSet, path::PathBuf, time::Instant};

use anyhow::{Context, Result};
use bifocal::{
    Aha, AttentionOperator, DeviceProfile, Full, Inputs, L2a, LinearChoice, LinearGate, MultiWindow,
    NonCausal, Partial, Router, Rows, Tensor, Window, Windowed,
    cubecl::{client::Client, launched::LaunchedKernels},
};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::{
    DeviceName,
    cache::{self, Kept},
    output,
    shape::Shape,
};

#[derive(Args)]
pub(crate) struct Options {
    /// The device to compile for.
    #[arg(long, default_value = "cuda")]
    device: DeviceName,
    #[command(flatten)]
    shape: Shape,
    /// Windows, ascending. Multi-window AHA takes all of them, the others the first. Kernels depend on how many there
    /// are, not on their lengths.
    #[arg(long, value_delimiter = ',', default_value = "256")]
    windows: Vec<usize>,
    /// Sink tokens beside the window.
    #[arg(long, default_value_t = 0)]
    sinks: u32,
    /// Systems and operators to compile; all unless given.
    #[arg(long, value_delimiter = ',')]
    systems: Vec<System>,
    /// Write what was compiled as JSON to this file (`-` for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What a model may call. Each brings its router along.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum System {
    Windowed,
    Full,
    NonCausal,
    Aha,
    MultiWindow,
    L2a,
}

impl System {
    const ALL: [System; 6] =
        [System::Windowed, System::Full, System::NonCausal, System::Aha, System::MultiWindow, System::L2a];

    fn name(self) -> &'static str {
        match self {
            System::Windowed => "windowed",
            System::Full => "full",
            System::NonCausal => "non-causal",
            System::Aha => "aha",
            System::MultiWindow => "multi-window",
            System::L2a => "l2a",
        }
    }
}

#[derive(Serialize)]
struct Report {
    device: &'static str,
    name: String,
    element: String,
    steps: Vec<Step>,
    /// Kernels that the steps run, each counted once.
    kernels: usize,
    /// How many of them had to be compiled; the others were loaded. None where none are kept.
    compiled: Option<u64>,
    ms: f64,
    kernel_cache: Option<Kept>,
}

#[derive(Serialize)]
struct Step {
    system: &'static str,
    length: usize,
    kernels: usize,
    /// From the call until the device is idle: compiling or loading, and one run.
    ms: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let client = bifocal::open(options.device.as_str())?;
    let profile = DeviceProfile::of(&client);
    let windows: Vec<Window> =
        options.windows.iter().map(|&keys| Window::new(keys)).collect::<bifocal::Result<_>>()?;
    let systems: &[System] = if options.systems.is_empty() { &System::ALL } else { &options.systems };
    let keeps = bifocal::keeps_kernels(&profile);
    let before = if keeps { Kept::now() } else { None };
    let bar = output::progress(options.shape.lengths.len() * systems.len());
    let (mut steps, mut kernels) = (Vec::new(), HashSet::new());
    for &length in &options.shape.lengths {
        let model = Model::new(&client, options, &windows, length)?;
        for &system in systems {
            bar.set_message(format!("{} at {length}", system.name()));
            let (start, launched) = (Instant::now(), LaunchedKernels::new());
            // Run for good and not as CubeCL's dry run, which is silent about a kernel that does not compile.
            model
                .call(system)
                .and_then(|()| bifocal::synchronise(&client))
                .with_context(|| format!("{} at {length}", system.name()))?;
            let launched = launched.finish();
            let ms = start.elapsed().as_secs_f64() * 1e3;
            steps.push(Step { system: system.name(), length, kernels: launched.len(), ms });
            kernels.extend(launched);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let kernel_cache = if keeps { Kept::now() } else { None };
    let report = Report {
        device: options.device.as_str(),
        name: profile.name,
        element: options.shape.element().to_string(),
        ms: steps.iter().map(|step| step.ms).sum(),
        steps,
        kernels: kernels.len(),
        compiled: before
            .zip(kernel_cache.as_ref())
            .map(|(before, now)| now.kernels.saturating_sub(before.kernels)),
        kernel_cache,
    };
    if let Some(path) = &options.json {
        output::write_json(path, &report)?;
    }
    if options.json.as_deref() != Some(std::path::Path::new("-")) {
        print(&report, keeps);
    }
    Ok(())
}

/// What the systems are called with. The numbers in it are whatever the memory held: no kernel is chosen by them.
struct Model<'a> {
    client: &'a Client,
    problem: bifocal::Problem,
    windows: &'a [Window],
    near: Windowed,
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    hidden: Tensor<3>,
}

impl<'a> Model<'a> {
    fn new(client: &'a Client, options: &Options, windows: &'a [Window], length: usize) -> Result<Self> {
        let shape = &options.shape;
        let first = windows.first().context("no window, expected at least one")?;
        let problem = shape.problem(length)?;
        // What does not run at all says so before anything is compiled.
        Full.choose(&problem, &DeviceProfile::of(client))?;
        Ok(Self {
            client,
            problem,
            windows,
            near: Windowed::new(*first).with_sinks(options.sinks),
            query: Tensor::empty(client, shape.query(length), problem.element),
            key: Tensor::empty(client, shape.key(length), problem.element),
            value: Tensor::empty(client, shape.key(length), problem.element),
            hidden: Tensor::empty(client, shape.hidden(length), problem.element),
        })
    }

    fn call(&self, system: System) -> bifocal::Result<()> {
        let (client, problem) = (self.client, &self.problem);
        let inputs = &Inputs::new(self.query.view(), self.key.view(), self.value.view());
        let dense = |operator: &dyn AttentionOperator| {
            let partial = Partial::empty(client, problem, problem.element);
            operator.attend(client, problem, inputs, Rows::All, &partial).map(drop)
        };
        let weight = |columns: usize| {
            let [.., model_dim] = self.hidden.shape();
            Tensor::empty(client, [model_dim, columns], problem.element)
        };
        let route = |router: &dyn Router| Ok(router.route(client, self.hidden.view())?.routes);
        match system {
            System::Windowed => dense(&self.near),
            System::Full => dense(&Full),
            System::NonCausal => dense(&NonCausal),
            System::Aha => {
                let routes = route(&LinearGate::aha(weight(problem.heads)))?;
                Aha::with_near(self.near).attend(client, problem, inputs, &routes).map(drop)
            }
            System::MultiWindow => {
                let system = MultiWindow::new(self.windows)?;
                let weight = weight(problem.heads * system.reaches());
                let routes = route(&LinearChoice::new(weight, system.reaches())?)?;
                system.attend(client, problem, inputs, &routes).map(drop)
            }
            System::L2a => {
                let routes = route(&LinearGate::l2a(weight(1)))?;
                let system = L2a::new(self.windows[0]);
                system.local(client, problem, inputs)?;
                system.global(client, problem, inputs, &routes).map(drop)
            }
        }
    }
}

fn print(report: &Report, keeps: bool) {
    println!("{} ({}), {}", report.device, report.name, report.element);
    let mut table = output::table(["system", "length", "kernels", "ms"]);
    for step in &report.steps {
        table.add_row([
            step.system.to_string(),
            step.length.to_string(),
            step.kernels.to_string(),
            format!("{:.0}", step.ms),
        ]);
    }
    println!("{table}");
    let seconds = report.ms / 1e3;
    match report.compiled {
        Some(compiled) => {
            let loaded = (report.kernels as u64).saturating_sub(compiled);
            println!("{compiled} kernels compiled and {loaded} loaded in {seconds:.1} s.");
        }
        None => println!("{} kernels compiled in {seconds:.1} s.", report.kernels),
    }
    match keeps {
        true => println!("{}", cache::describe(report.kernel_cache.as_ref())),
        false => println!(
            "Nothing of it is left for later runs: the {} runtime keeps no compiled kernels.",
            report.device
        ),
    }
}
