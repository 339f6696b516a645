//! AdamW over flat tensors, with all gradients clipped together.
//!
//! Why not `burn-optim`: it clips each tensor alone, and it restores its state on Burn's default device, which need not
//! be there.

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{DType, Device, Tensor},
};

use crate::{Decoder, TrainingConfig};

/// The gradients of a decoder's parameters, flat and in f32, in the order in which it is visited; `None` where a
/// parameter took no part.
#[derive(Default)]
pub(crate) struct Gradients(Vec<Option<Tensor<1>>>);

impl Gradients {
    /// Takes those of `decoder`, whose parameters have autodiff.
    pub(crate) fn of(decoder: &Decoder, gradients: burn::tensor::Gradients) -> Self {
        let mut visitor = Collect { gradients, collected: Vec::new() };
        decoder.visit(&mut visitor);
        Self(visitor.collected)
    }

    /// Sums those of two passes of the same decoder.
    pub(crate) fn add(&mut self, other: Self) {
        if self.0.is_empty() {
            *self = other;
            return;
        }
        for (sum, more) in self.0.iter_mut().zip(other.0) {
            *sum = match (sum.take(), more) {
                (Some(sum), Some(more)) => Some(sum + more),
                (one, other) => one.or(other),
            };
        }
    }

    /// Scales all of them so that their joint norm is at most `largest`; gives the norm from before, `[1]`.
    pub(crate) fn clip(&mut self, largest: f64, device: &Device) -> Tensor<1> {
        let mut squares = Tensor::<1>::zeros([1], (device, DType::F32));
        for gradient in self.0.iter().flatten() {
            squares = squares + sum_of_squares(gradient);
        }
        let norm = squares.sqrt();
        // A gradient of zero stays zero.
        let scale = norm.clone().add_scalar(1e-6).recip().mul_scalar(largest).clamp_max(1.0);
        for gradient in self.0.iter_mut() {
            *gradient = gradient.take().map(|gradient| gradient * scale.clone());
        }
        norm
    }
}

/// In rows: Burn adds up what is longer than some millions in an order that depends on its threads.
fn sum_of_squares(flat: &Tensor<1>) -> Tensor<1> {
    const ROW: usize = 1 << 20;
    let length = flat.dims()[0];
    let mut sum = Tensor::<1>::zeros([1], (&flat.device(), DType::F32));
    for start in (0..length).step_by(ROW) {
        sum = sum + flat.clone().narrow(0, start, ROW.min(length - start)).square().sum();
    }
    sum
}

struct Collect {
    gradients: burn::tensor::Gradients,
    collected: Vec<Option<Tensor<1>>>,
}

impl ModuleVisitor for Collect {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = param.val().grad_remove(&mut self.gradients);
        self.collected.push(gradient.map(|gradient| flat(gradient.cast(DType::F32))));
    }
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let length = tensor.dims().iter().product::<usize>();
    tensor.reshape([length])
}

/// Running means of a parameter's gradients and of their squares, flat.
#[derive(Clone)]
pub(crate) struct Moments {
    pub(crate) first: Tensor<1>,
    pub(crate) second: Tensor<1>,
}

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2). Matrices decay; norms and biases do not.
pub(crate) struct AdamW {
    /// Per parameter, in the order in which the decoder is visited.
    pub(crate) moments: Vec<Moments>,
}

impl AdamW {
    /// Moments of zero.
    pub(crate) fn new(decoder: &Decoder) -> Self {
        struct Zeros(Vec<Moments>);
        impl ModuleVisitor for Zeros {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let zeros = Tensor::<1>::zeros(
                    [param.lazy_shape().num_elements()],
                    (&param.lazy_device(), DType::F32),
                );
                self.0.push(Moments { first: zeros.clone(), second: zeros });
            }
        }
        let mut zeros = Zeros(Vec::new());
        decoder.visit(&mut zeros);
        Self { moments: zeros.0 }
    }

    /// Moves the parameters of `decoder`, which have no autodiff, against their gradients. `step` counts from 1. A
    /// parameter without a gradient is treated as one whose gradient is zero.
    pub(crate) fn step(
        &mut self,
        decoder: Decoder,
        gradients: Gradients,
        step: u64,
        learning_rate: f64,
        config: &TrainingConfig,
    ) -> Decoder {
        let power = |beta: f64| 1.0 - beta.powi(step.min(i32::MAX as u64) as i32);
        let mut update = Update {
            moments: self.moments.iter_mut(),
            gradients: gradients.0.into_iter(),
            corrections: [power(config.beta_1), power(config.beta_2)],
            learning_rate,
            config,
        };
        decoder.map(&mut update)
    }
}

/// Added to the root of the second moment.
const EPSILON: f64 = 1e-8;

struct Update<'a> {
    moments: std::slice::IterMut<'a, Moments>,
    gradients: std::vec::IntoIter<Option<Tensor<1>>>,
    /// 1 - beta^step, for both.
    corrections: [f64; 2],
    learning_rate: f64,
    config: &'a TrainingConfig,
}

impl ModuleMapper for Update<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        // A model is visited and mapped in the same order.
        let (Some(moments), Some(gradient)) = (self.moments.next(), self.gradients.next()) else {
            return param;
        };
        let &TrainingConfig { beta_1, beta_2, weight_decay, .. } = self.config;
        let Moments { first, second } = moments.clone();
        let (mut first, mut second) = (first.mul_scalar(beta_1), second.mul_scalar(beta_2));
        if let Some(gradient) = gradient {
            first = first + gradient.clone().mul_scalar(1.0 - beta_1);
            second = second + gradient.square().mul_scalar(1.0 - beta_2);
        }
        *moments = Moments { first: first.clone(), second: second.clone() };
        let [correction_1, correction_2] = self.corrections;
        let root = second.div_scalar(correction_2).sqrt().add_scalar(EPSILON);
        let change = first.div_scalar(correction_1).div(root).mul_scalar(self.learning_rate);
        let kept = if D == 2 { 1.0 - self.learning_rate * weight_decay } else { 1.0 };
        param.map(|tensor| {
            let shape = tensor.shape();
            (flat(tensor).mul_scalar(kept) - change).reshape(shape)
        })
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;

    use super::*;
    use crate::{AttentionKind, ModelConfig};

    fn decoder(device: &Device) -> Decoder {
        let config = ModelConfig {
            layers: 1,
            d_model: 8,
            heads: 2,
            kv_heads: 1,
            feed_forward: 12,
            context: 8,
            attention: vec![AttentionKind::Full],
            ..Default::default()
        };
        Decoder::new(&config, 3, device).unwrap()
    }

    fn values(tensor: Tensor<1>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    /// Every parameter's values, in order, and whether it is a matrix.
    fn parameters(decoder: &Decoder) -> Vec<(Vec<f32>, bool)> {
        struct Read(Vec<(Vec<f32>, bool)>);
        impl ModuleVisitor for Read {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.0.push((values(flat(param.val())), D == 2));
            }
        }
        let mut read = Read(Vec::new());
        decoder.visit(&mut read);
        read.0
    }

    /// A gradient per parameter that depends on its place; none for the second one.
    fn gradients(decoder: &Decoder, scale: f32, device: &Device) -> Gradients {
        let of = |(at, (values, _)): (usize, &(Vec<f32>, bool))| {
            let gradient: Vec<f32> = (0..values.len()).map(|i| scale * ((at + i) as f32).sin()).collect();
            (at != 1).then(|| Tensor::<1>::from_floats(gradient.as_slice(), device))
        };
        Gradients(parameters(decoder).iter().enumerate().map(of).collect())
    }

    #[test]
    fn steps_are_those_of_the_algorithm() {
        let device = Device::flex();
        let config = TrainingConfig { weight_decay: 0.2, ..Default::default() };
        let mut trained = decoder(&device);
        let mut expected: Vec<_> = parameters(&trained)
            .into_iter()
            .map(|(values, matrix)| {
                let wide: Vec<[f64; 3]> = values.iter().map(|&value| [value.into(), 0.0, 0.0]).collect();
                (wide, matrix)
            })
            .collect();
        let mut optimiser = AdamW::new(&trained);
        for step in 1..=3 {
            let (scale, rate) = (step as f32, 0.01 * step as f64);
            let given = gradients(&trained, scale, &device);
            for (at, (values, matrix)) in expected.iter_mut().enumerate() {
                for (i, [weight, first, second]) in values.iter_mut().enumerate() {
                    let gradient = if at == 1 { 0.0 } else { f64::from(scale * ((at + i) as f32).sin()) };
                    *first = 0.9 * *first + 0.1 * gradient;
                    *second = 0.95 * *second + 0.05 * gradient * gradient;
                    let mean = *first / (1.0 - 0.9f64.powi(step));
                    let root = (*second / (1.0 - 0.95f64.powi(step))).sqrt() + 1e-8;
                    let decay = if *matrix { 0.2 * *weight } else { 0.0 };
                    *weight -= rate * (mean / root + decay);
                }
            }
            trained = optimiser.step(trained, given, step as u64, rate, &config);
        }
        for ((found, _), (expected, _)) in parameters(&trained).iter().zip(&expected) {
            for (found, [expected, ..]) in found.iter().zip(expected) {
                assert_relative_eq!(f64::from(*found), expected, epsilon = 1e-6, max_relative = 1e-5);
            }
        }
    }

    #[test]
    fn all_gradients_are_clipped_together() {
        let device = Device::flex();
        let decoder = decoder(&device);
        let norm_of = |gradients: &Gradients| -> f64 {
            let all = gradients.0.iter().flatten().flat_map(|gradient| values(gradient.clone()));
            all.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
        };
        let mut large = gradients(&decoder, 1.0, &device);
        let before = norm_of(&large);
        assert!(before > 1.0);
        let found = values(large.clip(0.5, &device));
        assert_relative_eq!(f64::from(found[0]), before, max_relative = 1e-5);
        assert_relative_eq!(norm_of(&large), 0.5, max_relative = 1e-4);
        // Small ones stay as they are, bit for bit, and zero stays zero.
        let mut small = gradients(&decoder, 1e-4, &device);
        let untouched = gradients(&decoder, 1e-4, &device);
        small.clip(0.5, &device);
        for (small, untouched) in small.0.iter().flatten().zip(untouched.0.iter().flatten()) {
            assert_eq!(values(small.clone()), values(untouched.clone()));
        }
        let mut zero = gradients(&decoder, 0.0, &device);
        assert_eq!(values(zero.clip(0.5, &device)), [0.0]);
        assert_eq!(norm_of(&zero), 0.0);
    }

    #[test]
    fn gradients_of_passes_add_up() {
        let device = Device::flex();
        let decoder = decoder(&device);
        let mut sum = Gradients::default();
        sum.add(gradients(&decoder, 1.0, &device));
        sum.add(gradients(&decoder, 2.0, &device));
        let expected = gradients(&decoder, 3.0, &device);
        assert!(sum.0[1].is_none());
        for (sum, expected) in sum.0.iter().flatten().zip(expected.0.iter().flatten()) {
            for (sum, expected) in values(sum.clone()).iter().zip(values(expected.clone())) {
                assert_relative_eq!(*sum, expected, epsilon = 1e-6);
            }
        }
    }
}
