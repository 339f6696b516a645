//! Near vision (a sliding window) and far vision (the whole context) in one lens, chosen token by token.
//!
//! Each system is a short composition of parts that know nothing of each other:
//!
//! ```text
//! hidden states -> Router -> scores, routes -> Plan (lists of rows, work items)
//!                                                |
//! query, key, value ----------> attention operators -> Partial (out + log-sum-exp) -> merged output
//! ```
//!
//! | system | router | branches | combination |
//! |---|---|---|---|
//! | [`Aha`] | [`LinearGate::aha`], token x head | [`Windowed`], [`Full`] | each row is exactly one branch |
//! | [`MultiWindow`] | [`LinearChoice`], token x head | several [`Windowed`], [`Full`] | likewise |
//! | [`L2a`] | [`LinearGate::l2a`], token | [`Windowed`]; then [`Full`] on its own projections | in series |
//! | [`Qada`] | [`MomentGate`], token x head, no weights | [`Windowed`] with sinks, then [`Far`] where routed | merged |
//! | [`Logo`] | [`LinearGate`], token | [`Windowed`], [`Full`] where routed | mixed by the gate's scores |
//! | [`Rattention`] | none | [`Windowed`]; [`LinearAttention`] beyond it | sum of two norms |
//! | [`AhaLinear`] | [`LinearGate::aha`], token x head | [`Windowed`]; [`LinearAttention`] where routed | sum of two norms |
//! | [`Switch`] | any gate, token | any two, by default those of AHA | each token is exactly one branch |
//!
//! ```
//! use bifocal::{Aha, Element, FixedRouter, Inputs, Router, Tensor, Window};
//!
//! let client = bifocal::open("cpu")?;
//! let qkv = Tensor::filled(&client, [1, 2, 100, 64], Element::F32, 0.5)?;
//! let hidden = Tensor::filled(&client, [1, 100, 32], Element::F32, 0.0)?;
//! let inputs = Inputs::new(qkv.view(), qkv.view(), qkv.view());
//! // The first head looks near, the second far; a LinearGate learns it instead.
//! let decision = FixedRouter::new(vec![0, 1], 2)?.route(&client, hidden.view())?;
//! let aha = Aha::new(Window::aha(16)?);
//! let partial = aha.attend(&client, &inputs.problem()?, &inputs, &decision.routes)?;
//! assert_eq!(partial.out.to_f32(&client)?.len(), 2 * 100 * 64);
//! # Ok::<(), bifocal::Error>(())
//! ```

mod aha;
mod aha_linear;
mod cache;
pub mod decode;
mod l2a;
mod logo;
mod multi_window;
mod qada;
mod rattention;
mod select;
mod straight_through;
mod switch;
mod tuning;

pub use aha::Aha;
pub use aha_linear::AhaLinear;
pub use cache::{KernelCache, keep_kernels, keeps_kernels, kernel_cache};
pub use l2a::L2a;
pub use logo::Logo;
pub use multi_window::MultiWindow;
pub use qada::Qada;
pub use rattention::{Rattention, RattentionGradients, RattentionInputs, RattentionOutput, RattentionStep};
pub use select::{attend_planned, attend_selected, backward_selected, plan};
pub use straight_through::{attend_every, choice_gradient, gate_gradient};
pub use switch::Switch;
pub use tuning::settle_within;

pub use bifocal_core::{
    DeviceProfile, Element, Error, FeatureMap, Problem, Reach, Refusal, Refusals, Result, Routine, Window,
    device::{
        AttentionOperator, Before, Decision, Gradients, INVALID_ROUTE, Inputs, Partial, RouteGeometry,
        RoutedRows, Router, Routes, Rows, Saved, Sequences, Summaries, Summary, Tensor, TensorView, capture,
        open, synchronise,
    },
};
pub use bifocal_dispatch::{
    HostPlan, INVALID_ROW, Plan, add_to_scores, dot_rows, gate_outputs, gate_outputs_backward, mask, merge,
    merge_routed, mix, mix_routed, select,
};
pub use bifocal_full::{Far, Full, NonCausal};
pub use bifocal_linear::{
    LeavingKey, LinearAttention, LinearInputs, NormSum, NormSumGradients, State, norm_sum, norm_sum_backward,
};
pub use bifocal_router::{
    Basis, Calibration, Covariance, FixedRouter, HostMoments, LinearChoice, LinearGate, MomentGate, Moments,
    RandomRouter, Threshold,
};
pub use bifocal_windowed::Windowed;

pub use cubecl;

/// The README's examples, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
mod readme {}

/// Those of the book's page on QAdA.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/src/systems/qada.md")]
mod qada_page {}

/// The example on the page of mixes.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/src/systems/variants.md")]
mod variants_page {}

/// The example on RATTENTION's page, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/src/systems/rattention.md")]
mod rattention_page {}
