//! The backward pass on Hopper: as `mma::backward`, one kernel for the gradients of keys and values and one for those of
//! queries, so that every gradient has one owner that sums it in a fixed order.
//!
//! A warpgroup holds 64 keys with both of their gradients, or 64 rows: scores, `V dO^T` and sums fit its registers
//! together, so that nothing is exchanged between warps. A third warpgroup fetches, as in the forward kernel.

mod key;
mod query;
mod rows;
mod source;

use bifocal_core::{
    DeviceProfile, Problem, Refusal,
    device::{
        Before, Gradients, Inputs, Saved,
        launch::{elements, words},
    },
};
use cubecl::{client::Client, ir::ElemType, prelude::*};

pub(crate) use self::source::sources;
use self::{key::key_kernel, query::query_kernel};
use super::{kernel, tensor_map};
use crate::{
    arguments::backward_tensors,
    engine::Work,
    mma,
    rows::Sight,
    tensor_core::{
        Blueprint, Operand, Shape,
        launch::{ITEM_ROWS, aligned, numbers},
    },
};

/// Both kernels of a problem.
struct Blueprints {
    /// In it the keys take the place of rows, as they do in the products: `rows` are the keys of the cube, `keys` the rows
    /// of a step.
    key: Blueprint,
    query: Blueprint,
}

/// The one place where tile sizes are decided. `None` where there is no kernel for a head dim or element type.
fn blueprints(problem: &Problem, sight: Sight) -> Option<Blueprints> {
    let operand = Operand::of(problem.element)?;
    if !matches!(problem.head_dim, 64 | 96 | 128) {
        return None;
    }
    let blueprint = |keys, stages| {
        let shape = Shape { operand, rows: ITEM_ROWS as usize, keys, dim: problem.head_dim };
        // Keys and values; queries and gradients of their outputs.
        let query_stages = 2;
        Blueprint { out_f32: true, query_stages, ..Blueprint::new(sight, false, shape, 16, stages) }
    };
    // Of 240 registers, the key kernel has 128 for sums, and 32 each for scores and products of 64 rows; the query kernel
    // has 64 for sums, and 64 each for scores and products of 128 keys.
    Some(Blueprints { key: blueprint(64, 4), query: blueprint(128, 2) })
}

/// Scores, packed weights and sums that a thread holds.
fn sizes(blueprint: Blueprint) -> [usize; 3] {
    let Shape { keys, .. } = blueprint.shape;
    [keys / 2, keys / 4, blueprint.shape.columns() / 2]
}

/// Whether this routine can run the backward pass of `problem` on a device with this profile; if not, why.
pub(crate) fn supports(problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
    super::supports(problem, profile)?;
    if problem.head_dim > 128 {
        return Err(Refusal::HeadDim { head_dim: problem.head_dim, supported: "64, 96 or 128" });
    }
    // Its derivative would have to be kept beside scores and products, for which there are no registers.
    if problem.softcap.is_some() { Err(Refusal::Softcap) } else { Ok(()) }
}

/// Whether memory is laid out as bulk copies and 16-byte accesses need it; if not, why.
pub(crate) fn takes(problem: &Problem, inputs: &Inputs<'_>, saved: &Saved<'_>) -> Result<(), Refusal> {
    mma::backward::takes(problem, inputs, saved)?;
    aligned("key", inputs.key, true)?;
    aligned("value", inputs.value, true)
}

/// Launches both kernels. Everything has been checked: [`supports`], [`takes`], and what the engine checks.
pub(crate) fn launch(
    client: &Client,
    problem: &Problem,
    inputs: &Inputs<'_>,
    work: &Work<'_>,
    saved: &Saved<'_>,
    gradients: &Gradients,
) -> Option<()> {
    let Blueprints { key, query } = blueprints(problem, work.sight())?;
    let tiles = problem.batch * problem.kv_heads * problem.key_len.div_ceil(key.shape.rows);
    let element: ElemType = problem.element.into();
    // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers; rows and
    // items come from a plan that was built for this problem's shape and cut into items of `ITEM_ROWS`.
    unsafe {
        key_kernel::launch_unchecked(
            client,
            CubeCount::Static(tiles as u32, 1, 1),
            CubeDim::new_1d(kernel::threads(key)),
            backward_tensors(inputs, saved),
            tensor_map(inputs.key, element, resident(key)),
            tensor_map(inputs.value, element, resident(key)),
            words(work.rows),
            words(work.list_counts),
            work.bounds(),
            elements(gradients.key.view()),
            elements(gradients.value.view()),
            numbers(problem, work),
            problem.scale,
            u32::from(gradients.key_before == Before::Anything),
            key,
            element,
            sizes(key),
        );
        query_kernel::launch_unchecked(
            client,
            CubeCount::Static(work.max_items as u32, 1, 1),
            CubeDim::new_1d(kernel::threads(query)),
            backward_tensors(inputs, saved),
            tensor_map(inputs.key, element, query),
            tensor_map(inputs.value, element, query),
            words(work.rows),
            words(work.items),
            words(work.item_counts),
            work.bounds(),
            elements(gradients.query.view()),
            numbers(problem, work),
            problem.scale,
            u32::from(gradients.query_before == Before::Anything),
            query,
            element,
            sizes(query),
        );
    }
    Some(())
}

/// As which a cube of the key kernel copies its own keys: all of them in one tile.
fn resident(key: Blueprint) -> Blueprint {
    Blueprint { shape: Shape { keys: key.shape.rows, ..key.shape }, ..key }
}

#[cfg(test)]
mod tests {
    use bifocal_core::Element;

    use super::*;
    use crate::visibility::Visibility;

    #[test]
    fn tiles_fit_shared_memory() {
        for (dim, ragged) in [64, 96, 128].into_iter().flat_map(|dim| [(dim, false), (dim, true)]) {
            let problem =
                Problem::new([1, 1, 1, dim], [1, 1, 1, dim], Element::F16).expect("a possible problem");
            let sight = Sight { visibility: Visibility::All, routed: true, ragged };
            let Blueprints { key, query } = blueprints(&problem, sight).expect("kernels for this head dim");
            let of_key = key.tile_bytes() + rows::noted_bytes(key);
            let of_query = query.tile_bytes() + query::noted_bytes(query);
            assert!(of_key.max(of_query) <= 227 << 10, "{key:?} {query:?}");
        }
    }
}
