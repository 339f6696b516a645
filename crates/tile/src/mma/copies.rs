//! Copies of tiles from global to shared memory, into panels of the 128-byte swizzle, by all threads of a cube or by
//! some.

use cubecl::prelude::*;

use super::ptx;
use crate::{
    arguments::Strides,
    tensor_core::{
        PANEL, SWIZZLE,
        ptx::{copy_16, global_address},
        swizzled,
    },
};

/// Keys or values of a list.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Source {
    /// The address of key 0.
    pub(super) address: u64,
    /// Elements from a key to the next.
    pub(super) stride: u32,
}

/// Those of a tensor of keys or values that are a kv head's.
#[cube]
pub(super) fn source_of<E: Float>(tensor: &[E], batch: u32, kv_head: u32, strides: &Strides) -> Source {
    let address = global_address::<E>(tensor.as_ptr());
    let start = batch * strides.batch + kv_head * strides.head;
    Source { address: address + start as u64 * 2u64, stride: strides.token }
}

/// The shape of a copied tile, and how many threads copy it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    pub(super) rows: usize,
    pub(super) dim: usize,
    pub(super) threads: usize,
}

impl Tile {
    pub(super) const fn panels(self) -> usize {
        self.dim.div_ceil(PANEL)
    }

    /// Units of 16 bytes in a row of a panel.
    const fn columns(self, panel: usize) -> usize {
        let columns = self.dim - panel * PANEL;
        if columns < PANEL { columns / 8 } else { PANEL / 8 }
    }

    /// Rows of a panel that all threads together copy at once.
    pub(super) const fn rows_at_once(self, panel: usize) -> usize {
        self.threads / self.columns(panel)
    }

    /// Where a panel's row begins, in bytes.
    pub(super) const fn at(self, panel: usize, row: usize) -> u32 {
        ((panel * self.rows + row) * SWIZZLE) as u32
    }
}

/// Where a thread copies: every how manieth row of a panel, and which 16 bytes of it.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Place {
    pub(super) row: u32,
    pub(super) column: u32,
    /// Within the panel, in bytes.
    pub(super) offset: u32,
}

/// The place of the `unit`-th of a tile's threads.
#[cube]
pub(super) fn place(unit: u32, #[comptime] panel: usize, #[comptime] tile: Tile) -> Place {
    let columns = comptime![tile.columns(panel) as u32];
    let row = unit / columns;
    let column = unit % columns;
    Place { row, column, offset: row * comptime![SWIZZLE as u32] + swizzled(row, column) }
}

/// Starts the copy of the keys or values from `start` on to `room`. Those from `end` on are zeros: no row sees them,
/// but 0 x NaN is NaN.
#[cube]
pub(super) fn copy_tile(unit: u32, source: &Source, start: u32, end: u32, room: u32, #[comptime] tile: Tile) {
    #[unroll]
    for panel in 0..comptime![tile.panels()] {
        let place = place(unit, panel, tile);
        let from = source.address + (place.column * 16u32) as u64;
        let at_once = comptime![tile.rows_at_once(panel)];
        #[unroll]
        for pass in 0..comptime![tile.rows / at_once] {
            let key = start + place.row + comptime![(pass * at_once) as u32];
            ptx::copy_16_or_zeros(
                room + place.offset + comptime![tile.at(panel, pass * at_once)],
                from + (key * source.stride) as u64 * 2u64 + comptime![(panel * SWIZZLE) as u64],
                select(key < end, 16u32, 0u32),
            );
        }
    }
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
