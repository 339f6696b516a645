//! Gradients of keys and values: one cube, one tile of keys of one kv head, which meets the rows that see them, of all
//! query heads that share them.
//!
//! Scores are computed transposed, `S^T = K Q^T`: a warp then has its own keys' weights in the registers that the
//! product with `dO` takes them from. Two kinds of warps share the work, and there is one of each for the same keys. A
//! **value warp** computes scores, from them weights, and sums `dV += P^T dO`. A **key warp** computes `V dO^T`, makes
//! slopes of it with the weights, which the other one leaves in shared memory, and sums `dK += dS^T Q`. Either holds
//! one gradient, so that there is room for 32 keys: what is read of rows serves twice as many products as it would in a
//! warp that holds both.
//!
//! Both do the same at the same time, on other operands: the second product of a tile, then the first of the next. Of a
//! tile's two halves value warps have the first to wait for their weights' exponentials, and key warps the second for
//! the weights, so one kind's products fill the other's gaps. Key warps copy rows, gathered by index, into the places
//! of those that both kinds have left.
//!
//! In the blueprint the keys take the place of rows, as they do in the products: `rows` are the keys of the cube,
//! `warp_rows` those of a warp, `keys` the rows of a step, `stages` is 2.

// In a kernel `%` is one instruction and `is_multiple_of` is not there; an `if` on compile-time values stays apart from
// one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

mod redo;
mod step;

use cubecl::prelude::*;

pub(crate) use self::redo::redo_key;
use self::step::{
    DELTAS, EXPONENTS, FIRSTS, POSITIONS, Warp, copy_step, hide, note, pairs_noted, slopes, weigh,
};
use super::parts::{add_row, clear_keys, exponent_of, pack, row_of_id};
use crate::{
    arguments::BackwardTensors,
    mma::{
        copies::{Tile, copy_tile, source_of},
        ptx,
    },
    rows::{INVALID_ROW, List, bounds_of_row, entries_that_see, row_of},
    tensor_core::{
        Blueprint, Numbers, SWIZZLE,
        ptx::{global_address, shared_address, turn_give, turn_wait, unit_again},
    },
};

/// Warps of both kinds.
pub(super) const fn threads(blueprint: Blueprint) -> u32 {
    2 * blueprint.threads()
}

/// Named barrier: the value warps have left a tile of rows, and where the next ones begin is noted.
const LEFT: u32 = 1;
/// Named barrier: the key warps have taken their weights.
const TAKEN: u32 = 2;

/// One tile of keys per cube. `WS`, `WP` and `WO` count a thread's scores, packed weights and sums of all keys of its
/// warp.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn key_kernel<E: Float, WS: Size, WP: Size, WO: Size>(
    tensors: &BackwardTensors<E, E>,
    rows: &[u32],
    list_counts: &[u32],
    sequences: &[u32],
    key_gradient: &mut [f32],
    value_gradient: &mut [f32],
    numbers: Numbers,
    scale: f32,
    unset: u32,
    #[comptime] blueprint: Blueprint,
    #[define(E)] _element: ElemType,
    #[define(WS, WP, WO)] _sizes: [usize; 3],
) {
    let sight = comptime![blueprint.sight()];
    let shape = comptime![blueprint.shape];
    let kind_threads = comptime![blueprint.threads()];
    let threads = comptime![threads(blueprint) as usize];
    let key_len = numbers.first_position as u32 + numbers.query_len;

    // Whole lists take turns; within a turn the first keys, which most rows see, come first.
    let tiles = key_len.div_ceil(comptime![shape.rows as u32]);
    let turn = CUBE_POS as u32 / (numbers.lists_at_once * tiles);
    let lists_before = turn * numbers.lists_at_once;
    let lists = min(numbers.lists_at_once, numbers.lists - lists_before);
    let within = CUBE_POS as u32 - lists_before * tiles;
    let list_index = lists_before + within % lists;
    let start = within / lists * comptime![shape.rows as u32];
    let batch = list_index / numbers.kv_heads;
    let kv_head = list_index % numbers.kv_heads;

    let mut room =
        Shared::<[u32]>::new_aligned_slice(comptime![blueprint.key_room() as usize / 4], 1024usize);
    let base = shared_address(&room);
    let resident = comptime![Tile { rows: shape.rows, dim: shape.dim, threads }];
    let key_source = source_of::<E>(&tensors.key, batch, kv_head, &tensors.layout.key);
    let value_source = source_of::<E>(&tensors.value, batch, kv_head, &tensors.layout.value);
    copy_tile(UNIT_POS, &key_source, start, key_len, base, resident);
    copy_tile(
        UNIT_POS,
        &value_source,
        start,
        key_len,
        base + comptime![blueprint.query_bytes() as u32],
        resident,
    );

    let mut count = numbers.query_len * numbers.group;
    if comptime![blueprint.routed] {
        count = list_counts[(numbers.reach * numbers.lists + list_index) as usize];
    }
    let list = List {
        start: (numbers.reach * numbers.lists + list_index) * numbers.query_len * numbers.group,
        count,
        group: numbers.group,
        query_len: numbers.query_len,
        first_position: numbers.first_position,
    };
    let last = min(start + comptime![shape.rows as u32], key_len) - 1u32;
    let entries = entries_that_see(
        &list,
        start as i32,
        last as i32,
        numbers.window,
        numbers.sinks,
        rows,
        sequences,
        true,
        sight,
    );
    if entries.begin >= entries.end {
        ptx::copies_wait_all();
        if unset != 0u32 {
            clear_keys(key_gradient, value_gradient, list_index, start, key_len, blueprint);
        }
        terminate!();
    }
    let entries_left = entries.end - entries.begin;
    let steps = entries_left.div_ceil(comptime![shape.keys as u32]);

    let lane = UNIT_POS % 32u32;
    let unit = UNIT_POS % kind_threads;
    let of_keys = UNIT_POS >= kind_threads;
    let warp_of_kind = unit / 32u32;
    let warp_key = warp_of_kind * comptime![blueprint.warp_rows as u32];
    let warp = Warp {
        first_key: (start + warp_key) as i32,
        weights: base
            + comptime![blueprint.weights_at()]
            + warp_of_kind * comptime![(blueprint.warp_rows * shape.keys * 4) as u32]
            + lane * 16u32,
    };
    // Value warps multiply keys and queries, then weights and gradients; key warps values and gradients, then slopes
    // and queries.
    let ring = base + comptime![blueprint.rows_at()];
    let gradients = comptime![blueprint.key_bytes() as u32];
    let resident_at = base
        + select(of_keys, comptime![blueprint.query_bytes() as u32], 0u32)
        + warp_key * comptime![SWIZZLE as u32]
        + ptx::across(lane);
    let first_at = ring + select(of_keys, gradients, 0u32) + ptx::down(lane);
    let second_at = ring + select(of_keys, 0u32, gradients) + ptx::across(lane);

    let query_source = global_address::<E>(tensors.query.as_ptr());
    let d_out_source = global_address::<E>(tensors.d_out.as_ptr());
    let step_tile =
        comptime![Tile { rows: shape.keys, dim: shape.dim, threads: blueprint.threads() as usize }];
    let starts = comptime![blueprint.starts_at() / 4];
    let notes = unit < comptime![shape.keys as u32];
    let mut id = row_of(&list, min(entries.begin + unit, entries.end - 1u32), rows, sight);

    let mut sums = Vector::<f32, WO>::new(0.0f32);
    let mut pairs = Vector::<f32, WS>::new(0.0f32);
    // A step ends the tile before the one before, begins the one before, and copies its own.
    for step in 0..steps + 2u32 {
        let stage = step % 2u32;
        let before = 1u32 - stage;
        let begins = step > 0u32 && step <= steps;
        if of_keys {
            if step > 1u32 {
                let deltas = pairs_noted(stage, DELTAS, base, blueprint);
                pairs = slopes::<WS>(pairs, &warp, deltas, blueprint);
            }
            if begins {
                turn_give(TAKEN, threads);
            }
        }
        if step > 1u32 {
            pairs = hide::<WS>(pairs, &warp, &room, stage, &numbers, blueprint);
            let count = comptime![blueprint.blocks() * shape.keys / 2];
            let packed = pack::<WS, WP>(&pairs, count, comptime![shape.operand]);
            let at = second_at + stage * comptime![blueprint.step_bytes()];
            sums = ptx::values::<WO, WP>(sums, packed, at, blueprint);
        }

        // What is asked of memory here comes while the products run.
        let mut next_id = id;
        let mut lse_noted = 0.0f32;
        let mut delta_noted = 0.0f32;
        let present = entries_left - min(step * comptime![shape.keys as u32], entries_left);
        if present > 0u32 {
            if of_keys {
                let unit = unit_again() % kind_threads;
                let row = row_of_id::<E>(id, batch, kv_head, tensors, &numbers);
                if notes {
                    room[(starts + unit) as usize] = row.query;
                    room[(starts + comptime![shape.keys as u32] + unit) as usize] = row.d_out;
                }
                turn_wait(LEFT, threads);
                let to = ring + stage * comptime![blueprint.step_bytes()];
                copy_step(unit, query_source, &room, starts, present, to, step_tile);
                let d_out_starts = comptime![starts + shape.keys as u32];
                copy_step(unit, d_out_source, &room, d_out_starts, present, to + gradients, step_tile);
                lse_noted = tensors.lse[row.index as usize];
                delta_noted = tensors.delta[row.index as usize];
                let next = entries.begin + (step + 1u32) * comptime![shape.keys as u32] + unit;
                next_id = row_of(&list, min(next, entries.end - 1u32), rows, sight);
            } else {
                turn_give(LEFT, threads);
            }
        }
        if begins {
            let at = first_at + before * comptime![blueprint.step_bytes()];
            pairs = ptx::scores::<WS>(resident_at, at, blueprint);
            if !of_keys {
                turn_wait(TAKEN, threads);
                let exponents = pairs_noted(before, EXPONENTS, base, blueprint);
                pairs = weigh::<WS>(pairs, &warp, exponents, &numbers, blueprint);
            }
        }
        if of_keys && notes && present > 0u32 {
            let bounds = bounds_of_row(&list, id, sequences, sight);
            // Rows beyond the last have weights of 0.
            let exponent = exponent_of(lse_noted, id >= INVALID_ROW, &numbers);
            let exponent = select(unit < present, exponent, numbers.neg_inf);
            let delta_noted = select(unit < present, delta_noted, 0.0f32);
            note(&mut room, stage, unit, EXPONENTS, u32::reinterpret(exponent), blueprint);
            note(&mut room, stage, unit, DELTAS, u32::reinterpret(delta_noted), blueprint);
            note(&mut room, stage, unit, POSITIONS, u32::reinterpret(bounds.position), blueprint);
            if comptime![blueprint.ragged] {
                note(&mut room, stage, unit, FIRSTS, u32::reinterpret(bounds.first), blueprint);
            }
        }
        id = next_id;
        ptx::copies_wait_all();
        sync_cube();
    }

    let key_target = global_address::<f32>(key_gradient.as_ptr());
    let value_target = global_address::<f32>(value_gradient.as_ptr());
    let target = select(of_keys, key_target, value_target);
    let factor = select(of_keys, scale, 1.0f32);
    #[unroll]
    for block in 0..comptime![blueprint.blocks()] {
        let first = start + warp_key + comptime![block as u32 * 16];
        let upper = first + lane / 4u32;
        let row_bytes = comptime![shape.dim as u64 * 4];
        let upper_at = target + (list_index * key_len + upper) as u64 * row_bytes;
        let lower_at = upper_at + comptime![8 * shape.dim as u64 * 4];
        let upper_odd =
            add_row::<WO>(&sums, upper_at, factor, unset, upper < key_len, block, 0usize, blueprint);
        let written = upper + 8u32 < key_len;
        let lower_odd = add_row::<WO>(&sums, lower_at, factor, unset, written, block, 1usize, blueprint);
        if plane_any(upper_odd + lower_odd > 0u32) {
            for r in 0..16u32 {
                let odd = plane_shuffle(select(r < 8u32, upper_odd, lower_odd), (r % 8u32) * 4u32);
                if odd > 0u32 {
                    redo_key::<E>(
                        of_keys,
                        list_index,
                        first + r,
                        &entries,
                        &list,
                        tensors,
                        rows,
                        sequences,
                        key_gradient,
                        value_gradient,
                        &numbers,
                        scale,
                        unset,
                        blueprint,
                    );
                }
            }
        }
    }
}
