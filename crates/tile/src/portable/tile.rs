//! Tiles of rows: which rows a unit has, one per lane, which keys they visit, and which scores are masked.

// In a kernel `%` is one instruction; comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use cubecl::prelude::*;

use super::numbers::Numbers;
use crate::{
    arguments::Layout,
    rows::{INVALID_ROW, List, Sight, bounds_of_row, row_of},
    visibility::{Bounds, Visibility},
};

/// Where a unit's rows are: entries `first..first + count` of a list. Without any the unit has nothing to do.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Slot {
    /// Batch x kv heads + kv head.
    pub(super) list: u32,
    pub(super) first: u32,
    pub(super) count: u32,
}

/// The slot of a unit: its part of an item of the plan, or its share of all rows.
#[cube]
pub(super) fn slot_of(
    items: &[u32],
    item_counts: &[u32],
    numbers: &Numbers,
    #[comptime] sight: Sight,
    #[comptime] lanes: usize,
) -> Slot {
    let lanes = comptime![lanes as u32];
    let slot = ABSOLUTE_POS as u32 / numbers.parts;
    let mut list = 0u32;
    let mut first = 0u32;
    let mut count = 0u32;
    if comptime![sight.routed] {
        if slot < item_counts[numbers.reach as usize] {
            let item = (numbers.reach * numbers.items + slot) as usize;
            let before = (ABSOLUTE_POS as u32 % numbers.parts) * lanes;
            let rows_in_item = items[item * 3 + 2];
            if before < rows_in_item {
                list = items[item * 3];
                first = items[item * 3 + 1] + before;
                count = min(rows_in_item - before, lanes);
            }
        }
    } else {
        if slot < numbers.items {
            let packed = numbers.query_len * numbers.group;
            let tiles = packed.div_ceil(lanes);
            list = slot / tiles;
            first = (slot % tiles) * lanes;
            count = min(packed - first, lanes);
        }
    }
    Slot { list, first, count }
}

/// All rows of a kv head, or those that the plan lists.
#[cube]
pub(super) fn list_of(list: u32, count: u32, numbers: &Numbers) -> List {
    List {
        start: (numbers.reach * numbers.lists + list) * numbers.query_len * numbers.group,
        count,
        group: numbers.group,
        query_len: numbers.query_len,
        first_position: numbers.first_position,
    }
}

/// The rows of a slot, one per lane; lanes that are left repeat the last row.
#[derive(CubeType)]
pub(super) struct RowTile<R: Size> {
    pub(super) batch: u32,
    /// Within the batch.
    pub(super) kv_head: u32,
    pub(super) tokens: Array<u32>,
    pub(super) heads: Array<u32>,
    pub(super) invalid: Array<bool>,
    /// The bounds of each row; all first keys are 0 unless the batch is ragged.
    pub(super) firsts: Vector<i32, R>,
    pub(super) positions: Vector<i32, R>,
}

#[cube]
pub(super) fn rows_of<R: Size>(
    slot: &Slot,
    rows: &[u32],
    sequences: &[u32],
    numbers: &Numbers,
    #[comptime] sight: Sight,
    #[comptime] lanes: usize,
) -> RowTile<R> {
    let batch = slot.list / numbers.kv_heads;
    let kv_head = slot.list % numbers.kv_heads;
    let list = list_of(slot.list, slot.first + slot.count, numbers);
    let mut tokens = Array::<u32>::new(lanes);
    let mut heads = Array::<u32>::new(lanes);
    let mut invalid = Array::<bool>::new(lanes);
    let mut firsts = Vector::<i32, R>::new(0i32);
    let mut positions = Vector::<i32, R>::new(0i32);
    #[unroll]
    for lane in 0..lanes {
        let entry = slot.first + min(comptime![lane as u32], slot.count - 1);
        let row = row_of(&list, entry, rows, sight);
        invalid[lane] = row >= INVALID_ROW;
        let bounds = bounds_of_row(&list, row, sequences, sight);
        let row = row % INVALID_ROW;
        tokens[lane] = row / numbers.group;
        heads[lane] = kv_head * numbers.group + row % numbers.group;
        firsts.insert(lane, bounds.first);
        positions.insert(lane, bounds.position);
    }
    RowTile::<R> { batch, kv_head, tokens, heads, invalid, firsts, positions }
}

/// The bounds of one lane's row.
#[cube]
pub(super) fn bounds_at<R: Size>(
    firsts: Vector<i32, R>,
    positions: Vector<i32, R>,
    #[comptime] lane: usize,
) -> Bounds {
    Bounds { first: firsts.extract(lane), position: positions.extract(lane) }
}

/// Where the keys and values of a tile begin, and how far apart they are, in elements.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Keys {
    pub(super) key: usize,
    pub(super) value: usize,
    pub(super) key_stride: usize,
    pub(super) value_stride: usize,
}

#[cube]
pub(super) fn keys_of(batch: u32, kv_head: u32, layout: &Layout, numbers: &Numbers) -> Keys {
    // Assigned under a condition that always holds, so that compilers keep the two as values: left as expressions, their
    // divisions are computed again for every key and dimension (half of the time on the CPU runtime).
    let mut key_base = 0u32;
    let mut value_base = 0u32;
    if numbers.lists > 0u32 {
        key_base = batch * layout.key.batch + kv_head * layout.key.head;
        value_base = batch * layout.value.batch + kv_head * layout.value.head;
    }
    Keys {
        key: key_base as usize,
        value: value_base as usize,
        key_stride: layout.key.token as usize,
        value_stride: layout.value.token as usize,
    }
}

/// The keys that a tile of rows visits: `sinks_begin..sinks_end`, then `begin..end`; one range, or two where sinks and
/// window are apart.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct KeyRanges {
    sinks_begin: i32,
    sinks_end: i32,
    begin: i32,
    pub(super) end: i32,
}

/// The keys that rows visit whose bounds lie between those of the first and those of the last of them: bounds ascend, so
/// the two enclose what the rows between them see, across sequences too.
#[cube]
pub(super) fn key_ranges(
    first: Bounds,
    last: Bounds,
    numbers: &Numbers,
    #[comptime] visibility: Visibility,
) -> KeyRanges {
    let mut sinks_end = first.first;
    let mut begin = first.first;
    let mut end = last.position + 1;
    if comptime![visibility == Visibility::Far] {
        begin = first.first + numbers.sinks;
        end = last.position - numbers.window + 1;
    }
    if comptime![visibility == Visibility::Window] {
        begin = max(first.position - numbers.window + 1, first.first);
    }
    if comptime![visibility == Visibility::SinksAndWindow] {
        sinks_end = max(min(first.first + numbers.sinks, end), first.first);
        begin = max(first.position - numbers.window + 1, sinks_end);
    }
    KeyRanges { sinks_begin: first.first, sinks_end, begin, end }
}

#[cube]
impl KeyRanges {
    /// The first key; there is none where it is not below `end`.
    pub(super) fn start(&self) -> i32 {
        select(self.sinks_end > self.sinks_begin, self.sinks_begin, self.begin)
    }

    /// Where `chunk` keys from `at` on end, or sooner their range.
    pub(super) fn until(&self, at: i32, #[comptime] chunk: usize) -> i32 {
        let range_end = select(at < self.sinks_end, self.sinks_end, self.end);
        min(at + comptime![chunk as i32], range_end)
    }

    /// Where the next chunk begins after one that ended at `until`.
    pub(super) fn after(&self, until: i32) -> i32 {
        select(until == self.sinks_end, self.begin, until)
    }
}

/// Which lanes see: of rows with these bounds and keys, each by lane.
#[cube]
pub(super) fn sees<R: Size>(
    firsts: Vector<i32, R>,
    positions: Vector<i32, R>,
    keys: Vector<i32, R>,
    numbers: &Numbers,
    #[comptime] sight: Sight,
) -> Vector<bool, R> {
    let past = keys.less_equal(&positions);
    let sinks = Vector::<i32, R>::new(numbers.sinks);
    let ragged = comptime![sight.ragged];
    let causal = if ragged { past.vec_and(keys.greater_equal(&firsts)) } else { past };
    let sinks_end = if ragged { firsts + sinks } else { sinks };
    match sight.visibility {
        Visibility::All | Visibility::NonCausal => causal,
        Visibility::Window => {
            let start = positions - Vector::new(numbers.window);
            causal.vec_and(keys.greater_than(&start))
        }
        Visibility::SinksAndWindow => {
            let start = positions - Vector::new(numbers.window);
            let near = keys.greater_than(&start);
            causal.vec_and(near.or(keys.less_than(&sinks_end)))
        }
        Visibility::Far => {
            let end = positions - Vector::new(numbers.window);
            let past = keys.less_equal(&end);
            past.vec_and(keys.greater_equal(&sinks_end))
        }
    }
}

/// Dimension `d` of the rows that begin at `offsets`, one per lane.
#[cube]
pub(super) fn gather<E: Float, R: Size>(
    offsets: &Array<usize>,
    tensor: &[E],
    d: usize,
    #[comptime] lanes: usize,
) -> Vector<f32, R> {
    let mut across = Vector::<f32, R>::new(0.0f32);
    #[unroll]
    for lane in 0..lanes {
        across.insert(lane, f32::cast_from(tensor[offsets[lane] + d]));
    }
    across
}
