//! The operators over inputs in turn.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::Result;
use bifocal::{
    Aha, AttentionOperator, DeviceProfile, Element, Full, Gradients, Inputs, L2a, LinearGate, LinearInputs,
    MomentGate, Partial, Problem, Qada, RandomRouter, Rattention, RattentionInputs, Router, Routine, Rows,
    Saved, Tensor, Window, Windowed,
    cubecl::{MemoryScope, client::Client},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{
    Options,
    cases::CaseName,
    clock::{ROTATION_BYTES, replays, times, wall},
};
use crate::{DeviceName, timings::Timing};

/// Query, key, value, hidden states and the gradient of the outputs of one turn of the rotation.
pub(super) struct Set {
    pub(super) query: Tensor<4>,
    pub(super) key: Tensor<4>,
    pub(super) value: Tensor<4>,
    pub(super) hidden: Tensor<3>,
    d_out: Tensor<4>,
}

/// Everything that is timed at one length.
pub(super) struct Bench<'a> {
    client: &'a Client,
    pub(super) options: &'a Options,
    pub(super) problem: Problem,
    routine: String,
    pub(super) window: Window,
    gate: LinearGate,
    pub(super) by_head: RandomRouter,
    pub(super) by_token: RandomRouter,
    pub(super) sets: Vec<Set>,
    memory: Memory,
    partial: Partial,
    pub(super) qada: Qada,
    /// What QAdA decides of every row, once calibrated.
    pub(super) decided: Vec<u8>,
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
    pub(super) fn new(client: &'a Client, options: &'a Options, length: usize) -> Result<Self> {
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
    pub(super) fn calibrate(&mut self) -> Result<()> {
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

    pub(super) fn time(&self, case: CaseName) -> Result<Timing> {
        let client = self.client;
        let hidden = self.sets[0].hidden.view();
        let by_head = self.by_head.route(client, hidden)?;
        let by_token = self.by_token.route(client, hidden)?;
        let attend = |set: &Set, partial: &Partial| -> bifocal::Result<()> {
            let inputs = Inputs::new(set.query.view(), set.key.view(), set.value.view());
            let problem = &self.problem_of(case);
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
                        // Most rows are in no pass.
                        let gradients = gradients.clone().with_query_cleared(client)?;
                        Full.backward(client, problem, &inputs, rows, saved, &gradients).map(|_| ())
                    })
                }
                CaseName::Moments | CaseName::MomentsPortable => {
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
                CaseName::Linear | CaseName::LinearPortable => {
                    let far = Rattention::new(self.window).far();
                    let inputs = LinearInputs::new(set.query.view(), set.key.view(), set.value.view());
                    // As RATTENTION keeps it.
                    let out = Tensor::empty(client, problem.out_shape(), Element::F32);
                    let _state = far.attend(client, problem, &inputs, &out)?;
                    let gradients = match self.options.backward {
                        true => Some(Gradients::unset(client, problem, false)?),
                        false => None,
                    };
                    if let Some(gradients) = &gradients {
                        far.backward(client, problem, &inputs, set.d_out.view(), None, gradients)?;
                    }
                    self.look();
                    Ok(())
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
        let cpu = self.options.device == DeviceName::Cpu;
        let (median, fastest) = times(client, (cpu, self.options.runs), &self.sets, estimate, call)?;
        let replayed = replays(client, (cpu, self.options.runs), &self.sets, call)?;
        let memory = case.attends().then(|| {
            self.held(|| match case {
                // These make room for their outputs themselves.
                CaseName::L2a | CaseName::Linear | CaseName::LinearPortable => call(&self.sets[0]),
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
            fastest_ms: fastest.as_secs_f64() * 1e3,
            far_share: self.far_share(case),
            useful_flop,
            useful_gflops: useful_flop.map(|flop| flop / median.as_secs_f64() / 1e9),
            useful_bytes: Some(self.useful_bytes(case) as f64),
            memory_bytes: memory.transpose()?,
            chunk: None,
            share_of_copy: None,
            speedup: None,
            replayed_ms: replayed.map(|(median, _)| median.as_secs_f64() * 1e3),
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
    pub(super) fn name(&self, case: CaseName) -> String {
        let backward = if self.options.backward && case.attends() { "-backward" } else { "" };
        format!("{}{backward}", case.name())
    }

    /// The problem as the case asks for it.
    fn problem_of(&self, case: CaseName) -> Problem {
        if case.is_portable() { self.problem.with_routine(Routine::Portable) } else { self.problem }
    }

    /// What the case is computed by, forward and, if that is timed, backward: attention over a window or all, and what else it
    /// has routines of.
    fn routine(&self, case: CaseName) -> Result<String> {
        let (profile, problem) = (DeviceProfile::of(self.client), self.problem_of(case));
        let Set { query, key, value, .. } = &self.sets[0];
        let far = || -> Result<String> {
            let far = Rattention::new(self.window).far();
            let forward = far.choose(&problem, &profile)?;
            Ok(match self.options.backward {
                true => format!("{forward}, {}", far.choose_backward(&problem, &profile)?),
                false => forward.to_string(),
            })
        };
        let gate = || {
            let inputs = Inputs::new(query.view(), key.view(), value.view());
            self.qada.gate().routine(&problem, &profile, &inputs, None)
        };
        Ok(match case {
            CaseName::Linear | CaseName::LinearPortable => far()?,
            CaseName::Rattention => format!("{} + {}", self.routine, far()?),
            CaseName::Moments | CaseName::MomentsPortable => gate()?.to_string(),
            CaseName::Qada => format!("{} + {}", self.routine, gate()?),
            _ => self.routine.clone(),
        })
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
        let gradients = Gradients::unset(self.client, &self.problem, false)?;
        backward(&Saved { partial, d_out, delta: delta.view() }, &gradients)?;
        self.look();
        Ok(())
    }
}
