//! Near vision: attention over a sliding window, optionally with the first tokens of the sequence.

use bifocal_core::{
    DeviceProfile, Problem, Reach, Refusal, Result, Routine, Window,
    device::{AttentionOperator, Gradients, Inputs, Partial, Rows, Saved},
};
use cubecl::client::Client;

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

impl AttentionOperator for Windowed {
    fn name(&self) -> &'static str {
        "windowed"
    }

    fn reach(&self) -> Reach {
        match self.sinks {
            0 => Reach::Window(self.window),
            sinks => Reach::SinksAndWindow { sinks, window: self.window },
        }
    }

    fn supports(&self, routine: Routine, problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
        bifocal_tile::supports(routine, problem, profile)
    }

    fn attend(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        rows: Rows<'_>,
        partial: &Partial,
    ) -> Result<Routine> {
        bifocal_tile::attend(self.name(), client, problem, inputs, self.reach(), rows, partial)
    }

    fn supports_backward(
        &self,
        routine: Routine,
        problem: &Problem,
        profile: &DeviceProfile,
    ) -> Result<(), Refusal> {
        bifocal_tile::supports_backward(routine, problem, profile)
    }

    fn backward(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        rows: Rows<'_>,
        saved: &Saved<'_>,
        gradients: &Gradients,
    ) -> Result<Routine> {
        let (name, reach) = (self.name(), self.reach());
        bifocal_tile::backward(name, client, problem, inputs, reach, rows, saved, gradients)
    }
}
