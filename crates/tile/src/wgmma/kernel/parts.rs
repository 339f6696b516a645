//! Items in parts: where there are fewer items than cubes, several cubes share the keys of one, and the warpgroup that
//! comes last adds up what all have summed (the idea of Flash-Decoding, Dao et al. 2023, within one launch).
//!
//! What is parked is what a thread holds, in its own order: the same thread of another cube takes it up again.

use cubecl::prelude::*;

use super::WARPGROUP;
use crate::{
    tensor_core::{Blueprint, Numbers, ptx::exp2_fast, softmax::Softmax},
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

/// Where a thread parks the `number`-th of its numbers of a slot.
#[cube]
fn place(slot: u32, #[comptime] number: usize, #[comptime] blueprint: Blueprint) -> usize {
    let threads = comptime![blueprint.warpgroups() * WARPGROUP];
    let numbers = comptime![parked_numbers(blueprint) as u32];
    ((slot * numbers + comptime![number as u32]) * threads + UNIT_POS) as usize
}

/// Parks what this warpgroup has summed over its part of an item. True in the warpgroup that is the item's last; the
/// others are done with it.
#[cube]
pub(super) fn park<NO: Size>(
    acc: &Vector<f32, NO>,
    softmax: &Softmax,
    slot: u32,
    parts: u32,
    parked: &mut [f32],
    counters: &[Atomic<u32>],
    counter: u32,
    cells: &mut [u32],
    cell: u32,
    together: u32,
    #[comptime] blueprint: Blueprint,
) -> bool {
    let outputs = comptime![blueprint.shape.columns() / 2];
    #[unroll]
    for i in 0..outputs {
        parked[place(slot, i, blueprint)] = acc.extract(i);
    }
    #[unroll]
    for row in 0..2usize {
        parked[place(slot, comptime![outputs + row], blueprint)] = softmax.maximum[row];
        parked[place(slot, comptime![outputs + 2 + row], blueprint)] = softmax.sum[row];
    }
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

/// Adds up what was parked for all parts of an item, from `slot` on, in their order, whoever came last.
#[cube]
pub(super) fn take_up<NO: Size>(
    softmax: &mut Softmax,
    slot: u32,
    parts: u32,
    parked: &mut [f32],
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, NO> {
    let outputs = comptime![blueprint.shape.columns() / 2];
    let mut offsets = Array::<f32>::new(2usize);
    #[unroll]
    for row in 0..2usize {
        let mut maximum = numbers.neg_inf;
        for part in 0..parts {
            maximum = max(maximum, parked[place(slot + part, comptime![outputs + row], blueprint)]);
        }
        softmax.maximum[row] = maximum;
        softmax.sum[row] = 0.0f32;
        // As in the fold: a row that has seen no key keeps a finite offset.
        offsets[row] = select(maximum == numbers.neg_inf, 0.0f32, maximum) * numbers.exponent_scale;
    }
    let mut acc = Vector::<f32, NO>::new(0.0f32);
    for part in 0..parts {
        let mut shares = Array::<f32>::new(2usize);
        #[unroll]
        for row in 0..2usize {
            let maximum = parked[place(slot + part, comptime![outputs + row], blueprint)];
            let sum = parked[place(slot + part, comptime![outputs + 2 + row], blueprint)];
            shares[row] = exp2_fast(fma(maximum, numbers.exponent_scale, -offsets[row]));
            softmax.sum[row] = fma(sum, shares[row], softmax.sum[row]);
        }
        #[unroll]
        for i in 0..outputs {
            let share = shares[comptime![i / 2 % 2]];
            let sum = fma(parked[place(slot + part, i, blueprint)], share, acc.extract(i));
            acc.insert(i, sum);
        }
    }
    acc
}
