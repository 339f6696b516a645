//! Copies of tiles into panels of the 128-byte swizzle: in bulk, and row by row.

use cubecl::prelude::*;

use super::ptx;
use crate::tensor_core::{Blueprint, PANEL, SWIZZLE, ptx::copy_16, swizzled};

/// Starts the bulk copy of `tokens` keys, or values, of a head; those beyond the tensor are zeros. Arrives at `barrier` by
/// its bytes.
#[cube]
pub(super) fn load_tile<E: Float>(
    map: &TensorMap<E, Tiled>,
    to: u32,
    barrier: u32,
    batch: u32,
    head: u32,
    start: u32,
    #[comptime] tokens: usize,
    #[comptime] blueprint: Blueprint,
) {
    if comptime![blueprint.whole_panels()] {
        ptx::load_panels::<E>(map, to, barrier, batch, head, start);
    } else {
        #[unroll]
        for panel in 0..comptime![blueprint.panels() as u32] {
            let at = to + comptime![panel * (tokens * SWIZZLE) as u32];
            ptx::load_box::<E>(map, at, barrier, batch, head, start, comptime![panel * PANEL as u32]);
        }
    }
}

/// Starts the copies of a tile of rows, which begin where `offsets` say, by `threads` threads: eight take the 128 bytes of
/// a row in a panel.
#[cube]
pub(super) fn copy_rows(
    source: u64,
    offsets: &[u32],
    offsets_at: u32,
    to: u32,
    thread: u32,
    #[comptime] threads: u32,
    #[comptime] blueprint: Blueprint,
) {
    let rows_at_once = comptime![threads / 8];
    let column = thread % 8u32;
    let first_row = thread / 8u32;
    let from = source + (column * 16u32) as u64;
    // Rows of a pass are a multiple of eight apart, so their column of the swizzle is the same.
    let to = to + first_row * comptime![SWIZZLE as u32] + swizzled(first_row, column);
    for pass in 0..comptime![blueprint.shape.rows as u32 / rows_at_once] {
        let row = pass * rows_at_once;
        let from = from + offsets[(offsets_at + row + first_row) as usize] as u64 * 2u64;
        let to = to + row * comptime![SWIZZLE as u32];
        #[unroll]
        for panel in 0..comptime![blueprint.panels()] {
            let at = comptime![(panel * blueprint.shape.rows * SWIZZLE) as u32];
            let columns = comptime![((blueprint.shape.dim - panel * PANEL).min(PANEL) / 8) as u32];
            // The last panel may be half full.
            if column < columns {
                copy_16(to + at, from + comptime![(panel * SWIZZLE) as u64]);
            }
        }
    }
}
