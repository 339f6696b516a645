use bifocal_core::{DeviceProfile, Problem};

use crate::visibility::Visibility;

/// The compile-time key of a portable kernel: everything its code depends on, and nothing else.
///
/// This is the one place where tile sizes are decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Blueprint {
    pub(crate) visibility: Visibility,
    /// Rows come from a dispatch plan rather than from counting.
    pub(crate) routed: bool,
    pub(crate) softcap: bool,
    pub(crate) sink_logits: bool,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
    /// Rows per unit, one per lane of a vector.
    pub(crate) lanes: usize,
    /// Keys between two updates of the running maximum.
    pub(crate) chunk: usize,
    /// Keys whose scores are accumulated side by side.
    pub(crate) key_block: usize,
    /// Value dimensions that are accumulated side by side.
    pub(crate) dim_block: usize,
}

/// Rows per work item on a device: what a dispatch plan cuts its lists into.
///
/// On a CPU a row is a lane of the widest vector register. On a GPU, where every unit already is a lane, four
/// rows per unit share each key and value that is loaded and still fit the registers.
pub fn item_rows(profile: &DeviceProfile) -> u32 {
    match profile.cpu_cores {
        Some(_) => (profile.vector_bits / 32).clamp(4, 16),
        None => 4,
    }
}

impl Blueprint {
    pub(crate) fn new(
        problem: &Problem,
        profile: &DeviceProfile,
        visibility: Visibility,
        routed: bool,
        sink_logits: bool,
    ) -> Self {
        // Eight accumulators in flight hide the latency of a fused multiply-add; on a GPU other units do.
        let block = if profile.cpu_cores.is_some() { 8 } else { 4 };
        Self {
            visibility,
            routed,
            softcap: problem.softcap.is_some(),
            sink_logits,
            head_dim: problem.head_dim,
            value_dim: problem.value_dim,
            lanes: item_rows(profile) as usize,
            chunk: 32,
            key_block: block,
            dim_block: largest_divisor(problem.value_dim, block),
        }
    }
}

/// The largest power of two up to `most` that divides `n`.
fn largest_divisor(n: usize, most: usize) -> usize {
    (1 << n.trailing_zeros()).min(most)
}
