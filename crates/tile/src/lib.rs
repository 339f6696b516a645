//! The online-softmax tile engine: one kernel per routine, specialised at compile time by what a row may see
//! ([`Reach`](bifocal_core::Reach)) and by how rows are found (all of them, or those of a dispatch plan).
//!
//! `bifocal-windowed` and `bifocal-full` are thin choices over [`attend`]. Which tile a device gets is data, in
//! [`Blueprint`]; how a tile is computed is mechanism, in the routine's module.

mod blueprint;
mod engine;
mod portable;
mod visibility;

pub use blueprint::{Blueprint, item_rows};
pub use engine::{attend, supports};
