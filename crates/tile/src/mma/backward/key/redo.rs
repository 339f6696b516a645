//! Gradients of single keys and values, again.

// In a kernel `%` is one instruction and `is_multiple_of` is not there.
#![allow(clippy::manual_is_multiple_of)]

use cubecl::prelude::*;

use crate::{
    arguments::BackwardTensors,
    mma::backward::parts::{add_one, exponent_of, key_start, pair_of, row_of_id},
    rows::{Entries, List, bounds_of_row, row_of, sees},
    tensor_core::{Blueprint, Numbers},
};

/// Computes the gradient of a key, or of a value, again, row by row, by all threads of a warp.
#[cube]
pub(crate) fn redo_key<E: Float>(
    of_keys: bool,
    list_index: u32,
    j: u32,
    entries: &Entries,
    list: &List,
    tensors: &BackwardTensors<E, E>,
    rows: &[u32],
    sequences: &[u32],
    key_gradient: &mut [f32],
    value_gradient: &mut [f32],
    numbers: &Numbers,
    scale: f32,
    unset: u32,
    #[comptime] blueprint: Blueprint,
) {
    let sight = comptime![blueprint.sight()];
    let parts = comptime![blueprint.shape.dim / 32];
    let lane = UNIT_POS % 32u32;
    let key_at = key_start(list_index, j, &tensors.layout.key, numbers);
    let value_at = key_start(list_index, j, &tensors.layout.value, numbers);
    let mut sums = Array::<f32>::new(parts);
    #[unroll]
    for part in 0..parts {
        sums[part] = 0.0f32;
    }
    for entry in entries.begin..entries.end {
        let id = row_of(list, entry, rows, sight);
        let bounds = bounds_of_row(list, id, sequences, sight);
        let row = row_of_id::<E>(
            id,
            list_index / numbers.kv_heads,
            list_index % numbers.kv_heads,
            tensors,
            numbers,
        );
        let of_row = tensors.lse[row.index as usize];
        let seen = sees(&bounds, j as i32, numbers.window, numbers.sinks, sight);
        if seen && of_row != numbers.neg_inf {
            let exponent = exponent_of(of_row, row.invalid, numbers);
            let pair = pair_of::<E>(tensors, &row, key_at, value_at, exponent, numbers, blueprint);
            #[unroll]
            for part in 0..parts {
                let at = lane + comptime![part as u32 * 32];
                if of_keys {
                    let q = tensors.query[(row.query + at) as usize];
                    sums[part] = fma(pair.slope, f32::cast_from(q), sums[part]);
                } else {
                    let o = tensors.d_out[(row.d_out + at) as usize];
                    sums[part] = fma(pair.weight, f32::cast_from(o), sums[part]);
                }
            }
        }
    }
    let key_len = numbers.first_position as u32 + numbers.query_len;
    let target = (list_index * key_len + j) * comptime![blueprint.shape.dim as u32] + lane;
    #[unroll]
    for part in 0..parts {
        let at = (target + comptime![part as u32 * 32]) as usize;
        if of_keys {
            add_one(key_gradient, at, sums[part] * scale, unset);
        } else {
            add_one(value_gradient, at, sums[part], unset);
        }
    }
}
