//! The routine for every runtime: plain vector arithmetic, one unit per tile of rows.

mod blueprint;
mod kernel;

use bifocal_core::{
    DeviceProfile, Problem, Refusal,
    device::{
        Inputs, Partial,
        launch::{elements, grid, words},
    },
};
use cubecl::client::Client;

use self::kernel::{NumbersLaunch, attend_kernel};
pub(crate) use self::{
    blueprint::{Blueprint, lanes},
    kernel::{INVALID_ROW, Strides, StridesLaunch},
};
use crate::engine::Work;

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
    // An item of a plan may be larger than what a unit computes: it then has several parts.
    let parts = work.item_rows.div_ceil(lanes);
    let (cubes, units) = grid(client, work.max_items * parts as usize);
    let numbers = NumbersLaunch::new(
        problem.kv_heads as u32,
        problem.group() as u32,
        problem.query_len as u32,
        problem.head_dim as u32,
        problem.value_dim as u32,
        (problem.key_len as i64 - problem.query_len as i64) as i32,
        work.window,
        work.sinks,
        work.max_items as u32,
        parts,
        work.reach,
        (problem.batch * problem.kv_heads) as u32,
        problem.scale,
        problem.softcap.unwrap_or(1.0),
        f32::NEG_INFINITY,
        f32::NAN,
    );
    let types = [problem.element.into(), partial.out.element().into()];
    // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers; rows and
    // items come from a plan that was built for this problem's shape.
    unsafe {
        attend_kernel::launch_unchecked(
            client,
            cubes,
            units,
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
            numbers,
            blueprint,
            types,
            blueprint.lanes,
        );
    }
}

pub(crate) fn strides(strides: [usize; 4]) -> StridesLaunch {
    StridesLaunch::new(strides[0] as u32, strides[1] as u32, strides[2] as u32)
}
