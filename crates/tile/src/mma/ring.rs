//! The ring of tiles in shared memory. Two kinds of tile take turns in it, keys and values, copied ahead of their use by
//! all threads.

// In a kernel `%` is one instruction, and `is_multiple_of` is not there.
#![allow(clippy::manual_is_multiple_of)]

use cubecl::prelude::*;

use super::{
    copies::{Source, copy_tile},
    ptx,
};
use crate::tensor_core::{
    Blueprint, Numbers,
    items::{Keys, tile_start},
};

/// What takes turns in a ring: of every tile of keys first the one, then the other.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Turns {
    pub(super) first: Source,
    pub(super) second: Source,
}

/// A step waits for its tile, meets the other warps, which have then left the tile before, and starts the copy that takes
/// that one's place.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Ring {
    /// Where in the ring this step's tile is, in bytes.
    pub(super) now: u32,
    /// And the one before, whose place is free once all warps are here.
    before: u32,
}

#[cube]
impl Ring {
    pub(super) fn new(#[comptime] blueprint: Blueprint) -> Ring {
        let last = comptime![blueprint.ring_bytes() - blueprint.key_bytes() as u32];
        Ring { now: 0u32, before: u32::new(comptime![last as i64]) }
    }

    /// Waits until this step's tile is here, and every warp.
    pub(super) fn wait(&self, #[comptime] blueprint: Blueprint) {
        ptx::copies_wait(comptime![blueprint.stages - 2]);
        sync_cube();
    }

    /// Starts the copy that takes the place of the tile before, `ahead` steps from the first of `tile`.
    pub(super) fn copy(
        &self,
        unit: u32,
        turns: &Turns,
        keys: &Keys,
        tile: u32,
        #[comptime] ahead: u32,
        room: u32,
        numbers: &Numbers,
        #[comptime] blueprint: Blueprint,
    ) {
        copy_ahead(unit, turns, keys, tile, ahead, room + self.before, numbers, blueprint);
    }

    /// Goes on to the next step.
    pub(super) fn turn(&mut self, #[comptime] blueprint: Blueprint) {
        let tile_bytes = comptime![blueprint.key_bytes() as u32];
        self.before = self.now;
        self.now =
            select(self.now + tile_bytes == comptime![blueprint.ring_bytes()], 0u32, self.now + tile_bytes);
    }
}

impl Blueprint {
    pub(super) const fn ring_bytes(self) -> u32 {
        self.stages * self.key_bytes() as u32
    }
}

/// Starts the copies of the tiles that fill all places of a ring at `room` but the last.
#[cube]
pub(super) fn fill(
    turns: &Turns,
    keys: &Keys,
    room: u32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    #[unroll]
    for step in 0..comptime![blueprint.stages - 1] {
        let room = room + comptime![step * blueprint.key_bytes() as u32];
        copy_ahead(UNIT_POS, turns, keys, 0u32, step, room, numbers, blueprint);
    }
}

/// Starts the copy of the `step`-th tile, counted from the first of the keys of `tile`.
#[cube]
fn copy_ahead(
    unit: u32,
    turns: &Turns,
    keys: &Keys,
    tile: u32,
    #[comptime] step: u32,
    room: u32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let tile = tile + comptime![step / 2];
    if tile < keys.tiles {
        let start = tile_start(keys, tile, blueprint) as u32;
        let end = numbers.first_position as u32 + numbers.query_len;
        if comptime![step % 2 == 0] {
            copy_tile(unit, &turns.first, start, end, room, comptime![blueprint.key_tile()]);
        } else {
            copy_tile(unit, &turns.second, start, end, room, comptime![blueprint.key_tile()]);
        }
    }
    // An empty group counts too.
    ptx::copies_commit();
}
