//! One unit per output row, `[B, H, T]`.

use cubecl::prelude::*;

/// How rows of outputs map to rows of routes.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Rows {
    pub(super) rows: u32,
    pub(super) tokens: u32,
    pub(super) heads: u32,
    pub(super) router_heads: u32,
    pub(super) dim: u32,
}

#[cube]
fn router_row(row: u32, rows: &Rows) -> u32 {
    let head = (row / rows.tokens) % rows.heads;
    (row / rows.tokens / rows.heads) * rows.router_heads + head * rows.router_heads / rows.heads
}

#[cube]
fn route_of(routes: &[u32], row: u32, rows: &Rows) -> u32 {
    let token = row % rows.tokens;
    let word = routes[(router_row(row, rows) * rows.tokens.div_ceil(4u32) + token / 4u32) as usize];
    (word >> ((token % 4u32) * 8u32)) & 255u32
}

/// Every row, or with `routed` those whose route is `reach`.
#[cube(launch_unchecked)]
pub(super) fn merge_kernel<A: Float, O: Float>(
    routes: &[u32],
    from_out: &[A],
    from_lse: &[f32],
    out: &mut [O],
    lse: &mut [f32],
    rows: Rows,
    reaches: u32,
    reach: u32,
    neg_inf: f32,
    nan: f32,
    #[comptime] routed: bool,
    #[define(A, O)] _elements: [ElemType; 2],
) {
    if ABSOLUTE_POS >= rows.rows as usize {
        terminate!();
    }
    let mut taken = true;
    let mut invalid = false;
    if comptime![routed] {
        let route = route_of(routes, ABSOLUTE_POS as u32, &rows);
        invalid = route >= reaches;
        taken = route == reach || invalid;
    }
    if taken {
        let a = from_lse[ABSOLUTE_POS];
        let b = lse[ABSOLUTE_POS];
        let top = max(a, b);
        let offset = select(top == neg_inf, 0.0f32, top);
        let a_weight = (a - offset).exp();
        let b_weight = (b - offset).exp();
        let sum = a_weight + b_weight;
        let empty = sum == 0.0f32;
        let norm = select(empty, 0.0f32, 1.0f32 / sum);
        let merged = select(empty, neg_inf, offset + select(empty, 1.0f32, sum).ln());
        lse[ABSOLUTE_POS] = select(invalid, nan, merged);
        for d in 0..rows.dim as usize {
            let at = ABSOLUTE_POS * rows.dim as usize + d;
            // A side without weight contributes nothing, whatever its output holds.
            let x = select(a == neg_inf, 0.0f32, f32::cast_from(from_out[at]) * a_weight);
            let y = select(b == neg_inf, 0.0f32, f32::cast_from(out[at]) * b_weight);
            out[at] = O::cast_from(select(invalid, nan, (x + y) * norm));
        }
    }
}

/// Every row, or with `routed` those whose route is `reach`.
#[cube(launch_unchecked)]
pub(super) fn mix_kernel<A: Float, O: Float>(
    routes: &[u32],
    weights: &[f32],
    far: &[A],
    out: &mut [O],
    rows: Rows,
    reaches: u32,
    reach: u32,
    nan: f32,
    #[comptime] routed: bool,
    #[define(A, O)] _elements: [ElemType; 2],
) {
    if ABSOLUTE_POS >= rows.rows as usize {
        terminate!();
    }
    let row = ABSOLUTE_POS as u32;
    let mut taken = true;
    let mut invalid = false;
    if comptime![routed] {
        let route = route_of(routes, row, &rows);
        invalid = route >= reaches;
        taken = route == reach || invalid;
    }
    if taken {
        let weight = weights[(router_row(row, &rows) * rows.tokens + row % rows.tokens) as usize];
        for d in 0..rows.dim as usize {
            let at = ABSOLUTE_POS * rows.dim as usize + d;
            let mixed = (1.0f32 - weight) * f32::cast_from(out[at]) + weight * f32::cast_from(far[at]);
            out[at] = O::cast_from(select(invalid, nan, mixed));
        }
    }
}

#[cube(launch_unchecked)]
pub(super) fn select_kernel<A: Float, O: Float>(
    routes: &[u32],
    from_out: &[A],
    from_lse: &[f32],
    out: &mut [O],
    lse: &mut [f32],
    rows: Rows,
    reaches: u32,
    reach: u32,
    nan: f32,
    #[define(A, O)] _elements: [ElemType; 2],
) {
    if ABSOLUTE_POS >= rows.rows as usize {
        terminate!();
    }
    let route = route_of(routes, ABSOLUTE_POS as u32, &rows);
    let invalid = route >= reaches;
    if route == reach || invalid {
        lse[ABSOLUTE_POS] = select(invalid, nan, from_lse[ABSOLUTE_POS]);
        for d in 0..rows.dim as usize {
            let at = ABSOLUTE_POS * rows.dim as usize + d;
            out[at] = O::cast_from(select(invalid, nan, f32::cast_from(from_out[at])));
        }
    }
}

#[cube(launch_unchecked)]
pub(super) fn mask_kernel<O: Float>(
    routes: &[u32],
    out: &mut [O],
    lse: &mut [f32],
    rows: Rows,
    reaches: u32,
    reach: u32,
    neg_inf: f32,
    nan: f32,
    #[define(O)] _element: ElemType,
) {
    if ABSOLUTE_POS >= rows.rows as usize {
        terminate!();
    }
    let route = route_of(routes, ABSOLUTE_POS as u32, &rows);
    if route != reach {
        let invalid = route >= reaches;
        lse[ABSOLUTE_POS] = select(invalid, nan, neg_inf);
        for d in 0..rows.dim as usize {
            out[ABSOLUTE_POS * rows.dim as usize + d] = O::cast_from(select(invalid, nan, 0.0f32));
        }
    }
}
