//! What every kernel of a step knows: its numbers, the rows of a tile, the keys that a tile needs.

// In a kernel `%` is one instruction.
#![allow(clippy::manual_is_multiple_of)]

use cubecl::prelude::*;

use crate::view::{Places, place};

/// The run-time numbers of a step.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Numbers {
    pub(super) heads: u32,
    pub(super) group: u32,
    pub(super) query_len: u32,
    pub(super) router_heads: u32,
    pub(super) reaches: u32,
    /// Tiles per kv head.
    pub(super) tiles: u32,
    /// Rows per tile.
    pub(super) tile_rows: u32,
    /// Tiles of all kv heads of all sequences.
    pub(super) lists: u32,
    /// Keys per chunk.
    pub(super) chunk: u32,
    /// Chunks per list at most.
    pub(super) max_chunks: u32,
    /// Keys of a sequence at most.
    pub(super) most_keys: u32,
    pub(super) workers: u32,
    pub(super) head_dim: u32,
    pub(super) value_dim: u32,
    pub(super) scale: f32,
    pub(super) softcap: f32,
    /// Not every shader language can write these two as literals.
    pub(super) neg_inf: f32,
    pub(super) nan: f32,
}

/// Strides of a `[batch, head, token, dim]` tensor, in elements; the last is 1.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Strides {
    pub(super) batch: u32,
    pub(super) head: u32,
    pub(super) token: u32,
}

/// Where a row begins.
#[cube]
pub(super) fn offset(strides: &Strides, batch: u32, head: u32, token: u32) -> u32 {
    batch * strides.batch + head * strides.head + token * strides.token
}

/// A row of a tile.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Row {
    pub(super) head: u32,
    pub(super) token: u32,
    /// The number of reaches where the route names none.
    pub(super) route: u32,
}

/// Row `row` of a list's tile.
#[cube]
pub(super) fn row_of(
    list: u32,
    row: u32,
    kv_heads: u32,
    routes: &[u32],
    numbers: &Numbers,
    #[comptime] routed: bool,
) -> Row {
    let of_head = list / numbers.tiles;
    let packed = list % numbers.tiles * numbers.tile_rows + row;
    let token = packed / numbers.group;
    let head = of_head % kv_heads * numbers.group + packed % numbers.group;
    let mut route = 0u32;
    if comptime![routed] {
        let router_head = head * numbers.router_heads / numbers.heads;
        let router_row = of_head / kv_heads * numbers.router_heads + router_head;
        let word = routes[(router_row * numbers.query_len.div_ceil(4u32) + token / 4u32) as usize];
        route = min((word >> (token % 4u32 * 8u32)) & 255u32, numbers.reaches);
    }
    Row { head, token, route }
}

/// Rows of a list's tile: the last tile of a kv head may have fewer than the others.
#[cube]
pub(super) fn rows_in(list: u32, numbers: &Numbers) -> u32 {
    let before = list % numbers.tiles * numbers.tile_rows;
    min(numbers.query_len * numbers.group - before, numbers.tile_rows)
}

/// A tile of rows, and the keys that it needs: the first `sinks`, and then those from `low` on, `keys` in all.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct List {
    pub(super) list: u32,
    pub(super) batch: u32,
    pub(super) kv_head: u32,
    /// The word where the sequence's table begins.
    pub(super) table: u32,
    /// The position of the first query.
    pub(super) first_position: i32,
    pub(super) low: u32,
    pub(super) sinks: u32,
    pub(super) keys: u32,
}

#[cube]
pub(super) fn list_at(
    list: u32,
    needs: &[u32],
    tables: &[u32],
    slots: &[u32],
    places: &Places,
    numbers: &Numbers,
) -> List {
    let of_head = list / numbers.tiles;
    let batch = of_head / places.kv_heads;
    let table = slots[batch as usize] * places.pitch;
    let at = list as usize * 4;
    List {
        list,
        batch,
        kv_head: of_head % places.kv_heads,
        table,
        first_position: tables[table as usize] as i32 - numbers.query_len as i32,
        low: needs[at],
        sinks: needs[at + 1],
        keys: needs[at + 2],
    }
}

/// The position of the `n`-th key that a list needs.
#[cube]
pub(super) fn position_of(list: &List, n: u32) -> u32 {
    select(n < list.sinks, n, n - list.sinks + list.low)
}

/// The row of the pools that holds the `n`-th key that a list needs.
#[cube]
pub(super) fn pool_row(list: &List, n: u32, tables: &[u32], places: &Places) -> u32 {
    place(position_of(list, n), list.table, list.kv_head, tables, places)
}
