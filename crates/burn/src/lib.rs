//! Bifocal for [Burn](https://burn.dev): near vision (a sliding window) and far vision (the whole context), chosen token
//! by token, as tensor functions and as modules.
//!
//! Functions take `Tensor<4>` and return `Result`: [`attention()`], a drop-in for Burn's own, [`windowed_attention`] and
//! [`full_attention`]; over the routes of [`linear_gate`] or [`linear_choice`] [`aha_attention`],
//! [`multi_window_attention`], [`global_attention`] and [`aha_linear_attention`]; and [`qada_attention`], whose gate has
//! nothing to learn. [`route`] and [`selected_attention`] take routers and branches of your own.
//! Modules hold the projections and the router around them: [`AhaAttention`], [`MultiWindowAttention`],
//! [`L2aAttention`], [`AhaLinearAttention`]; [`QadaAttention`] routes without one, and [`RattentionAttention`], out of
//! [`linear_attention`] and [`norm_sum`], and [`CausalAttention`] not at all. Each makes a [`LayerCache`], and goes on from it
//! token by token.
//!
//! | Burn device | what runs | copies |
//! |---|---|---|
//! | `cpu`, `wgpu`, `cuda` (CubeCL) | Bifocal's kernels, on the tensor's own buffers | none, unless the last dimension is strided |
//! | `flex` | Bifocal's kernels on the CubeCL CPU runtime | inputs there, the output back |
//! | any other | nothing: a typed error; [`composed`] has the semantics in Burn's operations | |
//!
//! Element types are f32, f16 and bf16, where the device has them.
//!
//! # Training
//! On a device with autodiff all of this has gradients: queries, keys, values, sink logits and, by the straight-through
//! estimator, what routers read ([`Training`] says which branches are computed for that). Backward passes run on
//! Bifocal's kernels too, keep what grows with the tokens and not with their square, and give the same bits in two runs.
//! Whether a device can run one is asked in the forward pass, where an error can still be returned: Burn's `backward`
//! returns none, so there only a failing runtime is left to panic about.
//!
//! Routers are kept from looking far everywhere by a penalty on their scores: [`mean_penalty`], [`squared_penalty`],
//! [`cost_penalty`].
//!
//! ```
//! use bifocal_burn::{AhaAttentionConfig, mean_penalty};
//! use burn::tensor::{Device, Distribution, Tensor};
//!
//! let device = Device::flex().autodiff();
//! let attention = AhaAttentionConfig::new(32, 4, 8).init(&device)?;
//! let hidden = Tensor::<3>::random([1, 20, 32], Distribution::Default, &device);
//! let forward = attention.forward(hidden)?;
//! let loss = forward.output.powi_scalar(2).mean() + mean_penalty(&forward.routing)?.mul_scalar(3e-4);
//! let gradients = loss.backward();
//! assert!(attention.router.weight.val().grad(&gradients).is_some());
//! # Ok::<(), bifocal_burn::Error>(())
//! ```
//!
//! # Functions
//!
//! ```
//! use bifocal_burn::{AttentionOptions, GateOptions, Window, aha_attention, linear_gate};
//! use burn::tensor::{Device, Distribution, Tensor};
//!
//! let device = Device::flex();
//! let random = |shape: [usize; 4]| Tensor::<4>::random(shape, Distribution::Default, &device);
//! let (query, key, value) =
//!     (random([1, 4, 50, 16]), random([1, 2, 50, 16]), random([1, 2, 50, 16]));
//! let hidden = Tensor::<3>::random([1, 50, 32], Distribution::Default, &device);
//! let weight = Tensor::<2>::random([32, 4], Distribution::Normal(0.0, 1.0), &device);
//!
//! let routing = linear_gate(hidden, weight, None, GateOptions::aha())?;
//! let window = Window::aha(8)?;
//! let out = aha_attention(query, key, value, &routing, window, &AttentionOptions::default())?;
//! assert_eq!(out.dims(), [1, 4, 50, 16]);
//! assert_eq!(routing.far_share()?.len(), 4);
//! # Ok::<(), bifocal_burn::Error>(())
//! ```

mod aha_linear;
mod attention;
mod autodiff;
mod cache;
pub mod composed;
#[cfg(any(feature = "cpu", feature = "wgpu", feature = "cuda"))]
mod cube;
mod flex;
mod linear;
mod modules;
mod options;
mod penalty;
mod place;
mod qada;
mod routing;
mod straight_through;
mod system;

pub use aha_linear::{AhaLinearInputs, aha_linear_attention};
pub use attention::{
    aha_attention, attention, full_attention, global_attention, multi_window_attention, selected_attention,
    windowed_attention,
};
pub use cache::LayerCache;
pub use linear::{linear_attention, linear_attention_with, norm_sum};
pub use modules::{
    AhaAttention, AhaAttentionConfig, AhaLinearAttention, AhaLinearAttentionConfig, AttentionOutput,
    CausalAttention, CausalAttentionConfig, L2aAttention, L2aAttentionConfig, MultiWindowAttention,
    MultiWindowAttentionConfig, Projections, QadaAttention, QadaAttentionConfig, RattentionAttention,
    RattentionAttentionConfig, RopeConfig,
};
pub use options::{AttentionOptions, GateOptions, Training};
pub use penalty::{cost_penalty, mean_penalty, squared_penalty};
pub use qada::qada_attention;
pub use routing::{Routing, linear_choice, linear_gate, route};
pub use system::Branch;

pub use bifocal::{Covariance, Error, FeatureMap, MomentGate, Reach, Result, Threshold, Window};
