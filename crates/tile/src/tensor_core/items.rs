//! Items of work: which rows, which keys, which scores are masked.

use cubecl::prelude::*;

use super::{Blueprint, Numbers};
use crate::{portable::INVALID_ROW, visibility::Visibility};

/// The keys that an item visits: `0..sinks_end`, then `begin..end`, in tiles.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Keys {
    pub(crate) sinks_end: i32,
    pub(crate) begin: i32,
    pub(crate) end: i32,
    pub(crate) sink_tiles: u32,
    pub(crate) tiles: u32,
}

#[cube]
impl Keys {
    /// Assigns every field: CubeCL assigns no structs.
    pub(crate) fn set(&mut self, other: &Keys) {
        self.sinks_end = other.sinks_end;
        self.begin = other.begin;
        self.end = other.end;
        self.sink_tiles = other.sink_tiles;
        self.tiles = other.tiles;
    }

    /// Keeps the tiles of one of several parts. There are no sinks apart.
    pub(crate) fn keep_part(&mut self, part: u32, parts: u32, #[comptime] blueprint: Blueprint) {
        if comptime![blueprint.in_parts()] {
            let size = comptime![blueprint.shape.keys as i32];
            let first = self.tiles * part / parts;
            let end = self.tiles * (part + 1u32) / parts;
            self.end = min(self.end, self.begin + end as i32 * size);
            self.begin += first as i32 * size;
            self.tiles = end - first;
        }
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

#[cube]
impl Item {
    /// Assigns every field.
    pub(crate) fn set(&mut self, other: &Item) {
        self.list = other.list;
        self.first = other.first;
        self.rows = other.rows;
    }
}

/// The `slot`-th item in the order of work.
#[cube]
pub(crate) fn item_of(slot: u32, items: &[u32], numbers: &Numbers, #[comptime] blueprint: Blueprint) -> Item {
    let rows = comptime![blueprint.shape.rows as u32];
    let packed = numbers.query_len * numbers.group;
    let tiles = packed.div_ceil(rows);
    // Whole lists take turns; within a turn the tiles with most keys come first.
    let turn = slot / (numbers.lists_at_once * tiles);
    let before = turn * numbers.lists_at_once;
    let lists = min(numbers.lists_at_once, numbers.lists - before);
    let within = slot - before * tiles;
    let mut list = before + within % lists;
    let mut first = (tiles - 1u32 - within / lists) * rows;
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

/// The position of a row.
#[cube]
pub(crate) fn position_of(row: u32, numbers: &Numbers) -> i32 {
    (row % INVALID_ROW / numbers.group) as i32 + numbers.first_position
}

/// Which keys the rows from `first` to `last` of an item visit.
#[cube]
pub(crate) fn keys_of(first: u32, last: u32, numbers: &Numbers, #[comptime] blueprint: Blueprint) -> Keys {
    let first = position_of(first, numbers);
    let last = position_of(last, numbers);
    let tile = comptime![blueprint.shape.keys as i32];
    let mut sinks_end = 0i32;
    let mut begin = 0i32;
    let mut end = last + 1;
    if comptime![blueprint.visibility == Visibility::Far] {
        begin = numbers.sinks;
        end = last - numbers.window + 1;
    }
    if comptime![blueprint.visibility == Visibility::Window] {
        begin = max(first - numbers.window + 1, 0i32);
    }
    if comptime![blueprint.visibility == Visibility::SinksAndWindow] {
        sinks_end = max(min(numbers.sinks, end), 0i32);
        begin = max(first - numbers.window + 1, sinks_end);
    }
    let sink_tiles = ((sinks_end + tile - 1) / tile) as u32;
    let tiles = sink_tiles + ((max(end - begin, 0i32) + tile - 1) / tile) as u32;
    Keys { sinks_end, begin, end, sink_tiles, tiles }
}

/// The first key of a tile.
#[cube]
pub(crate) fn tile_start(keys: &Keys, tile: u32, #[comptime] blueprint: Blueprint) -> i32 {
    let size = comptime![blueprint.shape.keys as i32];
    let mut start = keys.begin + (tile - keys.sink_tiles) as i32 * size;
    if comptime![blueprint.visibility == Visibility::SinksAndWindow] {
        if tile < keys.sink_tiles {
            start = tile as i32 * size;
        }
    }
    start
}

/// Whether any row between two positions misses any key of the tile that starts at `start`.
#[cube]
pub(crate) fn needs_mask(
    first_row: i32,
    last_row: i32,
    start: i32,
    sinks: bool,
    keys: &Keys,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> bool {
    let end = start + comptime![blueprint.shape.keys as i32];
    match blueprint.visibility {
        Visibility::All => end > first_row + 1,
        Visibility::Window => end > first_row + 1 || start <= last_row - numbers.window,
        Visibility::SinksAndWindow => {
            end > first_row + 1
                || (sinks && end > keys.sinks_end)
                || (!sinks && start <= last_row - numbers.window)
        }
        Visibility::Far => end > first_row - numbers.window + 1,
    }
}

/// Whether the row at `position` sees `key`.
#[cube]
pub(crate) fn sees(
    position: i32,
    key: i32,
    sinks: bool,
    keys: &Keys,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> bool {
    match blueprint.visibility {
        Visibility::All => key <= position,
        Visibility::Window => key <= position && key > position - numbers.window,
        Visibility::SinksAndWindow => {
            let near = select(sinks, key < keys.sinks_end, key > position - numbers.window);
            key <= position && near
        }
        Visibility::Far => key <= position - numbers.window,
    }
}
