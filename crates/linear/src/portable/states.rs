//! The states of all chunks: sums of each chunk, then what comes before (or, for gradients, after) each of them.

// Comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use cubecl::prelude::*;

use super::{
    features::{Norms, features},
    geometry::Blueprint,
    numbers::{INVALID_ROW, Lists, Numbers, Side, Strides, offset},
    rows::{decay_of_chunk, entry_of, index_of, row_of},
};

/// `sum_j w_j phi(x_j)^T y_j` over the rows of every chunk: of keys, each decayed to the end of its chunk, or of queries,
/// each by what the state before the chunk had decayed by when they met it.
///
/// One unit, one chunk of a kv head, as many dims of x as it has lanes, and a block of dims of y. Rows before the first
/// chunk count with it where they are `early`.
#[cube(launch_unchecked)]
pub(super) fn sum_kernel<E: Float, Y: Float, R: Size>(
    x: &[E],
    y: &[Y],
    norms: &[f32],
    decays: &[f32],
    sums: &mut [f32],
    x_strides: Strides,
    y_strides: Strides,
    side: Side,
    lists: &Lists,
    numbers: Numbers,
    early: u32,
    #[comptime] blueprint: Blueprint,
    #[define(E, Y)] _elements: [ElemType; 2],
    #[define(R)] _lanes: usize,
) {
    let lanes = comptime![blueprint.lanes];
    let halves = comptime![blueprint.map.halves()];
    let block = comptime![blueprint.value_block];
    let count = comptime![halves * block];
    let head_tiles = numbers.head_dim.div_ceil(comptime![lanes as u32]);
    let value_blocks = numbers.value_dim / comptime![block as u32];
    let unit = ABSOLUTE_POS as u32;
    let part = unit / head_tiles / value_blocks;
    let list = part / numbers.chunks;
    let chunk = part % numbers.chunks;
    if list >= numbers.lists {
        terminate!();
    }
    let first_dim = (unit % head_tiles) * comptime![lanes as u32];
    let first_value = (unit / head_tiles % value_blocks) * comptime![block as u32];
    let batch = list / numbers.kv_heads;
    let kv_head = list % numbers.kv_heads;

    let mut dims = Array::<usize>::new(lanes);
    #[unroll]
    for lane in 0..lanes {
        dims[lane] = min(first_dim + comptime![lane as u32], numbers.head_dim - 1) as usize;
    }
    let mut acc = Array::<Vector<f32, R>>::new(count);
    #[unroll]
    for i in 0..count {
        acc[i] = Vector::new(0.0f32);
    }
    let mut all = 0.0f32;
    if comptime![blueprint.decays] {
        all = decay_of_chunk(list, chunk, decays, &numbers);
    }
    let listed = comptime![blueprint.lists_own()];
    let mut begin = entry_of(list, (chunk * numbers.chunk) as i32, &side, lists, &numbers, listed);
    if early == 1u32 {
        if chunk == 0u32 {
            begin = entry_of(list, side.offset, &side, lists, &numbers, listed);
        }
    }
    let end = entry_of(list, ((chunk + 1) * numbers.chunk) as i32, &side, lists, &numbers, listed);
    for entry in begin..end {
        let packed = row_of(list, entry, &side, lists, &numbers, listed) % INVALID_ROW;
        let token = packed / side.group;
        let head = kv_head * side.group + packed % side.group;
        let row = ((list * side.group + packed % side.group) * side.length + token) as usize;
        let from = offset(&x_strides, batch, head, token);
        let mut across = Vector::<f32, R>::new(0.0f32);
        #[unroll]
        for lane in 0..lanes {
            across.insert(lane, f32::cast_from(x[from + dims[lane]]));
        }
        let norms_of_all = norms_of_row::<R>(norms, row, blueprint);
        let found = features::<R>(across, &norms_of_all, blueprint.map);
        let mut weight = Vector::<f32, R>::new(1.0f32);
        if comptime![blueprint.decays] {
            let index = index_of(token, &side);
            let sum = decays[(list * numbers.keys + max(index, 0i32) as u32) as usize];
            let sum = select(index < 0i32, 0.0f32, sum);
            let decay = if comptime![blueprint.of_keys] { all - sum } else { sum };
            weight = Vector::new(decay.exp());
        }
        let values = offset(&y_strides, batch, head, token) + first_value as usize;
        #[unroll]
        for i in 0..block {
            let value = Vector::<f32, R>::new(f32::cast_from(y[values + i]));
            #[unroll]
            for half in 0..halves {
                let at = comptime![half * block + i];
                acc[at] = fma(found[half] * weight, value, acc[at]);
            }
        }
    }
    let base = (list * numbers.chunks + chunk) * numbers.head_dim * comptime![halves as u32];
    #[unroll]
    for half in 0..halves {
        #[unroll]
        for i in 0..block {
            let across = acc[comptime![half * block + i]];
            #[unroll]
            for lane in 0..lanes {
                let dim = first_dim + comptime![lane as u32];
                if dim < numbers.head_dim {
                    let feature = base + numbers.head_dim * comptime![half as u32] + dim;
                    sums[(feature * numbers.value_dim + first_value) as usize + i] = across.extract(lane);
                }
            }
        }
    }
}

/// The norms of one row, in every lane.
#[cube]
fn norms_of_row<R: Size>(norms: &[f32], row: usize, #[comptime] blueprint: Blueprint) -> Norms<R> {
    let mut top = Vector::<f32, R>::new(0.0f32);
    let mut above = Vector::<f32, R>::new(0.0f32);
    let mut bottom = Vector::<f32, R>::new(0.0f32);
    let mut below = Vector::<f32, R>::new(0.0f32);
    if comptime![blueprint.map == bifocal_core::FeatureMap::SoftmaxPair] {
        top = Vector::new(norms[row * 4]);
        above = Vector::new(norms[row * 4 + 1]);
        bottom = Vector::new(norms[row * 4 + 2]);
        below = Vector::new(norms[row * 4 + 3]);
    }
    Norms::<R> { top, above, bottom, below }
}

/// What a scan is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Scan {
    pub(super) decays: bool,
    /// Whether something comes before the first chunk (or after the last).
    pub(super) starts: bool,
    /// From the last chunk to the first.
    pub(super) backwards: bool,
}

/// Puts in the place of each chunk's sum the sum of what comes before it, and what comes after the last to `end`. One unit,
/// a few numbers of a kv head's state, chunk by chunk.
#[cube(launch_unchecked)]
pub(super) fn scan_kernel<N: Size>(
    sums: &mut [Vector<f32, N>],
    start: &[Vector<f32, N>],
    end: &mut [Vector<f32, N>],
    decays: &[f32],
    numbers: Numbers,
    columns: u32,
    #[comptime] scan: Scan,
    #[define(N)] _width: usize,
) {
    let list = ABSOLUTE_POS as u32 / columns;
    let column = ABSOLUTE_POS as u32 % columns;
    if list >= numbers.lists {
        terminate!();
    }
    let outside = ((numbers.first_state + list) * columns + column) as usize;
    let mut state = Vector::<f32, N>::new(0.0f32);
    if comptime![scan.starts] {
        state = start[outside];
    }
    for step in 0..numbers.chunks {
        let mut chunk = step;
        if comptime![scan.backwards] {
            chunk = numbers.chunks - 1 - step;
        }
        let at = ((list * numbers.chunks + chunk) * columns + column) as usize;
        let sum = sums[at];
        sums[at] = state;
        if comptime![scan.decays] {
            state *= Vector::new(decay_of_chunk(list, chunk, decays, &numbers).exp());
        }
        state += sum;
    }
    end[outside] = state;
}

/// Sums up decays from the start of each chunk on: one unit, one chunk of a kv head.
#[cube(launch_unchecked)]
pub(super) fn decays_kernel(
    log_decay: &[f32],
    decays: &mut [f32],
    strides: Strides,
    side: Side,
    numbers: Numbers,
) {
    let list = ABSOLUTE_POS as u32 / numbers.chunks;
    let chunk = ABSOLUTE_POS as u32 % numbers.chunks;
    if list >= numbers.lists {
        terminate!();
    }
    let mut sum = 0.0f32;
    for key in chunk * numbers.chunk..min((chunk + 1) * numbers.chunk, numbers.keys) {
        let token = side.first + key;
        sum += log_decay[offset(&strides, list / numbers.kv_heads, list % numbers.kv_heads, token)];
        decays[(list * numbers.keys + key) as usize] = sum;
    }
}
