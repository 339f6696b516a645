//! `bifocal bench`: the operators at chosen shapes.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use bifocal::{
    Aha, AttentionOperator, DeviceProfile, Element, Full, Inputs, L2a, LinearGate, Partial, Problem,
    RandomRouter, Reach, Router, Routine, Rows, Tensor, Window, Windowed, cubecl,
};
use clap::{Args, ValueEnum};
use cubecl::client::Client;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde::Serialize;

use crate::{DeviceName, output};

/// Bytes of inputs that a run rotates through at least: more than the last-level caches of today's devices hold.
const ROTATION_BYTES: usize = 256 << 20;

/// How long a timed run is to take, if 32 calls do.
const SAMPLE: Duration = Duration::from_millis(4);

#[derive(Args)]
pub(crate) struct Options {
    /// The device to time.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    /// Element type of query, key and value.
    #[arg(long, default_value = "f32")]
    element: ElementName,
    /// Sequences.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Query heads.
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Key and value heads; as many as query heads unless given.
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Length of a query, a key and a value.
    #[arg(long, default_value_t = 64)]
    head_dim: usize,
    /// Sequence lengths.
    #[arg(long, value_delimiter = ',', default_value = "8192")]
    lengths: Vec<usize>,
    /// Keys in the window, the query's own included.
    #[arg(long, default_value_t = 256)]
    window: usize,
    /// Share of token-heads (AHA) that look far.
    #[arg(long, default_value_t = 0.067)]
    far_share: f64,
    /// Share of tokens (L2A) that look far.
    #[arg(long, default_value_t = 0.2)]
    far_tokens: f64,
    /// Length of a hidden state, which the router reads.
    #[arg(long, default_value_t = 1024)]
    model_dim: usize,
    /// The routine to run by (wgmma, mma, portable); the fastest that can unless given.
    #[arg(long)]
    routine: Option<Routine>,
    /// Cases to time; all unless given.
    #[arg(long, value_delimiter = ',')]
    cases: Vec<CaseName>,
    /// Timed runs per case; the median is reported.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Write the timings as JSON to this file (`-` for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ElementName {
    F32,
    F16,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum CaseName {
    /// The window, every row.
    Windowed,
    /// Full attention, every row.
    Full,
    /// The linear gate of every head: scores, routes and counts.
    Router,
    /// The dispatch plan of random head-wise routes.
    Plan,
    /// AHA by random head-wise routes, its plan included.
    Aha,
    /// L2A's global branch by random token-wise routes, its plan included.
    L2a,
}

const CASES: [CaseName; 6] =
    [CaseName::Windowed, CaseName::Full, CaseName::Router, CaseName::Plan, CaseName::Aha, CaseName::L2a];

#[derive(Serialize)]
struct Report {
    device: &'static str,
    name: String,
    element: String,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: usize,
    far_share: f64,
    far_tokens: f64,
    model_dim: usize,
    runs: u32,
    timings: Vec<Timing>,
}

#[derive(Serialize)]
struct Timing {
    case: &'static str,
    length: usize,
    /// What attention ran by.
    routine: String,
    /// The first call: it compiles the kernels.
    first_call_ms: f64,
    median_ms: f64,
    fastest_ms: f64,
    /// 4 D for every pair of a query and a key that its route shows; none for router and plan.
    useful_flop: Option<f64>,
    useful_gflops: Option<f64>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let client = bifocal::open(options.device.as_str())?;
    let element = match options.element {
        ElementName::F32 => Element::F32,
        ElementName::F16 => Element::F16,
        ElementName::Bf16 => Element::Bf16,
    };
    if let Some(&0) = options.lengths.iter().find(|&&length| length == 0) {
        bail!("a length is 0, expected at least 1");
    }
    let cases: &[CaseName] = if options.cases.is_empty() { &CASES } else { &options.cases };
    let bar = output::progress(options.lengths.len() * cases.len());
    let mut timings = Vec::new();
    for &length in &options.lengths {
        let bench = Bench::new(&client, options, element, length)?;
        for &case in cases {
            bar.set_message(format!("{} at {length}", case.name()));
            timings.push(bench.time(case).with_context(|| format!("{} at {length}", case.name()))?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let report = Report {
        device: options.device.as_str(),
        name: DeviceProfile::of(&client).name,
        element: element.to_string(),
        batch: options.batch,
        heads: options.heads,
        kv_heads: options.kv_heads.unwrap_or(options.heads),
        head_dim: options.head_dim,
        window: options.window,
        far_share: options.far_share,
        far_tokens: options.far_tokens,
        model_dim: options.model_dim,
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

impl CaseName {
    fn name(self) -> &'static str {
        match self {
            CaseName::Windowed => "windowed",
            CaseName::Full => "full",
            CaseName::Router => "router",
            CaseName::Plan => "plan",
            CaseName::Aha => "aha",
            CaseName::L2a => "l2a",
        }
    }
}

/// Query, key, value and hidden states of one turn of the rotation.
struct Set {
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    hidden: Tensor<3>,
}

/// Everything that is timed at one length.
struct Bench<'a> {
    client: &'a Client,
    options: &'a Options,
    problem: Problem,
    routine: Routine,
    window: Window,
    gate: LinearGate,
    by_head: RandomRouter,
    by_token: RandomRouter,
    sets: Vec<Set>,
    partial: Partial,
}

impl<'a> Bench<'a> {
    fn new(client: &'a Client, options: &'a Options, element: Element, length: usize) -> Result<Self> {
        let kv_heads = options.kv_heads.unwrap_or(options.heads);
        let query = [options.batch, options.heads, length, options.head_dim];
        let key = [options.batch, kv_heads, length, options.head_dim];
        let hidden = [options.batch, length, options.model_dim];
        let problem = Problem::new(query, key, element)?;
        let problem = options.routine.map_or(problem, |routine| problem.with_routine(routine));
        // What does not run at all says so before minutes are spent on drawing inputs.
        let routine = Full.choose(&problem, &DeviceProfile::of(client))?;
        let mut rng = SmallRng::seed_from_u64(0);
        let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.7f32..1.7)).collect() };
        let size = |shape: &[usize]| shape.iter().product::<usize>();
        let bytes = (size(&query) + 2 * size(&key)) * element.size();
        let turns = ROTATION_BYTES.div_ceil(bytes).clamp(1, 16);
        // The same numbers at other addresses are as cold as other numbers.
        let (q, k, v) = (draw(size(&query)), draw(size(&key)), draw(size(&key)));
        let h = draw(size(&hidden));
        let sets = (0..turns)
            .map(|_| {
                Ok(Set {
                    query: Tensor::from_f32(client, query, element, &q)?,
                    key: Tensor::from_f32(client, key, element, &k)?,
                    value: Tensor::from_f32(client, key, element, &v)?,
                    hidden: Tensor::from_f32(client, hidden, element, &h)?,
                })
            })
            .collect::<Result<_>>()?;
        let weight = draw(options.model_dim * options.heads);
        let weight_shape = [options.model_dim, options.heads];
        Ok(Self {
            client,
            options,
            problem,
            window: Window::new(options.window)?,
            routine,
            gate: LinearGate::aha(Tensor::from_f32(client, weight_shape, element, &weight)?),
            by_head: RandomRouter::gate(options.heads, options.far_share, 1)?,
            by_token: RandomRouter::gate(1, options.far_tokens, 2)?,
            sets,
            partial: Partial::empty(client, &problem, element),
        })
    }

    fn time(&self, case: CaseName) -> Result<Timing> {
        let client = self.client;
        let hidden = self.sets[0].hidden.view();
        let by_head = self.by_head.route(client, hidden)?;
        let by_token = self.by_token.route(client, hidden)?;
        let call = |set: &Set| -> bifocal::Result<()> {
            let inputs = Inputs::new(set.query.view(), set.key.view(), set.value.view());
            let problem = &self.problem;
            let all = |operator: &dyn AttentionOperator| {
                operator.attend(client, problem, &inputs, Rows::All, &self.partial).map(|_| ())
            };
            match case {
                CaseName::Windowed => all(&Windowed::new(self.window)),
                CaseName::Full => all(&Full),
                CaseName::Router => self.gate.route(client, set.hidden.view()).map(|_| ()),
                CaseName::Plan => bifocal::plan(client, problem, &by_head.routes).map(|_| ()),
                CaseName::Aha => {
                    let aha = Aha::new(self.window);
                    aha.attend_into(client, problem, &inputs, &by_head.routes, &self.partial)
                }
                CaseName::L2a => {
                    let l2a = L2a::new(self.window);
                    l2a.global(client, problem, &inputs, &by_token.routes).map(|_| ())
                }
            }
        };
        let first_call = wall(client, || call(&self.sets[0]))?;
        let estimate = wall(client, || call(&self.sets[self.sets.len() - 1]))?;
        // Short calls are timed several at once, as a model makes them: alone, the host's part would show.
        let calls = (SAMPLE.as_secs_f64() / estimate.as_secs_f64()).ceil().clamp(1.0, 32.0) as usize;
        let mut turns = self.sets.iter().cycle();
        let mut times: Vec<Duration> = (0..self.options.runs)
            .map(|_| {
                let turns: Vec<&Set> = turns.by_ref().take(calls).collect();
                let time = self.measure(|| turns.into_iter().try_for_each(&call))?;
                Ok(time / calls as u32)
            })
            .collect::<Result<_>>()?;
        times.sort_unstable();
        let median = times[times.len() / 2];
        let useful_flop = self.useful_flop(case);
        Ok(Timing {
            case: case.name(),
            length: self.problem.query_len,
            routine: self.routine.to_string(),
            first_call_ms: first_call.as_secs_f64() * 1e3,
            median_ms: median.as_secs_f64() * 1e3,
            fastest_ms: times[0].as_secs_f64() * 1e3,
            useful_flop,
            useful_gflops: useful_flop.map(|flop| flop / median.as_secs_f64() / 1e9),
        })
    }

    /// Device events on a GPU; the clock around launch and completion on a CPU, whose launches are its work.
    fn measure(&self, call: impl FnOnce() -> bifocal::Result<()> + Send) -> Result<Duration> {
        if self.options.device == DeviceName::Cpu {
            return wall(self.client, call);
        }
        let (called, duration) = self
            .client
            .profile(call, "bench")
            .map_err(|error| anyhow::anyhow!("cannot time on this device: {error:?}"))?;
        called?;
        let ticks = cubecl::future::block_on(duration.resolve()).context("the device gave no time stamps")?;
        Ok(ticks.duration())
    }

    /// 4 D floating-point operations for every pair of a query and a key that it sees by its route.
    fn useful_flop(&self, case: CaseName) -> Option<f64> {
        let Problem { batch, heads, query_len, key_len, .. } = self.problem;
        let near = Reach::Window(self.window);
        let pairs = |reach: Reach, token: usize| reach.visible(self.problem.position(token), key_len) as f64;
        let sum = |per_row: &dyn Fn(u32, u32) -> f64| -> f64 {
            (0..batch * heads)
                .flat_map(|row| (0..query_len).map(move |token| (row as u32, token as u32)))
                .map(|(row, token)| per_row(row, token))
                .sum()
        };
        let pairs = match case {
            CaseName::Router | CaseName::Plan => return None,
            CaseName::Windowed => sum(&|_, token| pairs(near, token as usize)),
            CaseName::Full => sum(&|_, token| pairs(Reach::All, token as usize)),
            CaseName::Aha => sum(&|row, token| {
                let far = self.by_head.route_of(row, token) == 1;
                pairs(if far { Reach::All } else { near }, token as usize)
            }),
            CaseName::L2a => sum(&|row, token| {
                let far = self.by_token.route_of(row / heads as u32, token) == 1;
                if far { pairs(Reach::All, token as usize) } else { 0.0 }
            }),
        };
        Some(2.0 * (self.problem.head_dim + self.problem.value_dim) as f64 * pairs)
    }
}

/// Time from the call until the device is idle again.
fn wall(client: &Client, call: impl FnOnce() -> bifocal::Result<()>) -> Result<Duration> {
    bifocal::synchronise(client)?;
    let start = std::time::Instant::now();
    call()?;
    bifocal::synchronise(client)?;
    Ok(start.elapsed())
}

fn print(report: &Report) {
    println!(
        "{} ({}), {}, {} x {} heads ({} kv) x {}, window {}, far {:.1} % of token-heads, {:.1} % of tokens",
        report.device,
        report.name,
        report.element,
        report.batch,
        report.heads,
        report.kv_heads,
        report.head_dim,
        report.window,
        report.far_share * 100.0,
        report.far_tokens * 100.0,
    );
    let mut table = output::table([
        "case",
        "length",
        "routine",
        "median ms",
        "fastest ms",
        "useful GFLOP/s",
        "first call ms",
    ]);
    for timing in &report.timings {
        table.add_row([
            timing.case.to_string(),
            timing.length.to_string(),
            timing.routine.clone(),
            format!("{:.3}", timing.median_ms),
            format!("{:.3}", timing.fastest_ms),
            timing.useful_gflops.map_or("-".to_string(), |rate| format!("{rate:.1}")),
            format!("{:.0}", timing.first_call_ms),
        ]);
    }
    println!("{table}");
}
