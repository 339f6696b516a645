//! Leaving out the far branches of layers that seldom look far, and with them what their caches would hold (L2A, arXiv
//! 2603.17484).

use serde::Serialize;

use crate::{AttentionKind, Checkpoint, Error, ModelConfig, Result, metrics::mean_share};

/// Which layers of a model keep their far branch.
///
/// A layer is pruned when its share of far, the mean over its router heads, is below a threshold. It becomes what its far
/// branch leaves: AHA a window, several windows the largest of them, L2A its local sub-layer. Layers without a learned
/// router stay as they are.
///
/// ```no_run
/// use std::path::Path;
///
/// use bifocal_lm::{Checkpoint, Pruning, metrics};
///
/// let checkpoint = Checkpoint::load(Path::new("run/checkpoint"))?;
/// let far = metrics::recorded_far(Path::new("run/metrics.jsonl"), checkpoint.step(), 20)?;
/// let pruning = Pruning::new(&checkpoint.config().model, &far, 0.01)?;
/// checkpoint.pruned(&pruning).save(Path::new("pruned"))?;
/// # Ok::<(), bifocal_lm::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Pruning {
    model: ModelConfig,
    layers: Vec<PrunedLayer>,
}

/// What pruning makes of a layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PrunedLayer {
    /// How it attends.
    pub before: AttentionKind,
    /// How it attends from now on.
    pub after: AttentionKind,
    /// The mean share of far over its router heads; `None` without a router.
    pub far: Option<f64>,
    /// The share of the head that looks far most often.
    pub most: Option<f64>,
}

impl Pruning {
    /// Decides for every layer of `model` by its shares of far, as [metrics](crate::metrics) have them: pruned are those
    /// `below` a threshold from 0 to 1. That may be none.
    ///
    /// # Errors
    /// [`Error::Setting`] for another threshold, a model without learned routers, and shares of another model.
    pub fn new(model: &ModelConfig, far: &[Option<Vec<f64>>], below: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&below) {
            return Err(Error::setting("the share to prune below", below, "0 to 1"));
        }
        if far.len() != model.layers {
            let expected = format!("those of {} layers, as the model has", model.layers);
            return Err(Error::setting("shares of far", format!("of {} layers", far.len()), expected));
        }
        let kinds = || (0..model.layers).map(move |layer| model.attention_of(layer));
        if kinds().all(|kind| kind.near().is_none()) {
            let mut found: Vec<_> = kinds().map(AttentionKind::name).collect();
            found.dedup();
            let expected = "a kind with a learned router in some layer: aha, multi-window or l2a";
            return Err(Error::setting("model.attention", found.join(", "), expected));
        }
        let layer = |(before, heads): (&AttentionKind, &Option<Vec<f64>>)| {
            let far = mean_share(std::slice::from_ref(heads));
            let after = match (before.near(), far) {
                (Some(near), Some(far)) if far < below => near,
                (Some(_), None) => {
                    let expected = format!("some for a layer of {}", before.name());
                    return Err(Error::setting("shares of far", "none", expected));
                }
                _ => before.clone(),
            };
            let most = heads.iter().flatten().copied().reduce(f64::max);
            Ok(PrunedLayer { before: before.clone(), after, far, most })
        };
        let layers = kinds().zip(far).map(layer).collect::<Result<Vec<_>>>()?;
        let attention = layers.iter().map(|layer| layer.after.clone()).collect();
        Ok(Self { model: ModelConfig { attention, ..model.clone() }, layers })
    }

    /// Every layer, first to last.
    pub fn layers(&self) -> &[PrunedLayer] {
        &self.layers
    }

    /// The model that is left.
    pub fn model(&self) -> &ModelConfig {
        &self.model
    }

    /// The name that a parameter has in the model that is left; `None` for those of far branches and routers.
    fn rename(&self, name: &str) -> Option<String> {
        let same = || Some(name.to_string());
        let Some((index, rest)) = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) else {
            return same();
        };
        let layer = index.parse().ok().and_then(|index: usize| self.layers.get(index));
        let pruned = layer.filter(|layer| layer.is_pruned());
        let attention = rest.strip_prefix("attention.").and_then(|rest| rest.split_once('.'));
        let (Some(layer), Some((part, weight))) = (pruned, attention) else { return same() };
        let part = match (&layer.before, part) {
            (_, "router") | (AttentionKind::L2a { .. }, "global_norm" | "global") => return None,
            // Norms of L2A are inside of its attention.
            (AttentionKind::L2a { .. }, "local_norm") => "attention_norm".to_string(),
            (AttentionKind::L2a { .. }, "local") => "attention.projections".to_string(),
            _ => format!("attention.{part}"),
        };
        Some(format!("layers.{index}.{part}.{weight}"))
    }
}

impl PrunedLayer {
    /// Whether it loses its far branch.
    pub fn is_pruned(&self) -> bool {
        self.before != self.after
    }
}

impl Checkpoint {
    /// The model without the far branches that `pruning`, which is of its configuration, leaves out: weights alone.
    pub fn pruned(&self, pruning: &Pruning) -> Self {
        self.clone().remodelled(pruning.model.clone(), |name| pruning.rename(name))
    }
}

impl AttentionKind {
    /// What is left of the kind without its far branch; `None` for kinds without a learned router, and where far is a state
    /// whose size does not depend on the context.
    fn near(&self) -> Option<Self> {
        match self {
            Self::Aha { window } => Some(Self::Window { window: *window }),
            // Whatever was chosen near is inside of it.
            Self::MultiWindow { windows } => Some(Self::Window { window: *windows.last()? }),
            Self::L2a { window } => Some(Self::L2aLocal { window: *window }),
            _ => None,
        }
    }

    /// Tokens whose keys and values a layer's caches hold in a sequence of `context` tokens, added up; a window needs no more
    /// than its own. What has a size that does not depend on the context does not count, as the states of linear branches.
    pub fn cached_tokens(&self, context: usize) -> usize {
        match self {
            Self::Window { window }
            | Self::L2aLocal { window }
            | Self::Rattention { window }
            | Self::AhaLinear { window } => context.min(*window),
            // Both sub-layers have keys and values of their own.
            Self::L2a { window } => context + context.min(*window),
            _ => context,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use burn::tensor::{Device, Int, Tensor, TensorData};
    use rstest::rstest;

    use super::*;
    use crate::{
        Budget, BudgetController, CollapseDetector, Corpus, Decoder, Forward, Pass, TrainingConfig,
        checkpoint::Snapshot, optimiser::AdamW,
    };

    fn model(attention: Vec<AttentionKind>) -> ModelConfig {
        let layers = attention.len();
        let sizes = ModelConfig {
            d_model: 16,
            heads: 2,
            kv_heads: 1,
            feed_forward: 8,
            context: 24,
            ..Default::default()
        };
        ModelConfig { layers, attention, ..sizes }
    }

    fn aha() -> AttentionKind {
        AttentionKind::Aha { window: 4 }
    }

    #[test]
    fn layers_below_the_threshold_lose_their_far_branch() {
        let windows = vec![2, 6];
        let kinds = vec![
            aha(),
            AttentionKind::MultiWindow { windows: windows.clone() },
            AttentionKind::L2a { window: 3 },
            aha(),
            AttentionKind::Full,
            AttentionKind::Qada { window: 4, tau: 0.5, sinks: 0 },
        ];
        let far = vec![
            Some(vec![0.0, 0.05]),
            Some(vec![0.01, 0.02]),
            Some(vec![0.024]),
            Some(vec![0.0, 0.06]),
            None,
            Some(vec![0.0, 0.0]),
        ];
        let pruning = Pruning::new(&model(kinds.clone()), &far, 0.03).unwrap();
        let expected = vec![
            AttentionKind::Window { window: 4 },
            AttentionKind::Window { window: 6 },
            AttentionKind::L2aLocal { window: 3 },
            // On the threshold is not below it, a mean counts, and only learned routers do.
            kinds[3].clone(),
            kinds[4].clone(),
            kinds[5].clone(),
        ];
        assert_eq!(pruning.model().attention, expected);
        assert_eq!(pruning.model().layers, 6);
        let layers = pruning.layers();
        let pruned: Vec<bool> = layers.iter().map(PrunedLayer::is_pruned).collect();
        assert_eq!(pruned, [true, true, true, false, false, false]);
        assert_eq!((layers[0].far, layers[0].most), (Some(0.025), Some(0.05)));
        assert_eq!((layers[4].far, layers[4].most), (None, None));
        // Of 100 tokens a window needs its own, and L2A's two sub-layers hold them twice.
        let cached = |kind: fn(&PrunedLayer) -> &AttentionKind| -> Vec<usize> {
            layers.iter().map(|layer| kind(layer).cached_tokens(100)).collect()
        };
        assert_eq!(cached(|layer| &layer.before), [100, 100, 103, 100, 100, 100]);
        assert_eq!(cached(|layer| &layer.after), [4, 6, 3, 100, 100, 100]);
        assert_eq!(AttentionKind::L2a { window: 200 }.cached_tokens(100), 200);
        assert_eq!(AttentionKind::Window { window: 200 }.cached_tokens(100), 100);
        // A share of nothing is below every threshold but nothing.
        let nothing = Pruning::new(&model(kinds.clone()), &far, 0.0).unwrap();
        assert_eq!(nothing.model().attention, kinds);
    }

    #[test]
    fn what_cannot_be_decided_is_named() {
        let refused = |kinds: Vec<AttentionKind>, far: &[Option<Vec<f64>>], below: f64| match Pruning::new(
            &model(kinds),
            far,
            below,
        )
        .unwrap_err()
        {
            Error::Setting { setting, found, .. } => (setting, found),
            other => panic!("{other}"),
        };
        let one = [Some(vec![0.1, 0.2])];
        for below in [-0.1, 1.5, f64::NAN] {
            assert_eq!(refused(vec![aha()], &one, below), ("the share to prune below", below.to_string()));
        }
        let controls = vec![
            AttentionKind::Full,
            AttentionKind::Window { window: 2 },
            AttentionKind::Window { window: 2 },
        ];
        assert_eq!(refused(controls, &[None, None, None], 0.1), ("model.attention", "full, window".into()));
        assert_eq!(refused(vec![aha(); 2], &one, 0.1), ("shares of far", "of 1 layers".into()));
        assert_eq!(refused(vec![aha()], &[None], 0.1), ("shares of far", "none".into()));
    }

    /// Two layers whose gates are shut, by a bias or a threshold, behind one that is full, as a run would save them.
    fn shut(kind: AttentionKind) -> Checkpoint {
        let mut config = TrainingConfig {
            model: model(vec![AttentionKind::Full, kind.clone(), kind]),
            ..Default::default()
        };
        config.model.router_bias = Some(-20.0);
        config.budget = Some(Budget { target: 0.1, step: 0.01 });
        let mut controller = BudgetController::new(config.budget.unwrap(), 3);
        // L2A's routers start at zero: a score of a half, which is below what the threshold is after this.
        (0..3).for_each(|layer| _ = controller.update(layer, 1.0));
        let decoder = Decoder::new(&config.model, 5, &Device::flex()).unwrap();
        Checkpoint::take(&Snapshot {
            config: &config,
            text: "another text",
            step: 4,
            controller: Some(&controller),
            detector: &CollapseDetector::new(config.guard, 3),
            decoder: &decoder,
            optimiser: &AdamW::new(&decoder),
        })
        .unwrap()
    }

    fn forward(checkpoint: &Checkpoint) -> Forward {
        let device = Device::flex();
        let tokens: Vec<i32> = (0..24).map(|n| n * 7 % 60 + 40).collect();
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [1, 24]), &device);
        checkpoint.decoder(&device).unwrap().forward(tokens, Pass::default()).unwrap()
    }

    #[rstest]
    #[case::aha(aha())]
    #[case::multi_window(AttentionKind::MultiWindow { windows: vec![4] })]
    #[case::l2a(AttentionKind::L2a { window: 4 })]
    fn what_is_pruned_is_what_a_shut_gate_leaves(#[case] kind: AttentionKind) {
        let whole = shut(kind.clone());
        let before = forward(&whole);
        let shares = |forward: &Forward| -> Vec<Option<Vec<f64>>> {
            let share = |routing: &bifocal_burn::Routing| routing.far_share().unwrap();
            forward.routings.iter().map(|routing| routing.as_ref().map(share)).collect()
        };
        let far = shares(&before);
        assert!(far[1].iter().flatten().all(|&share| share == 0.0), "{far:?}");
        // One layer is said to look far after all, and stays.
        let kept = [None, Some(vec![0.5]), far[2].clone()];
        let pruning = Pruning::new(&whole.config().model, &kept, 0.01).unwrap();
        let pruned = whole.pruned(&pruning);
        let after = forward(&pruned);
        let routed: Vec<bool> = after.routings.iter().map(Option::is_some).collect();
        assert_eq!(routed, [false, true, false]);
        let logits = |forward: Forward| forward.logits.into_data().try_to_vec::<f32>().unwrap();
        for (before, after) in logits(before).into_iter().zip(logits(after)) {
            approx::assert_abs_diff_eq!(before, after, epsilon = 1e-5);
        }
        assert_eq!(pruned.config().model.attention_of(1), &kind);
        // One gate is left to steer, if it has a threshold.
        let steered = !matches!(kind, AttentionKind::MultiWindow { .. });
        assert_eq!(pruned.config().budget.is_some(), steered);

        // Both layers: nothing is left of gates, and the file says so when it is read again.
        let pruned = whole.pruned(&Pruning::new(&whole.config().model, &far, 0.01).unwrap());
        assert!(forward(&pruned).routings.iter().all(Option::is_none));
        let folder = tempfile::tempdir().unwrap();
        let [path, text] = ["pruned", "text"].map(|name| folder.path().join(name));
        pruned.save(&path).unwrap();
        let again = Checkpoint::load(&path).unwrap();
        assert_eq!(again, pruned);
        again.config().check().unwrap();
        // It is as good on a text as it was before.
        fs::write(&text, "near and far ".repeat(9)).unwrap();
        let corpus = Corpus::open(&[text], 1).unwrap();
        let [before, after] = [&whole, &again].map(|model| model.validate(&corpus, &Device::flex()).unwrap());
        approx::assert_relative_eq!(before.loss, after.loss, epsilon = 1e-5);
        assert_eq!((before.far[1].is_some(), after.far), (true, vec![None; 3]));
    }
}
