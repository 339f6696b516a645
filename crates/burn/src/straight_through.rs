//! The gradient of scores that are compared, not multiplied: the straight-through estimator.

use bifocal::{Problem, Result, choice_gradient, gate_gradient};
use burn::tensor::Tensor;

use crate::{autodiff::Differentiable, place::Place, system::Outs};

/// Attention's output as it is, out of that output and the scores `[B, R, K, T]` that routed it. Going back, each score
/// gets what its branch would have added: `dL/dp_k = <dL/do, a_k>`, and a gate `dL/dr = <dL/do, a_far - a_near>`, summed
/// over the query heads that the router head serves.
#[derive(Clone, Debug)]
pub(crate) struct StraightThrough {
    pub(crate) place: Place,
    pub(crate) problem: Problem,
    pub(crate) outs: Outs,
}

impl Differentiable for StraightThrough {
    fn backward(self, inputs: Vec<Tensor<4>>, d_out: Tensor<4>) -> Result<Vec<Tensor<4>>> {
        let Self { place, problem, outs } = self;
        let client = place.client();
        let [_, heads, choices, _] = inputs[1].dims();
        let there = place.import("the gradient of the output", d_out.clone())?;
        let outs: Vec<_> = outs.iter().map(|out| out.as_ref().map(|out| out.view())).collect();
        let d_scores = match (choices, &outs[..]) {
            (1, &[near, Some(far)]) => gate_gradient(client, &problem, heads, near, far, there.view())?,
            _ => choice_gradient(client, &problem, heads, &outs, there.view())?,
        };
        Ok(vec![d_out, place.export_contiguous(d_scores)?])
    }
}
