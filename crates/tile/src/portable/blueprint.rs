use bifocal_core::{DeviceProfile, Problem};

use crate::{engine::Work, rows::Sight};

/// The compile-time key of a portable kernel: everything its code depends on, and nothing else.
///
/// This is the one place where tile sizes are decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Blueprint {
    pub(crate) sight: Sight,
    pub(crate) softcap: bool,
    pub(crate) sink_logits: bool,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
    /// Rows per unit, one per lane of a vector.
    pub(crate) lanes: usize,
    /// Queries and weights are staged in arrays in private memory, and chunks that need no mask run without one. Right
    /// where private memory is a cache and compilers are patient: on CPUs.
    pub(crate) staged: bool,
    /// Keys between two updates of the running maximum: a multiple of `key_block`, and one such where nothing is
    /// staged.
    pub(crate) chunk: usize,
    /// Keys whose scores are accumulated side by side.
    pub(crate) key_block: usize,
    /// Value dimensions that are accumulated side by side.
    pub(crate) dim_block: usize,
}

/// Rows that a unit computes at once.
///
/// On a CPU a row is a lane of the widest vector register. On a GPU, where every unit already is a lane, four
/// rows per unit share each key and value that is loaded and still fit the registers.
pub(crate) fn lanes(profile: &DeviceProfile) -> u32 {
    match profile.cpu_cores {
        Some(_) => (profile.vector_bits / 32).clamp(4, 16),
        None => 4,
    }
}

impl Blueprint {
    pub(crate) fn new(
        problem: &Problem,
        profile: &DeviceProfile,
        work: &Work<'_>,
        sink_logits: bool,
    ) -> Self {
        let staged = profile.cpu_cores.is_some();
        // Eight accumulators in flight hide the latency of a fused multiply-add.
        let key_block = 8;
        Self {
            sight: work.sight(),
            softcap: problem.softcap.is_some(),
            sink_logits,
            head_dim: problem.head_dim,
            value_dim: problem.value_dim,
            lanes: lanes(profile) as usize,
            staged,
            chunk: if staged { 4 * key_block } else { key_block },
            key_block,
            dim_block: largest_divisor(problem.value_dim, 8),
        }
    }
}

/// The largest power of two up to `most` that divides `n`.
fn largest_divisor(n: usize, most: usize) -> usize {
    (1 << n.trailing_zeros()).min(most)
}
