//! What a step of the key kernel is made of: how shared memory is used, what is noted of rows, their copies, weights and
//! slopes.

// In a kernel `%` is one instruction and `is_multiple_of` is not there; an `if` on compile-time values stays apart from
// one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use cubecl::prelude::*;

use crate::{
    mma::{
        copies::{Tile, place},
        ptx,
    },
    rows::{all_see, sees},
    tensor_core::{
        Blueprint, Numbers, SWIZZLE,
        ptx::{exp2_fast, load_shared_four, load_shared_pair, store_shared_four},
        softmax::squash,
    },
    visibility::Bounds,
};

/// What is noted of the rows of a step, one after the other: exponents, deltas, positions, in ragged batches first
/// keys.
pub(super) const EXPONENTS: usize = 0;
pub(super) const DELTAS: usize = 1;
pub(super) const POSITIONS: usize = 2;
pub(super) const FIRSTS: usize = 3;

/// Shared memory, in bytes: keys, values; rows of two steps, queries before gradients; weights; notes of two steps;
/// where the rows to be copied begin, queries before gradients.
impl Blueprint {
    pub(super) const fn rows_at(self) -> u32 {
        2 * self.query_bytes() as u32
    }

    pub(super) const fn step_bytes(self) -> u32 {
        2 * self.key_bytes() as u32
    }

    pub(super) const fn weights_at(self) -> u32 {
        self.rows_at() + 2 * self.step_bytes()
    }

    const fn notes_at(self) -> u32 {
        self.weights_at() + (self.shape.rows * self.shape.keys * 4) as u32
    }

    const fn note_bytes(self) -> u32 {
        let kinds = if self.ragged { FIRSTS + 1 } else { FIRSTS };
        (kinds * self.shape.keys * 4) as u32
    }

    pub(super) const fn starts_at(self) -> u32 {
        self.notes_at() + 2 * self.note_bytes()
    }

    /// All of it.
    pub(in crate::mma::backward) const fn key_room(self) -> u32 {
        self.starts_at() + 2 * self.shape.keys as u32 * 4
    }
}

/// What a warp knows of its keys.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Warp {
    pub(super) first_key: i32,
    /// Where its thread's weights are in shared memory: the first four.
    pub(super) weights: u32,
}

/// A number that is noted of a row of a step.
#[cube]
fn noted(
    room: &[u32],
    stage: u32,
    row: u32,
    #[comptime] kind: usize,
    #[comptime] blueprint: Blueprint,
) -> u32 {
    let words = comptime![blueprint.note_bytes() / 4];
    let at = comptime![blueprint.notes_at() / 4 + (kind * blueprint.shape.keys) as u32];
    room[(at + stage * words + row) as usize]
}

#[cube]
pub(super) fn note(
    room: &mut [u32],
    stage: u32,
    row: u32,
    #[comptime] kind: usize,
    number: u32,
    #[comptime] blueprint: Blueprint,
) {
    let words = comptime![blueprint.note_bytes() / 4];
    let at = comptime![blueprint.notes_at() / 4 + (kind * blueprint.shape.keys) as u32];
    room[(at + stage * words + row) as usize] = number;
}

#[cube]
fn noted_bounds(room: &[u32], stage: u32, row: u32, #[comptime] blueprint: Blueprint) -> Bounds {
    let mut first = 0i32;
    if comptime![blueprint.ragged] {
        first = i32::reinterpret(noted(room, stage, row, FIRSTS, blueprint));
    }
    Bounds { first, position: i32::reinterpret(noted(room, stage, row, POSITIONS, blueprint)) }
}

/// The address of what is noted of a thread's first two rows of a step; of the next two it is 32 bytes on.
#[cube]
pub(super) fn pairs_noted(
    stage: u32,
    #[comptime] kind: usize,
    base: u32,
    #[comptime] blueprint: Blueprint,
) -> u32 {
    base + comptime![blueprint.notes_at() + (kind * blueprint.shape.keys * 4) as u32]
        + stage * comptime![blueprint.note_bytes()]
        + UNIT_POS % 4u32 * 8u32
}

/// Replaces what belongs to a key and a row that does not see it by 0.
#[cube]
pub(super) fn hide<WS: Size>(
    pairs: Vector<f32, WS>,
    warp: &Warp,
    room: &[u32],
    stage: u32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, WS> {
    let rows = comptime![blueprint.shape.keys];
    let mut pairs = pairs;
    let first = noted_bounds(room, stage, 0u32, blueprint);
    let last = noted_bounds(room, stage, comptime![rows as u32 - 1], blueprint);
    let key_len = numbers.first_position + numbers.query_len as i32;
    let last_key = min(warp.first_key + comptime![blueprint.warp_rows as i32], key_len) - 1;
    let sight = comptime![blueprint.sight()];
    if !all_see(first, last, warp.first_key, last_key, numbers.window, numbers.sinks, sight) {
        let lane = UNIT_POS % 32u32;
        let first_key = warp.first_key + (lane / 4u32) as i32;
        #[unroll]
        for eight in 0..comptime![rows / 8] {
            #[unroll]
            for half in 0..2usize {
                let row = lane % 4u32 * 2u32 + comptime![(eight * 8 + half) as u32];
                let bounds = noted_bounds(room, stage, row, blueprint);
                #[unroll]
                for of_keys in 0..comptime![2 * blueprint.blocks()] {
                    let key = first_key + comptime![of_keys as i32 * 8];
                    let i = comptime![of_keys / 2 * rows / 2 + eight * 4 + of_keys % 2 * 2 + half];
                    let seen = sees(&bounds, key, numbers.window, numbers.sinks, sight);
                    let shown = select(seen, pairs.extract(i), 0.0f32);
                    pairs.insert(i, shown);
                }
            }
        }
    }
    pairs
}

/// The weights of a step's scores. What key warps need of them, which a softcap makes less, is left in shared memory.
#[cube]
pub(super) fn weigh<WS: Size>(
    scores: Vector<f32, WS>,
    warp: &Warp,
    exponents: u32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, WS> {
    let eights = comptime![blueprint.shape.keys / 8];
    let mut weights = scores;
    #[unroll]
    for eight in 0..eights {
        let pair = load_shared_pair(exponents + comptime![eight as u32 * 32]);
        #[unroll]
        for block in 0..comptime![blueprint.blocks()] {
            let four = comptime![block * eights + eight];
            let mut left = Vector::<f32, Const<4>>::new(0.0f32);
            #[unroll]
            for i in 0..4usize {
                let mut score = weights.extract(comptime![four * 4 + i]);
                let mut slope = 1.0f32;
                if comptime![blueprint.softcap] {
                    score = squash(score, numbers);
                    slope -= score * score;
                }
                let exponent = pair.extract(comptime![i % 2]);
                let weight = exp2_fast(fma(score, numbers.exponent_scale, exponent));
                weights.insert(comptime![four * 4 + i], weight);
                if comptime![blueprint.softcap] {
                    left.insert(i, weight * slope);
                } else {
                    left.insert(i, weight);
                }
            }
            store_shared_four(warp.weights + comptime![four as u32 * 512], left);
        }
    }
    weights
}

/// The gradients of a step's scores, from the products of values and output gradients.
#[cube]
pub(super) fn slopes<WS: Size>(
    products: Vector<f32, WS>,
    warp: &Warp,
    deltas: u32,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, WS> {
    let eights = comptime![blueprint.shape.keys / 8];
    let mut slopes = products;
    #[unroll]
    for eight in 0..eights {
        let pair = load_shared_pair(deltas + comptime![eight as u32 * 32]);
        #[unroll]
        for block in 0..comptime![blueprint.blocks()] {
            let four = comptime![block * eights + eight];
            let weights = load_shared_four(warp.weights + comptime![four as u32 * 512]);
            #[unroll]
            for i in 0..4usize {
                let at = comptime![four * 4 + i];
                let slope = (slopes.extract(at) - pair.extract(comptime![i % 2])) * weights.extract(i);
                slopes.insert(at, slope);
            }
        }
    }
    slopes
}

/// Starts the copies of the rows whose places are noted: queries, or gradients, by the threads of the key warps. Those
/// from `present` on are zeros: they have no weight, but 0 x NaN is NaN.
#[cube]
pub(super) fn copy_step(
    unit: u32,
    source: u64,
    room: &[u32],
    #[comptime] starts: u32,
    present: u32,
    destination: u32,
    #[comptime] tile: Tile,
) {
    #[unroll]
    for panel in 0..comptime![tile.panels()] {
        let place = place(unit, panel, tile);
        let from = source + (place.column * 16u32) as u64;
        let at_once = comptime![tile.rows_at_once(panel)];
        #[unroll]
        for pass in 0..comptime![tile.rows / at_once] {
            let row = place.row + comptime![(pass * at_once) as u32];
            let start = room[(starts + row) as usize];
            ptx::copy_16_or_zeros(
                destination + place.offset + comptime![tile.at(panel, pass * at_once)],
                from + start as u64 * 2u64 + comptime![(panel * SWIZZLE) as u64],
                select(row < present, 16u32, 0u32),
            );
        }
    }
}
