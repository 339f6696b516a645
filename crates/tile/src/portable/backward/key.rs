//! Gradients of keys and values: one unit per tile of keys of one kv head, which visits the rows that see them, of all
//! query heads that share them.

// In a kernel `%` is one instruction, and `is_multiple_of` is not there.
#![allow(clippy::manual_is_multiple_of)]

use cubecl::prelude::*;

use super::{
    Blueprint,
    parts::{Tile, accumulate, as_numbers, clear_lanes, flush, products, sums_at, tile_of, weigh},
};
use crate::{
    arguments::BackwardTensors,
    portable::{
        numbers::{Numbers, offset},
        tile::{list_of, sees},
    },
    rows::{INVALID_ROW, List, all_see, bounds_of_row, entries_that_see, row_of},
    visibility::Bounds,
};

/// What is known of a tile of keys, one per lane; lanes that are left repeat the last key.
#[derive(CubeType)]
struct Keys<R: Size> {
    batch: u32,
    /// Within the batch.
    kv_head: u32,
    /// The first and the last key.
    first: i32,
    last: i32,
    indices: Vector<i32, R>,
    key: Tile<R>,
    value: Tile<R>,
    /// Sums for the gradients of keys and values.
    key_sums: Tile<R>,
    value_sums: Tile<R>,
    /// Which lanes have a key of their own.
    written: Array<bool>,
}

/// Folds the rows of the entries `first..end`, at most a block, into the gradients of a tile's keys and values.
#[cube]
fn fold<E: Float, O: Float, R: Size>(
    keys: &mut Keys<R>,
    tensors: &BackwardTensors<E, O>,
    rows: &[u32],
    sequences: &[u32],
    key_gradient: &mut [f32],
    value_gradient: &mut [f32],
    list: &List,
    first: u32,
    end: u32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let block = comptime![blueprint.block];
    let mut query_offsets = Array::<usize>::new(block);
    let mut d_out_offsets = Array::<usize>::new(block);
    let mut lses = Array::<f32>::new(block);
    let mut deltas = Array::<f32>::new(block);
    let mut seen = Array::<Vector<i32, R>>::new(block);
    // Entries beyond the last, and rows without keys, stand before every key.
    let nowhere = comptime![-1i32].runtime();
    let mut lowest_first = 0i32;
    let mut lowest_position = nowhere;
    let mut highest_first = 0i32;
    let mut highest_position = nowhere;
    #[unroll]
    for x in 0..block {
        let entry = first + comptime![x as u32];
        let mut query_offset = 0usize;
        let mut d_out_offset = 0usize;
        let mut of_row = 0.0f32;
        let mut of_delta = 0.0f32;
        let mut first_key = 0i32;
        let mut position = nowhere;
        if entry < end {
            let marked = row_of(list, entry, rows, blueprint.sight);
            let bounds = bounds_of_row(list, marked, sequences, blueprint.sight);
            let row = marked % INVALID_ROW;
            let token = row / numbers.group;
            let head = keys.kv_head * numbers.group + row % numbers.group;
            let at = (keys.batch * numbers.kv_heads * numbers.group + head) * numbers.query_len + token;
            query_offset = offset(&tensors.layout.query, keys.batch, head, token);
            d_out_offset = offset(&tensors.d_out_strides, keys.batch, head, token);
            of_row = select(marked >= INVALID_ROW, numbers.nan, tensors.lse[at as usize]);
            of_delta = tensors.delta[at as usize];
            first_key = bounds.first;
            position = select(of_row == numbers.neg_inf, nowhere, bounds.position);
        }
        query_offsets[x] = query_offset;
        d_out_offsets[x] = d_out_offset;
        lses[x] = of_row;
        deltas[x] = of_delta;
        let mask =
            sees::<R>(Vector::new(first_key), Vector::new(position), keys.indices, numbers, blueprint.sight);
        seen[x] = as_numbers::<R>(mask);
        if comptime![x == 0] {
            lowest_first = first_key;
            lowest_position = position;
        } else {
            lowest_position = min(lowest_position, position);
        }
        highest_first = first_key;
        highest_position = position;
    }
    let mut weights = products::<E, E, R>(
        &keys.key,
        &tensors.key,
        &tensors.query,
        &query_offsets,
        numbers.head_dim,
        blueprint,
    );
    let mut slopes = products::<E, O, R>(
        &keys.value,
        &tensors.value,
        &tensors.d_out,
        &d_out_offsets,
        numbers.value_dim,
        blueprint,
    );
    #[unroll]
    for x in 0..block {
        let pair = weigh::<R>(
            weights[x],
            slopes[x],
            Vector::new(lses[x]),
            Vector::new(deltas[x]),
            numbers,
            blueprint,
        );
        weights[x] = pair.weight;
        slopes[x] = pair.slope;
    }
    let lowest = Bounds { first: lowest_first, position: lowest_position };
    let highest = Bounds { first: highest_first, position: highest_position };
    let all_seen =
        all_see(lowest, highest, keys.first, keys.last, numbers.window, numbers.sinks, blueprint.sight);
    accumulate::<E, R>(
        &mut keys.key_sums,
        key_gradient,
        &keys.written,
        &slopes,
        &tensors.query,
        &query_offsets,
        &seen,
        all_seen,
        numbers.head_dim,
        blueprint,
    );
    accumulate::<O, R>(
        &mut keys.value_sums,
        value_gradient,
        &keys.written,
        &weights,
        &tensors.d_out,
        &d_out_offsets,
        &seen,
        all_seen,
        numbers.value_dim,
        blueprint,
    );
}

/// One unit, one tile of keys.
#[cube(launch_unchecked)]
pub(super) fn key_kernel<E: Float, O: Float, R: Size>(
    tensors: &BackwardTensors<E, O>,
    rows: &[u32],
    list_counts: &[u32],
    sequences: &[u32],
    key_gradient: &mut [f32],
    value_gradient: &mut [f32],
    numbers: Numbers,
    unset: u32,
    #[comptime] blueprint: Blueprint,
    #[define(E, O)] _elements: [ElemType; 2],
    #[define(R)] _lanes: usize,
) {
    let lanes = comptime![blueprint.lanes];
    let key_len = (numbers.query_len as i32 + numbers.first_position) as u32;
    let tiles = key_len.div_ceil(comptime![lanes as u32]);
    let kv_head = ABSOLUTE_POS as u32 / tiles;
    if kv_head >= numbers.lists {
        terminate!();
    }
    let first = (ABSOLUTE_POS as u32 % tiles) * comptime![lanes as u32];
    let last = min(first + comptime![lanes as u32], key_len) - 1u32;
    let mut count = numbers.query_len * numbers.group;
    if comptime![blueprint.sight.routed] {
        count = list_counts[(numbers.reach * numbers.lists + kv_head) as usize];
    }
    let list = list_of(kv_head, count, &numbers);
    let entries = entries_that_see(
        &list,
        first as i32,
        last as i32,
        numbers.window,
        numbers.sinks,
        rows,
        sequences,
        false,
        blueprint.sight,
    );
    let batch = kv_head / numbers.kv_heads;
    let head = kv_head % numbers.kv_heads;
    let mut indices = Vector::<i32, R>::new(0i32);
    let mut key_offsets = Array::<usize>::new(lanes);
    let mut value_offsets = Array::<usize>::new(lanes);
    let mut key_sums = Array::<usize>::new(lanes);
    let mut value_sums = Array::<usize>::new(lanes);
    let mut written = Array::<bool>::new(lanes);
    #[unroll]
    for lane in 0..lanes {
        let token = min(first + comptime![lane as u32], last);
        written[lane] = first + comptime![lane as u32] <= last;
        indices.insert(lane, token as i32);
        key_offsets[lane] = offset(&tensors.layout.key, batch, head, token);
        value_offsets[lane] = offset(&tensors.layout.value, batch, head, token);
        key_sums[lane] = ((kv_head * key_len + token) * numbers.head_dim) as usize;
        value_sums[lane] = ((kv_head * key_len + token) * numbers.value_dim) as usize;
    }
    // The sums are added to memory below, all at once or block by block.
    if unset != 0u32 {
        clear_lanes(key_gradient, &key_sums, &written, numbers.head_dim, blueprint);
        clear_lanes(value_gradient, &value_sums, &written, numbers.value_dim, blueprint);
    }
    let mut keys = Keys::<R> {
        batch,
        kv_head: head,
        first: first as i32,
        last: last as i32,
        indices,
        key: tile_of::<E, R>(&tensors.key, key_offsets, numbers.head_dim, blueprint.head_room, blueprint),
        value: tile_of::<E, R>(
            &tensors.value,
            value_offsets,
            numbers.value_dim,
            blueprint.value_room,
            blueprint,
        ),
        key_sums: sums_at::<R>(key_sums, numbers.head_dim, blueprint.head_room, blueprint),
        value_sums: sums_at::<R>(value_sums, numbers.value_dim, blueprint.value_room, blueprint),
        written,
    };
    let mut at = entries.begin;
    while at < entries.end {
        let next = min(at + comptime![blueprint.block as u32], entries.end);
        fold::<E, O, R>(
            &mut keys,
            tensors,
            rows,
            sequences,
            key_gradient,
            value_gradient,
            &list,
            at,
            next,
            &numbers,
            blueprint,
        );
        at = next;
    }
    flush::<R>(&keys.key_sums, key_gradient, &keys.written, numbers.head_dim, blueprint);
    flush::<R>(&keys.value_sums, value_gradient, &keys.written, numbers.value_dim, blueprint);
}
