//! Items in slices of keys: where contexts are long, cubes that work on the same list would read it at different places,
//! because they begin at different times, and what all of them read does not fit a cache. So an item is cut at every
//! so many tiles, counted from its first key, and the first slices of as many items as there are cubes are taken before
//! their second ones: at any time cubes read the same few megabytes of a list.
//!
//! A slice is computed as if it were the first. Then its warpgroup waits until the slice before has parked its sums, adds
//! them to its own, and parks both for the next slice; the last one has the item's sums. So slices of an item may be
//! computed at the same time, and yet sums are always added in the same order.
//!
//! Sums are parked by item, in as many rooms as there are, and every warpgroup of a room has a counter of its turns: `most`
//! for every item that has been there, and one for every slice of the item that is. A slice waits for smaller slots only:
//! for the slice before of its own item, and before anything else for all of an item that stands at least as many places
//! before it as are taken together. Every slot that is waited for was drawn by a cube that runs, and cubes take slots in
//! their order; so the first slot that is not done waits for nothing.

use cubecl::prelude::*;

use super::{
    WARPGROUP,
    cuts::{Cuts, Piece},
    parts::parked_quad,
};
use crate::{
    tensor_core::{Blueprint, Numbers, ptx::exp2_fast, softmax::Softmax},
    wgmma::ptx,
};

/// Slices of an item of `tiles` tiles, at least one. The last has between half and one and a half times the tiles of
/// the others, so that none ends long before the one that it waits for.
#[cube]
pub(super) fn slices_of(tiles: u32, #[comptime] blueprint: Blueprint) -> u32 {
    let size = comptime![blueprint.slice_tiles];
    max((tiles + comptime![size / 2]) / size, 1u32)
}

/// Waits for the turn of this warpgroup's slice at the `counter` of its item's room. All of its threads see then what
/// the slice before has parked.
#[cube]
pub(super) fn wait_for_turn(counter: u64, piece: &Piece, cuts: &Cuts, together: u32) {
    if UNIT_POS % WARPGROUP == 0u32 {
        ptx::wait_for(counter, piece.item / cuts.room * cuts.pieces + piece.number);
    }
    ptx::turn_wait(together, 128usize);
}

/// Adds what the slices before have summed to what this one has.
#[cube]
pub(super) fn add_before<NO: Size>(
    acc: &Vector<f32, NO>,
    softmax: &mut Softmax,
    parked: u64,
    room: u32,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, NO> {
    let quads = comptime![blueprint.shape.columns() / 8];
    let before = parked_quad(parked, room, quads, blueprint);
    let mut shares_before = Array::<f32>::new(2usize);
    let mut shares = Array::<f32>::new(2usize);
    #[unroll]
    for row in 0..2usize {
        let maximum = max(before.extract(row), softmax.maximum[row]);
        // As in the fold: a row that has seen no key keeps a finite offset.
        let offset = select(maximum == numbers.neg_inf, 0.0f32, maximum) * numbers.exponent_scale;
        shares_before[row] = exp2_fast(fma(before.extract(row), numbers.exponent_scale, -offset));
        shares[row] = exp2_fast(fma(softmax.maximum[row], numbers.exponent_scale, -offset));
        softmax.maximum[row] = maximum;
        let sum_before = before.extract(comptime![2 + row]) * shares_before[row];
        softmax.sum[row] = fma(softmax.sum[row], shares[row], sum_before);
    }
    let mut sum = Vector::<f32, NO>::new(0.0f32);
    #[unroll]
    for quad in 0..quads {
        let before = parked_quad(parked, room, quad, blueprint);
        #[unroll]
        for i in 0..4usize {
            let row = comptime![i / 2];
            let own = acc.extract(comptime![quad * 4 + i]) * shares[row];
            sum.insert(comptime![quad * 4 + i], fma(before.extract(i), shares_before[row], own));
        }
    }
    sum
}

/// Gives the room's turn to the slice after this one, or to the next item that comes to the room. What this slice has
/// parked is in memory by then, and what it has added is read. The last item to come leaves the counter at zero.
#[cube]
pub(super) fn give_turn(counter: u64, piece: &Piece, last: bool, cuts: &Cuts, together: u32) {
    ptx::turn_wait(together, 128usize);
    if UNIT_POS % WARPGROUP == 0u32 {
        let visit = piece.item / cuts.room;
        let mut next = visit * cuts.pieces + piece.number + 1u32;
        if last {
            next = select(piece.item + cuts.room < cuts.items, (visit + 1u32) * cuts.pieces, 0u32);
        }
        ptx::release(counter, next);
    }
}
