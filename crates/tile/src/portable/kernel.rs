//! The portable routine: one unit computes a tile of rows, one row per lane of a vector, so that softmax needs
//! no reduction across lanes and every key and value that is loaded serves all rows of the tile. It needs no
//! planes, no shared memory and no synchronisation, and runs on every runtime.

use cubecl::prelude::*;

use super::{
    Blueprint,
    numbers::{Numbers, offset},
    tile::{KeyRanges, Keys, bounds_at, gather, key_ranges, keys_of, rows_of, sees, slot_of},
};
use crate::{
    arguments::{ForwardTensors, Strides},
    rows::all_see,
    visibility::Bounds,
};

/// The running state of the online softmax of one tile.
#[derive(CubeType)]
struct Tile<R: Size> {
    /// Where each row's query begins.
    query_offsets: Array<usize>,
    /// Scaled queries, transposed: dimension by dimension, one lane per row; where they are staged.
    query: Array<Vector<f32, R>>,
    /// Unnormalised outputs, transposed likewise; arrays begin as zeros.
    out: Array<Vector<f32, R>>,
    /// Scores of a chunk of keys, then their weights; where queries are staged.
    weights: Array<Vector<f32, R>>,
    /// Maximum and sum of the softmax so far.
    maximum: Array<Vector<f32, R>>,
    sum: Array<Vector<f32, R>>,
    /// The bounds of each row; all first keys are 0 unless the batch is ragged.
    firsts: Vector<i32, R>,
    positions: Vector<i32, R>,
}

/// The scores of `key_block` keys from `first` on, for every row of the tile. Keys at `end` and beyond read the last
/// key again and score -inf, as do, with `masked`, keys that a row does not see.
#[cube]
fn score<E: Float, R: Size>(
    tile: &mut Tile<R>,
    tensors: &ForwardTensors<E>,
    keys: &Keys,
    first: i32,
    end: i32,
    numbers: &Numbers,
    #[comptime] masked: bool,
    #[comptime] blueprint: Blueprint,
) -> Array<Vector<f32, R>> {
    let key_block = comptime![blueprint.key_block];
    let mut scores = Array::<Vector<f32, R>>::new(key_block);
    let mut offsets = Array::<usize>::new(key_block);
    #[unroll]
    for x in 0..key_block {
        scores[x] = Vector::new(0.0f32);
        let j = min(first + comptime![x as i32], end - 1);
        offsets[x] = keys.key + j as usize * keys.key_stride;
    }
    for d in 0..numbers.head_dim as usize {
        let q = if comptime![blueprint.staged] {
            tile.query[d]
        } else {
            scaled::<E, R>(&tile.query_offsets, &tensors.query, d, numbers, blueprint)
        };
        #[unroll]
        for x in 0..key_block {
            let k = f32::cast_from(tensors.key[offsets[x] + d]);
            scores[x] = fma(q, Vector::new(k), scores[x]);
        }
    }
    let hidden = Vector::<f32, R>::new(numbers.neg_inf);
    #[unroll]
    for x in 0..key_block {
        let j = first + comptime![x as i32];
        if comptime![blueprint.softcap] {
            let cap = Vector::new(numbers.softcap);
            scores[x] = cap * (scores[x] / cap).tanh();
        }
        if comptime![masked] {
            let seen = sees::<R>(tile.firsts, tile.positions, Vector::new(j), numbers, blueprint.sight);
            scores[x] = select_many(seen, scores[x], hidden);
        }
        scores[x] = select(j < end, scores[x], hidden);
    }
    scores
}

/// Dimension `d` of the scaled queries, one lane per row.
#[cube]
fn scaled<E: Float, R: Size>(
    offsets: &Array<usize>,
    query: &[E],
    d: usize,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, R> {
    gather::<E, R>(offsets, query, d, blueprint.lanes) * Vector::new(numbers.scale)
}

/// Moves the running maximum up to `maximum` and returns what weights are relative to, and by how much what was
/// summed so far shrinks. A row that has seen no key keeps a finite offset, so that its weights become
/// exp(-inf) = 0.
#[cube]
fn raise<R: Size>(
    tile: &mut Tile<R>,
    maximum: Vector<f32, R>,
    numbers: &Numbers,
) -> (Vector<f32, R>, Vector<f32, R>) {
    let none = maximum.equal(&Vector::new(numbers.neg_inf));
    let offset = select_many(none, Vector::new(0.0f32), maximum);
    let correction = (tile.maximum[0] - offset).exp();
    tile.maximum[0] = maximum;
    (offset, correction)
}

/// Folds the keys `first..end`, at most a chunk of them, into the tile. With `masked`, rows see only the keys
/// that their position shows; a key that a row does not see cannot touch it, NaN or not.
#[cube]
fn fold_chunk<E: Float, R: Size>(
    tile: &mut Tile<R>,
    tensors: &ForwardTensors<E>,
    keys: &Keys,
    first: i32,
    end: i32,
    numbers: &Numbers,
    #[comptime] masked: bool,
    #[comptime] blueprint: Blueprint,
) {
    let key_block = comptime![blueprint.key_block];
    let dim_block = comptime![blueprint.dim_block];
    let length = (end - first) as usize;

    let mut maximum = tile.maximum[0];
    for block in 0..length.div_ceil(key_block) {
        let at = block * key_block;
        let from = first + at as i32;
        let scores = score::<E, R>(tile, tensors, keys, from, end, numbers, masked, blueprint);
        #[unroll]
        for x in 0..key_block {
            tile.weights[at + x] = scores[x];
            maximum = max(maximum, scores[x]);
        }
    }
    let (offset, correction) = raise::<R>(tile, maximum, numbers);
    let mut sum = tile.sum[0] * correction;
    for j in 0..length {
        let weight = (tile.weights[j] - offset).exp();
        tile.weights[j] = weight;
        sum += weight;
    }
    tile.sum[0] = sum;

    for block in 0..numbers.value_dim as usize / dim_block {
        let d = block * dim_block;
        let mut acc = Array::<Vector<f32, R>>::new(dim_block);
        #[unroll]
        for x in 0..dim_block {
            acc[x] = tile.out[d + x] * correction;
        }
        for j in 0..length {
            let weight = tile.weights[j];
            let row = keys.value + (first as usize + j) * keys.value_stride + d;
            if comptime![masked] {
                let j = first + j as i32;
                let seen = sees::<R>(tile.firsts, tile.positions, Vector::new(j), numbers, blueprint.sight);
                #[unroll]
                for x in 0..dim_block {
                    let v = Vector::<f32, R>::new(f32::cast_from(tensors.value[row + x]));
                    acc[x] = select_many(seen, fma(weight, v, acc[x]), acc[x]);
                }
            } else {
                #[unroll]
                for x in 0..dim_block {
                    let v = Vector::<f32, R>::new(f32::cast_from(tensors.value[row + x]));
                    acc[x] = fma(weight, v, acc[x]);
                }
            }
        }
        #[unroll]
        for x in 0..dim_block {
            tile.out[d + x] = acc[x];
        }
    }
}

/// [`fold_chunk`] where a chunk is one block of keys: weights stay in registers, and outputs are the only array
/// that is indexed at run time, once to read and once to write. Shader compilers that turn such an index into a
/// ladder of branches need it to be rare.
#[cube]
fn fold_block<E: Float, R: Size>(
    tile: &mut Tile<R>,
    tensors: &ForwardTensors<E>,
    keys: &Keys,
    first: i32,
    end: i32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let key_block = comptime![blueprint.key_block];
    let mut weights = score::<E, R>(tile, tensors, keys, first, end, numbers, true, blueprint);
    let mut maximum = tile.maximum[0];
    #[unroll]
    for x in 0..key_block {
        maximum = max(maximum, weights[x]);
    }
    let (offset, correction) = raise::<R>(tile, maximum, numbers);
    let mut sum = tile.sum[0] * correction;
    let mut rows = Array::<usize>::new(key_block);
    #[unroll]
    for x in 0..key_block {
        weights[x] = (weights[x] - offset).exp();
        sum += weights[x];
        let j = min(first + comptime![x as i32], end - 1);
        rows[x] = keys.value + j as usize * keys.value_stride;
    }
    tile.sum[0] = sum;
    for d in 0..numbers.value_dim as usize {
        let mut acc = tile.out[d] * correction;
        #[unroll]
        for x in 0..key_block {
            let j = first + comptime![x as i32];
            let seen = sees::<R>(
                tile.firsts,
                tile.positions,
                Vector::new(min(j, end - 1)),
                numbers,
                blueprint.sight,
            );
            let v = Vector::<f32, R>::new(f32::cast_from(tensors.value[rows[x] + d]));
            let sum = select_many(seen, fma(weights[x], v, acc), acc);
            acc = select(j < end, sum, acc);
        }
        tile.out[d] = acc;
    }
}

/// Folds keys into the tile, chunk by chunk; chunks that every row sees whole skip the mask.
#[cube]
fn fold<E: Float, R: Size>(
    tile: &mut Tile<R>,
    tensors: &ForwardTensors<E>,
    keys: &Keys,
    ranges: &KeyRanges,
    lowest: Bounds,
    highest: Bounds,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let mut at = ranges.start();
    while at < ranges.end {
        let next = ranges.until(at, blueprint.chunk);
        if comptime![blueprint.staged] {
            if all_see(lowest, highest, at, next - 1, numbers.window, numbers.sinks, blueprint.sight) {
                fold_chunk::<E, R>(tile, tensors, keys, at, next, numbers, false, blueprint);
            } else {
                fold_chunk::<E, R>(tile, tensors, keys, at, next, numbers, true, blueprint);
            }
        } else {
            fold_block::<E, R>(tile, tensors, keys, at, next, numbers, blueprint);
        }
        at = ranges.after(next);
    }
}

/// One unit, one part of an item: up to `lanes` rows of one kv head, packed over its query heads.
#[cube(launch_unchecked)]
pub(super) fn attend_kernel<E: Float, O: Float, R: Size>(
    tensors: &ForwardTensors<E>,
    rows: &[u32],
    items: &[u32],
    item_counts: &[u32],
    sequences: &[u32],
    out: &mut [O],
    lse: &mut [f32],
    out_strides: Strides,
    numbers: Numbers,
    #[comptime] blueprint: Blueprint,
    #[define(E, O)] _elements: [ElemType; 2],
    #[define(R)] _lanes: usize,
) {
    let lanes = comptime![blueprint.lanes];
    let slot = slot_of(items, item_counts, &numbers, blueprint.sight, lanes);
    if slot.count == 0u32 {
        terminate!();
    }
    let tile_rows = rows_of::<R>(&slot, rows, sequences, &numbers, blueprint.sight, lanes);
    let batch = tile_rows.batch;
    let kv_head = tile_rows.kv_head;
    let mut query_offsets = Array::<usize>::new(lanes);
    #[unroll]
    for lane in 0..lanes {
        query_offsets[lane] =
            offset(&tensors.layout.query, batch, tile_rows.heads[lane], tile_rows.tokens[lane]);
    }

    let staged = comptime![blueprint.staged];
    let mut tile = Tile::<R> {
        query_offsets,
        query: Array::new(comptime![if staged { blueprint.head_dim } else { 1 }]),
        out: Array::new(blueprint.value_dim),
        weights: Array::new(comptime![if staged { blueprint.chunk } else { 1 }]),
        maximum: Array::new(1usize),
        sum: Array::new(1usize),
        firsts: tile_rows.firsts,
        positions: tile_rows.positions,
    };
    if staged {
        for d in 0..numbers.head_dim as usize {
            tile.query[d] = scaled::<E, R>(&tile.query_offsets, &tensors.query, d, &numbers, blueprint);
        }
    }
    if comptime![blueprint.sink_logits] {
        // The sink logit is a key with a value of zero: it opens the running maximum and sum.
        let mut sink = Vector::<f32, R>::new(0.0f32);
        #[unroll]
        for lane in 0..lanes {
            sink.insert(lane, tensors.sink_logits[tile_rows.heads[lane] as usize]);
        }
        let absent = sink.equal(&Vector::new(numbers.neg_inf));
        tile.maximum[0] = sink;
        tile.sum[0] = select_many(absent, Vector::new(0.0f32), Vector::new(1.0f32));
    } else {
        tile.maximum[0] = Vector::new(numbers.neg_inf);
        tile.sum[0] = Vector::new(0.0f32);
    }

    let keys = keys_of(batch, kv_head, &tensors.layout, &numbers);
    let lowest = bounds_at::<R>(tile.firsts, tile.positions, 0usize);
    let highest = bounds_at::<R>(tile.firsts, tile.positions, comptime![lanes - 1]);
    let ranges = key_ranges(lowest, highest, &numbers, blueprint.sight.visibility);
    fold::<E, R>(&mut tile, tensors, &keys, &ranges, lowest, highest, &numbers, blueprint);

    // A row without keys has sum 0: its output is 0 and its log-sum-exp -inf.
    let sum = tile.sum[0];
    let empty = sum.equal(&Vector::new(0.0f32));
    let norm = select_many(empty, Vector::new(0.0f32), Vector::new(1.0f32) / sum);
    let log = select_many(empty, Vector::new(1.0f32), sum).ln();
    let log_sum_exp = select_many(empty, Vector::new(numbers.neg_inf), tile.maximum[0] + log);
    let mut out_offsets = Array::<usize>::new(lanes);
    #[unroll]
    for lane in 0..lanes {
        let token = tile_rows.tokens[lane];
        let head = tile_rows.heads[lane];
        out_offsets[lane] = offset(&out_strides, batch, head, token);
        if comptime![lane as u32] < slot.count {
            let row = (batch * numbers.kv_heads * numbers.group + head) * numbers.query_len + token;
            lse[row as usize] = select(tile_rows.invalid[lane], numbers.nan, log_sum_exp.extract(lane));
        }
    }
    for d in 0..numbers.value_dim as usize {
        let across = tile.out[d] * norm;
        #[unroll]
        for lane in 0..lanes {
            if comptime![lane as u32] < slot.count {
                let x = select(tile_rows.invalid[lane], numbers.nan, across.extract(lane));
                out[out_offsets[lane] + d] = O::cast_from(x);
            }
        }
    }
}
