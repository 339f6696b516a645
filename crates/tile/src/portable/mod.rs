//! The routine for every runtime: plain vector arithmetic, one unit per tile of rows.

pub(crate) mod backward;
mod blueprint;
mod kernel;
mod numbers;
mod tile;

use bifocal_core::{
    DeviceProfile, Problem, Refusal,
    device::{
        Inputs, Partial,
        launch::{elements, grid, words},
    },
};
use cubecl::client::Client;

pub(crate) use self::blueprint::lanes;
use self::{
    blueprint::Blueprint,
    kernel::attend_kernel,
    numbers::{numbers, parts},
};
// As the kernels of `wgmma` know them.
pub(crate) use crate::arguments::{Strides, strides};
use crate::{arguments::forward_tensors, engine::Work};

/// Whether this routine can run `problem` on a device with this profile; if not, why.
pub(crate) fn supports(problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
    if !profile.elements.contains(&problem.element) {
        let device = profile.elements.clone();
        return Err(Refusal::Element { element: problem.element, device });
    }
    // Queries and outputs of a tile live in a unit's private memory.
    for head_dim in [problem.head_dim, problem.value_dim] {
        if !(1..=512).contains(&head_dim) {
            return Err(Refusal::HeadDim { head_dim, supported: "1 to 512" });
        }
    }
    Ok(())
}

/// Launches the kernel. Everything has been checked: [`supports`], and what the engine checks.
pub(crate) fn launch(
    client: &Client,
    profile: &DeviceProfile,
    problem: &Problem,
    inputs: &Inputs<'_>,
    work: &Work<'_>,
    partial: &Partial,
) {
    let blueprint = Blueprint::new(problem, profile, work, inputs.sink_logits.is_some());
    let lanes = lanes(profile);
    let (cubes, units) = grid(client, work.max_items * parts(work, lanes) as usize);
    let types = [problem.element.into(), partial.out.element().into()];
    // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers; rows and
    // items come from a plan that was built for this problem's shape.
    unsafe {
        attend_kernel::launch_unchecked(
            client,
            cubes,
            units,
            forward_tensors(inputs, work),
            words(work.rows),
            words(work.items),
            words(work.item_counts),
            work.bounds(),
            elements(partial.out.view()),
            elements(partial.lse.view()),
            strides(partial.out.strides()),
            numbers(problem, work, lanes),
            blueprint,
            types,
            blueprint.lanes,
        );
    }
}
