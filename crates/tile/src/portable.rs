//! The portable routine: one unit computes a tile of rows, one row per lane of a vector, so that softmax needs
//! no reduction across lanes and every key and value that is loaded serves all rows of the tile. It needs no
//! planes, no shared memory and no synchronisation, and runs on every runtime.

use cubecl::prelude::*;

use crate::{Blueprint, visibility::Visibility};

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
    /// Position of the first query: key length - query length.
    pub(crate) first_position: i32,
    pub(crate) window: i32,
    pub(crate) sinks: i32,
    /// Items of one reach, at most.
    pub(crate) items: u32,
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

/// The running state of the online softmax of one tile.
#[derive(CubeType)]
struct Tile<R: Size> {
    /// Scaled queries, transposed: dimension by dimension, one lane per row.
    query: Array<Vector<f32, R>>,
    /// Unnormalised outputs, transposed likewise.
    out: Array<Vector<f32, R>>,
    /// Scores of a chunk of keys, then their weights.
    weights: Array<Vector<f32, R>>,
    /// Maximum and sum of the softmax so far.
    maximum: Array<Vector<f32, R>>,
    sum: Array<Vector<f32, R>>,
    positions: Vector<i32, R>,
}

#[cube]
fn sees<R: Size>(
    positions: Vector<i32, R>,
    key: i32,
    numbers: &Numbers,
    #[comptime] visibility: Visibility,
) -> Vector<bool, R> {
    let key = Vector::<i32, R>::new(key);
    let causal = key.less_equal(&positions);
    match visibility {
        Visibility::All => causal,
        Visibility::Window => {
            let start = positions - Vector::new(numbers.window);
            causal.vec_and(key.greater_than(&start))
        }
        Visibility::SinksAndWindow => {
            let start = positions - Vector::new(numbers.window);
            let near = key.greater_than(&start);
            causal.vec_and(near.or(key.less_than(&Vector::new(numbers.sinks))))
        }
        Visibility::Far => {
            let end = positions - Vector::new(numbers.window);
            let past = key.less_equal(&end);
            past.vec_and(key.greater_equal(&Vector::new(numbers.sinks)))
        }
    }
}

/// Folds the keys `first..end`, at most a chunk of them, into the tile. With `masked`, rows see only the keys
/// that their position shows; a key that a row does not see cannot touch it, NaN or not.
#[cube]
fn fold_chunk<E: Float, R: Size>(
    tile: &mut Tile<R>,
    key: &[E],
    value: &[E],
    key_base: usize,
    value_base: usize,
    key_stride: usize,
    value_stride: usize,
    first: i32,
    end: i32,
    numbers: &Numbers,
    #[comptime] masked: bool,
    #[comptime] blueprint: Blueprint,
) {
    let key_block = comptime![blueprint.key_block];
    let dim_block = comptime![blueprint.dim_block];
    let length = (end - first) as usize;
    let blocks = length.div_ceil(key_block);

    let before = tile.maximum[0];
    let mut maximum = before;
    for block in 0..blocks {
        let mut scores = Array::<Vector<f32, R>>::new(key_block);
        let mut offsets = Array::<usize>::new(key_block);
        #[unroll]
        for x in 0..key_block {
            scores[x] = Vector::new(0.0f32);
            // Past the end the last key is read again and its score thrown away.
            let j = min(block * key_block + x, length - 1);
            offsets[x] = key_base + (first as usize + j) * key_stride;
        }
        for d in 0..blueprint.head_dim {
            let query = tile.query[d];
            #[unroll]
            for x in 0..key_block {
                let k = f32::cast_from(key[offsets[x] + d]);
                scores[x] = fma(query, Vector::new(k), scores[x]);
            }
        }
        #[unroll]
        for x in 0..key_block {
            let j = block * key_block + x;
            let mut score = scores[x];
            if comptime![blueprint.softcap] {
                let cap = Vector::new(numbers.softcap);
                score = cap * (score / cap).tanh();
            }
            let hidden = Vector::<f32, R>::new(numbers.neg_inf);
            if comptime![masked] {
                let seen = sees::<R>(tile.positions, first + j as i32, numbers, blueprint.visibility);
                score = select_many(seen, score, hidden);
            }
            if j < length {
                tile.weights[j] = score;
                maximum = max(maximum, score);
            }
        }
    }

    // A row that has seen no key keeps a finite offset, so that its weights become exp(-inf) = 0.
    let none = maximum.equal(&Vector::new(numbers.neg_inf));
    let offset = select_many(none, Vector::new(0.0f32), maximum);
    let correction = (before - offset).exp();
    let mut sum = tile.sum[0] * correction;
    for j in 0..length {
        let weight = (tile.weights[j] - offset).exp();
        tile.weights[j] = weight;
        sum += weight;
    }
    tile.maximum[0] = maximum;
    tile.sum[0] = sum;

    for block in 0..comptime![blueprint.value_dim / dim_block] {
        let d = block * dim_block;
        let mut acc = Array::<Vector<f32, R>>::new(dim_block);
        #[unroll]
        for x in 0..dim_block {
            acc[x] = tile.out[d + x] * correction;
        }
        for j in 0..length {
            let weight = tile.weights[j];
            let row = value_base + (first as usize + j) * value_stride + d;
            let seen = sees::<R>(tile.positions, first + j as i32, numbers, blueprint.visibility);
            #[unroll]
            for x in 0..dim_block {
                let v = Vector::<f32, R>::new(f32::cast_from(value[row + x]));
                let sum = fma(weight, v, acc[x]);
                if comptime![masked] {
                    acc[x] = select_many(seen, sum, acc[x]);
                } else {
                    acc[x] = sum;
                }
            }
        }
        #[unroll]
        for x in 0..dim_block {
            tile.out[d + x] = acc[x];
        }
    }
}

/// Folds the keys `begin..end` into the tile, chunk by chunk; chunks that every row sees whole skip the mask.
#[cube]
fn fold<E: Float, R: Size>(
    tile: &mut Tile<R>,
    key: &[E],
    value: &[E],
    key_base: usize,
    value_base: usize,
    key_stride: usize,
    value_stride: usize,
    begin: i32,
    end: i32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let first_position = tile.positions.extract(0usize);
    let last_position = tile.positions.extract(comptime![blueprint.lanes - 1]);
    let mut at = begin;
    while at < end {
        let next = min(at + comptime![blueprint.chunk as i32], end);
        let unmasked = match blueprint.visibility {
            Visibility::All => next <= first_position + 1,
            Visibility::Window => next <= first_position + 1 && at > last_position - numbers.window,
            Visibility::SinksAndWindow => {
                next <= first_position + 1
                    && (next <= numbers.sinks || at > last_position - numbers.window)
            }
            Visibility::Far => next <= first_position - numbers.window + 1,
        };
        if unmasked {
            fold_chunk::<E, R>(
                tile, key, value, key_base, value_base, key_stride, value_stride, at, next, numbers, false,
                blueprint,
            );
        } else {
            fold_chunk::<E, R>(
                tile, key, value, key_base, value_base, key_stride, value_stride, at, next, numbers, true,
                blueprint,
            );
        }
        at = next;
    }
}

/// One unit, one item: up to `lanes` rows of one kv head, packed over its query heads.
#[cube(launch_unchecked)]
pub(crate) fn attend_kernel<E: Float, O: Float, R: Size>(
    query: &[E],
    key: &[E],
    value: &[E],
    sink_logits: &[f32],
    rows: &[u32],
    items: &[u32],
    item_counts: &[u32],
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
    if ABSOLUTE_POS >= count as usize {
        terminate!();
    }

    let tiles = packed.div_ceil(comptime![lanes as u32]);
    let mut kv_head = ABSOLUTE_POS as u32 / tiles;
    let mut first_row = (ABSOLUTE_POS as u32 % tiles) * comptime![lanes as u32];
    let mut row_count = min(packed - first_row, comptime![lanes as u32]);
    if comptime![blueprint.routed] {
        let item = (numbers.reach * numbers.items) as usize + ABSOLUTE_POS;
        kv_head = items[item * 3];
        first_row = items[item * 3 + 1];
        row_count = items[item * 3 + 2];
    }
    let batch = kv_head / numbers.kv_heads;
    let kv_head_in_batch = kv_head % numbers.kv_heads;

    // Which rows: an item that is not full repeats its last row in the lanes that are left.
    let mut tokens = Array::<u32>::new(lanes);
    let mut heads = Array::<u32>::new(lanes);
    let mut invalid = Array::<bool>::new(lanes);
    let mut query_offsets = Array::<usize>::new(lanes);
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
        query_offsets[lane] = (batch * query_strides.batch
            + head * query_strides.head
            + token * query_strides.token) as usize;
        positions.insert(lane, token as i32 + numbers.first_position);
    }

    let mut tile = Tile::<R> {
        query: Array::new(blueprint.head_dim),
        out: Array::new(blueprint.value_dim),
        weights: Array::new(blueprint.chunk),
        maximum: Array::new(1usize),
        sum: Array::new(1usize),
        positions,
    };
    for d in 0..blueprint.head_dim {
        let mut across = Vector::<f32, R>::new(0.0f32);
        #[unroll]
        for lane in 0..lanes {
            across.insert(lane, f32::cast_from(query[query_offsets[lane] + d]) * numbers.scale);
        }
        tile.query[d] = across;
    }
    for d in 0..blueprint.value_dim {
        tile.out[d] = Vector::new(0.0f32);
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

    // Which keys: one range, or two where sinks and window are apart.
    let first_position = tile.positions.extract(0usize);
    let last_position = tile.positions.extract(comptime![lanes - 1]);
    let key_base = (batch * key_strides.batch + kv_head_in_batch * key_strides.head) as usize;
    let value_base = (batch * value_strides.batch + kv_head_in_batch * value_strides.head) as usize;
    let key_stride = key_strides.token as usize;
    let value_stride = value_strides.token as usize;
    let mut end = last_position + 1;
    let mut begin = 0i32;
    if comptime![blueprint.visibility == Visibility::Far] {
        end = last_position - numbers.window + 1;
        begin = numbers.sinks;
    }
    if comptime![blueprint.visibility == Visibility::Window] {
        begin = max(first_position - numbers.window + 1, 0i32);
    }
    if comptime![blueprint.visibility == Visibility::SinksAndWindow] {
        let sinks_end = min(numbers.sinks, end);
        fold::<E, R>(
            &mut tile, key, value, key_base, value_base, key_stride, value_stride, 0i32, sinks_end,
            &numbers, blueprint,
        );
        begin = max(first_position - numbers.window + 1, max(sinks_end, 0i32));
    }
    fold::<E, R>(
        &mut tile, key, value, key_base, value_base, key_stride, value_stride, begin, end, &numbers,
        blueprint,
    );

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
        out_offsets[lane] = (batch * out_strides.batch
            + head * out_strides.head
            + token * out_strides.token) as usize;
        if comptime![lane as u32] < row_count {
            let row = (batch * numbers.kv_heads * numbers.group + head) * numbers.query_len + token;
            lse[row as usize] = select(invalid[lane], numbers.nan, log_sum_exp.extract(lane));
        }
    }
    for d in 0..blueprint.value_dim {
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
