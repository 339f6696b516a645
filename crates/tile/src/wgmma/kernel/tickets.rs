//! Which item a cube takes next.
//!
//! All rows: items are dealt in rounds, back and forth over a list that stands longest first, so that no cube gets the
//! longest of every round. Rows of a plan, which may be of any length: the first two by position, the others from a
//! counter that all cubes share, so that a cube that is done early takes more.

// Rust sees placeholders for a cube's position, and believes that their difference overflows.
#![allow(arithmetic_overflow)]

use cubecl::prelude::*;

use super::{Room, stage_of};
use crate::wgmma::ptx;

/// Tickets on their way from the thread that draws them to all others.
pub(super) const STAGES: u32 = 2;

/// What the counters of a launch count, from the first on: tickets, cubes that are done, and for each item and warpgroup
/// the parts that are.
const DONE: u32 = 1;
pub(in crate::wgmma) const PARTS: u32 = 2;

/// The next slot as its drawer knows it.
#[derive(CubeType)]
pub(super) struct Tickets {
    slot: u32,
}

/// The slot of a cube's item where items are dealt in rounds.
#[cube]
pub(super) fn dealt(round: u32) -> u32 {
    let cubes = CUBE_COUNT as u32;
    let position = CUBE_POS as u32;
    round * cubes + select(round % 2u32 == 0u32, position, cubes - 1u32 - position)
}

/// The last cube leaves the counters as it found them.
#[cube]
pub(super) fn leave(counters: &[Atomic<u32>], from: u32) {
    if UNIT_POS == 0u32 {
        let done = counters[(from + comptime![DONE]) as usize].fetch_add(1u32);
        if done + 1u32 == CUBE_COUNT as u32 {
            counters[from as usize].store(0u32);
            counters[(from + comptime![DONE]) as usize].store(0u32);
        }
    }
}

#[cube]
impl Tickets {
    /// The second round is dealt backwards, so that a cube with a long item gets a short one.
    pub(super) fn new() -> Tickets {
        let slot = 2u32 * CUBE_COUNT as u32 - 1u32 - CUBE_POS as u32;
        Tickets { slot }
    }

    /// Draws the slot after the next from the counter at `from`.
    pub(super) fn draw(&mut self, counters: &[Atomic<u32>], from: u32) {
        if UNIT_POS == 0u32 {
            self.slot = 2u32 * CUBE_COUNT as u32 + counters[from as usize].fetch_add(1u32);
        }
    }

    /// The slot after that of the cube's `number`-th item, to every thread.
    pub(super) fn next(&self, number: u32, cells: &mut [u32], room: &Room) -> u32 {
        let (cell, phase) = stage_of(number, comptime![STAGES]);
        let full = room.ticket_full + cell * 8u32;
        let empty = room.ticket_empty + cell * 8u32;
        if UNIT_POS == 0u32 {
            ptx::wait_parity(empty, phase ^ 1u32);
            cells[cell as usize] = self.slot;
            ptx::arrive(full);
        }
        ptx::wait_parity(full, phase);
        let slot = cells[cell as usize];
        if UNIT_POS % 32u32 == 0u32 {
            ptx::arrive(empty);
        }
        slot
    }
}
