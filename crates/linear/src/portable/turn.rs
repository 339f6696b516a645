//! Gradients of queries and keys: `dx_i = J_i^T [ M y_i + sum_j w_ij (y_i . y_j) phi(x_j) ]`, J the slopes of the feature map,
//! over a matrix of their chunk and the rows of the other kind that they meet within it. For queries y is the gradient of
//! their outputs and M the state before the chunk; for keys y is the value and M the gradient of the state after it.
//!
//! The slopes of a softmax, `y (dy - <y, dy>)`, need a mean over all of its features. It is linear in `dy`, so terms are
//! added as they come, and the mean is taken off in the end.

// Comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_core::FeatureMap;
use cubecl::prelude::*;

use super::{
    features::{Features, features, features_at, features_of, norms_of},
    geometry::Blueprint,
    numbers::{Lists, Numbers, Side, Strides},
    read::weigh,
    rows::{
        Meetings, Tile, carry_of, decays_at, entries_of, gather, meetings_of, offsets_of, slot_of, tile_of,
    },
};

/// The sums that become the gradients of a tile.
#[derive(CubeType)]
struct Slopes<R: Size> {
    /// Where each lane's gradient begins.
    offsets: Array<usize>,
    /// How many lanes have one.
    count: u32,
    /// The gradients so far; where tiles are staged.
    staged: Array<Vector<f32, R>>,
    /// `<phi, dphi>` of each half.
    means: Array<Vector<f32, R>>,
}

/// Adds to dim `d` of the gradients.
#[cube]
fn add<R: Size>(
    slopes: &mut Slopes<R>,
    gradient: &mut [f32],
    d: usize,
    term: Vector<f32, R>,
    #[comptime] blueprint: Blueprint,
) {
    if comptime![blueprint.staged] {
        slopes.staged[d] += term;
    } else {
        add_lanes::<R>(&slopes.offsets, slopes.count, gradient, d, term, blueprint);
    }
}

#[cube]
fn add_lanes<R: Size>(
    offsets: &Array<usize>,
    count: u32,
    gradient: &mut [f32],
    d: usize,
    term: Vector<f32, R>,
    #[comptime] blueprint: Blueprint,
) {
    #[unroll]
    for lane in 0..blueprint.lanes {
        if comptime![lane as u32] < count {
            gradient[offsets[lane] + d] += term.extract(lane);
        }
    }
}

/// Takes the gradients of the features of dim `d`, one per half, back to the dim.
#[cube]
fn fold<E: Float, R: Size>(
    slopes: &mut Slopes<R>,
    gradient: &mut [f32],
    mine: &Features<R>,
    x: &[E],
    d: usize,
    d_features: &Array<Vector<f32, R>>,
    #[comptime] blueprint: Blueprint,
) {
    let found = features_at::<E, R>(mine, x, d, blueprint);
    let zero = Vector::<f32, R>::new(0.0f32);
    match blueprint.map {
        FeatureMap::SoftmaxPair => {
            let plus = found[0] * d_features[0];
            let minus = found[1] * d_features[1];
            slopes.means[0] += plus;
            slopes.means[1] += minus;
            add::<R>(slopes, gradient, d, plus - minus, blueprint);
        }
        FeatureMap::ReluPair => {
            let plus = select_many(found[0].greater_than(&zero), d_features[0], zero);
            let minus = select_many(found[1].greater_than(&zero), d_features[1], zero);
            add::<R>(slopes, gradient, d, plus - minus, blueprint);
        }
        FeatureMap::Identity => {
            add::<R>(slopes, gradient, d, d_features[0], blueprint);
        }
    }
}

/// The `y` of a tile: its rows begin at `offsets`.
#[derive(CubeType)]
struct Values<R: Size> {
    offsets: Array<usize>,
    /// Dim by dim; where tiles are staged.
    staged: Array<Vector<f32, R>>,
}

#[cube]
fn value_at<Y: Float, R: Size>(
    values: &Values<R>,
    y: &[Y],
    dv: usize,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, R> {
    if comptime![blueprint.staged] {
        values.staged[dv]
    } else {
        gather::<Y, R>(&values.offsets, y, dv, blueprint.lanes)
    }
}

/// `M y_i`, decayed: `states` holds M from `base` on.
#[cube]
fn turn_state<E: Float, Y: Float, R: Size>(
    slopes: &mut Slopes<R>,
    gradient: &mut [f32],
    mine: &Features<R>,
    x: &[E],
    values: &Values<R>,
    y: &[Y],
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
        let mut sums = Array::<Vector<f32, R>>::new(count);
        let mut at = Array::<usize>::new(count);
        #[unroll]
        for half in 0..halves {
            #[unroll]
            for i in 0..block {
                let feature = head_dim * half + step * block + i;
                sums[comptime![half * block + i]] = Vector::new(0.0f32);
                at[comptime![half * block + i]] = base + feature * value_dim;
            }
        }
        for dv in 0..value_dim {
            let across = value_at::<Y, R>(values, y, dv, blueprint);
            #[unroll]
            for i in 0..count {
                sums[i] = fma(across, Vector::new(states[at[i] + dv]), sums[i]);
            }
        }
        #[unroll]
        for i in 0..block {
            let mut d_features = Array::<Vector<f32, R>>::new(halves);
            #[unroll]
            for half in 0..halves {
                d_features[half] = sums[comptime![half * block + i]] * carry;
            }
            fold::<E, R>(slopes, gradient, mine, x, step * block + i, &d_features, blueprint);
        }
    }
}

/// `w_ij (y_i . y_j) phi(x_j)` of a block, where `masked` each for those lanes alone that meet it: what a lane does not meet
/// cannot touch it, NaN or not.
#[cube]
fn turn_block<E: Float, R: Size>(
    slopes: &mut Slopes<R>,
    gradient: &mut [f32],
    mine: &Features<R>,
    x: &[E],
    weights: &Array<Vector<f32, R>>,
    block: &Tile<R>,
    other_x: &[E],
    other_norms: &[f32],
    other_strides: &Strides,
    meetings: &Meetings<R>,
    head_dim: u32,
    #[comptime] masked: bool,
    #[comptime] blueprint: Blueprint,
) {
    let lanes = comptime![blueprint.lanes];
    let halves = comptime![blueprint.map.halves()];
    let offsets = offsets_of::<R>(block, other_strides, lanes);
    let norms = norms_of::<R>(other_norms, &block.rows, blueprint.map, lanes);
    let one = Vector::<i32, R>::new(1i32);
    for d in 0..head_dim as usize {
        let theirs = features::<R>(gather::<E, R>(&offsets, other_x, d, lanes), &norms, blueprint.map);
        let mut d_features = Array::<Vector<f32, R>>::new(halves);
        #[unroll]
        for half in 0..halves {
            let across = theirs[half];
            let mut acc = Vector::<f32, R>::new(0.0f32);
            #[unroll]
            for other in 0..lanes {
                let more = fma(weights[other], Vector::new(across.extract(other)), acc);
                if comptime![masked] {
                    let seen = meetings.seen[other];
                    acc = select_many(seen.equal(&one), more, acc);
                } else {
                    acc = more;
                }
            }
            d_features[half] = acc;
        }
        fold::<E, R>(slopes, gradient, mine, x, d, &d_features, blueprint);
    }
}

/// One unit, one tile. Gradients, contiguous, are added.
#[cube(launch_unchecked)]
pub(super) fn turn_kernel<E: Float, Y: Float, Z: Float, R: Size>(
    x: &[E],
    y: &[Y],
    other_x: &[E],
    other_y: &[Z],
    norms: &[f32],
    other_norms: &[f32],
    decays: &[f32],
    states: &[f32],
    gradient: &mut [f32],
    x_strides: Strides,
    y_strides: Strides,
    other_x_strides: Strides,
    other_y_strides: Strides,
    side: Side,
    others: Side,
    lists: &Lists,
    numbers: Numbers,
    #[comptime] blueprint: Blueprint,
    #[define(E, Y, Z)] _elements: [ElemType; 3],
    #[define(R)] _lanes: usize,
) {
    let lanes = comptime![blueprint.lanes];
    let halves = comptime![blueprint.map.halves()];
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
    let offsets = offsets_of::<R>(&tile, &y_strides, lanes);
    let mut values = Values::<R> { offsets, staged: Array::new(blueprint.value_room) };
    let mut gradient_offsets = Array::<usize>::new(lanes);
    #[unroll]
    for lane in 0..lanes {
        gradient_offsets[lane] = tile.rows[lane] * numbers.head_dim as usize;
    }
    let mut slopes = Slopes::<R> {
        offsets: gradient_offsets,
        count: slot.count,
        staged: Array::new(blueprint.head_room),
        means: Array::new(halves),
    };
    #[unroll]
    for half in 0..halves {
        slopes.means[half] = Vector::new(0.0f32);
    }
    if comptime![blueprint.staged] {
        for dv in 0..numbers.value_dim as usize {
            values.staged[dv] = gather::<Y, R>(&values.offsets, y, dv, lanes);
        }
        for d in 0..numbers.head_dim as usize {
            slopes.staged[d] = Vector::new(0.0f32);
        }
    }
    let chunk = max(slot.chunk, 0i32) as u32;
    let decay = decays_at::<R>(&tile, slot.list, decays, &numbers, blueprint);
    let carry = carry_of::<R>(decay, slot.list, chunk, decays, &numbers, blueprint);
    let size = numbers.head_dim * comptime![halves as u32] * numbers.value_dim;
    let base = ((slot.list * numbers.chunks + chunk) * size) as usize;
    turn_state::<E, Y, R>(
        &mut slopes,
        gradient,
        &mine,
        x,
        &values,
        y,
        states,
        base,
        carry,
        &numbers,
        blueprint,
    );

    let entries = entries_of::<R>(&tile, slot.list, slot.chunk, &others, lists, &numbers, blueprint);
    let listed = comptime![blueprint.lists_others()];
    let mut at = entries.begin;
    while at < entries.end {
        let count = min(entries.end - at, comptime![lanes as u32]);
        let block = tile_of::<R>(slot.list, at, count, &others, lists, &numbers, lanes, listed);
        let offsets = offsets_of::<R>(&block, &other_y_strides, lanes);
        let mut weights = Array::<Vector<f32, R>>::new(lanes);
        #[unroll]
        for other in 0..lanes {
            weights[other] = Vector::new(0.0f32);
        }
        for dv in 0..numbers.value_dim as usize {
            let across = value_at::<Y, R>(&values, y, dv, blueprint);
            #[unroll]
            for other in 0..lanes {
                let theirs = f32::cast_from(other_y[offsets[other] + dv]);
                weights[other] = fma(across, Vector::new(theirs), weights[other]);
            }
        }
        weigh::<R>(&mut weights, &block, slot.list, decays, decay, &numbers, blueprint);
        let meetings = meetings_of::<R>(&tile, &block, count, blueprint);
        if comptime![blueprint.staged] {
            if meetings.all {
                turn_block::<E, R>(
                    &mut slopes,
                    gradient,
                    &mine,
                    x,
                    &weights,
                    &block,
                    other_x,
                    other_norms,
                    &other_x_strides,
                    &meetings,
                    numbers.head_dim,
                    false,
                    blueprint,
                );
            } else {
                turn_block::<E, R>(
                    &mut slopes,
                    gradient,
                    &mine,
                    x,
                    &weights,
                    &block,
                    other_x,
                    other_norms,
                    &other_x_strides,
                    &meetings,
                    numbers.head_dim,
                    true,
                    blueprint,
                );
            }
        } else {
            turn_block::<E, R>(
                &mut slopes,
                gradient,
                &mine,
                x,
                &weights,
                &block,
                other_x,
                other_norms,
                &other_x_strides,
                &meetings,
                numbers.head_dim,
                true,
                blueprint,
            );
        }
        at += comptime![lanes as u32];
    }

    if comptime![blueprint.map == FeatureMap::SoftmaxPair] {
        for d in 0..numbers.head_dim as usize {
            let found = features_at::<E, R>(&mine, x, d, blueprint);
            let means = found[1] * slopes.means[1] - found[0] * slopes.means[0];
            add::<R>(&mut slopes, gradient, d, means, blueprint);
        }
    }
    if comptime![blueprint.staged] {
        for d in 0..numbers.head_dim as usize {
            let term = slopes.staged[d];
            add_lanes::<R>(&slopes.offsets, slopes.count, gradient, d, term, blueprint);
        }
    }
}
