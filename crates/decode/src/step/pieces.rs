//! How the keys that lists need are dealt to workers. The costs of all lists are laid one after the other and every worker gets
//! an equal share of them; what a worker computes of a list at a time is a piece.

use cubecl::prelude::*;

use super::{
    policy::{LEAST, START},
    rows::Numbers,
};

/// Keys that an even cut keeps together: as many as a worker multiplies at a time.
const STEP: u32 = 16;

/// Where lists are cut into pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Cut {
    /// Where one worker's share ends and the next one's begins: all have the same to do, and no list has more pieces than
    /// workers.
    Even,
    /// Every so many keys: what a sequence gets does not depend on its neighbours.
    Chunks,
}

/// What a list costs.
#[cube]
pub(super) fn cost_of(keys: u32, numbers: &Numbers) -> u32 {
    keys + keys.div_ceil(numbers.chunk) * comptime![START as u32]
}

/// The costs that fall to each worker, when all lists together cost `total`.
#[cube]
pub(super) fn share_of(total: u32, numbers: &Numbers) -> u32 {
    max(total.div_ceil(numbers.workers), comptime![LEAST as u32])
}

/// A list among the costs of all.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Costs {
    pub(super) list: u32,
    /// What the lists before it cost, and what they cost together with it.
    pub(super) before: u32,
    pub(super) after: u32,
    pub(super) keys: u32,
    /// What falls to each worker.
    pub(super) share: u32,
}

/// Pieces `first..end` of a list, some of which may have no key.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Pieces {
    pub(super) first: u32,
    pub(super) end: u32,
}

/// Keys `first..end` of those that a list needs, and where there is room for what they give.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Piece {
    pub(super) first: u32,
    pub(super) end: u32,
    pub(super) slot: u32,
}

#[cube]
impl Costs {
    /// The pieces that fall to a worker whose share reaches into the list's costs. A chunk is computed by the worker among
    /// whose costs its first is.
    pub(super) fn pieces_of_worker(&self, worker: u32, numbers: &Numbers, #[comptime] cut: Cut) -> Pieces {
        let mut pieces = Pieces { first: worker, end: worker + 1u32 };
        if comptime![cut == Cut::Chunks] {
            let cost = numbers.chunk + comptime![START as u32];
            let begin = worker * self.share;
            let skipped = select(begin > self.before, begin - self.before, 0u32);
            let ends = (begin + self.share - self.before).div_ceil(cost);
            pieces.first = skipped.div_ceil(cost);
            pieces.end = min(ends, self.keys.div_ceil(numbers.chunk));
        }
        pieces
    }

    /// All pieces.
    pub(super) fn pieces(&self, numbers: &Numbers, #[comptime] cut: Cut) -> Pieces {
        let mut pieces = Pieces { first: self.before / self.share, end: self.after.div_ceil(self.share) };
        if comptime![cut == Cut::Chunks] {
            pieces.first = 0u32;
            pieces.end = self.keys.div_ceil(numbers.chunk);
        }
        pieces
    }

    /// Piece `number`. From one piece to the next of all lists either the list or the worker is another one, so that the sum
    /// of both tells pieces apart.
    pub(super) fn piece(&self, number: u32, numbers: &Numbers, #[comptime] cut: Cut) -> Piece {
        let mut piece = Piece { first: 0u32, end: 0u32, slot: self.list + number };
        if comptime![cut == Cut::Chunks] {
            piece.first = number * numbers.chunk;
            piece.end = min(piece.first + numbers.chunk, self.keys);
            piece.slot = self.list * numbers.max_chunks + number;
        } else {
            piece.first = self.key_at(number * self.share);
            piece.end = self.key_at((number + 1u32) * self.share);
        }
        piece
    }

    /// The first key beyond a cost. What a piece costs beside its keys is paid before the first.
    fn key_at(&self, cost: u32) -> u32 {
        let paid = self.before + comptime![START as u32];
        let keys = select(cost > paid, cost - paid, 0u32);
        min(keys.div_ceil(STEP) * STEP, self.keys)
    }
}
