//! The sum of two normed branches.

use bifocal::{Element, NormSum, Tensor};
use bifocal_reference::{self as reference, Array};
use num_traits::Float;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::case::{Bound, linear_cases};
use crate::{
    Device, Effort,
    case::Case,
    compare::run,
    gradients::draw_d_out,
    inputs::{array, round},
    refute,
};

/// Two branches' outputs and the scales of their norms.
pub(crate) struct NormData {
    near: Vec<f32>,
    far: Vec<f32>,
    scales: [Vec<f32>; 2],
}

impl NormData {
    pub(crate) fn scales(case: &Case) -> [Vec<f32>; 2] {
        let mut rng = SmallRng::seed_from_u64(case.seed ^ 0x5ca1e);
        let mut draw = || (0..case.heads() * case.value_dim).map(|_| rng.random_range(0.5..1.5)).collect();
        [draw(), draw()]
    }

    pub(crate) fn scale<F: Float>(case: &Case, scale: &[f32]) -> Array<F, 2> {
        array([case.heads(), case.value_dim], scale)
    }

    pub(crate) fn upload_scale(device: &Device, case: &Case, scale: &[f32]) -> Result<Tensor<2>, String> {
        run(Tensor::from_f32(&device.client, [case.heads(), case.value_dim], Element::F32, scale))
    }

    /// The output, and the gradients of near, far and the two scales.
    fn oracle<F: Float>(&self, case: &Case, d_out: &[f32]) -> [Vec<F>; 5] {
        let shape = case.problem().out_shape();
        let branches: [Array<F, 4>; 2] = [array(shape, &self.near), array(shape, &self.far)];
        let scales = [Self::scale(case, &self.scales[0]), Self::scale(case, &self.scales[1])];
        let epsilon = F::from(EPSILON).expect("a float");
        let d_out = array(shape, d_out);
        let out = reference::norm_sum([&branches[0], &branches[1]], [&scales[0], &scales[1]], epsilon);
        let side = |at: usize| reference::norm_sum_backward(&branches[at], &scales[at], epsilon, &d_out);
        let ((near, near_scale), (far, far_scale)) = (side(0), side(1));
        [out.into_vec(), near.into_vec(), far.into_vec(), near_scale.into_vec(), far_scale.into_vec()]
    }
}

const EPSILON: f32 = 1e-6;

pub(super) fn norm_sums_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (linear_cases(&device.profile), any::<[bool; 2]>()), |(of, [far_f32, swapped])| {
        let (case, client) = (Case { magnitude: 1.0, ..of.case }, &device.client);
        let problem = case.problem();
        let shape = problem.out_shape();
        let far_element = if far_f32 { Element::F32 } else { case.element };
        let rounded = |values: Vec<f32>, element| values.into_iter().map(|x| round(element, x)).collect();
        let data = NormData {
            near: rounded(draw_d_out(&Case { seed: case.seed ^ 1, ..case.clone() }), case.element),
            far: rounded(draw_d_out(&Case { seed: case.seed ^ 2, ..case.clone() }), far_element),
            scales: NormData::scales(&case),
        };
        let d_out = draw_d_out(&case);
        let near_on = run(match swapped {
            true => crate::inputs::upload_token_major(client, case.element, &data.near, shape),
            false => Tensor::from_f32(client, shape, case.element, &data.near),
        })?;
        let far_on = run(Tensor::from_f32(client, shape, far_element, &data.far))?;
        let near_scale = NormData::upload_scale(device, &case, &data.scales[0])?;
        let far_scale = NormData::upload_scale(device, &case, &data.scales[1])?;
        let inputs = NormSum {
            near: near_on.view(),
            far: far_on.view(),
            near_scale: near_scale.view(),
            far_scale: far_scale.view(),
            epsilon: EPSILON,
        };
        let out = run(Tensor::filled(client, shape, case.out_element(), f32::NAN))?;
        run(bifocal::norm_sum(client, &problem, &inputs, &out))?;
        let d_out_on = run(Tensor::from_f32(client, shape, case.out_element(), &d_out))?;
        let found = run(bifocal::norm_sum_backward(client, &problem, &inputs, d_out_on.view()))?;
        let found = [
            run(out.to_f32(client))?,
            run(found.near.to_f32(client))?,
            run(found.far.to_f32(client))?,
            run(found.near_scale.to_f32(client))?,
            run(found.far_scale.to_f32(client))?,
        ];
        let elements = [case.out_element(), case.element, far_element, Element::F32, Element::F32];
        let (exact, plain) = (data.oracle::<f64>(&case, &d_out), data.oracle::<f32>(&case, &d_out));
        let names = ["output", "near", "far", "near scale", "far scale"];
        for (at, (exact, plain)) in exact.into_iter().zip(&plain).enumerate() {
            Bound::new(exact, plain, elements[at]).accepts(names[at], &found[at])?;
        }
        Ok(())
    })
}
