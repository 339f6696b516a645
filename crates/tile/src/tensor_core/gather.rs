//! Query rows, gathered by index ahead of their use.

use cubecl::prelude::*;

use super::{
    Blueprint, Numbers, SWIZZLE,
    items::{Item, row_at},
    ptx,
};
use crate::portable::{INVALID_ROW, Strides};

/// The rows of an item that a thread asks for ahead of their use: the one whose query it gathers, the first and the
/// last.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct RowIds {
    pub(crate) mine: u32,
    pub(crate) first: u32,
    pub(crate) last: u32,
}

#[cube]
impl RowIds {
    pub(crate) fn of(
        item: &Item,
        rows: &[u32],
        numbers: &Numbers,
        #[comptime] blueprint: Blueprint,
    ) -> RowIds {
        // Two threads to a row.
        let mine = row_at(item, UNIT_POS / 2u32, rows, numbers, blueprint);
        let first = row_at(item, 0u32, rows, numbers, blueprint);
        let last = row_at(item, item.rows, rows, numbers, blueprint);
        RowIds { mine, first, last }
    }
}

/// Starts the copies of these four warps' 64 rows of an item into a buffer of queries at `query_room`, in panels of the
/// 128-byte swizzle, and notes which rows they are. The copies are waited for where the item begins.
#[cube]
pub(crate) fn gather(
    item: &Item,
    id: u32,
    source: u64,
    row_ids: &mut [u32],
    buffer: u32,
    query_strides: &Strides,
    query_room: u32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    // Of the two threads of a row each takes every other 16 bytes.
    let chunks = comptime![blueprint.shape.dim / 8];
    let row_in_tile = UNIT_POS / 2u32;
    let half = UNIT_POS % 2u32;
    if half == 0u32 {
        row_ids[(buffer * comptime![blueprint.shape.rows as u32] + row_in_tile) as usize] = id;
    }
    let row = id % INVALID_ROW;
    let head = item.list % numbers.kv_heads * numbers.group + row % numbers.group;
    let offset = item.list / numbers.kv_heads * query_strides.batch
        + head * query_strides.head
        + row / numbers.group * query_strides.token;
    let from = source + offset as u64 * 2u64 + (half * 16u32) as u64;
    let to = query_room
        + buffer * comptime![blueprint.query_bytes() as u32]
        + row_in_tile * comptime![SWIZZLE as u32];
    #[unroll]
    for chunk in 0..comptime![chunks / 2] {
        let column = comptime![chunk as u32 * 2] + half;
        let panel = comptime![(chunk * 2 / 8 * blueprint.shape.rows * SWIZZLE) as u32];
        ptx::copy_16(to + panel + swizzled(row_in_tile, column), from + comptime![chunk as u64 * 32]);
    }
}

/// Where in its 128 bytes of a panel a row has the 16 bytes of a column (counted in 16 bytes): the 128-byte swizzle,
/// which keeps the same column of eight rows in different banks.
#[cube]
pub(crate) fn swizzled(row: u32, column: u32) -> u32 {
    ((column % 8u32) ^ (row % 8u32)) * 16u32
}
