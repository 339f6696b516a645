//! One cube, one item: warps of 16 or 32 rows each.
//!
//! Tiles of keys and of values take turns in a ring in shared memory, copied ahead of their use by all threads. A step
//! waits for its tile, meets the other warps, which have then left the tile before, and starts the copy that takes that
//! one's place. Two cubes or more share a multiprocessor, so that one computes weights while the other's products run.
//! What a thread needs to hold is what decides the shape of a tile: outputs, scores and weights are in registers.
//! (Dao, FlashAttention-2, arXiv 2307.08691.)

// In a kernel `%` is one instruction and `is_multiple_of` is not there; an `if` on compile-time values stays apart from
// one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use cubecl::prelude::*;

use super::{
    copies::{Tile, copy_rows, source_of},
    ptx,
    ring::{Ring, Turns, fill},
};
use crate::{
    arguments::{ForwardTensors, Strides},
    rows::INVALID_ROW,
    tensor_core::{
        Blueprint, Numbers, SWIZZLE,
        finish::{finish, redo_odd},
        items::{Item, bounds_of_row, item_of, keys_of, row_at},
        ptx::{global_address, shared_address},
        softmax::{Positions, Softmax, fold, pack_weights},
    },
    visibility::Bounds,
};

impl Blueprint {
    /// How all threads copy the queries.
    pub(super) const fn query_tile(self) -> Tile {
        Tile { rows: self.shape.rows, dim: self.shape.dim, threads: self.threads() as usize }
    }

    /// How all threads copy a tile of keys, or of values.
    pub(super) const fn key_tile(self) -> Tile {
        Tile { rows: self.shape.keys, ..self.query_tile() }
    }
}

/// Bytes of queries and ring together.
pub(super) const fn room_bytes(blueprint: Blueprint) -> u32 {
    blueprint.query_bytes() as u32 + blueprint.stages * blueprint.key_bytes() as u32
}

/// Where rows are noted until their queries are being copied, in words: in the ring's last place, which is filled last.
pub(super) const fn starts_at(blueprint: Blueprint) -> u32 {
    (room_bytes(blueprint) - blueprint.key_bytes() as u32) / 4
}

/// Notes a row of the item, and its bounds, where all threads find them. Gives the row.
#[cube]
pub(super) fn note_row(
    item: &Item,
    row_ids: &mut [u32],
    bounds: &mut [i32],
    rows: &[u32],
    sequences: &[u32],
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> u32 {
    let id = row_at(item, UNIT_POS, rows, numbers, blueprint);
    row_ids[UNIT_POS as usize] = id;
    let of_row = bounds_of_row(id, sequences, numbers, blueprint);
    bounds[UNIT_POS as usize] = of_row.position;
    if comptime![blueprint.ragged] {
        bounds[(UNIT_POS + comptime![blueprint.shape.rows as u32]) as usize] = of_row.first;
    }
    id
}

/// Positions of a thread's two rows of a block, and of the first and the last row of its warp. They are asked for
/// anew with every tile: registers are what is short.
#[cube]
pub(super) fn positions_of(
    bounds: &[i32],
    warp_row: u32,
    #[comptime] block: usize,
    #[comptime] blueprint: Blueprint,
) -> Positions {
    let row = warp_row + comptime![block as u32 * 16] + UNIT_POS % 32u32 / 4u32;
    let last = warp_row + comptime![blueprint.warp_rows as u32 - 1];
    Positions {
        upper: bounds_at(bounds, row, blueprint),
        lower: bounds_at(bounds, row + 8u32, blueprint),
        first: bounds_at(bounds, warp_row, blueprint),
        last: bounds_at(bounds, last, blueprint),
    }
}

/// The bounds of a row of the item. The first key is kept where it is not 0 for all: in a ragged batch.
#[cube]
fn bounds_at(bounds: &[i32], row: u32, #[comptime] blueprint: Blueprint) -> Bounds {
    let mut first = 0i32;
    if comptime![blueprint.ragged] {
        first = bounds[(row + comptime![blueprint.shape.rows as u32]) as usize];
    }
    Bounds { first, position: bounds[row as usize] }
}

/// One block's part of what a thread holds of all of a warp's blocks.
#[cube]
fn block_of<NW: Size, NB: Size>(
    all: &Vector<f32, NW>,
    #[comptime] block: usize,
    #[comptime] count: usize,
) -> Vector<f32, NB> {
    let mut part = Vector::<f32, NB>::new(0.0f32);
    #[unroll]
    for i in 0..count {
        part.insert(i, all.extract(comptime![block * count + i]));
    }
    part
}

/// One item per cube; cubes beyond the last item leave at once. `NS`, `NP` and `NO` count a thread's scores, packed
/// weights and outputs of 16 rows, `WS`, `WP` and `WO` those of all rows of its warp.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn attend_kernel<
    E: Float,
    O: Float,
    NS: Size,
    NP: Size,
    NO: Size,
    WS: Size,
    WP: Size,
    WO: Size,
>(
    tensors: &ForwardTensors<E>,
    rows: &[u32],
    items: &[u32],
    item_counts: &[u32],
    sequences: &[u32],
    out: &mut [O],
    lse: &mut [f32],
    out_strides: Strides,
    numbers: Numbers,
    #[comptime] blueprint: Blueprint,
    #[define(E, O)] _elements: [ElemType; 2],
    #[define(NS, NP, NO, WS, WP, WO)] _sizes: [usize; 6],
) {
    let slot = CUBE_POS as u32;
    let mut count = numbers.items;
    if comptime![blueprint.routed] {
        count = item_counts[numbers.reach as usize];
    }
    if slot >= count {
        terminate!();
    }
    let mut tiles =
        Shared::<[u32]>::new_aligned_slice(comptime![room_bytes(blueprint) as usize / 4], 1024usize);
    let mut row_ids = Shared::<[u32]>::new_slice(comptime![blueprint.shape.rows]);
    let kinds = comptime![if blueprint.ragged { 2 } else { 1 }];
    let mut bounds = Shared::<[i32]>::new_slice(comptime![kinds * blueprint.shape.rows]);
    let query_room = shared_address(&tiles);
    let ring_room = query_room + comptime![blueprint.query_bytes() as u32];
    let stages = comptime![blueprint.stages];
    let blocks = comptime![blueprint.blocks()];

    let item = item_of(slot, items, &numbers, blueprint);
    let keys = keys_of(&item, rows, sequences, &numbers, blueprint);
    let batch = item.list / numbers.kv_heads;
    let kv_head = item.list % numbers.kv_heads;
    let turns = Turns {
        first: source_of::<E>(&tensors.key, batch, kv_head, &tensors.layout.key),
        second: source_of::<E>(&tensors.value, batch, kv_head, &tensors.layout.value),
    };
    if UNIT_POS < comptime![blueprint.shape.rows as u32] {
        let id = note_row(&item, &mut row_ids, &mut bounds, rows, sequences, &numbers, blueprint);
        let row = id % INVALID_ROW;
        let head = kv_head * numbers.group + row % numbers.group;
        let start = tensors.layout.query.at(batch, head, row / numbers.group);
        tiles[(comptime![starts_at(blueprint)] + UNIT_POS) as usize] = start;
    }
    sync_cube();
    // The queries join the first tile's group.
    let query_source = global_address::<E>(tensors.query.as_ptr());
    copy_rows(
        query_source,
        &tiles,
        comptime![starts_at(blueprint)],
        query_room,
        comptime![blueprint.query_tile()],
    );
    fill(&turns, &keys, ring_room, &numbers, blueprint);

    let lane = UNIT_POS % 32u32;
    let warp_row = UNIT_POS / 32u32 * comptime![blueprint.warp_rows as u32];
    let mut softmaxes = Sequence::<Softmax>::new();
    #[unroll]
    for block in 0..blocks {
        let row = warp_row + comptime![block as u32 * 16] + lane / 4u32;
        softmaxes.push(Softmax::new(
            kv_head * numbers.group + row_ids[row as usize] % INVALID_ROW % numbers.group,
            kv_head * numbers.group + row_ids[(row + 8u32) as usize] % INVALID_ROW % numbers.group,
            &tensors.sink_logits,
            &numbers,
            blueprint,
        ));
    }
    let query_at = query_room + warp_row * comptime![SWIZZLE as u32] + ptx::across(lane);
    let key_at = ring_room + ptx::down(lane);
    let value_at = ring_room + ptx::across(lane);

    let mut acc = Vector::<f32, WO>::new(0.0f32);
    let mut ring = Ring::new(blueprint);
    for tile in 0..keys.tiles {
        ring.wait(blueprint);
        ring.copy(UNIT_POS, &turns, &keys, tile, comptime![stages - 1], ring_room, &numbers, blueprint);
        let scores = ptx::scores::<WS>(query_at, key_at + ring.now, blueprint);
        ring.turn(blueprint);

        ring.wait(blueprint);
        ring.copy(UNIT_POS, &turns, &keys, tile, stages, ring_room, &numbers, blueprint);
        let mut weights = Vector::<u32, WP>::new(0u32);
        #[unroll]
        for block in 0..blocks {
            let count = comptime![blueprint.shape.keys / 2];
            let part = block_of::<WS, NS>(&scores, block, count);
            let softmax = softmaxes.index_mut(block);
            let at = positions_of(&bounds, warp_row, block, blueprint);
            let part = fold::<NS>(part, softmax, &at, tile, &keys, &numbers, false, blueprint);
            let packed = pack_weights::<NS, NP>(&part, blueprint);
            #[unroll]
            for i in 0..comptime![count / 2] {
                weights.insert(comptime![block * count / 2 + i], packed.extract(i));
            }
            let upper = softmax.correction[0];
            let lower = softmax.correction[1];
            // Maxima grow ever more rarely: most tiles of a long row leave what was summed as it is.
            if plane_any(upper != 1.0f32 || lower != 1.0f32) {
                #[unroll]
                for i in 0..comptime![blueprint.shape.dim / 8] {
                    let at = comptime![block * blueprint.shape.columns() / 2 + i * 4];
                    let a = acc.extract(at) * upper;
                    let b = acc.extract(at + 1) * upper;
                    let c = acc.extract(at + 2) * lower;
                    let d = acc.extract(at + 3) * lower;
                    acc.insert(at, a);
                    acc.insert(at + 1, b);
                    acc.insert(at + 2, c);
                    acc.insert(at + 3, d);
                }
            }
        }
        acc = ptx::values::<WO, WP>(acc, weights, value_at + ring.now, blueprint);
        ring.turn(blueprint);
    }

    let target = global_address::<O>(out.as_ptr());
    #[unroll]
    for block in 0..blocks {
        let row = warp_row + comptime![block as u32 * 16] + lane / 4u32;
        let upper_id = row_ids[row as usize];
        let lower_id = row_ids[(row + 8u32) as usize];
        let part = block_of::<WO, NO>(&acc, block, comptime![blueprint.shape.columns() / 2]);
        let softmax = softmaxes.index(block);
        let upper = finish::<NO>(
            &part,
            softmax,
            upper_id,
            upper_id % INVALID_ROW / numbers.group,
            kv_head * numbers.group + upper_id % INVALID_ROW % numbers.group,
            row < item.rows,
            batch,
            lse,
            target,
            &out_strides,
            &numbers,
            0usize,
            blueprint,
        );
        let lower = finish::<NO>(
            &part,
            softmax,
            lower_id,
            lower_id % INVALID_ROW / numbers.group,
            kv_head * numbers.group + lower_id % INVALID_ROW % numbers.group,
            row + 8u32 < item.rows,
            batch,
            lse,
            target,
            &out_strides,
            &numbers,
            1usize,
            blueprint,
        );
        redo_odd::<E, O>(
            &upper,
            &lower,
            batch,
            kv_head,
            &tensors.query,
            &tensors.key,
            &tensors.value,
            sequences,
            &tensors.layout,
            out,
            &keys,
            &numbers,
            blueprint,
        );
    }
}
