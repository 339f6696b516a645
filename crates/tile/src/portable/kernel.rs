//! The portable routine: one unit computes a tile of rows, one row per lane of a vector, so that softmax needs
//! no reduction across lanes and every key and value that is loaded serves all rows of the tile. It needs no
//! planes, no shared memory and no synchronisation, and runs on every runtime.

use cubecl::prelude::*;

use super::Blueprint;
use crate::visibility::{Visibility, bounds_of};

/// The bit that marks a row without a valid route.
pub(crate) const INVALID_ROW: u32 = 1 << 31;

/// Strides of a `[batch, head, token, dim]` tensor, in elements; the last is 1.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Strides {
    pub(crate) batch: u32,
    pub(crate) head: u32,
    pub(crate) token: u32,
}

/// The run-time numbers of a problem.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Numbers {
    pub(crate) kv_heads: u32,
    pub(crate) group: u32,
    pub(crate) query_len: u32,
    /// Head and value dim, once more than in the blueprint: a compiler that knows how often a loop runs unrolls it
    /// whole, and then takes seconds.
    pub(crate) head_dim: u32,
    pub(crate) value_dim: u32,
    /// Position of the first query: key length - query length.
    pub(crate) first_position: i32,
    pub(crate) window: i32,
    pub(crate) sinks: i32,
    /// Items of one reach, at most.
    pub(crate) items: u32,
    /// Units that share an item.
    pub(crate) parts: u32,
    /// The reach whose lists are computed.
    pub(crate) reach: u32,
    /// Batch x kv heads.
    pub(crate) lists: u32,
    pub(crate) scale: f32,
    pub(crate) softcap: f32,
    /// Not every shader language can write these two as literals.
    pub(crate) neg_inf: f32,
    pub(crate) nan: f32,
}

/// Where the keys and values of a tile begin, and how far apart they are, in elements.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Keys {
    key: usize,
    value: usize,
    key_stride: usize,
    value_stride: usize,
}

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

#[cube]
fn sees<R: Size>(
    firsts: Vector<i32, R>,
    positions: Vector<i32, R>,
    key: i32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<bool, R> {
    let key = Vector::<i32, R>::new(key);
    let past = key.less_equal(&positions);
    let sinks = Vector::<i32, R>::new(numbers.sinks);
    let ragged = comptime![blueprint.ragged];
    let causal = if ragged { past.vec_and(key.greater_equal(&firsts)) } else { past };
    let sinks_end = if ragged { firsts + sinks } else { sinks };
    match blueprint.visibility {
        Visibility::All | Visibility::NonCausal => causal,
        Visibility::Window => {
            let start = positions - Vector::new(numbers.window);
            causal.vec_and(key.greater_than(&start))
        }
        Visibility::SinksAndWindow => {
            let start = positions - Vector::new(numbers.window);
            let near = key.greater_than(&start);
            causal.vec_and(near.or(key.less_than(&sinks_end)))
        }
        Visibility::Far => {
            let end = positions - Vector::new(numbers.window);
            let past = key.less_equal(&end);
            past.vec_and(key.greater_equal(&sinks_end))
        }
    }
}

/// The scores of `key_block` keys from `first` on, for every row of the tile. Keys at `end` and beyond read the last
/// key again and score -inf, as do, with `masked`, keys that a row does not see.
#[cube]
fn score<E: Float, R: Size>(
    tile: &mut Tile<R>,
    query: &[E],
    key: &[E],
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
            gather::<E, R>(&tile.query_offsets, query, d, numbers, blueprint)
        };
        #[unroll]
        for x in 0..key_block {
            let k = f32::cast_from(key[offsets[x] + d]);
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
            let seen = sees::<R>(tile.firsts, tile.positions, j, numbers, blueprint);
            scores[x] = select_many(seen, scores[x], hidden);
        }
        scores[x] = select(j < end, scores[x], hidden);
    }
    scores
}

/// Dimension `d` of the scaled queries that begin at `offsets`, one lane per row.
#[cube]
fn gather<E: Float, R: Size>(
    offsets: &Array<usize>,
    query: &[E],
    d: usize,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, R> {
    let mut across = Vector::<f32, R>::new(0.0f32);
    #[unroll]
    for lane in 0..blueprint.lanes {
        across.insert(lane, f32::cast_from(query[offsets[lane] + d]) * numbers.scale);
    }
    across
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
    query: &[E],
    key: &[E],
    value: &[E],
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
        let scores = score::<E, R>(tile, query, key, keys, from, end, numbers, masked, blueprint);
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
                let seen = sees::<R>(tile.firsts, tile.positions, j, numbers, blueprint);
                #[unroll]
                for x in 0..dim_block {
                    let v = Vector::<f32, R>::new(f32::cast_from(value[row + x]));
                    acc[x] = select_many(seen, fma(weight, v, acc[x]), acc[x]);
                }
            } else {
                #[unroll]
                for x in 0..dim_block {
                    let v = Vector::<f32, R>::new(f32::cast_from(value[row + x]));
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
    query: &[E],
    key: &[E],
    value: &[E],
    keys: &Keys,
    first: i32,
    end: i32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let key_block = comptime![blueprint.key_block];
    let mut weights = score::<E, R>(tile, query, key, keys, first, end, numbers, true, blueprint);
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
            let seen = sees::<R>(tile.firsts, tile.positions, min(j, end - 1), numbers, blueprint);
            let v = Vector::<f32, R>::new(f32::cast_from(value[rows[x] + d]));
            let sum = select_many(seen, fma(weights[x], v, acc), acc);
            acc = select(j < end, sum, acc);
        }
        tile.out[d] = acc;
    }
}

/// Folds the keys `sinks_begin..sinks_end` and `begin..end` into the tile, chunk by chunk; chunks that every row sees
/// whole skip the mask.
#[cube]
fn fold<E: Float, R: Size>(
    tile: &mut Tile<R>,
    query: &[E],
    key: &[E],
    value: &[E],
    keys: &Keys,
    sinks_begin: i32,
    sinks_end: i32,
    begin: i32,
    end: i32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let first_position = tile.positions.extract(0usize);
    let last_position = tile.positions.extract(comptime![blueprint.lanes - 1]);
    // Every row's sequence has begun, and no row's has ended, between these two.
    let last_first = tile.firsts.extract(comptime![blueprint.lanes - 1]);
    let sinks_seen = tile.firsts.extract(0usize) + numbers.sinks;
    let mut at = select(sinks_end > sinks_begin, sinks_begin, begin);
    while at < end {
        let range_end = select(at < sinks_end, sinks_end, end);
        let next = min(at + comptime![blueprint.chunk as i32], range_end);
        if comptime![blueprint.staged] {
            let mut unmasked = match blueprint.visibility {
                Visibility::All | Visibility::NonCausal => next <= first_position + 1,
                Visibility::Window => next <= first_position + 1 && at > last_position - numbers.window,
                Visibility::SinksAndWindow => {
                    next <= first_position + 1 && (next <= sinks_seen || at > last_position - numbers.window)
                }
                Visibility::Far => next <= first_position - numbers.window + 1,
            };
            if comptime![blueprint.ragged && blueprint.visibility == Visibility::Far] {
                unmasked = unmasked && at >= last_first + numbers.sinks;
            } else if comptime![blueprint.ragged] {
                unmasked = unmasked && at >= last_first;
            }
            if unmasked {
                fold_chunk::<E, R>(tile, query, key, value, keys, at, next, numbers, false, blueprint);
            } else {
                fold_chunk::<E, R>(tile, query, key, value, keys, at, next, numbers, true, blueprint);
            }
        } else {
            fold_block::<E, R>(tile, query, key, value, keys, at, next, numbers, blueprint);
        }
        at = select(next == sinks_end, begin, next);
    }
}

/// One unit, one part of an item: up to `lanes` rows of one kv head, packed over its query heads.
#[cube(launch_unchecked)]
pub(crate) fn attend_kernel<E: Float, O: Float, R: Size>(
    query: &[E],
    key: &[E],
    value: &[E],
    sink_logits: &[f32],
    rows: &[u32],
    items: &[u32],
    item_counts: &[u32],
    sequences: &[u32],
    out: &mut [O],
    lse: &mut [f32],
    query_strides: Strides,
    key_strides: Strides,
    value_strides: Strides,
    out_strides: Strides,
    numbers: Numbers,
    #[comptime] blueprint: Blueprint,
    #[define(E, O)] _elements: [ElemType; 2],
    #[define(R)] _lanes: usize,
) {
    let lanes = comptime![blueprint.lanes];
    let packed = numbers.query_len * numbers.group;
    let mut count = numbers.items;
    if comptime![blueprint.routed] {
        count = item_counts[numbers.reach as usize];
    }
    let slot = ABSOLUTE_POS as u32 / numbers.parts;
    if slot >= count {
        terminate!();
    }

    let tiles = packed.div_ceil(comptime![lanes as u32]);
    let mut kv_head = slot / tiles;
    let mut first_row = (slot % tiles) * comptime![lanes as u32];
    let mut row_count = min(packed - first_row, comptime![lanes as u32]);
    if comptime![blueprint.routed] {
        let item = (numbers.reach * numbers.items + slot) as usize;
        let before = (ABSOLUTE_POS as u32 % numbers.parts) * comptime![lanes as u32];
        let rows_in_item = items[item * 3 + 2];
        if before >= rows_in_item {
            terminate!();
        }
        kv_head = items[item * 3];
        first_row = items[item * 3 + 1] + before;
        row_count = min(rows_in_item - before, comptime![lanes as u32]);
    }
    let batch = kv_head / numbers.kv_heads;
    let kv_head_in_batch = kv_head % numbers.kv_heads;

    // Which rows: an item that is not full repeats its last row in the lanes that are left.
    let mut tokens = Array::<u32>::new(lanes);
    let mut heads = Array::<u32>::new(lanes);
    let mut invalid = Array::<bool>::new(lanes);
    let mut query_offsets = Array::<usize>::new(lanes);
    let mut firsts = Vector::<i32, R>::new(0i32);
    let mut positions = Vector::<i32, R>::new(0i32);
    #[unroll]
    for lane in 0..lanes {
        let entry = first_row + min(comptime![lane as u32], row_count - 1);
        let mut row = entry;
        if comptime![blueprint.routed] {
            row = rows[((numbers.reach * numbers.lists + kv_head) * packed + entry) as usize];
        }
        invalid[lane] = row >= INVALID_ROW;
        let row = row % INVALID_ROW;
        let token = row / numbers.group;
        let head = kv_head_in_batch * numbers.group + row % numbers.group;
        tokens[lane] = token;
        heads[lane] = head;
        query_offsets[lane] =
            (batch * query_strides.batch + head * query_strides.head + token * query_strides.token) as usize;
        let bounds = bounds_of(
            token,
            numbers.query_len,
            numbers.first_position,
            sequences,
            blueprint.visibility,
            blueprint.ragged,
        );
        firsts.insert(lane, bounds.first);
        positions.insert(lane, bounds.position);
    }

    let staged = comptime![blueprint.staged];
    let mut tile = Tile::<R> {
        query_offsets,
        query: Array::new(comptime![if staged { blueprint.head_dim } else { 1 }]),
        out: Array::new(blueprint.value_dim),
        weights: Array::new(comptime![if staged { blueprint.chunk } else { 1 }]),
        maximum: Array::new(1usize),
        sum: Array::new(1usize),
        firsts,
        positions,
    };
    if staged {
        for d in 0..numbers.head_dim as usize {
            tile.query[d] = gather::<E, R>(&tile.query_offsets, query, d, &numbers, blueprint);
        }
    }
    if comptime![blueprint.sink_logits] {
        // The sink logit is a key with a value of zero: it opens the running maximum and sum.
        let mut sink = Vector::<f32, R>::new(0.0f32);
        #[unroll]
        for lane in 0..lanes {
            sink.insert(lane, sink_logits[heads[lane] as usize]);
        }
        let absent = sink.equal(&Vector::new(numbers.neg_inf));
        tile.maximum[0] = sink;
        tile.sum[0] = select_many(absent, Vector::new(0.0f32), Vector::new(1.0f32));
    } else {
        tile.maximum[0] = Vector::new(numbers.neg_inf);
        tile.sum[0] = Vector::new(0.0f32);
    }

    // Which keys: one range, or two where sinks and window are apart. Bounds ascend, so those of the first and the last
    // row enclose what the rows between them see, across sequences too.
    let first_key = tile.firsts.extract(0usize);
    let first_position = tile.positions.extract(0usize);
    let last_position = tile.positions.extract(comptime![lanes - 1]);
    // Assigned under a condition, so that compilers keep the two as values: left as expressions, their divisions are
    // computed again for every key and dimension (half of the time on the CPU runtime).
    let mut key_base = 0u32;
    let mut value_base = 0u32;
    if row_count > 0u32 {
        key_base = batch * key_strides.batch + kv_head_in_batch * key_strides.head;
        value_base = batch * value_strides.batch + kv_head_in_batch * value_strides.head;
    }
    let keys = Keys {
        key: key_base as usize,
        value: value_base as usize,
        key_stride: key_strides.token as usize,
        value_stride: value_strides.token as usize,
    };
    let mut sinks_end = first_key;
    let mut begin = first_key;
    let mut end = last_position + 1;
    if comptime![blueprint.visibility == Visibility::Far] {
        begin = first_key + numbers.sinks;
        end = last_position - numbers.window + 1;
    }
    if comptime![blueprint.visibility == Visibility::Window] {
        begin = max(first_position - numbers.window + 1, first_key);
    }
    if comptime![blueprint.visibility == Visibility::SinksAndWindow] {
        sinks_end = max(min(first_key + numbers.sinks, end), first_key);
        begin = max(first_position - numbers.window + 1, sinks_end);
    }
    fold::<E, R>(&mut tile, query, key, value, &keys, first_key, sinks_end, begin, end, &numbers, blueprint);

    // A row without keys has sum 0: its output is 0 and its log-sum-exp -inf.
    let sum = tile.sum[0];
    let empty = sum.equal(&Vector::new(0.0f32));
    let norm = select_many(empty, Vector::new(0.0f32), Vector::new(1.0f32) / sum);
    let log = select_many(empty, Vector::new(1.0f32), sum).ln();
    let log_sum_exp = select_many(empty, Vector::new(numbers.neg_inf), tile.maximum[0] + log);
    let mut out_offsets = Array::<usize>::new(lanes);
    #[unroll]
    for lane in 0..lanes {
        let token = tokens[lane];
        let head = heads[lane];
        out_offsets[lane] =
            (batch * out_strides.batch + head * out_strides.head + token * out_strides.token) as usize;
        if comptime![lane as u32] < row_count {
            let row = (batch * numbers.kv_heads * numbers.group + head) * numbers.query_len + token;
            lse[row as usize] = select(invalid[lane], numbers.nan, log_sum_exp.extract(lane));
        }
    }
    for d in 0..numbers.value_dim as usize {
        let across = tile.out[d] * norm;
        #[unroll]
        for lane in 0..lanes {
            if comptime![lane as u32] < row_count {
                let x = select(invalid[lane], numbers.nan, across.extract(lane));
                out[out_offsets[lane] + d] = O::cast_from(x);
            }
        }
    }
}
