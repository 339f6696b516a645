//! Keys and values, fetched ahead of their use by one thread for all.

use cubecl::prelude::*;

use super::{Room, WARPGROUP, stage_of};
use crate::{
    tensor_core::{
        Blueprint, PANEL, SWIZZLE,
        items::{Keys, tile_start},
    },
    wgmma::ptx,
};

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
impl Stretch {
    /// Assigns every field.
    pub(super) fn set(&mut self, other: &Stretch) {
        self.batch = other.batch;
        self.kv_head = other.kv_head;
        self.keys.set(&other.keys);
    }
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
fn fetch<E: Float>(
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

/// [`fetch`] of keys, by the first warpgroup.
#[cube]
pub(super) fn fetch_keys<E: Float>(
    cursor: &mut Cursor,
    map: &TensorMap<E, Tiled>,
    room: &Room,
    done: u32,
    now: &Stretch,
    next: &Stretch,
    #[comptime] blueprint: Blueprint,
) {
    fetch::<E>(cursor, map, room.key, room.key_full, room.key_empty, done, now, next, 0u32, blueprint);
}

/// [`fetch`] of values, by the last warpgroup, which leaves their stages last.
#[cube]
pub(super) fn fetch_values<E: Float>(
    cursor: &mut Cursor,
    map: &TensorMap<E, Tiled>,
    room: &Room,
    done: u32,
    now: &Stretch,
    next: &Stretch,
    #[comptime] blueprint: Blueprint,
) {
    let by = comptime![(blueprint.warpgroups() - 1) * WARPGROUP];
    fetch::<E>(cursor, map, room.value, room.value_full, room.value_empty, done, now, next, by, blueprint);
}

/// Fetches keys and values for as many stages as there are.
#[cube]
pub(super) fn fill<E: Float>(
    key_cursor: &mut Cursor,
    key_map: &TensorMap<E, Tiled>,
    keys_done: u32,
    value_cursor: &mut Cursor,
    value_map: &TensorMap<E, Tiled>,
    values_done: u32,
    room: &Room,
    now: &Stretch,
    next: &Stretch,
    #[comptime] blueprint: Blueprint,
) {
    #[unroll]
    for _ in 0..blueprint.stages {
        fetch_keys::<E>(key_cursor, key_map, room, keys_done, now, next, blueprint);
        fetch_values::<E>(value_cursor, value_map, room, values_done, now, next, blueprint);
    }
}
