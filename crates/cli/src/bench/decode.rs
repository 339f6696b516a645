//! `bifocal bench decode`: decode steps over a full cache, by the bytes that they need.

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use bifocal::{
    DeviceProfile, Partial, Reach, RouteGeometry, Routes, Tensor, Window,
    cubecl::client::Client,
    decode::{Batch, DecodePlan, KvCache, KvShape, Layout, Reaches, SequenceId, Step},
};
use clap::Args;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde::Serialize;

use super::{ROTATION_BYTES, SAMPLE, measure};
use crate::{DeviceName, output, shape::Shape};

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
    /// Keys per chunk of work; what the plan takes unless given.
    #[arg(long)]
    chunk: Option<usize>,
    /// Timed runs per case; the median is reported.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Write the timings as JSON to this file (`-` for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What was measured at one length.
#[derive(Debug, Serialize)]
struct Timing {
    case: String,
    length: usize,
    routine: Option<String>,
    /// Keys per chunk.
    chunk: Option<usize>,
    far_share: Option<f64>,
    median_ms: f64,
    fastest_ms: f64,
    /// Keys and values that some row needs, read once per kv head, queries and outputs; of a copy, what is read and written.
    bytes: usize,
    gb_per_s: f64,
    /// Of what a copy of the cache reaches in the same run.
    share_of_copy: f64,
    /// Against dense decode in the same run.
    speedup: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Report {
    device: String,
    name: String,
    element: String,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    queries: usize,
    window: usize,
    page_size: Option<usize>,
    runs: u32,
    timings: Vec<Timing>,
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
        queries: options.queries,
        window: options.window,
        page_size: options.page_size,
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
}

struct Turn {
    cache: KvCache,
    /// One of the sequences.
    first: SequenceId,
    batch: Batch,
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
            .collect::<bifocal::Result<_>>()?;
        let query = [batch, shape.heads, options.queries, dim];
        let query = Tensor::from_f32(client, query, element, &draw(query.iter().product()))?;
        Ok(Self { client, options, length, turns, query })
    }

    fn time(&self, timings: &mut Vec<Timing>) -> Result<()> {
        let client = self.client;
        // A copy of a sequence: it reads and writes what a step of that sequence reads.
        let copy = self.timed(|turn| turn.cache.gather(client, turn.first).map(|_| ()))?;
        let element = self.options.shape.element().size();
        let of_sequence =
            2 * self.options.shape.kv_heads() * self.length * self.options.shape.head_dim * element;
        let rate = |bytes: usize, median: Duration| bytes as f64 / median.as_secs_f64() / 1e9;
        let copied = rate(2 * of_sequence, copy.0);
        let timing = |case: &str, (median, fastest): (Duration, Duration), bytes: usize| Timing {
            case: case.into(),
            length: self.length,
            routine: None,
            chunk: None,
            far_share: None,
            median_ms: median.as_secs_f64() * 1e3,
            fastest_ms: fastest.as_secs_f64() * 1e3,
            bytes,
            gb_per_s: rate(bytes, median),
            share_of_copy: rate(bytes, median) / copied,
            speedup: None,
        };
        timings.push(timing("copy", copy, 2 * of_sequence));

        let near = Reach::Window(Window::new(self.options.window)?);
        let aha = [Some(near), Some(Reach::All)];
        let mut dense = None;
        for (case, reaches, share) in
            [("full", vec![Some(Reach::All)], None), ("window", vec![Some(near)], None)]
                .into_iter()
                .chain(self.options.far_share.iter().map(|&share| ("aha", aha.to_vec(), Some(share))))
                .chain([("off", vec![None], None)])
        {
            let routes = share.map(|share| self.gates(share)).transpose()?;
            let reaches = Reaches::new(client, &reaches)?;
            let plan = self.plan()?;
            let partial = Partial::empty(client, plan.problem(), self.options.shape.element());
            let times = self.timed(|turn| {
                let step = Step::new(self.query.view(), &reaches);
                let step = routes.as_ref().map_or(step, |(routes, _)| step.with_routes(routes));
                plan.attend(client, &turn.cache.view(&turn.batch)?, &step, &partial)
            })?;
            let gates = routes.as_ref().map(|(_, gates)| gates.as_slice());
            let dense_ms = *dense.get_or_insert(times.0.as_secs_f64());
            timings.push(Timing {
                routine: Some(plan.routine().to_string()),
                chunk: Some(plan.chunk()),
                far_share: gates
                    .map(|gates| gates.iter().filter(|&&gate| gate == 1).count() as f64 / gates.len() as f64),
                speedup: Some(dense_ms / times.0.as_secs_f64()),
                ..timing(case, times, self.bytes(reaches.list(), gates))
            });
        }
        Ok(())
    }

    /// Gates of every sequence and query head, the same for all queries: on the device, and on the host.
    fn gates(&self, share: f64) -> bifocal::Result<(Routes, Vec<u8>)> {
        let (batch, heads) = (self.options.shape.batch, self.options.shape.heads);
        let far = (share * (batch * heads) as f64).round() as usize;
        let mut gates: Vec<u8> = (0..batch * heads).map(|at| u8::from(at < far)).collect();
        let mut rng = SmallRng::seed_from_u64(1);
        for at in (1..gates.len()).rev() {
            gates.swap(at, rng.random_range(0..=at));
        }
        let geometry = RouteGeometry::new(batch, heads, self.options.queries, 2)?;
        let by_token: Vec<u8> = gates.iter().flat_map(|&gate| vec![gate; self.options.queries]).collect();
        Ok((Routes::from_host(self.client, geometry, &by_token)?, gates))
    }

    fn plan(&self) -> bifocal::Result<DecodePlan> {
        let Turn { cache, batch, .. } = &self.turns[0];
        let shape = self.options.shape.problem(self.length)?;
        let mut problem = cache.view(batch)?.problem(self.query.shape(), self.query.element())?;
        (problem.softcap, problem.routine) = (shape.softcap, shape.routine);
        match self.options.chunk {
            Some(keys) => DecodePlan::in_chunks(self.client, &problem, keys),
            None => DecodePlan::new(self.client, &problem),
        }
    }

    /// Bytes that a step needs: of each kv head the union of what its rows see, queries and outputs.
    fn bytes(&self, reaches: &[Option<Reach>], gates: Option<&[u8]>) -> usize {
        let shape = &self.options.shape;
        let (heads, group) = (shape.heads, shape.heads / shape.kv_heads());
        let positions = self.length - self.options.queries.min(self.length)..self.length;
        let mut keys = 0;
        for head in (0..shape.batch * heads).step_by(group) {
            let of_group = (head..head + group).map(|head| gates.map_or(0, |gates| usize::from(gates[head])));
            let mut seen: Vec<Reach> = of_group.filter_map(|route| reaches[route]).collect();
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

    /// Median and fastest time of a call, over caches in turn.
    fn timed(&self, call: impl Fn(&Turn) -> bifocal::Result<()> + Sync) -> Result<(Duration, Duration)> {
        let cpu = self.options.device == DeviceName::Cpu;
        // The first call compiles.
        call(&self.turns[0])?;
        let estimate = measure(self.client, cpu, || call(&self.turns[self.turns.len() - 1]))?;
        let calls = (SAMPLE.as_secs_f64() / estimate.as_secs_f64()).ceil().clamp(1.0, 32.0) as usize;
        let mut turns = self.turns.iter().cycle();
        let mut times = (0..self.options.runs)
            .map(|_| {
                let turn: Vec<_> = turns.by_ref().take(calls).collect();
                let time = measure(self.client, cpu, || turn.into_iter().try_for_each(&call))?;
                Ok(time / calls as u32)
            })
            .collect::<Result<Vec<_>>>()?;
        times.sort_unstable();
        Ok((times[times.len() / 2], times[0]))
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
        report.queries,
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
    ]);
    for timing in &report.timings {
        table.add_row([
            timing.case.clone(),
            timing.length.to_string(),
            timing.routine.clone().unwrap_or_default(),
            timing.chunk.map_or("-".to_string(), |chunk| chunk.to_string()),
            timing.far_share.map_or("-".to_string(), |share| format!("{:.1} %", share * 100.0)),
            format!("{:.4}", timing.median_ms),
            format!("{:.4}", timing.fastest_ms),
            format!("{:.2}", timing.bytes as f64 / 1e6),
            format!("{:.1}", timing.gb_per_s),
            format!("{:.0} %", timing.share_of_copy * 100.0),
            timing.speedup.map_or("-".to_string(), |speedup| format!("{speedup:.2}")),
        ]);
    }
    println!("{table}");
}
