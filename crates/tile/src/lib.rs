//! The online-softmax tile engine: one kernel per routine, specialised at compile time by what a row may see
//! ([`Reach`](bifocal_core::Reach)) and by how rows are found (all of them, or those of a dispatch plan).
//!
//! `bifocal-windowed` and `bifocal-full` are thin choices over [`attend`] and [`backward`], made by [`operator!`]. A routine is
//! a folder: its blueprint says which tile a problem gets, and is data; its kernel says how a tile is computed, and is
//! mechanism. What the routines on tensor cores share is in `tensor_core`.

mod arguments;
mod engine;
mod mma;
mod operator;
mod portable;
mod rows;
mod sinks;
mod tensor_core;
mod visibility;
mod wgmma;

pub use engine::{attend, backward, item_rows, supports, supports_backward};
pub use wgmma::products;

/// The CUDA C++ of the tensor-core kernels whose name contains `part`, with their names (`KERNEL.ARCHITECTURE`): what a
/// machine without a GPU can compile.
///
/// # Errors
/// What CubeCL's compiler has to say.
pub fn sources(part: &str) -> impl Iterator<Item = Result<(String, String), String>> + '_ {
    let forward = wgmma::sources().chain(mma::sources());
    let all = forward.chain(wgmma::backward::sources()).chain(mma::backward::sources());
    let asked_for = all.filter(move |(name, _)| name.contains(part));
    asked_for.map(|(name, source)| source().map(|source| (name, source)))
}
