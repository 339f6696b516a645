use bifocal_core::Reach;
use num_traits::Float;

use super::{AhaLayer, L2aLayer, MultiWindowLayer, Projections, QkNorm, add, split_heads};
use crate::{
    Array, Gradients, Options, Partial, SigmoidGate, Training, attention_backward_where, choice_backward,
    combine::router_head, gate_backward, linear, linear_backward, linear_choice, linear_choice_backward,
    mask, rms_norm, rms_norm_backward, rope_backward, select, softmax_choice, softmax_choice_backward,
};

/// Gradients of a loss with respect to a layer's input and weights.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerGradients<F, L> {
    /// Of the hidden states, `[B, T, M]`.
    pub hidden: Array<F, 3>,
    /// A layer that holds in the place of each weight its gradient.
    pub weights: L,
}

impl<F: Float> Projections<F> {
    /// The backward pass of [`dense`](Self::dense), from `d_output` `[B, T, M]`.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn dense_backward(
        &self,
        hidden: &Array<F, 3>,
        reach: Reach,
        d_output: &Array<F, 3>,
    ) -> LayerGradients<F, Self> {
        let partial = self.attend(hidden, &[reach]).remove(0);
        self.attend_backward(hidden, &partial, d_output, |_, _, _| Some(reach)).0
    }

    /// The backward pass of rows that were taken from one or several reaches: `partial` is what was taken, `reach_of` from
    /// where. Beside the gradients stands that of the attention outputs, which a router asks for.
    fn attend_backward(
        &self,
        hidden: &Array<F, 3>,
        partial: &Partial<F>,
        d_output: &Array<F, 3>,
        reach_of: impl Fn(usize, usize, usize) -> Option<Reach>,
    ) -> (LayerGradients<F, Self>, Array<F, 4>) {
        let (d_out, wo) = self.output_backward(&partial.out, d_output);
        let [q, k, v] = self.project(hidden);
        let options = Options::new(q.shape()[3]);
        let gradients = attention_backward_where(&q, &k, &v, &options, partial, &d_out, reach_of);
        (self.project_backward(hidden, &gradients, wo), d_out)
    }

    /// The backward pass of [`project`](Self::project); `d_wo` comes from [`output_backward`](Self::output_backward).
    fn project_backward(
        &self,
        hidden: &Array<F, 3>,
        gradients: &Gradients<F>,
        d_wo: Array<F, 2>,
    ) -> LayerGradients<F, Self> {
        let (mut d_q, mut d_k) = (gradients.query.clone(), gradients.key.clone());
        if let Some(theta) = self.rope_theta {
            d_q = rope_backward(&d_q, theta, 0);
            d_k = rope_backward(&d_k, theta, 0);
        }
        let qk_norm = self.qk_norm.as_ref().map(|norm| {
            let q = split_heads(hidden, &self.wq, self.heads);
            let k = split_heads(hidden, &self.wk, self.kv_heads);
            let (query, key);
            (d_q, query) = rms_norm_backward(&q, &norm.query, norm.epsilon, &d_q);
            (d_k, key) = rms_norm_backward(&k, &norm.key, norm.epsilon, &d_k);
            QkNorm { query, key, epsilon: norm.epsilon }
        });
        let q = linear_backward(hidden, &self.wq, &columns(&d_q));
        let k = linear_backward(hidden, &self.wk, &columns(&d_k));
        let v = linear_backward(hidden, &self.wv, &columns(&gradients.value));
        let weights = Self {
            heads: self.heads,
            kv_heads: self.kv_heads,
            wq: q.weight,
            wk: k.weight,
            wv: v.weight,
            wo: d_wo,
            qk_norm,
            rope_theta: self.rope_theta,
        };
        LayerGradients { hidden: add(&add(&q.hidden, &k.hidden), &v.hidden), weights }
    }

    /// The backward pass of [`output`](Self::output): gradients of the attention outputs `[B, H, T, Dv]` and of `wo`.
    fn output_backward(&self, out: &Array<F, 4>, d_output: &Array<F, 3>) -> (Array<F, 4>, Array<F, 2>) {
        let [batch, heads, tokens, dim] = out.shape();
        let joined = Array::from_fn([batch, tokens, heads * dim], |[b, t, i]| out[[b, i / dim, t, i % dim]]);
        let hidden_dim = d_output.shape()[2];
        let transposed = Array::from_fn([batch, hidden_dim, tokens], |[b, m, t]| d_output[[b, t, m]]);
        let found = linear_backward(&joined, &self.wo, &transposed);
        (Array::from_fn(out.shape(), |[b, h, t, d]| found.hidden[[b, t, h * dim + d]]), found.weight)
    }
}

/// Gradients `[B, heads, T, D]` as those of the columns of a projection: `[B, heads * D, T]`.
fn columns<F: Float>(d: &Array<F, 4>) -> Array<F, 3> {
    let [batch, heads, tokens, dim] = d.shape();
    Array::from_fn([batch, heads * dim, tokens], |[b, i, t]| d[[b, i / dim, t, i % dim]])
}

/// The reach of a row of `heads` heads by its route, if it is computed; an invalid route is of the last reach, as in a
/// plan.
fn reach_of(
    routes: &Array<u8, 3>,
    reaches: &[Option<Reach>],
    heads: usize,
) -> impl Fn(usize, usize, usize) -> Option<Reach> {
    move |b, h, t| {
        let route = usize::from(routes[[b, router_head(h, routes.shape()[1], heads), t]]);
        reaches[route.min(reaches.len() - 1)]
    }
}

impl<F: Float> AhaLayer<F> {
    /// The backward pass of [`forward`](Self::forward) by the straight-through estimator, from `d_output` `[B, T, M]`
    /// and `d_scores` `[B, R, T]`, which is what else the loss says about the scores: a penalty's gradient, or zeros.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn backward(
        &self,
        hidden: &Array<F, 3>,
        d_output: &Array<F, 3>,
        d_scores: &Array<F, 3>,
        training: Training,
    ) -> LayerGradients<F, Self> {
        let gate = SigmoidGate::aha();
        let logits = linear(hidden, &self.router_weight, self.router_bias.as_deref());
        let (scores, routes) = gate.forward(&logits);
        let reaches = [Reach::Window(self.window), Reach::All];
        let branches = self.projections.attend(hidden, &reaches);
        let (near, far) = (&branches[0], &branches[1]);
        let selected = select(&routes, &[near, far]);

        let taken = reaches.map(Some);
        let reach_of = reach_of(&routes, &taken, self.projections.heads);
        let (attended, d_out) = self.projections.attend_backward(hidden, &selected, d_output, reach_of);
        let d_scores = add(d_scores, &gate_backward(&d_out, near, far, &routes, training));
        let router = linear_backward(hidden, &self.router_weight, &gate.backward(&scores, &d_scores));
        LayerGradients {
            hidden: add(&attended.hidden, &router.hidden),
            weights: Self {
                projections: attended.weights,
                router_weight: router.weight,
                router_bias: self.router_bias.as_ref().map(|_| router.bias),
                window: self.window,
            },
        }
    }
}

impl<F: Float> MultiWindowLayer<F> {
    /// The backward pass of [`forward`](Self::forward) by the straight-through estimator, from `d_output` `[B, T, M]`
    /// and `d_scores` `[B, R, K, T]`, as [`AhaLayer::backward`]. In sparse training full attention counts as what a row
    /// took where it took something else.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn backward(
        &self,
        hidden: &Array<F, 3>,
        d_output: &Array<F, 3>,
        d_scores: &Array<F, 4>,
        training: Training,
    ) -> LayerGradients<F, Self> {
        let reaches = self.reaches();
        let logits = linear_choice(hidden, &self.router_weight, self.router_bias.as_deref(), reaches.len());
        let (scores, routes) = softmax_choice(&logits);
        let branches = self.projections.attend(hidden, &reaches);
        let mut branches: Vec<_> = branches.iter().collect();
        let selected = select(&routes, &branches);

        let taken: Vec<_> = reaches.iter().copied().map(Some).collect();
        let reach_of = reach_of(&routes, &taken, self.projections.heads);
        let (attended, d_out) = self.projections.attend_backward(hidden, &selected, d_output, reach_of);
        if training == Training::Sparse {
            // Rows that took full attention hold it.
            *branches.last_mut().expect("full attention is a choice") = &selected;
        }
        let d_scores = add(d_scores, &choice_backward(&d_out, &branches, routes.shape()[1]));
        let d_logits = softmax_choice_backward(&scores, &d_scores);
        let router = linear_choice_backward(hidden, &self.router_weight, &d_logits);
        LayerGradients {
            hidden: add(&attended.hidden, &router.hidden),
            weights: Self {
                projections: attended.weights,
                router_weight: router.weight,
                router_bias: self.router_bias.as_ref().map(|_| router.bias),
                windows: self.windows.clone(),
            },
        }
    }
}

impl<F: Float> L2aLayer<F> {
    /// The backward pass of [`forward`](Self::forward) by the straight-through estimator, from `d_output` `[B, T, M]`
    /// and `d_scores` `[B, R, T]`, as [`AhaLayer::backward`]. [`Training::Sparse`] is the paper's usual pass,
    /// [`Training::Exact`] its dense one.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn backward(
        &self,
        hidden: &Array<F, 3>,
        d_output: &Array<F, 3>,
        d_scores: &Array<F, 3>,
        training: Training,
    ) -> LayerGradients<F, Self> {
        let near = Reach::Window(self.window);
        let u1 = rms_norm(hidden, &self.local_norm, self.epsilon);
        let local = self.local.attend(&u1, &[near]).remove(0);
        let x1 = add(hidden, &self.local.output(&local.out));
        let u2 = rms_norm(&x1, &self.global_norm, self.epsilon);
        let gate = SigmoidGate::l2a();
        let (scores, routes) = gate.forward(&linear(&u2, &self.router_weight, None));
        let full = self.global.attend(&u2, &[Reach::All]).remove(0);
        let gated = mask(&routes, &full);

        let reach_of = reach_of(&routes, &[None, Some(Reach::All)], self.global.heads);
        let (global, d_out) = self.global.attend_backward(&u2, &gated, d_output, reach_of);
        let none = Partial::empty(full.out.shape());
        let d_scores = add(d_scores, &gate_backward(&d_out, &none, &full, &routes, training));
        let router = linear_backward(&u2, &self.router_weight, &gate.backward(&scores, &d_scores));
        let d_u2 = add(&global.hidden, &router.hidden);
        let (d_x1, global_norm) = rms_norm_backward(&x1, &self.global_norm, self.epsilon, &d_u2);
        let d_x1 = add(d_output, &d_x1);

        let (local, _) = self.local.attend_backward(&u1, &local, &d_x1, |_, _, _| Some(near));
        let (d_x, local_norm) = rms_norm_backward(hidden, &self.local_norm, self.epsilon, &local.hidden);
        LayerGradients {
            hidden: add(&d_x1, &d_x),
            weights: Self {
                local_norm,
                local: local.weights,
                global_norm,
                global: global.weights,
                epsilon: self.epsilon,
                router_weight: router.weight,
                window: self.window,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use bifocal_core::Window;
    use rstest::rstest;

    use super::{
        super::tests::{HIDDEN, TOKENS, aha, hidden, l2a, projections, window},
        *,
    };
    use crate::{
        array::dot,
        mix,
        samples::{assert_gradient, noise},
    };

    fn d_output() -> Array<f64, 3> {
        noise([2, TOKENS, HIDDEN], 200)
    }

    /// A loss that speaks of output and scores.
    fn loss<const N: usize>(output: &Array<f64, 3>, scores: &Array<f64, N>, d_scores: &Array<f64, N>) -> f64 {
        dot(output.as_slice(), d_output().as_slice()) + dot(scores.as_slice(), d_scores.as_slice())
    }

    /// Gates of the surrogate: `g + r - r0` where the score r moves the output.
    fn surrogate(
        training: Training,
        routes: &Array<u8, 3>,
        r: &Array<f64, 3>,
        r0: &Array<f64, 3>,
    ) -> Array<f64, 3> {
        let moves = |route| training == Training::Exact || route == 1;
        Array::from_fn(routes.shape(), |i| {
            f64::from(routes[i]) + if moves(routes[i]) { r[i] - r0[i] } else { 0.0 }
        })
    }

    fn assert_vec_gradient(x: &[f64], gradient: &[f64], loss: impl Fn(Vec<f64>) -> f64) {
        let array = |x: &[f64]| Array::new([x.len()], x.to_vec());
        assert_gradient(&array(x), &array(gradient), |x| loss(x.as_slice().to_vec()));
    }

    /// Compares the gradients of all weights with differences of `loss`.
    fn check_projections(
        layer: &Projections<f64>,
        found: &Projections<f64>,
        loss: impl Fn(Projections<f64>) -> f64,
    ) {
        assert_gradient(&layer.wq, &found.wq, |w| loss(Projections { wq: w.clone(), ..layer.clone() }));
        assert_gradient(&layer.wk, &found.wk, |w| loss(Projections { wk: w.clone(), ..layer.clone() }));
        assert_gradient(&layer.wv, &found.wv, |w| loss(Projections { wv: w.clone(), ..layer.clone() }));
        assert_gradient(&layer.wo, &found.wo, |w| loss(Projections { wo: w.clone(), ..layer.clone() }));
        assert_eq!(layer.qk_norm.is_some(), found.qk_norm.is_some());
        if let (Some(norm), Some(found)) = (&layer.qk_norm, &found.qk_norm) {
            let with = |norm| loss(Projections { qk_norm: Some(norm), ..layer.clone() });
            assert_vec_gradient(&norm.query, &found.query, |query| with(QkNorm { query, ..norm.clone() }));
            assert_vec_gradient(&norm.key, &found.key, |key| with(QkNorm { key, ..norm.clone() }));
        }
    }

    #[rstest]
    #[case(None, None)]
    #[case(None, Some(1e4))]
    #[case(Some(QkNorm { query: vec![1.5, 0.5, 1.0, -1.0], key: vec![0.5; 4], epsilon: 0.1 }), None)]
    #[case(Some(QkNorm { query: vec![1.5; 4], key: vec![0.5, 2.0, 1.0, 1.0], epsilon: 1e-6 }), Some(1e2))]
    fn dense_layers(#[case] qk_norm: Option<QkNorm<f64>>, #[case] rope_theta: Option<f64>) {
        let layer = Projections { qk_norm, rope_theta, ..projections(1) };
        for reach in [Reach::All, Reach::Window(window()), Reach::NonCausal] {
            let of = |layer: &Projections<f64>, hidden: &Array<f64, 3>| {
                dot(layer.dense(hidden, reach).as_slice(), d_output().as_slice())
            };
            let found = layer.dense_backward(&hidden(), reach, &d_output());
            assert_gradient(&hidden(), &found.hidden, |hidden| of(&layer, hidden));
            check_projections(&layer, &found.weights, |layer| of(&layer, &hidden()));
        }
    }

    #[rstest]
    #[case(1, None)]
    #[case(2, Some(0.1))]
    #[case(4, Some(-0.1))]
    fn aha_layers(
        #[case] router_heads: usize,
        #[case] bias: Option<f64>,
        #[values(Training::Exact, Training::Sparse)] training: Training,
    ) {
        let layer = aha(router_heads, bias);
        let frozen = layer.forward(&hidden());
        let d_scores = noise(frozen.scores.shape(), 201);
        let of = |layer: &AhaLayer<f64>, hidden: &Array<f64, 3>| {
            let logits = linear(hidden, &layer.router_weight, layer.router_bias.as_deref());
            let r = SigmoidGate::aha().forward(&logits).0;
            let branches = layer.projections.attend(hidden, &[Reach::Window(layer.window), Reach::All]);
            let g = surrogate(training, &frozen.routes, &r, &frozen.scores);
            let output = layer.projections.output(&mix(&g, &branches[0], &branches[1]));
            loss(&output, &r, &d_scores)
        };
        let found = layer.backward(&hidden(), &d_output(), &d_scores, training);
        assert_gradient(&hidden(), &found.hidden, |hidden| of(&layer, hidden));
        check_projections(&layer.projections, &found.weights.projections, |projections| {
            of(&AhaLayer { projections, ..layer.clone() }, &hidden())
        });
        assert_gradient(&layer.router_weight, &found.weights.router_weight, |weight| {
            of(&AhaLayer { router_weight: weight.clone(), ..layer.clone() }, &hidden())
        });
        assert_eq!(bias.is_some(), found.weights.router_bias.is_some());
        if let (Some(bias), Some(found)) = (&layer.router_bias, &found.weights.router_bias) {
            assert_vec_gradient(bias, found, |bias| {
                of(&AhaLayer { router_bias: Some(bias), ..layer.clone() }, &hidden())
            });
        }
    }

    #[rstest]
    fn multi_window_layers(#[values(Training::Exact, Training::Sparse)] training: Training) {
        let layer = MultiWindowLayer {
            projections: projections(1),
            router_weight: noise([HIDDEN, 2 * 3], 5),
            router_bias: Some(vec![0.1, 0.0, -0.1, 0.2, 0.0, 0.1]),
            windows: vec![Window::aha(1).unwrap(), Window::aha(3).unwrap()],
        };
        let frozen = layer.forward(&hidden());
        assert!((0..3).all(|k| frozen.routes.as_slice().contains(&k)), "the sample should go all ways");
        let d_scores = noise(frozen.scores.shape(), 201);
        let of = |layer: &MultiWindowLayer<f64>, hidden: &Array<f64, 3>| {
            let bias = layer.router_bias.as_deref();
            let p = softmax_choice(&linear_choice(hidden, &layer.router_weight, bias, 3)).0;
            let branches = layer.projections.attend(hidden, &layer.reaches());
            let out = Array::from_fn(branches[0].out.shape(), |[b, h, t, d]| {
                let (r, taken) = (h / 2, usize::from(frozen.routes[[b, h / 2, t]]));
                let of = |k: usize| branches[k].out[[b, h, t, d]];
                let moved = |k: usize| p[[b, r, k, t]] - frozen.scores[[b, r, k, t]];
                // In sparse training the last choice stands for what was taken.
                let stands_for = |k| if training == Training::Sparse && k == 2 { taken } else { k };
                (0..3).fold(of(taken), |out, k| out + moved(k) * of(stands_for(k)))
            });
            loss(&layer.projections.output(&out), &p, &d_scores)
        };
        let found = layer.backward(&hidden(), &d_output(), &d_scores, training);
        assert_gradient(&hidden(), &found.hidden, |hidden| of(&layer, hidden));
        check_projections(&layer.projections, &found.weights.projections, |projections| {
            of(&MultiWindowLayer { projections, ..layer.clone() }, &hidden())
        });
        assert_gradient(&layer.router_weight, &found.weights.router_weight, |weight| {
            of(&MultiWindowLayer { router_weight: weight.clone(), ..layer.clone() }, &hidden())
        });
        let bias = |layer: &MultiWindowLayer<f64>| layer.router_bias.clone().unwrap();
        assert_vec_gradient(&bias(&layer), &bias(&found.weights), |bias| {
            of(&MultiWindowLayer { router_bias: Some(bias), ..layer.clone() }, &hidden())
        });
    }

    #[rstest]
    fn l2a_layers(#[values(Training::Exact, Training::Sparse)] training: Training) {
        // A weak router, so that temperature 0.1 leaves its scores a slope.
        let layer = L2aLayer { router_weight: noise([HIDDEN, 1], 21).map(|x| 0.3 * x), ..l2a() };
        let frozen = layer.forward(&hidden());
        let d_scores = noise(frozen.scores.shape(), 201);
        let of = |layer: &L2aLayer<f64>, hidden: &Array<f64, 3>| {
            let u1 = rms_norm(hidden, &layer.local_norm, layer.epsilon);
            let x1 = add(hidden, &layer.local.dense(&u1, Reach::Window(layer.window)));
            let u2 = rms_norm(&x1, &layer.global_norm, layer.epsilon);
            let full = layer.global.attend(&u2, &[Reach::All]).remove(0);
            let p = SigmoidGate::l2a().forward(&linear(&u2, &layer.router_weight, None)).0;
            let g = surrogate(training, &frozen.routes, &p, &frozen.scores);
            let out = mix(&g, &Partial::empty(full.out.shape()), &full);
            loss(&add(&x1, &layer.global.output(&out)), &p, &d_scores)
        };
        let found = layer.backward(&hidden(), &d_output(), &d_scores, training);
        assert_gradient(&hidden(), &found.hidden, |hidden| of(&layer, hidden));
        check_projections(&layer.local, &found.weights.local, |local| {
            of(&L2aLayer { local, ..layer.clone() }, &hidden())
        });
        check_projections(&layer.global, &found.weights.global, |global| {
            of(&L2aLayer { global, ..layer.clone() }, &hidden())
        });
        assert_vec_gradient(&layer.local_norm, &found.weights.local_norm, |local_norm| {
            of(&L2aLayer { local_norm, ..layer.clone() }, &hidden())
        });
        assert_vec_gradient(&layer.global_norm, &found.weights.global_norm, |global_norm| {
            of(&L2aLayer { global_norm, ..layer.clone() }, &hidden())
        });
        assert_gradient(&layer.router_weight, &found.weights.router_weight, |weight| {
            of(&L2aLayer { router_weight: weight.clone(), ..layer.clone() }, &hidden())
        });
    }
}
