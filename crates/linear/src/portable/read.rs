//! What rows read: `y_i = phi(x_i) M + sum_j w_ij (phi(x_i) . phi(x_j)) y_j`, over a matrix of their chunk and the rows of the
//! other kind that they meet within it. For queries that is the output, from the state before the chunk and its keys; for
//! keys the gradient of their values, from the gradient of the state after the chunk and its queries.

// Comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use cubecl::prelude::*;

use super::{
    features::{Features, features, features_at, features_of, norms_of},
    geometry::Blueprint,
    numbers::{Lists, Numbers, Side, Strides},
    rows::{
        Meetings, Tile, carry_of, decays_at, entries_of, gather, meetings_of, offsets_of, slot_of, tile_of,
    },
};

/// `phi(x_i) M`, decayed: `states` holds M from `base` on.
#[cube]
fn read_state<E: Float, R: Size>(
    sums: &mut Array<Vector<f32, R>>,
    mine: &Features<R>,
    x: &[E],
    states: &[f32],
    base: usize,
    carry: Vector<f32, R>,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let halves = comptime![blueprint.map.halves()];
    let block = comptime![blueprint.head_block];
    let count = comptime![halves * block];
    let head_dim = numbers.head_dim as usize;
    let value_dim = numbers.value_dim as usize;
    for step in 0..head_dim / block {
        let mut weights = Array::<Vector<f32, R>>::new(count);
        let mut at = Array::<usize>::new(count);
        #[unroll]
        for i in 0..block {
            let d = step * block + i;
            let found = features_at::<E, R>(mine, x, d, blueprint);
            #[unroll]
            for half in 0..halves {
                weights[comptime![half * block + i]] = found[half] * carry;
                at[comptime![half * block + i]] = base + (head_dim * half + d) * value_dim;
            }
        }
        for dv in 0..value_dim {
            let mut acc = sums[dv];
            #[unroll]
            for i in 0..count {
                acc = fma(weights[i], Vector::new(states[at[i] + dv]), acc);
            }
            sums[dv] = acc;
        }
    }
}

/// `w_ij (phi(x_i) . phi(x_j))` of a tile and a block.
#[cube]
fn meet<E: Float, R: Size>(
    mine: &Features<R>,
    x: &[E],
    block: &Tile<R>,
    other_x: &[E],
    other_norms: &[f32],
    other_strides: &Strides,
    list: u32,
    decays: &[f32],
    decay: Vector<f32, R>,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Array<Vector<f32, R>> {
    let lanes = comptime![blueprint.lanes];
    let offsets = offsets_of::<R>(block, other_strides, lanes);
    let norms = norms_of::<R>(other_norms, &block.rows, blueprint.map, lanes);
    let mut weights = Array::<Vector<f32, R>>::new(lanes);
    #[unroll]
    for other in 0..lanes {
        weights[other] = Vector::new(0.0f32);
    }
    for d in 0..numbers.head_dim as usize {
        let found = features_at::<E, R>(mine, x, d, blueprint);
        let theirs = features::<R>(gather::<E, R>(&offsets, other_x, d, lanes), &norms, blueprint.map);
        #[unroll]
        for half in 0..comptime![blueprint.map.halves()] {
            let across = theirs[half];
            #[unroll]
            for other in 0..lanes {
                weights[other] = fma(found[half], Vector::new(across.extract(other)), weights[other]);
            }
        }
    }
    weigh::<R>(&mut weights, block, list, decays, decay, numbers, blueprint);
    weights
}

/// Lets the pairs of a tile and a block decay, from the key of each to the index of its query.
#[cube]
pub(super) fn weigh<R: Size>(
    weights: &mut Array<Vector<f32, R>>,
    block: &Tile<R>,
    list: u32,
    decays: &[f32],
    decay: Vector<f32, R>,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    if comptime![blueprint.decays] {
        let theirs = decays_at::<R>(block, list, decays, numbers, blueprint);
        #[unroll]
        for other in 0..blueprint.lanes {
            let there = Vector::<f32, R>::new(theirs.extract(other));
            let between = if comptime![blueprint.of_keys] { there - decay } else { decay - there };
            weights[other] *= between.exp();
        }
    }
}

/// Adds the weighted `y_j` of a block, where `masked` each to those lanes alone that meet it: what a lane does not meet
/// cannot touch it, NaN or not.
#[cube]
fn add_block<Y: Float, R: Size>(
    sums: &mut Array<Vector<f32, R>>,
    weights: &Array<Vector<f32, R>>,
    other_y: &[Y],
    offsets: &Array<usize>,
    meetings: &Meetings<R>,
    value_dim: u32,
    #[comptime] masked: bool,
    #[comptime] blueprint: Blueprint,
) {
    let one = Vector::<i32, R>::new(1i32);
    for dv in 0..value_dim as usize {
        let mut acc = sums[dv];
        #[unroll]
        for other in 0..blueprint.lanes {
            let y = Vector::<f32, R>::new(f32::cast_from(other_y[offsets[other] + dv]));
            let more = fma(weights[other], y, acc);
            if comptime![masked] {
                let seen = meetings.seen[other];
                acc = select_many(seen.equal(&one), more, acc);
            } else {
                acc = more;
            }
        }
        sums[dv] = acc;
    }
}

/// One unit, one tile. Outputs are written, gradients of values added.
#[cube(launch_unchecked)]
pub(super) fn read_kernel<E: Float, Y: Float, O: Float, R: Size>(
    x: &[E],
    other_x: &[E],
    other_y: &[Y],
    norms: &[f32],
    other_norms: &[f32],
    decays: &[f32],
    states: &[f32],
    out: &mut [O],
    x_strides: Strides,
    other_x_strides: Strides,
    other_y_strides: Strides,
    out_strides: Strides,
    side: Side,
    others: Side,
    lists: &Lists,
    numbers: Numbers,
    #[comptime] blueprint: Blueprint,
    #[define(E, Y, O)] _elements: [ElemType; 3],
    #[define(R)] _lanes: usize,
) {
    let lanes = comptime![blueprint.lanes];
    let own = comptime![blueprint.lists_own()];
    let slot = slot_of(&side, lists, &numbers, lanes, own);
    if slot.count == 0u32 {
        terminate!();
    }
    let tile = tile_of::<R>(slot.list, slot.first, slot.count, &side, lists, &numbers, lanes, own);
    let mine = features_of::<E, R>(
        x,
        offsets_of::<R>(&tile, &x_strides, lanes),
        norms_of::<R>(norms, &tile.rows, blueprint.map, lanes),
        numbers.head_dim,
        blueprint,
    );
    let chunk = max(slot.chunk, 0i32) as u32;
    let decay = decays_at::<R>(&tile, slot.list, decays, &numbers, blueprint);
    let carry = carry_of::<R>(decay, slot.list, chunk, decays, &numbers, blueprint);
    let mut sums = Array::<Vector<f32, R>>::new(blueprint.value_dim);
    for dv in 0..numbers.value_dim as usize {
        sums[dv] = Vector::new(0.0f32);
    }
    let size = numbers.head_dim * comptime![blueprint.map.halves() as u32] * numbers.value_dim;
    let base = ((slot.list * numbers.chunks + chunk) * size) as usize;
    read_state::<E, R>(&mut sums, &mine, x, states, base, carry, &numbers, blueprint);

    let entries = entries_of::<R>(&tile, slot.list, slot.chunk, &others, lists, &numbers, blueprint);
    let listed = comptime![blueprint.lists_others()];
    let mut at = entries.begin;
    while at < entries.end {
        let count = min(entries.end - at, comptime![lanes as u32]);
        let block = tile_of::<R>(slot.list, at, count, &others, lists, &numbers, lanes, listed);
        let weights = meet::<E, R>(
            &mine,
            x,
            &block,
            other_x,
            other_norms,
            &other_x_strides,
            slot.list,
            decays,
            decay,
            &numbers,
            blueprint,
        );
        let offsets = offsets_of::<R>(&block, &other_y_strides, lanes);
        let meetings = meetings_of::<R>(&tile, &block, count, blueprint);
        let value_dim = numbers.value_dim;
        if comptime![blueprint.staged] {
            if meetings.all {
                add_block::<Y, R>(
                    &mut sums, &weights, other_y, &offsets, &meetings, value_dim, false, blueprint,
                );
            } else {
                add_block::<Y, R>(
                    &mut sums, &weights, other_y, &offsets, &meetings, value_dim, true, blueprint,
                );
            }
        } else {
            add_block::<Y, R>(&mut sums, &weights, other_y, &offsets, &meetings, value_dim, true, blueprint);
        }
        at += comptime![lanes as u32];
    }

    let offsets = offsets_of::<R>(&tile, &out_strides, lanes);
    for dv in 0..numbers.value_dim as usize {
        let across = sums[dv];
        #[unroll]
        for lane in 0..lanes {
            if comptime![lane as u32] < slot.count {
                let to = offsets[lane] + dv;
                let mut value = across.extract(lane);
                if comptime![blueprint.of_keys] {
                    value += f32::cast_from(out[to]);
                }
                if comptime![own] {
                    value = select(tile.invalid.extract(lane) == 1i32, numbers.nan, value);
                }
                out[to] = O::cast_from(value);
            }
        }
    }
}
