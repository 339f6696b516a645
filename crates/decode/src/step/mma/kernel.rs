//! The kernel: mechanism alone. Fragments of `mma.sync` (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point
//! type"): a lane is `group`, one of eight, and `quarter`, one of four. Of scores it holds rows `group` and `group + 8`, keys
//! `2 quarter` and the next, of each half of the 16.

// In a kernel `%` is one instruction; comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_tensor_core::ptx::{
    exp2_fast, global_address, interleave, is_odd, load_16, pack, product, store_quad,
};
use cubecl::prelude::*;

use super::{Blueprint, KEYS, PLANE, PLANES};
use crate::{
    reaches::{Rule, rule_of},
    step::{
        pieces::{Costs, Piece, share_of},
        plan::list_at_cost,
        rows::{List, Numbers, Strides, list_at, offset, pool_row, position_of, row_of, rows_in},
    },
    view::Places,
};

const LOG2_E: f32 = core::f32::consts::LOG2_E;

#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Lane {
    group: u32,
    quarter: u32,
}

/// Where keys and values are.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Pools {
    key: u64,
    value: u64,
}

/// The running state of a tile in a plane.
#[derive(CubeType)]
struct Tile {
    /// Two numbers in a word: by 32 channels, four words of the lane's upper row, then the same of its lower row.
    query: Array<u32>,
    /// By 64 channels, eight products.
    out: Array<Vector<f32, Const<4>>>,
    /// Of the upper and the lower row.
    maximum: Array<f32>,
    /// The same, of the lane's own keys.
    sum: Array<f32>,
}

/// Keys and values of a step, and where they came from.
#[derive(CubeType)]
struct Keys {
    /// The row of the pools that holds key `lane % 16`.
    row: u32,
    key: Array<Vector<u32, Const<4>>>,
    value: Array<Vector<u32, Const<4>>>,
}

#[cube]
impl Keys {
    /// Finds the keys from the `next`-th on. Beyond the last it is the last again.
    fn find(&mut self, list: &List, next: u32, end: u32, tables: &[u32], places: &Places) {
        let n = min(next + UNIT_POS % comptime![KEYS as u32], end - 1u32);
        self.row = pool_row(list, n, tables, places);
    }

    /// Where key `n` of the step is, in a pool that begins at `pool`.
    fn address(&self, pool: u64, n: u32, #[comptime] blueprint: Blueprint) -> u64 {
        pool + plane_shuffle(self.row, n) as u64 * comptime![blueprint.dim as u64 * 2]
    }

    /// Of each half of the keys a lane takes one: four lanes side by side take 64 bytes of it at a time.
    fn load_keys(&mut self, pools: &Pools, lane: &Lane, #[comptime] blueprint: Blueprint) {
        let loads = comptime![blueprint.key_loads()];
        #[unroll]
        for half in 0..2usize {
            let at = self.address(pools.key, lane.group + comptime![half as u32 * 8], blueprint)
                + (lane.quarter * 16u32) as u64;
            #[unroll]
            for i in 0..loads {
                self.key[half * loads + i] = load_16(at + comptime![i as u64 * 64]);
            }
        }
    }

    /// Of each half of the keys a lane takes the values of two: eight lanes side by side take 128 bytes of one at a time.
    fn load_values(&mut self, pools: &Pools, lane: &Lane, #[comptime] blueprint: Blueprint) {
        #[unroll]
        for i in 0..4usize {
            let n = value_of(lane, i);
            let at = self.address(pools.value, n, blueprint) + (lane.group * 16u32) as u64;
            #[unroll]
            for block in 0..comptime![blueprint.value_loads()] {
                self.value[block * 4 + i] = load_16(at + comptime![block as u64 * 128]);
            }
        }
    }

    /// Whether a lane holds a value that is not finite.
    fn has_odd_value(&self, #[comptime] blueprint: Blueprint) -> bool {
        let mut odd = false;
        #[unroll]
        for i in 0..comptime![blueprint.value_loads() * 4] {
            #[unroll]
            for word in 0..4usize {
                odd = odd || is_odd(self.value[i].extract(word), comptime![blueprint.operand]);
            }
        }
        odd
    }
}

/// Which of the step's keys is the lane's `i`-th value.
#[cube]
fn value_of(lane: &Lane, #[comptime] i: usize) -> u32 {
    lane.quarter * 2u32 + comptime![(i % 2 + i / 2 * 8) as u32]
}

/// The largest, or the sum, of what the four lanes of a row hold.
#[cube]
fn max_of_row(x: f32) -> f32 {
    let y = max(x, plane_shuffle_xor(x, 1u32));
    max(y, plane_shuffle_xor(y, 2u32))
}

#[cube]
fn sum_of_row(x: f32) -> f32 {
    let y = x + plane_shuffle_xor(x, 1u32);
    y + plane_shuffle_xor(y, 2u32)
}

/// Queries times the keys of a step: four scores of each half.
#[cube]
fn scores_of(tile: &Tile, keys: &Keys, #[comptime] blueprint: Blueprint) -> Array<Vector<f32, Const<4>>> {
    let loads = comptime![blueprint.key_loads()];
    let kind = comptime![blueprint.operand.name()];
    let mut scores = Array::<Vector<f32, Const<4>>>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        let mut sums = Vector::<f32, Const<4>>::new(0.0f32);
        #[unroll]
        for i in 0..loads {
            let key = keys.key[half * loads + i];
            #[unroll]
            for step in 0..2usize {
                let upper = comptime![i * 4 + step * 2];
                let lower = comptime![(loads + i) * 4 + step * 2];
                sums = product(
                    sums,
                    tile.query[upper],
                    tile.query[lower],
                    tile.query[upper + 1],
                    tile.query[lower + 1],
                    key.extract(comptime![step * 2]),
                    key.extract(comptime![step * 2 + 1]),
                    kind,
                );
            }
        }
        scores[half] = sums;
    }
    scores
}

/// What every row of a plane sees, as far as a lane is concerned.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Rules {
    upper: Rule,
    lower: Rule,
}

/// Whether a rule shows all keys between two positions.
#[cube]
fn shows(rule: &Rule, lowest: i32, highest: i32) -> bool {
    (lowest > rule.low || highest < rule.sinks) && highest <= rule.last && lowest >= rule.skip
}

/// Folds the needed keys `next..end`, at most 16, into the tile. With `masked`, rows see only what their rule shows; a key that a
/// row does not see cannot touch it, NaN or not.
#[cube]
fn fold(
    tile: &mut Tile,
    scores: &Array<Vector<f32, Const<4>>>,
    keys: &Keys,
    list: &List,
    next: u32,
    end: u32,
    lane: &Lane,
    rules: &Rules,
    routes: &[u32],
    all_rules: &[i32],
    places: &Places,
    numbers: &Numbers,
    #[comptime] masked: bool,
    #[comptime] blueprint: Blueprint,
) {
    let rows = comptime![if blueprint.tall { 2usize } else { 1 }];
    // By the lane's row, then by key.
    let mut weights = Array::<f32>::new(8usize);
    let mut corrections = Array::<f32>::new(2usize);
    corrections[1] = 1.0f32;
    #[unroll]
    for row in 0..rows {
        let mut maximum = tile.maximum[row];
        #[unroll]
        for i in 0..4usize {
            let mut score = scores[comptime![i / 2]].extract(comptime![row * 2 + i % 2]) * numbers.scale;
            if comptime![blueprint.softcap] {
                score = numbers.softcap * (score / numbers.softcap).tanh();
            }
            if comptime![masked] {
                let n = next + value_of(lane, i);
                let position = position_of(list, n) as i32;
                let mut sees = n < end;
                if comptime![row == 0] {
                    sees = sees && rules.upper.sees(position);
                } else {
                    sees = sees && rules.lower.sees(position);
                }
                score = select(sees, score, numbers.neg_inf);
            }
            weights[row * 4 + i] = score;
            maximum = max(maximum, score);
        }
        maximum = max_of_row(maximum);
        // A row that has seen no key keeps a finite offset, so that its weights become exp(-inf) = 0.
        let offset = select(maximum == numbers.neg_inf, 0.0f32, maximum);
        let correction = exp2_fast((tile.maximum[row] - offset) * LOG2_E);
        tile.maximum[row] = maximum;
        let mut sum = 0.0f32;
        #[unroll]
        for i in 0..4usize {
            let weight = exp2_fast((weights[row * 4 + i] - offset) * LOG2_E);
            weights[row * 4 + i] = weight;
            sum += weight;
        }
        tile.sum[row] = tile.sum[row] * correction + sum;
        corrections[row] = correction;
    }
    let upper = corrections[0];
    let lower = corrections[1];
    // Maxima grow ever more rarely.
    if plane_any(upper != 1.0f32 || lower != 1.0f32) {
        #[unroll]
        for i in 0..comptime![blueprint.dim / 8] {
            let mut factors = Vector::<f32, Const<4>>::new(upper);
            factors.insert(2usize, lower);
            factors.insert(3usize, lower);
            tile.out[i] *= factors;
        }
    }

    // By the halves of the keys, upper and lower row.
    let mut packed = Array::<u32>::new(4usize);
    packed[1] = 0u32;
    packed[3] = 0u32;
    #[unroll]
    for half in 0..2usize {
        #[unroll]
        for row in 0..rows {
            let at = comptime![row * 4 + half * 2];
            packed[half * 2 + row] = pack(weights[at], weights[at + 1], comptime![blueprint.operand]);
        }
    }
    if comptime![masked] {
        if plane_any(keys.has_odd_value(blueprint)) {
            add_row_by_row(
                tile, &packed, keys, list, next, end, lane, routes, all_rules, places, numbers, blueprint,
            );
        } else {
            add(tile, &packed, keys, blueprint);
        }
    } else {
        add(tile, &packed, keys, blueprint);
    }
}

/// Adds weights times values.
#[cube]
fn add(tile: &mut Tile, weights: &Array<u32>, keys: &Keys, #[comptime] blueprint: Blueprint) {
    let kind = comptime![blueprint.operand.name()];
    #[unroll]
    for block in 0..comptime![blueprint.value_loads()] {
        #[unroll]
        for i in 0..8usize {
            let word = comptime![i / 2];
            let odd = comptime![i % 2 == 1];
            let first = comptime![block * 4];
            let a = interleave(keys.value[first].extract(word), keys.value[first + 1].extract(word), odd);
            let b = interleave(keys.value[first + 2].extract(word), keys.value[first + 3].extract(word), odd);
            let at = comptime![block * 8 + i];
            tile.out[at] = product(tile.out[at], weights[0], weights[1], weights[2], weights[3], a, b, kind);
        }
    }
}

/// The same where some row does not see a value that is not finite, which times a weight of 0 is no 0: for one row after
/// the other, with zeros in place of what it does not see.
#[cube]
fn add_row_by_row(
    tile: &mut Tile,
    weights: &Array<u32>,
    keys: &Keys,
    list: &List,
    next: u32,
    end: u32,
    lane: &Lane,
    routes: &[u32],
    rules: &[i32],
    places: &Places,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let kind = comptime![blueprint.operand.name()];
    for in_tile in 0..rows_in(list.list, numbers) {
        let row = row_of(list.list, in_tile, places.kv_heads, routes, numbers, blueprint.routed);
        let rule = rule_of(rules, row.route, list.first_position + row.token as i32);
        let mut seen = Array::<bool>::new(4usize);
        #[unroll]
        for i in 0..4usize {
            let n = next + value_of(lane, i);
            seen[i] = n < end && rule.sees(position_of(list, n) as i32);
        }
        #[unroll]
        for block in 0..comptime![blueprint.value_loads()] {
            #[unroll]
            for i in 0..8usize {
                let word = comptime![i / 2];
                let odd = comptime![i % 2 == 1];
                let first = comptime![block * 4];
                let a = select(seen[0], keys.value[first].extract(word), 0u32);
                let b = select(seen[1], keys.value[first + 1].extract(word), 0u32);
                let c = select(seen[2], keys.value[first + 2].extract(word), 0u32);
                let d = select(seen[3], keys.value[first + 3].extract(word), 0u32);
                let low = interleave(a, b, odd);
                let high = interleave(c, d, odd);
                let at = comptime![block * 8 + i];
                let before = tile.out[at];
                // As the product of all rows rounds, so that the bits of rows that do not see it stay what they are without it.
                let of_row = product(before, weights[0], weights[1], weights[2], weights[3], low, high, kind);
                let upper = lane.group == in_tile;
                let lower = lane.group + 8u32 == in_tile;
                let mut after = before;
                #[unroll]
                for x in 0..4usize {
                    let mut own = upper;
                    if comptime![x >= 2] {
                        own = lower;
                    }
                    after.insert(x, select(own, of_row.extract(x), before.extract(x)));
                }
                tile.out[at] = after;
            }
        }
    }
}

/// A lane's row of the tile: beyond the last it is the last again.
#[cube]
fn lane_row(lane: &Lane, lower: u32, list: &List, numbers: &Numbers) -> u32 {
    min(lane.group + lower * 8u32, rows_in(list.list, numbers) - 1u32)
}

/// Attends one piece of a list's keys, which has at least one.
#[cube]
fn attend_piece<E: Float>(
    query: &[E],
    pools: &Pools,
    tables: &[u32],
    routes: &[u32],
    rules: &[i32],
    sums: &mut [f32],
    outs: u64,
    list: &List,
    piece: &Piece,
    lane: &Lane,
    query_strides: &Strides,
    places: &Places,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let rows = comptime![if blueprint.tall { 2usize } else { 1 }];
    let key_loads = comptime![blueprint.key_loads()];
    let value_loads = comptime![blueprint.value_loads()];
    let mut next = piece.first;
    let end = piece.end;
    let mut keys = Keys {
        row: 0u32,
        key: Array::new(comptime![key_loads * 2]),
        value: Array::new(comptime![value_loads * 4]),
    };
    keys.find(list, next, end, tables, places);
    keys.load_keys(pools, lane, blueprint);
    keys.load_values(pools, lane, blueprint);

    let mut tile = Tile {
        query: Array::new(comptime![key_loads * 8]),
        out: Array::new(comptime![blueprint.dim / 8]),
        maximum: Array::new(2usize),
        sum: Array::new(2usize),
    };
    #[unroll]
    for row in 0..2usize {
        tile.maximum[row] = numbers.neg_inf;
        tile.sum[row] = 0.0f32;
        let in_tile = lane_row(lane, comptime![row as u32], list, numbers);
        let here = row_of(list.list, in_tile, places.kv_heads, routes, numbers, blueprint.routed);
        let from = offset(query_strides, list.batch, here.head, here.token) + lane.quarter * 8u32;
        #[unroll]
        for i in 0..comptime![key_loads * 4] {
            let mut word = 0u32;
            if comptime![row < rows] {
                let at = from + comptime![(i / 4 * 32 + i % 4 * 2) as u32];
                let low = f32::cast_from(query[at as usize]);
                let high = f32::cast_from(query[at as usize + 1]);
                word = pack(low, high, comptime![blueprint.operand]);
            }
            tile.query[comptime![row * key_loads * 4 + i]] = word;
        }
    }
    #[unroll]
    for i in 0..comptime![blueprint.dim / 8] {
        tile.out[i] = Vector::new(0.0f32);
    }
    let upper = row_of(
        list.list,
        lane_row(lane, 0u32, list, numbers),
        places.kv_heads,
        routes,
        numbers,
        blueprint.routed,
    );
    let lower = row_of(
        list.list,
        lane_row(lane, 1u32, list, numbers),
        places.kv_heads,
        routes,
        numbers,
        blueprint.routed,
    );
    let of_lane = Rules {
        upper: rule_of(rules, upper.route, list.first_position + upper.token as i32),
        lower: rule_of(rules, lower.route, list.first_position + lower.token as i32),
    };

    while next < end {
        let scores = scores_of(&tile, &keys, blueprint);
        // Registers whose contents have been used take what comes next, so that memory always has something to do.
        let following = next + comptime![KEYS as u32];
        if following < end {
            keys.find(list, following, end, tables, places);
            keys.load_keys(pools, lane, blueprint);
        }
        // Where the rows of all lanes see all of the keys, nothing is masked.
        let lowest = position_of(list, next) as i32;
        let highest = position_of(list, following - 1u32) as i32;
        let whole = following <= end && next >= list.sinks;
        let shown = shows(&of_lane.upper, lowest, highest) && shows(&of_lane.lower, lowest, highest);
        if plane_all(whole && shown) {
            fold(
                &mut tile, &scores, &keys, list, next, end, lane, &of_lane, routes, rules, places, numbers,
                false, blueprint,
            );
        } else {
            fold(
                &mut tile, &scores, &keys, list, next, end, lane, &of_lane, routes, rules, places, numbers,
                true, blueprint,
            );
        }
        if following < end {
            keys.load_values(pools, lane, blueprint);
        }
        next = following;
    }

    let count = rows_in(list.list, numbers);
    #[unroll]
    for row in 0..rows {
        let sum = sum_of_row(tile.sum[row]);
        let in_tile = lane.group + comptime![row as u32 * 8];
        if in_tile < count {
            let at = piece.slot * numbers.tile_rows + in_tile;
            if lane.quarter == 0u32 {
                sums[(at * 2u32) as usize] = tile.maximum[row];
                sums[(at * 2u32 + 1u32) as usize] = sum;
            }
            let to = outs + at as u64 * comptime![blueprint.dim as u64 * 4] + (lane.quarter * 64u32) as u64;
            // Of every 64 channels a lane has 16 that lie side by side, of each product two.
            #[unroll]
            for quad in 0..comptime![value_loads * 4] {
                let block = comptime![quad / 4];
                let part = comptime![quad % 4];
                let first = comptime![block * 8 + part % 2 * 4];
                let column = comptime![row * 2 + part / 2];
                store_quad(
                    to + comptime![(block * 256 + part * 16) as u64],
                    tile.out[first].extract(column),
                    tile.out[first + 1].extract(column),
                    tile.out[first + 2].extract(column),
                    tile.out[first + 3].extract(column),
                );
            }
        }
    }
}

/// One plane, one worker.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(super) fn attend_kernel<E: Float>(
    query: &[E],
    key: &[E],
    value: &[E],
    tables: &[u32],
    slots: &[u32],
    routes: &[u32],
    rules: &[i32],
    needs: &[u32],
    starts: &[u32],
    sums: &mut [f32],
    outs: &mut [f32],
    query_strides: Strides,
    places: Places,
    numbers: Numbers,
    #[comptime] blueprint: Blueprint,
    #[define(E)] _element: ElemType,
) {
    let worker = CUBE_POS_X * comptime![PLANES as u32] + UNIT_POS / PLANE;
    let share = share_of(starts[numbers.lists as usize], &numbers);
    let begin = worker * share;
    let end = min(begin + share, starts[numbers.lists as usize]);
    // The same for a whole plane.
    if worker >= numbers.workers || begin >= end {
        terminate!();
    }
    let in_plane = UNIT_POS % PLANE;
    let lane = Lane { group: in_plane / 4u32, quarter: in_plane % 4u32 };
    let pools = Pools { key: global_address::<E>(key.as_ptr()), value: global_address::<E>(value.as_ptr()) };
    let outs = global_address::<f32>(outs.as_ptr());
    let mut number = list_at_cost(begin, starts, &numbers);
    let mut before = starts[number as usize];
    while before < end && number < numbers.lists {
        let after = starts[number as usize + 1];
        let list = list_at(number, needs, tables, slots, &places, &numbers);
        let costs = Costs { list: number, before, after, keys: list.keys, share };
        let pieces = costs.pieces_of_worker(worker, &numbers, blueprint.cut);
        for i in pieces.first..pieces.end {
            let piece = costs.piece(i, &numbers, blueprint.cut);
            if piece.first < piece.end {
                attend_piece::<E>(
                    query,
                    &pools,
                    tables,
                    routes,
                    rules,
                    sums,
                    outs,
                    &list,
                    &piece,
                    &lane,
                    &query_strides,
                    &places,
                    &numbers,
                    blueprint,
                );
            }
        }
        before = after;
        number += 1u32;
    }
}
