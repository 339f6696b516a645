//! The gradient of scores that are compared, not multiplied: the straight-through estimator.

use bifocal::{Problem, Result, add_to_scores, dot_rows};
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
        let scores = inputs[1].dims();
        let [_, _, choices, _] = scores;
        let there = place.import("the gradient of the output", d_out.clone())?;
        let d_scores = bifocal::Tensor::zeros(client, scores)?;
        for (reach, out) in outs.iter().enumerate() {
            let Some(out) = out else { continue };
            let products = dot_rows(client, &problem, out.view(), there.view())?;
            // A gate's score is that of its far branch; the near one has what is left of 1.
            let (factor, choice) = match choices {
                1 if reach == 0 => (-1.0, 0),
                1 => (1.0, 0),
                _ => (1.0, reach),
            };
            add_to_scores(client, &problem, products.view(), factor, choice, &d_scores)?;
        }
        Ok(vec![d_out, place.export_contiguous(d_scores)?])
    }
}
