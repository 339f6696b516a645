//! `bifocal bench`: the operators at chosen shapes; `bifocal bench decode`: decode steps.

mod decode;
mod gates;
mod useful;

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use anyhow::{Context, Result};
use bifocal::{
    Aha, AttentionOperator, DeviceProfile, Element, Full, Gradients, Inputs, L2a, LinearGate, LinearInputs,
    MomentGate, Partial, Problem, Qada, RandomRouter, Rattention, RattentionInputs, Router, Rows, Saved,
    Tensor, Window, Windowed, cubecl,
};
use clap::{Args, Subcommand, ValueEnum};
use cubecl::{MemoryScope, client::Client};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    DeviceName, output,
    shape::Shape,
    timings::{Report, Timing},
};
use gates::Gates;

/// Bytes of inputs that a run rotates through at least: more than the last-level caches of today's devices hold.
const ROTATION_BYTES: usize = 256 << 20;

/// How long a timed run is to take, if 32 calls do.
const SAMPLE: Duration = Duration::from_millis(4);

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
    /// Cases to time; all that the routine asked for can run unless given.
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum CaseName {
    /// The window, every row.
    Windowed,
    /// Full attention, every row.
    Full,
    /// The linear gate of every head: scores, routes and counts.
    Router,
    /// The dispatch plan of head-wise routes.
    Plan,
    /// AHA by head-wise routes, its plan included.
    Aha,
    /// AHA as it trains: every row by both branches; with --backward the gradient of every gate as well.
    AhaExact,
    /// L2A's global branch by token-wise routes, its plan included.
    L2a,
    /// QAdA's decision: moments of keys, and what they say of every row.
    Moments,
    /// QAdA, decision, plan and merge included, with sinks, and with the threshold that sends the share of token-heads far.
    Qada,
    /// RATTENTION: the window, linear attention beyond it, and the sum of their norms.
    Rattention,
}

const CASES: [CaseName; 10] = [
    CaseName::Windowed,
    CaseName::Full,
    CaseName::Router,
    CaseName::Plan,
    CaseName::Aha,
    CaseName::AhaExact,
    CaseName::L2a,
    CaseName::Moments,
    CaseName::Qada,
    CaseName::Rattention,
];

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

/// All cases, but for RATTENTION where a routine is asked for that linear attention has no kernel of.
fn default_cases(options: &Options, client: &Client) -> Result<Vec<CaseName>> {
    let far = Rattention::new(Window::new(options.window)?).far();
    let problem = options.shape.problem(options.shape.lengths.first().copied().unwrap_or(1))?;
    let profile = DeviceProfile::of(client);
    let back = |routine| !options.backward || far.supports_backward(routine, &problem, &profile).is_ok();
    let runs = far.choose(&problem, &profile).is_ok() && problem.routine.is_none_or(back);
    // Nor is what moments do not know.
    let capped = options.shape.softcap.is_some();
    let fits = |case: &CaseName| (*case != CaseName::Rattention || runs) && !(capped && case.knows_moments());
    Ok(CASES.into_iter().filter(fits).collect())
}

impl CaseName {
    fn name(self) -> &'static str {
        match self {
            CaseName::Windowed => "windowed",
            CaseName::Full => "full",
            CaseName::Router => "router",
            CaseName::Plan => "plan",
            CaseName::Aha => "aha",
            CaseName::AhaExact => "aha-exact",
            CaseName::L2a => "l2a",
            CaseName::Moments => "moments",
            CaseName::Qada => "qada",
            CaseName::Rattention => "rattention",
        }
    }

    /// Whether moments of keys decide something.
    fn knows_moments(self) -> bool {
        matches!(self, CaseName::Moments | CaseName::Qada)
    }

    /// Whether it is attention, which has gradients.
    fn attends(self) -> bool {
        !matches!(self, CaseName::Router | CaseName::Plan | CaseName::Moments)
    }
}

/// Query, key, value, hidden states and the gradient of the outputs of one turn of the rotation.
struct Set {
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    hidden: Tensor<3>,
    d_out: Tensor<4>,
}

/// Everything that is timed at one length.
struct Bench<'a> {
    client: &'a Client,
    options: &'a Options,
    problem: Problem,
    routine: String,
    window: Window,
    gate: LinearGate,
    by_head: RandomRouter,
    by_token: RandomRouter,
    sets: Vec<Set>,
    memory: Memory,
    partial: Partial,
    qada: Qada,
    /// What QAdA decides of every row, once calibrated.
    decided: Vec<u8>,
    /// The scale of RATTENTION's norms.
    scale: Tensor<2>,
}

/// The most bytes that a call was seen to hold on the device.
#[derive(Default)]
struct Memory {
    /// Calls that are timed are not looked at: it waits for the device.
    looking: AtomicBool,
    most: AtomicU64,
}

impl<'a> Bench<'a> {
    fn new(client: &'a Client, options: &'a Options, length: usize) -> Result<Self> {
        let shape = &options.shape;
        let (query, key, hidden) = (shape.query(length), shape.key(length), shape.hidden(length));
        let (problem, element) = (shape.problem(length)?, shape.element());
        // What does not run at all says so before minutes are spent on drawing inputs.
        let profile = DeviceProfile::of(client);
        let mut routine = Full.choose(&problem, &profile)?.to_string();
        if options.backward {
            routine = format!("{routine}, {}", Full.choose_backward(&problem, &profile)?);
        }
        let mut rng = SmallRng::seed_from_u64(0);
        let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.7f32..1.7)).collect() };
        let size = |shape: &[usize]| shape.iter().product::<usize>();
        let bytes = (size(&query) + 2 * size(&key)) * element.size();
        let turns = ROTATION_BYTES.div_ceil(bytes).clamp(1, 16);
        // The same numbers at other addresses are as cold as other numbers.
        let (q, k, v) = (draw(size(&query)), draw(size(&key)), draw(size(&key)));
        let (h, o) = (draw(size(&hidden)), draw(size(&query)));
        let sets = (0..turns)
            .map(|_| {
                Ok(Set {
                    query: Tensor::from_f32(client, query, element, &q)?,
                    key: Tensor::from_f32(client, key, element, &k)?,
                    value: Tensor::from_f32(client, key, element, &v)?,
                    hidden: Tensor::from_f32(client, hidden, element, &h)?,
                    d_out: Tensor::from_f32(client, query, element, &o)?,
                })
            })
            .collect::<Result<_>>()?;
        let weight_shape = [shape.model_dim, shape.heads];
        let weight = draw(size(&weight_shape));
        Ok(Self {
            client,
            options,
            problem,
            window: Window::new(options.window)?,
            routine,
            gate: LinearGate::aha(Tensor::from_f32(client, weight_shape, element, &weight)?),
            by_head: options.gates.router(shape.heads, options.far_share, 1)?,
            by_token: options.gates.router(1, options.far_tokens, 2)?,
            sets,
            memory: Memory::default(),
            partial: Partial::empty(client, &problem, element),
            qada: Qada::new(MomentGate::new(Window::new(options.window)?, 0.5)?),
            decided: Vec::new(),
            scale: Tensor::filled(client, [shape.heads, problem.value_dim], Element::F32, 1.0)?,
        })
    }

    /// Finds the threshold by which QAdA sends the share of token-heads far, on these very inputs.
    fn calibrate(&mut self) -> Result<()> {
        let (client, problem, partial) = (self.client, &self.problem, &self.partial);
        let Set { query, key, value, .. } = &self.sets[0];
        let inputs = Inputs::new(query.view(), key.view(), value.view());
        let predicted = self.qada.gate().predict(client, problem, &inputs, None)?.to_f32(client)?;
        self.qada.near().attend(client, problem, &inputs, Rows::All, partial)?;
        let near = partial.lse.to_f32(client)?;
        let mut margins: Vec<f32> = predicted.iter().zip(&near).map(|(bulk, near)| bulk - near).collect();
        margins.sort_by(f32::total_cmp);
        let local = ((1.0 - self.options.far_share) * margins.len() as f64) as usize;
        let cut = f64::from(margins[local.min(margins.len() - 1)]);
        let tau = (1.0 / (1.0 + cut.exp())).clamp(f64::from(f32::MIN_POSITIVE), 1.0);
        self.qada = Qada::new(MomentGate::new(self.window, tau as f32)?);
        let (_, decision) = self.qada.attend(client, problem, &inputs, None)?;
        self.decided = decision.routes.to_host(client)?;
        Ok(())
    }

    fn time(&self, case: CaseName) -> Result<Timing> {
        let client = self.client;
        let hidden = self.sets[0].hidden.view();
        let by_head = self.by_head.route(client, hidden)?;
        let by_token = self.by_token.route(client, hidden)?;
        let attend = |set: &Set, partial: &Partial| -> bifocal::Result<()> {
            let inputs = Inputs::new(set.query.view(), set.key.view(), set.value.view());
            let problem = &self.problem;
            let all = |operator: &dyn AttentionOperator| {
                operator.attend(client, problem, &inputs, Rows::All, partial)?;
                self.differentiate(set, partial, |saved, gradients| {
                    operator.backward(client, problem, &inputs, Rows::All, saved, gradients).map(|_| ())
                })
            };
            match case {
                CaseName::Windowed => all(&Windowed::new(self.window)),
                CaseName::Full => all(&Full),
                CaseName::Router => self.gate.route(client, set.hidden.view()).map(|_| ()),
                CaseName::Plan => bifocal::plan(client, problem, &by_head.routes).map(|_| ()),
                CaseName::Aha => {
                    let aha = Aha::new(self.window);
                    let (plan, branches) = (bifocal::plan(client, problem, &by_head.routes)?, aha.branches());
                    bifocal::attend_planned(client, problem, &inputs, &plan, &branches, partial)?;
                    self.differentiate(set, partial, |saved, gradients| {
                        let (inputs, plan) = (&inputs, &plan);
                        bifocal::backward_selected(client, problem, inputs, plan, &branches, saved, gradients)
                    })
                }
                CaseName::AhaExact => {
                    let (aha, routes) = (Aha::new(self.window), &by_head.routes);
                    let (plan, branches) = (bifocal::plan(client, problem, routes)?, aha.branches());
                    let every = branches.map(Some);
                    let outs =
                        bifocal::attend_every(client, problem, &inputs, routes, &every, Rows::All, partial)?;
                    self.differentiate(set, partial, |saved, gradients| {
                        let (inputs, plan) = (&inputs, &plan);
                        bifocal::backward_selected(
                            client, problem, inputs, plan, &branches, saved, gradients,
                        )?;
                        let [Some(near), Some(far)] = &outs[..] else {
                            return Err(bifocal::Error::option("branches of AHA", outs.len(), "two"));
                        };
                        let (heads, near) = (routes.geometry().heads, Some(near.out.view()));
                        bifocal::gate_gradient(client, problem, heads, near, far.out.view(), saved.d_out)?;
                        Ok(())
                    })
                }
                CaseName::L2a => {
                    let partial = L2a::new(self.window).global(client, problem, &inputs, &by_token.routes)?;
                    self.differentiate(set, &partial, |saved, gradients| {
                        // The branch keeps its plan to itself.
                        let plan = bifocal::plan(client, problem, &by_token.routes)?;
                        let rows = plan.far_rows()?;
                        Full.backward(client, problem, &inputs, rows, saved, gradients).map(|_| ())
                    })
                }
                CaseName::Moments => {
                    let gate = self.qada.gate();
                    let predicted = gate.predict(client, problem, &inputs, None)?;
                    gate.decide(client, problem, self.partial.lse.view(), predicted).map(|_| ())
                }
                CaseName::Qada => {
                    let decision = self.qada.attend_into(client, problem, &inputs, None, partial)?;
                    self.differentiate(set, partial, |saved, gradients| {
                        // As L2A's.
                        let plan = bifocal::plan(client, problem, &decision.routes)?;
                        self.qada.backward(client, problem, &inputs, &plan, saved, gradients)
                    })
                }
                CaseName::Rattention => {
                    let inputs = RattentionInputs {
                        near: inputs,
                        far: LinearInputs::new(set.query.view(), set.key.view(), set.value.view()),
                        near_scale: self.scale.view(),
                        far_scale: self.scale.view(),
                    };
                    let rattention = Rattention::new(self.window);
                    let forward = rattention.attend(client, problem, &inputs, &partial.out)?;
                    let d_out = set.d_out.view();
                    let _gradients = match self.options.backward {
                        true => Some(rattention.backward(client, problem, &inputs, &forward, d_out, None)?),
                        false => None,
                    };
                    self.look();
                    Ok(())
                }
            }
        };
        let partial = Partial::empty(client, &self.problem, self.problem.element);
        let call = |set: &Set| attend(set, &partial);
        let first_call = wall(client, || call(&self.sets[0]))?;
        let estimate = wall(client, || call(&self.sets[self.sets.len() - 1]))?;
        // Short calls are timed several at once, as a model makes them: alone, the host's part would show.
        let calls = (SAMPLE.as_secs_f64() / estimate.as_secs_f64()).ceil().clamp(1.0, 32.0) as usize;
        let cpu = self.options.device == DeviceName::Cpu;
        let mut turns = self.sets.iter().cycle();
        let mut times: Vec<Duration> = (0..self.options.runs)
            .map(|_| {
                let turns: Vec<&Set> = turns.by_ref().take(calls).collect();
                let time = measure(client, cpu, || turns.into_iter().try_for_each(&call))?;
                Ok(time / calls as u32)
            })
            .collect::<Result<_>>()?;
        times.sort_unstable();
        let median = times[times.len() / 2];
        let memory = case.attends().then(|| {
            self.held(|| match case {
                // The branch makes room for its outputs itself.
                CaseName::L2a => call(&self.sets[0]),
                _ => {
                    let partial = Partial::empty(client, &self.problem, self.problem.element);
                    attend(&self.sets[0], &partial)
                }
            })
        });
        let useful_flop = self.useful_flop(case);
        Ok(Timing {
            case: self.name(case),
            length: self.problem.query_len,
            routine: Some(self.routine(case)?),
            first_call_ms: first_call.as_secs_f64() * 1e3,
            median_ms: median.as_secs_f64() * 1e3,
            fastest_ms: times[0].as_secs_f64() * 1e3,
            far_share: self.far_share(case),
            useful_flop,
            useful_gflops: useful_flop.map(|flop| flop / median.as_secs_f64() / 1e9),
            useful_bytes: Some(self.useful_bytes(case) as f64),
            memory_bytes: memory.transpose()?,
        })
    }

    /// Bytes that a call holds on the device beside its inputs when it has launched all: outputs, plan, what branches gave,
    /// and with the backward pass gradients in f32. What a launch takes and gives back meanwhile does not count.
    fn held(&self, call: impl FnOnce() -> bifocal::Result<()>) -> Result<u64> {
        bifocal::synchronise(self.client)?;
        let before = self.in_use();
        let Memory { looking, most } = &self.memory;
        most.store(before, Ordering::Relaxed);
        looking.store(true, Ordering::Relaxed);
        let called = call();
        looking.store(false, Ordering::Relaxed);
        called?;
        Ok(most.load(Ordering::Relaxed) - before)
    }

    /// Notes what is held now, if this call is looked at.
    fn look(&self) {
        if self.memory.looking.load(Ordering::Relaxed) {
            self.memory.most.fetch_max(self.in_use(), Ordering::Relaxed);
        }
    }

    fn in_use(&self) -> u64 {
        self.client.memory_report(MemoryScope::Device).usage().bytes_in_use
    }

    /// What the case is called in reports.
    fn name(&self, case: CaseName) -> String {
        let backward = if self.options.backward && case.attends() { "-backward" } else { "" };
        format!("{}{backward}", case.name())
    }

    /// What attention is computed by, forward and, if that is timed, backward.
    fn routine(&self, case: CaseName) -> Result<String> {
        match case {
            CaseName::Rattention => {
                let far = Rattention::new(self.window).far();
                let far = far.choose(&self.problem, &DeviceProfile::of(self.client))?;
                Ok(format!("{} + {far}", self.routine))
            }
            _ => Ok(self.routine.clone()),
        }
    }

    /// The backward pass, if it is timed: the products of outputs and their gradients, gradients to add to, and the
    /// kernels.
    fn differentiate(
        &self,
        set: &Set,
        partial: &Partial,
        backward: impl FnOnce(&Saved<'_>, &Gradients) -> bifocal::Result<()>,
    ) -> bifocal::Result<()> {
        if !self.options.backward {
            self.look();
            return Ok(());
        }
        let d_out = set.d_out.view();
        let delta = bifocal::dot_rows(self.client, &self.problem, partial.out.view(), d_out)?;
        let gradients = Gradients::zeros(self.client, &self.problem, false)?;
        backward(&Saved { partial, d_out, delta: delta.view() }, &gradients)?;
        self.look();
        Ok(())
    }
}

/// Device events on a GPU; the clock around launch and completion on a CPU, whose launches are its work.
fn measure(
    client: &Client,
    cpu: bool,
    call: impl FnOnce() -> bifocal::Result<()> + Send,
) -> Result<Duration> {
    if cpu {
        return wall(client, call);
    }
    let (called, duration) = client
        .profile(call, "bench")
        .map_err(|error| anyhow::anyhow!("cannot time on this device: {error:?}"))?;
    called?;
    let ticks = cubecl::future::block_on(duration.resolve()).context("the device gave no time stamps")?;
    Ok(ticks.duration())
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
            timing.useful_gflops.map_or("-".to_string(), |rate| format!("{rate:.1}")),
            timing.memory_bytes.map_or("-".to_string(), |bytes| format!("{:.1}", bytes as f64 / 1048576.0)),
            format!("{:.0}", timing.first_call_ms),
        ]);
    }
    println!("{table}");
}
