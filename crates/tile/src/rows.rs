//! Lists of rows, and which of their rows see a tile of keys: what every kernel that loops rows asks.

// In a kernel `%` is one instruction, and `is_multiple_of` is not there.
#![allow(clippy::manual_is_multiple_of)]

use bifocal_core::DeviceProfile;
use cubecl::prelude::*;

use crate::visibility::{Bounds, Visibility, bounds_of};

/// The bit that marks a row without a valid route.
pub(crate) const INVALID_ROW: u32 = 1 << 31;

/// The compile-time part of which rows a kernel has, and what they see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sight {
    pub(crate) visibility: Visibility,
    /// Rows come from a dispatch plan rather than from counting.
    pub(crate) routed: bool,
    /// Rows belong to sequences that are packed one after the other.
    pub(crate) ragged: bool,
}

/// The rows of a kv head, packed over its query heads (`token * group + head`): all of them, or a list of a dispatch
/// plan.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct List {
    /// Where the list begins among the plan's rows.
    pub(crate) start: u32,
    pub(crate) count: u32,
    /// Query heads per kv head.
    pub(crate) group: u32,
    pub(crate) query_len: u32,
    /// Position of the first query: key length - query length.
    pub(crate) first_position: i32,
}

/// The row of an entry of a list, with its mark.
#[cube]
pub(crate) fn row_of(list: &List, entry: u32, rows: &[u32], #[comptime] sight: Sight) -> u32 {
    let mut row = entry;
    if comptime![sight.routed] {
        row = rows[(list.start + entry) as usize];
    }
    row
}

/// Between which keys a row chooses.
#[cube]
pub(crate) fn bounds_of_row(list: &List, row: u32, sequences: &[u32], #[comptime] sight: Sight) -> Bounds {
    let token = row % INVALID_ROW / list.group;
    bounds_of(token, list.query_len, list.first_position, sequences, sight.visibility, sight.ragged)
}

/// Entries `begin..end` of a list.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Entries {
    pub(crate) begin: u32,
    pub(crate) end: u32,
}

/// The entries of a list that hold every row that sees a key of `first..=last`. Bounds ascend along a list, so that the
/// two ends are found by bisection, or by `planes` of 32 units, all of which call this. Rows in between may see none of
/// the keys: those of a sequence that ends before `first`, or between the sinks and the window of another.
#[cube]
pub(crate) fn entries_that_see(
    list: &List,
    first: i32,
    last: i32,
    window: i32,
    sinks: i32,
    rows: &[u32],
    sequences: &[u32],
    #[comptime] planes: bool,
    #[comptime] sight: Sight,
) -> Entries {
    let far = comptime![sight.visibility == Visibility::Far];
    let nearest = if far { first + window } else { first };
    let begin = entry_from(list, nearest, rows, sequences, false, planes, sight);
    let mut end = list.count;
    let mut last_start = 0i32;
    if comptime![sight.ragged] {
        end = entry_from(list, last + 1i32, rows, sequences, true, planes, sight);
        if end > 0u32 {
            let row = row_of(list, end - 1u32, rows, sight);
            last_start = bounds_of_row(list, row, sequences, sight).first;
        }
    }
    if comptime![sight.visibility == Visibility::Window] {
        end = min(end, entry_from(list, last + window, rows, sequences, false, planes, sight));
    }
    if comptime![sight.visibility == Visibility::SinksAndWindow] {
        // Sinks stay visible to all later rows of their sequence.
        if first >= last_start + sinks {
            end = min(end, entry_from(list, last + window, rows, sequences, false, planes, sight));
        }
    }
    Entries { begin, end }
}

/// The first entry whose row's position, or else the first key of its sequence, is at least `bound`; the number of
/// entries where there is none.
#[cube]
fn entry_from(
    list: &List,
    bound: i32,
    rows: &[u32],
    sequences: &[u32],
    #[comptime] by_sequence: bool,
    #[comptime] planes: bool,
    #[comptime] sight: Sight,
) -> u32 {
    let mut low = 0u32;
    let mut high = list.count;
    while low < high {
        if comptime![planes] {
            // Each unit asks one entry of 32; memory is waited for once instead of five times.
            let stride = (high - low).div_ceil(comptime![DeviceProfile::PLANE]);
            let entry = low + UNIT_POS % comptime![DeviceProfile::PLANE] * stride;
            let at = bound_at(list, min(entry, high - 1u32), rows, sequences, by_sequence, sight);
            let below = plane_sum(select(entry < high && at < bound, 1u32, 0u32));
            high = min(high, low + below * stride);
            low = select(below == 0u32, low, low + (below - 1u32) * stride + 1u32);
        } else {
            let middle = (low + high) / 2u32;
            if bound_at(list, middle, rows, sequences, by_sequence, sight) < bound {
                low = middle + 1u32;
            } else {
                high = middle;
            }
        }
    }
    low
}

/// An entry's position, or else the first key of its sequence.
#[cube]
fn bound_at(
    list: &List,
    entry: u32,
    rows: &[u32],
    sequences: &[u32],
    #[comptime] by_sequence: bool,
    #[comptime] sight: Sight,
) -> i32 {
    let bounds = bounds_of_row(list, row_of(list, entry, rows, sight), sequences, sight);
    if comptime![by_sequence] { bounds.first } else { bounds.position }
}

/// Whether a row sees a key.
#[cube]
pub(crate) fn sees(row: &Bounds, key: i32, window: i32, sinks: i32, #[comptime] sight: Sight) -> bool {
    let seen = match sight.visibility {
        Visibility::All | Visibility::NonCausal => key <= row.position,
        Visibility::Window => key <= row.position && key > row.position - window,
        Visibility::SinksAndWindow => {
            key <= row.position && (key < row.first + sinks || key > row.position - window)
        }
        Visibility::Far => key <= row.position - window && key >= row.first + sinks,
    };
    if comptime![sight.ragged] { seen && key >= row.first } else { seen }
}

/// Whether all rows whose bounds lie between those of two see all keys `first..=last`.
#[cube]
pub(crate) fn all_see(
    lowest: Bounds,
    highest: Bounds,
    first: i32,
    last: i32,
    window: i32,
    sinks: i32,
    #[comptime] sight: Sight,
) -> bool {
    let all = match sight.visibility {
        Visibility::All | Visibility::NonCausal => last <= lowest.position,
        Visibility::Window => last <= lowest.position && first > highest.position - window,
        Visibility::SinksAndWindow => {
            last <= lowest.position && (last < lowest.first + sinks || first > highest.position - window)
        }
        Visibility::Far => last <= lowest.position - window && first >= highest.first + sinks,
    };
    if comptime![sight.ragged] { all && first >= highest.first } else { all }
}
