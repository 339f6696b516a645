use bifocal::{
    Error, MomentGate, Partial, Problem, Qada, Result,
    decode::{KvShape, Layout, MAX_QUERIES, MomentCache, QadaDecoder},
};
use burn::tensor::Tensor;

use super::summed::{SLACK, Summed};
use crate::{AttentionOptions, Routing, place::Place, qada_attention};

/// Keys and values that QAdA's rows may look far at, and the moments of the keys that have left the window.
pub(super) type QadaCache = Summed<MomentGate, QadaDecoder>;

impl QadaCache {
    pub(super) fn new(
        place: &Place,
        shape: KvShape,
        [batch, capacity]: [usize; 2],
        gate: MomentGate,
    ) -> Result<Self> {
        let layout = Layout::contiguous(batch, capacity)?;
        Self::start(place, MomentCache::new(place.client(), gate, shape, layout, SLACK)?)
    }

    /// Checks that rows are asked to look far by the gate that this was made for.
    pub(super) fn check(&self, gate: &MomentGate) -> Result<()> {
        let made_for = self.cache.summary();
        match made_for == gate {
            true => Ok(()),
            false => {
                let expected = format!("{made_for:?}, which the cache was made for");
                Err(Error::option("gate of a step", format!("{gate:?}"), expected))
            }
        }
    }

    /// Appends key and value, and attends.
    pub(super) fn attend(
        &mut self,
        place: &Place,
        [query, key, value]: [Tensor<4>; 3],
    ) -> Result<(Tensor<4>, Routing)> {
        let [_, _, tokens, _] = query.dims();
        let before = self.tokens()?;
        self.append(place, [&key, &value], None)?;
        let (client, gate) = (place.client(), *self.cache.summary());
        let options = AttentionOptions::default();
        if before == 0 || tokens > MAX_QUERIES {
            let [key, value] = match before {
                0 => [key, value],
                _ => self.gather(place)?,
            };
            return qada_attention(query, key, value, gate, &options);
        }
        let query = place.import("query", query)?;
        let make = |problem: &Problem| QadaDecoder::new(client, Qada::new(gate), problem);
        let (problem, decoder, cache, batch) = self.decoder(&query, &options, make)?;
        let partial = Partial::empty(client, &problem, query.element());
        let decision = decoder.step(client, cache, batch, (query.view(), None), &partial)?;
        Ok((place.export(partial.out)?, Routing::decided(place.clone(), decision)))
    }
}
