//! One tile's two products, on their own: what tests hold the instructions in [`ptx`] against plain loops with.

#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_core::{
    Element, Error, Result,
    device::{
        Tensor,
        launch::{elements, words},
    },
};
use cubecl::{client::Client, ir::ElemType, prelude::*};

use super::{copies::load_tile, ptx, tensor_map};
use crate::{
    tensor_core::{
        Blueprint, SWIZZLE, Shape,
        ptx::{copy_16, global_address, shared_address},
        softmax::pack_weights,
    },
    visibility::Visibility,
};

/// Rows of the tile: those of one warpgroup.
const ROWS: usize = 64;

/// `scores = query key^T` and `out = scores value`, scores rounded to `element` between, by the instructions that the
/// wgmma routine is made of: bulk copies into the 128-byte swizzle, mbarriers, both warpgroup products, packing.
///
/// Shapes, row-major: `query [64, head_dim]`, `key [keys, head_dim]`, `value [keys, head_dim]`, where `keys` is 64 for head
/// dim 256 and 128 otherwise, to `scores [64, keys]` and `out [64, head_dim]`.
///
/// # Errors
/// [`Error::Option`] for a head dim other than 64, 96, 128 and 256 or an element type other than `f16` and `bf16`;
/// [`Error::Shape`]; [`Error::Runtime`].
pub fn products(
    client: &Client,
    element: Element,
    head_dim: usize,
    query: &[f32],
    key: &[f32],
    value: &[f32],
) -> Result<(Vec<f32>, Vec<f32>)> {
    let problem = bifocal_core::Problem::new([1, 1, ROWS, head_dim], [1, 1, ROWS, head_dim], element)?;
    let blueprint = super::blueprint(&problem, Visibility::All, false, false, true)
        .ok_or_else(|| Error::option("head dim", head_dim, "64, 96, 128 or 256, of f16 or bf16"))?;
    let blueprint =
        Blueprint { shape: Shape { rows: ROWS, ..blueprint.shape }, stages: 1, query_stages: 1, ..blueprint };
    let keys = blueprint.shape.keys;
    let query = Tensor::from_f32(client, [1, 1, ROWS, head_dim], element, query)?;
    let key = Tensor::from_f32(client, [1, 1, keys, head_dim], element, key)?;
    let value = Tensor::from_f32(client, [1, 1, keys, head_dim], element, value)?;
    let scores = Tensor::<2>::filled(client, [ROWS, keys], Element::F32, f32::NAN)?;
    let out = Tensor::<2>::filled(client, [ROWS, head_dim], Element::F32, f32::NAN)?;
    let kind: ElemType = element.into();
    // SAFETY: every index that the kernel forms lies in tensors of these shapes.
    unsafe {
        products_kernel::launch_unchecked(
            client,
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(128),
            elements(query.view()),
            tensor_map(key.view(), kind, blueprint),
            tensor_map(value.view(), kind, blueprint),
            words(scores.handle()),
            words(out.handle()),
            blueprint,
            kind,
            keys / 2,
            keys / 4,
            blueprint.shape.columns() / 2,
        );
    }
    Ok((scores.to_f32(client)?, out.to_f32(client)?))
}

#[cube(launch_unchecked)]
fn products_kernel<E: Float, NS: Size, NP: Size, NO: Size>(
    query: &[E],
    key_map: &TensorMap<E, Tiled>,
    value_map: &TensorMap<E, Tiled>,
    scores_out: &mut [f32],
    out: &mut [f32],
    #[comptime] blueprint: Blueprint,
    #[define(E)] _element: ElemType,
    #[define(NS)] _scores: usize,
    #[define(NP)] _weights: usize,
    #[define(NO)] _outputs: usize,
) {
    let shape = comptime![blueprint.shape];
    let (keys, dim) = comptime![(shape.keys, shape.dim)];
    let tiles = Shared::<[u32]>::new_aligned_slice(comptime![blueprint.tile_bytes() / 4], 1024usize);
    let barriers = Shared::<[u32]>::new_aligned_slice(2usize, 16usize);
    let query_room = shared_address(&tiles);
    let key_room = query_room + comptime![blueprint.query_bytes() as u32];
    let value_room = key_room + comptime![blueprint.key_bytes() as u32];
    let full = shared_address(&barriers);
    if UNIT_POS == 0 {
        ptx::barrier_init(full, 1u32);
        ptx::barriers_ready();
    }
    sync_cube();
    if UNIT_POS == 0 {
        ptx::arrive_expecting(full, comptime![2 * blueprint.key_bytes() as u32]);
        load_tile::<E>(key_map, key_room, full, 0u32, 0u32, 0u32, keys, blueprint);
        load_tile::<E>(value_map, value_room, full, 0u32, 0u32, 0u32, keys, blueprint);
    }
    let row = UNIT_POS / 2u32;
    let source = global_address::<E>(query.as_ptr()) + (row * comptime![dim as u32 * 2]) as u64;
    #[unroll]
    for i in 0..comptime![dim / 16] {
        let chunk = comptime![i as u32 * 2] + UNIT_POS % 2u32;
        let panel = chunk / 8u32 * comptime![(ROWS * SWIZZLE) as u32];
        let within = ((chunk % 8u32) ^ (row % 8u32)) * 16u32;
        let to = query_room + panel + row * comptime![SWIZZLE as u32] + within;
        copy_16(to, source + (chunk * 16u32) as u64);
    }
    ptx::copies_end();
    sync_cube();
    ptx::wait_parity(full, 0u32);

    let key_panel = comptime![keys * SWIZZLE];
    let query_descriptor = ptx::descriptor(query_room, comptime![ROWS * SWIZZLE]);
    let key_descriptor = ptx::descriptor(key_room, key_panel);
    let value_descriptor = ptx::descriptor(value_room, key_panel);
    let scores = ptx::scores_begin::<NS>(query_descriptor, key_descriptor, shape);
    let scores = ptx::scores_end::<NS>(scores, 0usize, shape);
    let weights = pack_weights::<NS, NP>(&scores, blueprint);
    let sum = Vector::<f32, NO>::new(0.0f32);
    let sum = ptx::values_begin::<NO, NP>(sum, weights, value_descriptor, shape);
    let sum = ptx::values_end::<NO, NP>(sum, weights, shape);

    // A thread holds rows `lane / 4` and 8 more of its warp's 16, and two of every 8 columns.
    let lane = UNIT_POS % 32u32;
    let upper = UNIT_POS / 32u32 * 16u32 + lane / 4u32;
    #[unroll]
    for i in 0..comptime![keys / 2] {
        let row = upper + comptime![(i / 2 % 2 * 8) as u32];
        let column = lane % 4u32 * 2u32 + comptime![(i / 4 * 8 + i % 2) as u32];
        scores_out[(row * comptime![keys as u32] + column) as usize] = scores.extract(i);
    }
    #[unroll]
    for i in 0..comptime![dim / 2] {
        let row = upper + comptime![(i / 2 % 2 * 8) as u32];
        let column = lane % 4u32 * 2u32 + comptime![(i / 4 * 8 + i % 2) as u32];
        out[(row * comptime![dim as u32] + column) as usize] = sum.extract(i);
    }
}
