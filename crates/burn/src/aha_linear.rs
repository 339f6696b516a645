//! AHA over a linear far branch.

use bifocal::{Error, Problem, Result, Window};
use burn::tensor::Tensor;

use crate::{
    AttentionOptions, Routing, Training,
    linear::{linear_attention, linear_attention_on, norm_sum},
    place::{Origin, Place},
    straight_through::StraightThrough,
    windowed_attention,
};

/// What both branches of [`aha_linear_attention`] read.
#[derive(Clone, Debug)]
pub struct AhaLinearInputs {
    /// Query `[B, H, Tq, D]` and key `[B, Hk, Tk, D]` of the window.
    pub near: [Tensor<4>; 2],
    /// Those of the linear branch: before rotary positions and norms.
    pub far: [Tensor<4>; 2],
    /// `[B, Hk, Tk, Dv]`, of both.
    pub value: Tensor<4>,
    /// `[H * Dv]`, heads side by side: the scales of the near and of the far branch's norm.
    pub scales: [Tensor<1>; 2],
}

/// AHA over a linear far branch, after the second question that arXiv 2512.22562 leaves open:
/// `RMS(a_window) + g RMS(a_linear)`, where the gate `g` of a token-head is 1 iff its route is. Rows whose gate is closed
/// cost the linear branch nothing but its states.
///
/// `routing` has two reaches, as for [`aha_attention`](crate::aha_attention); branches and norms are those of RATTENTION
/// ([`windowed_attention`], [`linear_attention`], [`norm_sum`]). Token-heads without a valid route become NaN.
///
/// With autodiff all inputs get gradients, and [`Routing::scores`] the straight-through one, `<do, RMS(a_linear)>`: with
/// [`Training::Exact`] the linear branch is computed once more for it, for every row.
///
/// # Errors
/// As [`windowed_attention`] and [`norm_sum`]; [`Error::Option`] when `routing` has other than two reaches.
pub fn aha_linear_attention(
    inputs: AhaLinearInputs,
    routing: &Routing,
    window: Window,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    if routing.reaches() != 2 {
        return Err(Error::option("reaches of the routes", routing.reaches(), "2"));
    }
    let AhaLinearInputs { near: [near_query, near_key], far: [query, key], value, scales } = inputs;
    let [near_scale, far_scale] = scales;
    let (query_shape, key_shape, [.., value_dim]) = (query.dims(), key.dims(), value.dims());
    let near = windowed_attention(near_query, near_key, value.clone(), window, options)?;
    let far = linear_attention_on(query.clone(), key.clone(), value.clone(), window, routing)?;
    let out = norm_sum(near, far.clone(), near_scale.clone(), far_scale.clone())?;
    let Some(scores) = routing.tracked_scores() else { return Ok(out) };

    // What an open gate would add to each row.
    let every = match options.training {
        Training::Exact => linear_attention(query.inner(), key.inner(), value.inner(), window)?,
        Training::Sparse => far.inner(),
    };
    let nothing = every.zeros_like();
    let normed = norm_sum(nothing, every, near_scale.inner(), far_scale.inner())?;
    let scores_origin = Origin::of("the scores", &scores).of_any_dtype();
    let place = Place::of(&[Origin::of("the output", &out), scores_origin])?;
    let normed = place.import("the far branch", normed)?;
    let problem = Problem::new(query_shape, key_shape, normed.element())?.with_value_dim(value_dim)?;
    let unchanged = out.clone().inner();
    let step = StraightThrough { place: place.clone(), problem, outs: vec![None, Some(normed)] };
    place.record([out, scores], unchanged, step)
}
