//! What both kernels are made of: a tile, one row or key per lane, meets blocks of the other kind.

// An `if` on compile-time values stays apart from one on run-time values.
#![allow(clippy::collapsible_if)]

use cubecl::prelude::*;

use super::Blueprint;
use crate::portable::{numbers::Numbers, tile::gather};

/// Vectors of one tensor, one per lane, or the sums that become their gradients.
#[derive(CubeType)]
pub(super) struct Tile<R: Size> {
    /// Where each lane's vector begins.
    offsets: Array<usize>,
    /// Transposed, dimension by dimension; where tiles are staged.
    staged: Array<Vector<f32, R>>,
}

/// The vectors that begin at `offsets`.
#[cube]
pub(super) fn tile_of<E: Float, R: Size>(
    tensor: &[E],
    offsets: Array<usize>,
    dims: u32,
    #[comptime] room: usize,
    #[comptime] blueprint: Blueprint,
) -> Tile<R> {
    let mut tile = Tile::<R> { offsets, staged: Array::new(room) };
    if comptime![blueprint.staged] {
        for d in 0..dims as usize {
            tile.staged[d] = gather::<E, R>(&tile.offsets, tensor, d, blueprint.lanes);
        }
    }
    tile
}

/// Sums for the gradients that begin at `offsets`.
#[cube]
pub(super) fn sums_at<R: Size>(
    offsets: Array<usize>,
    dims: u32,
    #[comptime] room: usize,
    #[comptime] blueprint: Blueprint,
) -> Tile<R> {
    let mut sums = Tile::<R> { offsets, staged: Array::new(room) };
    if comptime![blueprint.staged] {
        for d in 0..dims as usize {
            sums.staged[d] = Vector::new(0.0f32);
        }
    }
    sums
}

/// The products of every vector of the tile with those of a block, which begin at `offsets`.
#[cube]
pub(super) fn products<L: Float, E: Float, R: Size>(
    tile: &Tile<R>,
    of_tile: &[L],
    of_block: &[E],
    offsets: &Array<usize>,
    dims: u32,
    #[comptime] blueprint: Blueprint,
) -> Array<Vector<f32, R>> {
    let block = comptime![blueprint.block];
    let mut sums = Array::<Vector<f32, R>>::new(block);
    #[unroll]
    for x in 0..block {
        sums[x] = Vector::new(0.0f32);
    }
    for d in 0..dims as usize {
        let across = if comptime![blueprint.staged] {
            tile.staged[d]
        } else {
            gather::<L, R>(&tile.offsets, of_tile, d, blueprint.lanes)
        };
        #[unroll]
        for x in 0..block {
            let other = f32::cast_from(of_block[offsets[x] + d]);
            sums[x] = fma(across, Vector::new(other), sums[x]);
        }
    }
    sums
}

/// What a pair of a row and a key weighs, and the gradient of their product `q . k`.
#[derive(CubeType)]
pub(super) struct Pair<R: Size> {
    pub(super) weight: Vector<f32, R>,
    pub(super) slope: Vector<f32, R>,
}

/// A pair, from `q . k` and the product of value and output's gradient.
#[cube]
pub(super) fn weigh<R: Size>(
    product: Vector<f32, R>,
    value_product: Vector<f32, R>,
    lse: Vector<f32, R>,
    delta: Vector<f32, R>,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Pair<R> {
    let mut score = product * Vector::new(numbers.scale);
    let mut slope = Vector::<f32, R>::new(numbers.scale);
    if comptime![blueprint.softcap] {
        let cap = Vector::<f32, R>::new(numbers.softcap);
        let squashed = (score / cap).tanh();
        score = cap * squashed;
        slope *= Vector::new(1.0f32) - squashed * squashed;
    }
    let weight = (score - lse).exp();
    Pair::<R> { weight, slope: weight * (value_product - delta) * slope }
}

/// Adds a block's vectors, weighted, to the sums of a tile, unless all lanes see all of them each to those lanes alone
/// that see it: what a lane does not see cannot touch it, NaN or not.
#[cube]
pub(super) fn accumulate<E: Float, R: Size>(
    sums: &mut Tile<R>,
    gradient: &mut [f32],
    written: &Array<bool>,
    weights: &Array<Vector<f32, R>>,
    of_block: &[E],
    offsets: &Array<usize>,
    seen: &Array<Vector<i32, R>>,
    all_seen: bool,
    dims: u32,
    #[comptime] blueprint: Blueprint,
) {
    if comptime![blueprint.staged] {
        if all_seen {
            add_block::<E, R>(
                sums, gradient, written, weights, of_block, offsets, seen, dims, false, blueprint,
            );
        } else {
            add_block::<E, R>(
                sums, gradient, written, weights, of_block, offsets, seen, dims, true, blueprint,
            );
        }
    } else {
        add_block::<E, R>(sums, gradient, written, weights, of_block, offsets, seen, dims, true, blueprint);
    }
}

#[cube]
fn add_block<E: Float, R: Size>(
    sums: &mut Tile<R>,
    gradient: &mut [f32],
    written: &Array<bool>,
    weights: &Array<Vector<f32, R>>,
    of_block: &[E],
    offsets: &Array<usize>,
    seen: &Array<Vector<i32, R>>,
    dims: u32,
    #[comptime] masked: bool,
    #[comptime] blueprint: Blueprint,
) {
    let one = Vector::<i32, R>::new(1i32);
    for d in 0..dims as usize {
        let mut acc = Vector::<f32, R>::new(0.0f32);
        if comptime![blueprint.staged] {
            acc = sums.staged[d];
        }
        #[unroll]
        for x in 0..blueprint.block {
            let other = Vector::<f32, R>::new(f32::cast_from(of_block[offsets[x] + d]));
            let more = fma(weights[x], other, acc);
            if comptime![masked] {
                let mask = seen[x];
                acc = select_many(mask.equal(&one), more, acc);
            } else {
                acc = more;
            }
        }
        if comptime![blueprint.staged] {
            sums.staged[d] = acc;
        } else {
            add_lanes::<R>(acc, gradient, &sums.offsets, written, d, blueprint);
        }
    }
}

/// Stores zeros as the gradients of the lanes that have one.
#[cube]
pub(super) fn clear_lanes(
    gradient: &mut [f32],
    offsets: &Array<usize>,
    written: &Array<bool>,
    dims: u32,
    #[comptime] blueprint: Blueprint,
) {
    for d in 0..dims as usize {
        #[unroll]
        for lane in 0..blueprint.lanes {
            if written[lane] {
                gradient[offsets[lane] + d] = 0.0f32;
            }
        }
    }
}

/// Adds what was summed in private memory to the gradients.
#[cube]
pub(super) fn flush<R: Size>(
    sums: &Tile<R>,
    gradient: &mut [f32],
    written: &Array<bool>,
    dims: u32,
    #[comptime] blueprint: Blueprint,
) {
    if comptime![blueprint.staged] {
        for d in 0..dims as usize {
            add_lanes::<R>(sums.staged[d], gradient, &sums.offsets, written, d, blueprint);
        }
    }
}

/// Adds dimension `d` to the gradients of the lanes that have one.
#[cube]
fn add_lanes<R: Size>(
    acc: Vector<f32, R>,
    gradient: &mut [f32],
    offsets: &Array<usize>,
    written: &Array<bool>,
    d: usize,
    #[comptime] blueprint: Blueprint,
) {
    #[unroll]
    for lane in 0..blueprint.lanes {
        if written[lane] {
            gradient[offsets[lane] + d] += acc.extract(lane);
        }
    }
}

/// A mask as numbers: 1 where it holds. Arrays of bools are not the same on all runtimes.
#[cube]
pub(super) fn as_numbers<R: Size>(mask: Vector<bool, R>) -> Vector<i32, R> {
    select_many(mask, Vector::new(1i32), Vector::new(0i32))
}
