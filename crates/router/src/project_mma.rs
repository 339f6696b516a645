//! The product of hidden states and router weights on the tensor cores of NVIDIA GPUs since Ampere. What bounds it is
//! reading the hidden states, so they go from memory to registers once, 16 bytes per thread and load; weights come from
//! shared memory.
//!
//! A sum over dims does not care for their order. A thread's 16 bytes are eight dims of one token, where products take
//! two and two of them from it: which dims a product calls its own is chosen to suit, and weights are picked to match.

// In a kernel `%` is one instruction, and `is_multiple_of` is not there.
#![allow(clippy::manual_is_multiple_of)]

use bifocal_core::{
    DeviceProfile, Element,
    device::{Tensor, TensorView},
};
use bifocal_tensor_core::ptx::{global_address, load_16, load_transposed, product, shared_address};
use cubecl::prelude::*;

use crate::project::Projection;

/// Tokens of a warp, as products have rows.
const TOKENS: u32 = 16;
/// Columns of the weight per cube: those of two products.
const COLUMNS: usize = 16;
/// Dims that a thread's load and its three neighbours' take: those of two products.
const DIMS: usize = 32;
/// Loads that are asked for at once.
const AHEAD: usize = 4;
/// Dims whose weights are in shared memory at a time, at most: 64 KiB.
const MOST_DIMS: usize = 2048;
const PLANE: u32 = DeviceProfile::PLANE;
/// Warps of a cube.
const WARPS: u32 = 4;

/// The compile-time key of a projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Blueprint {
    /// The element type, as PTX spells it.
    element: &'static str,
    /// Dims whose weights are in shared memory at a time.
    dims: usize,
    /// Eight columns of the weight can be loaded at once.
    wide: bool,
}

impl Blueprint {
    /// `None` where the product is not one for tensor cores: another device or element type, or memory that is not laid
    /// out for loads of 16 bytes.
    pub(crate) fn new(
        profile: &DeviceProfile,
        hidden: TensorView<'_, 3>,
        weight: &Tensor<2>,
    ) -> Option<Self> {
        let element = match hidden.element() {
            Element::F16 => "f16",
            Element::Bf16 => "bf16",
            _ => return None,
        };
        let [batch, tokens, model_dim] = hidden.shape();
        let steps = [(batch, hidden.strides()[0]), (tokens, hidden.strides()[1])];
        let aligned = steps.into_iter().all(|(size, stride)| size == 1 || stride % 8 == 0);
        let start = |offset: Option<u64>| offset.unwrap_or(0) % 16 == 0;
        let has_products = profile.cuda_arch.is_some_and(|arch| arch >= 80);
        if !(has_products
            && weight.element() == hidden.element()
            && model_dim > 0
            && model_dim % DIMS == 0
            && aligned
            && start(hidden.handle().offset_start))
        {
            return None;
        }
        let wide =
            weight.strides()[0] % 8 == 0 && weight.shape()[1] % 8 == 0 && start(weight.handle().offset_start);
        Some(Self { element, dims: model_dim.min(MOST_DIMS), wide })
    }

    /// Cubes and units.
    pub(crate) fn grid(self, batch: usize, tokens: usize, columns: usize) -> (CubeCount, CubeDim) {
        let cubes = tokens.div_ceil((TOKENS * WARPS) as usize);
        let blocks = columns.div_ceil(COLUMNS);
        (CubeCount::Static(cubes as u32, blocks as u32, batch as u32), CubeDim::new_1d(PLANE * WARPS))
    }
}

/// Where eight columns of a dim are in shared memory, in words: 16 of a dim side by side, moved so that the dims that a
/// matrix takes, `0, 1, 8, 9, 16, 17, 24, 25` from some dim on, are in different banks.
#[cube]
fn place(dim: u32, eight: u32) -> u32 {
    let eights = dim / 8u32;
    let moved = (dim * 2u32 + eight) ^ (eights % 2u32 + eights / 2u32 % 2u32 * 4u32);
    moved * 4u32
}

/// One cube: 64 tokens, 16 columns.
#[cube(launch_unchecked)]
pub(crate) fn project_kernel<E: Float>(
    hidden: &[E],
    weight: &[E],
    logits: &mut [f32],
    shape: Projection,
    #[comptime] blueprint: Blueprint,
    #[define(E)] _element: ElemType,
) {
    let element = comptime![blueprint.element];
    let lane = UNIT_POS % PLANE;
    let first = (CUBE_POS_X * WARPS + UNIT_POS / PLANE) * TOKENS + lane / 4u32;
    let column = CUBE_POS_Y * comptime![COLUMNS as u32];
    let batch = CUBE_POS_Z;
    let mut weights = Shared::<[u32]>::new_aligned_slice(comptime![blueprint.dims * COLUMNS / 2], 128usize);
    let room = shared_address(&weights);

    let upper = min(first, shape.tokens - 1u32);
    let lower = min(first + 8u32, shape.tokens - 1u32);
    let weight_start = global_address::<E>(weight.as_ptr());
    let start = global_address::<E>(hidden.as_ptr()) + (lane % 4u32 * 16u32) as u64;
    let upper = start + (batch * shape.hidden_batch + upper * shape.hidden_token) as u64 * 2u64;
    let lower = start + (batch * shape.hidden_batch + lower * shape.hidden_token) as u64 * 2u64;
    // The row of a matrix that a thread names: of 32 dims `0, 1, 8, 9, 16, 17, 24, 25`, and 2, 4 or 6 more.
    let of_matrix = lane % 8u32;
    let row = of_matrix / 2u32 * 8u32 + of_matrix % 2u32 + lane / 8u32 * 2u32;
    let left = room + place(row, 0u32) * 4u32;
    let right = room + place(row, 1u32) * 4u32;

    let mut left_sums = Vector::<f32, Const<4>>::new(0.0f32);
    let mut right_sums = Vector::<f32, Const<4>>::new(0.0f32);
    let mut from = 0u32;
    while from < shape.model_dim {
        let dims = min(shape.model_dim - from, comptime![blueprint.dims as u32]);
        let mut eight = UNIT_POS;
        while eight < dims * 2u32 {
            let dim = eight / 2u32;
            let at = column + eight % 2u32 * 8u32;
            let source = (from + dim) * shape.weight_row + at;
            let to = place(dim, eight % 2u32);
            // Columns beyond the last are zeros, and not written.
            if comptime![blueprint.wide] {
                let mut four = Vector::<u32, Const<4>>::new(0u32);
                if at < shape.columns {
                    four = load_16(weight_start + source as u64 * 2u64);
                }
                #[unroll]
                for i in 0..4usize {
                    weights[(to + comptime![i as u32]) as usize] = four.extract(i);
                }
            } else {
                #[unroll]
                for i in 0..4u32 {
                    let mut low = E::from_int(0);
                    let mut high = E::from_int(0);
                    if at + i * 2u32 < shape.columns {
                        low = weight[(source + i * 2u32) as usize];
                    }
                    if at + i * 2u32 + 1u32 < shape.columns {
                        high = weight[(source + i * 2u32 + 1u32) as usize];
                    }
                    let (low, high) = (u16::reinterpret(low) as u32, u16::reinterpret(high) as u32);
                    weights[(to + i) as usize] = low | (high << 16u32);
                }
            }
            eight += PLANE * WARPS;
        }
        sync_cube();
        let mut dim = 0u32;
        while dim < dims {
            let mut upper_dims = Array::<Vector<u32, Const<4>>>::new(AHEAD);
            let mut lower_dims = Array::<Vector<u32, Const<4>>>::new(AHEAD);
            #[unroll]
            for turn in 0..AHEAD {
                // Turns beyond the last dim read it again, and are left out below.
                let at = min(dim + comptime![(turn * DIMS) as u32], dims - comptime![DIMS as u32]);
                let at = (from + at) as u64 * 2u64;
                upper_dims[turn] = load_16(upper + at);
                lower_dims[turn] = load_16(lower + at);
            }
            #[unroll]
            for turn in 0..AHEAD {
                let at = dim + comptime![(turn * DIMS) as u32];
                if at < dims {
                    let u = upper_dims[turn];
                    let l = lower_dims[turn];
                    // 32 dims further on a dim's place is 32 rows of 32 bytes further on.
                    let left = load_transposed(left + at * 32u32);
                    let right = load_transposed(right + at * 32u32);
                    left_sums = product(
                        left_sums,
                        u.extract(0usize),
                        l.extract(0usize),
                        u.extract(1usize),
                        l.extract(1usize),
                        left.extract(0usize),
                        left.extract(1usize),
                        element,
                    );
                    right_sums = product(
                        right_sums,
                        u.extract(0usize),
                        l.extract(0usize),
                        u.extract(1usize),
                        l.extract(1usize),
                        right.extract(0usize),
                        right.extract(1usize),
                        element,
                    );
                    left_sums = product(
                        left_sums,
                        u.extract(2usize),
                        l.extract(2usize),
                        u.extract(3usize),
                        l.extract(3usize),
                        left.extract(2usize),
                        left.extract(3usize),
                        element,
                    );
                    right_sums = product(
                        right_sums,
                        u.extract(2usize),
                        l.extract(2usize),
                        u.extract(3usize),
                        l.extract(3usize),
                        right.extract(2usize),
                        right.extract(3usize),
                        element,
                    );
                }
            }
            dim += comptime![(AHEAD * DIMS) as u32];
        }
        sync_cube();
        from += dims;
    }

    // A thread holds two tokens, `lane / 4` and 8 more, and of every 8 columns two, from `lane % 4 * 2` on.
    #[unroll]
    for i in 0..8u32 {
        let token = first + comptime![i / 2 % 2 * 8];
        let at = column + lane % 4u32 * 2u32 + comptime![i / 4 * 8 + i % 2];
        let sum = if comptime![i < 4] {
            left_sums.extract(comptime![i as usize % 4])
        } else {
            right_sums.extract(comptime![i as usize % 4])
        };
        if token < shape.tokens && at < shape.columns {
            logits[((batch * shape.columns + at) * shape.tokens + token) as usize] = sum;
        }
    }
}
