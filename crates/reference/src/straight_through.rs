use num_traits::Float;

use crate::{
    Array, Partial,
    array::{dot, sum},
    combine::{check_routes, router_head},
};

/// Which rows tell a gate how much an open gate is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Training {
    /// Every row: both branches are known everywhere. AHA trains like this (arXiv 2512.22562), and L2A in its dense
    /// passes (the "stochastic leakage" of the code of arXiv 2603.17484: each layer, each step, with probability 0.1).
    Exact,
    /// Rows with an open gate alone: the far branch is not computed elsewhere. L2A's other passes.
    Sparse,
}

/// The gradient `[B, R, T]` of a gate's scores, by the straight-through estimator (arXiv 1308.3432), in which
/// the gate is `g + r - stop_gradient(r)`: with the output `g far + (1 - g) near` of [`select`](crate::select),
/// `dL/dr = <d_out, far - near>`, summed over the query heads of each router head (AHA, arXiv 2512.22562).
///
/// For L2A's output `g far` of [`mask`](crate::mask), `near` is [`Partial::empty`]. With [`Training::Sparse`] a closed
/// gate's gradient is 0 and its row of `far` is not read; an invalid route's is NaN.
///
/// The gradients of query, key and value are those of the selected rows, under
/// [`attention_backward_where`](crate::attention_backward_where): the gate is 0 or 1.
///
/// # Panics
/// When shapes do not fit.
pub fn gate_backward<F: Float>(
    d_out: &Array<F, 4>,
    near: &Partial<F>,
    far: &Partial<F>,
    routes: &Array<u8, 3>,
    training: Training,
) -> Array<F, 3> {
    check_routes(routes.shape(), d_out.shape());
    let of_near = branch_backward(d_out, near, routes.shape()[1]);
    let of_far = branch_backward(d_out, far, routes.shape()[1]);
    Array::from_fn(routes.shape(), |i| match (training, routes[i]) {
        (Training::Exact, _) | (_, 1) => of_far[i] - of_near[i],
        (_, 0) => F::zero(),
        _ => F::nan(),
    })
}

/// The gradient `[B, R, K, T]` of the scores of K choices, by the straight-through estimator, in which choice k counts
/// `onehot_k + p_k - stop_gradient(p_k)`: `dL/dp_k = <d_out, a_k>`, summed over the query heads of each router head.
/// Every branch is known for every row (AHA's multi-choice generalisation). Where full attention is computed on its own
/// rows alone, what was selected may stand for it.
///
/// # Panics
/// When shapes do not fit.
pub fn choice_backward<F: Float>(
    d_out: &Array<F, 4>,
    branches: &[&Partial<F>],
    router_heads: usize,
) -> Array<F, 4> {
    let [batch, _, tokens, _] = d_out.shape();
    let each: Vec<_> = branches.iter().map(|a| branch_backward(d_out, a, router_heads)).collect();
    Array::from_fn([batch, router_heads, branches.len(), tokens], |[b, r, k, t]| each[k][[b, r, t]])
}

/// `<d_out, a>` per token, summed over the query heads of each router head: `[B, R, T]`.
fn branch_backward<F: Float>(d_out: &Array<F, 4>, branch: &Partial<F>, router_heads: usize) -> Array<F, 3> {
    let [batch, heads, tokens, _] = d_out.shape();
    assert_eq!(branch.out.shape(), d_out.shape(), "an output has one gradient per element");
    check_routes([batch, router_heads, tokens], d_out.shape());
    Array::from_fn([batch, router_heads, tokens], |[b, r, t]| {
        let served = (0..heads).filter(|&h| router_head(h, router_heads, heads) == r);
        sum(served.map(|h| dot(d_out.row([b, h, t]), branch.out.row([b, h, t]))))
    })
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        INVALID_ROUTE, Options, SigmoidGate,
        array::indices,
        attention, attention_backward_where, linear, linear_backward, linear_choice, linear_choice_backward,
        mask, mix,
        samples::{GradientCase, assert_gradient, gradient_case, noise},
        select, softmax_choice, softmax_choice_backward,
    };

    const HIDDEN: usize = 3;

    /// An attention problem with hidden states for a router; each number of router heads in turn.
    struct Routed {
        case: GradientCase,
        hidden: Array<f64, 3>,
        weight: Array<f64, 2>,
        bias: Array<f64, 1>,
    }

    /// The inputs of attention, by which the branches differ when they are differentiated.
    type Inputs<'a> = [&'a Array<f64, 4>; 3];

    impl Routed {
        fn all(case: &GradientCase, choices: usize) -> [Self; 3] {
            let [batch, heads, tokens, _] = case.q.shape();
            [1, case.k.shape()[1], heads].map(|router_heads| Self {
                case: case.clone(),
                hidden: noise([batch, tokens, HIDDEN], case.seed ^ 5),
                weight: noise([HIDDEN, router_heads * choices], case.seed ^ 6),
                bias: noise([router_heads * choices], case.seed ^ 7).map(|x| 0.2 * x),
            })
        }

        fn inputs(&self) -> Inputs<'_> {
            [&self.case.q, &self.case.k, &self.case.v]
        }

        fn branches(&self, [q, k, v]: Inputs<'_>) -> [Partial<f64>; 2] {
            self.case.reaches.map(|reach| attention(q, k, v, reach, &self.case.options))
        }

        fn loss(&self, out: &Array<f64, 4>) -> f64 {
            dot(out.as_slice(), self.case.d_out.as_slice())
        }

        fn logits(
            &self,
            hidden: &Array<f64, 3>,
            weight: &Array<f64, 2>,
            bias: &Array<f64, 1>,
        ) -> Array<f64, 3> {
            linear(hidden, weight, Some(bias.as_slice()))
        }
    }

    /// Checks all gradients of a gated system whose output is `g far + (1 - g) near` (`with_near`) or `g far`, against
    /// differences of the surrogate in which g is replaced by `g + r - r0`, with g and r0 frozen.
    fn check_gate(s: &Routed, gate: SigmoidGate<f64>, with_near: bool) {
        let [_, heads, _, _] = s.case.q.shape();
        let logits = s.logits(&s.hidden, &s.weight, &s.bias);
        let (r0, routes) = gate.forward(&logits);
        let router_heads = routes.shape()[1];
        let branches = |inputs: Inputs<'_>| {
            let [near, far] = s.branches(inputs);
            (if with_near { near } else { Partial::empty(far.out.shape()) }, far)
        };
        let (near, far) = branches(s.inputs());

        // At r = r0 the surrogate's weights are the gates.
        let [q, k, v] = s.inputs();
        let selected = if with_near { select(&routes, &[&near, &far]) } else { mask(&routes, &far) };
        let found =
            attention_backward_where(q, k, v, &s.case.options, &selected, &s.case.d_out, |b, h, t| {
                let route = usize::from(routes[[b, router_head(h, router_heads, heads), t]]);
                (with_near || route == 1).then_some(s.case.reaches[route])
            });
        let loss = |inputs: Inputs<'_>| {
            let (near, far) = branches(inputs);
            s.loss(&mix(&routes.map(f64::from), &near, &far))
        };
        assert_gradient(q, &found.query, |q| loss([q, k, v]));
        assert_gradient(k, &found.key, |k| loss([q, k, v]));
        assert_gradient(v, &found.value, |v| loss([q, k, v]));

        for training in [Training::Exact, Training::Sparse] {
            // In sparse training r does not move the output of closed gates.
            let moves = |i: [usize; 3]| training == Training::Exact || routes[i] == 1;
            let loss = |hidden: &Array<f64, 3>, weight: &Array<f64, 2>, bias: &Array<f64, 1>| {
                let r = gate.forward(&s.logits(hidden, weight, bias)).0;
                let g = Array::from_fn(routes.shape(), |i| {
                    f64::from(routes[i]) + if moves(i) { r[i] - r0[i] } else { 0.0 }
                });
                s.loss(&mix(&g, &near, &far))
            };
            // Nor is the far branch known there.
            let known = if training == Training::Sparse { mask(&routes, &far) } else { far.clone() };
            let d_scores = gate_backward(&s.case.d_out, &near, &known, &routes, training);
            let router = linear_backward(&s.hidden, &s.weight, &gate.backward(&r0, &d_scores));
            assert_gradient(&s.hidden, &router.hidden, |hidden| loss(hidden, &s.weight, &s.bias));
            assert_gradient(&s.weight, &router.weight, |weight| loss(&s.hidden, weight, &s.bias));
            let d_bias = Array::new([router_heads], router.bias);
            assert_gradient(&s.bias, &d_bias, |bias| loss(&s.hidden, &s.weight, bias));
        }
    }

    #[test]
    fn gates_by_hand() {
        // Two query heads of one router head, two tokens of one channel. <d_out, near>: 1 * 1 + 2 * 0 and 3 * 1 + 4 * 2;
        // <d_out, far>: 1 * 5 + 2 * 6 and 3 * 7 + 4 * 8.
        let column = |data: [f64; 4]| Array::new([1, 2, 2, 1], data.to_vec());
        let partial = |data| Partial { out: column(data), lse: Array::filled([1, 2, 2], 0.0) };
        let d_out = column([1.0, 3.0, 2.0, 4.0]);
        let (near, far) = (partial([1.0, 1.0, 0.0, 2.0]), partial([5.0, 7.0, 6.0, 8.0]));
        let routes = Array::new([1, 1, 2], vec![1, 0]);
        let of = |near, training| gate_backward(&d_out, near, &far, &routes, training).into_vec();
        assert_eq!(of(&near, Training::Exact), [16.0, 42.0]);
        assert_eq!(of(&near, Training::Sparse), [16.0, 0.0]);
        let none = Partial::empty([1, 2, 2, 1]);
        assert_eq!(of(&none, Training::Exact), [17.0, 53.0]);
        assert_eq!(choice_backward(&d_out, &[&near, &far], 1).into_vec(), [1.0, 11.0, 17.0, 53.0]);
        assert_eq!(
            choice_backward(&d_out, &[&near, &far], 2).into_vec(),
            [1.0, 3.0, 5.0, 21.0, 0.0, 8.0, 12.0, 32.0]
        );
    }

    #[test]
    fn an_invalid_route_is_not_a_closed_gate() {
        let (partial, d_out) = (Partial::empty([1, 1, 2, 1]), Array::filled([1, 1, 2, 1], 1.0));
        let routes = Array::new([1, 1, 2], vec![0, INVALID_ROUTE]);
        let found = gate_backward(&d_out, &partial, &partial, &routes, Training::Sparse);
        assert_eq!(found[[0, 0, 0]], 0.0);
        assert!(found[[0, 0, 1]].is_nan());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn gradients_of_gated_systems_equal_differences_of_their_surrogate(c in gradient_case()) {
            for s in Routed::all(&c, 1) {
                check_gate(&s, SigmoidGate::aha(), true);
                check_gate(&s, SigmoidGate::l2a(), false);
            }
        }

        #[test]
        fn gradients_of_choices_equal_differences_of_their_surrogate(c in gradient_case()) {
            // Four choices of two reaches with two scales: no two branches agree.
            for s in Routed::all(&c, 4) {
                let heads = c.q.shape()[1];
                let branches = |[q, k, v]: Inputs<'_>| {
                    let sharp = Options { scale: 1.5 * c.options.scale, ..c.options.clone() };
                    let of = |options: &Options<f64>| c.reaches.map(|reach| attention(q, k, v, reach, options));
                    [of(&c.options), of(&sharp)].concat()
                };
                let choose = |hidden: &Array<f64, 3>, weight: &Array<f64, 2>, bias: &Array<f64, 1>| {
                    softmax_choice(&linear_choice(hidden, weight, Some(bias.as_slice()), 4))
                };
                let (p0, routes) = choose(&s.hidden, &s.weight, &s.bias);
                let router_heads = routes.shape()[1];
                let all = branches(s.inputs());
                let loss = |hidden: &Array<f64, 3>, weight: &Array<f64, 2>, bias: &Array<f64, 1>| {
                    let p = choose(hidden, weight, bias).0;
                    s.loss(&Array::from_fn(c.d_out.shape(), |[b, h, t, d]| {
                        let r = router_head(h, router_heads, heads);
                        let taken = |k: usize| f64::from(u8::from(usize::from(routes[[b, r, t]]) == k));
                        let share = |k: usize| taken(k) + p[[b, r, k, t]] - p0[[b, r, k, t]];
                        sum((0..4).map(|k| share(k) * all[k].out[[b, h, t, d]]))
                    }))
                };
                let d_scores = choice_backward(&c.d_out, &all.iter().collect::<Vec<_>>(), router_heads);
                let d_logits = softmax_choice_backward(&p0, &d_scores);
                let router = linear_choice_backward(&s.hidden, &s.weight, &d_logits);
                assert_gradient(&s.hidden, &router.hidden, |hidden| loss(hidden, &s.weight, &s.bias));
                assert_gradient(&s.weight, &router.weight, |weight| loss(&s.hidden, weight, &s.bias));
                let d_bias = Array::new([router_heads * 4], router.bias);
                assert_gradient(&s.bias, &d_bias, |bias| loss(&s.hidden, &s.weight, bias));
            }
        }

        #[test]
        fn a_choice_of_two_with_one_logit_at_zero_is_a_gate(c in gradient_case()) {
            for s in Routed::all(&c, 1) {
                let [near, far] = s.branches(s.inputs());
                let logits = s.logits(&s.hidden, &s.weight, &s.bias);
                let [batch, router_heads, tokens] = logits.shape();
                let gate = SigmoidGate::aha();
                let (scores, routes) = gate.forward(&logits);
                let of_gate = gate_backward(&c.d_out, &near, &far, &routes, Training::Exact);
                let of_gate = gate.backward(&scores, &of_gate);

                let pairs = Array::from_fn([batch, router_heads, 2, tokens], |[b, r, k, t]| {
                    if k == 0 { 0.0 } else { logits[[b, r, t]] }
                });
                let of_choice = choice_backward(&c.d_out, &[&near, &far], router_heads);
                let of_choice = softmax_choice_backward(&softmax_choice(&pairs).0, &of_choice);
                for [b, r, t] in indices(logits.shape()) {
                    assert_abs_diff_eq!(of_choice[[b, r, 1, t]], of_gate[[b, r, t]], epsilon = 1e-12);
                    assert_abs_diff_eq!(of_choice[[b, r, 0, t]], -of_gate[[b, r, t]], epsilon = 1e-12);
                }
            }
        }
    }
}
