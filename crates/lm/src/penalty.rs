//! What routers pay for looking far.

use bifocal_burn::{Routing, Window, cost_penalty, mean_penalty, squared_penalty};
use burn::tensor::Tensor;

use crate::{Attention, Decoder, Result, TrainingConfig, schedule};

/// The penalties of a pass, weighted for `step` and added up, `[1]`; `None` where no router pays. Layers of one kind pay
/// the mean over them: [`mean_penalty`] for AHA, its linear far branch included, [`cost_penalty`] for several windows, [`squared_penalty`] for L2A.
pub(crate) fn penalty(
    config: &TrainingConfig,
    decoder: &Decoder,
    routings: &[Option<Routing>],
    step: u64,
) -> Result<Option<Tensor<1>>> {
    let weights = &config.penalties;
    let l2a_weight = schedule::l2a_weight(config, step);
    let mut kinds = [Kind::new(weights.aha), Kind::new(weights.multi_window), Kind::new(l2a_weight)];
    let [aha, multi_window, l2a] = &mut kinds;
    for (layer, routing) in decoder.layers.iter().zip(routings) {
        let Some(routing) = routing else { continue };
        match &layer.attention {
            Attention::Aha(_) | Attention::AhaLinear(_) => aha.add(|| mean_penalty(routing))?,
            Attention::MultiWindow(multi) => {
                let windows = multi.windows.iter().map(|&window| Window::aha(window));
                let windows = windows.collect::<bifocal_burn::Result<Vec<_>>>()?;
                multi_window.add(|| cost_penalty(routing, &windows))?;
            }
            Attention::L2a(_) => l2a.add(|| squared_penalty(routing))?,
            Attention::Causal(_)
            | Attention::Qada(_)
            | Attention::Rattention(_)
            | Attention::RandomGate(_)
            | Attention::Custom(_) => {}
        }
    }
    Ok(kinds.into_iter().filter_map(Kind::mean).reduce(|sum, more| sum + more))
}

/// The penalties of the layers of one kind.
struct Kind {
    weight: f64,
    layers: usize,
    sum: Option<Tensor<1>>,
}

impl Kind {
    fn new(weight: f64) -> Self {
        Self { weight, layers: 0, sum: None }
    }

    fn add(&mut self, penalty: impl FnOnce() -> bifocal_burn::Result<Tensor<1>>) -> Result<()> {
        if self.weight == 0.0 {
            return Ok(());
        }
        let penalty = penalty()?;
        self.layers += 1;
        self.sum = Some(match self.sum.take() {
            Some(sum) => sum + penalty,
            None => penalty,
        });
        Ok(())
    }

    fn mean(self) -> Option<Tensor<1>> {
        self.sum.map(|sum| sum.mul_scalar(self.weight / self.layers as f64))
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use burn::tensor::{Device, Int};
    use rstest::rstest;

    use super::*;
    use crate::{AttentionKind, ModelConfig, Pass};

    #[rstest]
    #[case::aha(AttentionKind::Aha { window: 2 })]
    #[case::aha_linear(AttentionKind::AhaLinear { window: 2 })]
    #[case::multi_window(AttentionKind::MultiWindow { windows: vec![2, 4] })]
    #[case::l2a(AttentionKind::L2a { window: 2 })]
    fn penalties_are_their_formulas(#[case] kind: AttentionKind) {
        let device = Device::flex();
        let mut config = TrainingConfig { steps: 10, ..Default::default() };
        config.model = ModelConfig {
            layers: 2,
            d_model: 16,
            heads: 2,
            kv_heads: 1,
            feed_forward: 16,
            context: 6,
            attention: vec![kind.clone(), AttentionKind::Full],
            router_bias: Some(0.3),
            ..Default::default()
        };
        config.penalties.aha = 2.0;
        config.penalties.multi_window = 3.0;
        config.penalties.l2a = 4.0;
        config.penalties.l2a_warm_up = 0;
        let decoder = Decoder::new(&config.model, 5, &device).unwrap();
        let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]], &device);
        let routings = decoder.forward(tokens, Pass::default()).unwrap().routings;
        let found = penalty(&config, &decoder, &routings, 5).unwrap().unwrap().into_scalar::<f32>();

        let scores = routings[0].as_ref().unwrap().scores().unwrap().unwrap();
        let [batch, heads, reaches, tokens] = scores.dims();
        let scores: Vec<f64> = scores.into_data().iter::<f64>().collect();
        let score = |b, h, k, t| scores[((b * heads + h) * reaches + k) * tokens + t];
        let mut expected = 0.0;
        for b in 0..batch {
            for h in 0..heads {
                for t in 0..tokens {
                    let share = |window: usize| window.min(t + 1) as f64 / (t + 1) as f64;
                    let mean = (batch * heads * (tokens - 1)) as f64;
                    expected += match &kind {
                        _ if t + 1 == tokens && reaches * heads > 1 => 0.0,
                        AttentionKind::Aha { .. } | AttentionKind::AhaLinear { .. } => {
                            2.0 * score(b, h, 0, t) / mean
                        }
                        AttentionKind::MultiWindow { .. } => {
                            let cost = score(b, h, 0, t) * share(2)
                                + score(b, h, 1, t) * share(4)
                                + score(b, h, 2, t);
                            3.0 * cost / mean
                        }
                        // Half of the way to the last step.
                        _ => 4.0 * 0.5 * score(b, h, 0, t).powi(2) / batch as f64,
                    };
                }
            }
        }
        assert_relative_eq!(f64::from(found), expected, max_relative = 1e-5);
    }

    #[test]
    fn nothing_is_paid_without_routers_or_weights() {
        let device = Device::flex();
        let model = ModelConfig { layers: 1, context: 4, ..Default::default() };
        let mut config = TrainingConfig { model, ..Default::default() };
        let tokens = || Tensor::<2, Int>::from_ints([[1, 2, 3, 4]], &device);
        let mut paid = |kind, weight| {
            config.model.attention = vec![kind];
            config.penalties.aha = weight;
            let decoder = Decoder::new(&config.model, 5, &device).unwrap();
            let routings = decoder.forward(tokens(), Pass::default()).unwrap().routings;
            penalty(&config, &decoder, &routings, 1).unwrap().is_some()
        };
        assert!(paid(AttentionKind::Aha { window: 2 }, 1e-4));
        assert!(!paid(AttentionKind::Aha { window: 2 }, 0.0));
        assert!(!paid(AttentionKind::Full, 1e-4));
        assert!(!paid(AttentionKind::RandomGate { window: 2, far_share: 0.5 }, 1e-4));
    }
}
