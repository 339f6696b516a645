//! Copies of keys, values and rows from global to shared memory.

use bifocal_tensor_core::SWIZZLE;
pub(super) use bifocal_tensor_core::copies::{Source, Tile, copy_tile, place};
use cubecl::prelude::*;

use crate::{
    arguments::Strides,
    tensor_core::ptx::{copy_16, global_address},
};

/// Those of a tensor of keys or values that are a kv head's.
#[cube]
pub(super) fn source_of<E: Float>(tensor: &[E], batch: u32, kv_head: u32, strides: &Strides) -> Source {
    let address = global_address::<E>(tensor.as_ptr());
    let start = batch * strides.batch + kv_head * strides.head;
    Source { address: address + start as u64 * 2u64, stride: strides.token }
}

/// Starts the copies of an item's rows to `room`. Where they begin is noted in `notes`, from `at` on, in elements.
#[cube]
pub(super) fn copy_rows(source: u64, notes: &[u32], #[comptime] at: u32, room: u32, #[comptime] tile: Tile) {
    #[unroll]
    for panel in 0..comptime![tile.panels()] {
        let place = place(UNIT_POS, panel, tile);
        let from = source + (place.column * 16u32) as u64;
        let at_once = comptime![tile.rows_at_once(panel)];
        #[unroll]
        for pass in 0..comptime![tile.rows / at_once] {
            let row = place.row + comptime![at + (pass * at_once) as u32];
            let start = notes[row as usize];
            copy_16(
                room + place.offset + comptime![tile.at(panel, pass * at_once)],
                from + start as u64 * 2u64 + comptime![(panel * SWIZZLE) as u64],
            );
        }
    }
}
