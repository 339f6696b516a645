//! The router of a decode step: so few tokens that latency is all there is. One launch: the planes of a cube share the
//! dims of a sequence's tokens, and what they sum up becomes scores, routes and counts at once.

// In a kernel `%` is one instruction; comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_core::{DeviceProfile, device::INVALID_ROUTE};
use cubecl::prelude::*;

use crate::{
    linear::{Choice, decide},
    project::{Blueprint, Projection, TOKENS, offsets_of, products, sum_held, sum_over_plane, writes},
};

const PLANE: u32 = DeviceProfile::PLANE;
/// Planes of a cube.
const PLANES: u32 = 8;

/// Whether a step's router takes this: all tokens of a sequence in one word of routes, all logits of a router head in one cube.
pub(crate) fn takes(
    profile: &DeviceProfile,
    batch: usize,
    tokens: usize,
    blueprint: Blueprint,
    choice: Choice,
) -> bool {
    let whole = blueprint.columns.is_multiple_of(choice.logits());
    profile.has_planes() && tokens <= TOKENS && batch <= 65_535 && whole
}

/// Cubes and units.
pub(crate) fn grid(batch: usize, columns: usize, blueprint: Blueprint) -> (CubeCount, CubeDim) {
    let blocks = columns.div_ceil(blueprint.columns);
    (CubeCount::Static(blocks as u32, batch as u32, 1), CubeDim::new_1d(PLANE * PLANES))
}

#[cube(launch_unchecked)]
pub(crate) fn step_kernel<E: Float, W: Float, NW: Size>(
    hidden: &[E],
    weight: &[Vector<W, NW>],
    bias: &[f32],
    scores: &mut [f32],
    routes: &mut [u32],
    counts: &mut [u32],
    shape: Projection,
    temperature: f32,
    cut: f32,
    #[comptime] blueprint: Blueprint,
    #[comptime] choice: Choice,
    #[comptime] has_bias: bool,
    #[define(E, W)] _elements: [ElemType; 2],
    #[define(NW)] _width: usize,
) {
    let sums_of_plane = comptime![TOKENS * blueprint.columns];
    let count = comptime![choice.logits()];
    let reaches = comptime![choice.logits().max(2) as u32];
    let column = CUBE_POS_X * comptime![blueprint.columns as u32];
    let batch = CUBE_POS_Y;
    let offsets = offsets_of(batch, 0u32, &shape);
    let step = comptime![PLANE * PLANES];
    let mut sums = products::<E, W, NW>(hidden, weight, &offsets, column, UNIT_POS, step, &shape, blueprint);
    sum_over_plane(&mut sums, blueprint);
    let mut parts = Shared::<[f32]>::new_slice(comptime![PLANES as usize * sums_of_plane]);
    let plane = UNIT_POS / PLANE;
    #[unroll]
    for i in 0..comptime![sums_of_plane.div_ceil(32)] {
        if writes(blueprint) {
            let at = plane * comptime![sums_of_plane as u32] + sum_held(i, blueprint);
            parts[at as usize] = sums[i];
        }
    }
    sync_cube();

    // One unit: the tokens (the lanes) of one router head.
    let first = UNIT_POS * comptime![count as u32];
    if first >= comptime![blueprint.columns as u32] || column + first >= shape.columns {
        terminate!();
    }
    let head = (column + first) / comptime![count as u32];
    let row = batch * (shape.columns / comptime![count as u32]) + head;
    let mut logits = Array::<Vector<f32, Const<4>>>::new(count);
    #[unroll]
    for k in 0..count {
        let mut sum = Vector::<f32, Const<4>>::new(0.0f32);
        #[unroll]
        for lane in 0..TOKENS {
            let from = (first + comptime![k as u32]) * comptime![TOKENS as u32] + comptime![lane as u32];
            let mut of_token = 0.0f32;
            #[unroll]
            for plane in 0..comptime![PLANES as usize] {
                of_token += parts[(from + comptime![(plane * sums_of_plane) as u32]) as usize];
            }
            sum.insert(lane, of_token);
        }
        if comptime![has_bias] {
            sum += Vector::new(bias[(column + first + comptime![k as u32]) as usize]);
        }
        logits[k] = sum / Vector::new(temperature);
    }
    let route = decide(&mut logits, cut, choice);

    let mut word = 0u32;
    #[unroll]
    for lane in 0..TOKENS {
        let token = comptime![lane as u32];
        if token < shape.tokens {
            word |= route.extract(lane) << comptime![lane as u32 * 8];
            #[unroll]
            for k in 0..count {
                let at = (row * comptime![count as u32] + comptime![k as u32]) * shape.tokens + token;
                scores[at as usize] = logits[k].extract(lane);
            }
        } else {
            word |= comptime![(INVALID_ROUTE as u32) << (lane as u32 * 8)];
        }
    }
    routes[row as usize] = word;
    // One counter per reach, and one for the routes that name none: nobody else counts for this head.
    for reach in 0..reaches + 1u32 {
        let mut here = 0u32;
        #[unroll]
        for lane in 0..TOKENS {
            let counted = comptime![lane as u32] < shape.tokens;
            here += select(counted && min(route.extract(lane), reaches) == reach, 1u32, 0u32);
        }
        counts[(row * (reaches + 1u32) + reach) as usize] = here;
    }
}
