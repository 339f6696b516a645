//! One cube, many items: two warpgroups of 64 rows each compute, a third fetches.
//!
//! Keys and values stream through rings of stages, and the query rows of the next item are gathered by index while this one
//! is computed. A warpgroup that computes begins the scores of the next tile and the values of this one, and computes the
//! softmax of the next while the tensor cores work; where tiles are few, the two take turns at issuing, so that one
//! computes weights while the other's products run (Shah et al., FlashAttention-3, arXiv 2407.08608, sections 3.1
//! and 3.2).

// In a kernel `%` is one instruction and `is_multiple_of` is not there; an `if` on compile-time values stays apart from
// one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use cubecl::prelude::*;

mod compute;
mod cuts;
mod fetch;
mod items;
pub(super) mod parts;
mod slices;
pub(super) mod tickets;

use bifocal_core::device::RoutedRows;

use self::{
    compute::compute_items,
    cuts::Cuts,
    fetch::{gather_items, stream},
};
use super::ptx;
use crate::{
    portable::Strides,
    tensor_core::{
        Blueprint, Layout, Numbers,
        ptx::{global_address, shared_address},
    },
};

/// Threads of a warpgroup, the unit that issues products.
pub(super) const WARPGROUP: u32 = 128;
/// Rows that a warpgroup computes.
pub(super) const WARPGROUP_ROWS: u32 = 64;
/// Threads that gather query rows: half of the fetching warpgroup.
const GATHERERS: u32 = 64;
/// Items whose rows are known at a time.
pub(super) const ITEM_STAGES: u32 = 2;

/// Registers of a thread that fetches and of one that computes. 168 is what 384 threads begin with; what the one
/// warpgroup gives up the two take.
pub(super) const FETCH_REGISTERS: u32 = 40;
pub(super) const COMPUTE_REGISTERS: u32 = 232;

/// Threads of a cube: those that compute, and those that fetch.
pub(super) const fn threads(blueprint: Blueprint) -> u32 {
    (blueprint.warpgroups() + 1) * WARPGROUP
}

/// Where everything is in shared memory, as addresses.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Room {
    query: u32,
    key: u32,
    value: u32,
    key_full: u32,
    key_empty: u32,
    value_full: u32,
    value_empty: u32,
    item_full: u32,
    item_empty: u32,
    query_full: u32,
    query_empty: u32,
}

/// Words that threads of a cube tell each other: what the items are, the next tickets, and for each warpgroup how many
/// have parked before it.
const TICKETS: u32 = ITEM_STAGES * items::WORDS;
const ARRIVALS: u32 = TICKETS + 2;
const CELLS: u32 = ARRIVALS + 2;

/// A full and an empty barrier of 8 bytes for every stage of keys, of values, of items and of queries.
const fn barrier_bytes(blueprint: Blueprint) -> usize {
    (2 * blueprint.stages as usize + ITEM_STAGES as usize + blueprint.query_stages as usize) * 16
}

/// One arrival for all threads of a warp.
#[cube]
pub(super) fn arrive_plane(barrier: u32) {
    if UNIT_POS % 32u32 == 0u32 {
        ptx::arrive(barrier);
    }
}

/// Stage and phase of the `number`-th use of a ring.
#[cube]
pub(super) fn stage_of(number: u32, #[comptime] stages: u32) -> (u32, u32) {
    (number % stages, (number / stages) % 2u32)
}

/// Cubes that stay: each takes items until there are none.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn attend_kernel<E: Float, O: Float, NS: Size, NP: Size, NO: Size>(
    query: &[E],
    key_map: &TensorMap<E, Tiled>,
    value_map: &TensorMap<E, Tiled>,
    key: &[E],
    value: &[E],
    sink_logits: &[f32],
    rows: &[u32],
    items: &[u32],
    item_counts: &[u32],
    counters: &[Atomic<u32>],
    parked: &mut [f32],
    sequences: &[u32],
    out: &mut [O],
    lse: &mut [f32],
    query_strides: Strides,
    key_strides: Strides,
    value_strides: Strides,
    out_strides: Strides,
    numbers: Numbers,
    // Pieces whose sums there is room to park, and to count.
    park_room: u32,
    // Slices of an item, at most; 1 where items are not cut in slices.
    most_slices: u32,
    #[comptime] blueprint: Blueprint,
    #[define(E, O)] _elements: [ElemType; 2],
    #[define(NS)] _scores: usize,
    #[define(NP)] _weights: usize,
    #[define(NO)] _outputs: usize,
) {
    ptx::one_cube_per_multiprocessor();
    let mut count = numbers.items;
    let mut first_counter = 0u32;
    if comptime![blueprint.routed] {
        count = item_counts[numbers.reach as usize];
        first_counter = numbers.reach * comptime![RoutedRows::COUNTERS as u32];
    }
    if count == 0u32 {
        terminate!();
    }
    let tiles = Shared::<[u32]>::new_aligned_slice(comptime![blueprint.tile_bytes() / 4], 1024usize);
    let barriers = Shared::<[u32]>::new_aligned_slice(comptime![barrier_bytes(blueprint) / 4], 16usize);
    let mut cells = Shared::<[u32]>::new_slice(comptime![CELLS as usize]);
    let mut row_ids = Shared::<[u32]>::new_slice(comptime![blueprint.row_words()]);
    let mut row_offsets = Shared::<[u32]>::new_slice(comptime![2 * blueprint.shape.rows]);

    let stages = comptime![blueprint.stages];
    let query_stages = comptime![blueprint.query_stages];
    let tile = shared_address(&tiles);
    let barrier = shared_address(&barriers);
    let key_at = tile + comptime![blueprint.query_stages * blueprint.query_bytes() as u32];
    let item_at = barrier + comptime![blueprint.stages * 32];
    let query_at = item_at + comptime![ITEM_STAGES * 16];
    let room = Room {
        query: tile,
        key: key_at,
        value: key_at + comptime![blueprint.stages * blueprint.key_bytes() as u32],
        key_full: barrier,
        key_empty: barrier + comptime![blueprint.stages * 8],
        value_full: barrier + comptime![blueprint.stages * 16],
        value_empty: barrier + comptime![blueprint.stages * 24],
        item_full: item_at,
        item_empty: item_at + comptime![ITEM_STAGES * 8],
        query_full: query_at,
        query_empty: query_at + comptime![blueprint.query_stages * 8],
    };
    let computing = comptime![blueprint.warpgroups() * WARPGROUP];
    if UNIT_POS == 0 {
        let warps = comptime![blueprint.warpgroups() * 4];
        #[unroll]
        for i in 0..stages {
            ptx::barrier_init(room.key_full + comptime![i * 8], 1u32);
            ptx::barrier_init(room.key_empty + comptime![i * 8], warps);
            ptx::barrier_init(room.value_full + comptime![i * 8], 1u32);
            ptx::barrier_init(room.value_empty + comptime![i * 8], warps);
        }
        #[unroll]
        for i in 0..ITEM_STAGES {
            ptx::barrier_init(room.item_full + comptime![i * 8], comptime![GATHERERS]);
            // Left by the warps that compute, and by the two threads that stream.
            ptx::barrier_init(room.item_empty + comptime![i * 8], comptime![warps + 2]);
        }
        #[unroll]
        for i in 0..query_stages {
            ptx::barrier_init(room.query_full + comptime![i * 8], comptime![GATHERERS]);
            ptx::barrier_init(room.query_empty + comptime![i * 8], warps);
        }
        ptx::barriers_ready();
    }
    sync_cube();

    let cuts = Cuts::new(count, park_room, most_slices, blueprint);
    let layout = Layout { query: query_strides, key: key_strides, value: value_strides };
    if ptx::uniform(UNIT_POS / WARPGROUP) < comptime![blueprint.warpgroups()] {
        ptx::more_registers(COMPUTE_REGISTERS);
        compute_items::<E, O, NS, NP, NO>(
            query,
            key,
            value,
            &layout,
            sink_logits,
            counters,
            first_counter,
            parked,
            sequences,
            out,
            lse,
            &cuts,
            &out_strides,
            &room,
            &row_ids,
            &mut cells,
            &numbers,
            blueprint,
        );
    } else {
        ptx::fewer_registers(FETCH_REGISTERS);
        let thread = UNIT_POS - computing;
        if thread == 0u32 {
            stream::<E>(
                key_map,
                room.key,
                room.key_full,
                room.key_empty,
                &row_ids,
                &cells,
                sequences,
                &cuts,
                &room,
                &numbers,
                blueprint,
            );
        } else if thread == 32u32 {
            stream::<E>(
                value_map,
                room.value,
                room.value_full,
                room.value_empty,
                &row_ids,
                &cells,
                sequences,
                &cuts,
                &room,
                &numbers,
                blueprint,
            );
        } else if thread >= GATHERERS {
            gather_items(
                global_address::<E>(query.as_ptr()),
                &layout.query,
                rows,
                items,
                counters,
                first_counter,
                sequences,
                &mut row_ids,
                &mut row_offsets,
                &mut cells,
                &cuts,
                &room,
                &numbers,
                blueprint,
            );
        }
    }
}
