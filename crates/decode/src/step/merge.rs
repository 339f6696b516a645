//! The last launch: merges the pieces of every row by their log-sum-exp.

// In a kernel `%` is one instruction, and NaN alone differs from itself.
#![allow(clippy::manual_is_multiple_of, clippy::eq_op, clippy::collapsible_if)]

use bifocal_core::DeviceProfile;
use cubecl::prelude::*;

use super::{
    pieces::{Costs, Cut, share_of},
    rows::{Numbers, Row, Strides, offset, row_of},
};
use crate::reaches::is_nothing;

const PLANE: u32 = DeviceProfile::PLANE;

/// Planes that merge a row together, and pieces that each has in flight.
pub(super) const PLANES: usize = 16;
const AHEAD: usize = 8;

/// Four numbers of an output: what a lane loads at a time.
const QUAD: usize = 4;

/// A row of the output, and where its pieces are.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Place {
    row: Row,
    batch: u32,
    list: u32,
    in_tile: u32,
}

#[cube]
fn place_of(row: u32, kv_heads: u32, routes: &[u32], numbers: &Numbers, #[comptime] routed: bool) -> Place {
    let packed = numbers.query_len * numbers.group;
    let of_head = row / packed;
    let list = of_head * numbers.tiles + row % packed / numbers.tile_rows;
    let in_tile = row % packed % numbers.tile_rows;
    let row = row_of(list, in_tile, kv_heads, routes, numbers, routed);
    Place { row, batch: of_head / kv_heads, list, in_tile }
}

/// The logit that a row's softmax has without a key.
#[cube]
fn sink_of(
    row: &Row,
    rules: &[i32],
    sink_logits: &[f32],
    numbers: &Numbers,
    #[comptime] has_sinks: bool,
) -> f32 {
    let mut sink = numbers.neg_inf;
    if comptime![has_sinks] {
        // A row whose route shows nothing is not computed: it has no sink either.
        let computed = !is_nothing(rules, row.route);
        sink = select(computed, sink_logits[row.head as usize], numbers.neg_inf);
    }
    sink
}

/// What is subtracted from all scores of a row: a finite number, also for a row that has seen nothing.
#[cube]
fn offset_of(maximum: f32, numbers: &Numbers) -> f32 {
    select(maximum == numbers.neg_inf, 0.0f32, maximum)
}

/// What a piece is worth beside the others.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Worth {
    /// What its outputs are multiplied by.
    weight: f32,
    /// What it adds to the sum.
    sum: f32,
    /// Whether its outputs count: a piece of which the row sees nothing, or nothing but NaN, has no maximum.
    seen: bool,
}

#[cube]
fn worth_of(maximum: f32, sum: f32, offset: f32, numbers: &Numbers) -> Worth {
    let seen = maximum != numbers.neg_inf;
    let weight = select(seen, (maximum - offset).exp(), 0.0f32);
    Worth { weight, sum: select(sum == sum, weight * sum, numbers.nan), seen }
}

/// Writes one number of a row, and with the first its log-sum-exp. A row without keys has sum 0: its output is 0 and its
/// log-sum-exp -inf.
#[cube]
fn write<O: Float>(
    out: &mut [O],
    lse: &mut [f32],
    place: &Place,
    d: u32,
    total: f32,
    sum: f32,
    offset_of_row: f32,
    out_strides: &Strides,
    numbers: &Numbers,
) {
    let empty = sum == 0.0f32;
    let invalid = place.row.route >= numbers.reaches;
    let x = select(empty, 0.0f32, total / select(empty, 1.0f32, sum));
    let at = offset(out_strides, place.batch, place.row.head, place.row.token) + d;
    out[at as usize] = O::cast_from(select(invalid, numbers.nan, x));
    if d == 0u32 {
        let x = select(empty, numbers.neg_inf, offset_of_row + select(empty, 1.0f32, sum).ln());
        let at = (place.batch * numbers.heads + place.row.head) * numbers.query_len + place.row.token;
        lse[at as usize] = select(invalid, numbers.nan, x);
    }
}

/// One unit per element of the output: sums what the chunks of its row gave, first to last.
#[cube(launch_unchecked)]
pub(super) fn merge_kernel<O: Float>(
    needs: &[u32],
    routes: &[u32],
    rules: &[i32],
    sums: &[f32],
    outs: &[f32],
    sink_logits: &[f32],
    out: &mut [O],
    lse: &mut [f32],
    out_strides: Strides,
    numbers: Numbers,
    kv_heads: u32,
    #[comptime] routed: bool,
    #[comptime] has_sinks: bool,
    #[define(O)] _element: ElemType,
) {
    let d = ABSOLUTE_POS as u32 % numbers.value_dim;
    let row = ABSOLUTE_POS as u32 / numbers.value_dim;
    if row / (numbers.query_len * numbers.group) >= numbers.lists / numbers.tiles {
        terminate!();
    }
    let place = place_of(row, kv_heads, routes, &numbers, routed);
    let first = place.list * numbers.max_chunks * numbers.tile_rows + place.in_tile;
    let chunks = needs[(place.list * 4u32 + 2u32) as usize].div_ceil(numbers.chunk);

    let sink = sink_of(&place.row, rules, sink_logits, &numbers, has_sinks);
    let mut maximum = sink;
    for chunk in 0..chunks {
        maximum = max(maximum, sums[((first + chunk * numbers.tile_rows) * 2u32) as usize]);
    }
    let offset_of_row = offset_of(maximum, &numbers);
    let mut sum = (sink - offset_of_row).exp();
    let mut total = 0.0f32;
    for chunk in 0..chunks {
        let at = first + chunk * numbers.tile_rows;
        let of_chunk = sums[(at * 2u32 + 1u32) as usize];
        let worth = worth_of(sums[(at * 2u32) as usize], of_chunk, offset_of_row, &numbers);
        sum += worth.sum;
        let x = outs[(at * numbers.value_dim + d) as usize];
        total += select(worth.seen, worth.weight * x, 0.0f32);
    }
    write::<O>(out, lse, &place, d, total, sum, offset_of_row, &out_strides, &numbers);
}

/// A cube per row of the output: its planes take its pieces in turn, lanes four numbers of each side by side.
#[cube(launch_unchecked)]
pub(super) fn merge_on_planes_kernel<O: Float>(
    needs: &[u32],
    starts: &[u32],
    routes: &[u32],
    rules: &[i32],
    sums: &[f32],
    outs: &[Vector<f32, Const<4>>],
    sink_logits: &[f32],
    out: &mut [O],
    lse: &mut [f32],
    out_strides: Strides,
    numbers: Numbers,
    kv_heads: u32,
    #[comptime] value_dim: usize,
    #[comptime] cut: Cut,
    #[comptime] routed: bool,
    #[comptime] has_sinks: bool,
    #[define(O)] _element: ElemType,
) {
    let quads = comptime![value_dim / QUAD];
    let per_lane = comptime![quads.div_ceil(PLANE as usize)];
    let units = comptime![PLANES as u32 * PLANE];
    let plane = UNIT_POS / PLANE;
    let lane = UNIT_POS % PLANE;
    let place = place_of(CUBE_POS as u32, kv_heads, routes, &numbers, routed);
    let list = place.list;
    let costs = Costs {
        list,
        before: starts[list as usize],
        after: starts[list as usize + 1],
        keys: needs[(list * 4u32 + 2u32) as usize],
        share: share_of(starts[numbers.lists as usize], &numbers),
    };
    let pieces = costs.pieces(&numbers, cut);

    // The largest score of all pieces.
    let mut maxima = Shared::<[f32]>::new_slice(PLANES);
    let sink = sink_of(&place.row, rules, sink_logits, &numbers, has_sinks);
    let mut maximum = sink;
    let mut number = pieces.first + UNIT_POS;
    while number < pieces.end {
        let piece = costs.piece(number, &numbers, cut);
        if piece.first < piece.end {
            let at = (piece.slot * numbers.tile_rows + place.in_tile) * 2u32;
            maximum = max(maximum, sums[at as usize]);
        }
        number += units;
    }
    sync_plane();
    let of_plane = plane_max(maximum);
    if lane == 0u32 {
        maxima[plane as usize] = of_plane;
    }
    sync_cube();
    maximum = sink;
    #[unroll]
    for i in 0..PLANES {
        maximum = max(maximum, maxima[i]);
    }
    let offset_of_row = offset_of(maximum, &numbers);

    // What the pieces of this plane add up to.
    let mut sum = 0.0f32;
    let mut totals = Array::<Vector<f32, Const<4>>>::new(per_lane);
    #[unroll]
    for i in 0..per_lane {
        totals[i] = Vector::new(0.0f32);
    }
    number = pieces.first + plane;
    while number < pieces.end {
        #[unroll]
        for i in 0..AHEAD {
            let this = number + comptime![(i * PLANES) as u32];
            let piece = costs.piece(min(this, pieces.end - 1u32), &numbers, cut);
            let counts = this < pieces.end && piece.first < piece.end;
            let at = piece.slot * numbers.tile_rows + place.in_tile;
            let of_piece = sums[(at * 2u32 + 1u32) as usize];
            let worth = worth_of(sums[(at * 2u32) as usize], of_piece, offset_of_row, &numbers);
            sum += select(counts, worth.sum, 0.0f32);
            let seen = counts && worth.seen;
            #[unroll]
            for quad in 0..per_lane {
                let column = min(lane + comptime![quad as u32 * PLANE], comptime![quads as u32 - 1]);
                let x = outs[(at * comptime![quads as u32] + column) as usize];
                let zero = Vector::<f32, Const<4>>::new(0.0f32);
                totals[quad] += select(seen, x * Vector::new(worth.weight), zero);
            }
        }
        number += comptime![(AHEAD * PLANES) as u32];
    }

    // And all planes together.
    let mut sums_of_planes = Shared::<[f32]>::new_slice(PLANES);
    let mut totals_of_planes = Shared::<[f32]>::new_slice(comptime![PLANES * value_dim]);
    if lane == 0u32 {
        sums_of_planes[plane as usize] = sum;
    }
    #[unroll]
    for quad in 0..per_lane {
        let column = lane + comptime![quad as u32 * PLANE];
        if column < comptime![quads as u32] {
            #[unroll]
            for i in 0..QUAD {
                let at = plane * comptime![value_dim as u32] + column * 4u32 + comptime![i as u32];
                totals_of_planes[at as usize] = totals[quad].extract(i);
            }
        }
    }
    sync_cube();
    let mut d = UNIT_POS;
    while d < comptime![value_dim as u32] {
        let mut sum = (sink - offset_of_row).exp();
        let mut total = 0.0f32;
        #[unroll]
        for i in 0..PLANES {
            sum += sums_of_planes[i];
            total += totals_of_planes[(d + comptime![(i * value_dim) as u32]) as usize];
        }
        write::<O>(out, lse, &place, d, total, sum, offset_of_row, &out_strides, &numbers);
        d += units;
    }
}
