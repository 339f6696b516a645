//! The yardstick: what every kernel of Bifocal is tested against.
//!
//! Everything here is a plain loop that reads like the formula in the paper it comes from. It is generic over
//! [`num_traits::Float`] and meant to be run in f64; nothing is fused, blocked, reordered or fast. A kernel
//! is right when it agrees with this crate within the rounding of its own precision.
//!
//! One file per topic, along the data's way: [`linear`] and [`SigmoidGate`] or [`softmax_choice`] turn hidden
//! states into routes, [`lists`] turns routes into a dispatch plan, [`attention`] computes what each reach
//! gives, [`select`], [`merge`], [`mix`] and [`mask`] combine it, and the layers ([`AhaLayer`],
//! [`MultiWindowLayer`], [`L2aLayer`], [`RattentionLayer`], [`AhaLinearLayer`]) put the parts together;
//! RATTENTION's own are [`linear_attention`] and [`norm_sum`]; [`Qada`] decides by what it remembers of keys, their [`Moments`]. The way back:
//! [`attention_backward`] for queries, keys
//! and values, [`gate_backward`] or [`choice_backward`] and then [`linear_backward`] for routers, and the penalties on
//! scores with their gradients. Step by step: [`KvModel`], a cache of keys and values.
//!
//! ```
//! use bifocal_core::{Reach, Window};
//! use bifocal_reference::{Array, Options, attention};
//!
//! let q = Array::from_fn([1, 1, 2, 1], |_| 1.0_f64);
//! let k = Array::new([1, 1, 2, 1], vec![0.0, 3.0_f64.ln()]);
//! let v = Array::new([1, 1, 2, 1], vec![10.0, 20.0]);
//! let all = attention(&q, &k, &v, Reach::All, &Options::new(1));
//! assert!((all.out[[0, 0, 1, 0]] - 17.5).abs() < 1e-12); // (1 * 10 + 3 * 20) / 4
//! assert!((all.lse[[0, 0, 1]] - 4.0_f64.ln()).abs() < 1e-12);
//!
//! let here = attention(&q, &k, &v, Reach::Window(Window::new(1)?), &Options::new(1));
//! assert_eq!(here.out[[0, 0, 1, 0]], 20.0);
//! # Ok::<(), bifocal_core::Error>(())
//! ```
//!
//! Shapes: B sequences, H query heads, Hk kv heads, T tokens (Tq queries, Tk keys), D head dim, Dv value dim,
//! M hidden dim, R router heads, K choices. This is an oracle for tests, so wrong shapes panic with a
//! message.

mod array;
mod attention;
mod backward;
mod cache;
mod combine;
mod gated_output;
mod layers;
mod linear_attention;
mod moments;
mod norm;
mod norm_sum;
mod penalty;
mod plan;
mod ragged;
mod rope;
mod router;
mod straight_through;

#[cfg(test)]
mod samples;

pub use array::Array;
pub use attention::{Options, Partial, attention, attention_where};
pub use backward::{Gradients, attention_backward, attention_backward_where};
pub use cache::KvModel;
pub use combine::{mask, merge, mix, select};
pub use gated_output::{gated_output, gated_output_backward};
pub use layers::{
    AhaLayer, AhaLinearGradients, AhaLinearLayer, L2aLayer, LayerGradients, LayerOutput, MultiWindowLayer,
    Projections, QkNorm, RattentionLayer, aha_linear, aha_linear_backward,
};
pub use linear_attention::{
    LinearAttentionGradients, LinearOptions, LinearOutput, features, features_backward, linear_attention,
    linear_attention_backward,
};
pub use moments::{Covariance, Moments, Qada, QadaOutput, low_rank, static_labels};
pub use norm::{rms_norm, rms_norm_backward};
pub use norm_sum::{norm_sum, norm_sum_backward};
pub use penalty::{cost_penalty, mean_penalty, penalty_ramp, squared_penalty};
pub use plan::{INVALID_ROW, Plan, lists};
pub use ragged::{
    ragged_attention_backward_where, ragged_attention_where, ragged_linear_attention,
    ragged_linear_attention_backward,
};
pub use rope::{rope, rope_backward};
pub use router::{
    INVALID_ROUTE, LinearGradients, SigmoidGate, linear, linear_backward, linear_choice,
    linear_choice_backward, softmax_choice, softmax_choice_backward,
};
pub use straight_through::{Training, choice_backward, gate_backward};
