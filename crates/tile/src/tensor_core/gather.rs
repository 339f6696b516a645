//! Query rows, gathered by index ahead of their use.

use cubecl::prelude::*;

use super::{
    Blueprint, Numbers, SWIZZLE,
    items::{Item, bounds_of_row, row_at},
    ptx,
};
use crate::{portable::Strides, rows::INVALID_ROW};

/// The rows of an item that a thread asks for ahead of their use: one of its own, whose query it gathers, the first and the
/// last.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct RowIds {
    pub(crate) mine: u32,
    pub(crate) first: u32,
    pub(crate) last: u32,
    /// Read in ragged batches alone: one of the two bounds of `mine`, what the item's keys follow from.
    pub(crate) bound: i32,
    pub(crate) first_key: i32,
    pub(crate) first_position: i32,
    pub(crate) last_position: i32,
}

#[cube]
impl RowIds {
    pub(crate) fn of(
        item: &Item,
        entry: u32,
        rows: &[u32],
        sequences: &[u32],
        numbers: &Numbers,
        #[comptime] blueprint: Blueprint,
    ) -> RowIds {
        let mine = row_at(item, entry, rows, numbers, blueprint);
        let first = row_at(item, 0u32, rows, numbers, blueprint);
        let last = row_at(item, item.rows, rows, numbers, blueprint);
        let mut bound = 0i32;
        let mut first_key = 0i32;
        let mut first_position = 0i32;
        let mut last_position = 0i32;
        if comptime![blueprint.ragged] {
            let of_mine = bounds_of_row(mine, sequences, numbers, blueprint);
            let of_first = bounds_of_row(first, sequences, numbers, blueprint);
            let of_last = bounds_of_row(last, sequences, numbers, blueprint);
            bound = select(UNIT_POS % 2u32 == 0u32, of_mine.first, of_mine.position);
            first_key = of_first.first;
            first_position = of_first.position;
            last_position = of_last.position;
        }
        RowIds { mine, first, last, bound, first_key, first_position, last_position }
    }
}

/// Starts the copies of these four warps' 64 rows of an item into a buffer of queries at `query_room`, in panels of the
/// 128-byte swizzle, and notes which rows they are. The copies are waited for where the item begins.
#[cube]
pub(crate) fn gather(
    item: &Item,
    ids: &RowIds,
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
    let id = ids.mine;
    let entry = buffer * comptime![blueprint.shape.rows as u32] + row_in_tile;
    if half == 0u32 {
        row_ids[entry as usize] = id;
    }
    if comptime![blueprint.ragged] {
        let column = (half + 1u32) * comptime![blueprint.staged_rows() as u32];
        row_ids[(column + entry) as usize] = u32::reinterpret(ids.bound);
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
