//! The combination of RATTENTION: two branches, each normed per head, added.

// Comptime conditions cannot be joined to others.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_core::{
    DeviceProfile, Element, Error, Problem, Result,
    device::{
        Tensor, TensorView,
        launch::{elements, grid, steps, width},
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
    let lanes = lanes(client, problem);
    let width = width_of(problem, &[near, far, out.view()], &[near_scale, far_scale]);
    let (cubes, units) = grid(client, rows(problem) * lanes as usize);
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
            lanes,
            width,
            [near.element().into(), far.element().into(), out.element().into()],
            width,
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
        let (lanes, width) = (lanes(client, problem), width_of(problem, &[branch, d_out], &[scale]));
        let (cubes, units) = grid(client, rows(problem) * lanes as usize);
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
            lanes,
            width,
            types,
            width,
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

/// Units that share a row. There have to be numbers for all units.
fn lanes(client: &Client, problem: &Problem) -> u32 {
    let numbered = rows(problem) <= (u32::MAX / DeviceProfile::PLANE) as usize;
    if DeviceProfile::of(client).has_planes() && numbered { DeviceProfile::PLANE } else { 1 }
}

/// Numbers of a row that one load takes, from all of these.
fn width_of(problem: &Problem, views: &[TensorView<'_, 4>], scales: &[TensorView<'_, 2>]) -> usize {
    let of_scales = scales.iter().copied().flat_map(steps);
    let of_views = views.iter().copied().flat_map(steps);
    width(4, of_views.chain(of_scales).chain([problem.value_dim]))
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

/// The sum of what a lane has and, where several share a row, of what they have.
#[cube]
fn sum_of_row<N: Size>(parts: Vector<f32, N>, #[comptime] lanes: u32, #[comptime] width: usize) -> f32 {
    let mut sum = parts.extract(0usize);
    #[unroll]
    for i in 1..width {
        sum += parts.extract(i);
    }
    if comptime![lanes > 1] {
        sync_plane();
        sum = plane_sum(sum);
    }
    sum
}

/// One over the root mean square of the row that begins at `from`, a vector's index like all others here.
#[cube]
fn inverse_root<A: Float, N: Size>(
    branch: &[Vector<A, N>],
    from: usize,
    dim: u32,
    epsilon: f32,
    #[comptime] lanes: u32,
    #[comptime] width: usize,
) -> f32 {
    let mut squares = Vector::<f32, N>::new(0.0f32);
    let mut at = ABSOLUTE_POS as u32 % lanes;
    while at < dim / comptime![width as u32] {
        let x = Vector::<f32, N>::cast_from(branch[from + at as usize]);
        squares += x * x;
        at += lanes;
    }
    1.0f32 / (sum_of_row::<N>(squares, lanes, width) / f32::cast_from(dim) + epsilon).sqrt()
}

/// `lanes` units, one row.
#[cube(launch_unchecked)]
fn sum_kernel<A: Float, B: Float, O: Float, N: Size>(
    near: &[Vector<A, N>],
    far: &[Vector<B, N>],
    near_scale: &[Vector<f32, N>],
    far_scale: &[Vector<f32, N>],
    out: &mut [Vector<O, N>],
    near_strides: Strides,
    far_strides: Strides,
    out_strides: Strides,
    sizes: Sizes,
    epsilon: f32,
    #[comptime] lanes: u32,
    #[comptime] width: usize,
    #[define(A, B, O)] _elements: [ElemType; 3],
    #[define(N)] _vector: usize,
) {
    let row = ABSOLUTE_POS as u32 / lanes;
    // The same for all units of a row.
    if row >= sizes.rows {
        terminate!();
    }
    let near_at = row_at(row, &near_strides, &sizes) / width;
    let far_at = row_at(row, &far_strides, &sizes) / width;
    let out_at = row_at(row, &out_strides, &sizes) / width;
    let near_root = inverse_root::<A, N>(near, near_at, sizes.dim, epsilon, lanes, width);
    let far_root = inverse_root::<B, N>(far, far_at, sizes.dim, epsilon, lanes, width);
    let vectors = sizes.dim / comptime![width as u32];
    let scales = row / sizes.tokens % sizes.heads * vectors;
    let mut at = ABSOLUTE_POS as u32 % lanes;
    while at < vectors {
        let scale = (scales + at) as usize;
        let x = Vector::<f32, N>::cast_from(near[near_at + at as usize]) * Vector::new(near_root);
        let y = Vector::<f32, N>::cast_from(far[far_at + at as usize]) * Vector::new(far_root);
        let sum = x * near_scale[scale] + y * far_scale[scale];
        out[out_at + at as usize] = Vector::cast_from(sum);
        at += lanes;
    }
}

/// The gradient of one row of a branch, and one over its root mean square: `lanes` units, one row.
#[cube(launch_unchecked)]
fn branch_kernel<A: Float, O: Float, N: Size>(
    branch: &[Vector<A, N>],
    d_out: &[Vector<O, N>],
    scale: &[Vector<f32, N>],
    d_branch: &mut [Vector<A, N>],
    roots: &mut [f32],
    strides: Strides,
    d_out_strides: Strides,
    sizes: Sizes,
    epsilon: f32,
    #[comptime] lanes: u32,
    #[comptime] width: usize,
    #[define(A, O)] _elements: [ElemType; 2],
    #[define(N)] _vector: usize,
) {
    let row = ABSOLUTE_POS as u32 / lanes;
    // The same for all units of a row.
    if row >= sizes.rows {
        terminate!();
    }
    let lane = ABSOLUTE_POS as u32 % lanes;
    let from = row_at(row, &strides, &sizes) / width;
    let d_from = row_at(row, &d_out_strides, &sizes) / width;
    let vectors = sizes.dim / comptime![width as u32];
    let scales = row / sizes.tokens % sizes.heads * vectors;
    let root = inverse_root::<A, N>(branch, from, sizes.dim, epsilon, lanes, width);
    let mut products = Vector::<f32, N>::new(0.0f32);
    let mut at = lane;
    while at < vectors {
        let u = Vector::<f32, N>::cast_from(d_out[d_from + at as usize]) * scale[(scales + at) as usize];
        products += Vector::<f32, N>::cast_from(branch[from + at as usize]) * Vector::new(root) * u;
        at += lanes;
    }
    let mean = sum_of_row::<N>(products, lanes, width) / f32::cast_from(sizes.dim);
    at = lane;
    while at < vectors {
        let u = Vector::<f32, N>::cast_from(d_out[d_from + at as usize]) * scale[(scales + at) as usize];
        let x = Vector::<f32, N>::cast_from(branch[from + at as usize]) * Vector::new(root * mean);
        d_branch[(row * vectors + at) as usize] = Vector::cast_from((u - x) * Vector::new(root));
        at += lanes;
    }
    if lane == 0u32 {
        roots[row as usize] = root;
    }
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
