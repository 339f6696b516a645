//! The product of hidden states and router weights on GPUs whose units run in planes of 32. One plane takes four tokens
//! and up to sixteen columns; its units take the dims of the model in turns, so that every hidden state is read once, in
//! order, for all columns, and the rows of the weight that a plane reads at once lie side by side.

// In a kernel `%` is one instruction, and `is_multiple_of` is not there.
#![allow(clippy::manual_is_multiple_of)]

use bifocal_core::{
    DeviceProfile,
    device::{
        Tensor,
        launch::{steps, width},
    },
};
use cubecl::prelude::*;

/// Tokens per plane.
pub(crate) const TOKENS: usize = 4;
/// Columns of the weight per plane, at most.
const COLUMNS: usize = 16;
/// Dims per unit whose hidden states are asked for at once.
const AHEAD: usize = 8;
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
    /// Columns of the weight that one load takes.
    pub(crate) width: usize,
    /// Columns per plane, a power of two.
    pub(crate) columns: usize,
}

impl Blueprint {
    pub(crate) fn new(weight: &Tensor<2>) -> Self {
        let columns = weight.shape()[1].next_power_of_two().min(COLUMNS);
        let starts = steps(weight.view()).chain([weight.shape()[1], columns]);
        let width = width(16 / weight.element().size(), starts);
        Self { width, columns }
    }

    /// Cubes and units.
    pub(crate) fn grid(self, batch: usize, tokens: usize, columns: usize) -> (CubeCount, CubeDim) {
        let cubes = tokens.div_ceil(TOKENS).div_ceil(PLANES as usize);
        let blocks = columns.div_ceil(self.columns);
        (CubeCount::Static(cubes as u32, blocks as u32, batch as u32), CubeDim::new_1d(PLANE * PLANES))
    }
}

/// Adds the products of one hidden dim of every token, from `x[from]` on, with the weight's `row`.
#[cube]
fn add<E: Float, W: Float, NW: Size>(
    sums: &mut Array<f32>,
    x: &Array<E>,
    #[comptime] from: usize,
    weight: &[Vector<W, NW>],
    row: u32,
    column: u32,
    all_columns: u32,
    #[comptime] blueprint: Blueprint,
) {
    let width = comptime![blueprint.width];
    #[unroll]
    for block in 0..comptime![blueprint.columns / width] {
        // Columns beyond the last are computed from the last again, and not written.
        let at = column + comptime![(block * width) as u32];
        let at = row + min(at, all_columns - comptime![width as u32]);
        let w = Vector::<f32, NW>::cast_from(weight[(at / comptime![width as u32]) as usize]);
        #[unroll]
        for j in 0..width {
            let c = comptime![(block * width + j) * TOKENS];
            #[unroll]
            for t in 0..TOKENS {
                sums[c + t] = fma(f32::cast_from(x[from + t]), w.extract(j), sums[c + t]);
            }
        }
    }
}

/// Where the hidden states of four tokens from `first` on begin; beyond the last it is the last again.
#[cube]
pub(crate) fn offsets_of(batch: u32, first: u32, shape: &Projection) -> Array<u32> {
    let mut offsets = Array::<u32>::new(TOKENS);
    #[unroll]
    for t in 0..TOKENS {
        let token = min(first + comptime![t as u32], shape.tokens - 1u32);
        offsets[t] = batch * shape.hidden_batch + token * shape.hidden_token;
    }
    offsets
}

/// What a unit has of the products of four tokens, by column and then by token: its dims are `from` and every `step`-th
/// after it.
#[cube]
pub(crate) fn products<E: Float, W: Float, NW: Size>(
    hidden: &[E],
    weight: &[Vector<W, NW>],
    offsets: &Array<u32>,
    column: u32,
    from: u32,
    #[comptime] step: u32,
    shape: &Projection,
    #[comptime] blueprint: Blueprint,
) -> Array<f32> {
    let count = comptime![TOKENS * blueprint.columns];
    let mut sums = Array::<f32>::new(count);
    #[unroll]
    for i in 0..count {
        sums[i] = 0.0f32;
    }
    // Hidden states of several turns are asked for at once, so that memory has enough to do.
    let mut d = from;
    while d + comptime![(AHEAD as u32 - 1) * step] < shape.model_dim {
        let mut x = Array::<E>::new(comptime![AHEAD * TOKENS]);
        #[unroll]
        for turn in 0..AHEAD {
            #[unroll]
            for t in 0..TOKENS {
                x[turn * TOKENS + t] = hidden[(offsets[t] + d + comptime![turn as u32 * step]) as usize];
            }
        }
        #[unroll]
        for turn in 0..AHEAD {
            let row = (d + comptime![turn as u32 * step]) * shape.weight_row;
            add::<E, W, NW>(&mut sums, &x, turn * TOKENS, weight, row, column, shape.columns, blueprint);
        }
        d += comptime![AHEAD as u32 * step];
    }
    while d < shape.model_dim {
        let mut x = Array::<E>::new(TOKENS);
        #[unroll]
        for t in 0..TOKENS {
            x[t] = hidden[(offsets[t] + d) as usize];
        }
        let row = d * shape.weight_row;
        add::<E, W, NW>(&mut sums, &x, 0usize, weight, row, column, shape.columns, blueprint);
        d += step;
    }
    sums
}

/// Sums over the plane: in each step a unit hands one half of what it holds to its partner for the other half, until every
/// unit holds its share, and from then on the whole of the one sum that it holds.
#[cube]
pub(crate) fn sum_over_plane(sums: &mut Array<f32>, #[comptime] blueprint: Blueprint) {
    let count = comptime![TOKENS * blueprint.columns];
    let lane = UNIT_POS % PLANE;
    sync_plane();
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
}

/// Which sum a unit's `i`-th is, once they are summed.
#[cube]
pub(crate) fn sum_held(#[comptime] i: usize, #[comptime] blueprint: Blueprint) -> u32 {
    UNIT_POS % PLANE * comptime![(TOKENS * blueprint.columns) as u32] / PLANE + comptime![i as u32]
}

/// Whether a unit is the one that writes its sums: where there are fewer than units, several hold the same.
#[cube]
pub(crate) fn writes(#[comptime] blueprint: Blueprint) -> bool {
    UNIT_POS % PLANE % comptime![(32 / (TOKENS * blueprint.columns)).max(1) as u32] == 0u32
}

#[cube(launch_unchecked)]
pub(crate) fn project_kernel<E: Float, W: Float, NW: Size>(
    hidden: &[E],
    weight: &[Vector<W, NW>],
    logits: &mut [f32],
    shape: Projection,
    #[comptime] blueprint: Blueprint,
    #[define(E, W)] _elements: [ElemType; 2],
    #[define(NW)] _width: usize,
) {
    let first = (CUBE_POS_X * PLANES + UNIT_POS / PLANE) * comptime![TOKENS as u32];
    let column = CUBE_POS_Y * comptime![blueprint.columns as u32];
    let batch = CUBE_POS_Z;
    // The same for a whole plane.
    if first >= shape.tokens {
        terminate!();
    }
    let offsets = offsets_of(batch, first, &shape);
    let lane = UNIT_POS % PLANE;
    let mut sums = products::<E, W, NW>(hidden, weight, &offsets, column, lane, PLANE, &shape, blueprint);
    sum_over_plane(&mut sums, blueprint);
    #[unroll]
    for i in 0..comptime![(TOKENS * blueprint.columns).div_ceil(32)] {
        let index = sum_held(i, blueprint);
        let at = column + index / comptime![TOKENS as u32];
        let token = first + index % comptime![TOKENS as u32];
        if writes(blueprint) && at < shape.columns && token < shape.tokens {
            logits[((batch * shape.columns + at) * shape.tokens + token) as usize] = sums[i];
        }
    }
}
