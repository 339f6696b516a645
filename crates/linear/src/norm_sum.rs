//! The combination of RATTENTION: two branches, each normed per head, added.

// Comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_core::{
    Element, Error, Problem, Result,
    device::{
        Tensor, TensorView,
        launch::{elements, grid},
    },
};
use cubecl::{client::Client, prelude::*};

use crate::{
    attention::{check_out, float_or},
    portable::{Strides, offset, strides},
};

/// Rows whose products with a scale's gradient one unit sums up.
const SEGMENT: usize = 128;

/// What [`norm_sum`] reads: the outputs of two branches `[B, H, T, Dv]`, each `f32` or of the problem's element type, and the
/// scales of their norms.
#[derive(Clone, Copy, Debug)]
pub struct NormSum<'a> {
    /// The near branch's outputs.
    pub near: TensorView<'a, 4>,
    /// The far branch's outputs.
    pub far: TensorView<'a, 4>,
    /// `[H, Dv]`, `f32`, contiguous.
    pub near_scale: TensorView<'a, 2>,
    /// `[H, Dv]`, `f32`, contiguous.
    pub far_scale: TensorView<'a, 2>,
    /// Added to the mean squares, finite and positive; 1e-8 in RATTENTION's code.
    pub epsilon: f32,
}

impl NormSum<'_> {
    fn check(&self, client: &Client, problem: &Problem) -> Result<()> {
        problem.check()?;
        if !(self.epsilon.is_finite() && self.epsilon > 0.0) {
            return Err(Error::option("epsilon of the norms", self.epsilon, "a finite positive number"));
        }
        for (name, view) in [("the near branch", self.near), ("the far branch", self.far)] {
            view.check(name, client, problem.out_shape(), float_or(problem.element, view.element()))?;
        }
        for (name, scale) in [("the near scale", self.near_scale), ("the far scale", self.far_scale)] {
            scale.check(name, client, [problem.heads, problem.value_dim], Element::F32)?;
            scale.check_contiguous(name)?;
        }
        Ok(())
    }
}

/// `RMS(near) + RMS(far)`: each branch's row over its root mean square, times the scale of its head, in f32 (RATTENTION,
/// arXiv 2506.15545; its code). Writes `out` `[B, H, T, Dv]`, `f32` or of the problem's element type.
///
/// # Errors
/// As [`TensorView::check`]; [`Error::NotContiguous`] for scales; [`Error::Overlap`] when rows of `out` share memory;
/// [`Error::Option`] for an epsilon that is not positive.
pub fn norm_sum(client: &Client, problem: &Problem, inputs: &NormSum<'_>, out: &Tensor<4>) -> Result<()> {
    inputs.check(client, problem)?;
    check_out(client, problem, problem.out_shape(), out)?;
    let NormSum { near, far, near_scale, far_scale, epsilon } = *inputs;
    let (cubes, units) = grid(client, rows(problem));
    // SAFETY: all views were checked against the problem; each unit checks its row.
    unsafe {
        sum_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(near),
            elements(far),
            elements(near_scale),
            elements(far_scale),
            elements(out.view()),
            strides(near.strides()),
            strides(far.strides()),
            strides(out.strides()),
            sizes(problem),
            epsilon,
            [near.element().into(), far.element().into(), out.element().into()],
        );
    }
    Ok(())
}

/// Gradients of what [`norm_sum`] reads, contiguous: those of a branch in its own element type, those of scales in `f32`.
#[derive(Clone, Debug)]
pub struct NormSumGradients {
    /// `[B, H, T, Dv]`.
    pub near: Tensor<4>,
    /// `[B, H, T, Dv]`.
    pub far: Tensor<4>,
    /// `[H, Dv]`.
    pub near_scale: Tensor<2>,
    /// `[H, Dv]`.
    pub far_scale: Tensor<2>,
}

/// The backward pass of [`norm_sum`], from the gradient of its output, `f32` or of the problem's element type: with the root
/// mean square s and `u = d_out * scale`, `dx = u / s - x <x, u> / (Dv s^3)`. Two runs agree bit for bit.
///
/// # Errors
/// As [`norm_sum`].
pub fn norm_sum_backward(
    client: &Client,
    problem: &Problem,
    inputs: &NormSum<'_>,
    d_out: TensorView<'_, 4>,
) -> Result<NormSumGradients> {
    inputs.check(client, problem)?;
    let element = float_or(problem.element, d_out.element());
    d_out.check("the gradient of the output", client, problem.out_shape(), element)?;
    let NormSum { near, far, near_scale, far_scale, epsilon } = *inputs;
    let side = |branch, scale| side_backward(client, problem, branch, scale, d_out, epsilon);
    let (near, near_scale) = side(near, near_scale);
    let (far, far_scale) = side(far, far_scale);
    Ok(NormSumGradients { near, far, near_scale, far_scale })
}

/// The gradients of one branch and its scale. Everything has been checked.
fn side_backward(
    client: &Client,
    problem: &Problem,
    branch: TensorView<'_, 4>,
    scale: TensorView<'_, 2>,
    d_out: TensorView<'_, 4>,
    epsilon: f32,
) -> (Tensor<4>, Tensor<2>) {
    let Problem { batch, heads, query_len, value_dim, .. } = *problem;
    let d_branch = Tensor::empty(client, problem.out_shape(), branch.element());
    let roots = Tensor::<1>::empty(client, [rows(problem)], Element::F32);
    // Segments hold rows of one head: a sequence has so many of its own.
    let segments = batch * query_len.div_ceil(SEGMENT);
    let parts = Tensor::<3>::empty(client, [segments, heads, value_dim], Element::F32);
    let d_scale = Tensor::empty(client, [heads, value_dim], Element::F32);
    let types = [branch.element().into(), d_out.element().into()];
    let numbers = heads * value_dim;
    // SAFETY: all views were checked against the problem; each unit checks its work.
    unsafe {
        let (cubes, units) = grid(client, rows(problem));
        branch_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(branch),
            elements(d_out),
            elements(scale),
            elements(d_branch.view()),
            elements(roots.view()),
            strides(branch.strides()),
            strides(d_out.strides()),
            sizes(problem),
            epsilon,
            types,
        );
        let (cubes, units) = grid(client, segments * numbers);
        scale_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(branch),
            elements(d_out),
            elements(roots.view()),
            elements(parts.view()),
            strides(branch.strides()),
            strides(d_out.strides()),
            sizes(problem),
            SEGMENT as u32,
            segments as u32,
            types,
        );
        let (cubes, units) = grid(client, numbers);
        parts_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(parts.view()),
            elements(d_scale.view()),
            segments as u32,
            numbers as u32,
        );
    }
    (d_branch, d_scale)
}

fn rows(problem: &Problem) -> usize {
    problem.batch * problem.heads * problem.query_len
}

/// `[rows, tokens, heads, dim]` of outputs.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Sizes {
    rows: u32,
    tokens: u32,
    heads: u32,
    dim: u32,
}

fn sizes(problem: &Problem) -> SizesLaunch {
    SizesLaunch::new(
        rows(problem) as u32,
        problem.query_len as u32,
        problem.heads as u32,
        problem.value_dim as u32,
    )
}

/// Where a row begins.
#[cube]
fn row_at(row: u32, strides: &Strides, sizes: &Sizes) -> usize {
    offset(strides, row / sizes.tokens / sizes.heads, row / sizes.tokens % sizes.heads, row % sizes.tokens)
}

/// One over the root mean square of the row that begins at `from`.
#[cube]
fn inverse_root<A: Float>(branch: &[A], from: usize, dim: u32, epsilon: f32) -> f32 {
    let mut squares = 0.0f32;
    for d in 0..dim as usize {
        let x = f32::cast_from(branch[from + d]);
        squares += x * x;
    }
    1.0f32 / (squares / f32::cast_from(dim) + epsilon).sqrt()
}

/// One unit, one row.
#[cube(launch_unchecked)]
fn sum_kernel<A: Float, B: Float, O: Float>(
    near: &[A],
    far: &[B],
    near_scale: &[f32],
    far_scale: &[f32],
    out: &mut [O],
    near_strides: Strides,
    far_strides: Strides,
    out_strides: Strides,
    sizes: Sizes,
    epsilon: f32,
    #[define(A, B, O)] _elements: [ElemType; 3],
) {
    if ABSOLUTE_POS >= sizes.rows as usize {
        terminate!();
    }
    let row = ABSOLUTE_POS as u32;
    let near_at = row_at(row, &near_strides, &sizes);
    let far_at = row_at(row, &far_strides, &sizes);
    let out_at = row_at(row, &out_strides, &sizes);
    let near_root = inverse_root::<A>(near, near_at, sizes.dim, epsilon);
    let far_root = inverse_root::<B>(far, far_at, sizes.dim, epsilon);
    let scales = (row / sizes.tokens % sizes.heads * sizes.dim) as usize;
    for d in 0..sizes.dim as usize {
        let x = f32::cast_from(near[near_at + d]) * near_root * near_scale[scales + d];
        let y = f32::cast_from(far[far_at + d]) * far_root * far_scale[scales + d];
        out[out_at + d] = O::cast_from(x + y);
    }
}

/// The gradient of one row of a branch, and one over its root mean square.
#[cube(launch_unchecked)]
fn branch_kernel<A: Float, O: Float>(
    branch: &[A],
    d_out: &[O],
    scale: &[f32],
    d_branch: &mut [A],
    roots: &mut [f32],
    strides: Strides,
    d_out_strides: Strides,
    sizes: Sizes,
    epsilon: f32,
    #[define(A, O)] _elements: [ElemType; 2],
) {
    if ABSOLUTE_POS >= sizes.rows as usize {
        terminate!();
    }
    let row = ABSOLUTE_POS as u32;
    let from = row_at(row, &strides, &sizes);
    let d_from = row_at(row, &d_out_strides, &sizes);
    let scales = (row / sizes.tokens % sizes.heads * sizes.dim) as usize;
    let root = inverse_root::<A>(branch, from, sizes.dim, epsilon);
    let mut product = 0.0f32;
    for d in 0..sizes.dim as usize {
        let u = f32::cast_from(d_out[d_from + d]) * scale[scales + d];
        product += f32::cast_from(branch[from + d]) * root * u;
    }
    let mean = product / f32::cast_from(sizes.dim);
    let to = ABSOLUTE_POS * sizes.dim as usize;
    for d in 0..sizes.dim as usize {
        let u = f32::cast_from(d_out[d_from + d]) * scale[scales + d];
        d_branch[to + d] = A::cast_from((u - f32::cast_from(branch[from + d]) * root * mean) * root);
    }
    roots[ABSOLUTE_POS] = root;
}

/// `sum d_out * x / s` over a segment of a sequence's rows: one unit, one number of a scale.
#[cube(launch_unchecked)]
fn scale_kernel<A: Float, O: Float>(
    branch: &[A],
    d_out: &[O],
    roots: &[f32],
    parts: &mut [f32],
    strides: Strides,
    d_out_strides: Strides,
    sizes: Sizes,
    segment: u32,
    segments: u32,
    #[define(A, O)] _elements: [ElemType; 2],
) {
    let numbers = sizes.heads * sizes.dim;
    let part = ABSOLUTE_POS as u32 / numbers;
    if part >= segments {
        terminate!();
    }
    let number = ABSOLUTE_POS as u32 % numbers;
    let per_sequence = sizes.tokens.div_ceil(segment);
    let batch = part / per_sequence;
    let first = part % per_sequence * segment;
    let head = number / sizes.dim;
    let d = (number % sizes.dim) as usize;
    let mut sum = 0.0f32;
    for token in first..min(first + segment, sizes.tokens) {
        let row = ((batch * sizes.heads + head) * sizes.tokens + token) as usize;
        let x = f32::cast_from(branch[offset(&strides, batch, head, token) + d]) * roots[row];
        sum += f32::cast_from(d_out[offset(&d_out_strides, batch, head, token) + d]) * x;
    }
    parts[ABSOLUTE_POS] = sum;
}

/// Adds the parts of every number up.
#[cube(launch_unchecked)]
fn parts_kernel(parts: &[f32], scale: &mut [f32], segments: u32, numbers: u32) {
    if ABSOLUTE_POS >= numbers as usize {
        terminate!();
    }
    let mut sum = 0.0f32;
    for segment in 0..segments {
        sum += parts[segment as usize * numbers as usize + ABSOLUTE_POS];
    }
    scale[ABSOLUTE_POS] = sum;
}
