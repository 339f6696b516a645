use num_traits::Float;

use crate::{
    Array,
    array::{add_scaled, dot, indices, number},
};

/// Root-mean-square norm over the last dimension (arXiv 1910.07467):
/// `x / sqrt(mean(x^2) + epsilon) * weight`, with one weight per channel.
///
/// # Panics
/// When the weight is not as long as the last dimension.
pub fn rms_norm<F: Float, const N: usize>(x: &Array<F, N>, weight: &[F], epsilon: F) -> Array<F, N> {
    let shape = x.shape();
    let (dim, lead) = (shape[N - 1], shape[..N - 1].iter().product());
    assert_eq!(weight.len(), dim, "a norm has one weight per channel");
    let mut rows = x.clone().reshape([lead, dim]);
    for [i] in indices([lead]) {
        let row = rows.row_mut([i]);
        let rms = (dot(row, row) / number(dim as f64) + epsilon).sqrt();
        for (x, &weight) in row.iter_mut().zip(weight) {
            *x = *x / rms * weight;
        }
    }
    rows.reshape(shape)
}

/// The backward pass of [`rms_norm`]: gradients of x and of the weight, from `d_y`, that of the normed rows.
///
/// With the root mean square s and `u = d_y * weight`: `dx = u / s - x <x, u> / (dim s^3)`.
///
/// # Panics
/// When shapes do not fit.
pub fn rms_norm_backward<F: Float, const N: usize>(
    x: &Array<F, N>,
    weight: &[F],
    epsilon: F,
    d_y: &Array<F, N>,
) -> (Array<F, N>, Vec<F>) {
    let shape = x.shape();
    let (dim, lead) = (shape[N - 1], shape[..N - 1].iter().product());
    assert_eq!(weight.len(), dim, "a norm has one weight per channel");
    assert_eq!(d_y.shape(), shape, "a normed element has one gradient");
    let (x, d_y) = (x.clone().reshape([lead, dim]), d_y.clone().reshape([lead, dim]));
    let mut d_x = Array::filled([lead, dim], F::zero());
    let mut d_weight = vec![F::zero(); dim];
    for [i] in indices([lead]) {
        let (row, d_row) = (x.row([i]), d_y.row([i]));
        let size = number::<F>(dim as f64);
        let rms = (dot(row, row) / size + epsilon).sqrt();
        let scaled: Vec<F> = d_row.iter().zip(weight).map(|(&d, &weight)| d * weight).collect();
        add_scaled(d_x.row_mut([i]), rms.recip(), &scaled);
        add_scaled(d_x.row_mut([i]), -dot(row, &scaled) / (size * rms.powi(3)), row);
        for ((d_weight, &d), &x) in d_weight.iter_mut().zip(d_row).zip(row) {
            *d_weight = *d_weight + d * x / rms;
        }
    }
    (d_x.reshape(shape), d_weight)
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;

    use super::*;
    use crate::samples::{assert_gradient, noise};

    #[test]
    fn gradients_equal_differences() {
        let (x, weight, d_y) = (noise([2, 3, 4], 0), noise([4], 1), noise([2, 3, 4], 2));
        let loss = |x: &Array<f64, 3>, weight: &Array<f64, 1>| {
            dot(rms_norm(x, weight.as_slice(), 0.1).as_slice(), d_y.as_slice())
        };
        let (d_x, d_weight) = rms_norm_backward(&x, weight.as_slice(), 0.1, &d_y);
        assert_gradient(&x, &d_x, |x| loss(x, &weight));
        assert_gradient(&weight, &Array::new([4], d_weight), |weight| loss(&x, weight));
    }

    #[test]
    fn two_rows_by_hand() {
        // The mean square of (3, 4) is 12.5; with epsilon 12.5 the root is 5. Of (0, 0) nothing is left.
        let x = Array::new([1, 2, 2], vec![3.0, 4.0, 0.0, 0.0]);
        let normed = rms_norm(&x, &[1.0, 10.0], 12.5);
        assert_abs_diff_eq!(normed.as_slice(), [0.6, 8.0, 0.0, 0.0].as_slice(), epsilon = 1e-14);
    }
}
