//! The backward pass, plain: one kernel for the gradients of queries, one for those of keys and values.
//!
//! With `s = scale q . k` (squashed by a softcap), `p = exp(s - lse)` and `delta = o . do`:
//! `ds = p (do . v - delta)`, `dq += scale ds k`, `dk += scale ds q`, `dv += p do` (FlashAttention-2, arXiv 2307.08691,
//! section 3.1.2). Scores are computed again in either kernel, so that every gradient has one unit that sums it, in a
//! fixed order and without atomics.

mod key;
mod parts;
mod query;

use bifocal_core::{
    DeviceProfile, Problem,
    device::{
        Before, Gradients, Inputs, Saved,
        launch::{elements, grid, words},
    },
};
use cubecl::client::Client;

use self::{key::key_kernel, query::query_kernel};
use super::{
    lanes,
    numbers::{numbers, parts as unit_parts},
};
use crate::{arguments::backward_tensors, engine::Work, rows::Sight};

/// The compile-time key of both kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Blueprint {
    pub(super) sight: Sight,
    pub(super) softcap: bool,
    /// Dims of queries and of values that private arrays have room for: all where tiles are staged, otherwise one.
    pub(super) head_room: usize,
    pub(super) value_room: usize,
    /// Rows or keys per unit, one per lane of a vector.
    pub(super) lanes: usize,
    /// A tile and its gradients are kept in private memory, and blocks that need no mask run without one; right where
    /// that is a cache and compilers are patient: on CPUs. Elsewhere a tile is read again for every block, and a block's
    /// gradients go straight to memory: private arrays of that size would end up there as well.
    pub(super) staged: bool,
    /// Keys or rows that meet a tile at once.
    pub(super) block: usize,
}

impl Blueprint {
    fn new(problem: &Problem, profile: &DeviceProfile, work: &Work<'_>) -> Self {
        let staged = profile.cpu_cores.is_some();
        Self {
            sight: work.sight(),
            softcap: problem.softcap.is_some(),
            head_room: if staged { problem.head_dim } else { 1 },
            value_room: if staged { problem.value_dim } else { 1 },
            lanes: lanes(profile) as usize,
            staged,
            block: 8,
        }
    }
}

/// Launches both kernels. Everything has been checked: `supports`, and what the engine checks.
pub(crate) fn launch(
    client: &Client,
    profile: &DeviceProfile,
    problem: &Problem,
    inputs: &Inputs<'_>,
    work: &Work<'_>,
    saved: &Saved<'_>,
    gradients: &Gradients,
) {
    let blueprint = Blueprint::new(problem, profile, work);
    let lanes = lanes(profile);
    let types = [problem.element.into(), saved.d_out.element().into()];
    let key_tiles = problem.key_len.div_ceil(lanes as usize);
    // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers; rows and
    // items come from a plan that was built for this problem's shape.
    unsafe {
        let (cubes, units) = grid(client, work.max_items * unit_parts(work, lanes) as usize);
        query_kernel::launch_unchecked(
            client,
            cubes,
            units,
            backward_tensors(inputs, saved),
            words(work.rows),
            words(work.items),
            words(work.item_counts),
            work.bounds(),
            elements(gradients.query.view()),
            numbers(problem, work, lanes),
            u32::from(gradients.query_before == Before::Anything),
            blueprint,
            types,
            blueprint.lanes,
        );
        let (cubes, units) = grid(client, problem.batch * problem.kv_heads * key_tiles);
        key_kernel::launch_unchecked(
            client,
            cubes,
            units,
            backward_tensors(inputs, saved),
            words(work.rows),
            words(work.list_counts),
            work.bounds(),
            elements(gradients.key.view()),
            elements(gradients.value.view()),
            numbers(problem, work, lanes),
            u32::from(gradients.key_before == Before::Anything),
            blueprint,
            types,
            blueprint.lanes,
        );
    }
}
