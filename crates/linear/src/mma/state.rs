//! The state of a chunk as a cube's warps hold it: each has the sums of some features, of all columns, in f32. A thread has of
//! every 16 features two rows and of every 8 columns two numbers, as products leave them.

// In a kernel `%` is one instruction, and `is_multiple_of` is not there.
#![allow(clippy::manual_is_multiple_of)]

use bifocal_tensor_core::{
    Operand, PANEL, SWIZZLE, across, down,
    ptx::{
        load_pair, load_shared_four, load_transposed, pack, product, shared_address, store_pair,
        store_shared_word,
    },
    swizzled,
};
use cubecl::prelude::*;

use super::blueprint::{Blueprint, STEP, WARPS};

/// The bytes of `count` columns.
const fn bytes(count: usize) -> u32 {
    2 * count as u32
}

/// A thread's part of a state.
#[derive(CubeType)]
pub(super) struct Sums {
    /// Block of 16 features by block of 8 columns.
    pub(super) blocks: Array<Vector<f32, Const<4>>>,
}

#[cube]
impl Sums {
    /// The sum of nothing.
    pub(super) fn new(#[comptime] blueprint: Blueprint) -> Sums {
        let count = comptime![blueprint.state_blocks()[0] * blueprint.state_blocks()[1]];
        let mut blocks = Array::<Vector<f32, Const<4>>>::new(count);
        #[unroll]
        for i in 0..count {
            blocks[i] = Vector::new(0.0f32);
        }
        Sums { blocks }
    }

    /// Adds `phi(k)^T v` of the keys of a step, whose features and values are in shared memory.
    pub(super) fn add_keys(&mut self, features: u32, values: u32, #[comptime] blueprint: Blueprint) {
        let element = comptime![blueprint.operand.name()];
        let lane = UNIT_POS % 32u32;
        let rows = comptime![blueprint.state_blocks()[0]];
        let columns = comptime![blueprint.state_blocks()[1]];
        let panel_bytes = comptime![(blueprint.tokens * SWIZZLE) as u32];
        // Both lie key by key: features are the rows of the product and are transposed on the way, values are its columns.
        let first = UNIT_POS / 32u32 * comptime![blueprint.warp_features() as u32];
        let panel = first / comptime![PANEL as u32];
        let flip = first % comptime![PANEL as u32] * 2u32;
        let feature_at = features + panel * panel_bytes + (down(lane) ^ flip);
        let value_at = values + across(lane);
        for step in 0..comptime![(blueprint.tokens / STEP) as u32] {
            let further = step * comptime![(STEP * SWIZZLE) as u32];
            let mut turned = Array::<Vector<u32, Const<4>>>::new(rows);
            #[unroll]
            for row in 0..rows {
                turned[row] = load_transposed((feature_at ^ comptime![bytes(row * 16)]) + further);
            }
            #[unroll]
            for pair in 0..comptime![columns / 2] {
                let at = (value_at ^ comptime![bytes(pair * 16 % PANEL)]) + further;
                let value = load_transposed(at + comptime![(pair * 16 / PANEL) as u32] * panel_bytes);
                #[unroll]
                for row in 0..rows {
                    let a = turned[row];
                    #[unroll]
                    for half in 0..2usize {
                        let at = comptime![row * columns + pair * 2 + half];
                        self.blocks[at] = product(
                            self.blocks[at],
                            a.extract(0usize),
                            a.extract(1usize),
                            a.extract(2usize),
                            a.extract(3usize),
                            value.extract(comptime![2 * half]),
                            value.extract(comptime![2 * half + 1]),
                            element,
                        );
                    }
                }
            }
        }
    }

    /// Takes the state that begins at `base`, in numbers.
    pub(super) fn load(&mut self, states: u64, base: u32, #[comptime] blueprint: Blueprint) {
        let rows = comptime![blueprint.state_blocks()[0]];
        let columns = comptime![blueprint.state_blocks()[1]];
        let at = states + (base + first_number(blueprint)) as u64 * 4u64;
        #[unroll]
        for row in 0..rows {
            #[unroll]
            for column in 0..columns {
                let upper = load_pair(at + comptime![((row * 16 * blueprint.dim + column * 8) * 4) as u64]);
                let lower =
                    load_pair(at + comptime![(((row * 16 + 8) * blueprint.dim + column * 8) * 4) as u64]);
                let mut block = Vector::<f32, Const<4>>::new(0.0f32);
                block.insert(0usize, upper.extract(0usize));
                block.insert(1usize, upper.extract(1usize));
                block.insert(2usize, lower.extract(0usize));
                block.insert(3usize, lower.extract(1usize));
                self.blocks[comptime![row * columns + column]] = block;
            }
        }
    }

    /// Writes the state from `base` on, in numbers.
    pub(super) fn store(&self, states: u64, base: u32, #[comptime] blueprint: Blueprint) {
        let rows = comptime![blueprint.state_blocks()[0]];
        let columns = comptime![blueprint.state_blocks()[1]];
        let at = states + (base + first_number(blueprint)) as u64 * 4u64;
        #[unroll]
        for row in 0..rows {
            #[unroll]
            for column in 0..columns {
                let block = self.blocks[comptime![row * columns + column]];
                store_pair(
                    at + comptime![((row * 16 * blueprint.dim + column * 8) * 4) as u64],
                    block.extract(0usize),
                    block.extract(1usize),
                );
                store_pair(
                    at + comptime![(((row * 16 + 8) * blueprint.dim + column * 8) * 4) as u64],
                    block.extract(2usize),
                    block.extract(3usize),
                );
            }
        }
    }

    /// Rounds the state to shared memory, feature by feature, where products read it. Gives what they are to be multiplied by:
    /// sums leave what f16 holds sooner than their terms do, and are scaled by a power of two.
    pub(super) fn publish(&self, room: &[u32], #[comptime] blueprint: Blueprint) -> f32 {
        let operand = comptime![blueprint.operand];
        let rows = comptime![blueprint.state_blocks()[0]];
        let columns = comptime![blueprint.state_blocks()[1]];
        let lane = UNIT_POS % 32u32;
        let start = shared_address(room);
        let mut scale = f32::new(1.0);
        let mut descale = f32::new(1.0);
        if comptime![operand == Operand::F16] {
            let largest = self.largest(start + comptime![blueprint.maxima_at()], blueprint);
            // Brought to 2^14 or a little more.
            let power = u32::reinterpret(largest) / 8388608u32;
            if largest > 0.0f32 {
                let power = clamp_power(power);
                scale = f32::reinterpret((268u32 - power) * 8388608u32);
                descale = f32::reinterpret((power - 14u32) * 8388608u32);
            }
        }
        let row = lane / 4u32;
        let first = UNIT_POS / 32u32 * comptime![blueprint.warp_features() as u32] + row;
        let at = start + comptime![blueprint.state_at()] + first * comptime![SWIZZLE as u32];
        let at = at + swizzled(row, 0u32) + lane % 4u32 * 4u32;
        #[unroll]
        for row in 0..rows {
            #[unroll]
            for column in 0..columns {
                let block = self.blocks[comptime![row * columns + column]];
                let panel = comptime![column * 8 / PANEL * blueprint.features()];
                let to = at ^ comptime![bytes(column * 8 % PANEL)];
                let upper = pack(block.extract(0usize) * scale, block.extract(1usize) * scale, operand);
                let lower = pack(block.extract(2usize) * scale, block.extract(3usize) * scale, operand);
                store_shared_word(to + comptime![((panel + row * 16) * SWIZZLE) as u32], upper);
                store_shared_word(to + comptime![((panel + row * 16 + 8) * SWIZZLE) as u32], lower);
            }
        }
        descale
    }

    /// The largest finite number of the whole state, which all threads find out together.
    fn largest(&self, maxima: u32, #[comptime] blueprint: Blueprint) -> f32 {
        let count = comptime![blueprint.state_blocks()[0] * blueprint.state_blocks()[1]];
        let mut largest = f32::new(0.0);
        #[unroll]
        for i in 0..count {
            let block = self.blocks[i];
            #[unroll]
            for j in 0..4usize {
                let size = block.extract(j).abs();
                largest = max(largest, select(size <= f32::MAX, size, 0.0f32));
            }
        }
        let largest = plane_max(largest);
        if UNIT_POS % 32u32 == 0u32 {
            store_shared_word(maxima + UNIT_POS / 8u32, u32::reinterpret(largest));
        }
        sync_cube();
        let mut all = largest;
        #[unroll]
        for i in 0..comptime![WARPS / 4] {
            let four = load_shared_four(maxima + comptime![16 * i as u32]);
            #[unroll]
            for j in 0..4usize {
                all = max(all, four.extract(j));
            }
        }
        all
    }
}

/// The exponent of a largest number, as f32 has it, as far as its scale and what undoes it are numbers of their own.
#[cube]
fn clamp_power(power: u32) -> u32 {
    min(max(power, 15u32), 254u32)
}

/// The first of a thread's numbers in a state.
#[cube]
fn first_number(#[comptime] blueprint: Blueprint) -> u32 {
    let lane = UNIT_POS % 32u32;
    let feature = UNIT_POS / 32u32 * comptime![blueprint.warp_features() as u32] + lane / 4u32;
    feature * comptime![blueprint.dim as u32] + lane % 4u32 * 2u32
}
