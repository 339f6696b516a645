//! The online-softmax tile engine: one kernel per routine, specialised at compile time by what a row may see
//! ([`Reach`](bifocal_core::Reach)) and by how rows are found (all of them, or those of a dispatch plan).
//!
//! `bifocal-windowed` and `bifocal-full` are thin choices over [`attend`]. A routine is a folder: its blueprint says
//! which tile a problem gets, and is data; its kernel says how a tile is computed, and is mechanism. What the routines on
//! tensor cores share is in `tensor_core`.

mod engine;
mod portable;
mod tensor_core;
mod visibility;
mod wgmma;

pub use engine::{attend, item_rows, supports};
pub use wgmma::{products, sources};
