//! Which item a cube takes next.
//!
//! All rows: items are dealt in rounds, back and forth over a list that stands longest first, so that no cube gets the
//! longest of every round. Rows of a plan, which may be of any length: the first two by position, the others from a
//! counter that all cubes share, so that a cube that is done early takes more. Slices, which wait for one another, all from
//! the counter, so that a cube that has not begun yet keeps none.

// Rust sees placeholders for a cube's position, and believes that their difference overflows.
#![allow(arithmetic_overflow)]

use cubecl::prelude::*;

use super::{TICKETS, cuts::Cuts};
use crate::tensor_core::{Blueprint, Numbers, items::item_of};

/// What the counters of a launch count, from the first on: tickets, cubes that are done, and for each item and warpgroup
/// the parts that are, or for each room and warpgroup the turns of slices.
const DONE: u32 = 1;
pub(in crate::wgmma) const PARTS: u32 = 2;

/// The next slot as the thread that draws it knows it.
#[derive(CubeType)]
pub(super) struct Tickets {
    slot: u32,
    /// How many pieces its item has.
    pub(super) pieces: u32,
}

/// The slot of a cube's item where items are dealt in rounds.
#[cube]
pub(super) fn dealt(round: u32) -> u32 {
    let cubes = CUBE_COUNT as u32;
    let position = CUBE_POS as u32;
    round * cubes + select(round % 2u32 == 0u32, position, cubes - 1u32 - position)
}

/// The last cube leaves the counters as it found them. Called by one thread, which has drawn its last ticket.
#[cube]
pub(super) fn leave(counters: &[Atomic<u32>], from: u32) {
    let done = counters[(from + comptime![DONE]) as usize].fetch_add(1u32);
    if done + 1u32 == CUBE_COUNT as u32 {
        counters[from as usize].store(0u32);
        counters[(from + comptime![DONE]) as usize].store(0u32);
    }
}

#[cube]
impl Tickets {
    /// The second round is dealt backwards, so that a cube with a long item gets a short one.
    pub(super) fn new(cuts: &Cuts) -> Tickets {
        let slot = 2u32 * CUBE_COUNT as u32 - 1u32 - CUBE_POS as u32;
        Tickets { slot, pieces: cuts.pieces }
    }

    /// Draws a slot from the counter at `from`: that of the item after the next. Passes over those of slices that there
    /// are not.
    pub(super) fn draw(
        &mut self,
        counters: &[Atomic<u32>],
        from: u32,
        cuts: &Cuts,
        items: &[u32],
        rows: &[u32],
        sequences: &[u32],
        numbers: &Numbers,
        #[comptime] blueprint: Blueprint,
    ) {
        if comptime![blueprint.in_slices()] {
            let dealt = select(cuts.sliced, 0u32, 2u32 * CUBE_COUNT as u32);
            let slots = cuts.slots();
            let mut there = false;
            while !there {
                self.slot = dealt + counters[from as usize].fetch_add(1u32);
                there = true;
                if cuts.sliced && self.slot < slots {
                    let piece = cuts.piece(self.slot);
                    let item = item_of(piece.item, items, numbers, blueprint);
                    self.pieces = cuts.pieces_of(&item, rows, sequences, numbers, blueprint);
                    there = piece.number < self.pieces;
                }
            }
        } else {
            self.slot = 2u32 * CUBE_COUNT as u32 + counters[from as usize].fetch_add(1u32);
        }
    }

    /// Writes down the slot after that of the cube's `number`-th item. Every other one has a cell of its own, so that a
    /// thread may still read it when the next is written.
    pub(super) fn hand_out(&self, number: u32, cells: &mut [u32]) {
        cells[(TICKETS + number % 2u32) as usize] = self.slot;
    }

    /// Reads it, after a barrier.
    pub(super) fn handed_out(&self, number: u32, cells: &[u32]) -> u32 {
        cells[(TICKETS + number % 2u32) as usize]
    }
}
