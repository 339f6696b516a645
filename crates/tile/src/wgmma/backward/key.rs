//! Gradients of keys and values: one cube, one tile of 128 keys of one kv head, which meets the rows that see them, of all
//! query heads that share them.
//!
//! Scores are computed transposed, `S^T = K Q^T`, and so is `V dO^T`: what a warpgroup makes of them, weights and slopes of
//! its own 64 keys, is then in the registers that the products `dV += P^T dO` and `dK += dS^T Q` take it from. While
//! one warpgroup computes weights or slopes the other's products run.

// In a kernel `%` is one instruction and `is_multiple_of` is not there; an `if` on compile-time values stays apart from
// one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use cubecl::prelude::*;

use super::rows::{
    DELTAS, EXPONENTS, Ring, barrier_words, fetch_rows, note_words, noted_bounds, start_words,
};
use crate::{
    arguments::BackwardTensors,
    mma::backward::{
        key::redo_key,
        parts::{add_row, clear_keys, pack},
    },
    rows::{List, all_see, entries_that_see, sees},
    tensor_core::{
        Blueprint, Numbers, SWIZZLE,
        ptx::{exp2_fast, global_address, load_shared_pair, shared_address},
    },
    wgmma::{
        copies::load_tile,
        kernel::{COMPUTE_REGISTERS, FETCH_REGISTERS, WARPGROUP, WARPGROUP_ROWS, arrive_plane, stage_of},
        ptx,
    },
};

/// Replaces what belongs to a key and a row that does not see it by 0.
#[cube]
fn hide<WS: Size>(
    pairs: Vector<f32, WS>,
    first_key: i32,
    notes: &[u32],
    stage: u32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, WS> {
    let sight = comptime![blueprint.sight()];
    let lane = UNIT_POS % 32u32;
    let first_key = first_key + (lane / 4u32) as i32;
    let mut pairs = pairs;
    #[unroll]
    for eight in 0..comptime![blueprint.shape.keys / 8] {
        #[unroll]
        for half in 0..2usize {
            let row = lane % 4u32 * 2u32 + comptime![(eight * 8 + half) as u32];
            let bounds = noted_bounds(notes, stage, row, blueprint);
            #[unroll]
            for lower in 0..2usize {
                let key = first_key + comptime![lower as i32 * 8];
                let i = comptime![eight * 4 + lower * 2 + half];
                let seen = sees(&bounds, key, numbers.window, numbers.sinks, sight);
                let shown = select(seen, pairs.extract(i), 0.0f32);
                pairs.insert(i, shown);
            }
        }
    }
    pairs
}

/// One tile of keys per cube. `WS`, `WP` and `WO` count a thread's scores, packed weights and sums of one gradient.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn key_kernel<E: Float, WS: Size, WP: Size, WO: Size>(
    tensors: &BackwardTensors<E, E>,
    key_map: &TensorMap<E, Tiled>,
    value_map: &TensorMap<E, Tiled>,
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
    ptx::one_cube_per_multiprocessor();
    let sight = comptime![blueprint.sight()];
    let shape = comptime![blueprint.shape];
    let stages = comptime![blueprint.stages];
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

    let room = Shared::<[u32]>::new_aligned_slice(comptime![blueprint.tile_bytes() / 4], 1024usize);
    let barriers = Shared::<[u32]>::new_aligned_slice(comptime![barrier_words(blueprint)], 16usize);
    let mut notes =
        Shared::<[u32]>::new_aligned_slice(comptime![stages as usize * note_words(blueprint)], 16usize);
    let mut starts = Shared::<[u32]>::new_slice(comptime![start_words(blueprint)]);
    let base = shared_address(&room);
    let barrier = shared_address(&barriers);
    let resident = barrier + comptime![stages * 16];
    let ring = Ring {
        rows: base + comptime![2 * blueprint.query_bytes() as u32],
        full: barrier,
        empty: barrier + comptime![stages * 8],
    };
    if UNIT_POS == 0 {
        #[unroll]
        for stage in 0..stages {
            ptx::barrier_init(ring.full + comptime![stage * 8], WARPGROUP);
            ptx::barrier_init(ring.empty + comptime![stage * 8], comptime![blueprint.warpgroups() * 4]);
        }
        ptx::barrier_init(resident, 1u32);
        ptx::barriers_ready();
        ptx::arrive_expecting(resident, comptime![2 * blueprint.query_bytes() as u32]);
        load_tile::<E>(key_map, base, resident, batch, kv_head, start, comptime![shape.rows], blueprint);
        let value_room = base + comptime![blueprint.query_bytes() as u32];
        load_tile::<E>(
            value_map,
            value_room,
            resident,
            batch,
            kv_head,
            start,
            comptime![shape.rows],
            blueprint,
        );
    }
    sync_cube();

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
        ptx::wait_parity(resident, 0u32);
        if unset != 0u32 {
            clear_keys(key_gradient, value_gradient, list_index, start, key_len, blueprint);
        }
        terminate!();
    }
    let steps = ptx::uniform((entries.end - entries.begin).div_ceil(comptime![shape.keys as u32]));

    let warpgroup = ptx::uniform(UNIT_POS / WARPGROUP);
    if warpgroup == comptime![blueprint.warpgroups()] {
        ptx::fewer_registers(FETCH_REGISTERS);
        fetch_rows::<E>(
            &entries,
            &list,
            list_index,
            tensors,
            rows,
            sequences,
            &ring,
            &mut notes,
            &mut starts,
            &numbers,
            blueprint,
        );
    } else {
        ptx::more_registers(COMPUTE_REGISTERS);
        let row_panel = comptime![shape.keys * SWIZZLE];
        let key_panel = comptime![shape.rows * SWIZZLE];
        let tile_bytes = comptime![blueprint.key_bytes() as u32];
        let lane = UNIT_POS % 32u32;
        let warp_key = UNIT_POS / 32u32 * 16u32;
        let first_key = (start + warp_key) as i32;
        let last_key = min(first_key + 16, key_len as i32) - 1;
        let mine = base + warpgroup * comptime![WARPGROUP_ROWS * SWIZZLE as u32];
        let keys = ptx::descriptor(mine, key_panel);
        let values = ptx::descriptor(mine + comptime![blueprint.query_bytes() as u32], key_panel);
        let noted = shared_address(&notes) + lane % 4u32 * 8u32;

        let mut key_sums = Vector::<f32, WO>::new(0.0f32);
        let mut value_sums = Vector::<f32, WO>::new(0.0f32);
        ptx::wait_parity(resident, 0u32);
        for step in 0..steps {
            let (stage, phase) = stage_of(step, stages);
            let at = ring.rows + stage * comptime![2 * tile_bytes];
            let queries = ptx::descriptor(at, row_panel);
            let gradients = ptx::descriptor(at + tile_bytes, row_panel);
            ptx::wait_parity(ring.full + stage * 8u32, phase);
            let scores = ptx::scores_begin::<WS>(keys, queries, shape);
            let products = ptx::scores_begin::<WS>(values, gradients, shape);
            let lowest = noted_bounds(&notes, stage, 0u32, blueprint);
            let highest = noted_bounds(&notes, stage, comptime![shape.keys as u32 - 1], blueprint);
            let all = all_see(lowest, highest, first_key, last_key, numbers.window, numbers.sinks, sight);

            let mut weights = ptx::scores_end::<WS>(scores, 1usize, shape);
            let noted = noted + stage * comptime![note_words(blueprint) as u32 * 4];
            #[unroll]
            for eight in 0..comptime![shape.keys / 8] {
                let exponents =
                    load_shared_pair(noted + comptime![(EXPONENTS * shape.keys * 4 + eight * 32) as u32]);
                #[unroll]
                for i in 0..4usize {
                    let at = comptime![eight * 4 + i];
                    let exponent = exponents.extract(comptime![i % 2]);
                    let weight = exp2_fast(fma(weights.extract(at), numbers.exponent_scale, exponent));
                    weights.insert(at, weight);
                }
            }
            if !all {
                weights = hide::<WS>(weights, first_key, &notes, stage, &numbers, blueprint);
            }
            let packed = pack::<WS, WP>(&weights, comptime![shape.keys / 2], comptime![shape.operand]);
            let value_sum = ptx::values_begin::<WO, WP>(value_sums, packed, gradients, shape);

            let mut slopes = ptx::scores_end::<WS>(products, 1usize, shape);
            #[unroll]
            for eight in 0..comptime![shape.keys / 8] {
                let deltas =
                    load_shared_pair(noted + comptime![(DELTAS * shape.keys * 4 + eight * 32) as u32]);
                #[unroll]
                for i in 0..4usize {
                    let at = comptime![eight * 4 + i];
                    let slope = (slopes.extract(at) - deltas.extract(comptime![i % 2])) * weights.extract(at);
                    slopes.insert(at, slope);
                }
            }
            if !all {
                slopes = hide::<WS>(slopes, first_key, &notes, stage, &numbers, blueprint);
            }
            let sloped = pack::<WS, WP>(&slopes, comptime![shape.keys / 2], comptime![shape.operand]);
            let key_sum = ptx::values_begin::<WO, WP>(key_sums, sloped, queries, shape);
            value_sums = ptx::values_end::<WO, WP>(value_sum, packed, shape);
            key_sums = ptx::values_end::<WO, WP>(key_sum, sloped, shape);
            arrive_plane(ring.empty + stage * 8u32);
        }

        let key_target = global_address::<f32>(key_gradient.as_ptr());
        let value_target = global_address::<f32>(value_gradient.as_ptr());
        let upper = start + warp_key + lane / 4u32;
        let row_bytes = comptime![shape.dim as u64 * 4];
        let offset = (list_index * key_len + upper) as u64 * row_bytes;
        // The same of values and of keys: sums that are not finite are left out, and computed again.
        let mut odd = Array::<u32>::new(4usize);
        #[unroll]
        for half in 0..2usize {
            let at = offset + comptime![half as u64 * 8 * shape.dim as u64 * 4];
            let written = upper + comptime![half as u32 * 8] < key_len;
            odd[half] = add_row::<WO>(
                &value_sums,
                value_target + at,
                1.0f32,
                unset,
                written,
                0usize,
                half,
                blueprint,
            );
            odd[half + 2] =
                add_row::<WO>(&key_sums, key_target + at, scale, unset, written, 0usize, half, blueprint);
        }
        if plane_any(odd[0] + odd[1] + odd[2] + odd[3] > 0u32) {
            for r in 0..32u32 {
                // 16 values, then 16 keys.
                let upper = select(r < 16u32, odd[0], odd[2]);
                let lower = select(r < 16u32, odd[1], odd[3]);
                let row = r % 16u32;
                if plane_shuffle(select(row < 8u32, upper, lower), (row % 8u32) * 4u32) > 0u32 {
                    redo_key::<E>(
                        r >= 16u32,
                        list_index,
                        start + warp_key + row,
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
