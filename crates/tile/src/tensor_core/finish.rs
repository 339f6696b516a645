//! What becomes of a row once all its keys are folded.

use cubecl::prelude::*;

use super::{
    Blueprint, Layout, Numbers,
    items::{Keys, bounds_of_row, sees, sinks_begin},
    ptx,
    softmax::{Softmax, row_sum, squash},
};
use crate::{arguments::Strides, rows::INVALID_ROW};

/// One row as the computing threads know it at the end.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Row {
    pub(crate) token: u32,
    pub(crate) head: u32,
    /// Where the row's output begins, in elements.
    pub(crate) offset: u32,
    /// What the softmax's exponents are relative to.
    pub(crate) exponent: f32,
    pub(crate) norm: f32,
    /// 1 for a row that is to be written, but has an output that is not finite.
    pub(crate) odd: u32,
}

/// Writes the log-sum-exp and the output of one of a thread's two rows.
#[cube]
pub(crate) fn finish<NO: Size>(
    acc: &Vector<f32, NO>,
    softmax: &Softmax,
    id: u32,
    token: u32,
    head: u32,
    written: bool,
    batch: u32,
    lse: &mut [f32],
    target: u64,
    out_strides: &Strides,
    numbers: &Numbers,
    #[comptime] half: usize,
    #[comptime] blueprint: Blueprint,
) -> Row {
    // A row without keys has sum 0: its output is 0 and its log-sum-exp -inf.
    let sum = row_sum(softmax.sum[half]);
    let empty = sum == 0.0f32;
    let invalid = id >= INVALID_ROW;
    let norm = select(invalid, numbers.nan, select(empty, 0.0f32, 1.0f32 / sum));
    let exponent = softmax.maximum[half] * numbers.exponent_scale;
    let natural = exponent * std::f32::consts::LN_2 + select(empty, 1.0f32, sum).ln();
    if written && UNIT_POS % 4u32 == 0u32 {
        let row = (batch * numbers.kv_heads * numbers.group + head) * numbers.query_len + token;
        lse[row as usize] = select(invalid, numbers.nan, select(empty, numbers.neg_inf, natural));
    }
    let mut probe = f32::new(0.0);
    #[unroll]
    for block in 0..comptime![blueprint.shape.dim / 8] {
        probe = fma(acc.extract(block * 4 + half * 2), 0.0f32, probe);
        probe = fma(acc.extract(block * 4 + half * 2 + 1), 0.0f32, probe);
    }
    let finite = row_sum(probe) == 0.0f32;
    let offset = out_strides.at(batch, head, token);
    store_row::<NO>(acc, norm, target, offset, written && finite, half, blueprint);
    let odd = select(written && !finite, 1u32, 0u32);
    Row { token, head, offset, exponent, norm, odd }
}

/// Computes those of a warp's 16 rows again whose output is not finite.
#[cube]
pub(crate) fn redo_odd<E: Float, O: Float>(
    upper: &Row,
    lower: &Row,
    batch: u32,
    kv_head: u32,
    query: &[E],
    key: &[E],
    value: &[E],
    sequences: &[u32],
    layout: &Layout,
    out: &mut [O],
    keys: &Keys,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    if plane_any(upper.odd + lower.odd > 0u32) {
        for r in 0..16u32 {
            let from = (r % 8u32) * 4u32;
            let row = Row {
                token: plane_shuffle(select(r < 8u32, upper.token, lower.token), from),
                head: plane_shuffle(select(r < 8u32, upper.head, lower.head), from),
                offset: plane_shuffle(select(r < 8u32, upper.offset, lower.offset), from),
                exponent: plane_shuffle(select(r < 8u32, upper.exponent, lower.exponent), from),
                norm: plane_shuffle(select(r < 8u32, upper.norm, lower.norm), from),
                odd: plane_shuffle(select(r < 8u32, upper.odd, lower.odd), from),
            };
            if row.odd > 0u32 {
                redo::<E, O>(
                    &row, batch, kv_head, query, key, value, sequences, layout, out, keys, numbers, blueprint,
                );
            }
        }
    }
}

/// Computes a row's output again, key by key, by all threads of a warp.
///
/// A product takes every key of a tile, and 0 x NaN is NaN: a value that is not finite spoils rows that do not see it.
/// Such values are rare, so that all it has to be is right.
#[cube]
fn redo<E: Float, O: Float>(
    row: &Row,
    batch: u32,
    kv_head: u32,
    query: &[E],
    key: &[E],
    value: &[E],
    sequences: &[u32],
    layout: &Layout,
    out: &mut [O],
    keys: &Keys,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let lane = UNIT_POS % 32u32;
    let parts = comptime![blueprint.shape.dim / 32];
    let bounds = bounds_of_row(row.token * numbers.group, sequences, numbers, blueprint);
    let query_at = layout.query.at(batch, row.head, row.token) + lane;
    let key_at = batch * layout.key.batch + kv_head * layout.key.head + lane;
    let value_at = batch * layout.value.batch + kv_head * layout.value.head + lane;
    let mut sums = Array::<f32>::new(parts);
    #[unroll]
    for part in 0..parts {
        sums[part] = 0.0f32;
    }
    let begin = sinks_begin(keys, blueprint);
    let mut j = select(keys.sinks_end > begin, begin, keys.begin);
    while j < keys.end {
        let sinks = j < keys.sinks_end;
        if sees(&bounds, j, sinks, keys, numbers, blueprint) {
            let mut score = f32::new(0.0);
            #[unroll]
            for part in 0..parts {
                let at = comptime![part as u32 * 32];
                let q = f32::cast_from(query[(query_at + at) as usize]);
                let k = f32::cast_from(key[(key_at + j as u32 * layout.key.token + at) as usize]);
                score = fma(q, k, score);
            }
            let mut score = plane_sum(score);
            if comptime![blueprint.softcap] {
                score = squash(score, numbers);
            }
            let weight = ptx::exp2_fast(fma(score, numbers.exponent_scale, -row.exponent)) * row.norm;
            #[unroll]
            for part in 0..parts {
                let at = value_at + j as u32 * layout.value.token + comptime![part as u32 * 32];
                sums[part] = fma(weight, f32::cast_from(value[at as usize]), sums[part]);
            }
        }
        j = select(j + 1 == keys.sinks_end, keys.begin, j + 1);
    }
    #[unroll]
    for part in 0..parts {
        out[(row.offset + lane + comptime![part as u32 * 32]) as usize] = O::cast_from(sums[part]);
    }
}

/// Stores one of a thread's two rows, together with the three threads that hold the rest of it.
#[cube]
fn store_row<NO: Size>(
    acc: &Vector<f32, NO>,
    norm: f32,
    target: u64,
    offset: u32,
    written: bool,
    #[comptime] half: usize,
    #[comptime] blueprint: Blueprint,
) {
    let lane = UNIT_POS % 4u32;
    if comptime![blueprint.out_f32] {
        let at = target + offset as u64 * 4u64 + (lane * 8u32) as u64;
        if written {
            #[unroll]
            for block in 0..comptime![blueprint.shape.dim / 8] {
                let a = acc.extract(block * 4 + half * 2) * norm;
                let b = acc.extract(block * 4 + half * 2 + 1) * norm;
                ptx::store_pair(at + comptime![block as u64 * 32], a, b);
            }
        }
    } else {
        let odd = lane % 2u32 == 1u32;
        let upper = lane / 2u32 == 1u32;
        let at = target + offset as u64 * 2u64 + (lane * 16u32) as u64;
        #[unroll]
        for four in 0..comptime![blueprint.shape.dim / 32] {
            // Each thread holds two columns of each of four blocks of eight; they trade until each holds a block.
            let mut pairs = Array::<u32>::new(4usize);
            #[unroll]
            for block in 0..4usize {
                let i = comptime![(four * 4 + block) * 4 + half * 2];
                pairs[block] = ptx::pack(
                    acc.extract(i) * norm,
                    acc.extract(comptime![i + 1]) * norm,
                    comptime![blueprint.shape.operand],
                );
            }
            let near = plane_shuffle_xor(select(odd, pairs[0], pairs[1]), 1u32);
            let far = plane_shuffle_xor(select(odd, pairs[2], pairs[3]), 1u32);
            let a0 = select(odd, near, pairs[0]);
            let a1 = select(odd, pairs[1], near);
            let c0 = select(odd, far, pairs[2]);
            let c1 = select(odd, pairs[3], far);
            let r0 = plane_shuffle_xor(select(upper, a0, c0), 2u32);
            let r1 = plane_shuffle_xor(select(upper, a1, c1), 2u32);
            if written {
                ptx::store_16(
                    at + comptime![four as u64 * 64],
                    select(upper, r0, a0),
                    select(upper, r1, a1),
                    select(upper, c0, r0),
                    select(upper, c1, r1),
                );
            }
        }
    }
}
