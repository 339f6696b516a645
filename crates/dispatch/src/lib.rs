//! From routes to work, and from partial results to one output.
//!
//! [`Plan`] turns the routes of a router into, per reach, the ascending lists of routed rows and the work items cut
//! from them, on the device and without a read-back. [`merge`], [`mix`], [`select`] and [`mask`] combine what
//! the attention operators make of them, [`merge_routed`] and [`mix_routed`] on the rows of one reach alone;
//! [`gate_outputs`] weighs what comes out; [`dot_rows`] and [`add_to_scores`] serve the way back.

mod combine;
mod dot;
mod gate;
mod plan;

pub use combine::{mask, merge, merge_routed, mix, mix_routed, select};
pub use dot::{add_to_scores, dot_rows};
pub use gate::{gate_outputs, gate_outputs_backward};
pub use plan::{HostPlan, INVALID_ROW, Plan};
