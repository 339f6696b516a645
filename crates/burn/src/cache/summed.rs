use std::collections::BTreeMap;

use bifocal::{
    Problem, Result, Summary,
    decode::{Batch, MAX_QUERIES, NewTokens, SequenceId, SummaryCache},
};
use burn::tensor::Tensor;

use super::store::gather;
use crate::{AttentionOptions, place::Place};

/// Tokens that can be taken back at any time, whatever was summed up: those of a step.
pub(super) const SLACK: usize = MAX_QUERIES;

/// Keys and values of a batch of sequences that have as many tokens each, and summaries of those that left the window, in
/// Bifocal's memory.
#[derive(Debug)]
pub(super) struct Summed<S, D> {
    pub(super) cache: SummaryCache<S>,
    sequences: Vec<SequenceId>,
    batch: Batch,
    /// By the number of queries in a step: what such steps run by, and the problem that it was made for.
    decoders: BTreeMap<usize, (Problem, D)>,
}

impl<S: Summary + Clone, D> Summed<S, D> {
    /// Every sequence that an empty cache has room for, without tokens.
    pub(super) fn start(place: &Place, mut cache: SummaryCache<S>) -> Result<Self> {
        let count = cache.kv().free_sequences();
        let start = |_| cache.start(place.client());
        let sequences = (0..count).map(start).collect::<Result<Vec<_>>>()?;
        Self::of(place, cache, sequences)
    }

    fn of(place: &Place, cache: SummaryCache<S>, sequences: Vec<SequenceId>) -> Result<Self> {
        let batch = cache.kv().batch(place.client(), &sequences)?;
        Ok(Self { cache, sequences, batch, decoders: BTreeMap::new() })
    }

    /// The same tokens in memory of their own.
    pub(super) fn fork(&self, place: &Place) -> Result<Self> {
        let (cache, sequences) = self.cache.fork_apart(place.client(), &self.sequences)?;
        Self::of(place, cache, sequences)
    }

    /// Tokens of each sequence.
    pub(super) fn tokens(&self) -> Result<usize> {
        self.cache.kv().length(self.sequences[0])
    }

    /// Checks that all tokens of each sequence but the first `tokens` can be taken back.
    pub(super) fn check_truncate(&self, place: &Place, tokens: usize) -> Result<()> {
        let check = |&sequence| self.cache.check_truncate(place.client(), sequence, tokens);
        self.sequences.iter().try_for_each(check)
    }

    /// Takes them back.
    pub(super) fn truncate(&mut self, place: &Place, tokens: usize) -> Result<()> {
        let truncate = |&sequence| self.cache.truncate(place.client(), sequence, tokens);
        self.sequences.iter().try_for_each(truncate)
    }

    /// Appends `key [B, Hk, T, D]` and `value [B, Hk, T, Dv]`, and keys as they are summed up if these are others.
    pub(super) fn append(
        &mut self,
        place: &Place,
        [key, value]: [&Tensor<4>; 2],
        plain_key: Option<&Tensor<4>>,
    ) -> Result<()> {
        let key = place.import("key", key.clone())?;
        let value = place.import("value", value.clone())?;
        let plain_key = plain_key.map(|key| place.import("the far key", key.clone())).transpose()?;
        let mut new = NewTokens::new(key.view(), value.view());
        new.plain_key = plain_key.as_ref().map(bifocal::Tensor::view);
        self.cache.append(place.client(), &self.sequences, &new)
    }

    /// All keys `[B, Hk, T, D]` and values `[B, Hk, T, Dv]`, of a cache that forgets none.
    pub(super) fn gather(&self, place: &Place) -> Result<[Tensor<4>; 2]> {
        gather(place, self.cache.kv(), &self.sequences)
    }

    /// What a step of `query`, whose keys are there already, takes: the problem that it is, what `make` makes for such
    /// problems, the cache and its batch.
    pub(super) fn decoder(
        &mut self,
        query: &bifocal::Tensor<4>,
        options: &AttentionOptions,
        make: impl FnOnce(&Problem) -> Result<D>,
    ) -> Result<(Problem, &D, &SummaryCache<S>, &Batch)> {
        let Self { cache, batch, decoders, .. } = self;
        let problem = cache.kv().view(batch)?.problem(query.shape(), query.element())?;
        let problem = options.apply(problem)?;
        if decoders.get(&problem.query_len).is_none_or(|(made_for, _)| *made_for != problem) {
            decoders.insert(problem.query_len, (problem, make(&problem)?));
        }
        Ok((problem, &decoders[&problem.query_len].1, &*cache, &*batch))
    }
}
