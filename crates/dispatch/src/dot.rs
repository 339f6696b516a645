//! Products of rows: what a backward pass asks for before its kernels, and a router's gradient is made of.

// In a kernel `%` is one instruction, and `is_multiple_of` is not there.
#![allow(clippy::manual_is_multiple_of)]

use bifocal_core::{
    DeviceProfile, Element, Error, Problem, Result,
    device::{
        RouteGeometry, Tensor, TensorView,
        launch::{elements, grid, steps, width},
    },
};
use cubecl::{client::Client, prelude::*};

/// The product of every output row of `a` with the same row of `b`: `f32 [B, H, Tq]` from two `[B, H, Tq, Dv]`, each of
/// which holds `f32` or the problem's element type.
///
/// Of outputs and their gradients it is the `delta` of a backward pass (FlashAttention-2, arXiv 2307.08691, section 3.1.2,
/// where it is `D`); of a branch's outputs and the gradient of the outputs, the gradient of that branch's straight-through
/// gate.
///
/// # Errors
/// As [`TensorView::check`]; [`Error::Element`].
pub fn dot_rows(
    client: &Client,
    problem: &Problem,
    a: TensorView<'_, 4>,
    b: TensorView<'_, 4>,
) -> Result<Tensor<3>> {
    problem.check()?;
    for (name, view) in [("the first of two outputs", a), ("the second of two outputs", b)] {
        let element = match view.element() {
            Element::F32 => Element::F32,
            _ => problem.element,
        };
        view.check(name, client, problem.out_shape(), element)?;
        if !Element::FLOATS.contains(&element) {
            return Err(Error::Element { tensor: name, expected: Element::F32, found: element });
        }
    }
    let out = Tensor::empty(client, problem.lse_shape(), Element::F32);
    let rows = problem.batch * problem.heads * problem.query_len;
    let blueprint = Blueprint::new(client, problem, a, b);
    let (cubes, units) = grid(client, rows * blueprint.units as usize);
    // SAFETY: both views were checked against the problem; each unit checks its row.
    unsafe {
        dot_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(a),
            elements(b),
            elements(out.view()),
            strides(a),
            strides(b),
            rows as u32,
            problem.query_len as u32,
            problem.heads as u32,
            problem.value_dim as u32,
            blueprint,
            [a.element().into(), b.element().into()],
            blueprint.width,
        );
    }
    Ok(out)
}

/// Adds `factor` times the sums of `products`, `f32 [B, H, Tq]`, over the query heads of each router head to column `choice`
/// of `scores`, `f32 [B, R, K, Tq]`: products of rows become the gradient of a router's scores, which one router head gives
/// to all query heads that it serves.
///
/// # Errors
/// As [`TensorView::check`]; [`Error::NotContiguous`]; [`Error::Shape`] unless R is 1, Hk or H; [`Error::Option`] when there is
/// no such column.
pub fn add_to_scores(
    client: &Client,
    problem: &Problem,
    products: TensorView<'_, 3>,
    factor: f32,
    choice: usize,
    scores: &Tensor<4>,
) -> Result<()> {
    let [batch, router_heads, choices, tokens] = scores.shape();
    RouteGeometry::new(batch, router_heads, tokens, choices)?.check(problem)?;
    let name = "the gradient of the scores";
    scores.view().check(name, client, scores.shape(), Element::F32)?;
    scores.view().check_contiguous(name)?;
    products.check("the products of rows", client, problem.lse_shape(), Element::F32)?;
    products.check_contiguous("the products of rows")?;
    if choice >= choices {
        return Err(Error::option("the column of the scores", choice, format!("0..{choices}")));
    }
    let rows = batch * router_heads * tokens;
    let (cubes, units) = grid(client, rows);
    // SAFETY: both tensors were checked against the problem; each unit checks its row.
    unsafe {
        add_heads::launch_unchecked(
            client,
            cubes,
            units,
            elements(products),
            elements(scores.view()),
            rows as u32,
            tokens as u32,
            (problem.heads / router_heads) as u32,
            choices as u32,
            choice as u32,
            factor,
        );
    }
    Ok(())
}

/// One unit, one token of a router head.
#[cube(launch_unchecked)]
fn add_heads(
    products: &[f32],
    scores: &mut [f32],
    rows: u32,
    tokens: u32,
    heads: u32,
    choices: u32,
    choice: u32,
    factor: f32,
) {
    if ABSOLUTE_POS >= rows as usize {
        terminate!();
    }
    let token = ABSOLUTE_POS as u32 % tokens;
    let router_row = ABSOLUTE_POS as u32 / tokens;
    let mut sum = 0.0f32;
    for head in 0..heads {
        sum += products[((router_row * heads + head) * tokens + token) as usize];
    }
    scores[((router_row * choices + choice) * tokens + token) as usize] += factor * sum;
}

/// The compile-time key of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Blueprint {
    /// Numbers that one load takes.
    width: usize,
    /// Units that share a row.
    units: u32,
}

impl Blueprint {
    fn new(client: &Client, problem: &Problem, a: TensorView<'_, 4>, b: TensorView<'_, 4>) -> Self {
        let width = width(4, [a, b].into_iter().flat_map(steps).chain([problem.value_dim]));
        // Where units run in planes, neighbours read neighbours.
        let rows = problem.batch * problem.heads * problem.query_len;
        let mut units = if DeviceProfile::of(client).has_planes() { 16 } else { 1 };
        while units > 1 && (units * width > problem.value_dim || rows * units > u32::MAX as usize / 2) {
            units /= 2;
        }
        Self { width, units: units as u32 }
    }
}

/// Strides of a `[batch, head, token, dim]` tensor, in elements; the last is 1.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Strides {
    pub(crate) batch: u32,
    pub(crate) head: u32,
    pub(crate) token: u32,
}

pub(crate) fn strides(view: TensorView<'_, 4>) -> StridesLaunch {
    let [batch, head, token, _] = view.strides();
    StridesLaunch::new(batch as u32, head as u32, token as u32)
}

/// Where the row's dim 0 is, counted in loads.
#[cube]
fn row_at(strides: &Strides, batch: u32, head: u32, token: u32, #[comptime] width: usize) -> u32 {
    (batch * strides.batch + head * strides.head + token * strides.token) / comptime![width as u32]
}

#[cube(launch_unchecked)]
fn dot_kernel<A: Float, B: Float, N: Size>(
    a: &[Vector<A, N>],
    b: &[Vector<B, N>],
    out: &mut [f32],
    a_strides: Strides,
    b_strides: Strides,
    rows: u32,
    tokens: u32,
    heads: u32,
    dim: u32,
    #[comptime] blueprint: Blueprint,
    #[define(A, B)] _elements: [ElemType; 2],
    #[define(N)] _width: usize,
) {
    let width = comptime![blueprint.width];
    let units = comptime![blueprint.units];
    let unit = ABSOLUTE_POS as u32 % units;
    let row = ABSOLUTE_POS as u32 / units;
    // Units beyond the last row compute it again: a plane stays whole until its sums are exchanged.
    let at = min(row, rows - 1u32);
    let token = at % tokens;
    let head = at / tokens % heads;
    let batch = at / tokens / heads;
    let a_row = row_at(&a_strides, batch, head, token, width);
    let b_row = row_at(&b_strides, batch, head, token, width);
    let mut sums = Vector::<f32, N>::new(0.0f32);
    let mut d = unit;
    while d < dim / comptime![width as u32] {
        let x = Vector::<f32, N>::cast_from(a[(a_row + d) as usize]);
        let y = Vector::<f32, N>::cast_from(b[(b_row + d) as usize]);
        sums = fma(x, y, sums);
        d += units;
    }
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..width {
        sum += sums.extract(i);
    }
    #[unroll]
    for step in 0..4u32 {
        let mask = comptime![8u32 >> step];
        if comptime![mask < units] {
            sum += plane_shuffle_xor(sum, mask);
        }
    }
    if unit == 0u32 && row < rows {
        out[row as usize] = sum;
    }
}
