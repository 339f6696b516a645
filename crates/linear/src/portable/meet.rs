//! Steps of decoding over a cache: each query meets the state of its sequence, and the keys that left its window since. A
//! first launch multiplies queries with those keys, feature by feature; a second adds the values up beside the state.

// Comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_core::{FeatureMap, device::SPAN};
use cubecl::prelude::*;

use super::{
    features::{features, norms_of},
    numbers::{Strides, offset},
    rows::gather,
};

/// The compile-time key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Blueprint {
    pub(super) map: FeatureMap,
    /// Numbers of the state that one load takes.
    pub(super) width: usize,
    /// Rows that a pass over the state serves.
    pub(super) rows: usize,
}

/// The run-time numbers.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Sizes {
    lists: u32,
    kv_heads: u32,
    group: u32,
    query_len: u32,
    /// Keys that there is room for beside a state.
    room: u32,
    head_dim: u32,
    value_dim: u32,
}

/// Rows of a kv head, one per lane; lanes that are left repeat the last one.
#[derive(CubeType)]
struct Rows {
    /// Where each begins.
    offsets: Array<usize>,
    /// The number of each in its tensor.
    numbers: Array<usize>,
    /// How many of the keys beside the state each meets: the last token's rows all of them.
    met: Array<u32>,
}

/// The rows `token * group + head` of a list, from `first` on.
#[cube]
fn rows_of(
    list: u32,
    first: u32,
    lacking: u32,
    strides: &Strides,
    sizes: &Sizes,
    #[comptime] lanes: usize,
) -> Rows {
    let mut offsets = Array::<usize>::new(lanes);
    let mut numbers = Array::<usize>::new(lanes);
    let mut met = Array::<u32>::new(lanes);
    #[unroll]
    for lane in 0..lanes {
        let row = min(first + comptime![lane as u32], sizes.group * sizes.query_len - 1);
        let token = row / sizes.group;
        let head = list % sizes.kv_heads * sizes.group + row % sizes.group;
        let later = sizes.query_len - 1 - token;
        offsets[lane] = offset(strides, list / sizes.kv_heads, head, token);
        numbers[lane] = ((list * sizes.group + row % sizes.group) * sizes.query_len + token) as usize;
        met[lane] = max(lacking, later) - later;
    }
    Rows { offsets, numbers, met }
}

/// One unit, one key and a few rows: the products of their features. Rows that do not meet the key are not written.
#[cube(launch_unchecked)]
pub(super) fn score_kernel<E: Float, R: Size>(
    query: &[E],
    key: &[E],
    spans: &[u32],
    query_norms: &[f32],
    key_norms: &[f32],
    scores: &mut [f32],
    query_strides: Strides,
    key_strides: Strides,
    sizes: Sizes,
    #[comptime] blueprint: Blueprint,
    #[define(E)] _element: ElemType,
    #[define(R)] _rows: usize,
) {
    let lanes = comptime![blueprint.rows];
    let halves = comptime![blueprint.map.halves()];
    let rows_in_all = sizes.group * sizes.query_len;
    let passes = rows_in_all.div_ceil(comptime![lanes as u32]);
    let unit = ABSOLUTE_POS as u32;
    let list = unit / passes / sizes.room;
    let this = unit / passes % sizes.room;
    let first = unit % passes * comptime![lanes as u32];
    if list >= sizes.lists {
        terminate!();
    }
    let batch = list / sizes.kv_heads;
    let lacking = spans[batch as usize * comptime![SPAN] + 2];
    if this >= lacking {
        terminate!();
    }
    let rows = rows_of(list, first, lacking, &query_strides, &sizes, lanes);
    let mut key_offsets = Array::<usize>::new(lanes);
    let mut key_rows = Array::<usize>::new(lanes);
    #[unroll]
    for lane in 0..lanes {
        key_offsets[lane] = offset(&key_strides, batch, list % sizes.kv_heads, this);
        key_rows[lane] = (list * sizes.room + this) as usize;
    }
    let norms = norms_of::<R>(query_norms, &rows.numbers, blueprint.map, lanes);
    let key_norm = norms_of::<R>(key_norms, &key_rows, blueprint.map, lanes);
    let mut products = Vector::<f32, R>::new(0.0f32);
    for d in 0..sizes.head_dim as usize {
        let queries = features::<R>(gather::<E, R>(&rows.offsets, query, d, lanes), &norms, blueprint.map);
        let keys = features::<R>(gather::<E, R>(&key_offsets, key, d, lanes), &key_norm, blueprint.map);
        #[unroll]
        for half in 0..halves {
            products = fma(queries[half], keys[half], products);
        }
    }
    #[unroll]
    for lane in 0..lanes {
        let row = first + comptime![lane as u32];
        if row < rows_in_all && this < rows.met[lane] {
            scores[((list * rows_in_all + row) * sizes.room + this) as usize] = products.extract(lane);
        }
    }
}

/// One unit, a few value dims of a kv head: its rows pass by pass.
#[cube(launch_unchecked)]
pub(super) fn meet_kernel<E: Float, O: Float, N: Size, R: Size>(
    query: &[E],
    value: &[E],
    spans: &[u32],
    query_norms: &[f32],
    scores: &[f32],
    states: &[Vector<f32, N>],
    out: &mut [O],
    query_strides: Strides,
    value_strides: Strides,
    out_strides: Strides,
    sizes: Sizes,
    #[comptime] blueprint: Blueprint,
    #[define(E, O)] _elements: [ElemType; 2],
    #[define(N, R)] _widths: [usize; 2],
) {
    let width = comptime![blueprint.width];
    let lanes = comptime![blueprint.rows];
    let halves = comptime![blueprint.map.halves()];
    let columns = sizes.value_dim / comptime![width as u32];
    let list = ABSOLUTE_POS as u32 / columns;
    let column = ABSOLUTE_POS as u32 % columns;
    if list >= sizes.lists {
        terminate!();
    }
    let batch = list / sizes.kv_heads;
    let kv_head = list % sizes.kv_heads;
    let first_dim = column as usize * width;
    let span = batch as usize * comptime![SPAN];
    let lacking = spans[span + 2];
    let state = (spans[span] * sizes.kv_heads + kv_head) * comptime![halves as u32] * sizes.head_dim;
    let rows_in_all = sizes.group * sizes.query_len;

    for pass in 0..rows_in_all.div_ceil(comptime![lanes as u32]) {
        let first = pass * comptime![lanes as u32];
        let rows = rows_of(list, first, lacking, &query_strides, &sizes, lanes);
        let norms = norms_of::<R>(query_norms, &rows.numbers, blueprint.map, lanes);
        let mut acc = Array::<Vector<f32, N>>::new(lanes);
        #[unroll]
        for lane in 0..lanes {
            acc[lane] = Vector::new(0.0f32);
        }
        for d in 0..sizes.head_dim as usize {
            let queries =
                features::<R>(gather::<E, R>(&rows.offsets, query, d, lanes), &norms, blueprint.map);
            #[unroll]
            for half in 0..halves {
                let feature = state + comptime![half as u32] * sizes.head_dim;
                let across = states[(feature * columns + column) as usize + d * columns as usize];
                let weights = queries[half];
                #[unroll]
                for lane in 0..lanes {
                    acc[lane] = fma(Vector::new(weights.extract(lane)), across, acc[lane]);
                }
            }
        }
        for this in 0..lacking {
            let from = offset(&value_strides, batch, kv_head, this) + first_dim;
            let mut across = Vector::<f32, N>::new(0.0f32);
            #[unroll]
            for i in 0..width {
                across.insert(i, f32::cast_from(value[from + i]));
            }
            #[unroll]
            for lane in 0..lanes {
                let row = min(first + comptime![lane as u32], rows_in_all - 1);
                if this < rows.met[lane] {
                    let score = scores[((list * rows_in_all + row) * sizes.room + this) as usize];
                    acc[lane] = fma(Vector::new(score), across, acc[lane]);
                }
            }
        }
        #[unroll]
        for lane in 0..lanes {
            let row = first + comptime![lane as u32];
            if row < rows_in_all {
                let head = kv_head * sizes.group + row % sizes.group;
                let to = offset(&out_strides, batch, head, row / sizes.group) + first_dim;
                let found = acc[lane];
                #[unroll]
                for i in 0..width {
                    out[to + i] = O::cast_from(found.extract(i));
                }
            }
        }
    }
}
