//! Routers: for every token and router head, near or far.
//!
//! [`LinearGate`] and [`LinearChoice`] learn it (AHA, L2A, multi-window AHA); [`FixedRouter`] and
//! [`RandomRouter`] are controls and static hybrids. [`MomentGate`] has no weights: it asks [`Moments`] of keys what a query
//! would miss (QAdA); a [`Calibration`] freezes what heads decide. Scores, routes and counts come out of one launch, or two where planes
//! make the product worth one of its own, after one that clears the counts, and nothing is read back. A NaN score gives
//! [`INVALID_ROUTE`](bifocal_core::device::INVALID_ROUTE).

mod assigned;
mod calibration;
mod launch;
mod linear;
mod low_rank;
mod moment_gate;
mod moments;
mod project;
mod project_mma;
mod step;

pub use assigned::{FixedRouter, RandomRouter};
pub use calibration::Calibration;
pub use linear::{LinearChoice, LinearGate, Threshold};
pub use low_rank::Basis;
pub use moment_gate::{MomentGate, sources};
pub use moments::{Covariance, HostMoments, Moments};
