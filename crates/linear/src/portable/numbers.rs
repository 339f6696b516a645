//! What is passed to kernels beside buffers.

use cubecl::prelude::*;

use super::geometry::Geometry;

/// Strides of a `[batch, head, token, dim]` tensor, in elements; the last is 1.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Strides {
    pub(crate) batch: u32,
    pub(crate) head: u32,
    pub(crate) token: u32,
}

pub(crate) fn strides(strides: [usize; 4]) -> StridesLaunch {
    StridesLaunch::new(strides[0] as u32, strides[1] as u32, strides[2] as u32)
}

/// Where a row begins.
#[cube]
pub(crate) fn offset(strides: &Strides, batch: u32, head: u32, token: u32) -> usize {
    (batch * strides.batch + head * strides.head + token * strides.token) as usize
}

/// The rows of one kind: queries, or keys. A row has an index, which counts keys: a key's own, and the last key that a
/// query meets through the state (negative before there is one). The query of index `i` meets the keys `j <= i`.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Side {
    /// Rows of one token and kv head: its query heads, or 1 key.
    pub(super) group: u32,
    /// Tokens that take part.
    pub(super) tokens: u32,
    /// Tokens that there are.
    pub(super) length: u32,
    /// The index of the first token.
    pub(super) offset: i32,
    /// The chunk of that index, negative before the first.
    pub(super) first_chunk: i32,
    /// Chunks from that one to the last.
    pub(super) segments: u32,
}

/// The run-time numbers of a call. Dims are here once more than in the blueprint: a compiler that knows how often a loop
/// runs unrolls it whole.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Numbers {
    /// Batch x kv heads.
    pub(super) lists: u32,
    pub(super) kv_heads: u32,
    /// Keys per chunk, and chunks.
    pub(super) chunk: u32,
    pub(super) chunks: u32,
    /// Keys that leave the window of some row.
    pub(super) keys: u32,
    pub(super) head_dim: u32,
    pub(super) value_dim: u32,
}

pub(super) fn queries(geometry: &Geometry) -> SideLaunch {
    SideLaunch::new(
        geometry.group as u32,
        geometry.query_len as u32,
        geometry.query_len as u32,
        geometry.offset as i32,
        geometry.first_chunk as i32,
        geometry.segments as u32,
    )
}

pub(super) fn keys(geometry: &Geometry) -> SideLaunch {
    SideLaunch::new(1, geometry.keys as u32, geometry.key_len as u32, 0, 0, geometry.chunks as u32)
}

pub(super) fn numbers(geometry: &Geometry) -> NumbersLaunch {
    NumbersLaunch::new(
        geometry.lists as u32,
        geometry.kv_heads as u32,
        geometry.chunk as u32,
        geometry.chunks as u32,
        geometry.keys as u32,
        geometry.head_dim as u32,
        geometry.value_dim as u32,
    )
}
