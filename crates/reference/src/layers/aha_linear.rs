use num_traits::Float;

use super::{LayerOutput, RattentionLayer};
use crate::{
    Array, Partial, SigmoidGate, Training, gate_backward, linear, mask, norm_sum, norm_sum_backward,
};

/// AHA over a linear far branch, after the second question that arXiv 2512.22562 leaves open: RATTENTION whose far branch
/// has AHA's gate per token and head.
#[derive(Clone, Debug, PartialEq)]
pub struct AhaLinearLayer<F> {
    /// What a token-head is whose gate is open.
    pub open: RattentionLayer<F>,
    /// `[M, R]`.
    pub router_weight: Array<F, 2>,
    /// `[R]`.
    pub router_bias: Option<Vec<F>>,
}

impl<F: Float> AhaLinearLayer<F> {
    /// `W_O [RMS(a_near) + g RMS(a_far)]` with `g = sigmoid(X W_r) > 0.5`, for hidden states `[B, T, M]`.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn forward(&self, hidden: &Array<F, 3>) -> LayerOutput<F, 3> {
        let logits = linear(hidden, &self.router_weight, self.router_bias.as_deref());
        let (scores, routes) = SigmoidGate::aha().forward(&logits);
        let [near, far] = self.open.branches(hidden);
        let scales = [&self.open.near_scale, &self.open.far_scale];
        let out = aha_linear([&near, &far], &routes, scales, self.open.epsilon);
        LayerOutput { output: self.open.projections.output(&out), scores, routes }
    }
}

/// `RMS(near) + g RMS(far)`: the [`norm_sum`] of the near branch's outputs and of those of the far branch, of which rows
/// without a route of 1 are zero. `routes` are as for [`mask`].
///
/// # Panics
/// When shapes do not fit.
pub fn aha_linear<F: Float>(
    [near, far]: [&Array<F, 4>; 2],
    routes: &Array<u8, 3>,
    scales: [&Array<F, 2>; 2],
    epsilon: F,
) -> Array<F, 4> {
    norm_sum([near, &gated(far, routes)], scales, epsilon)
}

/// Gradients of what [`aha_linear`] reads, and by the straight-through estimator (arXiv 1308.3432) of the gate's scores.
#[derive(Clone, Debug, PartialEq)]
pub struct AhaLinearGradients<F> {
    /// `[B, H, T, Dv]`.
    pub near: Array<F, 4>,
    /// `[B, H, T, Dv]`; zero where the gate is closed.
    pub far: Array<F, 4>,
    /// `[H, Dv]`.
    pub near_scale: Array<F, 2>,
    /// `[H, Dv]`.
    pub far_scale: Array<F, 2>,
    /// `[B, R, T]`: `<d_out, RMS(far)>`, whatever the gate.
    pub scores: Array<F, 3>,
}

/// The backward pass of [`aha_linear`].
///
/// # Panics
/// When shapes do not fit.
pub fn aha_linear_backward<F: Float>(
    [near, far]: [&Array<F, 4>; 2],
    routes: &Array<u8, 3>,
    scales: [&Array<F, 2>; 2],
    epsilon: F,
    d_out: &Array<F, 4>,
) -> AhaLinearGradients<F> {
    let (d_near, near_scale) = norm_sum_backward(near, scales[0], epsilon, d_out);
    let (d_far, far_scale) = norm_sum_backward(&gated(far, routes), scales[1], epsilon, d_out);
    let nothing = Partial::empty(far.shape());
    let silent = Array::filled(scales[0].shape(), F::zero());
    let normed = Partial { out: norm_sum([far, far], [&silent, scales[1]], epsilon), ..nothing.clone() };
    AhaLinearGradients {
        near: d_near,
        far: gated(&d_far, routes),
        near_scale,
        far_scale,
        scores: gate_backward(d_out, &nothing, &normed, routes, Training::Exact),
    }
}

/// Rows whose route is 1; zeros in place of the others.
fn gated<F: Float>(far: &Array<F, 4>, routes: &Array<u8, 3>) -> Array<F, 4> {
    mask(routes, &Partial { out: far.clone(), ..Partial::empty(far.shape()) }).out
}

#[cfg(test)]
mod tests {
    use bifocal_core::{FeatureMap, Window};
    use rstest::rstest;

    use super::*;
    use crate::{
        array::dot,
        layers::tests::{hidden, projections},
        samples::{assert_gradient, noise},
    };

    fn layer(bias: f64) -> AhaLinearLayer<f64> {
        let open = RattentionLayer {
            projections: projections(1),
            window: Window::new(2).unwrap(),
            map: FeatureMap::SoftmaxPair,
            near_scale: Array::filled([4, 3], 2.0),
            far_scale: Array::filled([4, 3], 3.0),
            epsilon: 1e-8,
        };
        let model_dim = hidden().shape()[2];
        AhaLinearLayer { open, router_weight: noise([model_dim, 4], 5), router_bias: Some(vec![bias; 4]) }
    }

    #[test]
    fn gates_that_are_open_are_rattention_and_closed_ones_its_window() {
        let open = layer(1e3);
        assert_eq!(open.forward(&hidden()).output, open.open.forward(&hidden()));
        let closed = layer(-1e3);
        let mut alone = closed.open.clone();
        alone.far_scale = Array::filled([4, 3], 0.0);
        assert_eq!(closed.forward(&hidden()).output, alone.forward(&hidden()));
        assert_ne!(closed.forward(&hidden()).output, open.forward(&hidden()).output);
    }

    #[rstest]
    fn gradients_equal_differences(#[values(1, 2, 4)] router_heads: usize) {
        let shape = [2, 4, 5, 3];
        let (near, far, d_out) = (noise(shape, 1), noise(shape, 2), noise(shape, 3));
        let scales = [noise([4, 3], 4), noise([4, 3], 5)];
        let routes = noise([2, router_heads, 5], 6).map(|x| u8::from(x > 0.0));
        let loss = |near: &_, far: &_, routes: &_, far_scale: &_| {
            dot(aha_linear([near, far], routes, [&scales[0], far_scale], 0.1).as_slice(), d_out.as_slice())
        };
        let found = aha_linear_backward([&near, &far], &routes, [&scales[0], &scales[1]], 0.1, &d_out);
        assert_gradient(&near, &found.near, |near| loss(near, &far, &routes, &scales[1]));
        assert_gradient(&far, &found.far, |far| loss(&near, far, &routes, &scales[1]));
        assert_gradient(&scales[1], &found.far_scale, |scale| loss(&near, &far, &routes, scale));
        // A score's gradient is what its gate would change.
        for at in crate::array::indices(routes.shape()) {
            let [open, closed] = [1, 0].map(|gate| {
                let mut routes = routes.clone();
                routes[at] = gate;
                loss(&near, &far, &routes, &scales[1])
            });
            approx::assert_abs_diff_eq!(found.scores[at], open - closed, epsilon = 1e-12);
        }
    }
}
