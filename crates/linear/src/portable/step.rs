//! A step of decoding: the key that has just left the window joins the state, and each query meets it.

// Comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_core::FeatureMap;
use cubecl::prelude::*;

use super::{
    features::{features, norms_of},
    numbers::{Strides, offset},
    rows::gather,
};

/// The compile-time key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Blueprint {
    pub(super) map: FeatureMap,
    /// Whether a key has left.
    pub(super) leaves: bool,
    pub(super) decays: bool,
    /// Numbers of the state that one load takes.
    pub(super) width: usize,
    /// Query heads that a pass over the state serves.
    pub(super) heads: usize,
}

/// The run-time numbers.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Sizes {
    pub(super) lists: u32,
    pub(super) kv_heads: u32,
    pub(super) group: u32,
    pub(super) head_dim: u32,
    pub(super) value_dim: u32,
}

/// One unit, a few value dims of a kv head: every number of the state is read and written by one unit alone. The first
/// heads' pass brings it up to date.
#[cube(launch_unchecked)]
pub(super) fn step_kernel<E: Float, O: Float, N: Size, H: Size>(
    query: &[E],
    key: &[E],
    value: &[E],
    log_decay: &[f32],
    query_norms: &[f32],
    key_norms: &[f32],
    state: &mut [Vector<f32, N>],
    out: &mut [O],
    query_strides: Strides,
    key_strides: Strides,
    value_strides: Strides,
    decay_strides: Strides,
    out_strides: Strides,
    sizes: Sizes,
    #[comptime] blueprint: Blueprint,
    #[define(E, O)] _elements: [ElemType; 2],
    #[define(N, H)] _widths: [usize; 2],
) {
    let width = comptime![blueprint.width];
    let heads = comptime![blueprint.heads];
    let halves = comptime![blueprint.map.halves()];
    let columns = sizes.value_dim / comptime![width as u32];
    let list = ABSOLUTE_POS as u32 / columns;
    let column = ABSOLUTE_POS as u32 % columns;
    if list >= sizes.lists {
        terminate!();
    }
    let batch = list / sizes.kv_heads;
    let kv_head = list % sizes.kv_heads;
    let first = column as usize * width;

    let mut joining = Vector::<f32, N>::new(0.0f32);
    let mut decay = Vector::<f32, N>::new(1.0f32);
    let mut key_rows = Array::<usize>::new(width);
    let mut key_offsets = Array::<usize>::new(width);
    #[unroll]
    for lane in 0..width {
        key_rows[lane] = list as usize;
        key_offsets[lane] = offset(&key_strides, batch, kv_head, 0u32);
    }
    let key_norm = norms_of::<N>(key_norms, &key_rows, blueprint.map, width);
    if comptime![blueprint.leaves] {
        let from = offset(&value_strides, batch, kv_head, 0u32) + first;
        #[unroll]
        for lane in 0..width {
            joining.insert(lane, f32::cast_from(value[from + lane]));
        }
        if comptime![blueprint.decays] {
            decay = Vector::new(log_decay[offset(&decay_strides, batch, kv_head, 0u32)].exp());
        }
    }

    for pass in 0..sizes.group.div_ceil(comptime![heads as u32]) {
        let mut rows = Array::<usize>::new(heads);
        let mut offsets = Array::<usize>::new(heads);
        let mut acc = Array::<Vector<f32, N>>::new(heads);
        #[unroll]
        for lane in 0..heads {
            let head = min(pass * comptime![heads as u32] + comptime![lane as u32], sizes.group - 1);
            rows[lane] = (list * sizes.group + head) as usize;
            offsets[lane] = offset(&query_strides, batch, kv_head * sizes.group + head, 0u32);
            acc[lane] = Vector::new(0.0f32);
        }
        let norms = norms_of::<H>(query_norms, &rows, blueprint.map, heads);
        for d in 0..sizes.head_dim as usize {
            let queries = features::<H>(gather::<E, H>(&offsets, query, d, heads), &norms, blueprint.map);
            let keys = features::<N>(gather::<E, N>(&key_offsets, key, d, width), &key_norm, blueprint.map);
            #[unroll]
            for half in 0..halves {
                let feature = (list * comptime![halves as u32] + comptime![half as u32]) * sizes.head_dim;
                let at = (feature * columns + column) as usize + d * columns as usize;
                let mut across = state[at];
                if comptime![blueprint.leaves] {
                    if pass == 0u32 {
                        across = fma(keys[half], joining, across * decay);
                        state[at] = across;
                    }
                }
                let weights = queries[half];
                #[unroll]
                for lane in 0..heads {
                    acc[lane] = fma(Vector::new(weights.extract(lane)), across, acc[lane]);
                }
            }
        }
        #[unroll]
        for lane in 0..heads {
            let head = pass * comptime![heads as u32] + comptime![lane as u32];
            if head < sizes.group {
                let to = offset(&out_strides, batch, kv_head * sizes.group + head, 0u32) + first;
                let row = acc[lane];
                #[unroll]
                for i in 0..width {
                    out[to + i] = O::cast_from(row.extract(i));
                }
            }
        }
    }
}
