//! The criterion: how much mass the bulk of a row is predicted to hold, and what follows.

// In a kernel `%` is one instruction; comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_core::device::{INVALID_ROUTE, SPAN};
use cubecl::prelude::*;

use crate::{
    launch::{Strides, count_routes, offset},
    moments::Covariance,
};

/// Where moments come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Source {
    /// They are those of each row's own bulk: of its whole chunks, and of the keys that are left one by one.
    Bulk,
    /// They are given, for all rows alike.
    Given,
    /// They are in a cache, but for those of the last keys of each bulk.
    Summaries,
}

/// The compile-time key of the prediction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Blueprint {
    pub(super) covariance: Covariance,
    pub(super) source: Source,
    pub(super) head_dim: usize,
    /// Rows per unit, one per lane of a vector.
    pub(super) lanes: usize,
    /// Channels or keys that are summed up side by side; divides the head dim.
    pub(super) block: usize,
    /// Queries are staged in private memory, which some shader compilers turn into ladders.
    pub(super) staged: bool,
}

#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Numbers {
    pub(super) lists: u32,
    pub(super) kv_heads: u32,
    pub(super) group: u32,
    pub(super) query_len: u32,
    /// Once more than in the blueprint: a compiler that knows how often a loop runs unrolls it whole.
    pub(super) head_dim: u32,
    /// Keys in the bulk of token 0, less than none where it has none and other tokens may have.
    pub(super) bulk: i32,
    pub(super) sinks: u32,
    /// Keys per chunk, and slots per list.
    pub(super) chunk: u32,
    pub(super) slots: u32,
    /// Lists that moments are given for, and their number of keys.
    pub(super) given_lists: u32,
    pub(super) given_keys: f32,
    /// Rows of a scatter.
    pub(super) scatter_rows: u32,
    pub(super) scale: f32,
    pub(super) neg_inf: f32,
}

/// The queries of a tile.
#[derive(CubeType)]
struct Queries<R: Size> {
    offsets: Array<usize>,
    staged: Array<Vector<f32, R>>,
}

/// Channel `d` of the scaled queries, one lane per row.
#[cube]
fn channel<E: Float, R: Size>(
    queries: &Queries<R>,
    query: &[E],
    d: usize,
    scale: f32,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, R> {
    if comptime![blueprint.staged] {
        queries.staged[d]
    } else {
        gather::<E, R>(&queries.offsets, query, d, scale, blueprint.lanes)
    }
}

#[cube]
fn gather<E: Float, R: Size>(
    offsets: &Array<usize>,
    query: &[E],
    d: usize,
    scale: f32,
    #[comptime] lanes: usize,
) -> Vector<f32, R> {
    let mut values = Vector::<f32, R>::new(0.0f32);
    #[unroll]
    for lane in 0..lanes {
        values.insert(lane, f32::cast_from(query[offsets[lane] + d]));
    }
    values * Vector::new(scale)
}

/// `q^T S q` of every row, with the scatter S that begins at `scatter`: all of it, its diagonal, or that of what a low rank
/// leaves and then the rows that are its factor.
#[cube]
fn quadratic<E: Float, R: Size>(
    queries: &Queries<R>,
    query: &[E],
    scatters: &[f32],
    scatter: usize,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, R> {
    let block = comptime![blueprint.block];
    let dim = numbers.head_dim as usize;
    let mut total = Vector::<f32, R>::new(0.0f32);
    if comptime![blueprint.covariance == Covariance::Full] {
        for at in 0..dim / block {
            let first = at * block;
            let mut sums = Array::<Vector<f32, R>>::new(block);
            #[unroll]
            for x in 0..block {
                sums[x] = Vector::new(0.0f32);
            }
            for d in 0..dim {
                let q = channel::<E, R>(queries, query, d, numbers.scale, blueprint);
                // S is symmetric: its row is its column.
                let row = scatter + d * dim + first;
                #[unroll]
                for x in 0..block {
                    sums[x] = fma(q, Vector::new(scatters[row + x]), sums[x]);
                }
            }
            #[unroll]
            for x in 0..block {
                let q = channel::<E, R>(queries, query, first + x, numbers.scale, blueprint);
                total = fma(sums[x], q, total);
            }
        }
    } else {
        for d in 0..dim {
            let q = channel::<E, R>(queries, query, d, numbers.scale, blueprint);
            total = fma(q * q, Vector::new(scatters[scatter + d]), total);
        }
    }
    if comptime![matches!(blueprint.covariance, Covariance::LowRank { .. })] {
        for row in 1usize..numbers.scatter_rows as usize {
            let mut along = Vector::<f32, R>::new(0.0f32);
            for d in 0..dim {
                let q = channel::<E, R>(queries, query, d, numbers.scale, blueprint);
                along = fma(q, Vector::new(scatters[scatter + row * dim + d]), along);
            }
            total = fma(along, along, total);
        }
    }
    total
}

/// What the keys that are left add to scores and their squares, all relative to a mean key.
#[derive(CubeType)]
struct LeftOver<R: Size> {
    /// The sum of `q . (k - mean)`.
    sum: Vector<f32, R>,
    /// The sum of its squares; over channels one by one where only the diagonal counts, less what their means take away.
    squares: Vector<f32, R>,
}

/// The keys `first..end`, of which each row counts those before its own `limits`. `keys` is where the keys of the list begin,
/// `mean` where the mean key does, and `counts` how many keys each row's bulk has.
#[cube]
fn left_over<E: Float, R: Size>(
    queries: &Queries<R>,
    query: &[E],
    key: &[E],
    means: &[f32],
    keys: usize,
    key_stride: usize,
    mean: usize,
    first: u32,
    end: u32,
    limits: Vector<i32, R>,
    counts: Vector<f32, R>,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> LeftOver<R> {
    let block = comptime![blueprint.block];
    let dim = numbers.head_dim as usize;
    let zero = Vector::<f32, R>::new(0.0f32);
    let mut sum = Vector::<f32, R>::new(0.0f32);
    let mut squares = Vector::<f32, R>::new(0.0f32);
    if comptime![blueprint.covariance == Covariance::Full] {
        let mut j = first;
        while j < end {
            let mut scores = Array::<Vector<f32, R>>::new(block);
            let mut offsets = Array::<usize>::new(block);
            #[unroll]
            for x in 0..block {
                scores[x] = Vector::new(0.0f32);
                offsets[x] = keys + min(j + comptime![x as u32], end - 1u32) as usize * key_stride;
            }
            for d in 0..dim {
                let q = channel::<E, R>(queries, query, d, numbers.scale, blueprint);
                let m = means[mean + d];
                #[unroll]
                for x in 0..block {
                    let k = f32::cast_from(key[offsets[x] + d]) - m;
                    scores[x] = fma(q, Vector::new(k), scores[x]);
                }
            }
            #[unroll]
            for x in 0..block {
                let counted = limits.greater_than(&Vector::new(j as i32 + comptime![x as i32]));
                let score = select_many(counted, scores[x], zero);
                sum += score;
                squares = fma(score, score, squares);
            }
            j += comptime![block as u32];
        }
        squares -= sum * sum / counts;
    } else {
        for at in 0..dim / block {
            let channels = at * block;
            let mut sums = Array::<Vector<f32, R>>::new(block);
            let mut squares_of = Array::<Vector<f32, R>>::new(block);
            #[unroll]
            for x in 0..block {
                sums[x] = Vector::new(0.0f32);
                squares_of[x] = Vector::new(0.0f32);
            }
            for j in first..end {
                let counted = limits.greater_than(&Vector::new(j as i32));
                let this = keys + j as usize * key_stride + channels;
                #[unroll]
                for x in 0..block {
                    let k = f32::cast_from(key[this + x]) - means[mean + channels + x];
                    let k = select_many(counted, Vector::new(k), zero);
                    sums[x] += k;
                    squares_of[x] = fma(k, k, squares_of[x]);
                }
            }
            #[unroll]
            for x in 0..block {
                let q = channel::<E, R>(queries, query, channels + x, numbers.scale, blueprint);
                sum = fma(q, sums[x], sum);
                let about = squares_of[x] - sums[x] * sums[x] / counts;
                squares = fma(q * q, about, squares);
            }
        }
    }
    LeftOver::<R> { sum, squares }
}

/// One unit, up to `lanes` rows of one kv head, packed over its query heads: the predicted logarithm of each bulk's mass.
#[cube(launch_unchecked)]
pub(super) fn predict_kernel<E: Float, R: Size>(
    query: &[E],
    key: &[E],
    means: &[f32],
    scatters: &[f32],
    spans: &[u32],
    predicted: &mut [f32],
    query_strides: Strides,
    key_strides: Strides,
    numbers: Numbers,
    #[comptime] blueprint: Blueprint,
    #[define(E)] _element: ElemType,
    #[define(R)] _lanes: usize,
) {
    let lanes = comptime![blueprint.lanes];
    let packed = numbers.query_len * numbers.group;
    let tiles = packed.div_ceil(comptime![lanes as u32]);
    if ABSOLUTE_POS >= (numbers.lists * tiles) as usize {
        terminate!();
    }
    let list = ABSOLUTE_POS as u32 / tiles;
    let first_row = (ABSOLUTE_POS as u32 % tiles) * comptime![lanes as u32];
    let batch = list / numbers.kv_heads;
    let kv_head = list % numbers.kv_heads;
    // Keys in the bulk of token 0; in a cache, and of those how many are summed up.
    let mut of_first = numbers.bulk;
    let mut summed_up = 0u32;
    if comptime![blueprint.source == Source::Summaries] {
        let span = batch as usize * comptime![SPAN];
        summed_up = spans[span + 1];
        of_first = (summed_up + spans[span + 2]) as i32 - (numbers.query_len as i32 - 1i32);
    }
    let mut rows = Array::<u32>::new(lanes);
    let mut queries = Queries::<R> {
        offsets: Array::new(lanes),
        staged: Array::new(comptime![if blueprint.staged { blueprint.head_dim } else { 1 }]),
    };
    let mut bulk = Vector::<i32, R>::new(0i32);
    let mut counts = Vector::<f32, R>::new(0.0f32);
    #[unroll]
    for lane in 0..lanes {
        // Lanes that are left repeat the last row.
        let row = min(first_row + comptime![lane as u32], packed - 1u32);
        let token = row / numbers.group;
        let head = kv_head * numbers.group + row % numbers.group;
        rows[lane] = (batch * numbers.kv_heads * numbers.group + head) * numbers.query_len + token;
        queries.offsets[lane] = offset(&query_strides, batch, head, token);
        let keys = max(token as i32 + of_first, 0i32);
        bulk.insert(lane, keys);
        counts.insert(lane, f32::cast_from(max(keys, 1i32)));
    }
    if comptime![blueprint.staged] {
        for d in 0..numbers.head_dim as usize {
            let q = gather::<E, R>(&queries.offsets, query, d, numbers.scale, lanes);
            queries.staged[d] = q;
        }
    }

    // Tokens ascend from lane to lane, and bulks with them.
    let least = bulk.extract(0usize) as u32;
    let most = bulk.extract(comptime![lanes - 1]) as u32;
    let dim = numbers.head_dim;
    let mut slot = (list % numbers.given_lists) * numbers.slots;
    let mut chunks = 0u32;
    if comptime![blueprint.source == Source::Bulk] {
        chunks = least / numbers.chunk;
        slot += chunks;
    }
    if comptime![blueprint.source == Source::Summaries] {
        slot = spans[batch as usize * comptime![SPAN]] * numbers.kv_heads + kv_head;
    }
    let mean = (slot * dim) as usize;
    let mut mean_score = Vector::<f32, R>::new(0.0f32);
    for d in 0..dim as usize {
        let q = channel::<E, R>(&queries, query, d, numbers.scale, blueprint);
        mean_score = fma(q, Vector::new(means[mean + d]), mean_score);
    }
    // The sum of squared differences from the mean score, and how many there are.
    let mut squares = Vector::<f32, R>::new(0.0f32);
    let mut summed = counts;
    let mut remembers = chunks > 0u32;
    if comptime![blueprint.source == Source::Given] {
        remembers = true;
    }
    if comptime![blueprint.source == Source::Summaries] {
        remembers = summed_up > 0u32;
    }
    if remembers {
        let rows = comptime![blueprint.covariance.rows(blueprint.head_dim) as u32];
        let scatter = (slot * rows * dim) as usize;
        squares = quadratic::<E, R>(&queries, query, scatters, scatter, &numbers, blueprint);
    }
    if comptime![blueprint.source == Source::Given] {
        summed = Vector::new(numbers.given_keys);
    } else {
        let keys = offset(&key_strides, batch, kv_head, 0u32);
        // The keys of a cache that are not summed up begin at row 0.
        let mut first = numbers.sinks + chunks * numbers.chunk;
        let mut end = numbers.sinks + most;
        let mut before = numbers.sinks as i32;
        if comptime![blueprint.source == Source::Summaries] {
            first = 0u32;
            end = max(most, summed_up) - summed_up;
            before = 0i32 - summed_up as i32;
        }
        let limits = bulk + Vector::new(before);
        let left = left_over::<E, R>(
            &queries,
            query,
            key,
            means,
            keys,
            key_strides.token as usize,
            mean,
            first,
            end,
            limits,
            counts,
            &numbers,
            blueprint,
        );
        mean_score += left.sum / counts;
        squares += left.squares;
    }
    // Rounding may leave a little less than nothing; NaN stays.
    let zero = Vector::<f32, R>::new(0.0f32);
    let variance = select_many(zero.greater_than(&squares), zero, squares / summed);
    let mass = counts.ln() + mean_score + variance * Vector::new(0.5f32);
    #[unroll]
    for lane in 0..lanes {
        if first_row + comptime![lane as u32] < packed {
            let empty = bulk.extract(lane) == 0i32;
            predicted[rows[lane] as usize] = select(empty, numbers.neg_inf, mass.extract(lane));
        }
    }
}

/// One unit: four tokens (the lanes) of one query head.
#[cube(launch_unchecked)]
pub(super) fn decide_kernel(
    predicted: &[f32],
    near: &[f32],
    routes: &mut [u32],
    counts: &[Atomic<u32>],
    rows: u32,
    tokens: u32,
    cut: f32,
    #[comptime] planes: bool,
) {
    let quads = tokens.div_ceil(4u32);
    let mut live = true;
    if comptime![planes] {
        // Planes count together, so their units stay together.
        live = ABSOLUTE_POS < (rows * quads) as usize;
    } else {
        if ABSOLUTE_POS >= (rows * quads) as usize {
            terminate!();
        }
    }
    let position = min(ABSOLUTE_POS as u32, rows * quads - 1u32);
    let row = position / quads;
    let first = (position % quads) * 4u32;
    let mut bulk = Vector::<f32, Const<4>>::new(0.0f32);
    let mut local = Vector::<f32, Const<4>>::new(0.0f32);
    #[unroll]
    for lane in 0..4usize {
        let token = min(first + comptime![lane as u32], tokens - 1u32);
        bulk.insert(lane, predicted[(row * tokens + token) as usize]);
        local.insert(lane, near[(row * tokens + token) as usize]);
    }
    // A row without any key compares NaN, which is not greater; x = x holds for numbers alone.
    let far = (bulk - local).greater_than(&Vector::new(cut));
    let valid = bulk.equal(&bulk).vec_and(local.equal(&local));
    let route = select_many(far, Vector::<u32, Const<4>>::new(1u32), Vector::new(0u32));
    let route = select_many(valid, route, Vector::new(comptime![INVALID_ROUTE as u32]));
    let mut word = 0u32;
    #[unroll]
    for lane in 0..4usize {
        let inside = first + comptime![lane as u32] < tokens;
        let byte = select(inside, route.extract(lane), comptime![INVALID_ROUTE as u32]);
        word |= byte << comptime![lane as u32 * 8];
    }
    if live {
        routes[position as usize] = word;
    }
    count_routes(counts, route, row, first, tokens, live, 2u32, planes);
}
