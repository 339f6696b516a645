use num_traits::Float;

use crate::{Array, rms_norm, rms_norm_backward};

/// RATTENTION's combination (arXiv 2506.15545; its code): `RMS(near) + RMS(far)`, each over the value dim of a head and with
/// its own scale `[H, Dv]`, of outputs `[B, H, T, Dv]`.
///
/// # Panics
/// When shapes do not fit.
pub fn norm_sum<F: Float>(
    [near, far]: [&Array<F, 4>; 2],
    [near_scale, far_scale]: [&Array<F, 2>; 2],
    epsilon: F,
) -> Array<F, 4> {
    let (near, far) = (normed(near, epsilon), normed(far, epsilon));
    assert_eq!(near.shape(), far.shape(), "both branches give every row");
    Array::from_fn(near.shape(), |[b, h, t, d]| {
        near[[b, h, t, d]] * near_scale[[h, d]] + far[[b, h, t, d]] * far_scale[[h, d]]
    })
}

/// The backward pass of one side of [`norm_sum`]: gradients of the branch's outputs and of its scale.
///
/// # Panics
/// When shapes do not fit.
pub fn norm_sum_backward<F: Float>(
    branch: &Array<F, 4>,
    scale: &Array<F, 2>,
    epsilon: F,
    d_out: &Array<F, 4>,
) -> (Array<F, 4>, Array<F, 2>) {
    let [batch, heads, tokens, dim] = branch.shape();
    let scaled = Array::from_fn(d_out.shape(), |[b, h, t, d]| d_out[[b, h, t, d]] * scale[[h, d]]);
    let (d_branch, _) = rms_norm_backward(branch, &vec![F::one(); dim], epsilon, &scaled);
    let normed = normed(branch, epsilon);
    let d_scale = Array::from_fn([heads, dim], |[h, d]| {
        let rows = (0..batch).flat_map(|b| (0..tokens).map(move |t| (b, t)));
        crate::array::sum(rows.map(|(b, t)| d_out[[b, h, t, d]] * normed[[b, h, t, d]]))
    });
    (d_branch, d_scale)
}

fn normed<F: Float>(branch: &Array<F, 4>, epsilon: F) -> Array<F, 4> {
    rms_norm(branch, &vec![F::one(); branch.shape()[3]], epsilon)
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;

    use super::*;
    use crate::{
        array::dot,
        samples::{assert_gradient, noise},
    };

    #[test]
    fn a_row_by_hand() {
        // The root mean squares of (3, 4) and (0, 2) are sqrt(12.5) and sqrt(2).
        let near = Array::new([1, 1, 1, 2], vec![3.0, 4.0]);
        let far = Array::new([1, 1, 1, 2], vec![0.0, 2.0]);
        let (ones, tens) = (Array::filled([1, 2], 1.0), Array::filled([1, 2], 10.0));
        let sum = norm_sum([&near, &far], [&ones, &tens], 0.0);
        let root = 12.5_f64.sqrt();
        let expected = [3.0 / root, 4.0 / root + 10.0 * 2.0_f64.sqrt()];
        assert_abs_diff_eq!(sum.as_slice(), expected.as_slice(), epsilon = 1e-14);
    }

    #[test]
    fn gradients_equal_differences() {
        let shape = [2, 3, 4, 5];
        let (near, far, d_out) = (noise(shape, 0), noise(shape, 1), noise(shape, 2));
        let (near_scale, far_scale) = (noise([3, 5], 3), noise([3, 5], 4));
        let loss = |near: &_, near_scale: &_| {
            dot(norm_sum([near, &far], [near_scale, &far_scale], 0.1).as_slice(), d_out.as_slice())
        };
        let (d_near, d_scale) = norm_sum_backward(&near, &near_scale, 0.1, &d_out);
        assert_gradient(&near, &d_near, |near| loss(near, &near_scale));
        assert_gradient(&near_scale, &d_scale, |scale| loss(&near, scale));
    }
}
