//! What is passed to kernels beside buffers.

use bifocal_core::device::{RoutedRows, Rows, launch::words};
use cubecl::{prelude::*, server::Handle};

use super::geometry::Geometry;

/// The bit of a listed row that marks it as having no valid route.
pub(crate) const INVALID_ROW: u32 = 1 << 31;

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
    /// Tokens of the sequence that take part.
    pub(super) tokens: u32,
    /// Tokens that there are, of all sequences that are packed.
    pub(super) length: u32,
    /// Which of these is the sequence's first.
    pub(super) first: u32,
    /// The index of the sequence's first token.
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
    /// The sequence's first state, among those that came in and those that are left.
    pub(super) first_state: u32,
    /// What rows without a valid route give.
    pub(super) nan: f32,
}

/// Which queries take part, where a dispatch plan says so: the rows of one reach, list by list.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Lists {
    pub(super) rows: Box<[u32]>,
    pub(super) counts: Box<[u32]>,
    pub(super) reach: u32,
}

/// The lists of `rows`; any `buffer` where all take part.
pub(super) fn lists(rows: Rows<'_>, buffer: &Handle) -> ListsLaunch {
    let (rows, counts, reach) = match rows {
        Rows::All => (buffer, buffer, 0),
        Rows::Routed(RoutedRows { rows, list_counts, reach, .. }) => (rows, list_counts, reach),
    };
    ListsLaunch::new(words(rows), words(counts), reach)
}

pub(super) fn queries(geometry: &Geometry) -> SideLaunch {
    SideLaunch::new(
        geometry.group as u32,
        geometry.query_len as u32,
        geometry.place.queries as u32,
        geometry.place.first_query as u32,
        geometry.offset as i32,
        geometry.first_chunk as i32,
        geometry.segments as u32,
    )
}

pub(super) fn keys(geometry: &Geometry) -> SideLaunch {
    let Geometry { place, keys, chunks, .. } = *geometry;
    SideLaunch::new(1, keys as u32, place.keys as u32, place.first_key as u32, 0, 0, chunks as u32)
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
        geometry.place.first_state as u32,
        f32::NAN,
    )
}
