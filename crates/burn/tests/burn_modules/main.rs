//! Bifocal on Burn's devices, against Burn's own operations and the float64 oracle.

mod aha_linear;
mod cache;
mod causal;
mod common;
mod functions;
mod gradients;
mod learning;
mod modules;
mod qada;
mod rattention;
