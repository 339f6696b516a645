//! What watches and steers gates while they learn: host logic, one measured share at a time.

use serde::{Deserialize, Serialize};

use crate::{Budget, Guard};

/// Moves the threshold of each layer's gate so that its share of far comes to a target: up by a fixed step while the
/// share is above it, down while it is below (LoGo, arXiv 2608.29539). No gradient is involved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BudgetController {
    budget: Budget,
    /// Steps that each layer's threshold is above its start. Counted, so that saving rounds nothing.
    moved: Vec<i64>,
}

impl BudgetController {
    /// Where thresholds start.
    const START: f64 = 0.5;
    /// Thresholds stay this far from 0 and 1, which no score passes or misses.
    const MARGIN: f64 = 1e-3;

    /// All thresholds at their start.
    pub fn new(budget: Budget, layers: usize) -> Self {
        Self { budget, moved: vec![0; layers] }
    }

    /// The threshold of a layer.
    pub fn threshold(&self, layer: usize) -> f64 {
        let threshold = Self::START + self.budget.step * self.moved[layer] as f64;
        threshold.clamp(Self::MARGIN, 1.0 - Self::MARGIN)
    }

    /// Takes the share of far that a layer had in a step; gives the threshold for the next one.
    pub fn update(&mut self, layer: usize, share: f64) -> f64 {
        // A NaN share is neither above nor below.
        let sign = i64::from(share > self.budget.target) - i64::from(share < self.budget.target);
        // Not beyond the margin, or the way back would be longer than the way there.
        let most = ((Self::START - Self::MARGIN) / self.budget.step).ceil() as i64;
        self.moved[layer] = (self.moved[layer] + sign).clamp(-most, most);
        self.threshold(layer)
    }
}

/// Which way a gate has collapsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Hardly any token looks far.
    Near,
    /// Hardly any token does not.
    Far,
}

/// A gate whose share of far has been beyond a bound for too long.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Collapse {
    /// The step at which it was noticed.
    pub step: u64,
    /// The layer.
    pub layer: usize,
    /// The router head.
    pub head: usize,
    /// Which way.
    pub side: Side,
    /// The share of far at that step.
    pub share: f64,
}

/// Notices gates that have collapsed: a head's share of far below or above a bound for a number of steps without a
/// break. Says so once per collapse.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollapseDetector {
    guard: Guard,
    /// Per layer and head.
    heads: Vec<Vec<Watched>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Watched {
    /// Beyond which bound the share is, and since which step.
    beyond: Option<(Side, u64)>,
    told: bool,
}

impl CollapseDetector {
    /// Nothing seen yet.
    pub fn new(guard: Guard, layers: usize) -> Self {
        Self { guard, heads: vec![Vec::new(); layers] }
    }

    /// Takes the share of far of each head of a layer at a step; gives those that have just collapsed.
    pub fn observe(&mut self, step: u64, layer: usize, shares: &[f64]) -> Vec<Collapse> {
        let Guard { low, high, patience } = self.guard;
        let heads = &mut self.heads[layer];
        heads.resize(shares.len(), Watched::default());
        let mut collapsed = Vec::new();
        for (head, (watched, &share)) in heads.iter_mut().zip(shares).enumerate() {
            let side = match share {
                share if share < low => Some(Side::Near),
                share if share > high => Some(Side::Far),
                _ => None,
            };
            let Some(side) = side else {
                *watched = Watched::default();
                continue;
            };
            match watched.beyond {
                Some((same, since)) if same == side => {
                    if !watched.told && step - since >= patience {
                        watched.told = true;
                        collapsed.push(Collapse { step, layer, head, side, share });
                    }
                }
                _ => *watched = Watched { beyond: Some((side, step)), told: false },
            }
        }
        collapsed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn thresholds_move_against_the_share() {
        let mut controller = BudgetController::new(Budget { target: 0.2, step: 0.01 }, 2);
        assert_eq!(controller.threshold(1), 0.5);
        assert_eq!(controller.update(1, 0.3), 0.51);
        assert_eq!(controller.update(1, 0.3), 0.52);
        assert_eq!(controller.update(1, 0.2), 0.52, "on target");
        assert_eq!(controller.update(1, f64::NAN), 0.52);
        assert_eq!(controller.update(1, 0.1), 0.51);
        assert_eq!(controller.threshold(0), 0.5, "layers have thresholds of their own");
    }

    #[test]
    fn thresholds_stay_inside_and_come_back_at_once() {
        let mut controller = BudgetController::new(Budget { target: 0.2, step: 0.3 }, 1);
        for _ in 0..10 {
            assert!(controller.update(0, 1.0) < 1.0);
        }
        assert_eq!(controller.threshold(0), 0.999);
        assert!(controller.update(0, 0.0) < 0.9);
    }

    /// A gate whose scores are spread evenly over 0 to 1 has the share 1 - threshold.
    #[test]
    fn the_share_comes_to_the_target() {
        let mut controller = BudgetController::new(Budget { target: 0.07, step: 5e-3 }, 1);
        let mut threshold = controller.threshold(0);
        for _ in 0..200 {
            threshold = controller.update(0, 1.0 - threshold);
        }
        assert!((1.0 - threshold - 0.07).abs() <= 5e-3 + 1e-12, "{threshold}");
    }

    fn guard() -> Guard {
        Guard { low: 0.1, high: 0.9, patience: 20 }
    }

    #[test]
    fn a_collapse_is_told_once_until_the_head_recovers() {
        let mut detector = CollapseDetector::new(guard(), 3);
        let mut at = |step, share| detector.observe(step, 2, &[0.5, share]);
        assert!(at(10, 0.05).is_empty());
        assert!(at(20, 0.0).is_empty());
        assert_eq!(at(30, 0.01), [Collapse { step: 30, layer: 2, head: 1, side: Side::Near, share: 0.01 }]);
        assert!(at(60, 0.0).is_empty(), "told already");
        assert!(at(70, 0.1).is_empty(), "the bound itself is fine");
        assert!(at(80, 0.0).is_empty());
        assert_eq!(at(100, 0.0).len(), 1);
    }

    #[test]
    fn from_one_side_to_the_other_counts_anew() {
        let mut detector = CollapseDetector::new(guard(), 1);
        let mut at = |step, share| detector.observe(step, 0, &[share]);
        assert!(at(0, 0.0).is_empty());
        assert!(at(19, 1.0).is_empty());
        assert!(at(38, 1.0).is_empty());
        assert_eq!(at(39, 1.0)[0].side, Side::Far);
    }

    #[test]
    fn the_state_survives_being_saved() {
        let mut detector = CollapseDetector::new(guard(), 1);
        detector.observe(0, 0, &[0.0, 0.5]);
        let mut controller = BudgetController::new(Budget { target: 0.2, step: 0.1 / 3.0 }, 1);
        controller.update(0, 1.0);
        let saved = serde_json::to_string(&(&detector, &controller)).unwrap();
        let (mut again, back): (CollapseDetector, BudgetController) = serde_json::from_str(&saved).unwrap();
        assert_eq!(back.threshold(0), controller.threshold(0));
        assert_eq!(again.observe(20, 0, &[0.0, 0.5]), detector.observe(20, 0, &[0.0, 0.5]));
    }

    proptest! {
        #[test]
        fn healthy_heads_are_left_alone(shares in prop::collection::vec(0.1f64..=0.9, 1..50)) {
            let mut detector = CollapseDetector::new(guard(), 1);
            for (step, share) in shares.into_iter().enumerate() {
                prop_assert!(detector.observe(100 * step as u64, 0, &[share]).is_empty());
            }
        }
    }
}
