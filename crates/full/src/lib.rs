//! Far vision: attention over the whole causal past, over the part of it that a window does not see, or over everything.

use bifocal_core::{Reach, Window};
use bifocal_tile::operator;

/// Softmax attention over every key up to the query's own.
///
/// `out_i = sum_j softmax_j(scale q_i . k_j) v_j` over `j <= i` (Vaswani et al., arXiv 1706.03762, section 3.2.1,
/// with a causal mask). The branch that AHA and L2A route tokens to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Full;

/// Softmax attention of every query over every key, whatever their positions: no causal mask.
///
/// `out_i = sum_j softmax_j(scale q_i . k_j) v_j` over all `j` (Vaswani et al., arXiv 1706.03762, section 3.2.1).
/// Cross-attention and encoders; `is_causal=False` of torch SDPA, `causal=False` of flash-attn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NonCausal;

/// Softmax attention over the keys that a window, and sink tokens beside it, leave out: `sinks <= j <= i - n`.
///
/// Merged with the window's partial by log-sum-exp it is full attention (QAdA's far branch, arXiv 2502.09647).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Far {
    window: Window,
    sinks: u32,
}

impl Far {
    /// Everything beyond `window`.
    pub const fn beyond(window: Window) -> Self {
        Self { window, sinks: 0 }
    }

    /// Leaves out the first `sinks` tokens too, which the near branch sees.
    pub const fn with_sinks(self, sinks: u32) -> Self {
        Self { sinks, ..self }
    }
}

operator!(Full, "full", |_this| Reach::All);
operator!(NonCausal, "non-causal", |_this| Reach::NonCausal);
operator!(Far, "far", |this| Reach::Far { sinks: this.sinks, window: this.window });
