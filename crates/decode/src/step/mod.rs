//! A decode step: plan, attend chunk by chunk, merge.

mod merge;
mod mma;
mod pieces;
mod plan;
mod planes;
mod policy;
mod portable;
mod rows;

use core::fmt;

use bifocal_core::{
    DeviceProfile, Element, Error, Problem, Refusal, Refusals, Result, Routine,
    device::{
        Partial, Routes, TensorView,
        launch::{elements, grid, words},
    },
};
use cubecl::{CubeCount, CubeDim, client::Client, server::Handle};

use self::{
    merge::{merge_kernel, merge_on_planes_kernel},
    pieces::Cut,
    plan::{PLANNERS, plan_and_add_kernel, plan_kernel},
    policy::Policy,
    rows::{NumbersLaunch, StridesLaunch},
};
use crate::{
    Reaches,
    view::{CacheView, PlacesLaunch, places},
};

pub use self::mma::sources;

/// Most queries per sequence of a step: a token and what a draft model guesses after it.
pub const MAX_QUERIES: usize = 16;

/// One way to run a decode step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DecodeRoutine {
    /// Products of a plane on tensor cores, keys and values straight from memory: NVIDIA GPUs since Ampere. f16 and bf16.
    Mma,
    /// A plane of 32 units per piece of keys, 16 bytes per load: NVIDIA GPUs.
    Planes,
    /// A unit per chunk of keys: every runtime.
    Portable,
}

impl DecodeRoutine {
    /// Every routine, the fastest first.
    pub const ALL: [DecodeRoutine; 3] = [DecodeRoutine::Mma, DecodeRoutine::Planes, DecodeRoutine::Portable];

    /// The core's list of routines has no word for planes: what they say stands with the portable routine's.
    fn of_core(self) -> Routine {
        match self {
            DecodeRoutine::Mma => Routine::Mma,
            DecodeRoutine::Planes | DecodeRoutine::Portable => Routine::Portable,
        }
    }

    /// Whether units of its kernels work together.
    fn on_planes(self) -> bool {
        self != DecodeRoutine::Portable
    }
}

impl fmt::Display for DecodeRoutine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DecodeRoutine::Mma => "mma",
            DecodeRoutine::Planes => "planes",
            DecodeRoutine::Portable => "portable",
        })
    }
}

/// Whether `routine` can run the steps of `problem` on a device with this profile; if not, why. Needs no device.
///
/// # Errors
/// The [`Refusal`] says why not.
pub fn supports(routine: DecodeRoutine, problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
    if !profile.elements.contains(&problem.element) {
        let device = profile.elements.clone();
        return Err(Refusal::Element { element: problem.element, device });
    }
    match (routine, problem.routine) {
        (_, None)
        | (DecodeRoutine::Mma, Some(Routine::Mma))
        | (DecodeRoutine::Portable, Some(Routine::Portable)) => {}
        (_, Some(Routine::Mma | Routine::Portable)) => return Err(Refusal::NotAsked),
        (_, Some(_)) => return Err(Refusal::NotImplemented),
    }
    match routine {
        DecodeRoutine::Mma => mma::supports(problem, profile),
        DecodeRoutine::Planes => planes::supports(problem, profile),
        DecodeRoutine::Portable => Ok(()),
    }
}

/// What a step attends with: queries, and what each of them sees.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Step<'a> {
    /// `[B, H, Tq, D]`: the last `Tq` tokens of their sequences, whose keys are in the cache already.
    pub query: TensorView<'a, 4>,
    /// What each route shows.
    pub reaches: &'a Reaches,
    /// `[B, R, Tq]` with R = 1, Hk or H; the one reach there is unless given.
    pub routes: Option<&'a Routes>,
    /// `[H]`, `f32`: a learned logit that joins the softmax of every row of its head with a value of zero (gpt-oss, arXiv
    /// 2508.10925).
    pub sink_logits: Option<TensorView<'a, 1>>,
}

impl<'a> Step<'a> {
    /// Queries that all see the one reach.
    pub fn new(query: TensorView<'a, 4>, reaches: &'a Reaches) -> Self {
        Self { query, reaches, routes: None, sink_logits: None }
    }

    /// Each token and router head sees the reach that its route names. Rows without a valid route become NaN.
    pub fn with_routes(self, routes: &'a Routes) -> Self {
        Self { routes: Some(routes), ..self }
    }

    /// Adds one sink logit per query head.
    pub fn with_sink_logits(self, sink_logits: TensorView<'a, 1>) -> Self {
        Self { sink_logits: Some(sink_logits), ..self }
    }
}

/// Room for the decode steps of one batch, one at a time: what each kv head needs, and what each chunk of keys gives. Clones
/// share the room.
///
/// A step takes three launches and no read-back. The first finds for every tile of rows (up to so many of one kv head)
/// the union of what its rows see, by lengths and routes as they are on the device then. The second deals those keys to workers
/// in proportion to their bytes: one row that looks far is read by many workers, many windows by one. The third merges the
/// pieces of each row by their log-sum-exp (FlashDecoding; FlashInfer, arXiv 2501.01005). Grids and buffers do not depend on
/// lengths or routes.
///
/// Where a sequence's keys are cut depends on its neighbours, and with it the last bits of what it gets. Plans
/// [`in_chunks`](Self::in_chunks) cut at every so many keys from the first that a tile needs: a sequence gets the same bits in
/// any company.
#[derive(Clone, Debug)]
pub struct DecodePlan {
    problem: Problem,
    policy: Policy,
    /// `u32 [lists, 4]`: first key beyond the sinks, sinks, keys, cost.
    needs: Handle,
    /// `u32 [lists + 1]`: what the lists before each cost. Unused by the portable routine.
    starts: Handle,
    /// `f32 [slots, rows, 2]`: maximum and sum of the softmax.
    sums: Handle,
    /// `f32 [slots, rows, Dv]`: outputs before they are divided by the sum.
    outs: Handle,
}

impl DecodePlan {
    /// Room for steps of `problem` (a view's [`problem`](CacheView::problem)), cut so that the device's workers are busy.
    ///
    /// # Errors
    /// As [`Problem::check`]; [`Error::Option`] for more than [`MAX_QUERIES`] queries; [`Error::Refused`] when no routine
    /// takes the problem; [`Error::TooLarge`].
    pub fn new(client: &Client, problem: &Problem) -> Result<Self> {
        Self::build(client, problem, None)
    }

    /// [`new`](Self::new), in chunks of so many keys: plans of any batch that agree in it give a sequence the same bits.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::Option`] for chunks of 0 keys.
    pub fn in_chunks(client: &Client, problem: &Problem, keys: usize) -> Result<Self> {
        Self::build(client, problem, Some(keys))
    }

    fn build(client: &Client, problem: &Problem, chunk: Option<usize>) -> Result<Self> {
        problem.check()?;
        if problem.query_len > MAX_QUERIES {
            let expected = format!("1 to {MAX_QUERIES}");
            return Err(Error::option("query length of a step", problem.query_len, expected));
        }
        let profile = DeviceProfile::of(client);
        let routine = choose(problem, &profile)?;
        let policy = Policy::new(routine, problem, &profile, chunk)?;
        let rows = policy.slots() as u128 * policy.tile_rows as u128;
        let limit = u128::from(u32::MAX);
        let cost = policy.lists as u128
            * (problem.key_len as u128 + policy.max_chunks as u128 * policy::START as u128);
        for (what, size, limit) in [
            ("elements in the room of a step", rows * problem.value_dim.max(2) as u128, limit),
            // Costs are added up, and up to a worker's share beyond their sum.
            ("keys in a step over full caches", cost, limit / 2),
        ] {
            if size > limit {
                return Err(Error::TooLarge { what, size, limit });
            }
        }
        let buffer = |words: usize| client.empty(words * 4);
        let rows = rows as usize;
        Ok(Self {
            problem: *problem,
            policy,
            needs: buffer(policy.lists * 4),
            starts: buffer(policy.lists + 1),
            sums: buffer(rows * 2),
            outs: buffer(rows * problem.value_dim),
        })
    }

    /// The problem of its steps.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// What its steps run by.
    pub fn routine(&self) -> DecodeRoutine {
        self.policy.routine
    }

    /// Keys per chunk; `None` where keys are dealt evenly, wherever that cuts them.
    pub fn chunk(&self) -> Option<usize> {
        (self.policy.cut == Cut::Chunks).then_some(self.policy.chunk)
    }

    /// Computes one step into `partial`, every row of which is written.
    ///
    /// It takes no memory and uploads nothing, so it can be [captured](bifocal_core::device::capture). What is checked here is
    /// not checked by a replay, which reads lengths, page tables, routes and queries as they are then: no sequence may be empty or
    /// longer than its layout's capacity, and a ring has to have what the reaches show.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::Element`] when cache, queries, routes or partial are not those of the plan's problem, gates
    /// of another batch among them; as [`TensorView::check`] and [`Partial::check`]; [`Error::Option`] when routes choose
    /// from another number of reaches; [`Error::Overwritten`] when a ring has no longer what the reaches show;
    /// [`Error::Refused`] when pages of another library do not lie as the routine reads them.
    pub fn attend(
        &self,
        client: &Client,
        cache: &CacheView<'_>,
        step: &Step<'_>,
        partial: &Partial,
    ) -> Result<()> {
        partial.check(client, &self.problem)?;
        self.plan(client, cache, step)?;
        match self.policy.routine {
            DecodeRoutine::Mma => mma::launch(self, client, cache, step),
            DecodeRoutine::Planes => planes::launch(self, client, cache, step),
            DecodeRoutine::Portable => portable::launch(self, client, cache, step),
        }
        self.launch_merge(client, step, partial);
        Ok(())
    }

    /// The first launch of [`attend`](Self::attend) alone, to be timed: what it costs to know what each kv head needs.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    pub fn plan(&self, client: &Client, cache: &CacheView<'_>, step: &Step<'_>) -> Result<()> {
        self.check(client, cache, step)?;
        self.launch_plan(client, cache, step);
        Ok(())
    }

    fn check(&self, client: &Client, cache: &CacheView<'_>, step: &Step<'_>) -> Result<()> {
        let Problem { batch, heads, query_len, head_dim, element, .. } = self.problem;
        cache.check(client, &self.problem)?;
        step.query.check("query", client, [batch, heads, query_len, head_dim], element)?;
        if let Some(sinks) = step.sink_logits {
            sinks.check("the sink logits", client, [heads], Element::F32)?;
        }
        let reaches = match step.routes {
            Some(routes) => {
                routes.geometry().check(&self.problem)?;
                routes.check_device(client)?;
                routes.geometry().reaches
            }
            None => 1,
        };
        let list = step.reaches.list();
        if reaches != list.len() {
            let expected = format!("{} (one per reach of the step)", list.len());
            return Err(Error::option("reaches of the routes", reaches, expected));
        }
        for &reach in list.iter().flatten() {
            cache.check_kept(reach, query_len)?;
        }
        match self.policy.routine.on_planes() {
            true => planes::takes(cache)
                .map_err(|refusal| refused(vec![(self.policy.routine.of_core(), refusal)])),
            false => Ok(()),
        }
    }

    fn launch_plan(&self, client: &Client, cache: &CacheView<'_>, step: &Step<'_>) {
        let routed = step.routes.is_some();
        let (tables, slots) = (words(cache.tables), words(cache.slots));
        let (routes, rules) = (self.routes(step), words(step.reaches.rules()));
        let (places, numbers) = (self.places(cache), self.numbers(step));
        // SAFETY: routes, rules and tables were checked against the problem; each unit checks its list.
        unsafe {
            if self.policy.routine.on_planes() {
                let units =
                    self.policy.lists.next_multiple_of(DeviceProfile::PLANE as usize).min(PLANNERS) as u32;
                plan_and_add_kernel::launch_unchecked(
                    client,
                    CubeCount::Static(1, 1, 1),
                    CubeDim::new_1d(units),
                    tables,
                    slots,
                    routes,
                    rules,
                    words(&self.needs),
                    words(&self.starts),
                    places,
                    numbers,
                    routed,
                    units,
                );
            } else {
                let (cubes, units) = grid(client, self.policy.lists);
                let needs = words(&self.needs);
                plan_kernel::launch_unchecked(
                    client, cubes, units, tables, slots, routes, rules, needs, places, numbers, routed,
                );
            }
        }
    }

    fn launch_merge(&self, client: &Client, step: &Step<'_>, partial: &Partial) {
        let Problem { batch, heads, query_len, value_dim, kv_heads, .. } = self.problem;
        let rows = batch * heads * query_len;
        let (routes, rules) = (self.routes(step), words(step.reaches.rules()));
        let (sums, outs) = (words(&self.sums), words(&self.outs));
        let sink_logits = match step.sink_logits {
            // SAFETY: the sink logits were checked.
            Some(sinks) => unsafe { elements(sinks) },
            None => words(&self.sums),
        };
        let (routed, has_sinks) = (step.routes.is_some(), step.sink_logits.is_some());
        let (out_strides, numbers) = (strides(partial.out.view()), self.numbers(step));
        let element = partial.out.element().into();
        // SAFETY: the partial was checked; each unit checks its element, and there is a cube per row.
        unsafe {
            let (out, lse) = (elements(partial.out.view()), elements(partial.lse.view()));
            if self.policy.routine.on_planes() {
                merge_on_planes_kernel::launch_unchecked(
                    client,
                    CubeCount::Static(rows as u32, 1, 1),
                    CubeDim::new_1d(merge::PLANES as u32 * DeviceProfile::PLANE),
                    words(&self.needs),
                    words(&self.starts),
                    routes,
                    rules,
                    sums,
                    outs,
                    sink_logits,
                    out,
                    lse,
                    out_strides,
                    numbers,
                    kv_heads as u32,
                    value_dim,
                    self.policy.cut,
                    routed,
                    has_sinks,
                    element,
                );
            } else {
                let (cubes, units) = grid(client, rows * value_dim);
                merge_kernel::launch_unchecked(
                    client,
                    cubes,
                    units,
                    words(&self.needs),
                    routes,
                    rules,
                    sums,
                    outs,
                    sink_logits,
                    out,
                    lse,
                    out_strides,
                    numbers,
                    kv_heads as u32,
                    routed,
                    has_sinks,
                    element,
                );
            }
        }
    }

    /// Routes, or what is bound in their place where there are none.
    fn routes(&self, step: &Step<'_>) -> cubecl::prelude::BufferArg {
        words(step.routes.map_or(step.reaches.rules(), Routes::handle))
    }

    fn places(&self, cache: &CacheView<'_>) -> PlacesLaunch {
        places(&cache.layout, self.problem.kv_heads)
    }

    fn numbers(&self, step: &Step<'_>) -> NumbersLaunch {
        let problem = &self.problem;
        NumbersLaunch::new(
            problem.heads as u32,
            problem.group() as u32,
            problem.query_len as u32,
            step.routes.map_or(1, |routes| routes.geometry().heads) as u32,
            step.reaches.list().len() as u32,
            self.policy.tiles as u32,
            self.policy.tile_rows as u32,
            self.policy.lists as u32,
            self.policy.chunk as u32,
            self.policy.max_chunks as u32,
            problem.key_len as u32,
            self.policy.workers as u32,
            problem.head_dim as u32,
            problem.value_dim as u32,
            problem.scale,
            problem.softcap.unwrap_or(1.0),
            f32::NEG_INFINITY,
            f32::NAN,
        )
    }
}

/// The fastest routine that takes the problem.
fn choose(problem: &Problem, profile: &DeviceProfile) -> Result<DecodeRoutine> {
    let mut refusals = Vec::new();
    for routine in DecodeRoutine::ALL {
        match supports(routine, problem, profile) {
            Ok(()) => return Ok(routine),
            Err(refusal) => refusals.push((routine.of_core(), refusal)),
        }
    }
    Err(refused(refusals))
}

fn refused(refusals: Vec<(Routine, Refusal)>) -> Error {
    Error::Refused { operator: "decode", refusals: Refusals(refusals) }
}

fn strides(view: TensorView<'_, 4>) -> StridesLaunch {
    let [batch, head, token, _] = view.strides().map(|stride| stride as u32);
    StridesLaunch::new(batch, head, token)
}
