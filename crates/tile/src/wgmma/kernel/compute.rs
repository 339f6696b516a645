//! What a warpgroup that computes does with its items.

use cubecl::prelude::*;

use super::{
    ARRIVALS, ITEM_STAGES, Room, WARPGROUP, WARPGROUP_ROWS, arrive_plane,
    cuts::{Cuts, Piece},
    items::announced,
    parts::{is_last, park, take_up},
    slices::{add_before, give_turn, wait_for_turn},
    stage_of, tickets,
};
use crate::{
    portable::Strides,
    rows::INVALID_ROW,
    tensor_core::{
        Blueprint, Layout, Numbers, SWIZZLE,
        finish::{finish, redo_odd},
        items::{bounds_at, keys_between, whole_tiles},
        ptx::global_address,
        softmax::{Positions, Softmax, fold, pack_weights},
    },
    wgmma::ptx,
};

#[cube]
pub(super) fn compute_items<E: Float, O: Float, NS: Size, NP: Size, NO: Size>(
    query: &[E],
    key: &[E],
    value: &[E],
    layout: &Layout,
    sink_logits: &[f32],
    counters: &[Atomic<u32>],
    first_counter: u32,
    parked: &mut [f32],
    sequences: &[u32],
    out: &mut [O],
    lse: &mut [f32],
    cuts: &Cuts,
    out_strides: &Strides,
    room: &Room,
    row_ids: &[u32],
    cells: &mut [u32],
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let shape = comptime![blueprint.shape];
    let stages = comptime![blueprint.stages];
    let query_stages = comptime![blueprint.query_stages];
    let tile_bytes = comptime![blueprint.key_bytes() as u32];
    let query_panel = comptime![blueprint.shape.rows * SWIZZLE];
    let key_panel = comptime![blueprint.shape.keys * SWIZZLE];
    let threads = comptime![blueprint.warpgroups() as usize * 128];
    let warpgroup = ptx::uniform(UNIT_POS / WARPGROUP);
    let lane = UNIT_POS % 32u32;
    let warp = (UNIT_POS / 32u32) % 4u32;
    let tile_row = warpgroup * WARPGROUP_ROWS + warp * 16u32 + lane / 4u32;
    let target = global_address::<O>(out.as_ptr());
    // Named barrier 0 is the cube's own.
    let my_turn = 1u32 + warpgroup;
    let other_turn = 2u32 - warpgroup;
    let together = 3u32 + warpgroup;

    // Tiles of the items before.
    let mut tiles_before = 0u32;
    let mut number = 0u32;
    if comptime![blueprint.turns] {
        if warpgroup == 1u32 {
            ptx::turn_give(1u32, threads);
        }
    }
    let mut item = announced(0u32, &*cells, room);
    while ptx::uniform(item.piece.item) < cuts.items {
        let piece = Piece { item: ptx::uniform(item.piece.item), number: ptx::uniform(item.piece.number) };
        let pieces = ptx::uniform(item.pieces);
        let rows = item.rows;
        let batch = item.list / numbers.kv_heads;
        let kv_head = item.list % numbers.kv_heads;
        let keys = item.keys(number, cuts, row_ids, sequences, numbers, blueprint);
        let ids = number % ITEM_STAGES * comptime![blueprint.shape.rows as u32];
        let upper_id = row_ids[(ids + tile_row) as usize];
        let lower_id = row_ids[(ids + tile_row + 8u32) as usize];
        let base = ids + warpgroup * WARPGROUP_ROWS;
        let end = base + WARPGROUP_ROWS - 1u32;
        let first_id = row_ids[base as usize];
        let last_id = row_ids[end as usize];
        let upper_token = upper_id % INVALID_ROW / numbers.group;
        let lower_token = lower_id % INVALID_ROW / numbers.group;
        let upper_head = kv_head * numbers.group + upper_id % INVALID_ROW % numbers.group;
        let lower_head = kv_head * numbers.group + lower_id % INVALID_ROW % numbers.group;
        let at = Positions {
            upper: bounds_at(ids + tile_row, upper_id, row_ids, sequences, numbers, blueprint),
            lower: bounds_at(ids + tile_row + 8u32, lower_id, row_ids, sequences, numbers, blueprint),
            first: bounds_at(base, first_id, row_ids, sequences, numbers, blueprint),
            last: bounds_at(end, last_id, row_ids, sequences, numbers, blueprint),
        };
        sync_plane();
        arrive_plane(room.item_empty + number % ITEM_STAGES * 8u32);

        let mut softmax = Softmax::new(upper_head, lower_head, sink_logits, numbers, blueprint);
        if comptime![blueprint.sink_logits && blueprint.in_parts()] {
            // The sink is one key: the first piece has it.
            if piece.number > 0u32 {
                #[unroll]
                for row in 0..2usize {
                    softmax.maximum[row] = numbers.neg_inf;
                    softmax.sum[row] = 0.0f32;
                }
            }
        }
        let mut acc = Vector::<f32, NO>::new(0.0f32);
        let (buffer, query_phase) = stage_of(number, query_stages);
        ptx::wait_parity(room.query_full + buffer * 8u32, query_phase);
        let tiles = ptx::uniform(keys.tiles);
        let before = ptx::uniform(tiles_before);
        tiles_before += tiles;
        if tiles > 0u32 {
            let query_at = room.query
                + buffer * comptime![blueprint.query_bytes() as u32]
                + warpgroup * comptime![WARPGROUP_ROWS * SWIZZLE as u32];
            let query_descriptor = ptx::descriptor(query_at, query_panel);
            let (stage, phase) = stage_of(before, stages);
            ptx::wait_parity(room.key_full + stage * 8u32, phase);
            let key_descriptor = ptx::descriptor(room.key + stage * tile_bytes, key_panel);
            let scores = ptx::scores_begin::<NS>(query_descriptor, key_descriptor, shape);
            let scores = ptx::scores_end::<NS>(scores, 0usize, shape);
            arrive_plane(room.key_empty + stage * 8u32);
            let scores = fold::<NS>(scores, &mut softmax, &at, 0u32, &keys, numbers, false, blueprint);
            let mut weights = pack_weights::<NS, NP>(&scores, blueprint);
            // Tiles that need no mask have a loop of their own, where it is known which they are.
            let loops = comptime![if blueprint.one_edge() { 2u32 } else { 1u32 }];
            let mut to = 1u32;
            #[unroll]
            for part in 0..loops {
                let whole = comptime![part + 1 < loops];
                let from = to;
                to = tiles;
                if comptime![whole] {
                    to = max(ptx::uniform(whole_tiles(&at.first, &keys, numbers, blueprint)), 1u32);
                }
                for tile in from..to {
                    let (value_stage, value_phase) = stage_of(before + tile - 1u32, stages);
                    let (key_stage, key_phase) = stage_of(before + tile, stages);
                    if comptime![blueprint.turns] {
                        ptx::turn_wait(my_turn, threads);
                    }
                    ptx::wait_parity(room.key_full + key_stage * 8u32, key_phase);
                    let key_descriptor = ptx::descriptor(room.key + key_stage * tile_bytes, key_panel);
                    let value_descriptor = ptx::descriptor(room.value + value_stage * tile_bytes, key_panel);
                    let scores = ptx::scores_begin::<NS>(query_descriptor, key_descriptor, shape);
                    ptx::wait_parity(room.value_full + value_stage * 8u32, value_phase);
                    let sum = ptx::values_begin::<NO, NP>(acc, weights, value_descriptor, shape);
                    if comptime![blueprint.turns] {
                        ptx::turn_give(other_turn, threads);
                    }
                    let scores = ptx::scores_end::<NS>(scores, 1usize, shape);
                    arrive_plane(room.key_empty + key_stage * 8u32);
                    let scores =
                        fold::<NS>(scores, &mut softmax, &at, tile, &keys, numbers, whole, blueprint);
                    ptx::wait_after(softmax.sum[0] + softmax.sum[1]);
                    acc = ptx::values_end::<NO, NP>(sum, weights, shape);
                    arrive_plane(room.value_empty + value_stage * 8u32);
                    weights = pack_weights::<NS, NP>(&scores, blueprint);
                    let upper = softmax.correction[0];
                    let lower = softmax.correction[1];
                    // Maxima grow ever more rarely: most tiles of a long row leave what was summed as it is.
                    if plane_any(upper != 1.0f32 || lower != 1.0f32) {
                        #[unroll]
                        for i in 0..comptime![blueprint.shape.dim / 8] {
                            let a = acc.extract(i * 4) * upper;
                            let b = acc.extract(i * 4 + 1) * upper;
                            let c = acc.extract(i * 4 + 2) * lower;
                            let d = acc.extract(i * 4 + 3) * lower;
                            acc.insert(i * 4, a);
                            acc.insert(i * 4 + 1, b);
                            acc.insert(i * 4 + 2, c);
                            acc.insert(i * 4 + 3, d);
                        }
                    }
                }
            }
            // No scores are left to come.
            arrive_plane(room.query_empty + buffer * 8u32);
            let (stage, phase) = stage_of(before + tiles - 1u32, stages);
            ptx::wait_parity(room.value_full + stage * 8u32, phase);
            let value_descriptor = ptx::descriptor(room.value + stage * tile_bytes, key_panel);
            let sum = ptx::values_begin::<NO, NP>(acc, weights, value_descriptor, shape);
            acc = ptx::values_end::<NO, NP>(sum, weights, shape);
            arrive_plane(room.value_empty + stage * 8u32);
        } else {
            arrive_plane(room.query_empty + buffer * 8u32);
        }

        let mut whole = true;
        if comptime![blueprint.in_parts()] {
            // Taken here, so that no register keeps it over the loop.
            let parked = global_address::<f32>(parked.as_ptr());
            if cuts.sliced {
                if comptime![blueprint.in_slices()] {
                    let turns = global_address::<Atomic<u32>>(counters.as_ptr());
                    let room = piece.item % cuts.room;
                    let counter = first_counter + comptime![tickets::PARTS] + room * 2u32 + warpgroup;
                    let counter = turns + counter as u64 * 4u64;
                    whole = piece.number + 1u32 == pieces;
                    wait_for_turn(counter, &piece, cuts, together);
                    if piece.number > 0u32 {
                        acc = add_before::<NO>(&acc, &mut softmax, parked, room, numbers, blueprint);
                    }
                    if !whole {
                        park::<NO>(&acc, &softmax, parked, room, blueprint);
                    }
                    give_turn(counter, &piece, whole, cuts, together);
                }
            } else if pieces > 1u32 {
                let first = piece.item * pieces;
                park::<NO>(&acc, &softmax, parked, first + piece.number, blueprint);
                whole = is_last(
                    pieces,
                    counters,
                    first_counter + comptime![tickets::PARTS] + piece.item * 2u32 + warpgroup,
                    cells,
                    comptime![ARRIVALS] + warpgroup,
                    together,
                );
                if whole {
                    acc = take_up::<NO>(&mut softmax, parked, first, pieces, numbers, blueprint);
                }
            }
        }
        if whole {
            // Of all pieces.
            let keys = keys_between(&at.first, &at.last, numbers, blueprint);
            let upper = finish::<NO>(
                &acc,
                &softmax,
                upper_id,
                upper_token,
                upper_head,
                tile_row < rows,
                batch,
                lse,
                target,
                out_strides,
                numbers,
                0usize,
                blueprint,
            );
            let lower = finish::<NO>(
                &acc,
                &softmax,
                lower_id,
                lower_token,
                lower_head,
                tile_row + 8u32 < rows,
                batch,
                lse,
                target,
                out_strides,
                numbers,
                1usize,
                blueprint,
            );
            redo_odd::<E, O>(
                &upper, &lower, batch, kv_head, query, key, value, sequences, layout, out, &keys, numbers,
                blueprint,
            );
        }
        number += 1u32;
        item.set(&announced(number, &*cells, room));
    }
}
