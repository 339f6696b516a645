use bifocal_core::Reach;
use num_traits::Float;

use crate::{
    Array, Options, Partial,
    array::{add_scaled, dot, indices},
    attention::{check, seen},
};

/// Gradients of a loss with respect to the inputs of attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients<F> {
    /// `[B, H, Tq, D]`.
    pub query: Array<F, 4>,
    /// `[B, Hk, Tk, D]`, summed over the query heads of each kv head.
    pub key: Array<F, 4>,
    /// `[B, Hk, Tk, Dv]`, summed likewise.
    pub value: Array<F, 4>,
    /// `[H]`; zeros where there are no sink logits.
    pub sink_logits: Vec<F>,
}

impl<F: Float> Gradients<F> {
    pub(crate) fn zeros(q: &Array<F, 4>, k: &Array<F, 4>, v: &Array<F, 4>) -> Self {
        Self {
            query: Array::filled(q.shape(), F::zero()),
            key: Array::filled(k.shape(), F::zero()),
            value: Array::filled(v.shape(), F::zero()),
            sink_logits: vec![F::zero(); q.shape()[1]],
        }
    }
}

/// The backward pass of [`attention`](crate::attention): what `d_out` `[B, H, Tq, Dv]`, the gradient of a loss with
/// respect to the outputs, means for query, key, value and sink logits (FlashAttention-2, arXiv 2307.08691, section
/// 3.1.2).
///
/// `partial` is what the forward pass gave. It may also be the [`merge`](crate::merge) of several branches: weights are
/// taken against its log-sum-exp, so each branch then gets its part of the whole, and the parts add up.
///
/// # Panics
/// As [`attention`](crate::attention).
pub fn attention_backward<F: Float>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    v: &Array<F, 4>,
    reach: Reach,
    options: &Options<F>,
    partial: &Partial<F>,
    d_out: &Array<F, 4>,
) -> Gradients<F> {
    attention_backward_where(q, k, v, options, partial, d_out, |_, _, _| Some(reach))
}

/// [`attention_backward`] where each row has a reach of its own, as in
/// [`attention_where`](crate::attention_where). A row of `None` and a row without a key have gradient 0.
///
/// # Panics
/// As [`attention`](crate::attention).
pub fn attention_backward_where<F: Float>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    v: &Array<F, 4>,
    options: &Options<F>,
    partial: &Partial<F>,
    d_out: &Array<F, 4>,
    reach_of: impl Fn(usize, usize, usize) -> Option<Reach>,
) -> Gradients<F> {
    let group = check(q, k, v, options);
    let [batch, heads, query_len, _] = q.shape();
    let [_, _, key_len, value_dim] = v.shape();
    assert_eq!(partial.out.shape(), [batch, heads, query_len, value_dim], "partial of another problem");
    assert_eq!(partial.lse.shape(), [batch, heads, query_len], "partial of another problem");
    assert_eq!(d_out.shape(), partial.out.shape(), "an output has one gradient per element");

    let mut gradients = Gradients::zeros(q, k, v);
    for row in indices([batch, heads, query_len]) {
        let [b, h, t] = row;
        let Some(reach) = reach_of(b, h, t) else { continue };
        let lse = partial.lse[row];
        if lse == F::neg_infinity() {
            continue;
        }
        let (query, d_out) = (q.row(row), d_out.row(row));
        let delta = dot(partial.out.row(row), d_out);
        for j in seen(reach, t, query_len, key_len) {
            let at = [b, h / group, j];
            let score = options.score(query, k.row(at));
            let weight = (score - lse).exp();
            let d_score = weight * (dot(d_out, v.row(at)) - delta);
            // The derivative of cap * tanh(x / cap) is 1 - tanh(x / cap)^2.
            let squash = options.softcap.map_or(F::one(), |cap| F::one() - (score / cap).powi(2));
            let d_product = options.scale * (options.round_weight)(d_score * squash);

            add_scaled(gradients.value.row_mut(at), (options.round_weight)(weight), d_out);
            add_scaled(gradients.query.row_mut(row), d_product, k.row(at));
            add_scaled(gradients.key.row_mut(at), d_product, query);
        }
        // A sink is a key whose value is 0.
        if let Some(sinks) = &options.sink_logits {
            let d_sink = (sinks[h] - lse).exp() * -delta;
            gradients.sink_logits[h] = gradients.sink_logits[h] + d_sink;
        }
    }
    gradients
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;
    use bifocal_core::Window;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        attention, attention_where, merge,
        samples::{GradientCase, assert_gradient, gradient_case, noise},
    };

    fn assert_same(a: &Gradients<f64>, b: &Gradients<f64>) {
        let epsilon = 1e-12;
        assert_abs_diff_eq!(a.query.as_slice(), b.query.as_slice(), epsilon = epsilon);
        assert_abs_diff_eq!(a.key.as_slice(), b.key.as_slice(), epsilon = epsilon);
        assert_abs_diff_eq!(a.value.as_slice(), b.value.as_slice(), epsilon = epsilon);
        assert_abs_diff_eq!(a.sink_logits.as_slice(), b.sink_logits.as_slice(), epsilon = epsilon);
    }

    /// Compares gradients with differences of `<d_out, attention>`.
    fn check_differences(c: &GradientCase, reach_of: impl Fn(usize, usize, usize) -> Option<Reach>) {
        let loss = |q: &Array<f64, 4>, k: &Array<f64, 4>, v: &Array<f64, 4>, options: &Options<f64>| {
            let out = attention_where(q, k, v, options, &reach_of).out;
            dot(out.as_slice(), c.d_out.as_slice())
        };
        let partial = attention_where(&c.q, &c.k, &c.v, &c.options, &reach_of);
        let found = attention_backward_where(&c.q, &c.k, &c.v, &c.options, &partial, &c.d_out, &reach_of);
        assert_gradient(&c.q, &found.query, |q| loss(q, &c.k, &c.v, &c.options));
        assert_gradient(&c.k, &found.key, |k| loss(&c.q, k, &c.v, &c.options));
        assert_gradient(&c.v, &found.value, |v| loss(&c.q, &c.k, v, &c.options));
        let heads = found.sink_logits.len();
        match &c.options.sink_logits {
            Some(sinks) if sinks[0].is_finite() => {
                let sinks = Array::new([heads], sinks.clone());
                assert_gradient(&sinks, &Array::new([heads], found.sink_logits), |sinks| {
                    let sink_logits = Some(sinks.as_slice().to_vec());
                    loss(&c.q, &c.k, &c.v, &Options { sink_logits, ..c.options.clone() })
                });
            }
            _ => assert_eq!(found.sink_logits, vec![0.0; heads]),
        }
    }

    #[test]
    fn two_tokens_by_hand() {
        // exp(scores) are 1 and 3, values 10 and 20. Token 0 has weight 1; token 1 has 1/4, 3/4 and the output 17.5, so
        // its scores get 2 * 1/4 * (10 - 17.5) = -3.75 and 2 * 3/4 * (20 - 17.5) = 3.75.
        let column = |data: [f64; 2]| Array::new([1, 1, 2, 1], data.to_vec());
        let (q, k, v) = (column([1.0, 1.0]), column([0.0, 3.0_f64.ln()]), column([10.0, 20.0]));
        let d_out = column([3.0, 2.0]);
        let backward = |options: &Options<f64>| {
            let partial = attention(&q, &k, &v, Reach::All, options);
            attention_backward(&q, &k, &v, Reach::All, options, &partial, &d_out)
        };
        let expected = Gradients {
            query: column([0.0, 3.75 * 3.0_f64.ln()]),
            key: column([-3.75, 3.75]),
            value: column([3.5, 1.5]),
            sink_logits: vec![0.0],
        };
        assert_same(&backward(&Options::new(1)), &expected);

        // A sink of logit 0: token 0 has weights 1/2 and 1/2 (sink), output 5, score gradients 7.5 and -7.5; token 1 has
        // 1/5, 3/5 and 1/5 (sink), output 14, score gradients -1.6, 7.2 and -5.6.
        let expected = Gradients {
            query: column([0.0, 7.2 * 3.0_f64.ln()]),
            key: column([7.5 - 1.6, 7.2]),
            value: column([1.5 + 0.4, 1.2]),
            sink_logits: vec![-7.5 - 5.6],
        };
        assert_same(&backward(&Options { sink_logits: Some(vec![0.0]), ..Options::new(1) }), &expected);

        // Scores of 2 ln 3, squashed to 0.5 tanh(4 ln 3): tanh = 1 - 2 / (3^8 + 1), slope 1 - tanh^2.
        let capped = backward(&Options { scale: 2.0, softcap: Some(0.5), ..Options::new(1) });
        let tanh = 1.0 - 2.0 / 6562.0_f64;
        let weight = (0.5 * tanh).exp() / (1.0 + (0.5 * tanh).exp());
        // Of two weights w and 1 - w, the score of w gets w (1 - w) times the difference of the values.
        let d_score = 2.0 * weight * (1.0 - weight) * 10.0;
        let key = [-d_score * 2.0, d_score * 2.0 * (1.0 - tanh * tanh)];
        assert_abs_diff_eq!(capped.key.as_slice(), key.as_slice(), epsilon = 1e-12);
    }

    #[test]
    fn a_nan_in_a_row_reaches_that_row_and_the_keys_that_it_sees() {
        let (q, k, v) = (noise([1, 1, 4, 2], 0), noise([1, 1, 4, 2], 1), noise([1, 1, 4, 2], 2));
        let mut d_out = noise([1, 1, 4, 2], 3);
        d_out[[0, 0, 2, 0]] = f64::NAN;
        let (options, reach) = (Options::new(2), Reach::Window(Window::new(2).unwrap()));
        let partial = attention(&q, &k, &v, reach, &options);
        let found = attention_backward(&q, &k, &v, reach, &options, &partial, &d_out);
        for t in 0..4 {
            let row = [0, 0, t];
            assert!(found.query.row(row).iter().all(|x| x.is_nan() == (t == 2)));
            assert!(found.key.row(row).iter().all(|x| x.is_nan() == (t == 1 || t == 2)));
        }
    }

    proptest! {
        #[test]
        fn gradients_equal_differences(c in gradient_case()) {
            check_differences(&c, |_, _, _| Some(c.reaches[0]));
        }

        #[test]
        fn gradients_of_routed_rows_equal_differences(c in gradient_case()) {
            check_differences(&c, c.reach_of());
        }

        #[test]
        fn rows_that_are_not_computed_or_see_nothing_have_no_gradient(c in gradient_case()) {
            let reach_of = c.reach_of();
            let partial = attention_where(&c.q, &c.k, &c.v, &c.options, &reach_of);
            // What a loss says about such rows does not matter, not even when it is NaN.
            let mut d_out = c.d_out.clone();
            for [b, h, t] in indices(partial.lse.shape()) {
                if reach_of(b, h, t).is_none() || partial.lse[[b, h, t]] == f64::NEG_INFINITY {
                    d_out.row_mut([b, h, t]).fill(f64::NAN);
                }
            }
            let backward = |d_out| {
                attention_backward_where(&c.q, &c.k, &c.v, &c.options, &partial, d_out, &reach_of)
            };
            prop_assert_eq!(backward(&d_out), backward(&c.d_out));
        }

        #[test]
        fn gradients_of_merged_branches_add_up_to_those_of_all(
            c in gradient_case(),
            keys in 1_usize..11,
            sinks in 0_u32..4,
        ) {
            let window = Window::new(keys).unwrap();
            // The near branch alone has the sink logits: they would count twice.
            let (near, far) = (Reach::SinksAndWindow { sinks, window }, Reach::Far { sinks, window });
            let plain = Options { sink_logits: None, ..c.options.clone() };
            let merged = merge(
                &attention(&c.q, &c.k, &c.v, near, &c.options),
                &attention(&c.q, &c.k, &c.v, far, &plain),
            );
            let backward = |reach, options, partial| {
                attention_backward(&c.q, &c.k, &c.v, reach, options, partial, &c.d_out)
            };
            let (near, far) = (backward(near, &c.options, &merged), backward(far, &plain, &merged));
            let add = |a: &Array<f64, 4>, b: &Array<f64, 4>| Array::from_fn(a.shape(), |i| a[i] + b[i]);
            let sum = Gradients {
                query: add(&near.query, &far.query),
                key: add(&near.key, &far.key),
                value: add(&near.value, &far.value),
                sink_logits: near.sink_logits,
            };
            let all = attention(&c.q, &c.k, &c.v, Reach::All, &c.options);
            assert_same(&sum, &backward(Reach::All, &c.options, &all));
        }
    }
}
