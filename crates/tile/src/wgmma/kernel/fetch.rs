//! The fetching warpgroup: it has no products to wait for, and few registers.
//!
//! Two of its warps gather the rows of the cube's items, one after the other, and tell everybody which they are; one
//! thread each of the other two streams their keys and their values. All of them run ahead of the warpgroups that
//! compute, as far as there is room: a warpgroup never waits for another one's thread to ask for what comes next.

use cubecl::prelude::*;

use super::{
    GATHERERS, ITEM_STAGES, Room,
    cuts::{Cuts, Piece},
    items::{announce, announced},
    stage_of,
    tickets::{Tickets, dealt, leave},
};
use crate::{
    portable::Strides,
    rows::INVALID_ROW,
    tensor_core::{
        Blueprint, Numbers,
        items::{Item, bounds_of_row, item_of, row_at, tile_start},
    },
    wgmma::{
        copies::{copy_rows, load_tile},
        ptx,
    },
};

/// The barrier of the gathering threads among themselves. 0 is the cube's own, 1 to 4 the computing warpgroups'.
const GATHERING: u32 = 5;

/// Streams the keys (or the values) of this cube's items through a ring: one thread for the cube.
#[cube]
pub(super) fn stream<E: Float>(
    map: &TensorMap<E, Tiled>,
    ring: u32,
    full: u32,
    empty: u32,
    row_ids: &[u32],
    cells: &[u32],
    sequences: &[u32],
    cuts: &Cuts,
    room: &Room,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let stages = comptime![blueprint.stages];
    let bytes = comptime![blueprint.key_bytes() as u32];
    let mut tiles_before = 0u32;
    let mut number = 0u32;
    let mut item = announced(0u32, cells, room);
    while item.piece.item < cuts.items {
        let keys = item.keys(number, cuts, row_ids, sequences, numbers, blueprint);
        ptx::arrive(room.item_empty + number % ITEM_STAGES * 8u32);
        let batch = item.list / numbers.kv_heads;
        let head = item.list % numbers.kv_heads;
        for tile in 0..keys.tiles {
            let start = tile_start(&keys, tile, blueprint);
            let (stage, phase) = stage_of(tiles_before + tile, stages);
            let full = full + stage * 8u32;
            ptx::wait_parity(empty + stage * 8u32, phase ^ 1u32);
            ptx::arrive_expecting(full, bytes);
            let to = ring + stage * bytes;
            load_tile::<E>(
                map,
                to,
                full,
                batch,
                head,
                start as u32,
                comptime![blueprint.shape.keys],
                blueprint,
            );
        }
        tiles_before += keys.tiles;
        number += 1u32;
        item.set(&announced(number, cells, room));
    }
}

/// Takes this cube's items, announces them, and gathers their query rows by index into panels of the 128-byte swizzle.
#[cube]
pub(super) fn gather_items(
    source: u64,
    query_strides: &Strides,
    rows: &[u32],
    items: &[u32],
    counters: &[Atomic<u32>],
    first_counter: u32,
    sequences: &[u32],
    row_ids: &mut [u32],
    row_offsets: &mut [u32],
    cells: &mut [u32],
    cuts: &Cuts,
    room: &Room,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let tile_rows = comptime![blueprint.shape.rows as u32];
    let query_stages = comptime![blueprint.query_stages];
    let thread = UNIT_POS % GATHERERS;
    let slots = cuts.slots();
    let mut tickets = Tickets::new(cuts);
    let mut slot = CUBE_POS as u32;
    // Of the item in the slot, as the thread that draws knows.
    let mut pieces = cuts.pieces;
    if comptime![blueprint.in_slices()] {
        if cuts.sliced {
            if thread == 0u32 {
                tickets.draw(counters, first_counter, cuts, items, rows, sequences, numbers, blueprint);
                tickets.hand_out(1u32, cells);
            }
            ptx::turn_wait(GATHERING, comptime![GATHERERS as usize]);
            slot = tickets.handed_out(1u32, &*cells);
            pieces = tickets.pieces;
            if thread == 0u32 && slot < slots {
                tickets.draw(counters, first_counter, cuts, items, rows, sequences, numbers, blueprint);
            }
        }
    }
    let mut number = 0u32;
    while slot < slots {
        let piece = cuts.piece(slot);
        let item = item_of(piece.item, items, numbers, blueprint);
        let (stage, phase) = stage_of(number, ITEM_STAGES);
        let (buffer, buffer_phase) = stage_of(number, query_stages);
        ptx::wait_parity(room.item_empty + stage * 8u32, phase ^ 1u32);
        if thread == 0u32 {
            announce(number, &piece, pieces, item.list, item.rows, cells);
            if comptime![blueprint.routed] {
                tickets.hand_out(number, cells);
            }
        }
        #[unroll]
        for part in 0..comptime![tile_rows / GATHERERS] {
            let entry = thread + comptime![part * GATHERERS];
            note_row(
                &item,
                entry,
                stage * tile_rows + entry,
                number % 2u32 * tile_rows + entry,
                query_strides,
                rows,
                sequences,
                row_ids,
                row_offsets,
                numbers,
                blueprint,
            );
        }
        ptx::arrive(room.item_full + stage * 8u32);
        // Offsets, and the next ticket, go from thread to thread.
        ptx::turn_wait(GATHERING, comptime![GATHERERS as usize]);
        ptx::wait_parity(room.query_empty + buffer * 8u32, buffer_phase ^ 1u32);
        copy_rows(
            source,
            &*row_offsets,
            number % 2u32 * tile_rows,
            room.query + buffer * comptime![blueprint.query_bytes() as u32],
            thread,
            GATHERERS,
            blueprint,
        );
        if comptime![!blueprint.routed] {
            slot = dealt(number + 1u32);
        }
        ptx::copies_end();
        ptx::arrive(room.query_full + buffer * 8u32);
        if comptime![blueprint.routed] {
            slot = tickets.handed_out(number, &*cells);
            pieces = tickets.pieces;
            if thread == 0u32 && slot < slots {
                tickets.draw(counters, first_counter, cuts, items, rows, sequences, numbers, blueprint);
            }
        }
        number += 1u32;
    }
    let (stage, phase) = stage_of(number, ITEM_STAGES);
    ptx::wait_parity(room.item_empty + stage * 8u32, phase ^ 1u32);
    if thread == 0u32 {
        // An item that there is not: the end.
        announce(number, &Piece { item: cuts.items, number: 0u32 }, 1u32, 0u32, 0u32, cells);
        if comptime![blueprint.routed] {
            leave(counters, first_counter);
        }
    }
    ptx::arrive(room.item_full + stage * 8u32);
}

/// Notes which row an entry of an item is, its bounds in a ragged batch, and where its query begins.
#[cube]
fn note_row(
    item: &Item,
    entry: u32,
    at: u32,
    offset_at: u32,
    query_strides: &Strides,
    rows: &[u32],
    sequences: &[u32],
    row_ids: &mut [u32],
    row_offsets: &mut [u32],
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let id = row_at(item, entry, rows, numbers, blueprint);
    row_ids[at as usize] = id;
    if comptime![blueprint.ragged] {
        let column = comptime![blueprint.staged_rows() as u32];
        let bounds = bounds_of_row(id, sequences, numbers, blueprint);
        row_ids[(column + at) as usize] = u32::reinterpret(bounds.first);
        row_ids[(2u32 * column + at) as usize] = u32::reinterpret(bounds.position);
    }
    let row = id % INVALID_ROW;
    let head = item.list % numbers.kv_heads * numbers.group + row % numbers.group;
    row_offsets[offset_at as usize] = item.list / numbers.kv_heads * query_strides.batch
        + head * query_strides.head
        + row / numbers.group * query_strides.token;
}
