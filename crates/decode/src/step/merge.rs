//! Merges the chunks of every row.

// In a kernel `%` is one instruction, and NaN alone differs from itself.
#![allow(clippy::manual_is_multiple_of, clippy::eq_op)]

use cubecl::prelude::*;

use super::rows::{Numbers, Strides, offset, row_of};
use crate::reaches::is_nothing;

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
    let packed = numbers.query_len * numbers.group;
    let d = ABSOLUTE_POS as u32 % numbers.value_dim;
    let row = ABSOLUTE_POS as u32 / numbers.value_dim;
    let of_head = row / packed;
    if of_head >= numbers.lists / numbers.tiles {
        terminate!();
    }
    let list = of_head * numbers.tiles + row % packed / numbers.tile_rows;
    let in_tile = row % packed % numbers.tile_rows;
    let row = row_of(list, in_tile, kv_heads, routes, &numbers, routed);
    let first = list * numbers.max_chunks * numbers.tile_rows + in_tile;
    let chunks = needs[(list * 4u32 + 2u32) as usize].div_ceil(numbers.chunk);

    let mut sink = numbers.neg_inf;
    if comptime![has_sinks] {
        // A row whose route shows nothing is not computed: it has no sink either.
        let computed = !is_nothing(rules, row.route);
        sink = select(computed, sink_logits[row.head as usize], numbers.neg_inf);
    }
    let mut maximum = sink;
    for chunk in 0..chunks {
        maximum = max(maximum, sums[((first + chunk * numbers.tile_rows) * 2u32) as usize]);
    }
    let offset_of_row = select(maximum == numbers.neg_inf, 0.0f32, maximum);
    let mut sum = (sink - offset_of_row).exp();
    let mut total = 0.0f32;
    for chunk in 0..chunks {
        let at = first + chunk * numbers.tile_rows;
        let here = sums[(at * 2u32) as usize];
        let weight = (here - offset_of_row).exp();
        let of_chunk = sums[(at * 2u32 + 1u32) as usize];
        // A chunk of which the row sees nothing, or nothing but NaN, has no maximum.
        let nothing = here == numbers.neg_inf;
        let is_number = of_chunk == of_chunk;
        let scaled = select(nothing, 0.0f32, weight * of_chunk);
        sum += select(is_number, scaled, numbers.nan);
        let x = outs[(at * numbers.value_dim + d) as usize];
        total += select(nothing, 0.0f32, weight * x);
    }
    // A row without keys has sum 0: its output is 0 and its log-sum-exp -inf.
    let empty = sum == 0.0f32;
    let invalid = row.route >= numbers.reaches;
    let batch = of_head / kv_heads;
    let x = select(empty, 0.0f32, total / select(empty, 1.0f32, sum));
    let at = offset(&out_strides, batch, row.head, row.token) + d;
    out[at as usize] = O::cast_from(select(invalid, numbers.nan, x));
    if d == 0u32 {
        let x = select(empty, numbers.neg_inf, offset_of_row + select(empty, 1.0f32, sum).ln());
        let at = (batch * numbers.heads + row.head) * numbers.query_len + row.token;
        lse[at as usize] = select(invalid, numbers.nan, x);
    }
}
