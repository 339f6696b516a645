//! What a run is made from. Everything has a default and reads from JSON; a field that is not known is an error.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How one layer attends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum AttentionKind {
    /// Every key up to the query's own: the dense control.
    Full,
    /// A window of so many keys, the query's own included: the window-only control.
    Window {
        /// Keys that a query sees.
        window: usize,
    },
    /// All-or-Here Attention (arXiv 2512.22562): window or full, by a learned gate per head.
    Aha {
        /// Keys that a query sees near.
        window: usize,
    },
    /// AHA with several windows to choose from.
    MultiWindow {
        /// Keys that a query sees in each, ascending.
        windows: Vec<usize>,
    },
    /// Learning To Attend (arXiv 2603.17484): a window for all, then full attention for tokens that a gate picks.
    L2a {
        /// Keys that a query sees in the local sub-layer.
        window: usize,
    },
    /// L2A's local sub-layer alone, which is what [pruning](crate::Pruning) leaves of an L2A layer: a window, behind a norm,
    /// with norms of queries and keys.
    L2aLocal {
        /// Keys that a query sees.
        window: usize,
    },
    /// Query-adaptive attention (QAdA, arXiv 2502.09647): a window and the first tokens, then everything else where the moments
    /// of keys say so. It has the weights of full attention and learns nothing for its gate.
    Qada {
        /// Keys that a query sees near.
        window: usize,
        /// A row stays near iff its near keys are predicted to hold at least this share of the softmax.
        tau: f64,
        /// Tokens at the start of the sequence that every query sees; 16 unless set.
        #[serde(default = "qada_sinks")]
        sinks: u32,
    },
    /// RATTENTION (arXiv 2506.15545): a window, and linear attention to what has left it.
    Rattention {
        /// Keys that a query sees near: the paper's w and one more.
        window: usize,
    },
    /// AHA over a linear far branch (the second question that arXiv 2512.22562 leaves open): a window, and linear attention to
    /// what has left it where a gate says so.
    AhaLinear {
        /// Keys that a query sees near.
        window: usize,
    },
    /// AHA's two branches by a gate that is drawn at random: the control that a learned gate has to beat.
    RandomGate {
        /// Keys that a query sees near.
        window: usize,
        /// Share of token-heads that look far.
        far_share: f64,
    },
    /// Attention from outside this crate, under the name that it was [registered](crate::register) by.
    Custom {
        /// The name.
        name: String,
    },
}

/// The paper's.
fn qada_sinks() -> u32 {
    16
}

impl AttentionKind {
    /// The kind's name, as configurations have it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Window { .. } => "window",
            Self::Aha { .. } => "aha",
            Self::MultiWindow { .. } => "multi-window",
            Self::L2a { .. } => "l2a",
            Self::L2aLocal { .. } => "l2a-local",
            Self::Qada { .. } => "qada",
            Self::Rattention { .. } => "rattention",
            Self::AhaLinear { .. } => "aha-linear",
            Self::RandomGate { .. } => "random-gate",
            Self::Custom { .. } => "custom",
        }
    }

    /// The (smallest) window, if the kind has one.
    pub fn window(&self) -> Option<usize> {
        match self {
            Self::Full | Self::Custom { .. } => None,
            Self::Window { window }
            | Self::Aha { window }
            | Self::L2a { window }
            | Self::L2aLocal { window }
            | Self::Qada { window, .. }
            | Self::Rattention { window }
            | Self::AhaLinear { window }
            | Self::RandomGate { window, .. } => Some(*window),
            Self::MultiWindow { windows } => windows.first().copied(),
        }
    }

    /// How many keys the query at `position` (from 0) sees by `route`, which is 0 where there is no router: what a decode
    /// step would have to read. A linear branch reads a state of fixed size and no key. `None` for kinds from outside this
    /// crate.
    pub fn keys(&self, route: u8, position: usize) -> Option<usize> {
        let all = position + 1;
        let near = |window: usize| window.min(all);
        Some(match self {
            Self::Full => all,
            Self::Window { window }
            | Self::L2aLocal { window }
            | Self::Rattention { window }
            | Self::AhaLinear { window } => near(*window),
            Self::Aha { window } | Self::RandomGate { window, .. } if route == 0 => near(*window),
            Self::Qada { window, sinks, .. } if route == 0 => near(window.saturating_add(*sinks as usize)),
            Self::Aha { .. } | Self::RandomGate { .. } | Self::Qada { .. } => all,
            // Two sub-layers, one after the other.
            Self::L2a { window } => near(*window) + if route == 0 { 0 } else { all },
            Self::MultiWindow { windows } => {
                windows.get(usize::from(route)).map_or(all, |&window| near(window))
            }
            Self::Custom { .. } => return None,
        })
    }
}

/// The decoder's sizes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Layers.
    pub layers: usize,
    /// Channels of the hidden states.
    pub d_model: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, which the query heads are a multiple of.
    pub kv_heads: usize,
    /// Channels inside the feed-forward block.
    pub feed_forward: usize,
    /// Tokens that the model sees at once.
    pub context: usize,
    /// The base of the rotary frequencies.
    pub rope_theta: f32,
    /// How layers attend: one for all, or one per layer.
    pub attention: Vec<AttentionKind>,
    /// What the bias of AHA's gates (and of the choice of full attention) starts from; no bias unless set.
    pub router_bias: Option<f32>,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            layers: 4,
            d_model: 256,
            heads: 8,
            kv_heads: 4,
            feed_forward: 704,
            context: 512,
            rope_theta: 10_000.0,
            attention: vec![AttentionKind::Aha { window: 128 }],
            router_bias: None,
        }
    }
}

impl ModelConfig {
    /// Checks what no module checks.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first setting that makes no sense.
    pub fn check(&self) -> Result<()> {
        for (setting, count) in [("model.layers", self.layers), ("model.feed_forward", self.feed_forward)] {
            if count == 0 {
                return Err(Error::setting(setting, count, "at least 1"));
            }
        }
        if self.context < 2 {
            // The last position has no penalty: there has to be another.
            return Err(Error::setting("model.context", self.context, "at least 2"));
        }
        if ![1, self.layers].contains(&self.attention.len()) {
            let found = format!("a list of {}", self.attention.len());
            let expected = format!("one kind for all layers, or {} kinds", self.layers);
            return Err(Error::setting("model.attention", found, expected));
        }
        Ok(())
    }

    /// How layer `index` attends.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn attention_of(&self, index: usize) -> &AttentionKind {
        match self.attention.as_slice() {
            [all] => all,
            each => &each[index],
        }
    }

    /// Whether some layer has a gate with a threshold, which a [`Budget`] can move.
    pub(crate) fn has_threshold(&self) -> bool {
        let gated = |kind: &AttentionKind| {
            matches!(
                kind,
                AttentionKind::Aha { .. } | AttentionKind::AhaLinear { .. } | AttentionKind::L2a { .. }
            )
        };
        (0..self.layers).any(|layer| gated(self.attention_of(layer)))
    }
}

/// The element type of the training pass. Weights, gradients' sums and moments are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// bfloat16, over weights of 32 bits (arXiv 1710.03740, section 3.1, with bfloat16, which needs no loss scale).
    Bf16,
}

/// The weights of the router penalties, and how they change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Penalties {
    /// Of the mean AHA score, the last position left out (arXiv 2512.22562 takes 3e-4).
    pub aha: f64,
    /// Of the mean cost of a choice of windows: the share of past keys that it reads.
    pub multi_window: f64,
    /// Of L2A's sum of squared scores, at the last step (arXiv 2603.17484 takes 1e-8 for 131072 tokens).
    pub l2a: f64,
    /// Steps without L2A's penalty; it grows linearly from there to the last step.
    pub l2a_warm_up: u64,
    /// How likely a layer of L2A attends for every token in a pass of training, so that skipped tokens teach the
    /// gate as well (the paper takes 0.1).
    pub l2a_leak: f64,
}

impl Default for Penalties {
    fn default() -> Self {
        Self { aha: 3e-4, multi_window: 3e-4, l2a: 1e-8, l2a_warm_up: 100, l2a_leak: 0.1 }
    }
}

/// A share of far to steer to, by moving the thresholds of gates (LoGo, arXiv 2608.29539).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// The share of token-heads (L2A: tokens) of a layer that may look far.
    pub target: f64,
    /// What a threshold moves by in a step; LoGo takes 5e-4.
    pub step: f64,
}

/// When a gate counts as collapsed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Guard {
    /// A share of far below this is suspicious,
    pub low: f64,
    /// and one above this,
    pub high: f64,
    /// when it lasts for so many steps.
    pub patience: u64,
}

impl Default for Guard {
    fn default() -> Self {
        Self { low: 0.002, high: 0.998, patience: 200 }
    }
}

/// All that a run depends on besides its text and its device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct TrainingConfig {
    /// The decoder.
    pub model: ModelConfig,
    /// Where weights, windows of text and coins are drawn from.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Windows of text in a pass.
    pub batch: usize,
    /// Passes whose gradients make one step.
    pub accumulation: usize,
    /// The learning rate after the warm-up.
    pub learning_rate: f64,
    /// The share of it that is left at the last step.
    pub final_learning_rate: f64,
    /// Steps over which it rises from 0.
    pub warm_up: u64,
    /// Weight decay of matrices, decoupled (AdamW, arXiv 1711.05101).
    pub weight_decay: f64,
    /// AdamW's decay of the first moment.
    pub beta_1: f64,
    /// AdamW's decay of the second moment.
    pub beta_2: f64,
    /// The largest norm of all gradients together.
    pub clip: f64,
    /// The element type of the pass.
    pub precision: Precision,
    /// The penalties of routers.
    pub penalties: Penalties,
    /// A share of far to steer to; none unless set.
    pub budget: Option<Budget>,
    /// When to warn of a collapsed gate.
    pub guard: Guard,
    /// The share of the text that is kept for validation.
    pub validation_share: f64,
    /// Windows of validation text, spread evenly.
    pub validation_windows: usize,
    /// Steps between two lines of metrics.
    pub log_every: u64,
    /// Steps between two validations.
    pub validate_every: u64,
    /// Steps between two checkpoints.
    pub save_every: u64,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            model: ModelConfig::default(),
            seed: 1,
            steps: 2000,
            batch: 8,
            accumulation: 1,
            learning_rate: 1e-3,
            final_learning_rate: 0.1,
            warm_up: 100,
            weight_decay: 0.1,
            beta_1: 0.9,
            beta_2: 0.95,
            clip: 1.0,
            precision: Precision::F32,
            penalties: Penalties::default(),
            budget: None,
            guard: Guard::default(),
            validation_share: 0.1,
            validation_windows: 64,
            log_every: 10,
            validate_every: 200,
            save_every: 500,
        }
    }
}

impl TrainingConfig {
    /// Checks every number that nothing below checks.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first setting that makes no sense.
    pub fn check(&self) -> Result<()> {
        let model = &self.model;
        model.check()?;
        let counts = [
            ("steps", self.steps),
            ("batch", self.batch as u64),
            ("accumulation", self.accumulation as u64),
            ("validation_windows", self.validation_windows as u64),
            ("log_every", self.log_every),
            ("validate_every", self.validate_every),
            ("save_every", self.save_every),
            ("guard.patience", self.guard.patience),
        ];
        for (setting, count) in counts {
            if count == 0 {
                return Err(Error::setting(setting, count, "at least 1"));
            }
        }
        for (setting, value) in [("learning_rate", self.learning_rate), ("clip", self.clip)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::setting(setting, value, "a finite positive number"));
            }
        }
        let Penalties { aha, multi_window, l2a, l2a_warm_up: _, l2a_leak } = self.penalties;
        let weights = [
            ("weight_decay", self.weight_decay),
            ("penalties.aha", aha),
            ("penalties.multi_window", multi_window),
            ("penalties.l2a", l2a),
        ];
        for (setting, value) in weights {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::setting(setting, value, "a finite number, at least 0"));
            }
        }
        let Guard { low, high, .. } = self.guard;
        let shares = [
            ("final_learning_rate", self.final_learning_rate),
            ("penalties.l2a_leak", l2a_leak),
            ("guard.low", low),
            ("guard.high", high),
        ];
        for (setting, value) in shares {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::setting(setting, value, "0 to 1"));
            }
        }
        for (setting, value) in [("beta_1", self.beta_1), ("beta_2", self.beta_2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::setting(setting, value, "at least 0 and below 1"));
            }
        }
        if !(self.validation_share > 0.0 && self.validation_share < 1.0) {
            return Err(Error::setting("validation_share", self.validation_share, "above 0 and below 1"));
        }
        if let Some(Budget { target, step }) = self.budget {
            if !model.has_threshold() {
                return Err(Error::setting("budget", target, "none: no layer has a gate with a threshold"));
            }
            if !(0.0..=1.0).contains(&target) {
                return Err(Error::setting("budget.target", target, "0 to 1"));
            }
            if !(step > 0.0 && step < 0.5) {
                return Err(Error::setting("budget.step", step, "above 0 and below 0.5"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn a_configuration_survives_its_json() {
        let mut config = TrainingConfig::default();
        config.model.layers = 8;
        config.model.attention = vec![
            AttentionKind::Full,
            AttentionKind::MultiWindow { windows: vec![16, 64] },
            AttentionKind::RandomGate { window: 8, far_share: 0.1 },
            AttentionKind::L2a { window: 32 },
            AttentionKind::Qada { window: 32, tau: 0.9, sinks: 4 },
            AttentionKind::Rattention { window: 33 },
            AttentionKind::L2aLocal { window: 5 },
            AttentionKind::AhaLinear { window: 8 },
        ];
        config.budget = Some(Budget { target: 0.1, step: 5e-4 });
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<TrainingConfig>(&json).unwrap(), config);
        config.check().unwrap();
        assert_eq!(config.model.attention_of(4).name(), "qada");
    }

    #[test]
    fn what_is_left_out_of_json_is_the_default() {
        let json =
            r#"{ "steps": 7, "model": { "attention": [{ "kind": "qada", "window": 3, "tau": 0.5 }] } }"#;
        let config: TrainingConfig = serde_json::from_str(json).unwrap();
        assert_eq!((config.steps, config.batch), (7, TrainingConfig::default().batch));
        assert_eq!(config.model.attention_of(2), &AttentionKind::Qada { window: 3, tau: 0.5, sinks: 16 });
    }

    #[rstest]
    #[case(r#"{ "step": 7 }"#)]
    #[case(r#"{ "model": { "attention": [{ "kind": "sparse" }] } }"#)]
    #[case(r#"{ "model": { "attention": [{ "kind": "aha" }] } }"#)]
    #[case(r#"{ "budget": { "target": 0.1 } }"#)]
    fn json_that_is_not_known_is_refused(#[case] json: &str) {
        assert!(serde_json::from_str::<TrainingConfig>(json).is_err(), "{json}");
    }

    #[rstest]
    #[case("steps", |config: &mut TrainingConfig| config.steps = 0)]
    #[case("model.context", |config: &mut TrainingConfig| config.model.context = 1)]
    #[case("model.attention", |config: &mut TrainingConfig| config.model.attention = vec![AttentionKind::Full; 3])]
    #[case("learning_rate", |config: &mut TrainingConfig| config.learning_rate = f64::NAN)]
    #[case("penalties.aha", |config: &mut TrainingConfig| config.penalties.aha = -1.0)]
    #[case("penalties.l2a_leak", |config: &mut TrainingConfig| config.penalties.l2a_leak = f64::NAN)]
    #[case("beta_2", |config: &mut TrainingConfig| config.beta_2 = 1.0)]
    #[case("validation_share", |config: &mut TrainingConfig| config.validation_share = 0.0)]
    #[case("budget.target", |config: &mut TrainingConfig| config.budget = Some(Budget { target: 2.0, step: 1e-3 }))]
    #[case("budget.step", |config: &mut TrainingConfig| config.budget = Some(Budget { target: 0.2, step: 0.0 }))]
    #[case("budget", |config: &mut TrainingConfig| {
        config.model.attention = vec![AttentionKind::Full];
        config.budget = Some(Budget { target: 0.2, step: 1e-3 });
    })]
    fn settings_that_make_no_sense_are_named(#[case] expected: &str, #[case] spoil: fn(&mut TrainingConfig)) {
        let mut config = TrainingConfig::default();
        config.check().unwrap();
        spoil(&mut config);
        match config.check() {
            Err(Error::Setting { setting, .. }) => assert_eq!(setting, expected),
            other => panic!("{other:?}, expected a complaint about {expected}"),
        }
    }
}
