//! Items on their way from the threads that gather them to all others.

use cubecl::prelude::*;

use super::{
    ITEM_STAGES, Room,
    cuts::{Cuts, Piece},
    stage_of,
};
use crate::{
    tensor_core::{
        Blueprint, Numbers,
        items::{Keys, bounds_at, keys_between},
    },
    wgmma::ptx,
};

/// Words that are told of an item.
pub(super) const WORDS: u32 = 5;

/// What is told of an item, beside its rows.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Announced {
    /// Its place in the order of work, or the number of items where there is no further one; and which piece of it this is.
    pub(super) piece: Piece,
    /// How many pieces it has.
    pub(super) pieces: u32,
    pub(super) list: u32,
    pub(super) rows: u32,
}

/// Tells of the cube's `number`-th item. Its stage is free, and an arrival follows.
#[cube]
pub(super) fn announce(number: u32, piece: &Piece, pieces: u32, list: u32, rows: u32, cells: &mut [u32]) {
    let at = (number % ITEM_STAGES * WORDS) as usize;
    cells[at] = piece.item;
    cells[at + 1] = piece.number;
    cells[at + 2] = pieces;
    cells[at + 3] = list;
    cells[at + 4] = rows;
}

/// Waits for the cube's `number`-th item.
#[cube]
pub(super) fn announced(number: u32, cells: &[u32], room: &Room) -> Announced {
    let (stage, phase) = stage_of(number, ITEM_STAGES);
    ptx::wait_parity(room.item_full + stage * 8u32, phase);
    let at = (stage * WORDS) as usize;
    let piece = Piece { item: cells[at], number: cells[at + 1] };
    Announced { piece, pieces: cells[at + 2], list: cells[at + 3], rows: cells[at + 4] }
}

#[cube]
impl Announced {
    /// Assigns every field: CubeCL assigns no structs.
    pub(super) fn set(&mut self, other: &Announced) {
        self.piece.item = other.piece.item;
        self.piece.number = other.piece.number;
        self.pieces = other.pieces;
        self.list = other.list;
        self.rows = other.rows;
    }

    /// The keys of the item, or of the piece of it that this cube has.
    pub(super) fn keys(
        &self,
        number: u32,
        cuts: &Cuts,
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
        if comptime![blueprint.in_parts()] {
            let mut first = keys.tiles * self.piece.number / self.pieces;
            let mut end = keys.tiles * (self.piece.number + 1u32) / self.pieces;
            if comptime![blueprint.in_slices()] {
                if cuts.sliced {
                    let size = comptime![blueprint.slice_tiles];
                    first = self.piece.number * size;
                    end = select(self.piece.number + 1u32 == self.pieces, keys.tiles, first + size);
                }
            }
            keys.keep(first, end, blueprint);
        }
        keys
    }
}
