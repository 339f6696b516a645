use num_traits::Float;

use crate::{Array, array::sum};

/// A gated output (gated attention, arXiv 2505.06708): `sigmoid(z) y` of outputs `[B, H, T, Dv]`, with logits
/// `[B, H, T, 1]` for a gate per head, or `[B, H, T, Dv]` for one per channel.
///
/// # Panics
/// When shapes do not fit.
pub fn gated_output<F: Float>(logits: &Array<F, 4>, out: &Array<F, 4>) -> Array<F, 4> {
    Array::from_fn(out.shape(), |at| gate(logits, at) * out[at])
}

/// The backward pass of [`gated_output`]: gradients of the logits and of the outputs.
///
/// # Panics
/// When shapes do not fit.
pub fn gated_output_backward<F: Float>(
    logits: &Array<F, 4>,
    out: &Array<F, 4>,
    d_out: &Array<F, 4>,
) -> [Array<F, 4>; 2] {
    assert_eq!(d_out.shape(), out.shape(), "an output has one gradient");
    let dim = out.shape()[3];
    let d_logits = Array::from_fn(logits.shape(), |[b, h, t, c]| {
        let served = if logits.shape()[3] == 1 { 0..dim } else { c..c + 1 };
        let gate = gate(logits, [b, h, t, c]);
        gate * (F::one() - gate) * sum(served.map(|d| d_out[[b, h, t, d]] * out[[b, h, t, d]]))
    });
    [d_logits, Array::from_fn(out.shape(), |at| gate(logits, at) * d_out[at])]
}

fn gate<F: Float>(logits: &Array<F, 4>, [b, h, t, d]: [usize; 4]) -> F {
    let channel = if logits.shape()[3] == 1 { 0 } else { d };
    (F::one() + (-logits[[b, h, t, channel]]).exp()).recip()
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
    fn a_gate_by_hand() {
        let logits = Array::new([1, 1, 2, 1], vec![0.0, 3.0_f64.ln()]);
        let out = Array::new([1, 1, 2, 2], vec![2.0, 4.0, 4.0, 8.0]);
        assert_abs_diff_eq!(gated_output(&logits, &out).as_slice(), [1.0, 2.0, 3.0, 6.0].as_slice());
    }

    #[test]
    fn gradients_equal_differences() {
        let shape = [2, 3, 4, 5];
        let (out, d_out) = (noise(shape, 1), noise(shape, 2));
        for logits in [noise([2, 3, 4, 1], 3), noise(shape, 3)] {
            let loss = |logits: &_, out: &_| dot(gated_output(logits, out).as_slice(), d_out.as_slice());
            let [d_logits, d_outputs] = gated_output_backward(&logits, &out, &d_out);
            assert_gradient(&logits, &d_logits, |logits| loss(logits, &out));
            assert_gradient(&out, &d_outputs, |out| loss(&logits, out));
        }
    }
}
