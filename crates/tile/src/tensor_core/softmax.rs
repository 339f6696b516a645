//! The online softmax of a thread's two rows.

use cubecl::prelude::*;

use super::{
    Blueprint, Numbers,
    items::{Keys, needs_mask, sees, tile_start},
    ptx,
};
use crate::visibility::Bounds;

/// Independent maxima and sums per row and thread.
const CHAINS: usize = 4;

/// The two rows of a thread, and those of its warpgroup, as positions.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Positions {
    pub(crate) upper: Bounds,
    pub(crate) lower: Bounds,
    pub(crate) first: Bounds,
    pub(crate) last: Bounds,
}

/// The running state of the online softmax of a thread's two rows.
#[derive(CubeType)]
pub(crate) struct Softmax {
    pub(crate) maximum: Array<f32>,
    /// This thread's part of the sums.
    pub(crate) sum: Array<f32>,
    /// By how much what was summed before the last tile shrinks.
    pub(crate) correction: Array<f32>,
}

#[cube]
impl Softmax {
    /// The softmax of rows of two heads before their first key. A sink logit is a key with a value of zero: it opens
    /// the maximum, and the sum of one thread of the row.
    pub(crate) fn new(
        upper_head: u32,
        lower_head: u32,
        sink_logits: &[f32],
        numbers: &Numbers,
        #[comptime] blueprint: Blueprint,
    ) -> Softmax {
        let mut softmax =
            Softmax { maximum: Array::new(2usize), sum: Array::new(2usize), correction: Array::new(2usize) };
        softmax.maximum[0] = numbers.neg_inf;
        softmax.maximum[1] = numbers.neg_inf;
        softmax.sum[0] = 0.0f32;
        softmax.sum[1] = 0.0f32;
        if comptime![blueprint.sink_logits] {
            let to_score = std::f32::consts::LOG2_E / numbers.exponent_scale;
            let upper = sink_logits[upper_head as usize] * to_score;
            let lower = sink_logits[lower_head as usize] * to_score;
            softmax.maximum[0] = upper;
            softmax.maximum[1] = lower;
            let opens = UNIT_POS % 4u32 == 0u32;
            softmax.sum[0] = select(opens && upper != numbers.neg_inf, 1.0f32, 0.0f32);
            softmax.sum[1] = select(opens && lower != numbers.neg_inf, 1.0f32, 0.0f32);
        }
        softmax
    }
}

/// The larger of the values that the four threads of a row hold.
#[cube]
pub(crate) fn row_max(x: f32) -> f32 {
    let y = max(x, plane_shuffle_xor(x, 1u32));
    max(y, plane_shuffle_xor(y, 2u32))
}

#[cube]
pub(crate) fn row_sum(x: f32) -> f32 {
    let y = x + plane_shuffle_xor(x, 1u32);
    y + plane_shuffle_xor(y, 2u32)
}

/// The tanh of a softcap: tanh(x) = 1 - 2 / (1 + e^2x). The hardware's own tanh is good to 2^-11 only.
#[cube]
pub(crate) fn squash(score: f32, numbers: &Numbers) -> f32 {
    1.0f32 - 2.0f32 / (1.0f32 + ptx::exp2_fast(score * numbers.softcap_scale))
}

/// Folds a tile of scores into the softmax; returns the weights. `whole` says that every row sees every key: without a
/// branch to ask, scores stay in the registers that the product left them in.
#[cube]
pub(crate) fn fold<NS: Size>(
    scores: Vector<f32, NS>,
    softmax: &mut Softmax,
    at: &Positions,
    tile: u32,
    keys: &Keys,
    numbers: &Numbers,
    #[comptime] whole: bool,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, NS> {
    let count = comptime![blueprint.shape.keys / 2];
    let mut scores = scores;
    if comptime![blueprint.softcap] {
        #[unroll]
        for i in 0..count {
            let capped = squash(scores.extract(i), numbers);
            scores.insert(i, capped);
        }
    }
    if comptime![!whole] {
        let start = tile_start(keys, tile, blueprint);
        let sinks = tile < keys.sink_tiles;
        if needs_mask(&at.first, &at.last, start, sinks, keys, numbers, blueprint) {
            let first = start + ((UNIT_POS % 4u32) * 2u32) as i32;
            #[unroll]
            for i in 0..count {
                let key = first + comptime![((i / 4) * 8 + i % 2) as i32];
                let seen = if comptime![(i / 2) % 2 == 0] {
                    sees(&at.upper, key, sinks, keys, numbers, blueprint)
                } else {
                    sees(&at.lower, key, sinks, keys, numbers, blueprint)
                };
                let score = select(seen, scores.extract(i), numbers.neg_inf);
                scores.insert(i, score);
            }
        }
    }
    // Chains of dependent instructions are kept short: several maxima, several sums.
    let mut uppers = Array::<f32>::new(CHAINS);
    let mut lowers = Array::<f32>::new(CHAINS);
    #[unroll]
    for chain in 0..CHAINS {
        uppers[chain] = softmax.maximum[0];
        lowers[chain] = softmax.maximum[1];
    }
    #[unroll]
    for i in 0..comptime![count / 4] {
        let chain = comptime![i % CHAINS];
        uppers[chain] = max(uppers[chain], max(scores.extract(i * 4), scores.extract(i * 4 + 1)));
        lowers[chain] = max(lowers[chain], max(scores.extract(i * 4 + 2), scores.extract(i * 4 + 3)));
    }
    let upper = max(max(uppers[0], uppers[1]), max(uppers[2], uppers[3]));
    let lower = max(max(lowers[0], lowers[1]), max(lowers[2], lowers[3]));
    let upper = row_max(upper);
    let lower = row_max(lower);
    // A row that has seen no key keeps a finite offset, so that its weights become exp(-inf) = 0.
    let upper_offset = select(upper == numbers.neg_inf, 0.0f32, upper) * numbers.exponent_scale;
    let lower_offset = select(lower == numbers.neg_inf, 0.0f32, lower) * numbers.exponent_scale;
    let upper_correction = ptx::exp2_fast(fma(softmax.maximum[0], numbers.exponent_scale, -upper_offset));
    let lower_correction = ptx::exp2_fast(fma(softmax.maximum[1], numbers.exponent_scale, -lower_offset));
    softmax.maximum[0] = upper;
    softmax.maximum[1] = lower;
    #[unroll]
    for chain in 0..CHAINS {
        uppers[chain] = 0.0f32;
        lowers[chain] = 0.0f32;
    }
    #[unroll]
    for i in 0..comptime![count / 4] {
        let a = ptx::exp2_fast(fma(scores.extract(i * 4), numbers.exponent_scale, -upper_offset));
        let b = ptx::exp2_fast(fma(scores.extract(i * 4 + 1), numbers.exponent_scale, -upper_offset));
        let c = ptx::exp2_fast(fma(scores.extract(i * 4 + 2), numbers.exponent_scale, -lower_offset));
        let d = ptx::exp2_fast(fma(scores.extract(i * 4 + 3), numbers.exponent_scale, -lower_offset));
        let chain = comptime![i % CHAINS];
        uppers[chain] += a + b;
        lowers[chain] += c + d;
        scores.insert(i * 4, a);
        scores.insert(i * 4 + 1, b);
        scores.insert(i * 4 + 2, c);
        scores.insert(i * 4 + 3, d);
    }
    let upper_sum = (uppers[0] + uppers[1]) + (uppers[2] + uppers[3]);
    let lower_sum = (lowers[0] + lowers[1]) + (lowers[2] + lowers[3]);
    softmax.sum[0] = fma(softmax.sum[0], upper_correction, upper_sum);
    softmax.sum[1] = fma(softmax.sum[1], lower_correction, lower_sum);
    softmax.correction[0] = upper_correction;
    softmax.correction[1] = lower_correction;
    scores
}

/// Weights rounded and packed, as the product with values takes them. While such a product runs its weights are not to
/// be touched, so this comes after it.
#[cube]
pub(crate) fn pack_weights<NS: Size, NP: Size>(
    weights: &Vector<f32, NS>,
    #[comptime] blueprint: Blueprint,
) -> Vector<u32, NP> {
    let mut packed = Vector::<u32, NP>::new(0u32);
    #[unroll]
    for i in 0..comptime![blueprint.shape.keys / 4] {
        let pair =
            ptx::pack(weights.extract(i * 2), weights.extract(i * 2 + 1), comptime![blueprint.shape.operand]);
        packed.insert(i, pair);
    }
    packed
}
