//! Feature maps, fused into what reads queries and keys: in memory these stay as long as a head, with four numbers per row
//! beside them that make a softmax of every feature by itself.

use bifocal_core::FeatureMap;
use cubecl::prelude::*;

use super::{
    geometry::Blueprint,
    numbers::{Strides, offset},
    rows::gather,
};

/// `softmax(x) = exp(x - top) above` and `softmax(-x) = exp(bottom - x) below`, of one row per lane.
#[derive(CubeType)]
pub(super) struct Norms<R: Size> {
    pub(super) top: Vector<f32, R>,
    pub(super) above: Vector<f32, R>,
    pub(super) bottom: Vector<f32, R>,
    pub(super) below: Vector<f32, R>,
}

/// The norms of these rows, where the feature map has any.
#[cube]
pub(super) fn norms_of<R: Size>(
    norms: &[f32],
    rows: &Array<usize>,
    #[comptime] map: FeatureMap,
    #[comptime] lanes: usize,
) -> Norms<R> {
    let mut top = Vector::<f32, R>::new(0.0f32);
    let mut above = Vector::<f32, R>::new(0.0f32);
    let mut bottom = Vector::<f32, R>::new(0.0f32);
    let mut below = Vector::<f32, R>::new(0.0f32);
    if comptime![map == FeatureMap::SoftmaxPair] {
        #[unroll]
        for lane in 0..lanes {
            let at = rows[lane] * 4;
            top.insert(lane, norms[at]);
            above.insert(lane, norms[at + 1]);
            bottom.insert(lane, norms[at + 2]);
            below.insert(lane, norms[at + 3]);
        }
    }
    Norms::<R> { top, above, bottom, below }
}

/// The features of one dim: of `x`, and where the map has two halves of `-x`.
#[cube]
pub(super) fn features<R: Size>(
    x: Vector<f32, R>,
    norms: &Norms<R>,
    #[comptime] map: FeatureMap,
) -> Array<Vector<f32, R>> {
    let mut found = Array::<Vector<f32, R>>::new(comptime![map.halves()]);
    match map {
        FeatureMap::SoftmaxPair => {
            found[0] = (x - norms.top).exp() * norms.above;
            found[1] = (norms.bottom - x).exp() * norms.below;
        }
        FeatureMap::ReluPair => {
            // A NaN is on neither side, and stays one.
            let zero = Vector::<f32, R>::new(0.0f32);
            found[0] = select_many(x.less_than(&zero), zero, x);
            found[1] = select_many(x.greater_than(&zero), zero, zero - x);
        }
        FeatureMap::Identity => {
            found[0] = x;
        }
    }
    found
}

/// The features of a tile's rows.
#[derive(CubeType)]
pub(super) struct Features<R: Size> {
    /// Where each row begins.
    offsets: Array<usize>,
    norms: Norms<R>,
    /// Half by half, dim by dim; where tiles are staged.
    staged: Array<Vector<f32, R>>,
}

#[cube]
pub(super) fn features_of<E: Float, R: Size>(
    x: &[E],
    offsets: Array<usize>,
    norms: Norms<R>,
    head_dim: u32,
    #[comptime] blueprint: Blueprint,
) -> Features<R> {
    let halves = comptime![blueprint.map.halves()];
    let mut tile =
        Features::<R> { offsets, norms, staged: Array::new(comptime![halves * blueprint.head_room]) };
    if comptime![blueprint.staged] {
        for d in 0..head_dim as usize {
            let found = features::<R>(
                gather::<E, R>(&tile.offsets, x, d, blueprint.lanes),
                &tile.norms,
                blueprint.map,
            );
            #[unroll]
            for half in 0..halves {
                tile.staged[d + comptime![half * blueprint.head_room]] = found[half];
            }
        }
    }
    tile
}

/// The features of dim `d`.
#[cube]
pub(super) fn features_at<E: Float, R: Size>(
    tile: &Features<R>,
    x: &[E],
    d: usize,
    #[comptime] blueprint: Blueprint,
) -> Array<Vector<f32, R>> {
    let halves = comptime![blueprint.map.halves()];
    let mut found = Array::<Vector<f32, R>>::new(halves);
    if comptime![blueprint.staged] {
        #[unroll]
        for half in 0..halves {
            found[half] = tile.staged[d + comptime![half * blueprint.head_room]];
        }
    } else {
        let computed =
            features::<R>(gather::<E, R>(&tile.offsets, x, d, blueprint.lanes), &tile.norms, blueprint.map);
        #[unroll]
        for half in 0..halves {
            found[half] = computed[half];
        }
    }
    found
}

/// The norms of every row of a `[batch, heads, tokens, dim]` tensor: one unit per `lanes` rows.
#[cube(launch_unchecked)]
pub(super) fn norms_kernel<E: Float, R: Size>(
    x: &[E],
    norms: &mut [f32],
    strides: Strides,
    rows: u32,
    heads: u32,
    tokens: u32,
    head_dim: u32,
    #[comptime] lanes: usize,
    #[define(E)] _element: ElemType,
    #[define(R)] _wide: usize,
) {
    let first = ABSOLUTE_POS as u32 * comptime![lanes as u32];
    if first >= rows {
        terminate!();
    }
    let mut offsets = Array::<usize>::new(lanes);
    #[unroll]
    for lane in 0..lanes {
        let row = min(first + comptime![lane as u32], rows - 1);
        offsets[lane] = offset(&strides, row / tokens / heads, row / tokens % heads, row % tokens);
    }
    let mut top = gather::<E, R>(&offsets, x, 0usize, lanes);
    let mut bottom = top;
    for d in 0..head_dim as usize {
        let across = gather::<E, R>(&offsets, x, d, lanes);
        top = max(top, across);
        bottom = min(bottom, across);
    }
    let mut above = Vector::<f32, R>::new(0.0f32);
    let mut below = Vector::<f32, R>::new(0.0f32);
    for d in 0..head_dim as usize {
        let across = gather::<E, R>(&offsets, x, d, lanes);
        above += (across - top).exp();
        below += (bottom - across).exp();
    }
    let one = Vector::<f32, R>::new(1.0f32);
    above = one / above;
    below = one / below;
    #[unroll]
    for lane in 0..lanes {
        let row = first + comptime![lane as u32];
        if row < rows {
            let at = row as usize * 4;
            norms[at] = top.extract(lane);
            norms[at + 1] = above.extract(lane);
            norms[at + 2] = bottom.extract(lane);
            norms[at + 3] = below.extract(lane);
        }
    }
}
