//! The words that every Bifocal crate shares, and nothing that computes.
//!
//! The data's way through the house is the way through the crates: hidden states go through a
//! [`Router`](device::Router), whose [`Routes`](device::Routes) become a dispatch plan, whose rows the
//! [`AttentionOperator`](device::AttentionOperator)s turn into [`Partial`](device::Partial) results that are
//! combined into the merged output.
//!
//! Without the default feature `device` the crate holds only the vocabulary ([`Problem`], [`Window`],
//! [`Reach`], [`Element`], [`Error`]) and depends on no GPU code: that is what the float64 oracle builds on.

mod element;
mod error;
mod feature_map;
mod problem;
mod profile;
mod reach;
mod routine;
mod window;

#[cfg(feature = "device")]
pub mod device;

pub use element::Element;
pub use error::{Error, Result};
pub use feature_map::FeatureMap;
pub use problem::Problem;
pub use profile::DeviceProfile;
pub use reach::Reach;
pub use routine::{Refusal, Refusals, Routine};
pub use window::Window;
