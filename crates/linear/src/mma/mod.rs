//! The routine for every NVIDIA GPU since Ampere, forward: products of a warp, asynchronous copies.
//!
//! Three launches: sums of chunks, what comes before each (the portable routine's), outputs; and one before them where a
//! dispatch plan says which rows are written. Chunks are long, as many as there are multiprocessors: between them states go
//! through memory in f32, within one a cube goes on from the state that it holds in registers, step by step. Operands of
//! products are rounded to the inputs' type: features, weights, and what rows read of the state; sums are f32.

mod blueprint;
mod features;
mod kernel;
mod rows;
mod source;

use bifocal_core::{
    DeviceProfile, Element, FeatureMap, Problem, Refusal, Result,
    device::{
        RoutedRows, Rows, Tensor, TensorView,
        launch::{elements, grid, words},
    },
};
use bifocal_tensor_core::{Operand, aligned};
use cubecl::{client::Client, prelude::*};

pub use self::source::sources;
use self::{
    blueprint::{Blueprint, THREADS},
    kernel::{NumbersLaunch, mark_kernel, read_kernel, sum_kernel},
};
use crate::{
    LinearInputs, State,
    portable::{self, geometry::Geometry, strides},
};

/// What the kernels are compiled for; or why this routine cannot run the forward pass of `problem` on a device with this
/// profile.
pub(crate) fn blueprint(
    problem: &Problem,
    map: FeatureMap,
    profile: &DeviceProfile,
) -> Result<Blueprint, Refusal> {
    if profile.cuda_arch.is_none_or(|arch| arch < 80) || !profile.has_planes() {
        return Err(Refusal::Architecture { needs: "an NVIDIA GPU of compute capability 8.0 or above" });
    }
    if Operand::of(problem.element).is_none() {
        let device = vec![Element::F16, Element::Bf16];
        return Err(Refusal::Element { element: problem.element, device });
    }
    if map != FeatureMap::SoftmaxPair {
        return Err(Refusal::FeatureMap { map });
    }
    let Problem { head_dim, value_dim, .. } = *problem;
    if !matches!(head_dim, 64 | 128) {
        return Err(Refusal::HeadDim { head_dim, supported: "64 or 128" });
    }
    if value_dim != head_dim {
        let supported = "the head dim of query and key";
        return Err(Refusal::HeadDim { head_dim: value_dim, supported });
    }
    let supported = "64 where a cube has less than 163 KiB of shared memory";
    Blueprint::new(problem, profile.shared_memory).ok_or(Refusal::HeadDim { head_dim, supported })
}

/// Whether there is a kernel for the inputs, laid out as 16-byte accesses need it; if not, why.
pub(crate) fn takes(inputs: &LinearInputs<'_>, out: TensorView<'_, 4>) -> Result<(), Refusal> {
    if inputs.log_decay.is_some() {
        return Err(Refusal::Decay);
    }
    aligned("query", inputs.attention.query, false)?;
    aligned("key", inputs.attention.key, false)?;
    aligned("value", inputs.attention.value, false)?;
    aligned("the output", out, false)
}

/// Writes the outputs of the rows, and to `end` the states that the last ones met: of a batch, or of the sequences that are
/// packed into it, one after the other. Everything has been checked: [`blueprint()`], [`takes`], and what the operator checks.
///
/// All rows are computed, of which a dispatch plan's are written: a step's keys go into the state whatever rows it has.
///
/// # Errors
/// As [`Tensor::zeros`].
pub(crate) fn attend(
    client: &Client,
    inputs: &LinearInputs<'_>,
    geometries: &[Geometry],
    blueprint: Blueprint,
    out: &Tensor<4>,
    end: &Tensor<4>,
) -> Result<()> {
    let marked = matches!(inputs.rows, Rows::Routed(_));
    let blueprint = Blueprint { out_f32: out.element() == Element::F32, marked, ..blueprint };
    let marks = marks(client, inputs.rows)?;
    for geometry in geometries {
        attend_one(client, inputs, geometry, blueprint, &marks, out, end);
    }
    Ok(())
}

/// What each packed row is, list by list: 1 where a dispatch plan lists it, 2 where it has no valid route besides, 0 elsewhere.
/// A few numbers that nothing reads where all rows take part.
fn marks(client: &Client, rows: Rows<'_>) -> Result<Tensor<1>> {
    let Rows::Routed(RoutedRows { rows, list_counts, reach, shape, .. }) = rows else {
        return Ok(Tensor::empty(client, [4], Element::F32));
    };
    let [batch, kv_heads, packed_rows] = shape;
    let lists = batch * kv_heads;
    let marks = Tensor::zeros(client, [lists * packed_rows])?;
    let (cubes, units) = grid(client, lists * packed_rows);
    // SAFETY: the plan is the problem's, and has room for every packed row in each list; each unit checks its place.
    unsafe {
        mark_kernel::launch_unchecked(
            client,
            cubes,
            units,
            words(rows),
            words(list_counts),
            words(marks.handle()),
            reach,
            lists as u32,
            packed_rows as u32,
        );
    }
    Ok(marks)
}

/// Of a batch or one sequence.
fn attend_one(
    client: &Client,
    inputs: &LinearInputs<'_>,
    geometry: &Geometry,
    blueprint: Blueprint,
    marks: &Tensor<1>,
    out: &Tensor<4>,
    end: &Tensor<4>,
) {
    let Geometry { lists, chunks, features, value_dim, segments, .. } = *geometry;
    let states = Tensor::<1>::empty(client, [lists * chunks * features * value_dim], Element::F32);
    let attention = &inputs.attention;
    let cubes = |count: usize| CubeCount::Static(count as u32, 1, 1);
    let units = CubeDim::new_1d(THREADS as u32);
    let element = blueprint.operand.element();
    // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers; the geometry is that of
    // the problem or of one of its sequences, and rows and keys beyond it are neither read nor written.
    unsafe {
        sum_kernel::launch_unchecked(
            client,
            cubes(lists * chunks),
            units,
            elements(attention.key),
            elements(attention.value),
            elements(states.view()),
            strides(attention.key.strides()),
            strides(attention.value.strides()),
            numbers(geometry),
            blueprint.of_sums(),
            element.into(),
        );
    }
    portable::prefix(client, geometry, &states, inputs.state.map(State::view), end);
    if geometry.query_len == 0 {
        return;
    }
    // SAFETY: as above; outputs have memory of their own.
    unsafe {
        read_kernel::launch_unchecked(
            client,
            cubes(lists * segments),
            units,
            elements(attention.query),
            elements(attention.key),
            elements(attention.value),
            elements(states.view()),
            words(marks.handle()),
            elements(out.view()),
            strides(attention.query.strides()),
            strides(attention.key.strides()),
            strides(attention.value.strides()),
            strides(out.strides()),
            numbers(geometry),
            blueprint,
            [element.into(), out.element().into()],
        );
    }
}

fn numbers(geometry: &Geometry) -> NumbersLaunch {
    NumbersLaunch::new(
        geometry.kv_heads as u32,
        geometry.group as u32,
        geometry.query_len as u32,
        geometry.keys as u32,
        geometry.chunk as u32,
        geometry.chunks as u32,
        geometry.offset as i32,
        geometry.first_chunk as i32,
        geometry.segments as u32,
        geometry.place.first_query as u32,
        geometry.place.first_key as u32,
        geometry.place.queries as u32,
        f32::NAN,
    )
}
