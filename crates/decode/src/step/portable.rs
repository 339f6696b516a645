//! The portable routine: one unit is one worker. What it sums lies in memory, which on CPUs is a cache; nothing but the
//! scores of a block of keys is in an array of its own, so shader compilers have little to unroll.

// In a kernel `%` is one instruction.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_core::device::launch::{elements, grid, words};
use cubecl::{client::Client, prelude::*};

use super::{
    DecodePlan, Step,
    pieces::{Costs, Cut, Piece, share_of},
    rows::{List, Numbers, Strides, list_at, offset, pool_row, position_of, row_of, rows_in},
    strides,
};
use crate::{
    cache::width,
    reaches::{Rule, rule_of},
    view::{CacheView, Places},
};

/// Keys whose scores are accumulated side by side, between two updates of the running maximum.
const BLOCK: usize = 8;

/// The compile-time key of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Blueprint {
    routed: bool,
    softcap: bool,
    /// Elements of a key that one load takes.
    width: usize,
}

/// Launches the kernel. Everything has been checked.
pub(super) fn launch(plan: &DecodePlan, client: &Client, cache: &CacheView<'_>, step: &Step<'_>) {
    let width = width([cache.key, cache.value]);
    let blueprint =
        Blueprint { routed: step.routes.is_some(), softcap: plan.problem.softcap.is_some(), width };
    let (cubes, units) = grid(client, plan.policy.workers);
    // SAFETY: the checks before keep every index inside its buffer: pages come from tables that were checked, chunks from
    // the plan, for as many of which there is room.
    unsafe {
        attend_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(step.query),
            elements(cache.key),
            elements(cache.value),
            words(cache.tables),
            words(cache.slots),
            plan.routes(step),
            words(step.reaches.rules()),
            words(&plan.needs),
            words(&plan.sums),
            words(&plan.outs),
            strides(step.query),
            plan.places(cache),
            plan.numbers(step),
            blueprint,
            plan.problem.element.into(),
            width,
        );
    }
}

/// A block of keys: where they are, and which the tile's piece still has.
#[derive(CubeType)]
struct Block {
    positions: Array<i32>,
    /// Rows of the pools.
    rows: Array<u32>,
    /// Keys beyond the piece's last stand for it again, and are not seen.
    live: Array<bool>,
}

/// Folds a block of keys into one row, whose sums begin at `at`.
#[cube]
fn fold<E: Float, N: Size>(
    query: &[E],
    key: &[Vector<E, N>],
    value: &[Vector<E, N>],
    sums: &mut [f32],
    outs: &mut [Vector<f32, N>],
    block: &Block,
    query_at: u32,
    at: u32,
    rule: &Rule,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let width = comptime![blueprint.width];
    let key_vectors = numbers.head_dim / comptime![width as u32];
    let value_vectors = numbers.value_dim / comptime![width as u32];
    let mut products = Array::<Vector<f32, N>>::new(BLOCK);
    #[unroll]
    for x in 0..BLOCK {
        products[x] = Vector::new(0.0f32);
    }
    for d in 0..key_vectors {
        let mut q = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for i in 0..width {
            let element = query[(query_at + d * comptime![width as u32] + comptime![i as u32]) as usize];
            q.insert(i, f32::cast_from(element) * numbers.scale);
        }
        #[unroll]
        for x in 0..BLOCK {
            let k = Vector::<f32, N>::cast_from(key[(block.rows[x] * key_vectors + d) as usize]);
            products[x] = fma(q, k, products[x]);
        }
    }

    let mut weights = Array::<f32>::new(BLOCK);
    let mut seen = Array::<bool>::new(BLOCK);
    let before = sums[(at * 2u32) as usize];
    let mut maximum = before;
    #[unroll]
    for x in 0..BLOCK {
        let mut score = 0.0f32;
        #[unroll]
        for i in 0..width {
            score += products[x].extract(i);
        }
        if comptime![blueprint.softcap] {
            score = numbers.softcap * (score / numbers.softcap).tanh();
        }
        let sees = block.live[x] && rule.sees(block.positions[x]);
        seen[x] = sees;
        weights[x] = select(sees, score, numbers.neg_inf);
        maximum = max(maximum, weights[x]);
    }
    // A row that has seen no key keeps a finite offset, so that its weights become exp(-inf) = 0.
    let offset = select(maximum == numbers.neg_inf, 0.0f32, maximum);
    let correction = (before - offset).exp();
    let mut sum = sums[(at * 2u32 + 1u32) as usize] * correction;
    #[unroll]
    for x in 0..BLOCK {
        weights[x] = (weights[x] - offset).exp();
        sum += weights[x];
    }
    sums[(at * 2u32) as usize] = maximum;
    sums[(at * 2u32 + 1u32) as usize] = sum;

    for d in 0..value_vectors {
        let to = (at * value_vectors + d) as usize;
        let mut acc = outs[to] * Vector::new(correction);
        #[unroll]
        for x in 0..BLOCK {
            let v = Vector::<f32, N>::cast_from(value[(block.rows[x] * value_vectors + d) as usize]);
            // A key that the row does not see cannot touch it, NaN or not.
            acc = select(seen[x], fma(Vector::new(weights[x]), v, acc), acc);
        }
        outs[to] = acc;
    }
}

/// Attends one piece of a list's keys: block by block, each for all rows of the tile.
#[cube]
fn attend_piece<E: Float, N: Size>(
    query: &[E],
    key: &[Vector<E, N>],
    value: &[Vector<E, N>],
    tables: &[u32],
    routes: &[u32],
    rules: &[i32],
    sums: &mut [f32],
    outs: &mut [Vector<f32, N>],
    list: &List,
    piece: &Piece,
    query_strides: &Strides,
    places: &Places,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) {
    let rows = rows_in(list.list, numbers);
    let first_row = piece.slot * numbers.tile_rows;
    let value_vectors = numbers.value_dim / comptime![blueprint.width as u32];
    for at in first_row..first_row + rows {
        sums[(at * 2u32) as usize] = numbers.neg_inf;
        sums[(at * 2u32 + 1u32) as usize] = 0.0f32;
        for d in 0..value_vectors {
            outs[(at * value_vectors + d) as usize] = Vector::new(0.0f32);
        }
    }
    let mut next = piece.first;
    let end = piece.end;
    while next < end {
        let mut block =
            Block { positions: Array::new(BLOCK), rows: Array::new(BLOCK), live: Array::new(BLOCK) };
        #[unroll]
        for x in 0..BLOCK {
            let n = min(next + comptime![x as u32], end - 1u32);
            block.positions[x] = position_of(list, n) as i32;
            block.rows[x] = pool_row(list, n, tables, places);
            block.live[x] = next + comptime![x as u32] < end;
        }
        for in_tile in 0..rows {
            let row = row_of(list.list, in_tile, places.kv_heads, routes, numbers, blueprint.routed);
            let rule = rule_of(rules, row.route, list.first_position + row.token as i32);
            let query_at = offset(query_strides, list.batch, row.head, row.token);
            let at = first_row + in_tile;
            fold::<E, N>(query, key, value, sums, outs, &block, query_at, at, &rule, numbers, blueprint);
        }
        next += comptime![BLOCK as u32];
    }
}

/// One unit, one worker.
#[cube(launch_unchecked)]
pub(super) fn attend_kernel<E: Float, N: Size>(
    query: &[E],
    key: &[Vector<E, N>],
    value: &[Vector<E, N>],
    tables: &[u32],
    slots: &[u32],
    routes: &[u32],
    rules: &[i32],
    needs: &[u32],
    sums: &mut [f32],
    outs: &mut [Vector<f32, N>],
    query_strides: Strides,
    places: Places,
    numbers: Numbers,
    #[comptime] blueprint: Blueprint,
    #[define(E)] _element: ElemType,
    #[define(N)] _width: usize,
) {
    if ABSOLUTE_POS >= numbers.workers as usize {
        terminate!();
    }
    let mut total = 0u32;
    for list in 0..numbers.lists {
        total += needs[(list * 4u32 + 3u32) as usize];
    }
    let worker = ABSOLUTE_POS as u32;
    let share = share_of(total, &numbers);
    let mut before = 0u32;
    for number in 0..numbers.lists {
        let after = before + needs[(number * 4u32 + 3u32) as usize];
        if before < (worker + 1u32) * share && after > worker * share {
            let list = list_at(number, needs, tables, slots, &places, &numbers);
            let costs = Costs { list: number, before, after, keys: list.keys, share };
            let pieces = costs.pieces_of_worker(worker, &numbers, Cut::Chunks);
            for chunk in pieces.first..pieces.end {
                let piece = costs.piece(chunk, &numbers, Cut::Chunks);
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
                    &query_strides,
                    &places,
                    &numbers,
                    blueprint,
                );
            }
        }
        before = after;
    }
}
