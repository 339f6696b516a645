//! Sums over chunks of keys, and over chunks. A list is a kv head of a sequence; slot `c` of a list holds chunk `c - 1`, and
//! after `prefix_kernel` all chunks before `c`.

// In a kernel `%` is one instruction, and `is_multiple_of` is not there.
#![allow(clippy::manual_is_multiple_of)]

use cubecl::prelude::*;

use crate::launch::{Strides, offset};

/// Channels on a side of the tile of outer products that a unit sums up.
pub(super) const SCATTER_TILE: usize = 8;

#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Shape {
    lists: u32,
    kv_heads: u32,
    dim: u32,
    slots: u32,
    /// The range of keys.
    first: u32,
    end: u32,
    chunk: u32,
}

/// Where the keys of a list begin.
#[cube]
fn keys_of(list: u32, strides: &Strides, shape: &Shape) -> usize {
    offset(strides, list / shape.kv_heads, list % shape.kv_heads, 0u32)
}

/// One unit, one channel of a slot: the mean of its chunk, and in slot 0 the first key.
#[cube(launch_unchecked)]
pub(super) fn mean_kernel<E: Float>(
    key: &[E],
    means: &mut [f32],
    strides: Strides,
    shape: Shape,
    #[define(E)] _element: ElemType,
) {
    if ABSOLUTE_POS >= (shape.lists * shape.slots * shape.dim) as usize {
        terminate!();
    }
    let at = ABSOLUTE_POS as u32;
    let slot = at / shape.dim % shape.slots;
    let list = at / shape.dim / shape.slots;
    let channel = keys_of(list, &strides, &shape) + (at % shape.dim) as usize;
    let begin = shape.first + (max(slot, 1u32) - 1u32) * shape.chunk;
    // Differences from one of the keys add up without losing what a large mean would swallow.
    let pivot = f32::cast_from(key[channel + (begin * strides.token) as usize]);
    let mut mean = pivot;
    if slot > 0u32 {
        let end = min(begin + shape.chunk, shape.end);
        let mut sum = 0.0f32;
        for j in begin + 1u32..end {
            sum += f32::cast_from(key[channel + (j * strides.token) as usize]) - pivot;
        }
        mean += sum / f32::cast_from(end - begin);
    }
    means[ABSOLUTE_POS] = mean;
}

/// One unit, one channel of a chunk: the sum of squared differences from its mean.
#[cube(launch_unchecked)]
pub(super) fn variance_kernel<E: Float>(
    key: &[E],
    means: &[f32],
    scatters: &mut [f32],
    strides: Strides,
    shape: Shape,
    #[define(E)] _element: ElemType,
) {
    let chunks = shape.slots - 1u32;
    if ABSOLUTE_POS >= (shape.lists * chunks * shape.dim) as usize {
        terminate!();
    }
    let at = ABSOLUTE_POS as u32;
    let chunk = at / shape.dim % chunks;
    let list = at / shape.dim / chunks;
    let channel = keys_of(list, &strides, &shape) + (at % shape.dim) as usize;
    let into = ((list * shape.slots + chunk + 1u32) * shape.dim + at % shape.dim) as usize;
    let mean = means[into];
    let begin = shape.first + chunk * shape.chunk;
    let mut sum = 0.0f32;
    for j in begin..min(begin + shape.chunk, shape.end) {
        let difference = f32::cast_from(key[channel + (j * strides.token) as usize]) - mean;
        sum = fma(difference, difference, sum);
    }
    scatters[into] = sum;
}

/// One unit, one tile of a chunk's outer products; tiles below the diagonal are those above it, mirrored.
#[cube(launch_unchecked)]
pub(super) fn scatter_kernel<E: Float>(
    key: &[E],
    means: &[f32],
    scatters: &mut [f32],
    strides: Strides,
    shape: Shape,
    #[define(E)] _element: ElemType,
) {
    let side = shape.dim.div_ceil(comptime![SCATTER_TILE as u32]);
    let tiles = side * (side + 1u32) / 2u32;
    let chunks = shape.slots - 1u32;
    if ABSOLUTE_POS >= (shape.lists * chunks * tiles) as usize {
        terminate!();
    }
    let at = ABSOLUTE_POS as u32;
    let chunk = at / tiles % chunks;
    let list = at / tiles / chunks;
    // Tiles are numbered row by row, and a row begins at the diagonal.
    let mut column = at % tiles;
    let mut row = 0u32;
    while column >= side - row {
        column -= side - row;
        row += 1u32;
    }
    column += row;
    let row = row * comptime![SCATTER_TILE as u32];
    let column = column * comptime![SCATTER_TILE as u32];

    let slot = list * shape.slots + chunk + 1u32;
    let mut row_means = Array::<f32>::new(SCATTER_TILE);
    let mut column_means = Vector::<f32, Const<8>>::new(0.0f32);
    let mut sums = Array::<Vector<f32, Const<8>>>::new(SCATTER_TILE);
    #[unroll]
    for i in 0..SCATTER_TILE {
        // Channels beyond the last repeat it, and are not written.
        let in_row = min(row + comptime![i as u32], shape.dim - 1u32);
        let in_column = min(column + comptime![i as u32], shape.dim - 1u32);
        row_means[i] = means[(slot * shape.dim + in_row) as usize];
        column_means.insert(i, means[(slot * shape.dim + in_column) as usize]);
        sums[i] = Vector::new(0.0f32);
    }
    let begin = shape.first + chunk * shape.chunk;
    let keys = keys_of(list, &strides, &shape);
    for j in begin..min(begin + shape.chunk, shape.end) {
        let this = keys + (j * strides.token) as usize;
        let mut across = Vector::<f32, Const<8>>::new(0.0f32);
        #[unroll]
        for i in 0..SCATTER_TILE {
            let channel = min(column + comptime![i as u32], shape.dim - 1u32);
            across.insert(i, f32::cast_from(key[this + channel as usize]));
        }
        across -= column_means;
        #[unroll]
        for i in 0..SCATTER_TILE {
            let channel = min(row + comptime![i as u32], shape.dim - 1u32);
            let x = f32::cast_from(key[this + channel as usize]) - row_means[i];
            sums[i] = fma(Vector::new(x), across, sums[i]);
        }
    }
    let into = slot * shape.dim * shape.dim;
    #[unroll]
    for i in 0..SCATTER_TILE {
        let in_row = row + comptime![i as u32];
        #[unroll]
        for x in 0..SCATTER_TILE {
            let in_column = column + comptime![x as u32];
            if in_row < shape.dim && in_column < shape.dim {
                let sum = sums[i].extract(x);
                scatters[(into + in_row * shape.dim + in_column) as usize] = sum;
                scatters[(into + in_column * shape.dim + in_row) as usize] = sum;
            }
        }
    }
}

/// One unit, one number of the scatter: merges chunk after chunk, in place.
#[cube(launch_unchecked)]
pub(super) fn prefix_kernel(
    chunk_means: &[f32],
    means: &mut [f32],
    scatters: &mut [f32],
    shape: Shape,
    rows: u32,
) {
    if ABSOLUTE_POS >= (shape.lists * rows * shape.dim) as usize {
        terminate!();
    }
    let at = ABSOLUTE_POS as u32;
    let d = at % shape.dim;
    let row = at / shape.dim % rows;
    let list = at / shape.dim / rows;
    // A diagonal is one row, whose every number belongs to its own channel.
    let i = select(rows == 1u32, d, row);
    let first = list * shape.slots * shape.dim;
    let mut mean_d = chunk_means[(first + d) as usize];
    let mut mean_i = chunk_means[(first + i) as usize];
    let mut count = 0.0f32;
    let mut sum = 0.0f32;
    if row == 0u32 {
        means[(first + d) as usize] = mean_d;
    }
    for slot in 1u32..shape.slots {
        let this = first + slot * shape.dim;
        let apart_d = chunk_means[(this + d) as usize] - mean_d;
        let apart_i = chunk_means[(this + i) as usize] - mean_i;
        let before = shape.first + (slot - 1u32) * shape.chunk;
        let more = f32::cast_from(min(shape.chunk, shape.end - before));
        let total = count + more;
        let into = (((list * shape.slots + slot) * rows + row) * shape.dim + d) as usize;
        sum += scatters[into] + apart_i * apart_d * (count * more / total);
        scatters[into] = sum;
        mean_d += apart_d * (more / total);
        mean_i += apart_i * (more / total);
        count = total;
        if row == 0u32 {
            means[(this + d) as usize] = mean_d;
        }
    }
}

/// One unit, one number of the scatter of two sets of keys together.
#[cube(launch_unchecked)]
pub(super) fn join_kernel(
    a_means: &[f32],
    a_scatters: &[f32],
    b_means: &[f32],
    b_scatters: &[f32],
    means: &mut [f32],
    scatters: &mut [f32],
    lists: u32,
    rows: u32,
    dim: u32,
    a_keys: f32,
    b_keys: f32,
) {
    if ABSOLUTE_POS >= (lists * rows * dim) as usize {
        terminate!();
    }
    let at = ABSOLUTE_POS as u32;
    let d = at % dim;
    let row = at / dim % rows;
    let list = at / dim / rows;
    let i = select(rows == 1u32, d, row);
    let mean = (list * dim + d) as usize;
    let apart_d = b_means[mean] - a_means[mean];
    let apart_i = b_means[(list * dim + i) as usize] - a_means[(list * dim + i) as usize];
    let total = a_keys + b_keys;
    let between = apart_i * apart_d * (a_keys * b_keys / total);
    scatters[ABSOLUTE_POS] = a_scatters[ABSOLUTE_POS] + b_scatters[ABSOLUTE_POS] + between;
    if row == 0u32 {
        means[mean] = a_means[mean] + apart_d * (b_keys / total);
    }
}

/// One unit, one number of the last slot.
#[cube(launch_unchecked)]
pub(super) fn take_kernel(from: &[f32], to: &mut [f32], lists: u32, slots: u32, length: u32) {
    if ABSOLUTE_POS >= (lists * length) as usize {
        terminate!();
    }
    let at = ABSOLUTE_POS as u32;
    let slot = at / length * slots + slots - 1u32;
    to[ABSOLUTE_POS] = from[(slot * length + at % length) as usize];
}
