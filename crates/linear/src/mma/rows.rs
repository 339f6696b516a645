//! The rows of a tile: packed queries of a kv head, token by token, and their outputs.

// In a kernel `%` is one instruction and `is_multiple_of` is not there; an `if` on compile-time values stays apart from
// one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_tensor_core::{
    Operand, PANEL, SWIZZLE, across, down,
    ptx::{
        is_odd, load_matrices, load_shared_word, load_transposed, pack, product_of, store_8, store_pair,
        store_shared_word, unpack,
    },
    queries::Queries,
    swizzled,
};
use cubecl::prelude::*;

use super::blueprint::{Blueprint, STEP, WARP_ROWS};
use crate::portable::{Strides, offset};

/// Blocks of 16 rows that a warp has.
const BLOCKS: usize = WARP_ROWS / 16;

/// The outputs of a warp: 32 rows, some columns. Warps are numbered row group by row group.
#[derive(CubeType)]
pub(super) struct Rows {
    /// Block of 16 rows by block of 8 columns.
    blocks: Array<Vector<f32, Const<4>>>,
    /// The first row of the tile.
    first: u32,
    /// Which of the warps of these rows this is.
    column_group: u32,
}

#[cube]
impl Rows {
    pub(super) fn new(#[comptime] blueprint: Blueprint) -> Rows {
        let count = comptime![BLOCKS * blueprint.columns() / 8];
        let mut blocks = Array::<Vector<f32, Const<4>>>::new(count);
        #[unroll]
        for i in 0..count {
            blocks[i] = Vector::new(0.0f32);
        }
        let warp = UNIT_POS / 32u32;
        let row_groups = comptime![blueprint.row_groups() as u32];
        let first = warp % row_groups * comptime![WARP_ROWS as u32];
        Rows { blocks, first, column_group: warp / row_groups }
    }

    /// Where the warp's columns are in a tile of values or the state: a lane's address in its first 16 rows. Columns further
    /// on flip bits of it, panels are added.
    fn columns_at(&self, tile: u32, #[comptime] tile_rows: usize, #[comptime] blueprint: Blueprint) -> u32 {
        let first = self.column_group * comptime![blueprint.columns() as u32];
        let panel = first / comptime![PANEL as u32] * comptime![(tile_rows * SWIZZLE) as u32];
        tile + panel + (across(UNIT_POS % 32u32) ^ (first % comptime![PANEL as u32] * 2u32))
    }

    /// Computes `phi(q) S`, times `descale`, and writes what the rows' keys of the step weigh to shared memory, 0 where a row
    /// does not meet a key. Of the warps of a row group as many have 16 keys each as there are.
    pub(super) fn add_state(
        &mut self,
        tile: u32,
        start: u32,
        descale: f32,
        queries: &Queries,
        #[comptime] blueprint: Blueprint,
    ) {
        let element = comptime![blueprint.operand.name()];
        let lane = UNIT_POS % 32u32;
        let columns = comptime![blueprint.columns() / 8];
        let query_at = start
            + comptime![blueprint.query_features_at()]
            + self.first * comptime![SWIZZLE as u32]
            + across(lane);
        let state_at = self.columns_at(
            start + comptime![blueprint.state_at()],
            comptime![blueprint.features()],
            blueprint,
        );
        let weighs = self.column_group < comptime![(blueprint.tokens / STEP) as u32];
        let key_at = start + self.column_group * comptime![(STEP * SWIZZLE) as u32] + down(lane);
        let mut weights = Array::<Vector<f32, Const<4>>>::new(comptime![BLOCKS * 2]);
        #[unroll]
        for i in 0..comptime![BLOCKS * 2] {
            weights[i] = Vector::new(0.0f32);
        }
        for step in 0..comptime![(blueprint.features() / STEP) as u32] {
            let panel = step / comptime![(PANEL / STEP) as u32];
            let flip = step % comptime![(PANEL / STEP) as u32] * comptime![2 * STEP as u32];
            let mut features = Array::<Vector<u32, Const<4>>>::new(BLOCKS);
            #[unroll]
            for block in 0..BLOCKS {
                features[block] = load_matrices(
                    (query_at ^ flip)
                        + panel * comptime![(blueprint.rows * SWIZZLE) as u32]
                        + comptime![(block * 16 * SWIZZLE) as u32],
                );
            }
            let rows = step * comptime![(STEP * SWIZZLE) as u32];
            #[unroll]
            for pair in 0..comptime![columns / 2] {
                let state = load_transposed((state_at ^ comptime![pair as u32 * 32]) + rows);
                multiply_pair(&mut self.blocks, &features, state, pair, columns, element);
            }
            if weighs {
                let panel = panel * comptime![(blueprint.tokens * SWIZZLE) as u32];
                let key = load_matrices((key_at ^ flip) + panel);
                multiply_pair(&mut weights, &features, key, 0usize, 2usize, element);
            }
        }
        if comptime![blueprint.operand == Operand::F16] {
            #[unroll]
            for i in 0..comptime![BLOCKS * columns] {
                self.blocks[i] *= Vector::new(descale);
            }
        }
        if weighs {
            self.note_weights(&weights, tile, start, queries, blueprint);
        }
    }

    fn note_weights(
        &self,
        weights: &Array<Vector<f32, Const<4>>>,
        tile: u32,
        start: u32,
        queries: &Queries,
        #[comptime] blueprint: Blueprint,
    ) {
        let lane = UNIT_POS % 32u32;
        #[unroll]
        for row in 0..comptime![2 * BLOCKS] {
            let at = self.first + lane / 4u32 + comptime![row as u32 * 8];
            let last = (tile * comptime![blueprint.rows as u32] + at) / queries.group;
            #[unroll]
            for eight in 0..2usize {
                let weight = weights[comptime![row / 2 * 2 + eight]];
                let column = self.column_group * 2u32 + comptime![eight as u32];
                let key = column * 8u32 + lane % 4u32 * 2u32;
                // What a row does not meet cannot touch it, NaN or not.
                let near = select(key <= last, weight.extract(comptime![row % 2 * 2]), 0.0f32);
                let far = select(key < last, weight.extract(comptime![row % 2 * 2 + 1]), 0.0f32);
                store_shared_word(
                    start
                        + comptime![blueprint.weights_at()]
                        + at * comptime![SWIZZLE as u32]
                        + swizzled(at, column)
                        + lane % 4u32 * 4u32,
                    pack(near, far, comptime![blueprint.operand]),
                );
            }
        }
    }

    /// Adds the values of the step's keys as the rows weigh them.
    pub(super) fn add_keys(
        &mut self,
        tile: u32,
        values: u32,
        start: u32,
        queries: &Queries,
        #[comptime] blueprint: Blueprint,
    ) {
        let element = comptime![blueprint.operand.name()];
        let columns = comptime![blueprint.columns() / 8];
        let value_at = self.columns_at(values, comptime![blueprint.tokens], blueprint);
        let weights = start + comptime![blueprint.weights_at()] + self.first * comptime![SWIZZLE as u32];
        // A product takes every key of the step, and 0 x NaN is NaN: a value that is not finite would spoil rows that do not
        // meet it.
        let mut odd = 0u32;
        #[unroll]
        for step in 0..comptime![blueprint.tokens / STEP] {
            #[unroll]
            for pair in 0..comptime![columns / 2] {
                let value = load_transposed(
                    (value_at ^ comptime![pair as u32 * 32]) + comptime![(step * STEP * SWIZZLE) as u32],
                );
                #[unroll]
                for i in 0..4usize {
                    odd |= select(is_odd(value.extract(i), comptime![blueprint.operand]), 1u32, 0u32);
                }
            }
        }
        if plane_any(odd > 0u32) {
            self.add_odd_keys(tile, values, weights, queries, blueprint);
        } else {
            let weight_at = weights + across(UNIT_POS % 32u32);
            #[unroll]
            for step in 0..comptime![blueprint.tokens / STEP] {
                let mut weights = Array::<Vector<u32, Const<4>>>::new(BLOCKS);
                #[unroll]
                for block in 0..BLOCKS {
                    weights[block] = load_matrices(
                        (weight_at ^ comptime![step as u32 * 32]) + comptime![(block * 16 * SWIZZLE) as u32],
                    );
                }
                #[unroll]
                for pair in 0..comptime![columns / 2] {
                    let value = load_transposed(
                        (value_at ^ comptime![pair as u32 * 32]) + comptime![(step * STEP * SWIZZLE) as u32],
                    );
                    multiply_pair(&mut self.blocks, &weights, value, pair, columns, element);
                }
            }
        }
    }

    /// The same key by key, in plain arithmetic: rare, so that all it has to be is right.
    fn add_odd_keys(
        &mut self,
        tile: u32,
        values: u32,
        weights: u32,
        queries: &Queries,
        #[comptime] blueprint: Blueprint,
    ) {
        let operand = comptime![blueprint.operand];
        let columns = comptime![blueprint.columns() / 8];
        let lane = UNIT_POS % 32u32;
        let packed = tile * comptime![blueprint.rows as u32] + self.first + lane / 4u32;
        let first_column = self.column_group * comptime![blueprint.columns() as u32];
        for key in 0..comptime![blueprint.tokens as u32] {
            let mut mine = Array::<f32>::new(comptime![2 * BLOCKS]);
            #[unroll]
            for row in 0..comptime![2 * BLOCKS] {
                let at = lane / 4u32 + comptime![row as u32 * 8];
                let word = load_shared_word(
                    weights
                        + at * comptime![SWIZZLE as u32]
                        + swizzled(at, key / 8u32)
                        + key % 8u32 / 2u32 * 4u32,
                );
                let pair = unpack(word, operand);
                mine[row] = select(key % 2u32 == 0u32, pair.extract(0usize), pair.extract(1usize));
            }
            #[unroll]
            for column in 0..columns {
                let at = first_column + comptime![column as u32 * 8];
                let word = load_shared_word(
                    values
                        + (at / comptime![PANEL as u32] * comptime![blueprint.tokens as u32] + key)
                            * comptime![SWIZZLE as u32]
                        + swizzled(key, at / 8u32)
                        + lane % 4u32 * 4u32,
                );
                let pair = unpack(word, operand);
                #[unroll]
                for row in 0..comptime![2 * BLOCKS] {
                    let meets = key <= (packed + comptime![row as u32 * 8]) / queries.group;
                    let at = comptime![row / 2 * columns + column];
                    let mut block = self.blocks[at];
                    #[unroll]
                    for i in 0..2usize {
                        let old = block.extract(comptime![row % 2 * 2 + i]);
                        let new = fma(mine[row], pair.extract(i), old);
                        block.insert(comptime![row % 2 * 2 + i], select(meets, new, old));
                    }
                    self.blocks[at] = block;
                }
            }
        }
    }

    /// Writes the outputs, those of the first head and token 0 to `target`; where rows have marks, from `first_mark` on, those
    /// that are marked, and `nan` for those without a valid route.
    pub(super) fn store(
        &self,
        step: u32,
        tile: u32,
        target: u64,
        queries: &Queries,
        strides: &Strides,
        marks: &[u32],
        first_mark: u32,
        nan: f32,
        #[comptime] blueprint: Blueprint,
    ) {
        let columns = comptime![blueprint.columns() / 8];
        let lane = UNIT_POS % 32u32;
        let first = self.column_group * comptime![blueprint.columns() as u32];
        #[unroll]
        for row in 0..comptime![2 * BLOCKS] {
            let at = self.first + lane / 4u32 + comptime![row as u32 * 8];
            let to = queries.row(step, tile, at, comptime![blueprint.queries()]);
            let begin = offset(strides, 0u32, to.head, to.token) as u32 + first;
            let mut mark = 1u32;
            if comptime![blueprint.marked] {
                mark = marks[(first_mark + to.token * queries.group + to.head) as usize];
            }
            let there = to.there && mark > 0u32;
            let spoil = select(mark == 2u32, nan, 0.0f32);
            #[unroll]
            for pair in 0..comptime![columns / 2] {
                let mut left = self.blocks[comptime![row / 2 * columns + pair * 2]];
                let mut right = self.blocks[comptime![row / 2 * columns + pair * 2 + 1]];
                if comptime![blueprint.marked] {
                    left += Vector::new(spoil);
                    right += Vector::new(spoil);
                }
                let at = comptime![row % 2 * 2];
                if comptime![blueprint.out_f32] {
                    let target =
                        target + (begin + lane % 4u32 * 2u32 + comptime![pair as u32 * 16]) as u64 * 4u64;
                    if there {
                        store_pair(target, left.extract(at), left.extract(comptime![at + 1]));
                        store_pair(target + 32u64, right.extract(at), right.extract(comptime![at + 1]));
                    }
                } else {
                    // Two neighbours trade, so that each has four columns of one block: 32 bytes per row at once.
                    let operand = comptime![blueprint.operand];
                    let near = pack(left.extract(at), left.extract(comptime![at + 1]), operand);
                    let far = pack(right.extract(at), right.extract(comptime![at + 1]), operand);
                    let odd = lane % 2u32 == 1u32;
                    let other = plane_shuffle_xor(select(odd, near, far), 1u32);
                    let column = lane % 2u32 * 8u32 + lane % 4u32 / 2u32 * 4u32;
                    let target = target + (begin + column + comptime![pair as u32 * 16]) as u64 * 2u64;
                    if there {
                        store_8(target, select(odd, other, near), select(odd, far, other));
                    }
                }
            }
        }
    }
}

/// Adds the products of a warp's rows and the `pair`-th 16 of `columns` blocks of columns.
#[cube]
fn multiply_pair(
    blocks: &mut Array<Vector<f32, Const<4>>>,
    rows: &Array<Vector<u32, Const<4>>>,
    right: Vector<u32, Const<4>>,
    #[comptime] pair: usize,
    #[comptime] columns: usize,
    #[comptime] element: &'static str,
) {
    #[unroll]
    for block in 0..BLOCKS {
        let a = rows[block];
        #[unroll]
        for half in 0..2usize {
            let at = comptime![block * columns + pair * 2 + half];
            blocks[at] = product_of(blocks[at], a, right, half, element);
        }
    }
}
