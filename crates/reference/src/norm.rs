use num_traits::Float;

use crate::{
    Array,
    array::{dot, indices, number},
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

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;

    use super::*;

    #[test]
    fn two_rows_by_hand() {
        // The mean square of (3, 4) is 12.5; with epsilon 12.5 the root is 5. Of (0, 0) nothing is left.
        let x = Array::new([1, 2, 2], vec![3.0, 4.0, 0.0, 0.0]);
        let normed = rms_norm(&x, &[1.0, 10.0], 12.5);
        assert_abs_diff_eq!(normed.as_slice(), [0.6, 8.0, 0.0, 0.0].as_slice(), epsilon = 1e-14);
    }
}
