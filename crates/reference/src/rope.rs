use num_traits::Float;

use crate::{Array, array::number};

/// Rotary positions (RoFormer, arXiv 2104.09864, section 3.2.2): in `x` `[B, H, T, D]` the pair
/// `(x[2i], x[2i+1])` of token `t` is turned by the angle `(t + offset) * theta^(-2i/D)`.
///
/// Pairs are interleaved, as in the paper; models that pair `x[i]` with `x[i + D/2]` permute their weights
/// first.
///
/// # Panics
/// When D is odd.
pub fn rope<F: Float>(x: &Array<F, 4>, theta: F, offset: usize) -> Array<F, 4> {
    turn(x, theta, offset, F::one())
}

/// The backward pass of [`rope`]: gradients are turned back.
///
/// # Panics
/// When D is odd.
pub fn rope_backward<F: Float>(d_y: &Array<F, 4>, theta: F, offset: usize) -> Array<F, 4> {
    turn(d_y, theta, offset, -F::one())
}

/// Turns each pair by its angle times `direction`.
fn turn<F: Float>(x: &Array<F, 4>, theta: F, offset: usize, direction: F) -> Array<F, 4> {
    let dim = x.shape()[3];
    assert!(dim.is_multiple_of(2), "rotary positions turn pairs: head dim {dim} is odd");
    Array::from_fn(x.shape(), |[b, h, t, d]| {
        let even = d - d % 2;
        let frequency = theta.powf(number::<F>(-(even as f64) / dim as f64));
        let (sin, cos) = (direction * number::<F>((t + offset) as f64) * frequency).sin_cos();
        let (first, second) = (x[[b, h, t, even]], x[[b, h, t, even + 1]]);
        if d == even { first * cos - second * sin } else { first * sin + second * cos }
    })
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;

    use super::*;
    use crate::{
        array::dot,
        ragged::tokens,
        samples::{assert_gradient, noise},
    };

    #[test]
    fn quarter_turns_by_hand() {
        // theta^(-2/4) = 1/2 for theta = 4: after one position pair 0 has turned by 1, pair 1 by 1/2.
        let x = Array::new([1, 1, 2, 4], [[1.0, 0.0, 0.0, 1.0]; 2].concat());
        let turned = rope(&x, 4.0, 0);
        assert_eq!(turned.row([0, 0, 0]), x.row([0, 0, 0]));
        let expected = [1.0_f64.cos(), 1.0_f64.sin(), -0.5_f64.sin(), 0.5_f64.cos()];
        assert_abs_diff_eq!(turned.row([0, 0, 1]), expected.as_slice(), epsilon = 1e-15);
    }

    #[test]
    fn an_offset_continues_the_sequence() {
        let x = noise([1, 2, 5, 6], 0);
        let whole = rope(&x, 1e4, 0);
        assert_eq!(rope(&tokens(&x, 2..5), 1e4, 2), tokens(&whole, 2..5));
    }

    #[test]
    fn scores_depend_on_distance_alone() {
        let (q, k) = (noise([1, 1, 1, 6], 0), noise([1, 1, 1, 6], 1));
        let score = |i, j| dot(rope(&q, 1e4, i).as_slice(), rope(&k, 1e4, j).as_slice());
        assert_abs_diff_eq!(score(3, 1), score(13, 11), epsilon = 1e-12);
    }

    #[test]
    fn gradients_equal_differences() {
        let (x, d_y) = (noise([1, 2, 3, 6], 0), noise([1, 2, 3, 6], 1));
        assert_gradient(&x, &rope_backward(&d_y, 1e2, 4), |x| {
            dot(rope(x, 1e2, 4).as_slice(), d_y.as_slice())
        });
    }
}
