//! Copies of tiles from global to shared memory, into panels of the 128-byte swizzle, by all threads of a cube or by
//! some.

use cubecl::prelude::*;

use crate::{PANEL, SWIZZLE, ptx::copy_16_or_zeros, swizzled};

/// Keys or values of a list.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub struct Source {
    /// The address of key 0.
    pub address: u64,
    /// Elements from a key to the next.
    pub stride: u32,
}

/// The shape of a copied tile, and how many threads copy it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Rows of the tile.
    pub rows: usize,
    /// Elements of a row.
    pub dim: usize,
    /// Threads that copy it.
    pub threads: usize,
}

impl Tile {
    /// Panels that a row is stored in.
    pub const fn panels(self) -> usize {
        self.dim.div_ceil(PANEL)
    }

    /// Units of 16 bytes in a row of a panel.
    const fn columns(self, panel: usize) -> usize {
        let columns = self.dim - panel * PANEL;
        if columns < PANEL { columns / 8 } else { PANEL / 8 }
    }

    /// Rows of a panel that all threads together copy at once.
    pub const fn rows_at_once(self, panel: usize) -> usize {
        self.threads / self.columns(panel)
    }

    /// Where a panel's row begins, in bytes.
    pub const fn at(self, panel: usize, row: usize) -> u32 {
        ((panel * self.rows + row) * SWIZZLE) as u32
    }
}

/// Where a thread copies: every how manieth row of a panel, and which 16 bytes of it.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub struct Place {
    /// The first of its rows.
    pub row: u32,
    /// Which 16 bytes of a row.
    pub column: u32,
    /// Within the panel, in bytes.
    pub offset: u32,
}

/// The place of the `unit`-th of a tile's threads.
#[cube]
pub fn place(unit: u32, #[comptime] panel: usize, #[comptime] tile: Tile) -> Place {
    let columns = comptime![tile.columns(panel) as u32];
    let row = unit / columns;
    let column = unit % columns;
    Place { row, column, offset: row * comptime![SWIZZLE as u32] + swizzled(row, column) }
}

/// Starts the copy of the keys or values from `start` on to `room`. Those from `end` on are zeros: no row sees them,
/// but 0 x NaN is NaN.
#[cube]
pub fn copy_tile(unit: u32, source: &Source, start: u32, end: u32, room: u32, #[comptime] tile: Tile) {
    #[unroll]
    for panel in 0..comptime![tile.panels()] {
        let place = place(unit, panel, tile);
        let from = source.address + (place.column * 16u32) as u64;
        let at_once = comptime![tile.rows_at_once(panel)];
        #[unroll]
        for pass in 0..comptime![tile.rows / at_once] {
            let key = start + place.row + comptime![(pass * at_once) as u32];
            copy_16_or_zeros(
                room + place.offset + comptime![tile.at(panel, pass * at_once)],
                from + (key * source.stride) as u64 * 2u64 + comptime![(panel * SWIZZLE) as u64],
                select(key < end, 16u32, 0u32),
            );
        }
    }
}
