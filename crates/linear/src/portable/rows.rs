//! Tiles of rows: which rows a unit has, one per lane, and which rows of the other kind they meet.

// Comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use cubecl::prelude::*;

use super::{
    geometry::Blueprint,
    numbers::{INVALID_ROW, Lists, Numbers, Side, Strides, offset},
};

/// Where a unit's rows are: entries `first..first + count` of a kv head, whose indices all lie in one chunk. Without any the
/// unit has nothing to do.
///
/// Entries are the packed rows of the kv head (`token * group + head`), or where a dispatch plan lists those that take part,
/// the places in its list; both ascend by row.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Slot {
    /// Batch x kv heads + kv head.
    pub(super) list: u32,
    /// Negative before the first chunk.
    pub(super) chunk: i32,
    pub(super) first: u32,
    pub(super) count: u32,
}

/// The slot of a unit. Every chunk has as many units as its rows can need, so that none spans two chunks.
#[cube]
pub(super) fn slot_of(
    side: &Side,
    lists: &Lists,
    numbers: &Numbers,
    #[comptime] lanes: usize,
    #[comptime] listed: bool,
) -> Slot {
    let lanes = comptime![lanes as u32];
    let tiles = (numbers.chunk * side.group).div_ceil(lanes);
    let unit = ABSOLUTE_POS as u32;
    let list = unit / tiles / side.segments;
    let chunk = side.first_chunk + (unit / tiles % side.segments) as i32;
    let mut first = 0u32;
    let mut count = 0u32;
    if list < numbers.lists {
        first = entry_of(list, chunk * numbers.chunk as i32, side, lists, numbers, listed);
        first += unit % tiles * lanes;
        let end = entry_of(list, (chunk + 1) * numbers.chunk as i32, side, lists, numbers, listed);
        if first < end {
            count = min(end - first, lanes);
        }
    }
    Slot { list, chunk, first, count }
}

/// The first entry of the sequence whose index is at least `index`; one past its last where there is none.
#[cube]
pub(super) fn entry_of(
    list: u32,
    index: i32,
    side: &Side,
    lists: &Lists,
    numbers: &Numbers,
    #[comptime] listed: bool,
) -> u32 {
    let token = min(max(index - side.offset, 0i32), side.tokens as i32) as u32;
    let row = (side.first + token) * side.group;
    let mut entry = row;
    if comptime![listed] {
        let mut low = 0u32;
        let mut high = lists.counts[(lists.reach * numbers.lists + list) as usize];
        while low < high {
            let middle = (low + high) / 2u32;
            if row_of(list, middle, side, lists, numbers, true) % INVALID_ROW < row {
                low = middle + 1u32;
            } else {
                high = middle;
            }
        }
        entry = low;
    }
    entry
}

/// The packed row of an entry, with its mark.
#[cube]
pub(super) fn row_of(
    list: u32,
    entry: u32,
    side: &Side,
    lists: &Lists,
    numbers: &Numbers,
    #[comptime] listed: bool,
) -> u32 {
    let mut row = entry;
    if comptime![listed] {
        let start = (lists.reach * numbers.lists + list) * side.length * side.group;
        row = lists.rows[(start + entry) as usize];
    }
    row
}

/// Rows, one per lane; lanes that are left repeat the last one.
#[derive(CubeType)]
pub(super) struct Tile<R: Size> {
    pub(super) batch: u32,
    pub(super) tokens: Array<u32>,
    pub(super) heads: Array<u32>,
    /// The number of each row in its tensor.
    pub(super) rows: Array<usize>,
    pub(super) indices: Vector<i32, R>,
    /// 1 for rows without a valid route; where they are listed.
    pub(super) invalid: Vector<i32, R>,
    /// The smallest and the largest index.
    pub(super) lowest: i32,
    pub(super) highest: i32,
}

/// The entries `first..first + count` of a kv head.
#[cube]
pub(super) fn tile_of<R: Size>(
    list: u32,
    first: u32,
    count: u32,
    side: &Side,
    lists: &Lists,
    numbers: &Numbers,
    #[comptime] lanes: usize,
    #[comptime] listed: bool,
) -> Tile<R> {
    let batch = list / numbers.kv_heads;
    let kv_head = list % numbers.kv_heads;
    let mut tokens = Array::<u32>::new(lanes);
    let mut heads = Array::<u32>::new(lanes);
    let mut rows = Array::<usize>::new(lanes);
    let mut indices = Vector::<i32, R>::new(0i32);
    let mut invalid = Vector::<i32, R>::new(0i32);
    #[unroll]
    for lane in 0..lanes {
        let entry = first + min(comptime![lane as u32], count - 1);
        let marked = row_of(list, entry, side, lists, numbers, listed);
        let row = if comptime![listed] { marked % INVALID_ROW } else { marked };
        if comptime![listed] {
            invalid.insert(lane, (marked / INVALID_ROW) as i32);
        }
        let token = row / side.group;
        let head = row % side.group;
        tokens[lane] = token;
        heads[lane] = kv_head * side.group + head;
        rows[lane] = ((list * side.group + head) * side.length + token) as usize;
        indices.insert(lane, index_of(token, side));
    }
    let lowest = indices.extract(0usize);
    let highest = indices.extract(comptime![lanes - 1]);
    Tile::<R> { batch, tokens, heads, rows, indices, invalid, lowest, highest }
}

/// The index of a token.
#[cube]
pub(super) fn index_of(token: u32, side: &Side) -> i32 {
    (token - side.first) as i32 + side.offset
}

/// Where each row of a tile begins in a tensor.
#[cube]
pub(super) fn offsets_of<R: Size>(
    tile: &Tile<R>,
    strides: &Strides,
    #[comptime] lanes: usize,
) -> Array<usize> {
    let mut offsets = Array::<usize>::new(lanes);
    #[unroll]
    for lane in 0..lanes {
        offsets[lane] = offset(strides, tile.batch, tile.heads[lane], tile.tokens[lane]);
    }
    offsets
}

/// Dim `d` of the rows that begin at `offsets`, one per lane.
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

/// The entries `begin..end` of the other kind that some row of a tile meets within their chunk.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Entries {
    pub(super) begin: u32,
    pub(super) end: u32,
}

#[cube]
pub(super) fn entries_of<R: Size>(
    tile: &Tile<R>,
    list: u32,
    chunk: i32,
    others: &Side,
    lists: &Lists,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Entries {
    let keys = numbers.chunk as i32;
    let mut begin = chunk * keys;
    let mut end = tile.highest + 1;
    if comptime![blueprint.of_keys] {
        begin = tile.lowest;
        end = (chunk + 1) * keys;
    }
    let listed = comptime![blueprint.lists_others()];
    Entries {
        begin: entry_of(list, begin, others, lists, numbers, listed),
        end: entry_of(list, end, others, lists, numbers, listed),
    }
}

/// Which lanes of a tile meet each of a block's rows: 1 where they do. Arrays of bools are not the same on all runtimes.
#[derive(CubeType)]
pub(super) struct Meetings<R: Size> {
    pub(super) seen: Array<Vector<i32, R>>,
    /// Whether all do.
    pub(super) all: bool,
}

/// Of a block of which the first `count` rows are there.
#[cube]
pub(super) fn meetings_of<R: Size>(
    tile: &Tile<R>,
    block: &Tile<R>,
    count: u32,
    #[comptime] blueprint: Blueprint,
) -> Meetings<R> {
    let lanes = comptime![blueprint.lanes];
    let mut seen = Array::<Vector<i32, R>>::new(lanes);
    #[unroll]
    for other in 0..lanes {
        let index = Vector::<i32, R>::new(block.indices.extract(other));
        let meets = if comptime![blueprint.of_keys] {
            tile.indices.less_equal(&index)
        } else {
            tile.indices.greater_equal(&index)
        };
        let there = select(comptime![other as u32] < count, 1i32, 0i32);
        seen[other] = select_many(meets, Vector::new(there), Vector::new(0i32));
    }
    let ordered = if comptime![blueprint.of_keys] {
        tile.highest <= block.lowest
    } else {
        block.highest <= tile.lowest
    };
    let all = ordered && count == comptime![lanes as u32];
    Meetings::<R> { seen, all }
}

/// The logarithm of what a state has decayed by, from the start of a chunk to the key of each index within it; 0 before the
/// first key. `decays` are sums from the starts of chunks.
#[cube]
pub(super) fn decays_at<R: Size>(
    tile: &Tile<R>,
    list: u32,
    decays: &[f32],
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, R> {
    let mut sums = Vector::<f32, R>::new(0.0f32);
    if comptime![blueprint.decays] {
        #[unroll]
        for lane in 0..blueprint.lanes {
            let index = tile.indices.extract(lane);
            let sum = decays[(list * numbers.keys + max(index, 0i32) as u32) as usize];
            sums.insert(lane, select(index < 0i32, 0.0f32, sum));
        }
    }
    sums
}

/// The logarithm of a whole chunk's decay; 0 without keys.
#[cube]
pub(super) fn decay_of_chunk(list: u32, chunk: u32, decays: &[f32], numbers: &Numbers) -> f32 {
    let end = min((chunk + 1) * numbers.chunk, numbers.keys);
    let sum = decays[(list * numbers.keys + max(end, 1u32) - 1) as usize];
    select(end == 0u32, 0.0f32, sum)
}

/// What a tile's rows make of the state of their chunk: queries meet the state before it, decayed up to their index; keys
/// the gradient of the state after it, to which they decayed.
#[cube]
pub(super) fn carry_of<R: Size>(
    sums: Vector<f32, R>,
    list: u32,
    chunk: u32,
    decays: &[f32],
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, R> {
    let mut carry = Vector::<f32, R>::new(1.0f32);
    if comptime![blueprint.decays] {
        if comptime![blueprint.of_keys] {
            let all = Vector::<f32, R>::new(decay_of_chunk(list, chunk, decays, numbers));
            carry = (all - sums).exp();
        } else {
            carry = sums.exp();
        }
    }
    carry
}
