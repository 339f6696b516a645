//! From routes to work, and from partial results to one output.
//!
//! [`Plan`] turns the routes of a router into, per reach, the ascending lists of routed rows and the work items cut
//! from them, on the device and without a read-back. [`merge`], [`mix`], [`select`] and [`mask`] combine what
//! the attention operators make of them.

mod combine;
mod plan;

pub use combine::{mask, merge, mix, select};
pub use plan::{HostPlan, INVALID_ROW, Plan};
