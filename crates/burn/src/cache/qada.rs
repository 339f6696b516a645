use bifocal::{
    AttentionOperator, Covariance, Element, Error, Inputs, MomentGate, Moments, Qada, Result,
    decode::{KvShape, Layout, Reaches},
    merge_routed,
};
use burn::tensor::Tensor;

use super::{recent::Recent, store::Store};
use crate::{AttentionOptions, Routing, place::Place, qada_attention};

/// Keys and values that QAdA's rows may look far at, and the moments of the keys that have left the window.
#[derive(Debug)]
pub(super) struct QadaCache {
    store: Store,
    gate: MomentGate,
    near: Reaches,
    far: Reaches,
    /// Keys of the window.
    window: Recent,
    /// Of the keys between the sinks and the window of the last token; none as long as there is no such key.
    bulk: Option<Moments>,
    bulk_bytes: usize,
}

impl QadaCache {
    pub(super) fn new(
        place: &Place,
        shape: KvShape,
        [batch, capacity]: [usize; 2],
        gate: MomentGate,
    ) -> Result<Self> {
        let (client, lens) = (place.client(), Qada::new(gate));
        let rows = match gate.covariance() {
            Covariance::Full => shape.head_dim,
            Covariance::Diagonal => 1,
            Covariance::LowRank { rank } => rank + 1,
        };
        Ok(Self {
            store: Store::new(place, shape, Layout::contiguous(batch, capacity)?)?,
            gate,
            near: Reaches::one(client, lens.near().reach())?,
            far: Reaches::new(client, &[None, Some(lens.far().reach())])?,
            window: Recent::new(gate.window().keys() as usize),
            bulk: None,
            bulk_bytes: batch * shape.kv_heads * (1 + rows) * shape.head_dim * Element::F32.size(),
        })
    }

    pub(super) fn tokens(&self) -> Result<usize> {
        self.store.tokens()
    }

    pub(super) fn bytes(&self) -> usize {
        let bulk = if self.bulk.is_some() { self.bulk_bytes } else { 0 };
        self.store.bytes() + self.window.bytes() + bulk
    }

    pub(super) fn check(&self, gate: &MomentGate) -> Result<()> {
        match self.gate == *gate {
            true => Ok(()),
            false => {
                let expected = format!("{:?}, which the cache was made for", self.gate);
                Err(Error::option("gate of a step", format!("{gate:?}"), expected))
            }
        }
    }

    /// Appends key and value, and attends.
    pub(super) fn attend(&mut self, place: &Place, qkv: [Tensor<4>; 3]) -> Result<(Tensor<4>, Routing)> {
        let [_, _, tokens, _] = qkv[0].dims();
        match (self.store.tokens()?, tokens) {
            (before @ 1.., 1) => self.step(place, qkv, before),
            (before, _) => self.chunk(place, qkv, before),
        }
    }

    /// Several tokens: each has moments of its own, which the forward pass knows how to get.
    fn chunk(
        &mut self,
        place: &Place,
        [query, key, value]: [Tensor<4>; 3],
        before: usize,
    ) -> Result<(Tensor<4>, Routing)> {
        self.store.append(place, &key, &value)?;
        let [key, value] = match before {
            0 => [key, value],
            _ => self.store.gather(place)?,
        };
        let options = AttentionOptions::default();
        let attended = qada_attention(query, key.clone(), value, self.gate, &options)?;
        let [_, _, tokens, _] = key.dims();
        let bulk = self.gate.sinks() as usize..tokens.saturating_sub(self.gate.window().keys() as usize);
        if !bulk.is_empty() {
            let key = place.import("key", key.clone())?;
            self.bulk = Some(Moments::of(place.client(), key.view(), bulk, self.gate.covariance())?);
        }
        self.window.keep(key);
        Ok(attended)
    }

    /// One token: its bulk is that of the token before, and the key that leaves the window now.
    fn step(
        &mut self,
        place: &Place,
        [query, key, value]: [Tensor<4>; 3],
        before: usize,
    ) -> Result<(Tensor<4>, Routing)> {
        let client = place.client();
        self.store.append(place, &key, &value)?;
        let sinks = self.gate.sinks() as usize;
        if let Some(left) = self.window.leaving()
            && before - self.gate.window().keys() as usize >= sinks
        {
            let left = place.import("the key that leaves", left)?;
            let left = Moments::of(client, left.view(), 0..1, self.gate.covariance())?;
            self.bulk = Some(match &self.bulk {
                Some(bulk) => bulk.merge(client, &left)?,
                None => left,
            });
        }

        let query = place.import("query", query)?;
        let new = place.import("key", key.clone())?;
        // Given moments, of all keys the prediction reads the number alone.
        let [batch, kv_heads, _, head_dim] = new.shape();
        let [by_batch, by_head, ..] = new.strides();
        let keys = new.view().reinterpret([batch, kv_heads, before + 1, head_dim], [by_batch, by_head, 0, 1]);
        let inputs = Inputs::new(query.view(), keys, keys);
        let predicted = self.gate.predict(client, &inputs.problem()?, &inputs, self.bulk.as_ref())?;

        let options = AttentionOptions::default();
        let element = query.element();
        let (problem, partial) = self.store.step(place, &query, &self.near, None, &options, element)?;
        let decision = self.gate.decide(client, &problem, partial.lse.view(), predicted)?;
        let routes = Some(&decision.routes);
        let (_, far) = self.store.step(place, &query, &self.far, routes, &options, Element::F32)?;
        merge_routed(client, &problem, &decision.routes, 1, &partial, &far)?;
        self.window.keep(self.window.followed_by(key));
        Ok((place.export(partial.out)?, Routing::decided(place.clone(), decision)))
    }
}
