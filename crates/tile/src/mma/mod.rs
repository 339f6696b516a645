//! The routine for every NVIDIA GPU since Ampere: asynchronous copies, products of a warp, one cube per item.

pub(crate) mod backward;
mod copies;
mod kernel;
mod ptx;
mod source;

use bifocal_core::{
    DeviceProfile, Element, Problem, Refusal,
    device::{
        Inputs, Partial,
        launch::{elements, words},
    },
};
use cubecl::{client::Client, prelude::*};

use self::kernel::attend_kernel;
use crate::{
    engine::Work,
    portable::strides,
    tensor_core::{
        self, Blueprint, Operand, Shape,
        launch::{ITEM_ROWS, aligned, numbers},
        source::{Gpu, samples},
    },
    visibility::Visibility,
};

/// What a cube may use of shared memory on every GPU that this routine takes (99 KiB on consumer cards).
const SHARED_MEMORY: usize = 99 << 10;

/// The one place where tile sizes are decided. `None` where there is no kernel for a head dim or element type.
fn blueprint(
    problem: &Problem,
    visibility: Visibility,
    routed: bool,
    sink_logits: bool,
    out_f32: bool,
) -> Option<Blueprint> {
    let operand = Operand::of(problem.element)?;
    // Keys and values are read from shared memory once per warp: the more rows it has the better, but outputs and
    // scores share a thread's 255 registers. Two cubes share the 164 KiB of an A100's multiprocessor.
    let (keys, warp_rows, stages): (usize, usize, u32) = match problem.head_dim {
        64 => (64, 32, 4),
        96 | 128 => (64, 32, 3),
        256 => (32, 16, 2),
        _ => return None,
    };
    let shape = Shape { operand, rows: ITEM_ROWS as usize, keys, dim: problem.head_dim };
    let softcap = problem.softcap.is_some();
    let query_stages = 1;
    Some(Blueprint {
        visibility,
        routed,
        ragged: false,
        softcap,
        sink_logits,
        out_f32,
        shape,
        warp_rows,
        stages,
        query_stages,
        item_stages: query_stages,
        turns: false,
        slice_tiles: 0,
    })
}

/// Scores, packed weights and outputs that a thread holds: of 16 rows, then of all rows of its warp.
fn sizes(blueprint: Blueprint) -> [usize; 6] {
    let (blocks, Shape { keys, .. }) = (blueprint.blocks(), blueprint.shape);
    let (scores, weights, outputs) = (keys / 2, keys / 4, blueprint.shape.columns() / 2);
    [scores, weights, outputs, blocks * scores, blocks * weights, blocks * outputs]
}

/// Whether this routine can run `problem` on a device with this profile; if not, why.
pub(crate) fn supports(problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
    if profile.cuda_arch.is_none_or(|arch| arch < 80) || profile.shared_memory < SHARED_MEMORY {
        return Err(Refusal::Architecture { needs: "an NVIDIA GPU of compute capability 8.0 or above" });
    }
    tensor_core::launch::supports(problem)
}

/// Whether memory is laid out as 16-byte accesses need it; if not, why.
pub(crate) fn takes(inputs: &Inputs<'_>, partial: &Partial) -> Result<(), Refusal> {
    aligned("query", inputs.query, false)?;
    aligned("key", inputs.key, false)?;
    aligned("value", inputs.value, false)?;
    aligned("the output", partial.out.view(), false)
}

/// Launches the kernel. Everything has been checked: [`supports`], [`takes`], and what the engine checks.
pub(crate) fn launch(
    client: &Client,
    problem: &Problem,
    inputs: &Inputs<'_>,
    work: &Work<'_>,
    partial: &Partial,
) -> Option<()> {
    let out_f32 = partial.out.element() == Element::F32;
    let sink_logits = inputs.sink_logits.is_some();
    let blueprint = blueprint(problem, work.visibility, work.routed, sink_logits, out_f32)?;
    let blueprint = Blueprint { ragged: work.sequences.is_some(), ..blueprint };
    let [scores, weights, outputs, warp_scores, warp_weights, warp_outputs] = sizes(blueprint);
    // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers; rows and
    // items come from a plan that was built for this problem's shape and cut into items of `ITEM_ROWS`.
    unsafe {
        attend_kernel::launch_unchecked(
            client,
            CubeCount::Static(work.max_items as u32, 1, 1),
            CubeDim::new_1d(blueprint.threads()),
            elements(inputs.query),
            elements(inputs.key),
            elements(inputs.value),
            match &inputs.sink_logits {
                Some(sinks) => elements(*sinks),
                None => words(work.items),
            },
            words(work.rows),
            words(work.items),
            words(work.item_counts),
            words(work.sequences.unwrap_or(work.items)),
            elements(partial.out.view()),
            elements(partial.lse.view()),
            strides(inputs.query.strides()),
            strides(inputs.key.strides()),
            strides(inputs.value.strides()),
            strides(partial.out.strides()),
            numbers(problem, work),
            blueprint,
            [problem.element.into(), partial.out.element().into()],
            scores,
            weights,
            outputs,
            warp_scores,
            warp_weights,
            warp_outputs,
        );
    }
    Some(())
}

/// The CUDA C++ of every kernel that [`samples`] asks for, with its name and architecture. Hopper has a routine of its own:
/// for it the plain routed kernels will do.
pub(crate) fn sources() -> impl Iterator<Item = (String, impl FnOnce() -> Result<String, String>)> {
    [Gpu::A100, Gpu::H100].into_iter().flat_map(|gpu| {
        samples().filter_map(move |sample| {
            if gpu == Gpu::H100 && (sample.ragged || !sample.routed) {
                return None;
            }
            let blueprint = blueprint(&sample.problem, sample.visibility, sample.routed, false, false)?;
            let blueprint = Blueprint { ragged: sample.ragged, ..blueprint };
            Some((format!("mma-{}.{}", sample.name(), gpu.arch()), move || source::source(blueprint, gpu)))
        })
    })
}
