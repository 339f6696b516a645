//! Gated outputs: a sigmoid on what attention gives, and the way back.

// In a kernel `%` is one instruction; comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_core::{
    Element, Error, Problem, Result,
    device::{
        Tensor, TensorView,
        launch::{elements, grid},
    },
};
use cubecl::{client::Client, prelude::*};

use crate::dot::{Strides, strides};

/// Writes `sigmoid(z) y` to `out`: outputs `y` `[B, H, T, Dv]` behind a gate that routes nothing (gated attention, arXiv
/// 2505.06708). The logits `z`, `[B, H, T, 1]` for a gate per head or `[B, H, T, Dv]` for one per channel, are a product of
/// the hidden states that the query projection reads. All three hold `f32` or the problem's element type.
///
/// # Errors
/// [`Error::Shape`] for logits of neither shape; as [`TensorView::check`]; [`Error::TooLarge`]; [`Error::Overlap`] when rows of
/// `out` share memory.
pub fn gate_outputs(
    client: &Client,
    problem: &Problem,
    logits: TensorView<'_, 4>,
    outputs: TensorView<'_, 4>,
    out: &Tensor<4>,
) -> Result<()> {
    let by_channel = check(client, problem, logits, outputs)?;
    check_outputs("the gated output", client, problem, out.view())?;
    out.view().check_disjoint("the gated output")?;
    let numbers = problem.out_shape().iter().product();
    let (cubes, units) = grid(client, numbers);
    // SAFETY: all views were checked against the problem; each unit checks its number.
    unsafe {
        gate_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(logits),
            elements(outputs),
            elements(out.view()),
            strides(logits),
            strides(outputs),
            strides(out.view()),
            sizes(problem),
            by_channel,
            [logits.element().into(), outputs.element().into(), out.element().into()],
        );
    }
    Ok(())
}

/// The gradients of logits and outputs of [`gate_outputs`], in their shapes, `f32`, from that of what it wrote: with
/// `g = sigmoid(z)`, `dy = g do` and `dz = g (1 - g) <do, y>`, the product over what the gate is for. Two runs agree bit for
/// bit.
///
/// # Errors
/// As [`gate_outputs`].
pub fn gate_outputs_backward(
    client: &Client,
    problem: &Problem,
    logits: TensorView<'_, 4>,
    outputs: TensorView<'_, 4>,
    d_out: TensorView<'_, 4>,
) -> Result<[Tensor<4>; 2]> {
    let by_channel = check(client, problem, logits, outputs)?;
    check_outputs("the gradient of the gated output", client, problem, d_out)?;
    let d_logits = Tensor::empty(client, logits.shape(), Element::F32);
    let d_outputs = Tensor::empty(client, problem.out_shape(), Element::F32);
    let rows = problem.batch * problem.heads * problem.query_len;
    let (cubes, units) = grid(client, rows);
    // SAFETY: as for the forward pass; gradients are contiguous, and each unit checks its row.
    unsafe {
        gate_backward_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(logits),
            elements(outputs),
            elements(d_out),
            elements(d_logits.view()),
            elements(d_outputs.view()),
            strides(logits),
            strides(outputs),
            strides(d_out),
            sizes(problem),
            by_channel,
            [logits.element().into(), outputs.element().into(), d_out.element().into()],
        );
    }
    Ok([d_logits, d_outputs])
}

/// Whether there is a gate per channel, not one per head.
fn check(
    client: &Client,
    problem: &Problem,
    logits: TensorView<'_, 4>,
    outputs: TensorView<'_, 4>,
) -> Result<bool> {
    problem.check()?;
    check_outputs("the outputs to gate", client, problem, outputs)?;
    let shape = problem.out_shape();
    let [batch, heads, tokens, dim] = shape;
    let found = logits.shape();
    if found[..3] != shape[..3] || (found[3] != 1 && found[3] != dim) {
        let expected = format!("[{batch}, {heads}, {tokens}, 1 or {dim}]");
        return Err(Error::shape("the logits of output gates", expected, &found));
    }
    logits.check("the logits of output gates", client, found, float_or(problem, logits.element()))?;
    let (size, limit) = ((batch * heads * tokens) as u128 * dim as u128, u128::from(u32::MAX));
    if size > limit {
        return Err(Error::TooLarge { what: "numbers to gate", size, limit });
    }
    Ok(found[3] != 1)
}

fn check_outputs(
    name: &'static str,
    client: &Client,
    problem: &Problem,
    view: TensorView<'_, 4>,
) -> Result<()> {
    view.check(name, client, problem.out_shape(), float_or(problem, view.element()))
}

/// `f32` where that is found, or the problem's own type.
fn float_or(problem: &Problem, found: Element) -> Element {
    if found == Element::F32 { Element::F32 } else { problem.element }
}

fn sizes(problem: &Problem) -> SizesLaunch {
    let Problem { batch, heads, query_len, value_dim, .. } = *problem;
    SizesLaunch::new((batch * heads * query_len) as u32, heads as u32, query_len as u32, value_dim as u32)
}

#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Sizes {
    rows: u32,
    heads: u32,
    tokens: u32,
    dim: u32,
}

/// Where a row begins.
#[cube]
fn begin(strides: &Strides, row: u32, sizes: &Sizes) -> usize {
    let token = row % sizes.tokens;
    let head = row / sizes.tokens % sizes.heads;
    let batch = row / sizes.tokens / sizes.heads;
    (batch * strides.batch + head * strides.head + token * strides.token) as usize
}

#[cube]
fn sigmoid(logit: f32) -> f32 {
    1.0f32 / (1.0f32 + (-logit).exp())
}

/// One unit, one number.
#[cube(launch_unchecked)]
fn gate_kernel<L: Float, A: Float, O: Float>(
    logits: &[L],
    outputs: &[A],
    out: &mut [O],
    logit_strides: Strides,
    output_strides: Strides,
    out_strides: Strides,
    sizes: Sizes,
    #[comptime] by_channel: bool,
    #[define(L, A, O)] _elements: [ElemType; 3],
) {
    if ABSOLUTE_POS >= (sizes.rows * sizes.dim) as usize {
        terminate!();
    }
    let row = ABSOLUTE_POS as u32 / sizes.dim;
    let d = (ABSOLUTE_POS as u32 % sizes.dim) as usize;
    let mut logit = begin(&logit_strides, row, &sizes);
    if comptime![by_channel] {
        logit += d;
    }
    let gate = sigmoid(f32::cast_from(logits[logit]));
    let output = f32::cast_from(outputs[begin(&output_strides, row, &sizes) + d]);
    out[begin(&out_strides, row, &sizes) + d] = O::cast_from(gate * output);
}

/// One unit, one row.
#[cube(launch_unchecked)]
fn gate_backward_kernel<L: Float, A: Float, O: Float>(
    logits: &[L],
    outputs: &[A],
    d_out: &[O],
    d_logits: &mut [f32],
    d_outputs: &mut [f32],
    logit_strides: Strides,
    output_strides: Strides,
    d_out_strides: Strides,
    sizes: Sizes,
    #[comptime] by_channel: bool,
    #[define(L, A, O)] _elements: [ElemType; 3],
) {
    if ABSOLUTE_POS >= sizes.rows as usize {
        terminate!();
    }
    let row = ABSOLUTE_POS as u32;
    let logit = begin(&logit_strides, row, &sizes);
    let output = begin(&output_strides, row, &sizes);
    let d_row = begin(&d_out_strides, row, &sizes);
    let first = ABSOLUTE_POS * sizes.dim as usize;
    let mut gate = sigmoid(f32::cast_from(logits[logit]));
    let mut product = 0.0f32;
    for d in 0..sizes.dim as usize {
        if comptime![by_channel] {
            gate = sigmoid(f32::cast_from(logits[logit + d]));
        }
        let slope = f32::cast_from(d_out[d_row + d]);
        let along = slope * f32::cast_from(outputs[output + d]);
        d_outputs[first + d] = gate * slope;
        if comptime![by_channel] {
            d_logits[first + d] = gate * (1.0f32 - gate) * along;
        } else {
            product += along;
        }
    }
    if comptime![!by_channel] {
        d_logits[ABSOLUTE_POS] = gate * (1.0f32 - gate) * product;
    }
}
