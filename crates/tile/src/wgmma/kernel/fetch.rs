//! What is fetched ahead of its use: query rows by every warpgroup for itself, keys and values by one thread for all.

use cubecl::prelude::*;

use super::{
    Numbers, Room, WARPGROUP, WARPGROUP_ROWS,
    items::{Item, Keys, row_at, tile_start},
    stage_of,
};
use crate::{
    portable::{INVALID_ROW, Strides},
    wgmma::{
        Blueprint,
        ptx::{self, PANEL, SWIZZLE},
    },
};

/// Starts the copies of this warpgroup's rows of an item into a buffer of queries, and notes which rows they are.
/// The copies are waited for where the item begins.
#[cube]
pub(super) fn gather(
    item: &Item,
    source: u64,
    rows: &[u32],
    row_ids: &mut [u32],
    buffer: u32,
    query_strides: &Strides,
    room: &Room,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    // Two threads to a row; each takes every other 16 bytes of it.
    let chunks = comptime![blueprint.shape.dim / 8];
    let row_in_tile = UNIT_POS / WARPGROUP * WARPGROUP_ROWS + UNIT_POS % WARPGROUP / 2u32;
    let half = UNIT_POS % 2u32;
    let id = row_at(item, row_in_tile, rows, numbers, blueprint);
    if half == 0u32 {
        row_ids[(buffer * comptime![blueprint.shape.rows as u32] + row_in_tile) as usize] = id;
    }
    let row = id % INVALID_ROW;
    let head = item.list % numbers.kv_heads * numbers.group + row % numbers.group;
    let offset = item.list / numbers.kv_heads * query_strides.batch
        + head * query_strides.head
        + row / numbers.group * query_strides.token;
    let from = source + offset as u64 * 2u64 + (half * 16u32) as u64;
    let to = room.query
        + buffer * comptime![blueprint.query_bytes() as u32]
        + row_in_tile * comptime![SWIZZLE as u32];
    #[unroll]
    for chunk in 0..comptime![chunks / 2] {
        let column = comptime![chunk as u32 * 2] + half;
        let panel = comptime![(chunk * 2 / 8 * blueprint.shape.rows * SWIZZLE) as u32];
        let swizzled = ((column % 8u32) ^ (row_in_tile % 8u32)) * 16u32;
        ptx::copy_16(to + panel + swizzled, from + comptime![chunk as u64 * 32]);
    }
}

/// How far the keys, or the values, of this cube's items have been fetched.
#[derive(CubeType)]
pub(super) struct Cursor {
    /// Tiles fetched so far, over all items; then the next tile of the item that the cursor is in; then whether that
    /// is the item after the current one.
    state: Array<u32>,
}

/// An item as the cursor needs it.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Stretch {
    pub(super) batch: u32,
    pub(super) kv_head: u32,
    pub(super) keys: Keys,
}

#[cube]
impl Cursor {
    pub(super) fn new() -> Cursor {
        let mut state = Array::<u32>::new(3usize);
        state[0] = 0u32;
        state[1] = 0u32;
        state[2] = 0u32;
        Cursor { state }
    }

    /// The next item becomes the current one.
    pub(super) fn advance(&mut self) {
        if self.state[2] == 0u32 {
            self.state[1] = 0u32;
        }
        self.state[2] = 0u32;
    }
}

/// Starts the copy of the next tile of keys (or values), if there is one and a stage for it: stages of the first `done`
/// tiles are free as far as this warpgroup knows. One thread, `by`, does it for the cube.
#[cube]
pub(super) fn fetch<E: Float>(
    cursor: &mut Cursor,
    map: &TensorMap<E, Tiled>,
    ring: u32,
    full: u32,
    empty: u32,
    done: u32,
    now: &Stretch,
    next: &Stretch,
    #[comptime] by: u32,
    #[comptime] blueprint: Blueprint,
) {
    let stages = comptime![blueprint.stages];
    let bytes = comptime![blueprint.key_bytes() as u32];
    if UNIT_POS == by {
        if cursor.state[2] == 0u32 && cursor.state[1] >= now.keys.tiles {
            cursor.state[1] = 0u32;
            cursor.state[2] = 1u32;
        }
        let ahead = cursor.state[2] == 1u32;
        let tile = cursor.state[1];
        let number = cursor.state[0];
        if tile < select(ahead, next.keys.tiles, now.keys.tiles) && number < done + stages {
            let batch = select(ahead, next.batch, now.batch);
            let head = select(ahead, next.kv_head, now.kv_head);
            let mut start = tile_start(&now.keys, tile, blueprint);
            if ahead {
                start = tile_start(&next.keys, tile, blueprint);
            }
            let (stage, phase) = stage_of(number, stages);
            let full = full + stage * 8u32;
            ptx::wait_parity(empty + stage * 8u32, phase ^ 1u32);
            ptx::arrive_expecting(full, bytes);
            if comptime![blueprint.whole_panels()] {
                ptx::load_panels::<E>(map, ring + stage * bytes, full, batch, head, start as u32);
            } else {
                #[unroll]
                for panel in 0..comptime![blueprint.panels() as u32] {
                    let at =
                        ring + stage * bytes + comptime![panel * (blueprint.shape.keys * SWIZZLE) as u32];
                    ptx::load_box::<E>(
                        map,
                        at,
                        full,
                        batch,
                        head,
                        start as u32,
                        comptime![panel * PANEL as u32],
                    );
                }
            }
            cursor.state[0] = number + 1u32;
            cursor.state[1] = tile + 1u32;
        }
    }
}
