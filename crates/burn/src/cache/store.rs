use std::collections::BTreeMap;

use bifocal::{
    Element, Partial, Problem, Result, Routes, Window,
    decode::{Batch, DecodePlan, KvCache, KvShape, Layout, Reaches, SequenceId, Step},
};
use burn::tensor::{DType, Tensor};

use crate::{AttentionOptions, place::Place};

/// Tokens in a page of a ring at most.
const PAGE: usize = 256;

/// Room for the tokens of a window and for `slack` more; `None` where that is every token.
pub(super) fn ring([batch, capacity]: [usize; 2], window: Window, slack: usize) -> Result<Option<Layout>> {
    let kept = window.keys() as usize + slack;
    if kept >= capacity {
        return Ok(None);
    }
    let page = kept.div_ceil(kept.div_ceil(PAGE));
    Layout::ring(batch, window, slack, page).map(Some)
}

/// Keys and values of a batch of sequences that have as many tokens each, in Bifocal's memory.
#[derive(Debug)]
pub(super) struct Store {
    kv: KvCache,
    sequences: Vec<SequenceId>,
    batch: Batch,
    /// By the number of queries in a step.
    plans: BTreeMap<usize, DecodePlan>,
}

impl Store {
    /// Every sequence of the layout, without tokens.
    pub(super) fn new(place: &Place, shape: KvShape, layout: Layout) -> Result<Self> {
        let client = place.client();
        let mut kv = KvCache::new(client, shape, layout)?;
        let start = |_| kv.start(client);
        let sequences = (0..layout.sequences()).map(start).collect::<Result<Vec<_>>>()?;
        Self::of(place, kv, sequences)
    }

    fn of(place: &Place, kv: KvCache, sequences: Vec<SequenceId>) -> Result<Self> {
        let batch = kv.batch(place.client(), &sequences)?;
        Ok(Self { kv, sequences, batch, plans: BTreeMap::new() })
    }

    /// The same tokens in memory of their own.
    pub(super) fn fork(&self, place: &Place) -> Result<Self> {
        let (kv, sequences) = self.kv.fork_apart(place.client(), &self.sequences)?;
        Self::of(place, kv, sequences)
    }

    /// Tokens of each sequence.
    pub(super) fn tokens(&self) -> Result<usize> {
        self.kv.length(self.sequences[0])
    }

    /// Bytes of all its keys and values, whether there are tokens yet or not.
    pub(super) fn bytes(&self) -> usize {
        self.kv.bytes()
    }

    /// Checks that all tokens of each sequence but the first `tokens` can be taken back.
    pub(super) fn check_truncate(&self, place: &Place, tokens: usize) -> Result<()> {
        let check = |&sequence| self.kv.check_truncate(place.client(), sequence, tokens);
        self.sequences.iter().try_for_each(check)
    }

    /// Takes them back.
    pub(super) fn truncate(&mut self, place: &Place, tokens: usize) -> Result<()> {
        let truncate = |&sequence| self.kv.truncate(place.client(), sequence, tokens);
        self.sequences.iter().try_for_each(truncate)
    }

    /// Appends `key [B, Hk, T, D]` and `value [B, Hk, T, Dv]`.
    pub(super) fn append(&mut self, place: &Place, key: &Tensor<4>, value: &Tensor<4>) -> Result<()> {
        let key = place.import("key", key.clone())?;
        let value = place.import("value", value.clone())?;
        self.kv.append(place.client(), &self.sequences, key.view(), value.view())
    }

    /// All keys `[B, Hk, T, D]` and values `[B, Hk, T, Dv]`, of a store that forgets none.
    pub(super) fn gather(&self, place: &Place) -> Result<[Tensor<4>; 2]> {
        gather(place, &self.kv, &self.sequences)
    }

    /// What the last tokens, whose keys are there already, see by `reaches`: outputs of type `element`. With the problem that
    /// this was.
    pub(super) fn step(
        &mut self,
        place: &Place,
        query: &bifocal::Tensor<4>,
        reaches: &Reaches,
        routes: Option<&Routes>,
        options: &AttentionOptions,
        element: Element,
    ) -> Result<(Problem, Partial)> {
        let client = place.client();
        let sinks = options.sink_logits.clone().map(|sinks| sinks.cast(DType::F32));
        let sinks = sinks.map(|sinks| place.import("the sink logits", sinks)).transpose()?;
        let view = self.kv.view(&self.batch)?;
        let problem = options.apply(view.problem(query.shape(), query.element())?)?;
        if self.plans.get(&problem.query_len).is_none_or(|plan| *plan.problem() != problem) {
            self.plans.insert(problem.query_len, DecodePlan::new(client, &problem)?);
        }
        let mut step = Step::new(query.view(), reaches);
        if let Some(routes) = routes {
            step = step.with_routes(routes);
        }
        if let Some(sinks) = &sinks {
            step = step.with_sink_logits(sinks.view());
        }
        let partial = Partial::empty(client, &problem, element);
        self.plans[&problem.query_len].attend(client, &view, &step, &partial)?;
        Ok((problem, partial))
    }
}

/// All keys `[B, Hk, T, D]` and values `[B, Hk, T, Dv]` of sequences of which none is forgotten.
pub(super) fn gather(place: &Place, kv: &KvCache, sequences: &[SequenceId]) -> Result<[Tensor<4>; 2]> {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for &sequence in sequences {
        let (key, value) = kv.gather(place.client(), sequence)?;
        keys.push(place.export(key)?);
        values.push(place.export(value)?);
    }
    Ok([Tensor::cat(keys, 0), Tensor::cat(values, 0)])
}
