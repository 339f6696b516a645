//! Far vision: attention over the whole causal past, over the part of it that a window does not see, or over everything.

use bifocal_core::{
    DeviceProfile, Problem, Reach, Refusal, Result, Routine, Window,
    device::{AttentionOperator, Gradients, Inputs, Partial, Rows, Saved},
};
use cubecl::client::Client;

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

/// The operators differ in their name and reach alone.
macro_rules! operator {
    ($operator:ty, $name:literal, |$this:ident| $reach:expr) => {
        impl AttentionOperator for $operator {
            fn name(&self) -> &'static str {
                $name
            }

            fn reach(&self) -> Reach {
                let $this = self;
                $reach
            }

            fn supports(
                &self,
                routine: Routine,
                problem: &Problem,
                profile: &DeviceProfile,
            ) -> Result<(), Refusal> {
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
    };
}

operator!(Full, "full", |_this| Reach::All);
operator!(NonCausal, "non-causal", |_this| Reach::NonCausal);
operator!(Far, "far", |this| Reach::Far { sinks: this.sinks, window: this.window });
