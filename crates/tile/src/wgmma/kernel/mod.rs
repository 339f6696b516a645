//! One cube, many items, two warpgroups of 64 rows each.
//!
//! Keys and values stream through a ring of stages, fetched by one thread ahead of their use; the query rows of the
//! next item are gathered by index while this one is computed. A warpgroup begins the scores of the next tile and the
//! values of this one, and computes the softmax of the next while the tensor cores work; where tiles are few, the two take
//! turns at issuing, so that one computes weights while the other's products run (Shah et al., FlashAttention-3, arXiv 2407.08608,
//! sections 3.1 and 3.2).
//!
//! There is no warp that only fetches: nine warps would leave each thread 168 registers, eight leave 255, and CubeCL
//! cannot ask for the launch bounds under which registers could be reallocated.

// In a kernel `%` is one instruction and `is_multiple_of` is not there; an `if` on compile-time values stays apart from
// one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use cubecl::prelude::*;

mod compute;
mod fetch;
pub(super) mod parts;
pub(super) mod tickets;

use self::compute::compute_items;
use super::ptx;
use crate::{
    portable::Strides,
    tensor_core::{Blueprint, Layout, Numbers, ptx::shared_address},
};

/// Threads of a warpgroup, the unit that issues products.
const WARPGROUP: u32 = 128;
/// Rows that a warpgroup computes.
const WARPGROUP_ROWS: u32 = 64;

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
    ticket_full: u32,
    ticket_empty: u32,
}

/// Words that threads of a cube tell each other: tickets, and for each warpgroup how many have parked before it.
const CELLS: u32 = tickets::STAGES + 2;

/// A full and an empty barrier of 8 bytes for every stage of keys, of values and of tickets.
const fn barrier_bytes(blueprint: Blueprint) -> usize {
    (2 * blueprint.stages as usize + tickets::STAGES as usize) * 16
}

/// Stage and phase of the `number`-th use of a ring.
#[cube]
fn stage_of(number: u32, #[comptime] stages: u32) -> (u32, u32) {
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
    // Slots that there is room to park, and to count.
    park_room: u32,
    #[comptime] blueprint: Blueprint,
    #[define(E, O)] _elements: [ElemType; 2],
    #[define(NS)] _scores: usize,
    #[define(NP)] _weights: usize,
    #[define(NO)] _outputs: usize,
) {
    let mut count = numbers.items;
    if comptime![blueprint.routed] {
        count = item_counts[numbers.reach as usize];
    }
    if count == 0u32 {
        terminate!();
    }
    let tiles = Shared::<[u32]>::new_aligned_slice(comptime![blueprint.tile_bytes() / 4], 1024usize);
    let barriers = Shared::<[u32]>::new_aligned_slice(comptime![barrier_bytes(blueprint) / 4], 16usize);
    let mut cells = Shared::<[u32]>::new_slice(comptime![CELLS as usize]);
    let mut row_ids = Shared::<[u32]>::new_slice(comptime![blueprint.row_words()]);

    let stages = comptime![blueprint.stages];
    let tile = shared_address(&tiles);
    let barrier = shared_address(&barriers);
    let key_at = tile + comptime![blueprint.query_stages * blueprint.query_bytes() as u32];
    let room = Room {
        query: tile,
        key: key_at,
        value: key_at + comptime![blueprint.stages * blueprint.key_bytes() as u32],
        key_full: barrier,
        key_empty: barrier + comptime![blueprint.stages * 8],
        value_full: barrier + comptime![blueprint.stages * 16],
        value_empty: barrier + comptime![blueprint.stages * 24],
        ticket_full: barrier + comptime![blueprint.stages * 32],
        ticket_empty: barrier + comptime![blueprint.stages * 32 + tickets::STAGES * 8],
    };
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
        for i in 0..tickets::STAGES {
            ptx::barrier_init(room.ticket_full + comptime![i * 8], 1u32);
            ptx::barrier_init(room.ticket_empty + comptime![i * 8], warps);
        }
        ptx::barriers_ready();
    }
    sync_cube();

    let layout = Layout { query: query_strides, key: key_strides, value: value_strides };
    compute_items::<E, O, NS, NP, NO>(
        query,
        key_map,
        value_map,
        key,
        value,
        &layout,
        sink_logits,
        rows,
        items,
        counters,
        parked,
        sequences,
        out,
        lse,
        count,
        &out_strides,
        &room,
        &mut row_ids,
        &mut cells,
        &numbers,
        park_room,
        blueprint,
    );
}
