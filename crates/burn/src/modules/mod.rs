//! Modules: the projections, norms, positions and routers around the tensor functions.

mod aha;
mod aha_linear;
mod causal;
mod l2a;
mod multi_window;
mod parts;
mod qada;
mod rattention;

pub use aha::{AhaAttention, AhaAttentionConfig};
pub use aha_linear::{AhaLinearAttention, AhaLinearAttentionConfig};
pub use causal::{CausalAttention, CausalAttentionConfig};
pub use l2a::{L2aAttention, L2aAttentionConfig};
pub use multi_window::{MultiWindowAttention, MultiWindowAttentionConfig};
pub use parts::{Projections, RopeConfig};
pub use qada::{QadaAttention, QadaAttentionConfig};
pub use rattention::{RattentionAttention, RattentionAttentionConfig};

use crate::Routing;
use burn::tensor::Tensor;

/// What a module's forward pass gives.
#[derive(Clone, Debug)]
pub struct AttentionOutput {
    /// `[B, T, M]`, like the hidden states that went in.
    pub output: Tensor<3>,
    /// What the router decided, for shares and regularisers.
    pub routing: Routing,
}
