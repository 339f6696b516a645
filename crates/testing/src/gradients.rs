//! Backward passes of a case: how they are run, and the yardstick.

use bifocal::cubecl::client::Client;
use bifocal::{Element, Gradients, Partial, Reach, Saved, Tensor, TensorView};
use bifocal_reference as reference;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    Device,
    case::Case,
    compare::{near, run, worst},
    inputs::{Data, round},
};

/// The gradient of a loss with respect to the outputs of a case, `[B, H, Tq, Dv]`, rounded to their type.
pub(crate) fn draw_d_out(case: &Case) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(case.seed ^ 0xbac4);
    let length = case.problem().out_shape().iter().product();
    (0..length).map(|_| round(case.out_element(), rng.random_range(-1.7f32..1.7))).collect()
}

/// Gradients read back to the host: of query, key, value and sink logits, if there are any.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ReadGradients(pub(crate) [Vec<f32>; 4]);

impl ReadGradients {
    pub(crate) fn new(client: &Client, gradients: &Gradients) -> bifocal::Result<Self> {
        let Gradients { query, key, value, sink_logits, .. } = gradients;
        let sinks = sink_logits.as_ref().map_or(Ok(Vec::new()), |sinks| sinks.to_f32(client))?;
        Ok(Self([query.to_f32(client)?, key.to_f32(client)?, value.to_f32(client)?, sinks]))
    }

    /// Bit for bit the same, NaN included.
    pub(crate) fn same_bits(&self, other: &Self) -> bool {
        let bits = |read: &Self| read.0.concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        bits(self) == bits(other)
    }
}

/// Runs a forward pass into a poisoned partial and a backward pass from it into poisoned gradients, `delta` between them.
pub(crate) fn differentiate(
    device: &Device,
    case: &Case,
    d_out: TensorView<'_, 4>,
    forward: impl FnOnce(&Partial) -> bifocal::Result<()>,
    backward: impl FnOnce(&Saved<'_>, &Gradients) -> bifocal::Result<()>,
) -> Result<ReadGradients, String> {
    let (client, problem) = (&device.client, case.problem());
    let partial = run(Partial::poisoned(client, &problem, case.out_element()))?;
    run(forward(&partial))?;
    let delta = run(bifocal::dot_rows(client, &problem, partial.out.view(), d_out))?;
    let saved = Saved { partial: &partial, d_out, delta: delta.view() };
    let mut gradients = run(Gradients::unset(client, &problem, case.sink_logits))?;
    for tensor in [&mut gradients.query, &mut gradients.key, &mut gradients.value] {
        *tensor = run(Tensor::filled(client, tensor.shape(), Element::F32, f32::NAN))?;
    }
    run(backward(&saved, &gradients))?;
    run(ReadGradients::new(client, &gradients))
}

/// What is right for the backward pass of a case, and how far off a kernel may be.
pub(crate) struct ExpectedGradients {
    /// Of query, key, value and sink logits.
    exact: [Vec<f64>; 4],
    tolerances: [f64; 4],
}

impl ExpectedGradients {
    /// The oracle's gradients in f64, with the tolerance measured: twice the error of the same computation in f32, whose
    /// outputs are rounded to the case's type (and its weights too, where tensor cores may compute it), plus a few
    /// roundings of the sums that gradients are made of.
    pub(crate) fn new(
        case: &Case,
        data: &Data,
        d_out: &[f32],
        reach_of: impl Fn(usize, usize, usize) -> Option<Reach>,
    ) -> Self {
        Self::with_invalid_rows(case, data, d_out, reach_of, |_, _, _| false)
    }

    /// [`new`](Self::new) where the forward pass made NaN of some rows, for want of a valid route.
    pub(crate) fn with_invalid_rows(
        case: &Case,
        data: &Data,
        d_out: &[f32],
        reach_of: impl Fn(usize, usize, usize) -> Option<Reach>,
        is_invalid: impl Fn(usize, usize, usize) -> bool,
    ) -> Self {
        let exact = {
            let mut partial: reference::Partial<f64> = data.oracle(|weight| weight, &reach_of);
            spoil(&mut partial, &is_invalid);
            parts(data.oracle_backward(|weight| weight, &partial, d_out, &reach_of))
        };
        let plain = {
            let mut partial: reference::Partial<f32> = data.oracle(case.round_weight(), &reach_of);
            partial.out = partial.out.map(|x| round(case.out_element(), x));
            spoil(&mut partial, &is_invalid);
            parts(data.oracle_backward(case.round_weight(), &partial, d_out, &reach_of))
        };
        let largest = |values: &[f32]| values.iter().fold(0.0f64, |top, x| top.max(f64::from(x.abs())));
        let [q, k, v, d] =
            [data.query.as_slice(), data.key.as_slice(), data.value.as_slice(), d_out].map(largest);
        let problem = case.problem();
        let score = 1.0 + f64::from(case.magnitude) * (case.head_dim as f64).sqrt();
        // The relative error of a weight, and the absolute one of `<do, v> - delta`; errors of many rows partly cancel.
        let weight = 8.0 * Element::F32.epsilon() * score;
        let slope = (weight + case.out_element().epsilon()) * (case.value_dim as f64).sqrt() * d * (1.0 + v);
        let product = slope * f64::from(problem.scale.abs());
        let rows = (problem.packed_rows() as f64).sqrt();
        let all_rows = ((problem.batch * problem.query_len) as f64).sqrt();
        let floors = [product * k, product * q * rows, weight * d * rows, slope * all_rows];
        let tolerances =
            core::array::from_fn(|of| 2.0 * worst(&exact[of], plain[of].iter().copied()) + floors[of]);
        Self { exact, tolerances }
    }

    /// What `times` calls that add up give.
    pub(crate) fn times(self, times: f64) -> Self {
        Self {
            exact: self.exact.map(|of| of.into_iter().map(|x| times * x).collect()),
            tolerances: self.tolerances.map(|tolerance| times * tolerance),
        }
    }

    /// Whether a kernel's gradients are within tolerance everywhere; NaN has to match exactly.
    pub(crate) fn accepts(&self, read: &ReadGradients) -> Result<(), String> {
        let names = ["query", "key", "value", "sink logits"];
        for (of, name) in names.iter().enumerate() {
            // Where there are no sink logits the oracle's gradients of them are zeros.
            if of == 3 && read.0[of].is_empty() {
                continue;
            }
            near(&format!("gradient of the {name}"), &self.exact[of], &read.0[of], self.tolerances[of])?;
        }
        Ok(())
    }
}

/// Makes NaN of rows.
fn spoil<F: num_traits::Float>(
    partial: &mut reference::Partial<F>,
    is_invalid: impl Fn(usize, usize, usize) -> bool,
) {
    let [batch, heads, tokens] = partial.lse.shape();
    for row in 0..batch * heads * tokens {
        let (b, h, t) = (row / tokens / heads, row / tokens % heads, row % tokens);
        if is_invalid(b, h, t) {
            partial.lse[[b, h, t]] = F::nan();
            partial.out.row_mut([b, h, t]).fill(F::nan());
        }
    }
}

fn parts<F: num_traits::Float>(gradients: reference::Gradients<F>) -> [Vec<F>; 4] {
    let reference::Gradients { query, key, value, sink_logits } = gradients;
    [query.into_vec(), key.into_vec(), value.into_vec(), sink_logits]
}
