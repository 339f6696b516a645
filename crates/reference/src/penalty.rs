use bifocal_core::Reach;
use num_traits::Float;

use crate::{
    Array,
    array::{indices, number, sum},
};

/// AHA's penalty (arXiv 2512.22562) on scores `[B, R, T]`: their mean, and the gradient of it. The last token of each
/// sequence does not count, as it has no label (code of AHNSA, by AHA's authors). The loss has it times 3e-4.
pub fn mean_penalty<F: Float>(scores: &Array<F, 3>) -> (F, Array<F, 3>) {
    let [batch, router_heads, tokens] = scores.shape();
    let share = share(batch, router_heads, tokens);
    let gradient = Array::from_fn(scores.shape(), |[.., t]| if t + 1 < tokens { share } else { F::zero() });
    let counted = indices(scores.shape()).filter(|[.., t]| t + 1 < tokens);
    (sum(counted.map(|i| gradient[i] * scores[i])), gradient)
}

/// L2A's penalty (arXiv 2603.17484, its code) on scores `[B, R, T]`: the sum over tokens of their squares, as a mean
/// over sequences and router heads, and the gradient of it. The paper has R = 1. The loss has it times
/// [`penalty_ramp`].
pub fn squared_penalty<F: Float>(scores: &Array<F, 3>) -> (F, Array<F, 3>) {
    let [batch, router_heads, _] = scores.shape();
    let sequences = number::<F>((batch * router_heads) as f64);
    let value = sum(scores.as_slice().iter().map(|&p| p * p)) / sequences;
    (value, scores.map(|p| (p + p) / sequences))
}

/// The penalty on several reaches: the mean of `sum over k of p_k c_k` for scores `[B, R, K, T]`, and the gradient of
/// it. The cost `c_k` of a reach is how many keys it shows the token, relative to full attention. Query t has position
/// t, and the last token of each sequence does not count, as in [`mean_penalty`].
///
/// # Panics
/// When there is not one reach per choice.
pub fn cost_penalty<F: Float>(scores: &Array<F, 4>, reaches: &[Reach]) -> (F, Array<F, 4>) {
    let [batch, router_heads, choices, tokens] = scores.shape();
    assert_eq!(reaches.len(), choices, "one reach per choice");
    let share = share::<F>(batch, router_heads, tokens);
    let gradient = Array::from_fn(scores.shape(), |[_, _, k, t]| {
        let visible = |reach: Reach| number::<F>(reach.visible(t as i64, tokens) as f64);
        if t + 1 < tokens { share * visible(reaches[k]) / visible(Reach::All) } else { F::zero() }
    });
    let counted = indices(scores.shape()).filter(|[.., t]| t + 1 < tokens);
    (sum(counted.map(|i| gradient[i] * scores[i])), gradient)
}

/// L2A's factor on its penalty: 0 up to the step `warmup`, then linearly up to `peak` at the step `last` (1e-8 in the
/// authors' configuration).
pub fn penalty_ramp<F: Float>(step: usize, warmup: usize, last: usize, peak: F) -> F {
    if step <= warmup {
        F::zero()
    } else if step >= last {
        peak
    } else {
        peak * number((step - warmup) as f64 / (last - warmup) as f64)
    }
}

/// One over the number of scores that a mean counts: of all tokens but the last.
fn share<F: Float>(batch: usize, router_heads: usize, tokens: usize) -> F {
    number::<F>((batch * router_heads * tokens.saturating_sub(1)) as f64).recip()
}

#[cfg(test)]
mod tests {
    use approx::{assert_abs_diff_eq, assert_relative_eq};
    use bifocal_core::Window;
    use rstest::rstest;

    use super::*;
    use crate::samples::{assert_gradient, noise};

    #[test]
    fn means_by_hand() {
        // Two router heads of three tokens, of which the last does not count.
        let scores = Array::new([1, 2, 3], vec![0.1, 0.2, 9.0, 0.3, 0.6, 9.0]);
        let (value, gradient) = mean_penalty(&scores);
        assert_abs_diff_eq!(value, 0.3, epsilon = 1e-15);
        assert_eq!(gradient.into_vec(), [0.25, 0.25, 0.0, 0.25, 0.25, 0.0]);
    }

    #[test]
    fn squares_by_hand() {
        // Two sequences: (0.01 + 0.04 + 0.25) / 2, every token counts.
        let scores = Array::new([2, 1, 2], vec![0.1, 0.2, 0.0, 0.5]);
        let (value, gradient) = squared_penalty(&scores);
        assert_abs_diff_eq!(value, 0.15, epsilon = 1e-15);
        assert_abs_diff_eq!(gradient.as_slice(), [0.1, 0.2, 0.0, 0.5].as_slice(), epsilon = 1e-15);
    }

    #[test]
    fn costs_by_hand() {
        // A window of 2 shows tokens 0 and 1 all they can see, and token 2 two of three keys.
        let reaches = [Reach::Window(Window::new(2).unwrap()), Reach::All];
        let near = vec![0.5, 0.5, 0.6, 0.9];
        let far = vec![0.5, 0.5, 0.4, 0.1];
        let (value, gradient) = cost_penalty(&Array::new([1, 1, 2, 4], [near, far].concat()), &reaches);
        assert_abs_diff_eq!(value, (1.0 + 1.0 + 0.6 * 2.0 / 3.0 + 0.4) / 3.0, epsilon = 1e-15);
        let third = 1.0 / 3.0;
        let expected = [third, third, 2.0 / 9.0, 0.0, third, third, third, 0.0];
        assert_abs_diff_eq!(gradient.as_slice(), expected.as_slice(), epsilon = 1e-15);
    }

    #[test]
    fn gradients_equal_differences() {
        let (gates, choices) = (noise([2, 3, 5], 0), noise([2, 2, 3, 5], 1));
        let window = Window::new(2).unwrap();
        let reaches = [Reach::Window(window), Reach::SinksAndWindow { sinks: 1, window }, Reach::All];
        assert_gradient(&gates, &mean_penalty(&gates).1, |r| mean_penalty(r).0);
        assert_gradient(&gates, &squared_penalty(&gates).1, |r| squared_penalty(r).0);
        assert_gradient(&choices, &cost_penalty(&choices, &reaches).1, |p| cost_penalty(p, &reaches).0);
    }

    #[test]
    fn a_sequence_of_one_token_costs_nothing() {
        let none = |value, gradient: Vec<f64>| assert_eq!((value, gradient), (0.0, vec![0.0; 2]));
        let (value, gradient) = mean_penalty(&Array::filled([1, 2, 1], 0.7));
        none(value, gradient.into_vec());
        let (value, gradient) = cost_penalty(&Array::filled([1, 1, 2, 1], 0.5), &[Reach::All; 2]);
        none(value, gradient.into_vec());
    }

    #[rstest]
    #[case(0, 0.0)]
    #[case(10, 0.0)]
    #[case(11, 0.05)]
    #[case(20, 0.5)]
    #[case(30, 1.0)]
    #[case(31, 1.0)]
    fn the_ramp_begins_after_the_warm_up(#[case] step: usize, #[case] expected: f64) {
        assert_relative_eq!(penalty_ramp(step, 10, 30, 1e-8), 1e-8 * expected, epsilon = 1e-20);
    }
}
