//! What both kernels are made of.

use cubecl::prelude::*;

use crate::{
    arguments::{BackwardTensors, Strides},
    rows::INVALID_ROW,
    tensor_core::{
        Blueprint, Numbers, Operand, ptx,
        softmax::{row_sum, squash},
    },
};

/// Where a row's numbers are.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Row {
    /// Its query and its output's gradient, in elements.
    pub(crate) query: u32,
    pub(crate) d_out: u32,
    /// Among the log-sum-exps.
    pub(crate) index: u32,
    pub(crate) invalid: bool,
}

#[cube]
pub(crate) fn row_of_id<E: Float>(
    id: u32,
    batch: u32,
    kv_head: u32,
    tensors: &BackwardTensors<E, E>,
    numbers: &Numbers,
) -> Row {
    let row = id % INVALID_ROW;
    let token = row / numbers.group;
    let head = kv_head * numbers.group + row % numbers.group;
    Row {
        query: tensors.layout.query.at(batch, head, token),
        d_out: tensors.d_out_strides.at(batch, head, token),
        index: (batch * numbers.kv_heads * numbers.group + head) * numbers.query_len + token,
        invalid: id >= INVALID_ROW,
    }
}

/// What is added to a score's exponent of two to make it a weight: `-lse log2 e`. All weights of a row without keys are
/// 0.
#[cube]
pub(crate) fn exponent_of(lse: f32, invalid: bool, numbers: &Numbers) -> f32 {
    let exponent = select(lse == numbers.neg_inf, lse, -(lse * std::f32::consts::LOG2_E));
    select(invalid, numbers.nan, exponent)
}

/// Numbers rounded and packed, two to a register, as a product takes them for its first operand.
#[cube]
pub(crate) fn pack<WS: Size, WP: Size>(
    unpacked: &Vector<f32, WS>,
    #[comptime] count: usize,
    #[comptime] operand: Operand,
) -> Vector<u32, WP> {
    let mut packed = Vector::<u32, WP>::new(0u32);
    #[unroll]
    for i in 0..comptime![count / 2] {
        let pair = ptx::pack(unpacked.extract(i * 2), unpacked.extract(i * 2 + 1), operand);
        packed.insert(i, pair);
    }
    packed
}

/// Adds one of a thread's two rows of sums of a block, together with the three threads that hold the rest of it, to the
/// gradient at address `target`, or stores it where that is unset. Sums that are not finite are left out: 1 for those, to be
/// computed again.
#[cube]
pub(crate) fn add_row<WO: Size>(
    sums: &Vector<f32, WO>,
    target: u64,
    factor: f32,
    unset: u32,
    written: bool,
    #[comptime] block: usize,
    #[comptime] half: usize,
    #[comptime] blueprint: Blueprint,
) -> u32 {
    let first = comptime![block * blueprint.shape.columns() / 2 + half * 2];
    let eights = comptime![blueprint.shape.dim / 8];
    let mut probe = f32::new(0.0);
    #[unroll]
    for eight in 0..eights {
        probe = fma(sums.extract(comptime![first + eight * 4]), 0.0f32, probe);
        probe = fma(sums.extract(comptime![first + eight * 4 + 1]), 0.0f32, probe);
    }
    let finite = row_sum(probe) == 0.0f32;
    if written && finite {
        let at = target + (UNIT_POS % 4u32 * 8u32) as u64;
        // All loads before the first store, which they would otherwise wait for.
        let mut before = Array::<f32>::new(comptime![2 * eights]);
        #[unroll]
        for one in 0..comptime![2 * eights] {
            before[one] = 0.0f32;
        }
        if unset == 0u32 {
            #[unroll]
            for eight in 0..eights {
                let pair = ptx::load_pair(at + comptime![eight as u64 * 32]);
                before[comptime![eight * 2]] = pair.extract(0usize);
                before[comptime![eight * 2 + 1]] = pair.extract(1usize);
            }
        }
        #[unroll]
        for eight in 0..eights {
            let a = fma(sums.extract(comptime![first + eight * 4]), factor, before[comptime![eight * 2]]);
            let b =
                fma(sums.extract(comptime![first + eight * 4 + 1]), factor, before[comptime![eight * 2 + 1]]);
            ptx::store_pair(at + comptime![eight as u64 * 32], a, b);
        }
    }
    select(written && !finite, 1u32, 0u32)
}

/// Adds to one element of a gradient, or stores it where that is unset.
#[cube]
pub(crate) fn add_one(gradient: &mut [f32], at: usize, sum: f32, unset: u32) {
    gradient[at] = select(unset == 0u32, gradient[at], 0.0f32) + sum;
}

/// Stores zeros as the gradients of a cube's keys and values, which no row sees.
#[cube]
pub(crate) fn clear_keys(
    key_gradient: &mut [f32],
    value_gradient: &mut [f32],
    list_index: u32,
    start: u32,
    key_len: u32,
    #[comptime] blueprint: Blueprint,
) {
    let dim = comptime![blueprint.shape.dim as u32];
    let keys = min(comptime![blueprint.shape.rows as u32], key_len - start);
    let first = (list_index * key_len + start) * dim;
    let mut at = UNIT_POS;
    while at < keys * dim {
        key_gradient[(first + at) as usize] = 0.0f32;
        value_gradient[(first + at) as usize] = 0.0f32;
        at += CUBE_DIM;
    }
}

/// What a pair of a row and a key weighs, and the gradient of its score before scaling.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Pair {
    pub(crate) weight: f32,
    pub(crate) slope: f32,
}

/// One pair, from memory, by all threads of a warp.
///
/// A product takes every row and every key of a tile, and 0 x NaN is NaN: what is not finite spoils the gradients of
/// keys and rows that do not meet it. Such gradients are computed again from pairs that do meet.
#[cube]
pub(crate) fn pair_of<E: Float>(
    tensors: &BackwardTensors<E, E>,
    row: &Row,
    key_at: u32,
    value_at: u32,
    exponent: f32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Pair {
    let lane = UNIT_POS % 32u32;
    let mut score = f32::new(0.0);
    let mut slope = f32::new(0.0);
    #[unroll]
    for part in 0..comptime![blueprint.shape.dim / 32] {
        let at = lane + comptime![part as u32 * 32];
        let q = f32::cast_from(tensors.query[(row.query + at) as usize]);
        let k = f32::cast_from(tensors.key[(key_at + at) as usize]);
        let o = f32::cast_from(tensors.d_out[(row.d_out + at) as usize]);
        let v = f32::cast_from(tensors.value[(value_at + at) as usize]);
        score = fma(q, k, score);
        slope = fma(o, v, slope);
    }
    let mut score = plane_sum(score);
    let mut slope = plane_sum(slope) - tensors.delta[row.index as usize];
    if comptime![blueprint.softcap] {
        score = squash(score, numbers);
        slope *= 1.0f32 - score * score;
    }
    let weight = ptx::exp2_fast(fma(score, numbers.exponent_scale, exponent));
    Pair { weight, slope: slope * weight }
}

/// Where a key of a list begins, and its value.
#[cube]
pub(crate) fn key_start(list: u32, key: u32, strides: &Strides, numbers: &Numbers) -> u32 {
    list / numbers.kv_heads * strides.batch + list % numbers.kv_heads * strides.head + key * strides.token
}
