//! The product of hidden states and router weights on GPUs whose units run in planes of 32: one plane takes four tokens
//! and sixteen columns, so that every hidden state is read once, in order, for all of them.

use bifocal_core::DeviceProfile;
use cubecl::prelude::*;

/// Tokens per plane.
const TOKENS: usize = 4;
/// Columns of the weight per plane.
const COLUMNS: usize = 16;
/// Units of a plane.
const PLANE: u32 = 32;
/// Planes of a cube.
const PLANES: u32 = 4;

/// Whether the device's planes are those that the kernel is written for.
pub(crate) fn has_planes(profile: &DeviceProfile) -> bool {
    profile.cuda_arch.is_some() && profile.plane_size == (PLANE, PLANE)
}

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

/// Cubes and units for a projection.
pub(crate) fn grid(batch: usize, tokens: usize, columns: usize) -> (CubeCount, CubeDim) {
    let cubes = tokens.div_ceil(TOKENS).div_ceil(PLANES as usize);
    let blocks = columns.div_ceil(COLUMNS);
    (CubeCount::Static(cubes as u32, blocks as u32, batch as u32), CubeDim::new_1d(PLANE * PLANES))
}

#[cube(launch_unchecked)]
pub(crate) fn project_kernel<E: Float, W: Float>(
    hidden: &[E],
    weight: &[W],
    logits: &mut [f32],
    shape: Projection,
    #[define(E, W)] _elements: [ElemType; 2],
) {
    let lane = UNIT_POS % PLANE;
    let first = (CUBE_POS_X * PLANES + UNIT_POS / PLANE) * comptime![TOKENS as u32];
    let column = CUBE_POS_Y * comptime![COLUMNS as u32];
    let batch = CUBE_POS_Z;
    // The same for a whole plane.
    if first >= shape.tokens {
        terminate!();
    }
    let mut offsets = Array::<u32>::new(TOKENS);
    #[unroll]
    for t in 0..TOKENS {
        let token = min(first + comptime![t as u32], shape.tokens - 1u32);
        offsets[t] = batch * shape.hidden_batch + token * shape.hidden_token;
    }
    let mut sums = Array::<f32>::new(comptime![TOKENS * COLUMNS]);
    #[unroll]
    for i in 0..comptime![TOKENS * COLUMNS] {
        sums[i] = 0.0f32;
    }
    let mut d = lane;
    while d < shape.model_dim {
        let mut x = Array::<f32>::new(TOKENS);
        #[unroll]
        for t in 0..TOKENS {
            x[t] = f32::cast_from(hidden[(offsets[t] + d) as usize]);
        }
        #[unroll]
        for c in 0..COLUMNS {
            // Columns beyond the last are computed from it again, and not written.
            let at = min(column + comptime![c as u32], shape.columns - 1u32);
            let w = f32::cast_from(weight[(d * shape.weight_row + at) as usize]);
            #[unroll]
            for t in 0..TOKENS {
                sums[t * COLUMNS + c] = fma(x[t], w, sums[t * COLUMNS + c]);
            }
        }
        d += PLANE;
    }
    #[unroll]
    for c in 0..COLUMNS {
        let at = column + comptime![c as u32];
        #[unroll]
        for t in 0..TOKENS {
            let sum = plane_sum(sums[t * COLUMNS + c]);
            let token = first + comptime![t as u32];
            if lane == 0u32 && at < shape.columns && token < shape.tokens {
                logits[((batch * shape.columns + at) * shape.tokens + token) as usize] = sum;
            }
        }
    }
}
