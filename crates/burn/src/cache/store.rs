use std::collections::BTreeMap;

use bifocal::{
    Element, Partial, Problem, Result, Routes,
    decode::{Batch, DecodePlan, KvCache, KvShape, Layout, Reaches, SequenceId, Step},
};
use burn::tensor::{DType, Tensor};

use crate::{AttentionOptions, place::Place};

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
        let batch = kv.batch(client, &sequences)?;
        Ok(Self { kv, sequences, batch, plans: BTreeMap::new() })
    }

    /// Tokens of each sequence.
    pub(super) fn tokens(&self) -> Result<usize> {
        self.kv.length(self.sequences[0])
    }

    /// Bytes of all its keys and values, whether there are tokens yet or not.
    pub(super) fn bytes(&self) -> usize {
        let (KvShape { kv_heads, head_dim, value_dim, element }, layout) =
            (self.kv.shape(), self.kv.layout());
        layout.pages() * layout.page_size() * kv_heads * (head_dim + value_dim) * element.size()
    }

    /// Appends `key [B, Hk, T, D]` and `value [B, Hk, T, Dv]`.
    pub(super) fn append(&mut self, place: &Place, key: &Tensor<4>, value: &Tensor<4>) -> Result<()> {
        let key = place.import("key", key.clone())?;
        let value = place.import("value", value.clone())?;
        self.kv.append(place.client(), &self.sequences, key.view(), value.view())
    }

    /// All keys `[B, Hk, T, D]` and values `[B, Hk, T, Dv]`, of a store that forgets none.
    pub(super) fn gather(&self, place: &Place) -> Result<[Tensor<4>; 2]> {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for &sequence in &self.sequences {
            let (key, value) = self.kv.gather(place.client(), sequence)?;
            keys.push(place.export(key)?);
            values.push(place.export(value)?);
        }
        Ok([Tensor::cat(keys, 0), Tensor::cat(values, 0)])
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
