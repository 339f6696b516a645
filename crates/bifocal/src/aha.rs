use bifocal_core::{Window, device::AttentionOperator};
use bifocal_full::Full;
use bifocal_windowed::Windowed;

use crate::select::selecting;

/// All-or-Here Attention (arXiv 2512.22562): `o = g a_full + (1 - g) a_window` with a gate g of 0 or 1
/// per token and head, so each output row is exactly one of two softmaxes over shared keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aha {
    near: Windowed,
}

impl Aha {
    /// AHA with this window for tokens that stay here.
    pub const fn new(window: Window) -> Self {
        Self { near: Windowed::new(window) }
    }

    /// AHA with another near branch: a window with sink tokens, say.
    pub const fn with_near(near: Windowed) -> Self {
        Self { near }
    }

    /// The branches by reach: 0 near, 1 far.
    pub fn branches(&self) -> [&dyn AttentionOperator; 2] {
        [&self.near, &Full]
    }
}

selecting!(Aha);
