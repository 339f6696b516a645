//! Gradients of queries: one unit per tile of rows, which visits the keys that its rows see.

use cubecl::prelude::*;

use super::{
    Blueprint,
    parts::{Tile, accumulate, as_numbers, clear_lanes, flush, products, sums_at, tile_of, weigh},
};
use crate::{
    arguments::BackwardTensors,
    portable::{
        numbers::{Numbers, offset},
        tile::{Keys, bounds_at, key_ranges, keys_of, rows_of, sees, slot_of},
    },
    rows::all_see,
    visibility::Bounds,
};

/// What is known of a tile of rows, one per lane.
#[derive(CubeType)]
struct Rows<R: Size> {
    query: Tile<R>,
    d_out: Tile<R>,
    /// Sums for the gradients of the queries.
    sums: Tile<R>,
    /// Which lanes have a row that has a gradient: a row without keys has none.
    written: Array<bool>,
    lse: Vector<f32, R>,
    delta: Vector<f32, R>,
    firsts: Vector<i32, R>,
    positions: Vector<i32, R>,
}

/// Folds the keys `first..end`, at most a block, into the gradients of a tile's queries.
#[cube]
fn fold<E: Float, O: Float, R: Size>(
    rows: &mut Rows<R>,
    tensors: &BackwardTensors<E, O>,
    gradient: &mut [f32],
    keys: &Keys,
    first: i32,
    end: i32,
    lowest: Bounds,
    highest: Bounds,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let block = comptime![blueprint.block];
    let mut key_offsets = Array::<usize>::new(block);
    let mut value_offsets = Array::<usize>::new(block);
    let mut seen = Array::<Vector<i32, R>>::new(block);
    #[unroll]
    for x in 0..block {
        // Keys beyond the last read it again, and no row sees them.
        let j = first + comptime![x as i32];
        let at = min(j, end - 1) as usize;
        key_offsets[x] = keys.key + at * keys.key_stride;
        value_offsets[x] = keys.value + at * keys.value_stride;
        let mask = sees::<R>(rows.firsts, rows.positions, Vector::new(j), numbers, blueprint.sight);
        seen[x] = select(j < end, as_numbers::<R>(mask), Vector::new(0i32));
    }
    let scores = products::<E, E, R>(
        &rows.query,
        &tensors.query,
        &tensors.key,
        &key_offsets,
        numbers.head_dim,
        blueprint,
    );
    let mut slopes = products::<O, E, R>(
        &rows.d_out,
        &tensors.d_out,
        &tensors.value,
        &value_offsets,
        numbers.value_dim,
        blueprint,
    );
    #[unroll]
    for x in 0..block {
        let pair = weigh::<R>(scores[x], slopes[x], rows.lse, rows.delta, numbers, blueprint);
        slopes[x] = pair.slope;
    }
    let whole = end - first == comptime![block as i32];
    let all_seen =
        whole && all_see(lowest, highest, first, end - 1, numbers.window, numbers.sinks, blueprint.sight);
    accumulate::<E, R>(
        &mut rows.sums,
        gradient,
        &rows.written,
        &slopes,
        &tensors.key,
        &key_offsets,
        &seen,
        all_seen,
        numbers.head_dim,
        blueprint,
    );
}

/// One unit, one part of an item, as in the forward pass.
#[cube(launch_unchecked)]
pub(super) fn query_kernel<E: Float, O: Float, R: Size>(
    tensors: &BackwardTensors<E, O>,
    rows: &[u32],
    items: &[u32],
    item_counts: &[u32],
    sequences: &[u32],
    gradient: &mut [f32],
    numbers: Numbers,
    unset: u32,
    #[comptime] blueprint: Blueprint,
    #[define(E, O)] _elements: [ElemType; 2],
    #[define(R)] _lanes: usize,
) {
    let lanes = comptime![blueprint.lanes];
    let slot = slot_of(items, item_counts, &numbers, blueprint.sight, lanes);
    if slot.count == 0u32 {
        terminate!();
    }
    let mine = rows_of::<R>(&slot, rows, sequences, &numbers, blueprint.sight, lanes);
    let mut query_offsets = Array::<usize>::new(lanes);
    let mut d_out_offsets = Array::<usize>::new(lanes);
    let mut gradient_offsets = Array::<usize>::new(lanes);
    let mut present = Array::<bool>::new(lanes);
    let mut written = Array::<bool>::new(lanes);
    let mut lses = Vector::<f32, R>::new(0.0f32);
    let mut deltas = Vector::<f32, R>::new(0.0f32);
    #[unroll]
    for lane in 0..lanes {
        let token = mine.tokens[lane];
        let head = mine.heads[lane];
        query_offsets[lane] = offset(&tensors.layout.query, mine.batch, head, token);
        d_out_offsets[lane] = offset(&tensors.d_out_strides, mine.batch, head, token);
        let row = (mine.batch * numbers.kv_heads * numbers.group + head) * numbers.query_len + token;
        gradient_offsets[lane] = (row * numbers.head_dim) as usize;
        let of_row = select(mine.invalid[lane], numbers.nan, tensors.lse[row as usize]);
        // Asked as an equality: not in every shader language does NaN differ from a number.
        let count = select(of_row == numbers.neg_inf, 0u32, slot.count);
        present[lane] = comptime![lane as u32] < slot.count;
        written[lane] = comptime![lane as u32] < count;
        lses.insert(lane, of_row);
        deltas.insert(lane, tensors.delta[row as usize]);
    }
    // Sums are added to memory below, all at once or block by block.
    if unset != 0u32 {
        clear_lanes(gradient, &gradient_offsets, &present, numbers.head_dim, blueprint);
    }
    let mut mine = Rows::<R> {
        query: tile_of::<E, R>(
            &tensors.query,
            query_offsets,
            numbers.head_dim,
            blueprint.head_room,
            blueprint,
        ),
        d_out: tile_of::<O, R>(
            &tensors.d_out,
            d_out_offsets,
            numbers.value_dim,
            blueprint.value_room,
            blueprint,
        ),
        sums: sums_at::<R>(gradient_offsets, numbers.head_dim, blueprint.head_room, blueprint),
        written,
        lse: lses,
        delta: deltas,
        firsts: mine.firsts,
        positions: mine.positions,
    };
    let keys = keys_of(slot.list / numbers.kv_heads, slot.list % numbers.kv_heads, &tensors.layout, &numbers);
    let lowest = bounds_at::<R>(mine.firsts, mine.positions, 0usize);
    let highest = bounds_at::<R>(mine.firsts, mine.positions, comptime![lanes - 1]);
    let ranges = key_ranges(lowest, highest, &numbers, blueprint.sight.visibility);
    let mut at = ranges.start();
    while at < ranges.end {
        let next = ranges.until(at, blueprint.block);
        fold::<E, O, R>(&mut mine, tensors, gradient, &keys, at, next, lowest, highest, &numbers, blueprint);
        at = ranges.after(next);
    }
    flush::<R>(&mine.sums, gradient, &mine.written, numbers.head_dim, blueprint);
}
