//! The routine for GPUs whose units run in planes of 32: one plane is one worker. A key lies across 2 to 32 lanes, 16
//! bytes each, so that a plane reads whole keys one beside the other, and every key that is read serves all rows of the
//! tile. Nothing is shared between planes, so there is nothing to wait for but memory, and a multiprocessor has enough
//! planes, with enough loads in flight each, to keep memory busy.

mod kernel;
#[cfg(test)]
mod tests;

use bifocal_core::{
    DeviceProfile, Problem, Refusal,
    device::launch::{elements, words},
};
use cubecl::{client::Client, prelude::*};

use self::kernel::attend_kernel;
use super::{DecodePlan, Step, pieces::Cut, strides};
use crate::{cache::width, view::CacheView};

const PLANE: u32 = DeviceProfile::PLANE;
const PLANE_UNITS: usize = PLANE as usize;

/// Planes of a cube, and cubes of a multiprocessor: as many as are there at once however many registers a unit takes.
const PLANES: usize = 4;
const CUBES: usize = 2;

/// Rows of a tile at most: queries and outputs of all of them are in registers.
const ROWS: usize = 8;

/// The compile-time key of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Blueprint {
    cut: Cut,
    routed: bool,
    softcap: bool,
    head_dim: usize,
    /// Rows of a tile, rounded up to a power of two.
    rows: usize,
    /// Elements of a key that one load takes: 16 bytes.
    width: usize,
    /// Lanes that a key lies across: a power of two, at least as many as rows.
    lanes: usize,
    /// Keys per lane whose loads are in flight together.
    loads: usize,
}

impl Blueprint {
    fn new(problem: &Problem, cut: Cut, routed: bool) -> Self {
        let (rows, width) = (tile_rows(problem).next_power_of_two(), width_of(problem));
        Self {
            cut,
            routed,
            softcap: problem.softcap.is_some(),
            head_dim: problem.head_dim,
            rows,
            width,
            lanes: lanes(problem),
            // As many products as a lane has registers for beside queries and outputs.
            loads: if rows * width >= 32 { 4 } else { 8 },
        }
    }

    /// Keys that one load of a plane brings.
    fn keys_at_once(self) -> usize {
        PLANE_UNITS / self.lanes
    }

    /// Products that a lane has a part of: one per row and load.
    fn products(self) -> usize {
        self.rows * self.loads
    }

    /// Scores that a lane holds once they are summed.
    fn scores(self) -> usize {
        (self.products() / self.lanes).max(1)
    }
}

fn width_of(problem: &Problem) -> usize {
    16 / problem.element.size()
}

/// Lanes that a key lies across.
fn lanes(problem: &Problem) -> usize {
    (problem.head_dim / width_of(problem)).next_power_of_two()
}

/// Rows of a kv head whose keys are read together.
pub(super) fn tile_rows(problem: &Problem) -> usize {
    problem.packed_rows().min(ROWS).min(lanes(problem))
}

pub(super) fn workers(multiprocessors: usize) -> usize {
    multiprocessors * CUBES * PLANES
}

/// Whether this routine can run `problem` on a device with this profile; if not, why.
pub(super) fn supports(problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
    if !profile.has_planes() {
        return Err(Refusal::Architecture { needs: "units that run in planes of 32" });
    }
    let supported = "whole loads of 16 bytes, 2 to 32 of them, values as long as keys";
    for head_dim in [problem.head_dim, problem.value_dim] {
        let loads = head_dim / width_of(problem);
        let whole = head_dim.is_multiple_of(width_of(problem)) && (2..=PLANE_UNITS).contains(&loads);
        if !whole || head_dim != problem.head_dim {
            return Err(Refusal::HeadDim { head_dim, supported });
        }
    }
    Ok(())
}

/// Whether it can read a cache that lies like this. Those of this crate do.
pub(super) fn takes(cache: &CacheView<'_>) -> Result<(), Refusal> {
    if width([cache.key, cache.value]) < 16 / cache.key.element().size() {
        let layout = "keys or values that do not begin at multiples of 16 bytes";
        return Err(Refusal::Layout { tensor: "the cache", layout });
    }
    Ok(())
}

/// Launches the kernel. Everything has been checked.
pub(super) fn launch(plan: &DecodePlan, client: &Client, cache: &CacheView<'_>, step: &Step<'_>) {
    let blueprint = Blueprint::new(&plan.problem, plan.policy.cut, step.routes.is_some());
    let cubes = plan.policy.workers.div_ceil(PLANES) as u32;
    // SAFETY: as for the portable routine.
    unsafe {
        attend_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes, 1, 1),
            CubeDim::new_1d(PLANE * PLANES as u32),
            elements(step.query),
            elements(cache.key),
            elements(cache.value),
            words(cache.tables),
            words(cache.slots),
            plan.routes(step),
            words(step.reaches.rules()),
            words(&plan.needs),
            words(&plan.starts),
            words(&plan.sums),
            words(&plan.outs),
            strides(step.query),
            plan.places(cache),
            plan.numbers(step),
            blueprint,
            plan.problem.element.into(),
            blueprint.width,
        );
    }
}
