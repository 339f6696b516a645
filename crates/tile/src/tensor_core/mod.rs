//! What the routines on tensor cores share: which rows and keys an item is, the swizzle of tiles in shared memory, the
//! online softmax of a thread's two rows, how a row is finished.
//!
//! They can share it because `wgmma` and `mma.sync` leave scores and outputs in the same places: of every 16 rows a
//! warp's thread holds two, `lane / 4` and 8 more, and of every 8 columns two, from `lane % 4 * 2` on (PTX ISA,
//! "Matrix Fragments for mma.m16n8k16" and "Register Fragments and Shared Memory Matrix Layouts").

// In a kernel `%` is one instruction and `is_multiple_of` is not there; an `if` on compile-time values stays apart from
// one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

mod blueprint;
pub(crate) mod finish;
pub(crate) mod items;
pub(crate) mod launch;
pub(crate) mod softmax;
pub(crate) mod source;

pub(crate) use bifocal_tensor_core::{Operand, PANEL, SWIZZLE, ptx, swizzled};
use cubecl::prelude::*;

pub(crate) use self::blueprint::{Blueprint, Shape};
pub(crate) use crate::arguments::Layout;

/// The run-time numbers of a problem.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Numbers {
    pub(crate) kv_heads: u32,
    pub(crate) group: u32,
    pub(crate) query_len: u32,
    /// Position of the first query: key length - query length.
    pub(crate) first_position: i32,
    pub(crate) window: i32,
    pub(crate) sinks: i32,
    /// Items of one reach, at most.
    pub(crate) items: u32,
    /// The reach whose lists are computed.
    pub(crate) reach: u32,
    /// Batch x kv heads.
    pub(crate) lists: u32,
    /// Lists whose items are taken together, before the next lists'.
    pub(crate) lists_at_once: u32,
    /// What a score is multiplied by to become an exponent of two.
    pub(crate) exponent_scale: f32,
    /// What a score is multiplied by before the softcap's tanh, to become an exponent of two: 2 log2 e scale / cap.
    pub(crate) softcap_scale: f32,
    pub(crate) neg_inf: f32,
    pub(crate) nan: f32,
}
