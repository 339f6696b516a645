//! Items in parts: where there are fewer items than cubes, several cubes share the keys of one, and the warpgroup that
//! comes last adds up what all have summed (the idea of Flash-Decoding, Dao et al. 2023, within one launch).
//!
//! What is parked is what a thread holds, in its own order: the same thread of another cube takes it up again.

use cubecl::prelude::*;

use super::WARPGROUP;
use crate::{
    tensor_core::{
        Blueprint, Numbers,
        ptx::{exp2_fast, load_quad, store_quad},
        softmax::Softmax,
    },
    wgmma::ptx,
};

/// Into how many parts an item is cut, at most.
pub(in crate::wgmma) const MOST: u32 = 8;

/// Numbers that a thread parks: its outputs, and the maxima and sums of its two rows.
pub(in crate::wgmma) const fn parked_numbers(blueprint: Blueprint) -> usize {
    blueprint.shape.columns() / 2 + 4
}

/// Parts per item where there are `count` items and room to park `room`.
#[cube]
pub(super) fn parts_of(count: u32, room: u32, #[comptime] blueprint: Blueprint) -> u32 {
    let mut parts = 1u32;
    if comptime![blueprint.in_parts()] {
        parts = min(max(room / count, 1u32), MOST);
    }
    parts
}

/// Where a thread parks four of its numbers in a room: of its outputs, and last its maxima and sums.
#[cube]
fn place(parked: u64, room: u32, #[comptime] quad: usize, #[comptime] blueprint: Blueprint) -> u64 {
    let threads = comptime![blueprint.warpgroups() * WARPGROUP];
    let quads = comptime![parked_numbers(blueprint) as u32 / 4];
    parked + ((room * quads + comptime![quad as u32]) * threads + UNIT_POS) as u64 * 16u64
}

/// Four numbers that this thread of some cube has parked in a room.
#[cube]
pub(super) fn parked_quad(
    parked: u64,
    room: u32,
    #[comptime] quad: usize,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, Const<4>> {
    load_quad(place(parked, room, quad, blueprint))
}

/// Parks what a thread holds in a room.
#[cube]
pub(super) fn park<NO: Size>(
    acc: &Vector<f32, NO>,
    softmax: &Softmax,
    parked: u64,
    room: u32,
    #[comptime] blueprint: Blueprint,
) {
    let quads = comptime![blueprint.shape.columns() / 8];
    #[unroll]
    for quad in 0..quads {
        store_quad(
            place(parked, room, quad, blueprint),
            acc.extract(comptime![quad * 4]),
            acc.extract(comptime![quad * 4 + 1]),
            acc.extract(comptime![quad * 4 + 2]),
            acc.extract(comptime![quad * 4 + 3]),
        );
    }
    store_quad(
        place(parked, room, quads, blueprint),
        softmax.maximum[0],
        softmax.maximum[1],
        softmax.sum[0],
        softmax.sum[1],
    );
}

/// Counts a part of an item that this warpgroup has parked. True in the warpgroup that is the item's last; the others are
/// done with it.
#[cube]
pub(super) fn is_last(
    parts: u32,
    counters: &[Atomic<u32>],
    counter: u32,
    cells: &mut [u32],
    cell: u32,
    together: u32,
) -> bool {
    // All of it is in memory before it is counted, and counted before it is read.
    ptx::fence_device();
    ptx::turn_wait(together, 128usize);
    if UNIT_POS % WARPGROUP == 0u32 {
        cells[cell as usize] = counters[counter as usize].fetch_add(1u32);
    }
    ptx::turn_wait(together, 128usize);
    ptx::fence_device();
    let last = cells[cell as usize] == parts - 1u32;
    if last && UNIT_POS % WARPGROUP == 0u32 {
        counters[counter as usize].store(0u32);
    }
    last
}

/// Adds up what was parked for all parts of an item, from room `first` on, in their order, whoever came last.
#[cube]
pub(super) fn take_up<NO: Size>(
    softmax: &mut Softmax,
    parked: u64,
    first: u32,
    parts: u32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, NO> {
    let quads = comptime![blueprint.shape.columns() / 8];
    let mut upper = numbers.neg_inf;
    let mut lower = numbers.neg_inf;
    for part in 0..parts {
        let state = parked_quad(parked, first + part, quads, blueprint);
        upper = max(upper, state.extract(0usize));
        lower = max(lower, state.extract(1usize));
    }
    softmax.maximum[0] = upper;
    softmax.maximum[1] = lower;
    let mut acc = Vector::<f32, NO>::new(0.0f32);
    let mut offsets = Array::<f32>::new(2usize);
    #[unroll]
    for row in 0..2usize {
        softmax.sum[row] = 0.0f32;
        let maximum = softmax.maximum[row];
        // As in the fold: a row that has seen no key keeps a finite offset.
        offsets[row] = select(maximum == numbers.neg_inf, 0.0f32, maximum) * numbers.exponent_scale;
    }
    for part in 0..parts {
        let state = parked_quad(parked, first + part, quads, blueprint);
        let mut shares = Array::<f32>::new(2usize);
        #[unroll]
        for row in 0..2usize {
            shares[row] = exp2_fast(fma(state.extract(row), numbers.exponent_scale, -offsets[row]));
            softmax.sum[row] = fma(state.extract(comptime![2 + row]), shares[row], softmax.sum[row]);
        }
        #[unroll]
        for quad in 0..quads {
            let values = parked_quad(parked, first + part, quad, blueprint);
            #[unroll]
            for i in 0..4usize {
                let at = comptime![quad * 4 + i];
                let sum = fma(values.extract(i), shares[comptime![i / 2]], acc.extract(at));
                acc.insert(at, sum);
            }
        }
    }
    acc
}
