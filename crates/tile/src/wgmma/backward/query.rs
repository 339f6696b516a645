//! Gradients of queries: one cube, one item of 128 rows, which meets the keys that its rows see.
//!
//! Keys and values come through one ring, in pairs: scores and `dO V^T` are computed from a pair, and with the slopes that
//! follow `dQ += dS K` from the same keys. Weights need no running maximum, since the log-sum-exp is known, so nothing is
//! ever rescaled. While one warpgroup computes slopes the other's products run.

// In a kernel `%` is one instruction and `is_multiple_of` is not there; an `if` on compile-time values stays apart from
// one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use cubecl::prelude::*;

use crate::{
    arguments::BackwardTensors,
    mma::backward::{
        parts::{add_row, exponent_of, pack, row_of_id},
        query::redo,
    },
    tensor_core::{
        Blueprint, Numbers, SWIZZLE,
        items::{
            Keys, bounds_at, bounds_of_row, item_of, keys_between, needs_mask, row_at, sees, tile_start,
        },
        ptx::{exp2_fast, global_address, shared_address},
        softmax::Positions,
    },
    wgmma::{
        copies::{copy_rows, load_tile},
        kernel::{COMPUTE_REGISTERS, FETCH_REGISTERS, WARPGROUP, WARPGROUP_ROWS, arrive_plane, stage_of},
        ptx,
    },
};

/// The barrier of the computing threads among themselves.
const COMPUTING: u32 = 1;

/// A full and an empty barrier of 8 bytes for every stage.
const fn barrier_words(blueprint: Blueprint) -> usize {
    4 * blueprint.stages as usize
}

/// What is noted of the rows, in bytes: ids, bounds, where queries and gradients begin.
#[cfg(test)]
pub(super) fn noted_bytes(blueprint: Blueprint) -> usize {
    4 * (blueprint.row_words() + 2 * blueprint.shape.rows + barrier_words(blueprint))
}

/// Streams pairs of tiles of keys and values through the ring: one thread.
#[cube]
fn stream<E: Float>(
    key_map: &TensorMap<E, Tiled>,
    value_map: &TensorMap<E, Tiled>,
    keys: &Keys,
    batch: u32,
    kv_head: u32,
    ring: u32,
    barrier: u32,
    #[comptime] blueprint: Blueprint,
) {
    let stages = comptime![blueprint.stages];
    let tile_keys = comptime![blueprint.shape.keys];
    let bytes = comptime![blueprint.key_bytes() as u32];
    for tile in 0..keys.tiles {
        let start = tile_start(keys, tile, blueprint) as u32;
        let (stage, phase) = stage_of(tile, stages);
        let full = barrier + stage * 8u32;
        let to = ring + stage * comptime![2 * bytes];
        ptx::wait_parity(full + comptime![stages * 8], phase ^ 1u32);
        ptx::arrive_expecting(full, comptime![2 * bytes]);
        load_tile::<E>(key_map, to, full, batch, kv_head, start, tile_keys, blueprint);
        load_tile::<E>(value_map, to + bytes, full, batch, kv_head, start, tile_keys, blueprint);
    }
}

/// Replaces the slopes of keys that a row does not see by 0.
#[cube]
fn hide<WS: Size>(
    slopes: Vector<f32, WS>,
    at: &Positions,
    start: i32,
    sinks: bool,
    keys: &Keys,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, WS> {
    let first_key = start + (UNIT_POS % 4u32 * 2u32) as i32;
    let mut slopes = slopes;
    #[unroll]
    for i in 0..comptime![blueprint.shape.keys / 2] {
        let key = first_key + comptime![(i / 4 * 8 + i % 2) as i32];
        let seen = if comptime![i / 2 % 2 == 0] {
            sees(&at.upper, key, sinks, keys, numbers, blueprint)
        } else {
            sees(&at.lower, key, sinks, keys, numbers, blueprint)
        };
        let shown = select(seen, slopes.extract(i), 0.0f32);
        slopes.insert(i, shown);
    }
    slopes
}

/// One item per cube; cubes beyond the last item leave at once. `WS`, `WP` and `WO` count a thread's scores, packed
/// slopes and sums.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn query_kernel<E: Float, WS: Size, WP: Size, WO: Size>(
    tensors: &BackwardTensors<E, E>,
    key_map: &TensorMap<E, Tiled>,
    value_map: &TensorMap<E, Tiled>,
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
    ptx::one_cube_per_multiprocessor();
    let slot = CUBE_POS as u32;
    let mut count = numbers.items;
    if comptime![blueprint.routed] {
        count = item_counts[numbers.reach as usize];
    }
    if slot >= count {
        terminate!();
    }
    let shape = comptime![blueprint.shape];
    let stages = comptime![blueprint.stages];
    let tile_rows = comptime![shape.rows as u32];
    let room = Shared::<[u32]>::new_aligned_slice(comptime![blueprint.tile_bytes() / 4], 1024usize);
    let barriers = Shared::<[u32]>::new_aligned_slice(comptime![barrier_words(blueprint)], 16usize);
    let mut row_ids = Shared::<[u32]>::new_slice(comptime![blueprint.row_words()]);
    let mut starts = Shared::<[u32]>::new_slice(comptime![2 * shape.rows]);
    let query_room = shared_address(&room);
    let d_out_room = query_room + comptime![blueprint.query_bytes() as u32];
    let ring = d_out_room + comptime![blueprint.query_bytes() as u32];
    let barrier = shared_address(&barriers);

    let item = item_of(slot, items, &numbers, blueprint);
    let batch = item.list / numbers.kv_heads;
    let kv_head = item.list % numbers.kv_heads;
    if UNIT_POS < tile_rows {
        let id = row_at(&item, UNIT_POS, rows, &numbers, blueprint);
        row_ids[UNIT_POS as usize] = id;
        if comptime![blueprint.ragged] {
            let bounds = bounds_of_row(id, sequences, &numbers, blueprint);
            row_ids[(tile_rows + UNIT_POS) as usize] = u32::reinterpret(bounds.first);
            row_ids[(2u32 * tile_rows + UNIT_POS) as usize] = u32::reinterpret(bounds.position);
        }
        let row = row_of_id::<E>(id, batch, kv_head, tensors, &numbers);
        starts[UNIT_POS as usize] = row.query;
        starts[(tile_rows + UNIT_POS) as usize] = row.d_out;
    }
    if UNIT_POS == 0 {
        #[unroll]
        for stage in 0..stages {
            ptx::barrier_init(barrier + comptime![stage * 8], 1u32);
            let empty = comptime![(stages + stage) * 8];
            ptx::barrier_init(barrier + empty, comptime![blueprint.warpgroups() * 4]);
        }
        ptx::barriers_ready();
    }
    sync_cube();

    let last_row = comptime![shape.rows as u32 - 1];
    let (first_id, last_id) = (row_ids[0], row_ids[last_row as usize]);
    let first = bounds_at(0u32, first_id, &row_ids, sequences, &numbers, blueprint);
    let last = bounds_at(last_row, last_id, &row_ids, sequences, &numbers, blueprint);
    let keys = keys_between(&first, &last, &numbers, blueprint);

    let warpgroup = ptx::uniform(UNIT_POS / WARPGROUP);
    if warpgroup == comptime![blueprint.warpgroups()] {
        ptx::fewer_registers(FETCH_REGISTERS);
        if UNIT_POS % WARPGROUP == 0u32 {
            stream::<E>(key_map, value_map, &keys, batch, kv_head, ring, barrier, blueprint);
        }
    } else {
        ptx::more_registers(COMPUTE_REGISTERS);
        let threads = comptime![blueprint.threads()];
        let query_source = global_address::<E>(tensors.query.as_ptr());
        let d_out_source = global_address::<E>(tensors.d_out.as_ptr());
        copy_rows(query_source, &starts, 0u32, query_room, UNIT_POS, threads, blueprint);
        copy_rows(d_out_source, &starts, tile_rows, d_out_room, UNIT_POS, threads, blueprint);

        let lane = UNIT_POS % 32u32;
        let warp_row = UNIT_POS / 32u32 * 16u32;
        let tile_row = warp_row + lane / 4u32;
        let mut exponents = Array::<f32>::new(2usize);
        let mut deltas = Array::<f32>::new(2usize);
        #[unroll]
        for half in 0..2usize {
            let id = row_ids[(tile_row + comptime![half as u32 * 8]) as usize];
            let row = row_of_id::<E>(id, batch, kv_head, tensors, &numbers);
            exponents[half] = exponent_of(tensors.lse[row.index as usize], row.invalid, &numbers);
            deltas[half] = tensors.delta[row.index as usize];
        }
        let base = warpgroup * WARPGROUP_ROWS;
        let end = base + WARPGROUP_ROWS - 1u32;
        let upper_id = row_ids[tile_row as usize];
        let lower_id = row_ids[(tile_row + 8u32) as usize];
        let at = Positions {
            upper: bounds_at(tile_row, upper_id, &row_ids, sequences, &numbers, blueprint),
            lower: bounds_at(tile_row + 8u32, lower_id, &row_ids, sequences, &numbers, blueprint),
            first: bounds_at(base, row_ids[base as usize], &row_ids, sequences, &numbers, blueprint),
            last: bounds_at(end, row_ids[end as usize], &row_ids, sequences, &numbers, blueprint),
        };
        ptx::copies_end();
        ptx::turn_wait(COMPUTING, comptime![blueprint.threads() as usize]);

        let query_panel = comptime![shape.rows * SWIZZLE];
        let key_panel = comptime![shape.keys * SWIZZLE];
        let tile_bytes = comptime![blueprint.key_bytes() as u32];
        let mine = query_room + warpgroup * comptime![WARPGROUP_ROWS * SWIZZLE as u32];
        let queries = ptx::descriptor(mine, query_panel);
        let gradients = ptx::descriptor(mine + comptime![blueprint.query_bytes() as u32], query_panel);
        let mut sums = Vector::<f32, WO>::new(0.0f32);
        let tiles = ptx::uniform(keys.tiles);
        for tile in 0..tiles {
            let (stage, phase) = stage_of(tile, stages);
            let key_at = ring + stage * comptime![2 * tile_bytes];
            let key_tile = ptx::descriptor(key_at, key_panel);
            let value_tile = ptx::descriptor(key_at + tile_bytes, key_panel);
            ptx::wait_parity(barrier + stage * 8u32, phase);
            let scores = ptx::scores_begin::<WS>(queries, key_tile, shape);
            let products = ptx::scores_begin::<WS>(gradients, value_tile, shape);
            let mut weights = ptx::scores_end::<WS>(scores, 1usize, shape);
            let mut some = 0.0f32;
            #[unroll]
            for i in 0..comptime![shape.keys / 2] {
                let exponent = exponents[comptime![i / 2 % 2]];
                let weight = exp2_fast(fma(weights.extract(i), numbers.exponent_scale, exponent));
                weights.insert(i, weight);
                if comptime![i % 8 == 7] {
                    some += weight;
                }
            }
            ptx::wait_after(some);
            let mut slopes = ptx::scores_end::<WS>(products, 0usize, shape);
            #[unroll]
            for i in 0..comptime![shape.keys / 2] {
                let slope = (slopes.extract(i) - deltas[comptime![i / 2 % 2]]) * weights.extract(i);
                slopes.insert(i, slope);
            }
            let start = tile_start(&keys, tile, blueprint);
            let sinks = tile < keys.sink_tiles;
            if needs_mask(&at.first, &at.last, start, sinks, &keys, &numbers, blueprint) {
                slopes = hide::<WS>(slopes, &at, start, sinks, &keys, &numbers, blueprint);
            }
            let packed = pack::<WS, WP>(&slopes, comptime![shape.keys / 2], comptime![shape.operand]);
            let sum = ptx::values_begin::<WO, WP>(sums, packed, key_tile, shape);
            sums = ptx::values_end::<WO, WP>(sum, packed, shape);
            arrive_plane(barrier + comptime![stages * 8] + stage * 8u32);
        }

        let target = global_address::<f32>(gradient.as_ptr());
        let mut odd = Array::<u32>::new(2usize);
        #[unroll]
        for half in 0..2usize {
            let entry = tile_row + comptime![half as u32 * 8];
            let id = row_ids[entry as usize];
            let row = row_of_id::<E>(id, batch, kv_head, tensors, &numbers);
            let to = target + row.index as u64 * comptime![shape.dim as u64 * 4];
            odd[half] = add_row::<WO>(&sums, to, scale, unset, entry < item.rows, 0usize, half, blueprint);
        }
        if plane_any(odd[0] + odd[1] > 0u32) {
            for r in 0..16u32 {
                if plane_shuffle(select(r < 8u32, odd[0], odd[1]), (r % 8u32) * 4u32) > 0u32 {
                    redo::<E>(
                        row_ids[(warp_row + r) as usize],
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
