//! The product of hidden states and router weights on GPUs whose units run in planes of 32. One plane takes four tokens
//! and up to sixteen columns; its units share out the model dim, sixteen bytes at a time, so that every hidden state is
//! read once, in order, for all columns.

// In a kernel `%` is one instruction, and `is_multiple_of` is not there.
#![allow(clippy::manual_is_multiple_of)]

use bifocal_core::{
    DeviceProfile, Element,
    device::{Tensor, TensorView},
};
use cubecl::prelude::*;

/// Tokens per plane.
const TOKENS: usize = 4;
/// Columns of the weight per plane, at most.
const COLUMNS: usize = 16;
const PLANE: u32 = DeviceProfile::PLANE;
/// Planes of a cube.
const PLANES: u32 = 4;

/// The run-time shape of a projection: `hidden [B, T, M]` by `weight [M, columns]` into `logits [B, columns, T]`.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Projection {
    pub(crate) tokens: u32,
    pub(crate) model_dim: u32,
    pub(crate) columns: u32,
    pub(crate) hidden_batch: u32,
    pub(crate) hidden_token: u32,
    pub(crate) weight_row: u32,
}

/// The compile-time key of a projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Blueprint {
    /// Hidden dims, and columns of the weight, that one load takes.
    pub(crate) dims: usize,
    pub(crate) width: usize,
    /// Columns per plane, a power of two.
    columns: usize,
}

impl Blueprint {
    pub(crate) fn new(hidden: TensorView<'_, 3>, weight: &Tensor<2>) -> Self {
        let [batch, tokens, model_dim] = hidden.shape();
        let [_, columns] = weight.shape();
        let [by_batch, by_token, _] = hidden.strides();
        let steps = [(batch, by_batch), (tokens, by_token), (2, model_dim)];
        let dims = load(hidden.element(), hidden.handle().offset_start, &steps);
        let per_plane = columns.next_power_of_two().min(COLUMNS);
        let steps = [(2, weight.strides()[0]), (2, columns), (2, per_plane)];
        let width = load(weight.element(), weight.handle().offset_start, &steps);
        Self { dims, width, columns: per_plane }
    }

    /// Cubes and units.
    pub(crate) fn grid(self, batch: usize, tokens: usize, columns: usize) -> (CubeCount, CubeDim) {
        let cubes = tokens.div_ceil(TOKENS).div_ceil(PLANES as usize);
        let blocks = columns.div_ceil(self.columns);
        (CubeCount::Static(cubes as u32, blocks as u32, batch as u32), CubeDim::new_1d(PLANE * PLANES))
    }
}

/// The most elements, in up to 16 bytes, that a load can take where it may start at any multiple of each step that is
/// taken (those of sizes above 1).
fn load(element: Element, offset: Option<u64>, steps: &[(usize, usize)]) -> usize {
    let mut most = 16 / element.size();
    let start = offset.unwrap_or(0) as usize / element.size();
    while most > 1
        && (!start.is_multiple_of(most) || steps.iter().any(|&(size, step)| size > 1 && step % most != 0))
    {
        most /= 2;
    }
    most
}

#[cube(launch_unchecked)]
pub(crate) fn project_kernel<E: Float, W: Float, ND: Size, NW: Size>(
    hidden: &[Vector<E, ND>],
    weight: &[Vector<W, NW>],
    logits: &mut [f32],
    shape: Projection,
    #[comptime] blueprint: Blueprint,
    #[define(E, W)] _elements: [ElemType; 2],
    #[define(ND)] _dims: usize,
    #[define(NW)] _width: usize,
) {
    let (dims, width, columns) = comptime![(blueprint.dims, blueprint.width, blueprint.columns)];
    let lane = UNIT_POS % PLANE;
    let first = (CUBE_POS_X * PLANES + UNIT_POS / PLANE) * comptime![TOKENS as u32];
    let column = CUBE_POS_Y * comptime![columns as u32];
    let batch = CUBE_POS_Z;
    // The same for a whole plane.
    if first >= shape.tokens {
        terminate!();
    }
    let mut offsets = Array::<u32>::new(TOKENS);
    #[unroll]
    for t in 0..TOKENS {
        let token = min(first + comptime![t as u32], shape.tokens - 1u32);
        offsets[t] = (batch * shape.hidden_batch + token * shape.hidden_token) / comptime![dims as u32];
    }
    let mut sums = Array::<f32>::new(comptime![TOKENS * columns]);
    #[unroll]
    for i in 0..comptime![TOKENS * columns] {
        sums[i] = 0.0f32;
    }
    let mut d = lane;
    while d < shape.model_dim / comptime![dims as u32] {
        let mut x = Array::<Vector<f32, ND>>::new(TOKENS);
        #[unroll]
        for t in 0..TOKENS {
            x[t] = Vector::cast_from(hidden[(offsets[t] + d) as usize]);
        }
        #[unroll]
        for i in 0..dims {
            let row = (d * comptime![dims as u32] + comptime![i as u32]) * shape.weight_row;
            #[unroll]
            for block in 0..comptime![columns / width] {
                // Columns beyond the last are computed from the last again, and not written.
                let at = column + comptime![(block * width) as u32];
                let at = row + min(at, shape.columns - comptime![width as u32]);
                let w = Vector::<f32, NW>::cast_from(weight[(at / comptime![width as u32]) as usize]);
                #[unroll]
                for j in 0..width {
                    let c = comptime![block * width + j];
                    #[unroll]
                    for t in 0..TOKENS {
                        sums[c * TOKENS + t] = fma(x[t].extract(i), w.extract(j), sums[c * TOKENS + t]);
                    }
                }
            }
        }
        d += PLANE;
    }

    // Sums over the plane: in each step a unit hands one half of what it holds to its partner for the other half, until
    // every unit holds its share, and from then on the whole of the one sum that it holds.
    let count = comptime![TOKENS * columns];
    #[unroll]
    for step in 0..5usize {
        let mask = comptime![16u32 >> step];
        let held = comptime![count >> step];
        if comptime![held >= 2] {
            let upper = lane & mask != 0u32;
            #[unroll]
            for i in 0..comptime![held / 2] {
                let a = sums[i];
                let b = sums[i + comptime![held / 2]];
                sums[i] = select(upper, b, a) + plane_shuffle_xor(select(upper, a, b), mask);
            }
        } else {
            sums[0] += plane_shuffle_xor(sums[0], mask);
        }
    }
    #[unroll]
    for i in 0..comptime![count.div_ceil(32)] {
        let index = lane * comptime![count as u32] / PLANE + comptime![i as u32];
        let at = column + index / comptime![TOKENS as u32];
        let token = first + index % comptime![TOKENS as u32];
        // Where there are fewer sums than units, several hold the same.
        let holds = lane % comptime![(32 / count).max(1) as u32] == 0u32;
        if holds && at < shape.columns && token < shape.tokens {
            logits[((batch * shape.columns + at) * shape.tokens + token) as usize] = sums[i];
        }
    }
}
