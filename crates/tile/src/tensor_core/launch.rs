//! What both routines check, and hand to their kernels.

use bifocal_core::{Element, Problem, Refusal, device::Inputs};
pub(crate) use bifocal_tensor_core::aligned;

use super::NumbersLaunch;
use crate::engine::Work;

/// Rows per work item.
pub(crate) const ITEM_ROWS: u32 = 128;

/// Keys and values up to this size are worked on all at once: the more lists there are the more evenly items are dealt
/// to the cubes. Measured on an H100: at 134 MB 5 % faster than in turns, at 268 MB 5 % slower.
const AT_ONCE_BYTES: usize = 160 << 20;

/// Beyond that, lists take turns, as many as fit the L2 cache, so that cubes that read the same keys and values at the
/// same time find them there.
const CACHE_BYTES: usize = 48 << 20;

/// Whether tensor cores can run `problem`; if not, why.
pub(crate) fn supports(problem: &Problem) -> Result<(), Refusal> {
    if !matches!(problem.element, Element::F16 | Element::Bf16) {
        let device = vec![Element::F16, Element::Bf16];
        return Err(Refusal::Element { element: problem.element, device });
    }
    if !matches!(problem.head_dim, 64 | 96 | 128 | 256) {
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

/// [`aligned`], of query, key and value; the latter two are copied in bulk, or not.
pub(crate) fn inputs_aligned(inputs: &Inputs<'_>, bulk: bool) -> Result<(), Refusal> {
    aligned("query", inputs.query, false)?;
    aligned("key", inputs.key, bulk)?;
    aligned("value", inputs.value, bulk)
}

/// The run-time numbers of a problem.
pub(crate) fn numbers(problem: &Problem, work: &Work<'_>) -> NumbersLaunch {
    // Softmax in powers of two: exp(x) = 2^(x log2 e).
    let exponent_scale = problem.softcap.unwrap_or(problem.scale) * std::f32::consts::LOG2_E;
    NumbersLaunch::new(
        problem.kv_heads as u32,
        problem.group() as u32,
        problem.query_len as u32,
        (problem.key_len as i64 - problem.query_len as i64) as i32,
        work.window,
        work.sinks,
        work.max_items as u32,
        work.reach,
        (problem.batch * problem.kv_heads) as u32,
        lists_at_once(problem) as u32,
        exponent_scale,
        problem.softcap.map_or(1.0, |cap| 2.0 * std::f32::consts::LOG2_E * problem.scale / cap),
        f32::NEG_INFINITY,
        f32::NAN,
    )
}

/// Lists whose items are dealt to the cubes together.
fn lists_at_once(problem: &Problem) -> usize {
    let lists = problem.batch * problem.kv_heads;
    let bytes = 2 * problem.element.size() * problem.key_len * problem.head_dim;
    if lists * bytes <= AT_ONCE_BYTES { lists } else { (CACHE_BYTES / bytes).clamp(1, lists) }
}
