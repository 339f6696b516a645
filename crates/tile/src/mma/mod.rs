//! The routine for every NVIDIA GPU since Ampere: asynchronous copies, products of a warp, one cube per item.

pub(crate) mod backward;
mod copies;
mod kernel;
mod ptx;
mod ring;
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
    arguments::{forward_tensors, strides},
    engine::Work,
    rows::Sight,
    tensor_core::{
        self, Blueprint, Operand, Shape,
        launch::{ITEM_ROWS, aligned, inputs_aligned, numbers},
        source::{Gpu, Source, samples},
    },
};

/// What a cube may use of shared memory on every GPU that this routine takes (99 KiB on consumer cards).
const SHARED_MEMORY: usize = 99 << 10;

/// The one place where tile sizes are decided. `None` where there is no kernel for a head dim or element type.
fn blueprint(problem: &Problem, sight: Sight, sink_logits: bool, out_f32: bool) -> Option<Blueprint> {
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
    let blueprint = Blueprint::new(sight, problem.softcap.is_some(), shape, warp_rows, stages);
    Some(Blueprint { sink_logits, out_f32, ..blueprint })
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
    inputs_aligned(inputs, false)?;
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
    let blueprint = blueprint(problem, work.sight(), sink_logits, out_f32)?;
    // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers; rows and
    // items come from a plan that was built for this problem's shape and cut into items of `ITEM_ROWS`.
    unsafe {
        attend_kernel::launch_unchecked(
            client,
            CubeCount::Static(work.max_items as u32, 1, 1),
            CubeDim::new_1d(blueprint.threads()),
            forward_tensors(inputs, work),
            words(work.rows),
            words(work.items),
            words(work.item_counts),
            work.bounds(),
            elements(partial.out.view()),
            elements(partial.lse.view()),
            strides(partial.out.strides()),
            numbers(problem, work),
            blueprint,
            blueprint.elements(),
            sizes(blueprint),
        );
    }
    Some(())
}

/// The CUDA C++ of every kernel that [`samples`] asks for, with its name and architecture. Hopper has a routine of its own:
/// for it the plain routed kernels will do.
pub(crate) fn sources() -> impl Iterator<Item = (String, Source)> {
    [Gpu::A100, Gpu::H100].into_iter().flat_map(|gpu| {
        samples().filter_map(move |sample| {
            if gpu == Gpu::H100 && (sample.ragged || !sample.routed) {
                return None;
            }
            let blueprint = blueprint(&sample.problem, sample.sight(), false, false)?;
            let source: Source = Box::new(move || source::source(blueprint, gpu));
            Some((format!("mma-{}.{}", sample.name(), gpu.arch()), source))
        })
    })
}
