//! Items of work: which rows, which keys, which scores are masked.

use cubecl::prelude::*;

use super::{Blueprint, Numbers};
use crate::{
    rows::INVALID_ROW,
    visibility::{Bounds, Visibility, bounds_of},
};

/// The keys that an item visits: `sinks_begin..sinks_end`, then `begin..end`, in tiles.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Keys {
    pub(crate) sinks_begin: i32,
    pub(crate) sinks_end: i32,
    pub(crate) begin: i32,
    pub(crate) end: i32,
    pub(crate) sink_tiles: u32,
    pub(crate) tiles: u32,
}

#[cube]
impl Keys {
    /// Keeps the tiles from `first` to before `end`. There are no sinks apart.
    pub(crate) fn keep(&mut self, first: u32, end: u32, #[comptime] blueprint: Blueprint) {
        let size = comptime![blueprint.shape.keys as i32];
        self.end = min(self.end, self.begin + end as i32 * size);
        self.begin += first as i32 * size;
        self.tiles = end - first;
    }
}

/// An item: rows `first..first + rows` of a list.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Item {
    pub(crate) list: u32,
    pub(crate) first: u32,
    pub(crate) rows: u32,
}

/// The `slot`-th item in the order of work.
#[cube]
pub(crate) fn item_of(slot: u32, items: &[u32], numbers: &Numbers, #[comptime] blueprint: Blueprint) -> Item {
    let rows = comptime![blueprint.shape.rows as u32];
    let packed = numbers.query_len * numbers.group;
    let tiles = packed.div_ceil(rows);
    // Whole lists take turns; within a turn the tiles with most keys come first, or, every other turn, last.
    let turn = slot / (numbers.lists_at_once * tiles);
    let before = turn * numbers.lists_at_once;
    let lists = min(numbers.lists_at_once, numbers.lists - before);
    let within = slot - before * tiles;
    let mut list = before + within % lists;
    let mut first = select(turn % 2u32 == 0u32, tiles - 1u32 - within / lists, within / lists) * rows;
    let mut count = min(packed - first, rows);
    if comptime![blueprint.routed] {
        let at = ((numbers.reach * numbers.items + slot) * 3u32) as usize;
        list = items[at];
        first = items[at + 1];
        count = items[at + 2];
    }
    Item { list, first, rows: count }
}

/// The row that an entry of a list names, with its mark.
#[cube]
pub(crate) fn row_at(
    item: &Item,
    entry: u32,
    rows: &[u32],
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> u32 {
    // An item that is not full repeats its last row.
    let entry = item.first + min(entry, item.rows - 1u32);
    let mut row = entry;
    if comptime![blueprint.routed] {
        let packed = numbers.query_len * numbers.group;
        row = rows[((numbers.reach * numbers.lists + item.list) * packed + entry) as usize];
    }
    row
}

/// The bounds of a row.
#[cube]
pub(crate) fn bounds_of_row(
    row: u32,
    sequences: &[u32],
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Bounds {
    bounds_of(
        row % INVALID_ROW / numbers.group,
        numbers.query_len,
        numbers.first_position,
        sequences,
        blueprint.visibility,
        blueprint.ragged,
    )
}

/// The bounds of the row that is noted at an entry of `row_ids`, with its bounds in a ragged batch.
#[cube]
pub(crate) fn bounds_at(
    entry: u32,
    row: u32,
    row_ids: &[u32],
    sequences: &[u32],
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Bounds {
    if comptime![blueprint.ragged] {
        let column = comptime![blueprint.staged_rows() as u32];
        Bounds {
            first: i32::reinterpret(row_ids[(entry + column) as usize]),
            position: i32::reinterpret(row_ids[(entry + 2u32 * column) as usize]),
        }
    } else {
        bounds_of_row(row, sequences, numbers, blueprint)
    }
}

/// Which keys the rows from `first` to `last` visit. Bounds ascend, so those of these two enclose what the rows between
/// them see, across sequences too.
#[cube]
pub(crate) fn keys_between(
    first: &Bounds,
    last: &Bounds,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Keys {
    let tile = comptime![blueprint.shape.keys as i32];
    let sinks_begin = first.first;
    let mut sinks_end = sinks_begin;
    let mut begin = sinks_begin;
    let mut end = last.position + 1;
    if comptime![blueprint.visibility == Visibility::Far] {
        begin = sinks_begin + numbers.sinks;
        end = last.position - numbers.window + 1;
    }
    if comptime![blueprint.visibility == Visibility::Window] {
        begin = max(first.position - numbers.window + 1, sinks_begin);
    }
    if comptime![blueprint.visibility == Visibility::SinksAndWindow] {
        sinks_end = max(min(sinks_begin + numbers.sinks, end), sinks_begin);
        begin = max(first.position - numbers.window + 1, sinks_end);
    }
    let sink_tiles = ((sinks_end - sinks_begin + tile - 1) / tile) as u32;
    let tiles = sink_tiles + ((max(end - begin, 0i32) + tile - 1) / tile) as u32;
    Keys { sinks_begin, sinks_end, begin, end, sink_tiles, tiles }
}

/// The keys that the rows of an item visit.
#[cube]
pub(crate) fn keys_of(
    item: &Item,
    rows: &[u32],
    sequences: &[u32],
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Keys {
    let first = row_at(item, 0u32, rows, numbers, blueprint);
    let last = row_at(item, item.rows, rows, numbers, blueprint);
    let first = bounds_of_row(first, sequences, numbers, blueprint);
    let last = bounds_of_row(last, sequences, numbers, blueprint);
    keys_between(&first, &last, numbers, blueprint)
}

/// Where the sinks of an item begin: known to be 0 unless the batch is ragged, which saves a register.
#[cube]
pub(crate) fn sinks_begin(keys: &Keys, #[comptime] blueprint: Blueprint) -> i32 {
    let mut begin = 0i32;
    if comptime![blueprint.ragged] {
        begin = keys.sinks_begin;
    }
    begin
}

/// The first key of a tile.
#[cube]
pub(crate) fn tile_start(keys: &Keys, tile: u32, #[comptime] blueprint: Blueprint) -> i32 {
    let size = comptime![blueprint.shape.keys as i32];
    let mut start = keys.begin + (tile - keys.sink_tiles) as i32 * size;
    if comptime![blueprint.visibility == Visibility::SinksAndWindow] {
        if tile < keys.sink_tiles {
            start = sinks_begin(keys, blueprint) + tile as i32 * size;
        }
    }
    start
}

/// How many tiles, from the first on, every row from `first` on sees whole, where that can be told apart: what hides keys
/// from a row of [`one edge`](Blueprint::one_edge) hides the last.
#[cube]
pub(crate) fn whole_tiles(
    first: &Bounds,
    keys: &Keys,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> u32 {
    let mut last_key = first.position;
    if comptime![blueprint.visibility == Visibility::Far] {
        last_key -= numbers.window;
    }
    let seen = max(last_key + 1 - keys.begin, 0i32) as u32;
    min(seen / comptime![blueprint.shape.keys as u32], keys.tiles)
}

/// Whether any row between two misses any key of the tile that starts at `start`.
#[cube]
pub(crate) fn needs_mask(
    first: &Bounds,
    last: &Bounds,
    start: i32,
    sinks: bool,
    keys: &Keys,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> bool {
    let end = start + comptime![blueprint.shape.keys as i32];
    let masked = match blueprint.visibility {
        Visibility::All | Visibility::NonCausal => end > first.position + 1,
        Visibility::Window => end > first.position + 1 || start <= last.position - numbers.window,
        Visibility::SinksAndWindow => {
            end > first.position + 1
                || (sinks && end > keys.sinks_end)
                || (!sinks && start <= last.position - numbers.window)
        }
        Visibility::Far => end > first.position - numbers.window + 1,
    };
    // In a ragged batch the last row's sequence may begin within the tile, or after it.
    if comptime![blueprint.ragged && blueprint.visibility == Visibility::Far] {
        masked || start < last.first + numbers.sinks
    } else if comptime![blueprint.ragged] {
        masked || start < last.first
    } else {
        masked
    }
}

/// Whether the row with these bounds sees `key`.
#[cube]
pub(crate) fn sees(
    row: &Bounds,
    key: i32,
    sinks: bool,
    keys: &Keys,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> bool {
    let causal = match blueprint.visibility {
        Visibility::All | Visibility::NonCausal => key <= row.position,
        Visibility::Window => key <= row.position && key > row.position - numbers.window,
        Visibility::SinksAndWindow => {
            let mut near = select(sinks, key < keys.sinks_end, key > row.position - numbers.window);
            if comptime![blueprint.ragged] {
                // The item's sinks are its first sequence's; a row of another finds its own among the other keys.
                near = key < row.first + numbers.sinks || key > row.position - numbers.window;
                near = near && (!sinks || key < keys.sinks_end);
            }
            key <= row.position && near
        }
        Visibility::Far => key <= row.position - numbers.window,
    };
    if comptime![blueprint.ragged && blueprint.visibility == Visibility::Far] {
        causal && key >= row.first + numbers.sinks
    } else if comptime![blueprint.ragged] {
        causal && key >= row.first
    } else {
        causal
    }
}
