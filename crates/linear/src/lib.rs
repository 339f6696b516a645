//! Far vision in constant memory: residual linear attention (RATTENTION, arXiv 2506.15545).
//!
//! A softmax branch sees a window; [`LinearAttention`] has every key that left it, summed up in a [`State`] whose size does
//! not grow with the context. It is a branch of its own kind and no
//! [`AttentionOperator`](bifocal_core::device::AttentionOperator): it has no log-sum-exp to be merged by, and it has a state
//! that comes in and goes out. [`norm_sum`] adds the two branches, each normed per head.

mod attention;
mod inputs;
mod mma;
mod norm_sum;
mod portable;
mod state;

pub use attention::LinearAttention;
pub use inputs::{LeavingKey, LinearInputs};
pub use mma::sources;
pub use norm_sum::{NormSum, NormSumGradients, norm_sum, norm_sum_backward};
pub use state::State;
