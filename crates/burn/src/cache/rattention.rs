use bifocal::{
    Error, LinearAttention, Problem, Rattention, Result, Summary, Window,
    decode::{KvShape, Layout, LinearCache, MAX_QUERIES, RattentionDecoder},
};
use burn::tensor::Tensor;

use super::{
    store::ring,
    summed::{SLACK, Summed},
};
use crate::{
    AttentionOptions, Routing,
    linear::{linear_attention, linear_attention_on, routed_rows},
    place::Place,
    windowed_attention,
};

/// A window, and the state of all that has left it: constant in size, whatever the context. RATTENTION's, and AHA's over a linear
/// far branch.
pub(super) type RattentionCache = Summed<LinearAttention, RattentionDecoder>;

impl RattentionCache {
    pub(super) fn new(place: &Place, shape: KvShape, size: [usize; 2], window: Window) -> Result<Self> {
        let client = place.client();
        let layout = match ring(size, window, 2 * SLACK)? {
            Some(ring) => ring,
            None => Layout::contiguous(size[0], size[1])?,
        };
        let far = LinearAttention::beyond(window);
        Self::start(place, LinearCache::new(client, far, shape, layout, SLACK)?.with_plain_keys(client)?)
    }

    /// Checks that rows are asked to see what this was made for.
    pub(super) fn check(&self, window: Window) -> Result<()> {
        let (made_for, far) = (self.cache.summary().reach(), LinearAttention::beyond(window).reach());
        match made_for == far {
            true => Ok(()),
            false => {
                let expected = format!("{made_for}, which the cache was made for");
                Err(Error::option("far reach of a step", far, expected))
            }
        }
    }

    /// Appends keys and values, and attends: the near branch by rotated query and key, the far branch by `[query, key]` as
    /// they were before, on the rows that `routing` sends there.
    pub(super) fn attend(
        &mut self,
        place: &Place,
        near: [Tensor<4>; 3],
        far: [Tensor<4>; 2],
        routing: Option<&Routing>,
        options: &AttentionOptions,
    ) -> Result<[Tensor<4>; 2]> {
        let [_, kv_heads, tokens, _] = near[1].dims();
        if self.tokens()? == 0 {
            let (window, _) = self.cache.summary().outside();
            let ([query, key, value], [far_query, far_key]) = (near, far);
            self.append(place, [&key, &value], Some(&far_key))?;
            let near = windowed_attention(query, key, value.clone(), window, options)?;
            let far = match routing {
                Some(routing) => linear_attention_on(far_query, far_key, value, window, routing)?,
                None => linear_attention(far_query, far_key, value, window)?,
            };
            return Ok([near, far]);
        }
        // A longer chunk would overwrite what its first queries see.
        let mut outs = [Vec::new(), Vec::new()];
        for start in (0..tokens).step_by(MAX_QUERIES) {
            let length = MAX_QUERIES.min(tokens - start);
            let part = |tensor: &Tensor<4>| tensor.clone().narrow(2, start, length);
            let branches = self.step(place, near.each_ref().map(part), far.each_ref().map(part), options)?;
            for (outs, branch) in outs.iter_mut().zip(branches) {
                outs.push(branch);
            }
        }
        let [near, far] = outs.map(|parts| Tensor::cat(parts, 2));
        let far = match routing {
            Some(routing) => routed_rows(place, far, kv_heads, routing)?,
            None => far,
        };
        Ok([near, far])
    }

    /// A decode step: both branches of every row.
    fn step(
        &mut self,
        place: &Place,
        [query, key, value]: [Tensor<4>; 3],
        [far_query, far_key]: [Tensor<4>; 2],
        options: &AttentionOptions,
    ) -> Result<[Tensor<4>; 2]> {
        self.append(place, [&key, &value], Some(&far_key))?;
        let (client, dtype) = (place.client(), query.dtype());
        let (window, _) = self.cache.summary().outside();
        let query = place.import("query", query)?;
        let far_query = place.import("the far query", far_query)?;
        let make = |problem: &Problem| RattentionDecoder::new(client, Rattention::new(window), problem);
        let (_, decoder, cache, batch) = self.decoder(&query, options, make)?;
        let [near, far] = decoder.branches(client, cache, batch, [query.view(), far_query.view()])?;
        Ok([place.export(near)?, place.export(far)?.cast(dtype)])
    }
}
