//! The routine for Hopper: bulk copies, warpgroup products, cubes that stay for many items.

pub(crate) mod backward;
mod copies;
mod kernel;
mod products;
mod ptx;
mod source;

use bifocal_core::{
    DeviceProfile, Element, Problem, Refusal,
    device::{
        Inputs, Partial, RoutedRows, TensorView,
        launch::{elements, words},
    },
};
use cubecl::{client::Client, ir::ElemType, prelude::*};

use self::kernel::{attend_kernel, parts, tickets};
pub use self::products::products;
use crate::{
    arguments::strides,
    engine::Work,
    rows::Sight,
    tensor_core::{
        self, Blueprint, Operand, PANEL, Shape,
        launch::{ITEM_ROWS, aligned, inputs_aligned, numbers},
        source::{Gpu, Source, samples},
    },
    visibility::Visibility,
};

/// Tiles of a slice, of 64 KB each at head dims 128 and 256: a slice of 16 lists fits the L2 cache, and adding what slices
/// have summed (about 2 us) takes little of the time that its products do (40 us).
const SLICE_TILES: u32 = 24;

/// Contexts of fewer slices than this leave items whole.
const FEWEST_SLICES: usize = 4;

/// The one place where tile sizes are decided. `None` where there is no kernel for a head dim or element type.
fn blueprint(
    problem: &Problem,
    visibility: Visibility,
    routed: bool,
    sink_logits: bool,
    out_f32: bool,
) -> Option<Blueprint> {
    let operand = Operand::of(problem.element)?;
    // Accumulators of scores and outputs share a thread's 255 registers; tiles share 227 KiB.
    let (keys, stages, query_stages): (usize, u32, u32) = match problem.head_dim {
        64 => (128, 4, 2),
        96 | 128 => (128, 2, 2),
        256 => (64, 2, 1),
        _ => return None,
    };
    let shape = Shape { operand, rows: ITEM_ROWS as usize, keys, dim: problem.head_dim };
    // Over many tiles warpgroups find their own rhythm; a window's few, and the small tiles of head dim 64, are better
    // off with turns (H100, head dim 128: 3 to 7 % at 16,384 and 32,768 tokens, -4 % for a window of 256).
    let few_tiles = matches!(visibility, Visibility::Window | Visibility::SinksAndWindow);
    let turns = few_tiles || problem.head_dim == 64;
    let sight = Sight { visibility, routed, ragged: false };
    let blueprint = Blueprint::new(sight, problem.softcap.is_some(), shape, 16, stages);
    let blueprint = Blueprint {
        sink_logits,
        out_f32,
        query_stages,
        item_stages: kernel::ITEM_STAGES,
        turns,
        ..blueprint
    };
    // All rows of a list follow one another through its keys; routed ones are few, and soon at different places. The
    // outputs of head dim 256 leave no registers to add others to.
    let sliced = routed && blueprint.in_parts() && problem.head_dim < 256;
    let slice_tiles = if sliced { SLICE_TILES } else { 0 };
    Some(Blueprint { slice_tiles, ..blueprint })
}

/// Slices of an item, at most; 1 where items are not cut in slices.
fn most_slices(problem: &Problem, work: &Work<'_>, blueprint: Blueprint) -> u32 {
    if !blueprint.in_slices() {
        return 1;
    }
    let slices = problem.key_len.div_ceil(blueprint.shape.keys * blueprint.slice_tiles as usize);
    // The kernel counts slices of items in 32 bits, and each of its cubes a little further.
    let counted = work.max_items as u128 * slices as u128 <= u128::from(u32::MAX / 2);
    if slices >= FEWEST_SLICES && counted { slices as u32 } else { 1 }
}

/// Whether this routine can run `problem` on a device with this profile; if not, why.
pub(crate) fn supports(problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
    if profile.cuda_arch != Some(90) {
        return Err(Refusal::Architecture { needs: "an NVIDIA GPU of compute capability 9.0 (Hopper)" });
    }
    tensor_core::launch::supports(problem)
}

/// Whether memory is laid out as bulk copies and 16-byte accesses need it; if not, why.
pub(crate) fn takes(inputs: &Inputs<'_>, partial: &Partial) -> Result<(), Refusal> {
    inputs_aligned(inputs, true)?;
    aligned("the output", partial.out.view(), false)
}

/// Launches the kernel. Everything has been checked: [`supports`], [`takes`], and what the engine checks.
pub(crate) fn launch(
    client: &Client,
    profile: &DeviceProfile,
    problem: &Problem,
    inputs: &Inputs<'_>,
    work: &Work<'_>,
    partial: &Partial,
) -> Option<()> {
    let out_f32 = partial.out.element() == Element::F32;
    let sink_logits = inputs.sink_logits.is_some();
    let blueprint = blueprint(problem, work.visibility, work.routed, sink_logits, out_f32)?;
    let blueprint = Blueprint { ragged: work.sequences.is_some(), ..blueprint };
    let numbers = numbers(problem, work);
    // Where there are fewer items than this, they are cut into parts.
    let most_counted = (RoutedRows::COUNTERS - tickets::PARTS as usize) / 2;
    let park_room = (2 * profile.multiprocessors as usize).min(most_counted);
    let few = work.routed || work.max_items <= park_room / 2;
    let in_parts = blueprint.in_parts() && few;
    let unused = || work.items.clone();
    let counters = match work.counters {
        Some(counters) => counters.clone(),
        None if in_parts => client.create_from_slice(&[0; RoutedRows::COUNTERS * 4]),
        None => unused(),
    };
    let parked = if in_parts {
        client.empty(park_room * parts::parked_numbers(blueprint) * blueprint.threads() as usize * 4)
    } else {
        unused()
    };
    let slots = if in_parts { work.max_items * parts::MOST as usize } else { work.max_items };
    let cubes = slots.clamp(1, profile.multiprocessors as usize) as u32;
    let element: ElemType = problem.element.into();
    let Shape { keys, .. } = blueprint.shape;
    // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers; rows and
    // items come from a plan that was built for this problem's shape and cut into items of `ITEM_ROWS`.
    unsafe {
        attend_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes, 1, 1),
            CubeDim::new_1d(kernel::threads(blueprint)),
            elements(inputs.query),
            tensor_map(inputs.key, element, blueprint),
            tensor_map(inputs.value, element, blueprint),
            elements(inputs.key),
            elements(inputs.value),
            work.sink_logits(inputs),
            words(work.rows),
            words(work.items),
            words(work.item_counts),
            words(&counters),
            words(&parked),
            work.bounds(),
            elements(partial.out.view()),
            elements(partial.lse.view()),
            strides(inputs.query.strides()),
            strides(inputs.key.strides()),
            strides(inputs.value.strides()),
            strides(partial.out.strides()),
            numbers,
            park_room as u32,
            most_slices(problem, work, blueprint),
            blueprint,
            blueprint.elements(),
            keys / 2,
            keys / 4,
            blueprint.shape.columns() / 2,
        );
    }
    Some(())
}

/// How the copy engine reads a tile: as boxes of 64 columns, all of them at once where they are whole.
///
/// # Safety
/// The view has passed its checks.
unsafe fn tensor_map(
    view: TensorView<'_, 4>,
    element: ElemType,
    blueprint: Blueprint,
) -> TensorMapArg<Tiled> {
    let keys = blueprint.shape.keys;
    let ([b, h, t, d], [by_batch, by_head, by_token, _]) = (view.shape(), view.strides());
    // A dimension of size 1 is never stepped over, but its stride has to look right.
    let stride = |size: usize, stride: usize| if size == 1 { d.next_multiple_of(8) } else { stride };
    let (by_batch, by_head, by_token) = (stride(b, by_batch), stride(h, by_head), stride(t, by_token));
    let (shape, strides, tile_size) = if blueprint.whole_panels() {
        let panels = blueprint.panels();
        (
            vec![b, h, panels, t, PANEL],
            vec![by_batch, by_head, PANEL, by_token, 1],
            vec![1, 1, panels, keys, PANEL],
        )
    } else {
        (vec![b, h, t, d], vec![by_batch, by_head, by_token, 1], vec![1, 1, keys, PANEL])
    };
    // SAFETY: the caller's.
    let tensor = unsafe {
        TensorArg::from_raw_parts(view.handle().clone(), strides.as_slice().into(), shape.as_slice().into())
    };
    TensorMapArg::new(TiledArgs { tile_size: tile_size.as_slice().into() }, tensor, element)
        .with_swizzle(TensorMapSwizzle::B128)
}

/// The CUDA C++ of every kernel that [`samples`] asks for, with its name and architecture.
pub(crate) fn sources() -> impl Iterator<Item = (String, Source)> {
    samples().filter_map(|sample| {
        let blueprint = blueprint(&sample.problem, sample.visibility, sample.routed, false, false)?;
        let blueprint = Blueprint { ragged: sample.ragged, ..blueprint };
        let source: Source = Box::new(move || source::source(blueprint));
        Some((format!("attend-{}.{}", sample.name(), Gpu::H100.arch()), source))
    })
}
