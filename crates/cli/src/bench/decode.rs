//! `bifocal bench decode`: decode steps over a full cache, by the bytes that they need.

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, bail};
use bifocal::{
    DeviceProfile, LinearGate, Partial, Reach, RouteGeometry, Router, Routes, Tensor, Window,
    cubecl::client::Client,
    decode::{Batch, DecodePlan, KvCache, KvShape, Layout, Reaches, SequenceId, Step},
};
use clap::{Args, ValueEnum};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::clock::{ROTATION_BYTES, measure, replays, times, wall};
use crate::{
    DeviceName, output,
    shape::Shape,
    timings::{Report, Timing},
};

/// Shares of token-heads that stay local, by layer: what the gates of AHA-OLMo2 did with a window of 128 on PG-19, the mean over
/// prompts of 512 to 32k tokens (github.com/wesleytruong/vllm-aha, experiments).
const LOCAL_BY_LAYER: [f64; 16] =
    [0.87, 0.72, 0.88, 0.94, 0.95, 0.88, 0.61, 0.73, 0.52, 0.82, 0.32, 0.69, 0.50, 0.66, 0.67, 0.79];

#[derive(Args)]
pub(crate) struct Options {
    /// The device to time.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    #[command(flatten)]
    shape: Shape,
    /// Keys in the window, the query's own included.
    #[arg(long, default_value_t = 128)]
    window: usize,
    /// Share of query heads of all sequences that look far.
    #[arg(long, value_delimiter = ',', default_value = "0.1")]
    far_share: Vec<f64>,
    /// Queries per sequence.
    #[arg(long, default_value_t = 1)]
    queries: usize,
    /// Tokens per page; contiguous unless given.
    #[arg(long)]
    page_size: Option<usize>,
    /// Cut keys at every so many; dealt evenly unless given.
    #[arg(long)]
    chunk: Option<usize>,
    /// Cases to time, beside a copy; all unless given.
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
enum CaseName {
    /// Every row sees every key.
    Full,
    /// Every row sees the window.
    Window,
    /// AHA: the shares of query heads look far.
    Aha,
    /// AHA by the shares that its gates were measured to have in 16 layers; the mean over them.
    AhaLayers,
    /// No row sees anything.
    Off,
    /// L2A with every gate closed: a step of the window, and one of no row.
    L2aOff,
    /// AHA's router: scores and routes of the step's tokens.
    Router,
    /// The plan of AHA's step alone.
    Plan,
}

impl CaseName {
    fn name(self) -> &'static str {
        match self {
            CaseName::Full => "full",
            CaseName::Window => "window",
            CaseName::Aha => "aha",
            CaseName::AhaLayers => "aha-layers",
            CaseName::Off => "off",
            CaseName::L2aOff => "l2a-off",
            CaseName::Router => "router",
            CaseName::Plan => "plan",
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let client = bifocal::open(options.device.as_str())?;
    let shape = &options.shape;
    let bar = output::progress(shape.lengths.len());
    let mut timings = Vec::new();
    for &length in &shape.lengths {
        bar.set_message(format!("decode at {length}"));
        Bench::new(&client, options, length)?.time(&mut timings)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let report = Report {
        device: options.device.as_str().into(),
        name: DeviceProfile::of(&client).name,
        element: shape.element().to_string(),
        batch: shape.batch,
        heads: shape.heads,
        kv_heads: shape.kv_heads(),
        head_dim: shape.head_dim,
        library: None,
        window: options.window,
        queries: Some(options.queries),
        page_size: options.page_size,
        softcap: shape.softcap,
        gates: Some("random".into()),
        far_share: None,
        far_tokens: None,
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

/// A full cache, in as many copies as keep the device's caches cold, and what a step needs beside it.
struct Bench<'a> {
    client: &'a Client,
    options: &'a Options,
    length: usize,
    turns: Vec<Turn>,
    query: Tensor<4>,
    plan: DecodePlan,
    partial: Partial,
    gate: LinearGate,
    /// What the gate reads: the hidden states of the step's tokens.
    hidden: Tensor<3>,
}

struct Turn {
    cache: KvCache,
    /// One of the sequences.
    first: SequenceId,
    batch: Batch,
}

/// One step: what rows see, and by which gates.
struct Shown {
    reaches: Reaches,
    gates: Option<Gates>,
}

/// Gates of every sequence and query head, the same for all queries.
struct Gates {
    routes: Routes,
    /// By sequence and head: 1 is far.
    host: Vec<u8>,
}

/// Steps that are timed together.
struct Call {
    steps: Vec<Shown>,
    /// Layers that they are of: reported is the mean over them.
    layers: usize,
}

/// First, median and fastest time of a call, and the median of its replays.
#[derive(Clone, Copy)]
struct Times {
    first: Duration,
    median: Duration,
    fastest: Duration,
    replayed: Option<Duration>,
}

impl<'a> Bench<'a> {
    fn new(client: &'a Client, options: &'a Options, length: usize) -> Result<Self> {
        let shape = &options.shape;
        let (batch, dim, element) = (shape.batch, shape.head_dim, shape.element());
        let kv = KvShape { kv_heads: shape.kv_heads(), head_dim: dim, value_dim: dim, element };
        let layout = match options.page_size {
            Some(page_size) => Layout::paged(batch, length, page_size, batch * length.div_ceil(page_size))?,
            None => Layout::contiguous(batch, length)?,
        };
        let mut rng = SmallRng::seed_from_u64(0);
        let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.7f32..1.7)).collect() };
        // One sequence's numbers serve all: at other addresses they are as cold as others.
        let one = [1, kv.kv_heads, length, dim];
        let tokens = Tensor::from_f32(client, one, element, &draw(one.iter().product()))?;
        let strides = [0, length * dim, dim, 1];
        let tokens = tokens.view().reinterpret([batch, kv.kv_heads, length, dim], strides);
        let bytes = 2 * batch * kv.kv_heads * length * dim * element.size();
        let turns = (0..ROTATION_BYTES.div_ceil(bytes).clamp(1, 16))
            .map(|_| {
                let mut cache = KvCache::new(client, kv, layout)?;
                let sequences =
                    (0..batch).map(|_| cache.start(client)).collect::<bifocal::Result<Vec<_>>>()?;
                cache.append(client, &sequences, tokens, tokens)?;
                let batch = cache.batch(client, &sequences)?;
                Ok(Turn { cache, first: sequences[0], batch })
            })
            .collect::<bifocal::Result<Vec<Turn>>>()?;
        let query = [batch, shape.heads, options.queries, dim];
        let query = Tensor::from_f32(client, query, element, &draw(query.iter().product()))?;
        let plan = plan(client, options, &turns[0], &query, length)?;
        let partial = Partial::empty(client, plan.problem(), element);
        let [weight, hidden] =
            [shape.heads, batch * options.queries].map(|rows| draw(shape.model_dim * rows));
        let gate =
            LinearGate::aha(Tensor::from_f32(client, [shape.model_dim, shape.heads], element, &weight)?);
        let hidden = Tensor::from_f32(client, shape.hidden(options.queries), element, &hidden)?;
        Ok(Self { client, options, length, turns, query, plan, partial, gate, hidden })
    }

    fn time(&self, timings: &mut Vec<Timing>) -> Result<()> {
        // A copy of a sequence: it reads and writes what a step of that sequence reads.
        let copy = self.timed(|turn| {
            let Turn { cache, first, .. } = &self.turns[turn];
            cache.gather(self.client, *first).map(|_| ())
        })?;
        let shape = &self.options.shape;
        let of_sequence = 2 * shape.kv_heads() * self.length * shape.head_dim * shape.element().size();
        let copied = rate(2 * of_sequence, copy.median);
        timings.push(Timing { share_of_copy: Some(1.0), ..self.timing("copy", copy, 2 * of_sequence) });

        let asked = self.options.cases.as_slice();
        let mut dense = None;
        for &case in if asked.is_empty() { CaseName::value_variants() } else { asked } {
            match case {
                CaseName::Router => timings.push(self.router()?),
                CaseName::Plan => timings.push(self.plan_alone()?),
                _ => {
                    for call in self.calls(case)? {
                        let (times, bytes) = self.attend(&call)?;
                        // What the device takes, where that is known.
                        let device = times.replayed.unwrap_or(times.median);
                        if case == CaseName::Full {
                            dense = Some(device);
                        }
                        timings.push(Timing {
                            routine: Some(self.plan.routine().to_string()),
                            chunk: self.plan.chunk(),
                            far_share: call.far_share(),
                            share_of_copy: Some(rate(bytes, device) / copied),
                            speedup: dense.map(|dense| dense.as_secs_f64() / device.as_secs_f64()),
                            ..self.timing(case.name(), times, bytes)
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// What a case attends to: a call for each share that was asked for, one call otherwise.
    fn calls(&self, case: CaseName) -> Result<Vec<Call>> {
        let near = Some(Reach::Window(Window::new(self.options.window)?));
        let shown = |reaches: &[Option<Reach>], share: Option<f64>| -> Result<Shown> {
            let gates = share.map(|share| self.gates(share)).transpose()?;
            Ok(Shown { reaches: Reaches::new(self.client, reaches)?, gates })
        };
        let aha = |share: f64| shown(&[near, Some(Reach::All)], Some(share));
        let one = |steps| Ok(vec![Call { steps, layers: 1 }]);
        match case {
            CaseName::Full => one(vec![shown(&[Some(Reach::All)], None)?]),
            CaseName::Window => one(vec![shown(&[near], None)?]),
            CaseName::Off => one(vec![shown(&[None], None)?]),
            CaseName::L2aOff => one(vec![shown(&[near], None)?, shown(&[None], None)?]),
            CaseName::Aha => {
                let shares = self.options.far_share.iter();
                shares.map(|&share| Ok(Call { steps: vec![aha(share)?], layers: 1 })).collect()
            }
            CaseName::AhaLayers => {
                let steps = LOCAL_BY_LAYER.iter().map(|local| aha(1.0 - local)).collect::<Result<_>>()?;
                Ok(vec![Call { steps, layers: LOCAL_BY_LAYER.len() }])
            }
            CaseName::Router | CaseName::Plan => Ok(Vec::new()),
        }
    }

    /// Times a call, and counts the bytes that it needs: both per layer.
    fn attend(&self, Call { steps, layers }: &Call) -> Result<(Times, usize)> {
        let times = self.timed(|turn| {
            steps.iter().enumerate().try_for_each(|(at, Shown { reaches, gates })| {
                // Layers have caches of their own, and so have L2A's branches.
                let Turn { cache, batch, .. } = &self.turns[(turn + at) % self.turns.len()];
                let step = self.step(reaches, gates.as_ref());
                self.plan.attend(self.client, &cache.view(batch)?, &step, &self.partial)
            })
        })?;
        let bytes: usize = steps.iter().map(|shown| self.bytes(shown)).sum();
        Ok((times / *layers as u32, bytes / layers))
    }

    fn router(&self) -> Result<Timing> {
        let times = self.timed(|_| self.gate.route(self.client, self.hidden.view()).map(|_| ()))?;
        let Shape { batch, heads, model_dim, .. } = self.options.shape;
        let rows = batch * self.options.queries;
        let read = model_dim * (rows + heads) * self.options.shape.element().size();
        // A score in f32 and a route for each.
        Ok(self.timing(CaseName::Router.name(), times, read + rows * heads * 5))
    }

    fn plan_alone(&self) -> Result<Timing> {
        let calls = self.calls(CaseName::Aha)?;
        let Some(Shown { reaches, gates }) = calls.first().and_then(|call| call.steps.first()) else {
            bail!("--far-share has no share to plan a step of");
        };
        let times = self.timed(|turn| {
            let Turn { cache, batch, .. } = &self.turns[turn];
            self.plan.plan(self.client, &cache.view(batch)?, &self.step(reaches, gates.as_ref()))
        })?;
        // Every route, and the length of every sequence.
        let Shape { batch, heads, .. } = self.options.shape;
        let read = batch * (heads * self.options.queries + size_of::<u32>());
        Ok(self.timing(CaseName::Plan.name(), times, read))
    }

    fn step<'s>(&'s self, reaches: &'s Reaches, gates: Option<&'s Gates>) -> Step<'s> {
        let step = Step::new(self.query.view(), reaches);
        gates.map_or(step, |gates| step.with_routes(&gates.routes))
    }

    fn timing(&self, case: &str, times: Times, bytes: usize) -> Timing {
        Timing {
            case: case.into(),
            length: self.length,
            routine: None,
            first_call_ms: milliseconds(times.first),
            median_ms: milliseconds(times.median),
            fastest_ms: milliseconds(times.fastest),
            far_share: None,
            useful_flop: None,
            useful_gflops: None,
            useful_bytes: Some(bytes as f64),
            memory_bytes: None,
            chunk: None,
            share_of_copy: None,
            speedup: None,
            replayed_ms: times.replayed.map(milliseconds),
        }
    }

    /// The share of all heads of all sequences, drawn without replacement: exact as far as their number allows.
    fn gates(&self, share: f64) -> bifocal::Result<Gates> {
        let (batch, heads) = (self.options.shape.batch, self.options.shape.heads);
        let far = (share * (batch * heads) as f64).round() as usize;
        let mut host: Vec<u8> = (0..batch * heads).map(|at| u8::from(at < far)).collect();
        let mut rng = SmallRng::seed_from_u64(1);
        for at in (1..host.len()).rev() {
            host.swap(at, rng.random_range(0..=at));
        }
        let geometry = RouteGeometry::new(batch, heads, self.options.queries, 2)?;
        let by_token: Vec<u8> = host.iter().flat_map(|&gate| vec![gate; self.options.queries]).collect();
        Ok(Gates { routes: Routes::from_host(self.client, geometry, &by_token)?, host })
    }

    /// Bytes that a step needs: of each kv head the union of what its rows see, queries and outputs.
    fn bytes(&self, Shown { reaches, gates }: &Shown) -> usize {
        let shape = &self.options.shape;
        let (heads, group) = (shape.heads, shape.heads / shape.kv_heads());
        let positions = self.length - self.options.queries.min(self.length)..self.length;
        let mut keys = 0;
        for head in (0..shape.batch * heads).step_by(group) {
            let route = |head: usize| gates.as_ref().map_or(0, |gates| usize::from(gates.host[head]));
            let mut seen: Vec<Reach> =
                (head..head + group).filter_map(|head| reaches.list()[route(head)]).collect();
            seen.dedup();
            keys += (0..self.length)
                .filter(|&key| {
                    seen.iter().any(|reach| {
                        positions.clone().any(|position| reach.sees(position as i64, key as i64))
                    })
                })
                .count();
        }
        let rows = shape.batch * heads * self.options.queries;
        2 * (keys + rows) * shape.head_dim * shape.element().size()
    }

    /// Times a call, over caches in turn.
    fn timed(&self, call: impl Fn(usize) -> bifocal::Result<()> + Sync) -> Result<Times> {
        let cpu = self.options.device == DeviceName::Cpu;
        let turns: Vec<usize> = (0..self.turns.len()).collect();
        let first = wall(self.client, || call(0))?;
        let estimate = measure(self.client, cpu, || call(turns.len() - 1))?;
        let (median, fastest) =
            times(self.client, (cpu, self.options.runs), &turns, estimate, |&turn| call(turn))?;
        let replayed = replays(self.client, (cpu, self.options.runs), &turns, |&turn| call(turn))?;
        Ok(Times { first, median, fastest, replayed: replayed.map(|(median, _)| median) })
    }
}

impl Call {
    /// The share of heads that look far, over all gates; `None` without gates.
    fn far_share(&self) -> Option<f64> {
        let gates: Vec<u8> = self
            .steps
            .iter()
            .filter_map(|step| step.gates.as_ref())
            .flat_map(|gates| gates.host.clone())
            .collect();
        let far = gates.iter().map(|&gate| f64::from(gate)).sum::<f64>();
        (!gates.is_empty()).then(|| far / gates.len() as f64)
    }
}

impl std::ops::Div<u32> for Times {
    type Output = Self;

    fn div(self, by: u32) -> Self {
        let Self { first, median, fastest, replayed } = self;
        let replayed = replayed.map(|replayed| replayed / by);
        Self { first: first / by, median: median / by, fastest: fastest / by, replayed }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Bytes as GB/s.
fn rate(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e9
}

fn plan(
    client: &Client,
    options: &Options,
    Turn { cache, batch, .. }: &Turn,
    query: &Tensor<4>,
    length: usize,
) -> bifocal::Result<DecodePlan> {
    let shape = options.shape.problem(length)?;
    let mut problem = cache.view(batch)?.problem(query.shape(), query.element())?;
    (problem.softcap, problem.routine) = (shape.softcap, shape.routine);
    match options.chunk {
        Some(keys) => DecodePlan::in_chunks(client, &problem, keys),
        None => DecodePlan::new(client, &problem),
    }
}

fn print(report: &Report) {
    println!(
        "{} ({}), {}, {} x {} heads ({} kv) x {}, {} queries, window {}, {}",
        report.device,
        report.name,
        report.element,
        report.batch,
        report.heads,
        report.kv_heads,
        report.head_dim,
        report.queries.unwrap_or(1),
        report.window,
        report.page_size.map_or("contiguous".to_string(), |size| format!("pages of {size}")),
    );
    let mut table = output::table([
        "case",
        "length",
        "routine",
        "chunk",
        "far",
        "median ms",
        "fastest ms",
        "MB",
        "GB/s",
        "of copy",
        "speed-up",
        "replayed ms",
    ]);
    for timing in &report.timings {
        let bytes = timing.useful_bytes.unwrap_or(0.0);
        table.add_row([
            timing.case.clone(),
            timing.length.to_string(),
            timing.routine.clone().unwrap_or_default(),
            timing.chunk.map_or("-".to_string(), |chunk| chunk.to_string()),
            timing.far_share.map_or("-".to_string(), |share| format!("{:.1} %", share * 100.0)),
            format!("{:.4}", timing.median_ms),
            format!("{:.4}", timing.fastest_ms),
            format!("{:.2}", bytes / 1e6),
            format!("{:.1}", bytes / timing.median_ms / 1e6),
            timing.share_of_copy.map_or("-".to_string(), |share| format!("{:.0} %", share * 100.0)),
            timing.speedup.map_or("-".to_string(), |speedup| format!("{speedup:.2}")),
            timing.replayed_ms.map_or("-".to_string(), |replayed| format!("{replayed:.4}")),
        ]);
    }
    println!("{table}");
}
