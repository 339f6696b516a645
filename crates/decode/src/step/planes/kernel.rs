//! The kernel: mechanism alone.

// In a kernel `%` is one instruction; comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use cubecl::prelude::*;

use super::{Blueprint, PLANE, PLANES};
use crate::{
    reaches::{Rule, rule_of},
    step::{
        pieces::{Costs, Piece, share_of},
        plan::list_at_cost,
        rows::{List, Numbers, Strides, list_at, offset, pool_row, position_of, row_of, rows_in},
    },
    view::Places,
};

/// A plane's place in its tile: `group` counts the keys that lie side by side, `part` the lanes of a key. After products are
/// summed, a lane holds scores of one row, `row`, of `scores` loads from `load` on.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Lane {
    group: u32,
    part: u32,
    row: u32,
    load: u32,
    /// Several lanes may hold the same score; one of them counts it.
    counts: bool,
}

#[cube]
fn lane_of(#[comptime] blueprint: Blueprint) -> Lane {
    let lane = UNIT_POS % PLANE;
    let lanes = comptime![blueprint.lanes as u32];
    let part = lane % lanes;
    let first = part * comptime![blueprint.products() as u32] / lanes;
    let same = comptime![(blueprint.lanes / blueprint.products()).max(1) as u32];
    Lane {
        group: lane / lanes,
        part,
        row: first / comptime![blueprint.loads as u32],
        load: first % comptime![blueprint.loads as u32],
        counts: part % same == 0u32,
    }
}

/// The running state of a tile in a plane: queries and outputs by row and dimension, this lane's share of them, and maximum
/// and sum of the lane's own row.
#[derive(CubeType)]
struct Tile {
    query: Array<f32>,
    out: Array<f32>,
    maximum: Array<f32>,
    sum: Array<f32>,
}

/// The largest of what the lanes of the same row hold.
#[cube]
fn max_of_row(x: f32, #[comptime] blueprint: Blueprint) -> f32 {
    let mut largest = x;
    #[unroll]
    for step in 0..5usize {
        let mask = comptime![1usize << step];
        // Bits of the lane that tell one row from another are left alone.
        if comptime![mask < blueprint.lanes / blueprint.rows || mask >= blueprint.lanes] {
            largest = max(largest, plane_shuffle_xor(largest, comptime![mask as u32]));
        }
    }
    largest
}

/// The sum of what the lanes of the same row hold.
#[cube]
fn sum_of_row(x: f32, #[comptime] blueprint: Blueprint) -> f32 {
    let mut sum = x;
    #[unroll]
    for step in 0..5usize {
        let mask = comptime![1usize << step];
        if comptime![mask < blueprint.lanes / blueprint.rows || mask >= blueprint.lanes] {
            sum += plane_shuffle_xor(sum, comptime![mask as u32]);
        }
    }
    sum
}

/// Sums products over the lanes of a key: in each step a lane hands one half of what it holds to its partner for the other
/// half, until it holds its share, and from then on the whole of the one sum that it holds.
#[cube]
fn sum_products(products: &mut Array<f32>, part: u32, #[comptime] blueprint: Blueprint) {
    #[unroll]
    for step in 0..5usize {
        let mask = comptime![blueprint.lanes >> (step + 1)];
        let held = comptime![blueprint.products() >> step];
        if comptime![mask > 0] {
            let mask = comptime![mask as u32];
            if comptime![held >= 2] {
                let upper = part & mask != 0u32;
                #[unroll]
                for i in 0..comptime![held / 2] {
                    let a = products[i];
                    let b = products[i + comptime![held / 2]];
                    products[i] = select(upper, b, a) + plane_shuffle_xor(select(upper, a, b), mask);
                }
            } else {
                products[0] += plane_shuffle_xor(products[0], mask);
            }
        }
    }
}

/// The products of every row's query and the keys that were loaded, summed over the lanes of a key: what a lane holds of
/// them then comes first.
#[cube]
fn products_of<E: Float, N: Size>(
    tile: &Tile,
    key: &Array<Vector<E, N>>,
    part: u32,
    #[comptime] blueprint: Blueprint,
) -> Array<f32> {
    let rows = comptime![blueprint.rows];
    let width = comptime![blueprint.width];
    let loads = comptime![blueprint.loads];
    let mut products = Array::<f32>::new(comptime![rows * loads]);
    #[unroll]
    for load in 0..loads {
        let k = Vector::<f32, N>::cast_from(key[load]);
        #[unroll]
        for row in 0..rows {
            let mut sum = 0.0f32;
            #[unroll]
            for i in 0..width {
                sum = fma(tile.query[row * width + i], k.extract(i), sum);
            }
            // A lane beyond the last vector has queries of 0, which times infinity is no 0.
            if comptime![blueprint.head_dim / blueprint.width < blueprint.lanes] {
                let vectors = comptime![(blueprint.head_dim / blueprint.width) as u32];
                sum = select(part < vectors, sum, 0.0f32);
            }
            products[row * loads + load] = sum;
        }
    }
    sum_products(&mut products, part, blueprint);
    products
}

/// Folds the needed keys `next..end`, at most as many as are loaded at once, into the tile by their products. With `masked`,
/// rows see only what their rule shows; a key that a row does not see cannot touch it, NaN or not.
#[cube]
fn fold<E: Float, N: Size>(
    tile: &mut Tile,
    products: &mut Array<f32>,
    value: &Array<Vector<E, N>>,
    list: &List,
    next: u32,
    end: u32,
    lane: &Lane,
    rule: &Rule,
    numbers: &Numbers,
    #[comptime] masked: bool,
    #[comptime] blueprint: Blueprint,
) {
    let rows = comptime![blueprint.rows];
    let width = comptime![blueprint.width];
    let loads = comptime![blueprint.loads];
    let lanes = comptime![blueprint.lanes];
    let scores = comptime![blueprint.scores()];
    let keys_at_once = comptime![blueprint.keys_at_once() as u32];

    // A lane works for the row and the loads whose scores it holds.
    let mut seen = Array::<bool>::new(scores);
    let mut maximum = tile.maximum[0];
    #[unroll]
    for i in 0..scores {
        let mut score = products[i];
        if comptime![blueprint.softcap] {
            score = numbers.softcap * (score / numbers.softcap).tanh();
        }
        seen[i] = true;
        if comptime![masked] {
            let n = next + (lane.load + comptime![i as u32]) * keys_at_once + lane.group;
            let sees = n < end && rule.sees(position_of(list, n) as i32);
            seen[i] = sees;
            score = select(sees, score, numbers.neg_inf);
        }
        products[i] = score;
        maximum = max(maximum, score);
    }
    maximum = max_of_row(maximum, blueprint);
    // A row that has seen no key keeps a finite offset, so that its weights become exp(-inf) = 0.
    let offset = select(maximum == numbers.neg_inf, 0.0f32, maximum);
    let correction = (tile.maximum[0] - offset).exp();
    tile.maximum[0] = maximum;
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..scores {
        let weight = (products[i] - offset).exp();
        sum += weight;
        // No weight is negative: -1 says that the row does not see the key.
        products[i] = select(seen[i], weight, -1.0f32);
    }
    tile.sum[0] = tile.sum[0] * correction + select(lane.counts, sum, 0.0f32);

    let first_lane = lane.group * comptime![lanes as u32];
    #[unroll]
    for row in 0..rows {
        let of_row = plane_shuffle(correction, first_lane + comptime![(row * lanes / rows) as u32]);
        #[unroll]
        for i in 0..width {
            tile.out[row * width + i] *= of_row;
        }
    }
    #[unroll]
    for load in 0..loads {
        let v = Vector::<f32, N>::cast_from(value[load]);
        #[unroll]
        for row in 0..rows {
            let product = comptime![row * loads + load];
            let from = comptime![(product * lanes / (rows * loads)) as u32];
            let weight = plane_shuffle(products[comptime![product % scores]], first_lane + from);
            #[unroll]
            for i in 0..width {
                let at = comptime![row * width + i];
                let sum = fma(weight, v.extract(i), tile.out[at]);
                if comptime![masked] {
                    tile.out[at] = select(weight == -1.0f32, tile.out[at], sum);
                } else {
                    tile.out[at] = sum;
                }
            }
        }
    }
}

/// Where this lane's vectors of the keys from the `next`-th on begin. Beyond the last it is the last again.
#[cube]
fn find(
    at: &mut Array<u32>,
    list: &List,
    next: u32,
    end: u32,
    lane: &Lane,
    vector: u32,
    tables: &[u32],
    places: &Places,
    #[comptime] blueprint: Blueprint,
) {
    let vectors = comptime![(blueprint.head_dim / blueprint.width) as u32];
    let keys_at_once = comptime![blueprint.keys_at_once() as u32];
    #[unroll]
    for load in 0..comptime![blueprint.loads] {
        let n = min(next + comptime![load as u32] * keys_at_once + lane.group, end - 1u32);
        at[load] = pool_row(list, n, tables, places) * vectors + vector;
    }
}

#[cube]
fn load<E: Float, N: Size>(
    to: &mut Array<Vector<E, N>>,
    from: &[Vector<E, N>],
    at: &Array<u32>,
    #[comptime] loads: usize,
) {
    #[unroll]
    for i in 0..loads {
        to[i] = from[at[i] as usize];
    }
}

/// Attends one piece of a list's keys, which has at least one.
#[cube]
fn attend_piece<E: Float, N: Size>(
    query: &[E],
    key: &[Vector<E, N>],
    value: &[Vector<E, N>],
    tables: &[u32],
    routes: &[u32],
    rules: &[i32],
    sums: &mut [f32],
    outs: &mut [f32],
    list: &List,
    piece: &Piece,
    lane: &Lane,
    query_strides: &Strides,
    places: &Places,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let rows = comptime![blueprint.rows];
    let width = comptime![blueprint.width];
    let loads = comptime![blueprint.loads];
    let vectors = comptime![(blueprint.head_dim / blueprint.width) as u32];
    let count = rows_in(list.list, numbers);
    // Lanes beyond the last vector of a key load that one again, with queries of 0.
    let vector = min(lane.part, vectors - 1u32);
    let mut tile = Tile {
        query: Array::new(comptime![rows * width]),
        out: Array::new(comptime![rows * width]),
        maximum: Array::new(1usize),
        sum: Array::new(1usize),
    };
    tile.maximum[0] = numbers.neg_inf;
    tile.sum[0] = 0.0f32;
    #[unroll]
    for row in 0..rows {
        let in_tile = min(comptime![row as u32], count - 1u32);
        let row_here = row_of(list.list, in_tile, places.kv_heads, routes, numbers, blueprint.routed);
        let from = offset(query_strides, list.batch, row_here.head, row_here.token)
            + vector * comptime![width as u32];
        #[unroll]
        for i in 0..width {
            let q = f32::cast_from(query[(from + comptime![i as u32]) as usize]) * numbers.scale;
            tile.query[row * width + i] = select(lane.part < vectors, q, 0.0f32);
            tile.out[row * width + i] = 0.0f32;
        }
    }
    let own =
        row_of(list.list, min(lane.row, count - 1u32), places.kv_heads, routes, numbers, blueprint.routed);
    let rule = rule_of(rules, own.route, list.first_position + own.token as i32);

    let mut next = piece.first;
    let end = piece.end;
    let mut at = Array::<u32>::new(loads);
    let mut k = Array::<Vector<E, N>>::new(loads);
    let mut v = Array::<Vector<E, N>>::new(loads);
    find(&mut at, list, next, end, lane, vector, tables, places, blueprint);
    load::<E, N>(&mut k, key, &at, loads);
    load::<E, N>(&mut v, value, &at, loads);
    while next < end {
        let mut products = products_of::<E, N>(&tile, &k, lane.part, blueprint);
        // Registers whose contents have been used take what comes next, so that memory always has something to do.
        let following = next + comptime![(loads * blueprint.keys_at_once()) as u32];
        if following < end {
            find(&mut at, list, following, end, lane, vector, tables, places, blueprint);
            load::<E, N>(&mut k, key, &at, loads);
        }
        // Where the rows of all lanes see all of the keys, nothing is masked.
        let lowest = position_of(list, next) as i32;
        let highest = position_of(list, following - 1u32) as i32;
        let whole = following <= end && next >= list.sinks;
        let beyond = lowest > rule.low || highest < rule.sinks;
        if plane_all(whole && beyond && highest <= rule.last && lowest >= rule.skip) {
            fold::<E, N>(
                &mut tile,
                &mut products,
                &v,
                list,
                next,
                end,
                lane,
                &rule,
                numbers,
                false,
                blueprint,
            );
        } else {
            fold::<E, N>(
                &mut tile,
                &mut products,
                &v,
                list,
                next,
                end,
                lane,
                &rule,
                numbers,
                true,
                blueprint,
            );
        }
        if following < end {
            load::<E, N>(&mut v, value, &at, loads);
        }
        next = following;
    }

    // Keys that lay side by side were summed apart.
    #[unroll]
    for step in 0..5usize {
        let mask = comptime![1usize << step];
        if comptime![mask >= blueprint.lanes] {
            #[unroll]
            for i in 0..comptime![rows * width] {
                tile.out[i] += plane_shuffle_xor(tile.out[i], comptime![mask as u32]);
            }
        }
    }
    let sum = sum_of_row(tile.sum[0], blueprint);
    let first_row = piece.slot * numbers.tile_rows;
    if lane.group == 0u32 {
        if lane.part < vectors {
            #[unroll]
            for row in 0..rows {
                if comptime![row as u32] < count {
                    let to = (first_row + comptime![row as u32]) * comptime![blueprint.head_dim as u32]
                        + lane.part * comptime![width as u32];
                    #[unroll]
                    for i in 0..width {
                        outs[(to + comptime![i as u32]) as usize] = tile.out[row * width + i];
                    }
                }
            }
        }
        // The first lane of every row.
        let first = lane.part % comptime![(blueprint.lanes / blueprint.rows) as u32] == 0u32;
        if first && lane.row < count {
            let at = ((first_row + lane.row) * 2u32) as usize;
            sums[at] = tile.maximum[0];
            sums[at + 1] = sum;
        }
    }
}

/// One plane, one worker.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(in crate::step) fn attend_kernel<E: Float, N: Size>(
    query: &[E],
    key: &[Vector<E, N>],
    value: &[Vector<E, N>],
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
    #[define(N)] _width: usize,
) {
    let worker = CUBE_POS_X * comptime![PLANES as u32] + UNIT_POS / PLANE;
    // The same for a whole plane.
    if worker >= numbers.workers {
        terminate!();
    }
    let lane = lane_of(blueprint);
    let share = share_of(starts[numbers.lists as usize], &numbers);
    let begin = worker * share;
    let end = min(begin + share, starts[numbers.lists as usize]);
    if begin < end {
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
                    attend_piece::<E, N>(
                        query,
                        key,
                        value,
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
}
