//! A matrix that is summed up over keys, `sum_j x_j^T y_j`, as the warps of a cube hold it: each has some rows, of all
//! columns, in f32. A thread has of every 16 rows two and of every 8 columns two numbers, as products leave them.

use cubecl::prelude::*;

use crate::{
    Operand, PANEL, SWIZZLE, across, down,
    ptx::{
        load_pair, load_shared_four, load_transposed, pack, product_of, store_pair, store_shared_word, unpack,
    },
    swizzled,
};

/// Depth of a product.
const STEP: usize = 16;

/// What a matrix of sums is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SumsShape {
    /// The type of what is multiplied.
    pub operand: Operand,
    /// Length of x, a multiple of 16 per warp.
    pub rows: usize,
    /// Length of y, a multiple of 64.
    pub columns: usize,
    /// Keys that are added at once, a multiple of 16.
    pub keys: usize,
    /// Warps of the cube, a multiple of 4.
    pub warps: usize,
}

impl SumsShape {
    /// Rows that a warp holds.
    pub const fn warp_rows(self) -> usize {
        self.rows / self.warps
    }

    /// Blocks of 16 of them, and of 8 columns.
    const fn blocks(self) -> [usize; 2] {
        [self.warp_rows() / 16, self.columns / 8]
    }

    /// Bytes of the rounded matrix.
    pub const fn bytes(self) -> u32 {
        (self.rows * self.columns.div_ceil(PANEL) * SWIZZLE) as u32
    }
}

/// The bytes of `count` columns.
const fn bytes(count: usize) -> u32 {
    2 * count as u32
}

/// A thread's part.
#[derive(CubeType)]
pub struct Sums {
    /// Block of 16 rows by block of 8 columns.
    pub blocks: Array<Vector<f32, Const<4>>>,
}

#[cube]
impl Sums {
    /// The sum of nothing.
    pub fn new(#[comptime] shape: SumsShape) -> Sums {
        let count = comptime![shape.blocks()[0] * shape.blocks()[1]];
        let mut blocks = Array::<Vector<f32, Const<4>>>::new(count);
        #[unroll]
        for i in 0..count {
            blocks[i] = Vector::new(0.0f32);
        }
        Sums { blocks }
    }

    /// Adds `x_j^T y_j` of as many keys as the shape says, whose x and y are tiles in shared memory, key by key.
    pub fn add_keys(&mut self, left: u32, right: u32, #[comptime] shape: SumsShape) {
        let element = comptime![shape.operand.name()];
        let lane = UNIT_POS % 32u32;
        let rows = comptime![shape.blocks()[0]];
        let columns = comptime![shape.blocks()[1]];
        let panel_bytes = comptime![(shape.keys * SWIZZLE) as u32];
        // Keys are the depth of the product: x is transposed on the way.
        let first = UNIT_POS / 32u32 * comptime![shape.warp_rows() as u32];
        let panel = first / comptime![PANEL as u32];
        let flip = first % comptime![PANEL as u32] * 2u32;
        let left_at = left + panel * panel_bytes + (down(lane) ^ flip);
        let right_at = right + across(lane);
        for step in 0..comptime![(shape.keys / STEP) as u32] {
            let further = step * comptime![(STEP * SWIZZLE) as u32];
            let mut turned = Array::<Vector<u32, Const<4>>>::new(rows);
            #[unroll]
            for row in 0..rows {
                turned[row] = load_transposed((left_at ^ comptime![bytes(row * 16)]) + further);
            }
            #[unroll]
            for pair in 0..comptime![columns / 2] {
                let at = (right_at ^ comptime![bytes(pair * 16 % PANEL)]) + further;
                let value = load_transposed(at + comptime![(pair * 16 / PANEL) as u32] * panel_bytes);
                #[unroll]
                for row in 0..rows {
                    let a = turned[row];
                    #[unroll]
                    for half in 0..2usize {
                        let at = comptime![row * columns + pair * 2 + half];
                        self.blocks[at] = product_of(self.blocks[at], a, value, half, element);
                    }
                }
            }
        }
    }

    /// Takes the matrix that begins at `base`, in numbers, of `matrices`.
    pub fn load(&mut self, matrices: u64, base: u32, #[comptime] shape: SumsShape) {
        let rows = comptime![shape.blocks()[0]];
        let columns = comptime![shape.blocks()[1]];
        let at = matrices + (base + first_number(shape)) as u64 * 4u64;
        #[unroll]
        for row in 0..rows {
            #[unroll]
            for column in 0..columns {
                let upper = load_pair(at + comptime![((row * 16 * shape.columns + column * 8) * 4) as u64]);
                let lower =
                    load_pair(at + comptime![(((row * 16 + 8) * shape.columns + column * 8) * 4) as u64]);
                let mut block = Vector::<f32, Const<4>>::new(0.0f32);
                block.insert(0usize, upper.extract(0usize));
                block.insert(1usize, upper.extract(1usize));
                block.insert(2usize, lower.extract(0usize));
                block.insert(3usize, lower.extract(1usize));
                self.blocks[comptime![row * columns + column]] = block;
            }
        }
    }

    /// Writes the matrix from `base` on, in numbers, to `matrices`.
    pub fn store(&self, matrices: u64, base: u32, #[comptime] shape: SumsShape) {
        let rows = comptime![shape.blocks()[0]];
        let columns = comptime![shape.blocks()[1]];
        let at = matrices + (base + first_number(shape)) as u64 * 4u64;
        #[unroll]
        for row in 0..rows {
            #[unroll]
            for column in 0..columns {
                let block = self.blocks[comptime![row * columns + column]];
                store_pair(
                    at + comptime![((row * 16 * shape.columns + column * 8) * 4) as u64],
                    block.extract(0usize),
                    block.extract(1usize),
                );
                store_pair(
                    at + comptime![(((row * 16 + 8) * shape.columns + column * 8) * 4) as u64],
                    block.extract(2usize),
                    block.extract(3usize),
                );
            }
        }
    }

    /// Rounds the matrix to shared memory, row by row, as a tile at `room` for products to read; of two `parts` the second, behind
    /// the first, is what rounding took away. Gives what products are to be multiplied by: sums leave what f16 holds sooner than
    /// their terms do, and are scaled by a power of two. `maxima` has room for a number per warp; only f16 needs it.
    ///
    /// Of f16 all threads of the cube have to come here together.
    pub fn publish(
        &self,
        room: u32,
        maxima: u32,
        #[comptime] parts: usize,
        #[comptime] shape: SumsShape,
    ) -> f32 {
        let operand = comptime![shape.operand];
        let rows = comptime![shape.blocks()[0]];
        let columns = comptime![shape.blocks()[1]];
        let lane = UNIT_POS % 32u32;
        let mut scale = f32::new(1.0);
        let mut descale = f32::new(1.0);
        if comptime![operand == Operand::F16] {
            let largest = self.largest(maxima, shape);
            if largest > 0.0f32 {
                // The exponent as f32 has it, as far as scale and descale are numbers of their own. The largest comes to 2^14.
                let power = min(max(u32::reinterpret(largest) / 8388608u32, 15u32), 254u32);
                scale = f32::reinterpret((268u32 - power) * 8388608u32);
                descale = f32::reinterpret((power - 14u32) * 8388608u32);
            }
        }
        let row = lane / 4u32;
        let first = UNIT_POS / 32u32 * comptime![shape.warp_rows() as u32] + row;
        let at = room + first * comptime![SWIZZLE as u32] + swizzled(row, 0u32) + lane % 4u32 * 4u32;
        #[unroll]
        for row in 0..rows {
            #[unroll]
            for column in 0..columns {
                let block = self.blocks[comptime![row * columns + column]];
                let panel = comptime![column * 8 / PANEL * shape.rows];
                #[unroll]
                for half in 0..2usize {
                    let to = (at ^ comptime![bytes(column * 8 % PANEL)])
                        + comptime![((panel + row * 16 + half * 8) * SWIZZLE) as u32];
                    let near = block.extract(comptime![half * 2]) * scale;
                    let far = block.extract(comptime![half * 2 + 1]) * scale;
                    let word = pack(near, far, operand);
                    store_shared_word(to, word);
                    if comptime![parts == 2] {
                        let rounded = unpack(word, operand);
                        let near = near - rounded.extract(0usize);
                        let far = far - rounded.extract(1usize);
                        store_shared_word(to + comptime![shape.bytes()], pack(near, far, operand));
                    }
                }
            }
        }
        descale
    }

    /// The largest finite number of the whole matrix, which all threads find out together.
    fn largest(&self, maxima: u32, #[comptime] shape: SumsShape) -> f32 {
        let count = comptime![shape.blocks()[0] * shape.blocks()[1]];
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
        for i in 0..comptime![shape.warps / 4] {
            let four = load_shared_four(maxima + comptime![16 * i as u32]);
            #[unroll]
            for j in 0..4usize {
                all = max(all, four.extract(j));
            }
        }
        all
    }
}

/// The first of a thread's numbers.
#[cube]
fn first_number(#[comptime] shape: SumsShape) -> u32 {
    let lane = UNIT_POS % 32u32;
    let row = UNIT_POS / 32u32 * comptime![shape.warp_rows() as u32] + lane / 4u32;
    row * comptime![shape.columns as u32] + lane % 4u32 * 2u32
}
