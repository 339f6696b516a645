use num_traits::Float;

use crate::{
    Array,
    array::{indices, number, sum},
};

/// The route of a token-head whose score is NaN.
pub const INVALID_ROUTE: u8 = u8::MAX;

/// Router logits `[B, R, T]` = hidden `[B, T, M]` times weight `[M, R]`, plus a bias `[R]`
/// (AHA, arXiv 2512.22562: `z = X W_r` with R = H; L2A, arXiv 2603.17484: `z = w_r . u` with R = 1).
///
/// # Panics
/// When shapes do not fit.
pub fn linear<F: Float>(hidden: &Array<F, 3>, weight: &Array<F, 2>, bias: Option<&[F]>) -> Array<F, 3> {
    let [batch, tokens, hidden_dim] = hidden.shape();
    let [rows, router_heads] = weight.shape();
    assert_eq!(rows, hidden_dim, "weight has {rows} rows, hidden states have {hidden_dim} channels");
    assert!(bias.is_none_or(|bias| bias.len() == router_heads), "the bias has one entry per weight column");
    Array::from_fn([batch, router_heads, tokens], |[b, r, t]| {
        let product = sum((0..hidden_dim).map(|m| hidden[[b, t, m]] * weight[[m, r]]));
        product + bias.map_or(F::zero(), |bias| bias[r])
    })
}

/// Logits `[B, R, K, T]` of `choices` = K choices per router head: [`linear`] with a weight `[M, R * K]` and
/// a bias `[R * K]` whose column `r * K + k` is choice `k` of router head `r`.
///
/// # Panics
/// When shapes do not fit or the columns are not a multiple of K.
pub fn linear_choice<F: Float>(
    hidden: &Array<F, 3>,
    weight: &Array<F, 2>,
    bias: Option<&[F]>,
    choices: usize,
) -> Array<F, 4> {
    let logits = linear(hidden, weight, bias);
    let [batch, columns, tokens] = logits.shape();
    assert!(columns.is_multiple_of(choices), "{columns} columns are not a multiple of {choices} choices");
    logits.reshape([batch, columns / choices, choices, tokens])
}

/// Gradients of a loss with respect to what [`linear`] reads.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearGradients<F> {
    /// `[B, T, M]`.
    pub hidden: Array<F, 3>,
    /// `[M, R]`.
    pub weight: Array<F, 2>,
    /// `[R]`, of a bias that may be there or not.
    pub bias: Vec<F>,
}

/// The backward pass of [`linear`]: what `d_logits` `[B, R, T]` means for hidden states, weight and bias.
///
/// # Panics
/// When shapes do not fit.
pub fn linear_backward<F: Float>(
    hidden: &Array<F, 3>,
    weight: &Array<F, 2>,
    d_logits: &Array<F, 3>,
) -> LinearGradients<F> {
    let [batch, tokens, hidden_dim] = hidden.shape();
    let [rows, router_heads] = weight.shape();
    assert_eq!(rows, hidden_dim, "weight has {rows} rows, hidden states have {hidden_dim} channels");
    assert_eq!(d_logits.shape(), [batch, router_heads, tokens], "a logit has one gradient");
    let over_tokens = |r: usize, factor: &dyn Fn(usize, usize) -> F| {
        sum(indices([batch, tokens]).map(|[b, t]| d_logits[[b, r, t]] * factor(b, t)))
    };
    LinearGradients {
        hidden: Array::from_fn(hidden.shape(), |[b, t, m]| {
            sum((0..router_heads).map(|r| d_logits[[b, r, t]] * weight[[m, r]]))
        }),
        weight: Array::from_fn(weight.shape(), |[m, r]| over_tokens(r, &|b, t| hidden[[b, t, m]])),
        bias: (0..router_heads).map(|r| over_tokens(r, &|_, _| F::one())).collect(),
    }
}

/// The backward pass of [`linear_choice`]: [`linear_backward`] of `d_logits` `[B, R, K, T]`. The gradients have the
/// shapes of weight `[M, R * K]` and bias `[R * K]`.
///
/// # Panics
/// When shapes do not fit.
pub fn linear_choice_backward<F: Float>(
    hidden: &Array<F, 3>,
    weight: &Array<F, 2>,
    d_logits: &Array<F, 4>,
) -> LinearGradients<F> {
    let [batch, router_heads, choices, tokens] = d_logits.shape();
    linear_backward(hidden, weight, &d_logits.clone().reshape([batch, router_heads * choices, tokens]))
}

/// The binary gate `sigmoid(z / temperature)` against a threshold; route 1 is far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SigmoidGate<F> {
    /// What the score is compared with.
    pub threshold: F,
    /// Whether a score equal to the threshold is far.
    pub inclusive: bool,
    /// What the logit is divided by.
    pub temperature: F,
}

impl<F: Float> SigmoidGate<F> {
    /// AHA's gate: far iff `sigmoid(z) > 0.5`, strictly (arXiv 2512.22562).
    pub fn aha() -> Self {
        Self { threshold: number(0.5), inclusive: false, temperature: F::one() }
    }

    /// L2A's gate: far iff `sigmoid(z / 0.1) >= 0.5`, so that `z = 0` attends (arXiv 2603.17484 and its
    /// code).
    pub fn l2a() -> Self {
        Self { threshold: number(0.5), inclusive: true, temperature: number(0.1) }
    }

    /// Scores `[B, R, T]` in \[0, 1\] and routes `[B, R, T]` of logits `[B, R, T]`: 1 = far, 0 = near,
    /// [`INVALID_ROUTE`] where the score is NaN.
    pub fn forward(&self, logits: &Array<F, 3>) -> (Array<F, 3>, Array<u8, 3>) {
        let scores = logits.map(|logit| (F::one() + (-logit / self.temperature).exp()).recip());
        let routes = scores.map(|score| {
            let far = score > self.threshold || (self.inclusive && score == self.threshold);
            if score.is_nan() { INVALID_ROUTE } else { u8::from(far) }
        });
        (scores, routes)
    }

    /// The gradient of the logits, from the scores and theirs, all `[B, R, T]`: `r (1 - r) / temperature` times it.
    /// Routes have none; see [`gate_backward`](crate::gate_backward).
    ///
    /// # Panics
    /// When shapes differ.
    pub fn backward(&self, scores: &Array<F, 3>, d_scores: &Array<F, 3>) -> Array<F, 3> {
        assert_eq!(scores.shape(), d_scores.shape(), "a score has one gradient");
        Array::from_fn(scores.shape(), |i| {
            d_scores[i] * scores[i] * (F::one() - scores[i]) / self.temperature
        })
    }
}

/// Softmax scores `[B, R, K, T]` over the K choices of logits `[B, R, K, T]` and routes `[B, R, T]`, the
/// index of the largest logit, the first of equals (AHA's multi-choice generalisation). A NaN in any of a
/// token's K logits gives [`INVALID_ROUTE`].
///
/// # Panics
/// When K is 0 or above 255: a route is a u8 below [`INVALID_ROUTE`].
pub fn softmax_choice<F: Float>(logits: &Array<F, 4>) -> (Array<F, 4>, Array<u8, 3>) {
    let [batch, router_heads, choices, tokens] = logits.shape();
    assert!((1..=usize::from(INVALID_ROUTE)).contains(&choices), "1 to 255 choices, found {choices}");
    let mut scores = logits.clone();
    let mut routes = Array::filled([batch, router_heads, tokens], INVALID_ROUTE);
    for [b, r, t] in indices([batch, router_heads, tokens]) {
        let z: Vec<F> = (0..choices).map(|k| logits[[b, r, k, t]]).collect();
        let max = z.iter().copied().fold(F::neg_infinity(), F::max);
        let total = sum(z.iter().map(|&z| (z - max).exp()));
        for (k, &z) in z.iter().enumerate() {
            scores[[b, r, k, t]] = (z - max).exp() / total;
        }
        let first = z.iter().position(|&z| z == max);
        if let Some(first) = first.filter(|_| !z.iter().any(|z| z.is_nan())) {
            routes[[b, r, t]] = first as u8;
        }
    }
    (scores, routes)
}

/// The gradient of the logits of [`softmax_choice`], from the scores p and theirs, all `[B, R, K, T]`:
/// `dz_k = p_k (dp_k - sum over l of p_l dp_l)`.
///
/// # Panics
/// When shapes differ.
pub fn softmax_choice_backward<F: Float>(scores: &Array<F, 4>, d_scores: &Array<F, 4>) -> Array<F, 4> {
    assert_eq!(scores.shape(), d_scores.shape(), "a score has one gradient");
    let choices = scores.shape()[2];
    Array::from_fn(scores.shape(), |[b, r, k, t]| {
        let mean = sum((0..choices).map(|l| scores[[b, r, l, t]] * d_scores[[b, r, l, t]]));
        scores[[b, r, k, t]] * (d_scores[[b, r, k, t]] - mean)
    })
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;
    use rstest::rstest;

    use super::*;
    use crate::{
        array::dot,
        samples::{assert_gradient, noise},
    };

    #[test]
    fn linear_by_hand() {
        // Two tokens of three channels, two router heads.
        let hidden = Array::new([1, 2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let weight = Array::new([3, 2], vec![1.0, 10.0, 0.0, 1.0, -1.0, 0.0]);
        assert_eq!(linear(&hidden, &weight, None).into_vec(), [-2.0, -2.0, 12.0, 45.0]);
        assert_eq!(linear(&hidden, &weight, Some(&[2.0, 0.5])).into_vec(), [0.0, 0.0, 12.5, 45.5]);
    }

    #[test]
    fn choices_of_a_router_head_lie_side_by_side() {
        let (hidden, weight) = (noise([2, 3, 4], 0), noise([4, 6], 1));
        let (flat, choices) = (linear(&hidden, &weight, None), linear_choice(&hidden, &weight, None, 3));
        assert_eq!(choices.shape(), [2, 2, 3, 3]);
        for [b, r, k, t] in indices(choices.shape()) {
            assert_eq!(choices[[b, r, k, t]], flat[[b, r * 3 + k, t]]);
        }
    }

    #[rstest]
    #[case(SigmoidGate::aha(), 0.0, 0)]
    #[case(SigmoidGate::aha(), -0.0, 0)]
    #[case(SigmoidGate::aha(), 1e-9, 1)]
    #[case(SigmoidGate::aha(), -1e-9, 0)]
    #[case(SigmoidGate::aha(), f64::INFINITY, 1)]
    #[case(SigmoidGate::aha(), f64::NAN, INVALID_ROUTE)]
    #[case(SigmoidGate::l2a(), 0.0, 1)]
    #[case(SigmoidGate::l2a(), -0.0, 1)]
    #[case(SigmoidGate::l2a(), -1e-9, 0)]
    #[case(SigmoidGate::l2a(), f64::NEG_INFINITY, 0)]
    #[case(SigmoidGate::l2a(), f64::NAN, INVALID_ROUTE)]
    fn gates_decide_at_the_threshold(#[case] gate: SigmoidGate<f64>, #[case] logit: f64, #[case] route: u8) {
        let (_, routes) = gate.forward(&Array::filled([1, 1, 1], logit));
        assert_eq!(routes.into_vec(), [route]);
    }

    #[test]
    fn temperature_divides_the_logit() {
        // sigmoid(ln 3) = 3 / 4.
        let logit = 3.0_f64.ln();
        let (aha, _) = SigmoidGate::aha().forward(&Array::filled([1, 1, 1], logit));
        let (l2a, _) = SigmoidGate::l2a().forward(&Array::filled([1, 1, 1], 0.1 * logit));
        assert_abs_diff_eq!(aha[[0, 0, 0]], 0.75, epsilon = 1e-15);
        assert_abs_diff_eq!(l2a[[0, 0, 0]], 0.75, epsilon = 1e-15);
    }

    #[test]
    fn the_largest_logit_is_chosen_and_the_first_of_equals() {
        // Four tokens of three choices, by choice: exp(logit) of token 0 is 1, 3, 4.
        let logits =
            [[0.0, 2.0, -1.0, f64::NAN], [3.0_f64.ln(), 2.0, 1e4, 0.0], [4.0_f64.ln(), 1.0, 0.0, 1.0]];
        let (scores, routes) = softmax_choice(&Array::new([1, 1, 3, 4], logits.concat()));
        assert_eq!(routes.into_vec(), [2, 0, 1, INVALID_ROUTE]);
        for (k, expected) in [0.125, 0.375, 0.5].into_iter().enumerate() {
            assert_abs_diff_eq!(scores[[0, 0, k, 0]], expected, epsilon = 1e-15);
            assert_eq!(scores[[0, 0, k, 2]], if k == 1 { 1.0 } else { 0.0 });
        }
    }

    #[rstest]
    #[case(0)]
    #[case(1)]
    #[case(2)]
    fn a_nan_among_the_choices_is_invalid_wherever_it_is(#[case] at: usize) {
        let logits = Array::from_fn([1, 1, 3, 1], |[_, _, k, _]| if k == at { f64::NAN } else { 1.0 });
        assert_eq!(softmax_choice(&logits).1.into_vec(), [INVALID_ROUTE]);
    }

    #[rstest]
    #[case(SigmoidGate::aha())]
    #[case(SigmoidGate::l2a())]
    fn gradients_of_a_gate_equal_differences(#[case] gate: SigmoidGate<f64>) {
        let logits = noise([2, 3, 4], 0).map(|z| 3.0 * gate.temperature * z);
        let d_scores = noise([2, 3, 4], 1);
        let found = gate.backward(&gate.forward(&logits).0, &d_scores);
        assert_gradient(&logits, &found, |z| dot(gate.forward(z).0.as_slice(), d_scores.as_slice()));
    }

    #[rstest]
    #[case(1)]
    #[case(2)]
    #[case(5)]
    fn gradients_of_a_choice_equal_differences(#[case] choices: usize) {
        let (logits, d_scores) = (noise([2, 3, choices, 4], 0), noise([2, 3, choices, 4], 1));
        let found = softmax_choice_backward(&softmax_choice(&logits).0, &d_scores);
        assert_gradient(&logits, &found, |z| dot(softmax_choice(z).0.as_slice(), d_scores.as_slice()));
    }

    #[test]
    fn gradients_of_a_projection_equal_differences() {
        let (hidden, weight, bias) = (noise([2, 3, 4], 0), noise([4, 6], 1), noise([6], 2));
        let d_logits = noise([2, 2, 3, 3], 3);
        let found = linear_choice_backward(&hidden, &weight, &d_logits);
        let loss = |hidden: &Array<f64, 3>, weight: &Array<f64, 2>, bias: &Array<f64, 1>| {
            dot(linear_choice(hidden, weight, Some(bias.as_slice()), 3).as_slice(), d_logits.as_slice())
        };
        assert_gradient(&hidden, &found.hidden, |hidden| loss(hidden, &weight, &bias));
        assert_gradient(&weight, &found.weight, |weight| loss(&hidden, weight, &bias));
        assert_gradient(&bias, &Array::new([6], found.bias), |bias| loss(&hidden, &weight, bias));
    }
}
