//! Gradients of sink logits, for every routine: `dsink_h -= sum_i exp(sink_h - lse_i) delta_i` over the rows of a head.

// In a kernel `%` is one instruction; an `if` on compile-time values stays apart from one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_core::{
    Problem,
    device::{
        Gradients, Inputs, Saved,
        launch::{elements, grid, words},
    },
};
use cubecl::{client::Client, prelude::*};

use crate::{engine::Work, rows::INVALID_ROW};

/// Entries of a list, of every batch, that one unit sums for one head.
const SEGMENT: usize = 256;

#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Shape {
    batch: u32,
    heads: u32,
    kv_heads: u32,
    query_len: u32,
    segments: u32,
    reach: u32,
}

/// Adds the gradients of the inputs' sink logits, if they have any: partial sums, then their sum, in a fixed order.
/// Everything has been checked.
pub(crate) fn launch(
    client: &Client,
    problem: &Problem,
    inputs: &Inputs<'_>,
    work: &Work<'_>,
    saved: &Saved<'_>,
    gradients: &Gradients,
) {
    let (Some(sinks), Some(gradient)) = (&inputs.sink_logits, &gradients.sink_logits) else { return };
    let segments = problem.packed_rows().div_ceil(SEGMENT);
    let sums = client.empty(problem.heads * segments * 4);
    let shape = || {
        ShapeLaunch::new(
            problem.batch as u32,
            problem.heads as u32,
            problem.kv_heads as u32,
            problem.query_len as u32,
            segments as u32,
            work.reach,
        )
    };
    // SAFETY: views and the plan were checked against the problem; each unit checks its number.
    unsafe {
        let (cubes, units) = grid(client, problem.heads * segments);
        sum_segments::launch_unchecked(
            client,
            cubes,
            units,
            elements(*sinks),
            elements(saved.partial.lse.view()),
            elements(saved.delta),
            words(work.rows),
            words(work.list_counts),
            words(&sums),
            shape(),
            f32::NEG_INFINITY,
            f32::NAN,
            work.routed,
        );
        let (cubes, units) = grid(client, problem.heads);
        subtract_sums::launch_unchecked(
            client,
            cubes,
            units,
            words(&sums),
            elements(gradient.view()),
            shape(),
        );
    }
}

/// One unit, one segment of one head.
#[cube(launch_unchecked)]
fn sum_segments(
    sink_logits: &[f32],
    lse: &[f32],
    delta: &[f32],
    rows: &[u32],
    list_counts: &[u32],
    sums: &mut [f32],
    shape: Shape,
    neg_inf: f32,
    nan: f32,
    #[comptime] routed: bool,
) {
    if ABSOLUTE_POS >= (shape.heads * shape.segments) as usize {
        terminate!();
    }
    let head = ABSOLUTE_POS as u32 / shape.segments;
    let segment = ABSOLUTE_POS as u32 % shape.segments;
    let group = shape.heads / shape.kv_heads;
    let packed = shape.query_len * group;
    let sink = sink_logits[head as usize];
    let mut sum = 0.0f32;
    for batch in 0..shape.batch {
        let list = shape.reach * shape.batch * shape.kv_heads + batch * shape.kv_heads + head / group;
        let mut count = packed;
        if comptime![routed] {
            count = list_counts[list as usize];
        }
        let first = min(segment * comptime![SEGMENT as u32], count);
        let end = min(first + comptime![SEGMENT as u32], count);
        for entry in first..end {
            let mut marked = entry;
            if comptime![routed] {
                marked = rows[(list * packed + entry) as usize];
            }
            let row = marked % INVALID_ROW;
            if row % group == head % group {
                let at = ((batch * shape.heads + head) * shape.query_len + row / group) as usize;
                let of_row = select(marked >= INVALID_ROW, nan, lse[at]);
                // A row without keys has no gradient.
                sum += select(of_row == neg_inf, 0.0f32, (sink - of_row).exp() * delta[at]);
            }
        }
    }
    sums[ABSOLUTE_POS] = sum;
}

/// One unit per head.
#[cube(launch_unchecked)]
fn subtract_sums(sums: &[f32], gradient: &mut [f32], shape: Shape) {
    if ABSOLUTE_POS >= shape.heads as usize {
        terminate!();
    }
    let mut sum = 0.0f32;
    for segment in 0..shape.segments as usize {
        sum += sums[ABSOLUTE_POS * shape.segments as usize + segment];
    }
    gradient[ABSOLUTE_POS] -= sum;
}
