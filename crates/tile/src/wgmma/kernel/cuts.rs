//! How the items of a launch are cut along their keys, and in which order their pieces are taken.
//!
//! Where there are few items they are cut in [parts](super::parts), which several cubes compute at the same time; where
//! contexts are long they are cut in [slices](super::slices), so that cubes at work on the same list read the same keys at
//! about the same time. Other items are one piece.

use cubecl::prelude::*;

use super::{parts::parts_of, slices::slices_of};
use crate::tensor_core::{
    Blueprint, Numbers,
    items::{Item, bounds_of_row, keys_between, row_at},
};

#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Cuts {
    /// How many items there are.
    pub(super) items: u32,
    /// Pieces of an item, at most.
    pub(super) pieces: u32,
    /// Pieces are slices.
    pub(super) sliced: bool,
    /// Items that are taken together: the first piece of each, then the second of each, and so on.
    together: u32,
    /// Items whose sums there is room to park.
    pub(super) room: u32,
}

/// A piece of an item.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Piece {
    pub(super) item: u32,
    pub(super) number: u32,
}

#[cube]
impl Cuts {
    /// Cuts `items` items, with room to park the sums of `room` pieces, in parts, or in up to `most_slices` slices.
    pub(super) fn new(items: u32, room: u32, most_slices: u32, #[comptime] blueprint: Blueprint) -> Cuts {
        let parts = parts_of(items, room, blueprint);
        let mut sliced = false;
        let mut pieces = parts;
        let mut together = 1u32;
        if comptime![blueprint.in_slices()] {
            sliced = parts == 1u32 && most_slices > 1u32;
            pieces = select(sliced, most_slices, parts);
            // As many as there are cubes; never more than there is room for.
            together = select(sliced, min(CUBE_COUNT as u32, room), 1u32);
        }
        Cuts { items, pieces, sliced, together, room }
    }

    /// Places in the order of work. Those of slices that an item does not have are passed over.
    pub(super) fn slots(&self) -> u32 {
        self.items * self.pieces
    }

    /// The piece in a slot.
    pub(super) fn piece(&self, slot: u32) -> Piece {
        let first = slot / (self.together * self.pieces) * self.together;
        let together = min(self.together, self.items - first);
        let within = slot - first * self.pieces;
        Piece { item: first + within % together, number: within / together }
    }

    /// How many pieces an item has.
    pub(super) fn pieces_of(
        &self,
        item: &Item,
        rows: &[u32],
        sequences: &[u32],
        numbers: &Numbers,
        #[comptime] blueprint: Blueprint,
    ) -> u32 {
        let mut pieces = self.pieces;
        if comptime![blueprint.in_slices()] {
            if self.sliced {
                let first = row_at(item, 0u32, rows, numbers, blueprint);
                let last = row_at(item, item.rows - 1u32, rows, numbers, blueprint);
                let first = bounds_of_row(first, sequences, numbers, blueprint);
                let last = bounds_of_row(last, sequences, numbers, blueprint);
                pieces = slices_of(keys_between(&first, &last, numbers, blueprint).tiles, blueprint);
            }
        }
        pieces
    }
}
