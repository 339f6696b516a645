//! Items on their way from the threads that gather them to all others.

use cubecl::prelude::*;

use super::{ITEM_STAGES, Room, stage_of};
use crate::{
    tensor_core::{
        Blueprint, Numbers,
        items::{Keys, bounds_at, keys_between},
    },
    wgmma::ptx,
};

/// Words that are told of an item.
pub(super) const WORDS: u32 = 3;

/// What is told of an item, beside its rows.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Announced {
    /// Its place in the order of work, times its parts; the number of slots where there is no further item.
    pub(super) slot: u32,
    pub(super) list: u32,
    pub(super) rows: u32,
}

/// Tells of the cube's `number`-th item. Its stage is free, and an arrival follows.
#[cube]
pub(super) fn announce(number: u32, slot: u32, list: u32, rows: u32, cells: &mut [u32]) {
    let at = (number % ITEM_STAGES * WORDS) as usize;
    cells[at] = slot;
    cells[at + 1] = list;
    cells[at + 2] = rows;
}

/// Waits for the cube's `number`-th item.
#[cube]
pub(super) fn announced(number: u32, cells: &[u32], room: &Room) -> Announced {
    let (stage, phase) = stage_of(number, ITEM_STAGES);
    ptx::wait_parity(room.item_full + stage * 8u32, phase);
    let at = (stage * WORDS) as usize;
    Announced { slot: cells[at], list: cells[at + 1], rows: cells[at + 2] }
}

#[cube]
impl Announced {
    /// Assigns every field: CubeCL assigns no structs.
    pub(super) fn set(&mut self, other: &Announced) {
        self.slot = other.slot;
        self.list = other.list;
        self.rows = other.rows;
    }

    /// The keys of the item, or of the part of it that this cube has.
    pub(super) fn keys(
        &self,
        number: u32,
        parts: u32,
        row_ids: &[u32],
        sequences: &[u32],
        numbers: &Numbers,
        #[comptime] blueprint: Blueprint,
    ) -> Keys {
        // An item that is not full repeats its last row.
        let first = number % ITEM_STAGES * comptime![blueprint.shape.rows as u32];
        let last = first + comptime![blueprint.shape.rows as u32 - 1];
        let (first_id, last_id) = (row_ids[first as usize], row_ids[last as usize]);
        let first = bounds_at(first, first_id, row_ids, sequences, numbers, blueprint);
        let last = bounds_at(last, last_id, row_ids, sequences, numbers, blueprint);
        let mut keys = keys_between(&first, &last, numbers, blueprint);
        keys.keep_part(self.slot % parts, parts, blueprint);
        keys
    }
}
