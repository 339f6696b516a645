use bifocal_core::{
    DeviceProfile, Error, Problem, Reach, Refusal, Refusals, Result, Routine,
    device::{
        Inputs, Partial, Rows,
        launch::{elements, grid, words},
    },
};
use cubecl::client::Client;

use crate::{
    blueprint::{Blueprint, item_rows},
    portable::{NumbersLaunch, StridesLaunch, attend_kernel},
    visibility::Visibility,
};

/// Whether `routine` can run `problem` on a device with this profile; if not, why.
///
/// # Errors
/// The [`Refusal`] says why not.
pub fn supports(routine: Routine, problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
    match routine {
        Routine::Portable => {
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
        _ => Err(Refusal::NotImplemented),
    }
}

/// Softmax attention of `rows` over the keys that `reach` shows, with the portable routine.
///
/// The caller has chosen the routine (see
/// [`AttentionOperator::choose`](bifocal_core::device::AttentionOperator::choose)) and names itself for messages.
///
/// # Errors
/// As [`Inputs::check`] and [`Partial::check`]; [`Error::Refused`] when [`supports`] refuses;
/// [`Error::Option`] when a dispatch plan was cut for another item size than the device's.
pub fn attend(
    operator: &'static str,
    client: &Client,
    problem: &Problem,
    inputs: &Inputs<'_>,
    reach: Reach,
    rows: Rows<'_>,
    partial: &Partial,
) -> Result<Routine> {
    inputs.check(client, problem)?;
    partial.check(client, problem)?;
    let profile = DeviceProfile::of(client);
    let routine = Routine::Portable;
    supports(routine, problem, &profile)
        .map_err(|refusal| Error::Refused { operator, refusals: Refusals(vec![(routine, refusal)]) })?;
    let (visibility, window, sinks) = Visibility::of(reach, problem.key_len)
        .ok_or_else(|| Error::option("reach", reach, "a reach that this engine knows"))?;

    let routed = matches!(rows, Rows::Routed(_));
    let blueprint = Blueprint::new(problem, &profile, visibility, routed, inputs.sink_logits.is_some());
    let item_rows = item_rows(&profile);
    // Buffers that the compiled kernel does not read still have to be bound.
    let unused = inputs.query.handle();
    let lists = problem.batch * problem.kv_heads;
    let (row_list, items, item_counts, reach_index, max_items) = match rows {
        Rows::All => {
            let tiles = problem.packed_rows().div_ceil(item_rows as usize);
            (unused, unused, unused, 0, lists * tiles)
        }
        Rows::Routed(routed) => {
            if routed.item_rows != item_rows {
                let expected = format!("{item_rows} (what the engine computes at once on this device)");
                return Err(Error::option("rows per item of the plan", routed.item_rows, expected));
            }
            let shape = [problem.batch, problem.kv_heads, problem.packed_rows()];
            if routed.shape != shape {
                return Err(Error::shape("the dispatch plan", format!("{shape:?}"), &routed.shape));
            }
            (routed.rows, routed.items, routed.item_counts, routed.reach, routed.max_items)
        }
    };
    if max_items as u64 > u64::from(u32::MAX) / 3 {
        let limit = u128::from(u32::MAX / 3);
        return Err(Error::TooLarge { what: "work items", size: max_items as u128, limit });
    }

    let (cubes, units) = grid(client, max_items);
    let numbers = NumbersLaunch::new(
        problem.kv_heads as u32,
        problem.group() as u32,
        problem.query_len as u32,
        problem.head_dim as u32,
        problem.value_dim as u32,
        (problem.key_len as i64 - problem.query_len as i64) as i32,
        window,
        sinks,
        max_items as u32,
        reach_index,
        lists as u32,
        problem.scale,
        problem.softcap.unwrap_or(1.0),
        f32::NEG_INFINITY,
        f32::NAN,
    );
    let types = [problem.element.into(), partial.out.element().into()];
    // SAFETY: the checks above keep every index that shapes and strides can form inside the buffers; rows and
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
                None => words(unused),
            },
            words(row_list),
            words(items),
            words(item_counts),
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
    Ok(routine)
}

fn strides(strides: [usize; 4]) -> StridesLaunch {
    StridesLaunch::new(strides[0] as u32, strides[1] as u32, strides[2] as u32)
}
