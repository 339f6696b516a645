//! How routers learn: the gradient of scores, as if the forward pass had weighed branches by them.
//!
//! A route is discrete. The straight-through estimator differentiates `o = sum_k g_k a_k` with respect to the gates `g`,
//! which are 0 or 1, and hands that gradient to the scores that they were made of. What it costs is the output of every
//! branch for every row; queries, keys and values still get gradients through the one branch of each row
//! ([`backward_selected`](crate::backward_selected)).

use bifocal_core::{
    Problem, Result,
    device::{AttentionOperator, Inputs, Partial, RouteGeometry, Routes, Rows, Tensor, TensorView},
};
use bifocal_dispatch::{add_to_scores, dot_rows, mask, select};
use cubecl::client::Client;

use crate::select::one_each;

/// Computes every row by every branch, and scatters into `partial`, whose outputs are contiguous, what
/// [`attend_selected`](crate::attend_selected) would write there; rows of a reach without a branch become zero (L2A's near
/// one). Returns the partials of the branches, by reach: [`gate_gradient`] and [`choice_gradient`] ask for their outputs.
///
/// The last branch computes `far_rows`: [`Rows::All`], or, where others are to learn nothing from it, no more than the
/// rows that a [`plan`](crate::plan) of `routes` gives it (L2A's sparse passes). Then its partial is `partial` itself: where
/// it was not computed, it counts as what the row's own branch gave.
///
/// # Errors
/// As [`attend_selected`](crate::attend_selected); [`Error::NotContiguous`](crate::Error::NotContiguous).
pub fn attend_every(
    client: &Client,
    problem: &Problem,
    inputs: &Inputs<'_>,
    routes: &Routes,
    branches: &[Option<&dyn AttentionOperator>],
    far_rows: Rows<'_>,
    partial: &Partial,
) -> Result<Vec<Option<Partial>>> {
    one_each(routes.geometry().reaches, branches.len())?;
    let last = branches.len() - 1;
    if branches.iter().any(Option::is_none) {
        mask(client, problem, routes, last, partial)?;
    }
    let mut computed = Vec::with_capacity(branches.len());
    for (reach, branch) in branches.iter().enumerate() {
        computed.push(match (branch, far_rows) {
            (None, _) => None,
            (Some(branch), Rows::Routed(_)) if reach == last => {
                branch.attend(client, problem, inputs, far_rows, partial)?;
                Some(partial.clone())
            }
            (Some(branch), _) => {
                let every = Partial::empty(client, problem, partial.out.element());
                branch.attend(client, problem, inputs, Rows::All, &every)?;
                select(client, problem, routes, reach, &every, partial)?;
                Some(every)
            }
        });
    }
    Ok(computed)
}

/// The gradient of a gate's scores, `f32 [B, R, 1, Tq]`: `<do, far - near>`, summed over the query heads of a router head.
///
/// AHA's outputs are `g a_full + (1 - g) a_window` (arXiv 2512.22562). L2A's are `g a_full` (arXiv 2603.17484): there is no
/// near branch, and where rows that were not routed were not computed, with outputs of 0, their gradient is 0.
///
/// # Errors
/// As [`dot_rows`]; [`Error::Shape`](crate::Error::Shape) unless `router_heads` is 1, Hk or H.
pub fn gate_gradient(
    client: &Client,
    problem: &Problem,
    router_heads: usize,
    near: Option<TensorView<'_, 4>>,
    far: TensorView<'_, 4>,
    d_out: TensorView<'_, 4>,
) -> Result<Tensor<4>> {
    let scores = no_gradient(client, problem, router_heads, 1)?;
    for (branch, factor) in [(Some(far), 1.0), (near, -1.0)] {
        let Some(branch) = branch else { continue };
        let products = dot_rows(client, problem, branch, d_out)?;
        add_to_scores(client, problem, products.view(), factor, 0, &scores)?;
    }
    Ok(scores)
}

/// The gradient of a choice's scores, `f32 [B, R, K, Tq]`: `<do, a_k>` for every branch k, summed over the query heads of a
/// router head; 0 where there is no branch. The softmax that the scores came from is not differentiated here.
///
/// # Errors
/// As [`gate_gradient`]; [`Error::Option`](crate::Error::Option) unless there are 1 to 255 choices.
pub fn choice_gradient(
    client: &Client,
    problem: &Problem,
    router_heads: usize,
    branches: &[Option<TensorView<'_, 4>>],
    d_out: TensorView<'_, 4>,
) -> Result<Tensor<4>> {
    let scores = no_gradient(client, problem, router_heads, branches.len())?;
    for (choice, branch) in branches.iter().enumerate() {
        let Some(branch) = *branch else { continue };
        let products = dot_rows(client, problem, branch, d_out)?;
        add_to_scores(client, problem, products.view(), 1.0, choice, &scores)?;
    }
    Ok(scores)
}

/// Zeros for the scores of a router.
fn no_gradient(client: &Client, problem: &Problem, router_heads: usize, choices: usize) -> Result<Tensor<4>> {
    let Problem { batch, query_len, .. } = *problem;
    RouteGeometry::new(batch, router_heads, query_len, choices)?.check(problem)?;
    Tensor::zeros(client, [batch, router_heads, choices, query_len])
}
