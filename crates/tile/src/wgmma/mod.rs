//! The routine for Hopper: bulk copies, warpgroup products, cubes that stay for many items.

mod kernel;
mod products;
mod ptx;
mod source;

use bifocal_core::{
    DeviceProfile, Element, Problem, Refusal,
    device::{
        Inputs, Partial, TensorView,
        launch::{elements, words},
    },
};
use cubecl::{client::Client, ir::ElemType, prelude::*};

use self::kernel::attend_kernel;
pub use self::products::products;
use crate::{
    engine::Work,
    portable::strides,
    tensor_core::{Blueprint, NumbersLaunch, Operand, PANEL, Shape},
    visibility::Visibility,
};

/// Rows per work item: two warpgroups of 64.
pub(crate) const ITEM_ROWS: u32 = 128;

/// Keys and values up to this size are worked on all at once: the more lists there are the more evenly items are dealt
/// to the cubes. Measured on an H100: at 134 MB 5 % faster than in turns, at 268 MB 5 % slower.
const AT_ONCE_BYTES: usize = 160 << 20;

/// Beyond that, lists take turns, as many as fit the L2 cache, so that cubes that read the same keys and values at the
/// same time find them there.
const CACHE_BYTES: usize = 48 << 20;

/// The one place where tile sizes are decided. `None` where there is no kernel for a head dim or element type.
fn blueprint(
    problem: &Problem,
    visibility: Visibility,
    routed: bool,
    sink_logits: bool,
    out_f32: bool,
) -> Option<Blueprint> {
    let operand = match problem.element {
        Element::F16 => Operand::F16,
        Element::Bf16 => Operand::Bf16,
        _ => return None,
    };
    // Accumulators of scores and outputs share a thread's 255 registers; tiles share 227 KiB.
    let (keys, stages, query_stages): (usize, u32, u32) = match problem.head_dim {
        64 => (128, 4, 2),
        96 | 128 => (128, 2, 2),
        256 => (64, 2, 1),
        _ => return None,
    };
    let shape = Shape { operand, rows: ITEM_ROWS as usize, keys, dim: problem.head_dim };
    let softcap = problem.softcap.is_some();
    let ragged = false;
    Some(Blueprint { visibility, routed, ragged, softcap, sink_logits, out_f32, shape, stages, query_stages })
}

/// Whether this routine can run `problem` on a device with this profile; if not, why.
pub(crate) fn supports(problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
    if profile.cuda_arch != Some(90) {
        return Err(Refusal::Architecture { needs: "an NVIDIA GPU of compute capability 9.0 (Hopper)" });
    }
    if !matches!(problem.element, Element::F16 | Element::Bf16) {
        let device = vec![Element::F16, Element::Bf16];
        return Err(Refusal::Element { element: problem.element, device });
    }
    if blueprint(problem, Visibility::All, false, false, false).is_none() {
        return Err(Refusal::HeadDim { head_dim: problem.head_dim, supported: "64, 96, 128 or 256" });
    }
    if problem.value_dim != problem.head_dim {
        let supported = "the head dim of query and key";
        return Err(Refusal::HeadDim { head_dim: problem.value_dim, supported });
    }
    // The running maximum is kept before scaling.
    if problem.scale <= 0.0 {
        return Err(Refusal::Scale { scale: problem.scale.to_string() });
    }
    Ok(())
}

/// Whether memory is laid out as bulk copies and 16-byte accesses need it; if not, why.
pub(crate) fn takes(inputs: &Inputs<'_>, partial: &Partial) -> Result<(), Refusal> {
    aligned("query", inputs.query, false)?;
    aligned("key", inputs.key, true)?;
    aligned("value", inputs.value, true)?;
    aligned("the output", partial.out.view(), false)
}

fn aligned(tensor: &'static str, view: TensorView<'_, 4>, bulk: bool) -> Result<(), Refusal> {
    let refuse = |layout| Err(Refusal::Layout { tensor, layout });
    let per_16_bytes = 16 / view.element().size();
    for axis in 0..3 {
        if view.shape()[axis] == 1 {
            continue;
        }
        if !view.strides()[axis].is_multiple_of(per_16_bytes) {
            return refuse("a stride that is no multiple of 16 bytes");
        }
        if bulk && view.strides()[axis] == 0 {
            return refuse("a broadcast dimension");
        }
    }
    let offset = view.handle().offset_start.unwrap_or(0);
    if !offset.is_multiple_of(16) {
        return refuse("a start that is no multiple of 16 bytes");
    }
    Ok(())
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
    let lists = problem.batch * problem.kv_heads;
    // Softmax in powers of two: exp(x) = 2^(x log2 e).
    let exponent_scale = problem.softcap.unwrap_or(problem.scale) * std::f32::consts::LOG2_E;
    let numbers = NumbersLaunch::new(
        problem.kv_heads as u32,
        problem.group() as u32,
        problem.query_len as u32,
        (problem.key_len as i64 - problem.query_len as i64) as i32,
        work.window,
        work.sinks,
        work.max_items as u32,
        work.reach,
        lists as u32,
        lists_at_once(problem) as u32,
        exponent_scale,
        problem.softcap.map_or(1.0, |cap| 2.0 * std::f32::consts::LOG2_E * problem.scale / cap),
        f32::NEG_INFINITY,
        f32::NAN,
    );
    let cubes = profile.multiprocessors.min(work.max_items as u32).max(1);
    let threads = blueprint.warpgroups() * 128;
    let counter = client.create_from_slice(&[0; 4]);
    let element: ElemType = problem.element.into();
    let Shape { keys, .. } = blueprint.shape;
    // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers; rows and
    // items come from a plan that was built for this problem's shape and cut into items of `ITEM_ROWS`.
    unsafe {
        attend_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes, 1, 1),
            CubeDim::new_1d(threads),
            elements(inputs.query),
            tensor_map(inputs.key, element, blueprint),
            tensor_map(inputs.value, element, blueprint),
            elements(inputs.key),
            elements(inputs.value),
            match &inputs.sink_logits {
                Some(sinks) => elements(*sinks),
                None => words(work.items),
            },
            words(work.rows),
            words(work.items),
            words(work.item_counts),
            words(&counter),
            words(work.sequences.unwrap_or(work.items)),
            elements(partial.out.view()),
            elements(partial.lse.view()),
            strides(inputs.query.strides()),
            strides(inputs.key.strides()),
            strides(inputs.value.strides()),
            strides(partial.out.strides()),
            numbers,
            blueprint,
            [element, partial.out.element().into()],
            keys / 2,
            keys / 4,
            blueprint.shape.columns() / 2,
        );
    }
    Some(())
}

/// Lists whose items are dealt to the cubes together.
fn lists_at_once(problem: &Problem) -> usize {
    let lists = problem.batch * problem.kv_heads;
    let bytes = 2 * problem.element.size() * problem.key_len * problem.head_dim;
    if lists * bytes <= AT_ONCE_BYTES { lists } else { (CACHE_BYTES / bytes).clamp(1, lists) }
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

/// The CUDA C++ of the kernels whose name contains `part`, with their names: what a machine without a GPU can compile. One
/// kernel for every shape of tile and every visibility; softcap, sink logits and f32 outputs change little.
///
/// # Errors
/// What CubeCL's compiler has to say.
pub fn sources(part: &str) -> impl Iterator<Item = Result<(String, String), String>> + '_ {
    use Visibility::{All, Far, NonCausal, SinksAndWindow, Window};

    let at = |head_dim: usize, element: Element, visibility: Visibility, routed: bool, ragged: bool| {
        let shape = [1, 1, 128, head_dim];
        let problem = Problem::new(shape, shape, element).ok()?;
        Some(Blueprint { ragged, ..blueprint(&problem, visibility, routed, false, false)? })
    };
    let mut blueprints = Vec::new();
    for head_dim in [64, 96, 128, 256] {
        for (visibility, routed) in [(All, false), (All, true), (Window, false), (Window, true)] {
            blueprints.extend(at(head_dim, Element::Bf16, visibility, routed, false));
        }
        blueprints.extend(at(head_dim, Element::Bf16, All, false, true));
    }
    for (element, visibility) in [(Element::F16, All), (Element::Bf16, SinksAndWindow), (Element::Bf16, Far)]
    {
        blueprints.extend(at(128, element, visibility, true, false));
    }
    blueprints.extend(at(128, Element::Bf16, NonCausal, false, false));
    for visibility in [All, Window, SinksAndWindow, Far, NonCausal] {
        blueprints.extend(at(128, Element::Bf16, visibility, true, true));
    }
    let named = blueprints.into_iter().map(|blueprint| {
        let Shape { operand, dim, .. } = blueprint.shape;
        let routed = if blueprint.routed { "-routed" } else { "" };
        let ragged = if blueprint.ragged { "-ragged" } else { "" };
        let name = format!("attend-{:?}-{}-{dim}{routed}{ragged}", blueprint.visibility, operand.name());
        (name.to_lowercase(), blueprint)
    });
    named
        .filter(move |(name, _)| name.contains(part))
        .map(|(name, blueprint)| source::source(blueprint).map(|source| (name, source)))
}
