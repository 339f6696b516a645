//! Rows on their way to the warpgroups that hold keys: the fetching warpgroup gathers queries and gradients of outputs by
//! index, and notes what else is known of a row.

use cubecl::prelude::*;

use crate::{
    arguments::BackwardTensors,
    mma::backward::parts::{exponent_of, row_of_id},
    rows::{Entries, INVALID_ROW, List, bounds_of_row, row_of},
    tensor_core::{
        Blueprint, Numbers, PANEL, SWIZZLE,
        ptx::{copies_commit, copies_wait, copy_16_or_zeros, global_address},
        swizzled,
    },
    visibility::Bounds,
    wgmma::{
        kernel::{WARPGROUP, stage_of},
        ptx,
    },
};

/// The barrier of the fetching threads among themselves.
const FETCHING: u32 = 1;

/// What is noted of the rows of a step, one after the other: exponents, deltas, positions, in ragged batches first
/// keys.
pub(super) const EXPONENTS: usize = 0;
pub(super) const DELTAS: usize = 1;
const POSITIONS: usize = 2;
const FIRSTS: usize = 3;

/// Words that are noted of a step.
pub(super) const fn note_words(blueprint: Blueprint) -> usize {
    let kinds = if blueprint.ragged { FIRSTS + 1 } else { FIRSTS };
    kinds * blueprint.shape.keys
}

/// Words that say where the rows of two steps begin.
pub(super) const fn start_words(blueprint: Blueprint) -> usize {
    4 * blueprint.shape.keys
}

/// A full and an empty barrier of 8 bytes for every stage, and one of the keys and values.
pub(super) const fn barrier_words(blueprint: Blueprint) -> usize {
    4 * blueprint.stages as usize + 2
}

/// All of that in bytes.
#[cfg(test)]
pub(super) fn noted_bytes(blueprint: Blueprint) -> usize {
    let notes = blueprint.stages as usize * note_words(blueprint);
    4 * (notes + start_words(blueprint) + barrier_words(blueprint))
}

/// The ring of rows in shared memory, as addresses: of a step the queries, then the gradients of their outputs.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Ring {
    pub(super) rows: u32,
    pub(super) full: u32,
    pub(super) empty: u32,
}

/// The bounds that are noted of a row of a stage.
#[cube]
pub(super) fn noted_bounds(notes: &[u32], stage: u32, row: u32, #[comptime] blueprint: Blueprint) -> Bounds {
    let rows = comptime![blueprint.shape.keys as u32];
    let at = stage * comptime![note_words(blueprint) as u32] + row;
    let mut first = 0i32;
    if comptime![blueprint.ragged] {
        first = i32::reinterpret(notes[(at + comptime![FIRSTS as u32 * rows]) as usize]);
    }
    let position = i32::reinterpret(notes[(at + comptime![POSITIONS as u32 * rows]) as usize]);
    Bounds { first, position }
}

/// Fetches the rows of all steps: by all threads of a warpgroup.
#[cube]
pub(super) fn fetch_rows<E: Float>(
    entries: &Entries,
    list: &List,
    list_index: u32,
    tensors: &BackwardTensors<E, E>,
    rows: &[u32],
    sequences: &[u32],
    ring: &Ring,
    notes: &mut [u32],
    starts: &mut [u32],
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let query_source = global_address::<E>(tensors.query.as_ptr());
    let d_out_source = global_address::<E>(tensors.d_out.as_ptr());
    let sight = comptime![blueprint.sight()];
    let stages = comptime![blueprint.stages];
    let step_rows = comptime![blueprint.shape.keys as u32];
    let tile_bytes = comptime![blueprint.key_bytes() as u32];
    let unit = UNIT_POS % WARPGROUP;
    let batch = list_index / numbers.kv_heads;
    let kv_head = list_index % numbers.kv_heads;
    let steps = (entries.end - entries.begin).div_ceil(step_rows);
    let noting = unit < step_rows;
    let mut id = row_of(list, min(entries.begin + unit, entries.end - 1u32), rows, sight);
    for step in 0..steps {
        let (stage, phase) = stage_of(step, stages);
        let begin = entries.begin + step * step_rows;
        let present = min(entries.end - begin, step_rows);
        let starts_at = step % 2u32 * comptime![2 * step_rows];
        let mut lse_noted = 0.0f32;
        let mut delta_noted = 0.0f32;
        let mut next_id = id;
        if noting {
            let row = row_of_id::<E>(id, batch, kv_head, tensors, numbers);
            starts[(starts_at + unit) as usize] = row.query;
            starts[(starts_at + step_rows + unit) as usize] = row.d_out;
            lse_noted = tensors.lse[row.index as usize];
            delta_noted = tensors.delta[row.index as usize];
            next_id = row_of(list, min(begin + step_rows + unit, entries.end - 1u32), rows, sight);
        }
        ptx::turn_wait(FETCHING, comptime![WARPGROUP as usize]);
        ptx::wait_parity(ring.empty + stage * 8u32, phase ^ 1u32);
        let to = ring.rows + stage * comptime![2 * tile_bytes];
        copy_step(query_source, &*starts, starts_at, present, to, unit, blueprint);
        copy_step(d_out_source, &*starts, starts_at + step_rows, present, to + tile_bytes, unit, blueprint);
        copies_commit();
        if noting {
            let bounds = bounds_of_row(list, id, sequences, sight);
            // Rows beyond the last have weights of 0.
            let exponent = exponent_of(lse_noted, id >= INVALID_ROW, numbers);
            let exponent = select(unit < present, exponent, numbers.neg_inf);
            let delta_noted = select(unit < present, delta_noted, 0.0f32);
            let at = stage * comptime![note_words(blueprint) as u32] + unit;
            notes[(at + comptime![EXPONENTS as u32 * step_rows]) as usize] = u32::reinterpret(exponent);
            notes[(at + comptime![DELTAS as u32 * step_rows]) as usize] = u32::reinterpret(delta_noted);
            notes[(at + comptime![POSITIONS as u32 * step_rows]) as usize] =
                u32::reinterpret(bounds.position);
            if comptime![blueprint.ragged] {
                notes[(at + comptime![FIRSTS as u32 * step_rows]) as usize] = u32::reinterpret(bounds.first);
            }
        }
        // The step before has arrived while this one's copies were started.
        if step > 0u32 {
            copies_wait(1u32);
            ptx::copies_seen();
            ptx::arrive(ring.full + (step - 1u32) % stages * 8u32);
        }
        id = next_id;
    }
    ptx::copies_end();
    ptx::arrive(ring.full + (steps - 1u32) % stages * 8u32);
}

/// Starts the copies of the rows that begin where `starts` say: eight threads take the 128 bytes of a row in a panel.
/// Those from `present` on are zeros: they have no weight, but 0 x NaN is NaN.
#[cube]
fn copy_step(
    source: u64,
    starts: &[u32],
    starts_at: u32,
    present: u32,
    to: u32,
    thread: u32,
    #[comptime] blueprint: Blueprint,
) {
    let rows_at_once = comptime![WARPGROUP / 8];
    let column = thread % 8u32;
    let first_row = thread / 8u32;
    let from = source + (column * 16u32) as u64;
    // Rows of a pass are a multiple of eight apart, so their column of the swizzle is the same.
    let to = to + first_row * comptime![SWIZZLE as u32] + swizzled(first_row, column);
    #[unroll]
    for pass in 0..comptime![blueprint.shape.keys as u32 / rows_at_once] {
        let row = first_row + comptime![pass * rows_at_once];
        let from = from + starts[(starts_at + row) as usize] as u64 * 2u64;
        let bytes = select(row < present, 16u32, 0u32);
        #[unroll]
        for panel in 0..comptime![blueprint.panels()] {
            let at = comptime![
                (panel * blueprint.shape.keys * SWIZZLE) as u32 + pass * rows_at_once * SWIZZLE as u32
            ];
            let columns = comptime![((blueprint.shape.dim - panel * PANEL).min(PANEL) / 8) as u32];
            // The last panel may be half full.
            if column < columns {
                copy_16_or_zeros(to + at, from + comptime![(panel * SWIZZLE) as u64], bytes);
            }
        }
    }
}
