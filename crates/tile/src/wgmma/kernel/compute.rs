//! What a warpgroup does with its items.

use bifocal_core::device::RoutedRows;
use cubecl::prelude::*;

use super::{
    Room, WARPGROUP, WARPGROUP_ROWS,
    fetch::{Cursor, Stretch, fetch_keys, fetch_values, fill},
    parts::{park, parts_of, take_up},
    stage_of,
    tickets::{self, Tickets, dealt, leave},
};
use crate::{
    portable::Strides,
    rows::INVALID_ROW,
    tensor_core::{
        Blueprint, Layout, Numbers, SWIZZLE,
        finish::{finish, redo_odd},
        gather::{RowIds, gather},
        items::{Item, Keys, bounds_at, item_of, keys_between, keys_of},
        ptx::global_address,
        softmax::{Positions, Softmax, fold, pack_weights},
    },
    wgmma::ptx,
};

#[cube]
fn stretch(item: &Item, keys: Keys, numbers: &Numbers) -> Stretch {
    Stretch { batch: item.list / numbers.kv_heads, kv_head: item.list % numbers.kv_heads, keys }
}

#[cube]
pub(super) fn compute_items<E: Float, O: Float, NS: Size, NP: Size, NO: Size>(
    query: &[E],
    key_map: &TensorMap<E, Tiled>,
    value_map: &TensorMap<E, Tiled>,
    key: &[E],
    value: &[E],
    layout: &Layout,
    sink_logits: &[f32],
    rows: &[u32],
    items: &[u32],
    counters: &[Atomic<u32>],
    parked: &mut [f32],
    sequences: &[u32],
    out: &mut [O],
    lse: &mut [f32],
    count: u32,
    out_strides: &Strides,
    room: &Room,
    row_ids: &mut [u32],
    cells: &mut [u32],
    numbers: &Numbers,
    park_room: u32,
    #[comptime] blueprint: Blueprint,
) {
    let shape = comptime![blueprint.shape];
    let stages = comptime![blueprint.stages];
    let tile_bytes = comptime![blueprint.key_bytes() as u32];
    let query_panel = comptime![blueprint.shape.rows * SWIZZLE];
    let key_panel = comptime![blueprint.shape.keys * SWIZZLE];
    let threads = comptime![blueprint.warpgroups() as usize * 128];
    let warpgroup = UNIT_POS / WARPGROUP;
    let lane = UNIT_POS % 32u32;
    let warp = (UNIT_POS / 32u32) % 4u32;
    let tile_row = warpgroup * WARPGROUP_ROWS + warp * 16u32 + lane / 4u32;
    let source = global_address::<E>(query.as_ptr());
    let target = global_address::<O>(out.as_ptr());
    // Named barrier 0 is the cube's own.
    let my_turn = 1u32 + warpgroup;
    let other_turn = 2u32 - warpgroup;
    let together = 3u32 + warpgroup;

    let mut key_cursor = Cursor::new();
    let mut value_cursor = Cursor::new();
    let mut tile_number = 0u32;
    let mut item_number = 0u32;
    let mut tickets = Tickets::new();
    let mut first_counter = 0u32;
    if comptime![blueprint.routed] {
        first_counter = numbers.reach * comptime![RoutedRows::COUNTERS as u32];
    }
    let parts = parts_of(count, park_room, blueprint);
    let slots = count * parts;
    let mut slot = CUBE_POS as u32;
    let mut item = item_of(min(slot, slots - 1u32) / parts, items, numbers, blueprint);
    let ids = RowIds::of(&item, UNIT_POS / 2u32, rows, sequences, numbers, blueprint);
    let mut now = stretch(&item, keys_of(&ids, sequences, numbers, blueprint), numbers);
    now.keys.keep_part(slot % parts, parts, blueprint);
    if slot < slots {
        gather(&item, &ids, source, row_ids, 0u32, &layout.query, room.query, numbers, blueprint);
        fill::<E>(
            &mut key_cursor,
            key_map,
            0u32,
            &mut value_cursor,
            value_map,
            0u32,
            room,
            &now,
            &now,
            blueprint,
        );
    }
    if comptime![blueprint.turns] {
        if warpgroup == 1u32 {
            ptx::turn_give(1u32, threads);
        }
    }
    while slot < slots {
        let buffer = item_number % comptime![blueprint.query_stages];
        let next_buffer = (item_number + 1u32) % comptime![blueprint.query_stages];
        let this_slot = slot;
        if comptime![blueprint.routed] {
            slot = tickets.next(item_number, cells, room);
        } else {
            slot = dealt(item_number + 1u32);
        }
        // Loads of the next item's place and rows are begun here and used once this item's first scores are folded.
        let next_item = item_of(min(slot, slots - 1u32) / parts, items, numbers, blueprint);
        let mut next = stretch(&next_item, now.keys, numbers);
        // Not known yet.
        next.keys.tiles = 0u32;

        ptx::copies_end();
        ptx::turn_wait(together, 128usize);
        let ids = buffer * comptime![blueprint.shape.rows as u32];
        let batch = now.batch;
        let kv_head = now.kv_head;
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
            upper: bounds_at(ids + tile_row, upper_id, &*row_ids, sequences, numbers, blueprint),
            lower: bounds_at(ids + tile_row + 8u32, lower_id, &*row_ids, sequences, numbers, blueprint),
            first: bounds_at(base, first_id, &*row_ids, sequences, numbers, blueprint),
            last: bounds_at(end, last_id, &*row_ids, sequences, numbers, blueprint),
        };

        let mut softmax = Softmax::new(upper_head, lower_head, sink_logits, numbers, blueprint);
        if comptime![blueprint.sink_logits && blueprint.in_parts()] {
            // The sink is one key: the first part has it.
            if this_slot % parts > 0u32 {
                #[unroll]
                for row in 0..2usize {
                    softmax.maximum[row] = numbers.neg_inf;
                    softmax.sum[row] = 0.0f32;
                }
            }
        }
        let mut acc = Vector::<f32, NO>::new(0.0f32);
        if now.keys.tiles > 0u32 {
            let query_at = room.query
                + buffer * comptime![blueprint.query_bytes() as u32]
                + warpgroup * comptime![WARPGROUP_ROWS * SWIZZLE as u32];
            let query_descriptor = ptx::descriptor(query_at, query_panel);
            let (stage, phase) = stage_of(tile_number, stages);
            ptx::wait_parity(room.key_full + stage * 8u32, phase);
            let key_descriptor = ptx::descriptor(room.key + stage * tile_bytes, key_panel);
            let scores = ptx::scores_begin::<NS>(query_descriptor, key_descriptor, shape);
            let scores = ptx::scores_end::<NS>(scores, 0usize, shape);
            if lane == 0u32 {
                ptx::arrive(room.key_empty + stage * 8u32);
            }
            let ids = RowIds::of(&next_item, UNIT_POS / 2u32, rows, sequences, numbers, blueprint);
            let scores = fold::<NS>(scores, &mut softmax, &at, 0u32, &now.keys, numbers, blueprint);
            let mut weights = pack_weights::<NS, NP>(&scores, blueprint);
            if slot < slots {
                next.keys.set(&keys_of(&ids, sequences, numbers, blueprint));
                next.keys.keep_part(slot % parts, parts, blueprint);
                if comptime![blueprint.query_stages > 1] {
                    gather(
                        &next_item,
                        &ids,
                        source,
                        row_ids,
                        next_buffer,
                        &layout.query,
                        room.query,
                        numbers,
                        blueprint,
                    );
                }
            }
            fill::<E>(
                &mut key_cursor,
                key_map,
                tile_number + 1u32,
                &mut value_cursor,
                value_map,
                tile_number,
                room,
                &now,
                &next,
                blueprint,
            );
            for tile in 1..now.keys.tiles {
                let (value_stage, value_phase) = stage_of(tile_number, stages);
                tile_number += 1u32;
                let (key_stage, key_phase) = stage_of(tile_number, stages);
                // The last warpgroup is about to leave the stage that this tile goes to.
                fetch_keys::<E>(&mut key_cursor, key_map, room, tile_number, &now, &next, blueprint);
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
                if lane == 0u32 {
                    ptx::arrive(room.key_empty + key_stage * 8u32);
                }
                let scores = fold::<NS>(scores, &mut softmax, &at, tile, &now.keys, numbers, blueprint);
                ptx::wait_after(softmax.sum[0] + softmax.sum[1]);
                acc = ptx::values_end::<NO, NP>(sum, weights, shape);
                if lane == 0u32 {
                    ptx::arrive(room.value_empty + value_stage * 8u32);
                }
                fetch_values::<E>(&mut value_cursor, value_map, room, tile_number, &now, &next, blueprint);
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
            let (stage, phase) = stage_of(tile_number, stages);
            tile_number += 1u32;
            ptx::wait_parity(room.value_full + stage * 8u32, phase);
            let value_descriptor = ptx::descriptor(room.value + stage * tile_bytes, key_panel);
            let sum = ptx::values_begin::<NO, NP>(acc, weights, value_descriptor, shape);
            if comptime![blueprint.query_stages == 1] {
                if slot < slots {
                    gather(
                        &next_item,
                        &ids,
                        source,
                        row_ids,
                        next_buffer,
                        &layout.query,
                        room.query,
                        numbers,
                        blueprint,
                    );
                }
            }
            acc = ptx::values_end::<NO, NP>(sum, weights, shape);
            if lane == 0u32 {
                ptx::arrive(room.value_empty + stage * 8u32);
            }
            fetch_values::<E>(&mut value_cursor, value_map, room, tile_number, &now, &next, blueprint);
        } else if slot < slots {
            let ids = RowIds::of(&next_item, UNIT_POS / 2u32, rows, sequences, numbers, blueprint);
            next.keys.set(&keys_of(&ids, sequences, numbers, blueprint));
            next.keys.keep_part(slot % parts, parts, blueprint);
            gather(
                &next_item,
                &ids,
                source,
                row_ids,
                next_buffer,
                &layout.query,
                room.query,
                numbers,
                blueprint,
            );
            fill::<E>(
                &mut key_cursor,
                key_map,
                tile_number,
                &mut value_cursor,
                value_map,
                tile_number,
                room,
                &now,
                &next,
                blueprint,
            );
        }

        if comptime![blueprint.routed] {
            if slot < slots {
                tickets.draw(counters, first_counter);
            }
        }
        let mut whole = true;
        if comptime![blueprint.in_parts()] {
            if parts > 1u32 {
                let first_slot = this_slot / parts * parts;
                whole = park::<NO>(
                    &acc,
                    &softmax,
                    this_slot,
                    parts,
                    parked,
                    counters,
                    first_counter + comptime![tickets::PARTS] + first_slot / parts * 2u32 + warpgroup,
                    cells,
                    comptime![tickets::STAGES] + warpgroup,
                    together,
                    blueprint,
                );
                if whole {
                    acc = take_up::<NO>(&mut softmax, first_slot, parts, parked, numbers, blueprint);
                }
            }
        }
        if whole {
            // Of all parts.
            let keys = keys_between(&at.first, &at.last, numbers, blueprint);
            let upper = finish::<NO>(
                &acc,
                &softmax,
                upper_id,
                upper_token,
                upper_head,
                tile_row < item.rows,
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
                tile_row + 8u32 < item.rows,
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
        item.set(&next_item);
        now.set(&next);
        key_cursor.advance();
        value_cursor.advance();
        item_number += 1u32;
    }
    if comptime![blueprint.routed] {
        leave(counters, first_counter);
    }
}
