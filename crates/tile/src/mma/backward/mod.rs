//! The backward pass on tensor cores: one kernel for the gradients of keys and values, one for those of queries.
//!
//! FlashAttention-2's (arXiv 2307.08691, section 3.1.2), cut in two so that every gradient has one owner that sums it
//! in a fixed order: two products more than the five that there are, and no atomics. What the sums are is in
//! `portable::backward`; rows without weights, and gradients that are not finite, are in `parts`.

pub(crate) mod key;
pub(crate) mod parts;
pub(crate) mod query;
mod source;

use bifocal_core::{
    DeviceProfile, Problem, Refusal,
    device::{
        Before, Gradients, Inputs, Saved,
        launch::{elements, words},
    },
};
use cubecl::{client::Client, prelude::*};

pub(crate) use self::source::sources;
use self::{key::key_kernel, query::query_kernel};
use super::SHARED_MEMORY;
use crate::{
    arguments::backward_tensors,
    engine::Work,
    rows::Sight,
    tensor_core::{
        Blueprint, Operand, Shape,
        launch::{ITEM_ROWS, aligned, inputs_aligned, numbers},
    },
    visibility::Visibility,
};

/// What a cube may use of shared memory on an A100, and less than what it may on an H100.
pub(super) const LARGE: usize = 163 << 10;

/// Both kernels of a problem.
pub(super) struct Blueprints {
    pub(super) key: Blueprint,
    pub(super) query: Blueprint,
}

/// The one place where tile sizes are decided. `None` where there is no kernel for a head dim or element type, or no
/// room for its tiles.
pub(super) fn blueprints(problem: &Problem, sight: Sight, shared_memory: usize) -> Option<Blueprints> {
    let (operand, dim) = (Operand::of(problem.element)?, problem.head_dim);
    let large = shared_memory >= LARGE;
    let blueprint = |rows, keys, warp_rows, stages| {
        let shape = Shape { operand, rows, keys, dim };
        let blueprint = Blueprint::new(sight, problem.softcap.is_some(), shape, warp_rows, stages);
        Blueprint { out_f32: true, ..blueprint }
    };
    // Keys of a cube, rows of a step, keys of a warp. Rows are read from shared memory once per warp, keys once per
    // warp and step: the more of both the better, but sums and scores share a thread's 255 registers. Where a key is
    // seen by few rows, smaller tiles meet fewer that do not see it, and two cubes on a multiprocessor overlap their
    // first and last steps.
    let near = matches!(sight.visibility, Visibility::Window | Visibility::SinksAndWindow);
    let (keys, rows, warp_keys) = match dim {
        64 => (64, 64, 32),
        96 | 128 if large && !near => (128, 64, 32),
        96 | 128 => (64, 32, 32),
        256 if large => (64, 32, 16),
        _ => return None,
    };
    // Keys of a tile, rows of a warp, tiles in the ring. Two cubes share the 164 KiB of an A100's multiprocessor.
    let (tile, warp_rows, stages) = match dim {
        64 => (32, 32, 4),
        96 | 128 if large && shared_memory < 2 * SHARED_MEMORY => (32, 32, 2),
        96 | 128 => (32, 32, 3),
        _ => (32, 16, 2),
    };
    let item = ITEM_ROWS as usize;
    Some(Blueprints {
        key: blueprint(keys, rows, warp_keys, 2),
        query: blueprint(item, tile, warp_rows, stages),
    })
}

/// Scores, packed weights and sums that a thread holds.
fn sizes(blueprint: Blueprint) -> [usize; 3] {
    let blocks = blueprint.blocks();
    let scores = blocks * blueprint.shape.keys / 2;
    [scores, scores / 2, blocks * blueprint.shape.columns() / 2]
}

/// Whether this routine can run the backward pass of `problem` on a device with this profile; if not, why.
pub(crate) fn supports(problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
    super::supports(problem, profile)?;
    if problem.head_dim > 128 && profile.shared_memory < LARGE {
        let supported = "64, 96 or 128 where a cube has less than 163 KiB of shared memory";
        return Err(Refusal::HeadDim { head_dim: problem.head_dim, supported });
    }
    Ok(())
}

/// Whether memory is laid out as 16-byte accesses need it; if not, why.
pub(crate) fn takes(problem: &Problem, inputs: &Inputs<'_>, saved: &Saved<'_>) -> Result<(), Refusal> {
    inputs_aligned(inputs, false)?;
    let tensor = "the gradient of the output";
    if saved.d_out.element() != problem.element {
        return Err(Refusal::Layout { tensor, layout: "another element type than the inputs" });
    }
    aligned(tensor, saved.d_out, false)
}

/// Launches both kernels. Everything has been checked: [`supports`], [`takes`], and what the engine checks.
pub(crate) fn launch(
    client: &Client,
    profile: &DeviceProfile,
    problem: &Problem,
    inputs: &Inputs<'_>,
    work: &Work<'_>,
    saved: &Saved<'_>,
    gradients: &Gradients,
) -> Option<()> {
    let Blueprints { key, query } = blueprints(problem, work.sight(), profile.shared_memory)?;
    let tiles = problem.batch * problem.kv_heads * problem.key_len.div_ceil(key.shape.rows);
    // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers; rows and
    // items come from a plan that was built for this problem's shape and cut into items of `ITEM_ROWS`.
    unsafe {
        key_kernel::launch_unchecked(
            client,
            CubeCount::Static(tiles as u32, 1, 1),
            CubeDim::new_1d(key::threads(key)),
            backward_tensors(inputs, saved),
            words(work.rows),
            words(work.list_counts),
            work.bounds(),
            elements(gradients.key.view()),
            elements(gradients.value.view()),
            numbers(problem, work),
            problem.scale,
            u32::from(gradients.key_before == Before::Anything),
            key,
            problem.element.into(),
            sizes(key),
        );
        query_kernel::launch_unchecked(
            client,
            CubeCount::Static(work.max_items as u32, 1, 1),
            CubeDim::new_1d(query.threads()),
            backward_tensors(inputs, saved),
            words(work.rows),
            words(work.items),
            words(work.item_counts),
            work.bounds(),
            elements(gradients.query.view()),
            numbers(problem, work),
            problem.scale,
            u32::from(gradients.query_before == Before::Anything),
            query,
            problem.element.into(),
            sizes(query),
        );
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use bifocal_core::Element;

    use super::*;

    #[test]
    fn tiles_fit_shared_memory() {
        for (dim, ragged) in [64, 96, 128, 256].into_iter().flat_map(|dim| [(dim, false), (dim, true)]) {
            let problem =
                Problem::new([1, 1, 1, dim], [1, 1, 1, dim], Element::F16).expect("a possible problem");
            for shared_memory in [SHARED_MEMORY, LARGE, 227 << 10] {
                let sight = Sight { visibility: Visibility::All, routed: true, ragged };
                let Some(Blueprints { key, query }) = blueprints(&problem, sight, shared_memory) else {
                    assert!(dim == 256 && shared_memory == SHARED_MEMORY, "no kernel for head dim {dim}");
                    continue;
                };
                assert!(key.key_room() as usize <= shared_memory, "{key:?}");
                let noted = query.shape.rows * if ragged { 12 } else { 8 };
                let room = query.query_room() as usize + noted;
                assert!(room <= shared_memory, "{query:?}");
                // 1 KiB per cube is the system's.
                if shared_memory == LARGE && dim < 256 && !ragged {
                    assert!(2 * (room + 1024) <= 164 << 10, "one cube per multiprocessor: {query:?}");
                }
            }
        }
    }
}
