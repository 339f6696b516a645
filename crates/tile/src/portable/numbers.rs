//! The numbers that portable kernels are launched with.

use bifocal_core::Problem;
use cubecl::prelude::*;

use crate::{arguments::Strides, engine::Work};

/// Where a row begins.
#[cube]
pub(super) fn offset(strides: &Strides, batch: u32, head: u32, token: u32) -> usize {
    strides.at(batch, head, token) as usize
}

/// The run-time numbers of a problem.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Numbers {
    pub(super) kv_heads: u32,
    pub(super) group: u32,
    pub(super) query_len: u32,
    /// Head and value dim, once more than in the blueprint: a compiler that knows how often a loop runs unrolls it
    /// whole, and then takes seconds.
    pub(super) head_dim: u32,
    pub(super) value_dim: u32,
    /// Position of the first query: key length - query length.
    pub(super) first_position: i32,
    pub(super) window: i32,
    pub(super) sinks: i32,
    /// Items of one reach, at most.
    pub(super) items: u32,
    /// Units that share an item.
    pub(super) parts: u32,
    /// The reach whose lists are computed.
    pub(super) reach: u32,
    /// Batch x kv heads.
    pub(super) lists: u32,
    pub(super) scale: f32,
    pub(super) softcap: f32,
    /// Not every shader language can write these two as literals.
    pub(super) neg_inf: f32,
    pub(super) nan: f32,
}

/// Units that share an item of a plan, which may be larger than what one of them computes.
pub(super) fn parts(work: &Work<'_>, lanes: u32) -> u32 {
    work.item_rows.div_ceil(lanes)
}

pub(super) fn numbers(problem: &Problem, work: &Work<'_>, lanes: u32) -> NumbersLaunch {
    NumbersLaunch::new(
        problem.kv_heads as u32,
        problem.group() as u32,
        problem.query_len as u32,
        problem.head_dim as u32,
        problem.value_dim as u32,
        (problem.key_len as i64 - problem.query_len as i64) as i32,
        work.window,
        work.sinks,
        work.max_items as u32,
        parts(work, lanes),
        work.reach,
        (problem.batch * problem.kv_heads) as u32,
        problem.scale,
        problem.softcap.unwrap_or(1.0),
        f32::NEG_INFINITY,
        f32::NAN,
    )
}
