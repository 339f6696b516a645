//! The softmax pair of a tile of rows, from shared memory to shared memory.

use bifocal_tensor_core::{
    PANEL, SWIZZLE,
    ptx::{exp2_fast, load_shared_words, pack, store_shared_words, unpack},
    swizzled,
};
use cubecl::prelude::*;

use super::blueprint::{Blueprint, THREADS};

/// Threads that share a row: each has 16 bytes of every panel.
const SHARES: usize = PANEL / 8;

/// Writes `[softmax(x); softmax(-x)]` of each of `rows` rows at `raw` to `features`.
///
/// As everywhere, a NaN makes every feature of its row NaN. Exponents of two are good to two units in the last place of f32,
/// far below what packing leaves.
#[cube]
pub(super) fn map_rows(raw: u32, features: u32, #[comptime] rows: usize, #[comptime] blueprint: Blueprint) {
    let operand = comptime![blueprint.operand];
    let panels = comptime![blueprint.dim / PANEL];
    let at_once = comptime![THREADS / SHARES];
    for pass in 0..comptime![(rows / at_once) as u32] {
        let row = UNIT_POS / comptime![SHARES as u32] + pass * comptime![at_once as u32];
        let at = row * comptime![SWIZZLE as u32] + swizzled(row, UNIT_POS % comptime![SHARES as u32]);
        let mut x = Array::<f32>::new(comptime![panels * 8]);
        #[unroll]
        for panel in 0..panels {
            let words = load_shared_words(raw + at + comptime![(panel * rows * SWIZZLE) as u32]);
            #[unroll]
            for i in 0..4usize {
                let pair = unpack(words.extract(i), operand);
                x[comptime![panel * 8 + 2 * i]] = pair.extract(0usize);
                x[comptime![panel * 8 + 2 * i + 1]] = pair.extract(1usize);
            }
        }
        let mut top = x[0];
        let mut bottom = x[0];
        #[unroll]
        for i in 1..comptime![panels * 8] {
            top = max(top, x[i]);
            bottom = min(bottom, x[i]);
        }
        #[unroll]
        for i in 0..3u32 {
            top = max(top, plane_shuffle_xor(top, comptime![1u32 << i]));
            bottom = min(bottom, plane_shuffle_xor(bottom, comptime![1u32 << i]));
        }
        // How these round is the same for a whole row, and so goes with its norm.
        let highest = -top * std::f32::consts::LOG2_E;
        let lowest = bottom * std::f32::consts::LOG2_E;
        let mut plus = Array::<f32>::new(comptime![panels * 8]);
        let mut minus = Array::<f32>::new(comptime![panels * 8]);
        let mut above = f32::new(0.0);
        let mut below = f32::new(0.0);
        #[unroll]
        for i in 0..comptime![panels * 8] {
            plus[i] = exp2_fast(fma(x[i], std::f32::consts::LOG2_E, highest));
            minus[i] = exp2_fast(fma(x[i], -std::f32::consts::LOG2_E, lowest));
            above += plus[i];
            below += minus[i];
        }
        #[unroll]
        for i in 0..3u32 {
            above += plane_shuffle_xor(above, comptime![1u32 << i]);
            below += plane_shuffle_xor(below, comptime![1u32 << i]);
        }
        let above = 1.0f32 / above;
        let below = 1.0f32 / below;
        #[unroll]
        for panel in 0..panels {
            let to = features + at + comptime![(panel * rows * SWIZZLE) as u32];
            store_eight(to, &plus, above, comptime![panel * 8], blueprint);
            let to = to + comptime![(panels * rows * SWIZZLE) as u32];
            store_eight(to, &minus, below, comptime![panel * 8], blueprint);
        }
    }
}

/// Eight numbers from `from` on, times `factor`.
#[cube]
fn store_eight(
    to: u32,
    numbers: &Array<f32>,
    factor: f32,
    #[comptime] from: usize,
    #[comptime] blueprint: Blueprint,
) {
    let operand = comptime![blueprint.operand];
    let mut words = Array::<u32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        words[i] = pack(
            numbers[comptime![from + 2 * i]] * factor,
            numbers[comptime![from + 2 * i + 1]] * factor,
            operand,
        );
    }
    store_shared_words(to, words[0], words[1], words[2], words[3]);
}
