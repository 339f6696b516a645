//! What changes from step to step. Steps count from 1.

use crate::TrainingConfig;

/// The learning rate: up in a straight line over the warm-up, then down along half a cosine to its last share
/// (arXiv 1608.03983, without restarts).
pub fn learning_rate(config: &TrainingConfig, step: u64) -> f64 {
    let &TrainingConfig { steps, warm_up, learning_rate, final_learning_rate, .. } = config;
    if step <= warm_up {
        return learning_rate * step as f64 / warm_up as f64;
    }
    let done = (step - warm_up) as f64 / (steps - warm_up.min(steps)).max(1) as f64;
    let height = (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()) / 2.0;
    learning_rate * (final_learning_rate + (1.0 - final_learning_rate) * height)
}

/// The weight of L2A's penalty: nothing over its warm-up, then in a straight line to its full weight at the last step
/// (arXiv 2603.17484).
pub fn l2a_weight(config: &TrainingConfig, step: u64) -> f64 {
    let (steps, warm_up) = (config.steps, config.penalties.l2a_warm_up);
    if step <= warm_up {
        return 0.0;
    }
    config.penalties.l2a * ((step - warm_up) as f64 / (steps - warm_up.min(steps)).max(1) as f64).min(1.0)
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use proptest::prelude::*;

    use super::*;

    fn config(steps: u64, warm_up: u64) -> TrainingConfig {
        let mut config = TrainingConfig { steps, warm_up, ..Default::default() };
        config.penalties.l2a_warm_up = warm_up;
        config
    }

    #[test]
    fn the_rate_rises_and_falls() {
        let config = config(110, 10);
        assert_relative_eq!(learning_rate(&config, 1), 1e-4, max_relative = 1e-12);
        assert_relative_eq!(learning_rate(&config, 10), 1e-3, max_relative = 1e-12);
        assert_relative_eq!(learning_rate(&config, 60), 0.55e-3, max_relative = 1e-12);
        assert_relative_eq!(learning_rate(&config, 110), 1e-4, max_relative = 1e-12);
    }

    #[test]
    fn the_weight_waits_and_rises() {
        let config = config(110, 10);
        assert_eq!(l2a_weight(&config, 10), 0.0);
        assert_relative_eq!(l2a_weight(&config, 60), 0.5e-8, max_relative = 1e-12);
        assert_relative_eq!(l2a_weight(&config, 110), 1e-8, max_relative = 1e-12);
    }

    proptest! {
        #[test]
        fn both_stay_between_their_ends(steps in 1u64..500, warm_up in 0u64..600, step in 1u64..500) {
            let config = config(steps, warm_up);
            let step = step.min(steps);
            let rate = learning_rate(&config, step);
            prop_assert!(rate > 0.0 && rate <= 1e-3 * (1.0 + 1e-12), "{rate}");
            let weight = l2a_weight(&config, step);
            prop_assert!((0.0..=1e-8).contains(&weight), "{weight}");
            if step < steps.min(warm_up) {
                prop_assert!(learning_rate(&config, step + 1) > rate);
            }
        }
    }
}
