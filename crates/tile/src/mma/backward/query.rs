//! Gradients of queries: one cube, one item of rows, which meets the keys that its rows see.
//!
//! As the forward kernel: tiles of values and of keys take turns in a ring. A step multiplies gradients and values,
//! `dO V^T`; the next one queries and keys, and with the slopes that follow from both sums `dQ += dS K`, from the same
//! tile of keys. Weights need no running maximum, since the log-sum-exp is known, so nothing is ever rescaled.

// In a kernel `%` is one instruction and `is_multiple_of` is not there; an `if` on compile-time values stays apart from
// one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use cubecl::prelude::*;

use super::parts::{add_one, add_row, exponent_of, key_start, pack, pair_of, row_of_id};
use crate::{
    arguments::BackwardTensors,
    mma::{
        copies::{copy_rows, source_of},
        kernel::{note_row, positions_of},
        ptx,
        ring::{Ring, Turns, fill},
    },
    tensor_core::{
        Blueprint, Numbers, SWIZZLE,
        items::{Keys, bounds_of_row, item_of, keys_of, needs_mask, sees, sinks_begin, tile_start},
        ptx::{exp2_fast, global_address, shared_address, unit_again},
        softmax::squash,
    },
};

/// Shared memory, in bytes: queries, gradients of their outputs, ring.
impl Blueprint {
    pub(super) const fn query_room(self) -> u32 {
        2 * self.query_bytes() as u32 + self.stages * self.key_bytes() as u32
    }

    /// Where it is noted where rows begin until they are being copied, in words: in the ring's last place, which is
    /// filled last.
    const fn row_starts_at(self) -> u32 {
        (self.query_room() - self.key_bytes() as u32) / 4
    }
}

/// Computes the gradient of a query again, key by key, by all threads of a warp.
#[cube]
pub(crate) fn redo<E: Float>(
    id: u32,
    list: u32,
    tensors: &BackwardTensors<E, E>,
    sequences: &[u32],
    gradient: &mut [f32],
    keys: &Keys,
    numbers: &Numbers,
    scale: f32,
    unset: u32,
    #[comptime] blueprint: Blueprint,
) {
    let parts = comptime![blueprint.shape.dim / 32];
    let lane = UNIT_POS % 32u32;
    let batch = list / numbers.kv_heads;
    let kv_head = list % numbers.kv_heads;
    let row = row_of_id::<E>(id, batch, kv_head, tensors, numbers);
    let of_row = tensors.lse[row.index as usize];
    let exponent = exponent_of(of_row, row.invalid, numbers);
    let bounds = bounds_of_row(id, sequences, numbers, blueprint);
    let mut sums = Array::<f32>::new(parts);
    #[unroll]
    for part in 0..parts {
        sums[part] = 0.0f32;
    }
    let begin = sinks_begin(keys, blueprint);
    let mut j = select(keys.sinks_end > begin, begin, keys.begin);
    // A row without keys has no gradient.
    while j < keys.end && of_row != numbers.neg_inf {
        if sees(&bounds, j, j < keys.sinks_end, keys, numbers, blueprint) {
            let key_at = key_start(list, j as u32, &tensors.layout.key, numbers);
            let value_at = key_start(list, j as u32, &tensors.layout.value, numbers);
            let pair = pair_of::<E>(tensors, &row, key_at, value_at, exponent, numbers, blueprint);
            #[unroll]
            for part in 0..parts {
                let k = tensors.key[(key_at + lane + comptime![part as u32 * 32]) as usize];
                sums[part] = fma(pair.slope, f32::cast_from(k), sums[part]);
            }
        }
        j = select(j + 1 == keys.sinks_end, keys.begin, j + 1);
    }
    let target = row.index * comptime![blueprint.shape.dim as u32] + lane;
    #[unroll]
    for part in 0..parts {
        let at = (target + comptime![part as u32 * 32]) as usize;
        add_one(gradient, at, sums[part] * scale, unset);
    }
}

/// One item per cube; cubes beyond the last item leave at once. `WS`, `WP` and `WO` count a thread's scores, packed
/// slopes and sums of all rows of its warp.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn query_kernel<E: Float, WS: Size, WP: Size, WO: Size>(
    tensors: &BackwardTensors<E, E>,
    rows: &[u32],
    items: &[u32],
    item_counts: &[u32],
    sequences: &[u32],
    gradient: &mut [f32],
    numbers: Numbers,
    scale: f32,
    unset: u32,
    #[comptime] blueprint: Blueprint,
    #[define(E)] _element: ElemType,
    #[define(WS, WP, WO)] _sizes: [usize; 3],
) {
    let slot = CUBE_POS as u32;
    let mut count = numbers.items;
    if comptime![blueprint.routed] {
        count = item_counts[numbers.reach as usize];
    }
    if slot >= count {
        terminate!();
    }
    let shape = comptime![blueprint.shape];
    let blocks = comptime![blueprint.blocks()];
    let mut tiles =
        Shared::<[u32]>::new_aligned_slice(comptime![blueprint.query_room() as usize / 4], 1024usize);
    let mut row_ids = Shared::<[u32]>::new_slice(comptime![shape.rows]);
    let kinds = comptime![if blueprint.ragged { 2 } else { 1 }];
    let mut bounds = Shared::<[i32]>::new_slice(comptime![kinds * shape.rows]);
    let query_room = shared_address(&tiles);
    let d_out_room = query_room + comptime![blueprint.query_bytes() as u32];
    let ring_room = d_out_room + comptime![blueprint.query_bytes() as u32];
    let stages = comptime![blueprint.stages];

    let item = item_of(slot, items, &numbers, blueprint);
    let keys = keys_of(&item, rows, sequences, &numbers, blueprint);
    let batch = item.list / numbers.kv_heads;
    let kv_head = item.list % numbers.kv_heads;
    let key_source = source_of::<E>(&tensors.key, batch, kv_head, &tensors.layout.key);
    let value_source = source_of::<E>(&tensors.value, batch, kv_head, &tensors.layout.value);
    let turns = Turns { first: value_source, second: key_source };
    let query_starts = comptime![blueprint.row_starts_at()];
    let d_out_starts = comptime![blueprint.row_starts_at() + shape.rows as u32];
    if UNIT_POS < comptime![shape.rows as u32] {
        let id = note_row(&item, &mut row_ids, &mut bounds, rows, sequences, &numbers, blueprint);
        let row = row_of_id::<E>(id, batch, kv_head, tensors, &numbers);
        tiles[(query_starts + UNIT_POS) as usize] = row.query;
        tiles[(d_out_starts + UNIT_POS) as usize] = row.d_out;
    }
    sync_cube();
    // They join the first tile's group.
    let rows_tile = comptime![blueprint.query_tile()];
    copy_rows(global_address::<E>(tensors.query.as_ptr()), &tiles, query_starts, query_room, rows_tile);
    copy_rows(global_address::<E>(tensors.d_out.as_ptr()), &tiles, d_out_starts, d_out_room, rows_tile);
    fill(&turns, &keys, ring_room, &numbers, blueprint);

    let lane = UNIT_POS % 32u32;
    let warp_row = UNIT_POS / 32u32 * comptime![blueprint.warp_rows as u32];
    let mut exponents = Array::<f32>::new(comptime![2 * blocks]);
    let mut deltas = Array::<f32>::new(comptime![2 * blocks]);
    #[unroll]
    for eight in 0..comptime![2 * blocks] {
        let id = row_ids[(warp_row + comptime![eight as u32 * 8] + lane / 4u32) as usize];
        let row = row_of_id::<E>(id, batch, kv_head, tensors, &numbers);
        exponents[eight] = exponent_of(tensors.lse[row.index as usize], row.invalid, &numbers);
        deltas[eight] = tensors.delta[row.index as usize];
    }
    let query_at = query_room + warp_row * comptime![SWIZZLE as u32] + ptx::across(lane);
    let d_out_at = query_at + comptime![blueprint.query_bytes() as u32];
    let first_at = ring_room + ptx::down(lane);
    let second_at = ring_room + ptx::across(lane);

    let mut sums = Vector::<f32, WO>::new(0.0f32);
    let mut ring = Ring::new(blueprint);
    for tile in 0..keys.tiles {
        ring.wait(blueprint);
        ring.copy(unit_again(), &turns, &keys, tile, comptime![stages - 1], ring_room, &numbers, blueprint);
        let products = ptx::scores::<WS>(d_out_at, first_at + ring.now, blueprint);
        ring.turn(blueprint);

        ring.wait(blueprint);
        ring.copy(unit_again(), &turns, &keys, tile, stages, ring_room, &numbers, blueprint);
        let mut slopes = ptx::scores::<WS>(query_at, first_at + ring.now, blueprint);
        #[unroll]
        for i in 0..comptime![blocks * shape.keys / 2] {
            // Of 16 rows, those of a thread take turns, two keys at a time.
            let row = comptime![i / (shape.keys / 2) * 2 + i / 2 % 2];
            let mut score = slopes.extract(i);
            let mut slope = products.extract(i) - deltas[row];
            if comptime![blueprint.softcap] {
                score = squash(score, &numbers);
                slope *= 1.0f32 - score * score;
            }
            let weight = exp2_fast(fma(score, numbers.exponent_scale, exponents[row]));
            slopes.insert(i, slope * weight);
        }
        let start = tile_start(&keys, tile, blueprint);
        let sinks = tile < keys.sink_tiles;
        let at = positions_of(&bounds, warp_row, 0usize, blueprint);
        if needs_mask(&at.first, &at.last, start, sinks, &keys, &numbers, blueprint) {
            let first_key = start + (lane % 4u32 * 2u32) as i32;
            #[unroll]
            for block in 0..blocks {
                let at = positions_of(&bounds, warp_row, block, blueprint);
                #[unroll]
                for i in 0..comptime![shape.keys / 2] {
                    let key = first_key + comptime![(i / 4 * 8 + i % 2) as i32];
                    let seen = if comptime![i / 2 % 2 == 0] {
                        sees(&at.upper, key, sinks, &keys, &numbers, blueprint)
                    } else {
                        sees(&at.lower, key, sinks, &keys, &numbers, blueprint)
                    };
                    let i = comptime![block * shape.keys / 2 + i];
                    let shown = select(seen, slopes.extract(i), 0.0f32);
                    slopes.insert(i, shown);
                }
            }
        }
        let packed = pack::<WS, WP>(&slopes, comptime![blocks * shape.keys / 2], comptime![shape.operand]);
        sums = ptx::values::<WO, WP>(sums, packed, second_at + ring.now, blueprint);
        ring.turn(blueprint);
    }

    let target = global_address::<f32>(gradient.as_ptr());
    #[unroll]
    for block in 0..blocks {
        let first_row = warp_row + comptime![block as u32 * 16];
        let mut odd = Array::<u32>::new(2usize);
        #[unroll]
        for half in 0..2usize {
            let at = first_row + comptime![half as u32 * 8] + lane / 4u32;
            let id = row_ids[at as usize];
            let row = row_of_id::<E>(id, batch, kv_head, tensors, &numbers);
            let written = at < item.rows;
            let to = target + row.index as u64 * comptime![shape.dim as u64 * 4];
            odd[half] = add_row::<WO>(&sums, to, scale, unset, written, block, half, blueprint);
        }
        if plane_any(odd[0] + odd[1] > 0u32) {
            for r in 0..16u32 {
                if plane_shuffle(select(r < 8u32, odd[0], odd[1]), (r % 8u32) * 4u32) > 0u32 {
                    redo::<E>(
                        row_ids[(first_row + r) as usize],
                        item.list,
                        tensors,
                        sequences,
                        gradient,
                        &keys,
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
