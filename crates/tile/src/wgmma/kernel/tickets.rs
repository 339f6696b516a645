//! Which item a cube takes next: the first two by its position, the others from a counter that all cubes share, so that
//! a cube that is done early takes more. Items stand longest first, and what is taken is taken late: when the one before
//! the one before is done.

// Rust sees placeholders for a cube's position, and believes that their difference overflows.
#![allow(arithmetic_overflow)]

use cubecl::prelude::*;

use super::{Room, stage_of};
use crate::wgmma::ptx;

/// Tickets on their way from the thread that draws them to all others.
pub(super) const STAGES: u32 = 2;

/// The next slot as its drawer knows it.
#[derive(CubeType)]
pub(super) struct Tickets {
    slot: u32,
}

#[cube]
impl Tickets {
    /// The second round is dealt backwards, so that a cube with a long item gets a short one.
    pub(super) fn new() -> Tickets {
        let slot = 2u32 * CUBE_COUNT as u32 - 1u32 - CUBE_POS as u32;
        Tickets { slot }
    }

    /// Draws the slot after the next.
    pub(super) fn draw(&mut self, counters: &[Atomic<u32>]) {
        if UNIT_POS == 0u32 {
            self.slot = 2u32 * CUBE_COUNT as u32 + counters[0].fetch_add(1u32);
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
