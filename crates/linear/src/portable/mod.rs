//! The routine for every runtime: plain vector arithmetic, no planes, no shared memory, no synchronisation.
//!
//! Keys that leave the window are cut into chunks. A first launch sums up every chunk, a second adds the sums up to the state
//! before each, and in a third every row meets the state of its chunk and the keys of the chunk that left before it. Going
//! back, the same three run once more for the states, once over queries for the gradients of states, and each gradient has
//! one unit that sums it in a fixed order.

mod features;
pub(crate) mod geometry;
mod meet;
mod numbers;
mod read;
mod rows;
mod states;
mod step;
mod turn;

use bifocal_core::{
    DeviceProfile, Element, FeatureMap, Problem, Refusal, Result,
    device::{
        Gradients, Rows, Summaries, Tensor, TensorView,
        launch::{elements, grid, words},
    },
};
use cubecl::client::Client;

pub(crate) use self::numbers::{INVALID_ROW, Strides, offset, strides};
use self::{
    features::norms_kernel,
    geometry::{Blueprint, Geometry, lanes, largest_divisor},
    meet::{meet_kernel, score_kernel},
    numbers::{ListsLaunch, keys, lists, numbers, queries},
    read::read_kernel,
    states::{Scan, decays_kernel, scan_kernel, sum_kernel},
    step::{SizesLaunch, step_kernel},
    turn::turn_kernel,
};
use crate::{LeavingKey, LinearInputs, State};

/// Whether this routine can run `problem` on a device with this profile; if not, why.
pub(crate) fn supports(problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
    if !profile.elements.contains(&problem.element) {
        let device = profile.elements.clone();
        return Err(Refusal::Element { element: problem.element, device });
    }
    // Sums of a tile live in a unit's private memory.
    for head_dim in [problem.head_dim, problem.value_dim] {
        if !(1..=512).contains(&head_dim) {
            return Err(Refusal::HeadDim { head_dim, supported: "1 to 512" });
        }
    }
    Ok(())
}

/// The norms of all queries, and of all keys.
#[derive(Clone)]
pub(crate) struct AllNorms {
    query: Tensor<1>,
    key: Tensor<1>,
}

impl AllNorms {
    pub(crate) fn new(client: &Client, inputs: &LinearInputs<'_>, map: FeatureMap) -> Self {
        let of = |x| norms(client, map, x);
        Self { query: of(inputs.attention.query), key: of(inputs.attention.key) }
    }
}

/// A call on a device, of a batch or of one of the sequences that are packed into it: its geometry, and what all of its
/// kernels read. Everything has been checked.
pub(crate) struct Call<'a> {
    client: &'a Client,
    problem: &'a Problem,
    inputs: &'a LinearInputs<'a>,
    geometry: Geometry,
    blueprint: Blueprint,
    norms: AllNorms,
    /// Sums of decays from the starts of chunks; norms where nothing decays.
    decays: Tensor<1>,
}

impl<'a> Call<'a> {
    pub(crate) fn new(
        client: &'a Client,
        problem: &'a Problem,
        inputs: &'a LinearInputs<'a>,
        geometry: Geometry,
        map: FeatureMap,
        norms: &AllNorms,
    ) -> Self {
        let profile = DeviceProfile::of(client);
        let (decays, routed) = (inputs.log_decay.is_some(), matches!(inputs.rows, Rows::Routed(_)));
        let blueprint = Blueprint::new(&geometry, &profile, map, decays, routed);
        let decays = match inputs.log_decay {
            Some(log_decay) => sum_decays(client, &geometry, log_decay),
            None => norms.query.clone(),
        };
        Self { client, problem, inputs, geometry, blueprint, norms: norms.clone(), decays }
    }

    /// Writes the outputs of the rows, and to `end` the state that the last one met.
    pub(crate) fn attend(&self, out: &Tensor<4>, end: &Tensor<4>) {
        let states = self.states(end);
        let Self { client, geometry, blueprint, norms, .. } = self;
        if geometry.query_len == 0 {
            return;
        }
        let attention = &self.inputs.attention;
        let (cubes, units) = grid(client, self.tiles(geometry.group, geometry.segments));
        let element = self.problem.element;
        let types = [element.into(), element.into(), out.element().into()];
        // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers; the geometry is
        // the problem's, and each unit checks its slot.
        unsafe {
            read_kernel::launch_unchecked(
                client,
                cubes,
                units,
                elements(attention.query),
                elements(attention.key),
                elements(attention.value),
                elements(norms.query.view()),
                elements(norms.key.view()),
                elements(self.decays.view()),
                elements(states.view()),
                elements(out.view()),
                strides(attention.query.strides()),
                strides(attention.key.strides()),
                strides(attention.value.strides()),
                strides(out.strides()),
                queries(geometry),
                keys(geometry),
                self.lists(),
                numbers(geometry),
                *blueprint,
                types,
                blueprint.lanes,
            );
        }
    }

    /// Adds the gradients of queries, keys and values, and writes that of the state that came in to `d_start`.
    pub(crate) fn backward(
        &self,
        d_out: TensorView<'_, 4>,
        d_state: Option<&Tensor<4>>,
        gradients: &Gradients,
        d_start: &Tensor<4>,
    ) {
        // Nothing asks for the state that is left: it goes where the gradient will be.
        let states = self.states(d_start);
        let Self { client, geometry, blueprint, norms, .. } = self;
        let attention = &self.inputs.attention;
        let element = self.problem.element;
        // The gradients of the states after the chunks, from the last to the first.
        let slopes = self.room_for_states();
        let early = self.inputs.state.is_some();
        self.sum(attention.query, d_out, &norms.query, queries(geometry), early, *blueprint, &slopes);
        self.scan(&slopes, d_state.map(Tensor::view), d_start, true);

        let tiles = [self.tiles(geometry.group, geometry.segments), self.tiles(1, geometry.chunks)];
        let of_keys = blueprint.of_keys();
        // SAFETY: as for the forward pass; gradients are contiguous and have passed their own check.
        unsafe {
            if geometry.query_len > 0 {
                let (cubes, units) = grid(client, tiles[0]);
                turn_kernel::launch_unchecked(
                    client,
                    cubes,
                    units,
                    elements(attention.query),
                    elements(d_out),
                    elements(attention.key),
                    elements(attention.value),
                    elements(norms.query.view()),
                    elements(norms.key.view()),
                    elements(self.decays.view()),
                    elements(states.view()),
                    elements(gradients.query.view()),
                    strides(attention.query.strides()),
                    strides(d_out.strides()),
                    strides(attention.key.strides()),
                    strides(attention.value.strides()),
                    queries(geometry),
                    keys(geometry),
                    self.lists(),
                    numbers(geometry),
                    *blueprint,
                    [element.into(), d_out.element().into(), element.into()],
                    blueprint.lanes,
                );
            }
            let (cubes, units) = grid(client, tiles[1]);
            turn_kernel::launch_unchecked(
                client,
                cubes,
                units,
                elements(attention.key),
                elements(attention.value),
                elements(attention.query),
                elements(d_out),
                elements(norms.key.view()),
                elements(norms.query.view()),
                elements(self.decays.view()),
                elements(slopes.view()),
                elements(gradients.key.view()),
                strides(attention.key.strides()),
                strides(attention.value.strides()),
                strides(attention.query.strides()),
                strides(d_out.strides()),
                keys(geometry),
                queries(geometry),
                self.lists(),
                numbers(geometry),
                of_keys,
                [element.into(), element.into(), d_out.element().into()],
                blueprint.lanes,
            );
            let (cubes, units) = grid(client, tiles[1]);
            read_kernel::launch_unchecked(
                client,
                cubes,
                units,
                elements(attention.key),
                elements(attention.query),
                elements(d_out),
                elements(norms.key.view()),
                elements(norms.query.view()),
                elements(self.decays.view()),
                elements(slopes.view()),
                elements(gradients.value.view()),
                strides(attention.key.strides()),
                strides(attention.query.strides()),
                strides(d_out.strides()),
                strides(gradients.value.strides()),
                keys(geometry),
                queries(geometry),
                self.lists(),
                numbers(geometry),
                of_keys,
                [element.into(), d_out.element().into(), Element::F32.into()],
                blueprint.lanes,
            );
        }
    }

    /// The state before each chunk; writes the one after the last to `end`.
    pub(crate) fn states(&self, end: &Tensor<4>) -> Tensor<1> {
        let states = self.room_for_states();
        let attention = &self.inputs.attention;
        let side = keys(&self.geometry);
        let blueprint = self.blueprint.of_keys();
        self.sum(attention.key, attention.value, &self.norms.key, side, false, blueprint, &states);
        self.scan(&states, self.inputs.state.map(State::view), end, false);
        states
    }

    fn lists(&self) -> ListsLaunch {
        lists(self.inputs.rows, self.norms.query.handle())
    }

    fn room_for_states(&self) -> Tensor<1> {
        let Geometry { lists, chunks, features, value_dim, .. } = self.geometry;
        Tensor::empty(self.client, [lists * chunks * features * value_dim], Element::F32)
    }

    /// Units that compute tiles of rows, `group` of each token: as many for every chunk as its rows can need.
    fn tiles(&self, group: usize, chunks: usize) -> usize {
        let Geometry { lists, chunk, .. } = self.geometry;
        lists * chunks * (chunk * group).div_ceil(self.blueprint.lanes)
    }

    /// Sums up every chunk.
    fn sum(
        &self,
        x: TensorView<'_, 4>,
        y: TensorView<'_, 4>,
        norms: &Tensor<1>,
        side: numbers::SideLaunch,
        early: bool,
        blueprint: Blueprint,
        sums: &Tensor<1>,
    ) {
        let Geometry { lists, chunks, head_dim, value_dim, .. } = self.geometry;
        let parts = head_dim.div_ceil(blueprint.lanes) * (value_dim / blueprint.value_block);
        let (cubes, units) = grid(self.client, lists * chunks * parts);
        // SAFETY: as for the forward pass.
        unsafe {
            sum_kernel::launch_unchecked(
                self.client,
                cubes,
                units,
                elements(x),
                elements(y),
                elements(norms.view()),
                elements(self.decays.view()),
                elements(sums.view()),
                strides(x.strides()),
                strides(y.strides()),
                side,
                self.lists(),
                numbers(&self.geometry),
                u32::from(early),
                blueprint,
                [x.element().into(), y.element().into()],
                blueprint.lanes,
            );
        }
    }

    /// [`scan`], with this call's decays.
    fn scan(&self, sums: &Tensor<1>, start: Option<TensorView<'_, 4>>, end: &Tensor<4>, backwards: bool) {
        let of = Scan { decays: self.blueprint.decays, starts: start.is_some(), backwards };
        scan(self.client, &self.geometry, (sums, start, end), &self.decays, of);
    }
}

/// Puts what comes before each chunk in the place of its sum, and writes what is left to `end`; nothing decays.
pub(crate) fn prefix(
    client: &Client,
    geometry: &Geometry,
    sums: &Tensor<1>,
    start: Option<TensorView<'_, 4>>,
    end: &Tensor<4>,
) {
    let no_decays = Tensor::empty(client, [4], Element::F32);
    let of = Scan { decays: false, starts: start.is_some(), backwards: false };
    scan(client, geometry, (sums, start, end), &no_decays, of);
}

/// Turns the sums of chunks into what comes before each, or after; writes what is left to `end`. There are at least four
/// numbers of decays: where no state comes in they are bound in its place.
fn scan(
    client: &Client,
    geometry: &Geometry,
    (sums, start, end): (&Tensor<1>, Option<TensorView<'_, 4>>, &Tensor<4>),
    decays: &Tensor<1>,
    scan: Scan,
) {
    let numbers_per_list = geometry.features * geometry.value_dim;
    let width = largest_divisor(numbers_per_list, 4);
    let columns = numbers_per_list / width;
    let (cubes, units) = grid(client, geometry.lists * columns);
    // SAFETY: sums, start and end are contiguous and of the geometry's sizes.
    unsafe {
        scan_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(sums.view()),
            match start {
                Some(start) => elements(start),
                None => elements(decays.view()),
            },
            elements(end.view()),
            elements(decays.view()),
            numbers(geometry),
            columns as u32,
            scan,
            width,
        );
    }
}

/// The norms of every row of a tensor; a few numbers that nothing reads where the feature map has none.
fn norms(client: &Client, map: FeatureMap, x: TensorView<'_, 4>) -> Tensor<1> {
    let [batch, heads, tokens, head_dim] = x.shape();
    let rows = batch * heads * tokens;
    if map != FeatureMap::SoftmaxPair {
        return Tensor::empty(client, [4], Element::F32);
    }
    let norms = Tensor::empty(client, [4 * rows], Element::F32);
    let lanes = lanes(&DeviceProfile::of(client));
    let (cubes, units) = grid(client, rows.div_ceil(lanes));
    // SAFETY: the tensor has passed its check; each unit checks its rows.
    unsafe {
        norms_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(x),
            elements(norms.view()),
            strides(x.strides()),
            rows as u32,
            heads as u32,
            tokens as u32,
            head_dim as u32,
            lanes,
            x.element().into(),
            lanes,
        );
    }
    norms
}

/// Decays, summed up from the start of each chunk.
fn sum_decays(client: &Client, geometry: &Geometry, log_decay: TensorView<'_, 4>) -> Tensor<1> {
    let decays = Tensor::empty(client, [(geometry.lists * geometry.keys).max(4)], Element::F32);
    let (cubes, units) = grid(client, geometry.lists * geometry.chunks);
    // SAFETY: the decays have passed their check; each unit checks its chunk.
    unsafe {
        decays_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(log_decay),
            elements(decays.view()),
            strides(log_decay.strides()),
            keys(geometry),
            numbers(geometry),
        );
    }
    decays
}

/// Brings the state up to date and writes the outputs of one query per sequence and head. Everything has been checked.
pub(crate) fn step(
    client: &Client,
    problem: &Problem,
    map: FeatureMap,
    query: TensorView<'_, 4>,
    left: Option<&LeavingKey<'_>>,
    state: &State,
    out: &Tensor<4>,
) {
    let query_norms = norms(client, map, query);
    let key_norms = match left {
        Some(left) => norms(client, map, left.key),
        None => query_norms.clone(),
    };
    // What is not there is the query, which nothing reads then.
    let (key, value) = left.map_or((query, query), |left| (left.key, left.value));
    let log_decay = left.and_then(|left| left.log_decay);
    let profile = DeviceProfile::of(client);
    let blueprint = step::Blueprint {
        map,
        leaves: left.is_some(),
        decays: log_decay.is_some(),
        width: largest_divisor(problem.value_dim, if profile.cpu_cores.is_some() { 16 } else { 4 }),
        heads: problem.group().next_power_of_two().min(4),
    };
    let lists = problem.batch * problem.kv_heads;
    let (cubes, units) = grid(client, lists * (problem.value_dim / blueprint.width));
    // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers.
    unsafe {
        step_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(query),
            elements(key),
            elements(value),
            match log_decay {
                Some(log_decay) => elements(log_decay),
                None => elements(query_norms.view()),
            },
            elements(query_norms.view()),
            elements(key_norms.view()),
            elements(state.view()),
            elements(out.view()),
            strides(query.strides()),
            strides(key.strides()),
            strides(value.strides()),
            strides(log_decay.map_or([0; 4], |log_decay| log_decay.strides())),
            strides(out.strides()),
            SizesLaunch::new(
                lists as u32,
                problem.kv_heads as u32,
                problem.group() as u32,
                problem.head_dim as u32,
                problem.value_dim as u32,
            ),
            blueprint,
            [problem.element.into(), out.element().into()],
            [blueprint.width, blueprint.heads],
        );
    }
}

/// Writes the outputs of a few queries per sequence and head, from states and from keys beside them. Everything has been
/// checked.
pub(crate) fn meet(
    client: &Client,
    problem: &Problem,
    map: FeatureMap,
    query: TensorView<'_, 4>,
    summaries: &Summaries<'_>,
    out: &Tensor<4>,
) {
    let Problem { batch, kv_heads, query_len, head_dim, value_dim, .. } = *problem;
    let (lists, rows, room) = (batch * kv_heads, problem.packed_rows(), summaries.room());
    let (key, value) = (summaries.key.view(), summaries.value.view());
    let (query_norms, key_norms) = (norms(client, map, query), norms(client, map, key));
    let scores = Tensor::<1>::empty(client, [lists * rows * room], Element::F32);
    let profile = DeviceProfile::of(client);
    let blueprint = meet::Blueprint {
        map,
        width: largest_divisor(value_dim, if profile.cpu_cores.is_some() { 16 } else { 4 }),
        rows: rows.next_power_of_two().min(4),
    };
    let sizes = || {
        meet::SizesLaunch::new(
            lists as u32,
            kv_heads as u32,
            problem.group() as u32,
            query_len as u32,
            room as u32,
            head_dim as u32,
            value_dim as u32,
        )
    };
    let element = problem.element.into();
    // SAFETY: the checks before keep every index that shapes, strides and spans can form inside the buffers.
    unsafe {
        let (cubes, units) = grid(client, lists * room * rows.div_ceil(blueprint.rows));
        score_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(query),
            elements(key),
            words(&summaries.spans),
            elements(query_norms.view()),
            elements(key_norms.view()),
            elements(scores.view()),
            strides(query.strides()),
            strides(key.strides()),
            sizes(),
            blueprint,
            element,
            blueprint.rows,
        );
        let (cubes, units) = grid(client, lists * (value_dim / blueprint.width));
        meet_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(query),
            elements(value),
            words(&summaries.spans),
            elements(query_norms.view()),
            elements(scores.view()),
            elements(summaries.parts[0].view()),
            elements(out.view()),
            strides(query.strides()),
            strides(value.strides()),
            strides(out.strides()),
            sizes(),
            blueprint,
            [element, out.element().into()],
            [blueprint.width, blueprint.rows],
        );
    }
}
