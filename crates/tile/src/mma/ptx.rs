//! The products of a warp as functions: fragments by `ldmatrix`, products by `mma.sync`. Sources: the PTX ISA, sections
//! "ldmatrix" and "Matrix Fragments for mma.m16n8k16 with floating point type".
//!
//! Tiles lie in shared memory as panels of 64 columns in the 128-byte swizzle. A thread passes the address of the row
//! that it names to `ldmatrix` in the first 16 columns of the first panel: steps along the columns of a panel flip
//! bits of it (the swizzle is an exclusive or), all other steps are added.

pub(super) use bifocal_tensor_core::{
    across, down,
    ptx::{copies_commit, copies_wait, copies_wait_all, copy_16_or_zeros},
};
use cubecl::prelude::*;

use crate::tensor_core::{Blueprint, PANEL, SWIZZLE, Shape};

#[cfg(test)]
mod tests;

/// Rows, or keys, that one `ldmatrix` reads; also the depth of a product.
const STEP: usize = 16;

fn registers(prefix: &str, from: usize, count: usize) -> String {
    let names: Vec<String> = (from..from + count).map(|i| format!("{prefix}{i}")).collect();
    format!("{{{}}}", names.join(", "))
}

/// The columns of one step: the panel's number, and what is flipped in an address.
const fn columns(step: usize) -> (usize, usize) {
    (step * STEP / PANEL, step * STEP % PANEL * 2)
}

/// S = Q K^T: results and operands are all scores of a thread, its address of queries, its address of keys.
fn scores_text(blueprint: Blueprint) -> String {
    let Shape { operand, rows, keys, dim } = blueprint.shape;
    let (t, blocks, accumulators) = (operand.name(), blueprint.blocks(), blueprint.blocks() * keys / 2);
    let mut text = format!("{{ .reg .b32 q<{}>, k<4>, qa, ka; ", 4 * blocks);
    for i in 0..accumulators {
        text += &format!("mov.f32 %{i}, 0f00000000; ");
    }
    for step in 0..dim / STEP {
        let (panel, flip) = columns(step);
        text += &format!("xor.b32 qa, %{accumulators}, {flip}; xor.b32 ka, %{}, {flip}; ", accumulators + 1);
        for block in 0..blocks {
            text += &format!(
                "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {q}, [qa+{at}]; ",
                q = registers("q", 4 * block, 4),
                at = (panel * rows + block * STEP) * SWIZZLE,
            );
        }
        for pair in 0..keys / STEP {
            text += &format!(
                "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {k}, [ka+{at}]; ",
                k = registers("k", 0, 4),
                at = (panel * keys + pair * STEP) * SWIZZLE,
            );
            for block in 0..blocks {
                for half in 0..2 {
                    let scores = registers("%", block * keys / 2 + (pair * 2 + half) * 4, 4);
                    text += &format!(
                        "mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32 {scores}, {q}, {k}, {scores}; ",
                        q = registers("q", 4 * block, 4),
                        k = registers("k", 2 * half, 2),
                    );
                }
            }
        }
    }
    text + "}"
}

/// O += P V: results and operands are all outputs of a thread, the same before, its weights, its address of values.
fn values_text(blueprint: Blueprint) -> String {
    let Shape { operand, keys, dim, .. } = blueprint.shape;
    let (t, blocks, per_block) = (operand.name(), blueprint.blocks(), blueprint.shape.columns() / 2);
    let outputs = blocks * per_block;
    let (weights, value) = (2 * outputs, 2 * outputs + blocks * keys / 4);
    let mut text = String::from("{ .reg .b32 v<4>, va; ");
    for i in 0..outputs {
        // Columns beyond the head dim hold nothing.
        if i % per_block < dim / 2 {
            text += &format!("mov.f32 %{i}, %{}; ", i + outputs);
        } else {
            text += &format!("mov.f32 %{i}, 0f00000000; ");
        }
    }
    for step in 0..keys / STEP {
        for pair in 0..dim / STEP {
            let (panel, flip) = columns(pair);
            text += &format!(
                "xor.b32 va, %{value}, {flip}; \
                 ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {v}, [va+{at}]; ",
                v = registers("v", 0, 4),
                at = (panel * keys + step * STEP) * SWIZZLE,
            );
            for block in 0..blocks {
                for half in 0..2 {
                    let out = registers("%", block * per_block + (pair * 2 + half) * 4, 4);
                    text += &format!(
                        "mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32 {out}, {p}, {v}, {out}; ",
                        p = registers("%", weights + block * keys / 4 + step * 4, 4),
                        v = registers("v", 2 * half, 2),
                    );
                }
            }
        }
    }
    text + "}"
}

/// S = Q K^T of a warp's rows and a tile of keys, block by block of 16 rows. `query` is the address of the warp's
/// first row and [`across`], `key` the tile's and [`down`].
#[cube]
pub(super) fn scores<WS: Size>(query: u32, key: u32, #[comptime] blueprint: Blueprint) -> Vector<f32, WS> {
    let body = comptime![scores_text(blueprint)];
    let scores: Vector<f32, WS>;
    gpu_asm!(
        "{body} // {s} {q} {k}\n",
        s = out(_) scores, q = in(_) query, k = in(_) key, body = const body
    );
    scores
}

/// O + P V of a warp's rows and a tile of values. `value` is the address of the tile and [`across`].
#[cube]
pub(super) fn values<WO: Size, WP: Size>(
    out: Vector<f32, WO>,
    weights: Vector<u32, WP>,
    value: u32,
    #[comptime] blueprint: Blueprint,
) -> Vector<f32, WO> {
    let body = comptime![values_text(blueprint)];
    let sum: Vector<f32, WO>;
    gpu_asm!(
        "{body} // {d} {o} {p} {v}\n",
        d = out(_) sum, o = in(_) Vector::<f32, WO>::reinterpret(out),
        p = in(_) Vector::<u32, WP>::reinterpret(weights), v = in(_) value, body = const body
    );
    sum
}
