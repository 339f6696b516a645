//! The routine for tensor cores: one plane is one worker, as in `planes`, and 16 keys are multiplied at a time, for up to 16
//! rows at once. Products leave it open which channel is which as long as both factors agree: lanes take 16 bytes of a key
//! or a value as they lie in memory, and queries and outputs are in the order that follows. Nothing goes through shared
//! memory, and nothing but memory is waited for.

mod kernel;
mod source;

use bifocal_core::{
    DeviceProfile, Element, Problem, Refusal,
    device::launch::{elements, words},
};
use bifocal_tensor_core::Operand;
use cubecl::{client::Client, prelude::*};

use self::kernel::attend_kernel;
pub use self::source::sources;
use super::{DecodePlan, Step, pieces::Cut, strides};
use crate::view::CacheView;

const PLANE: u32 = DeviceProfile::PLANE;

/// Planes of a cube, and cubes of a multiprocessor: as many as are there at once however many registers a unit takes.
const PLANES: usize = 4;
const CUBES: usize = 2;

/// Rows of a product, and keys that are multiplied at a time.
const ROWS: usize = 16;
const KEYS: usize = 16;

/// The compile-time key of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Blueprint {
    cut: Cut,
    routed: bool,
    softcap: bool,
    operand: Operand,
    dim: usize,
    /// Whether tiles have more rows than half a product's.
    tall: bool,
}

impl Blueprint {
    fn new(problem: &Problem, cut: Cut, routed: bool) -> Option<Self> {
        Some(Self {
            cut,
            routed,
            softcap: problem.softcap.is_some(),
            operand: Operand::of(problem.element)?,
            dim: problem.head_dim,
            tall: tile_rows(problem) > ROWS / 2,
        })
    }

    /// Loads that a key takes: 32 channels each, 16 bytes per lane.
    const fn key_loads(self) -> usize {
        self.dim / 32
    }

    /// Loads that a value takes: 64 channels each.
    const fn value_loads(self) -> usize {
        self.dim / 64
    }
}

/// Rows of a kv head whose keys are read together.
pub(super) fn tile_rows(problem: &Problem) -> usize {
    problem.packed_rows().min(ROWS)
}

pub(super) fn workers(multiprocessors: usize) -> usize {
    multiprocessors * CUBES * PLANES
}

/// Whether this routine can run `problem` on a device with this profile; if not, why.
pub(super) fn supports(problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
    if profile.cuda_arch.is_none_or(|arch| arch < 80) {
        return Err(Refusal::Architecture { needs: "an NVIDIA GPU of compute capability 8.0 or above" });
    }
    if Operand::of(problem.element).is_none() {
        let device = vec![Element::F16, Element::Bf16];
        return Err(Refusal::Element { element: problem.element, device });
    }
    for head_dim in [problem.head_dim, problem.value_dim] {
        // Outputs of wider heads do not fit into registers.
        if !matches!(head_dim, 64 | 128) || head_dim != problem.head_dim {
            return Err(Refusal::HeadDim { head_dim, supported: "64 or 128, values as long as keys" });
        }
    }
    Ok(())
}

/// Launches the kernel. Everything has been checked.
pub(super) fn launch(plan: &DecodePlan, client: &Client, cache: &CacheView<'_>, step: &Step<'_>) {
    let blueprint = Blueprint::new(&plan.problem, plan.policy.cut, step.routes.is_some());
    let blueprint = blueprint.expect("the routine supports the problem");
    let cubes = plan.policy.workers.div_ceil(PLANES) as u32;
    // SAFETY: as for the portable routine; keys and values begin at multiples of 16 bytes.
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
        );
    }
}
