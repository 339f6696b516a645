//! Near vision: attention over a sliding window, optionally with the first tokens of the sequence.

use bifocal_core::{Reach, Window};
use bifocal_tile::operator;

/// Softmax attention over the last [`Window::keys`] keys, the query's own included.
///
/// `out_i = sum_j softmax_j(scale q_i . k_j) v_j` over `i - n < j <= i` (AHA's local branch, arXiv 2512.22562,
/// section 3; flash-attn's `window_size = (n - 1, 0)`). With [`with_sinks`](Windowed::with_sinks), the first
/// tokens of the sequence stay visible (StreamingLLM, arXiv 2309.17453).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windowed {
    window: Window,
    sinks: u32,
}

impl Windowed {
    /// Attention over `window`.
    pub const fn new(window: Window) -> Self {
        Self { window, sinks: 0 }
    }

    /// Keeps the first `sinks` tokens of the sequence visible to every query.
    pub const fn with_sinks(self, sinks: u32) -> Self {
        Self { sinks, ..self }
    }
}

operator!(Windowed, "windowed", |this| match this.sinks {
    0 => Reach::Window(this.window),
    sinks => Reach::SinksAndWindow { sinks, window: this.window },
});
