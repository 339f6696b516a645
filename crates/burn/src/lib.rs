//! Bifocal for [Burn](https://burn.dev): near vision (a sliding window) and far vision (the whole context), chosen token
//! by token, as tensor functions and as modules.
//!
//! Functions take `Tensor<4>` and return `Result`: [`attention()`], a drop-in for Burn's own, [`windowed_attention`] and
//! [`full_attention`]; over the routes of [`linear_gate`] or [`linear_choice`] [`aha_attention`],
//! [`multi_window_attention`] and [`global_attention`].
//! Modules hold the projections and the router around them: [`AhaAttention`], [`MultiWindowAttention`],
//! [`L2aAttention`].
//!
//! | Burn device | what runs | copies |
//! |---|---|---|
//! | `cpu`, `wgpu`, `cuda` (CubeCL) | Bifocal's kernels, on the tensor's own buffers | none, unless the last dimension is strided |
//! | `flex` | Bifocal's kernels on the CubeCL CPU runtime | inputs there, the output back |
//! | any other | nothing: a typed error; [`composed`] has the semantics in Burn's operations | |
//!
//! Element types are f32, f16 and bf16, where the device has them. There is no backward pass yet: tensors with autodiff
//! are a typed error ([`Error::NoBackward`]), so that no wrong gradient can arise. Take `Module::valid` of a module,
//! `Tensor::inner` of a tensor.
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

mod attention;
pub mod composed;
#[cfg(any(feature = "cpu", feature = "wgpu", feature = "cuda"))]
mod cube;
mod flex;
mod modules;
mod options;
mod place;
mod routing;

pub use attention::{
    aha_attention, attention, full_attention, global_attention, multi_window_attention, windowed_attention,
};
pub use modules::{
    AhaAttention, AhaAttentionConfig, AttentionOutput, L2aAttention, L2aAttentionConfig,
    MultiWindowAttention, MultiWindowAttentionConfig, Projections, RopeConfig,
};
pub use options::{AttentionOptions, GateOptions};
pub use routing::{Routing, linear_choice, linear_gate};

pub use bifocal::{Error, Result, Threshold, Window};
