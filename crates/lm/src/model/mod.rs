//! The decoder: embeddings, layers of attention and gated feed-forward, and the embeddings again as output.

mod attention;
mod custom;
mod path;
mod start;

pub(crate) use attention::routes;
pub use attention::{Attention, RandomGate};
pub use custom::{CustomAttention, CustomLayer, register};
pub(crate) use path::Path;

use bifocal_burn::{L2aAttentionConfig, LayerCache, Routing, Training};
use burn::{
    module::Module,
    nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig},
    tensor::{DType, Device, Int, Tensor, activation::silu},
};

use crate::{
    AttentionKind, Error, ModelConfig, Result, VOCABULARY,
    draws::{Draws, Purpose},
};

/// A small decoder language model over bytes: pre-norm layers with RMS norms (arXiv 1910.07467), rotary positions
/// (arXiv 2104.09864), grouped kv heads (arXiv 2305.13245), SwiGLU (arXiv 2002.05202), and one matrix for both ends
/// (arXiv 1608.05859).
#[derive(Module, Debug)]
pub struct Decoder {
    /// `[vocabulary, M]`, the output's weights too.
    pub embedding: Embedding,
    /// The layers.
    pub layers: Vec<Layer>,
    /// Before the output.
    pub norm: RmsNorm,
}

/// What a decoder remembers of a batch of sequences.
#[derive(Debug)]
pub struct DecoderCache {
    layers: Vec<LayerCache>,
}

impl DecoderCache {
    /// By layer.
    pub fn layers(&self) -> &[LayerCache] {
        &self.layers
    }

    /// Tokens of each sequence so far, that every layer has.
    pub fn tokens(&self) -> usize {
        self.layers.iter().map(LayerCache::tokens).min().unwrap_or(0)
    }

    /// Bytes of device memory for keys, values and states of all layers.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
    }

    /// Another cache with the same tokens: one prompt is so gone on from in several ways. See [`LayerCache::fork`].
    ///
    /// # Errors
    /// As [`LayerCache::fork`]; [`Error::Setting`] after a step that failed in a later layer.
    pub fn fork(&self) -> Result<Self> {
        self.check_whole()?;
        Ok(Self { layers: self.layers.iter().map(LayerCache::fork).collect::<Result<_, _>>()? })
    }

    /// Takes back all tokens of every sequence but the first `tokens`, in all layers or, where one of them cannot go back so far,
    /// in none. See [`LayerCache::truncate`].
    ///
    /// # Errors
    /// As [`LayerCache::truncate`].
    pub fn truncate(&mut self, tokens: usize) -> Result<()> {
        self.layers.iter().try_for_each(|layer| layer.check_truncate(tokens))?;
        Ok(self.layers.iter_mut().try_for_each(|layer| layer.truncate(tokens))?)
    }

    /// Takes back every token: other sequences begin in the same memory.
    ///
    /// # Errors
    /// As [`LayerCache::reset`].
    pub fn reset(&mut self) -> Result<()> {
        self.truncate(0)
    }

    /// Checks that all layers have the same tokens.
    fn check_whole(&self) -> Result<()> {
        let tokens = self.tokens();
        match self.layers.iter().all(|layer| layer.tokens() == tokens) {
            true => Ok(()),
            false => {
                let expected = "one that is truncated to the tokens before it";
                Err(Error::setting("the cache", "left by a step that failed", expected))
            }
        }
    }
}

/// One layer: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.
#[derive(Module, Debug)]
pub struct Layer {
    /// Before attention; none where attention brings its norms along (L2A).
    pub attention_norm: Option<RmsNorm>,
    /// Attention.
    pub attention: Attention,
    /// Before the feed-forward block.
    pub feed_forward_norm: RmsNorm,
    /// `[M, F]`, through the SiLU.
    pub gate: Linear,
    /// `[M, F]`.
    pub up: Linear,
    /// `[F, M]`.
    pub down: Linear,
}

/// What differs from one pass to the next. Layers draw from the seed each on its own, so that a layer that is computed
/// again draws the same.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pass {
    /// Where random gates and coins are drawn from.
    pub seed: u64,
    /// How likely a layer of L2A trains densely in this pass, for tokens that its gate leaves out as well.
    pub leak: f64,
}

/// What a pass gives.
#[derive(Clone, Debug)]
pub struct Forward {
    /// `[B, T, vocabulary]` in f32: what comes after each token.
    pub logits: Tensor<3>,
    /// What each layer's router decided; `None` for layers without one.
    pub routings: Vec<Option<Routing>>,
}

impl Decoder {
    /// A decoder with weights drawn from `seed`, in f32 on `device`.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) and [`Error::Attention`](crate::Error::Attention) for sizes, windows and
    /// shares that make no sense.
    pub fn new(config: &ModelConfig, seed: u64, device: &Device) -> Result<Self> {
        config.check()?;
        let layers = (0..config.layers)
            .map(|index| Layer::new(config.attention_of(index), config, device))
            .collect::<Result<_>>()?;
        let decoder = Self {
            embedding: EmbeddingConfig::new(VOCABULARY, config.d_model).init(device),
            layers,
            norm: norm(config, device),
        };
        Ok(start::draw(decoder, seed))
    }

    /// What comes after each of `tokens` `[B, T]`, which are numbers below [`VOCABULARY`].
    ///
    /// # Errors
    /// [`Error::Attention`](crate::Error::Attention), for more tokens than the context among others.
    pub fn forward(&self, tokens: Tensor<2, Int>, pass: Pass) -> Result<Forward> {
        let mut hidden = self.embedding.forward(tokens);
        let mut routings = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let (attended, routing) = layer.attend(hidden, index, pass)?;
            hidden = layer.mix_channels(attended);
            routings.push(routing);
        }
        Ok(Forward { logits: self.logits(hidden), routings })
    }

    /// An empty cache of `capacity` tokens for each of `batch` sequences.
    ///
    /// # Errors
    /// As [`Attention::cache`].
    pub fn cache(&self, batch: usize, capacity: usize) -> Result<DecoderCache> {
        let cache = |layer: &Layer| layer.attention.cache(batch, capacity);
        Ok(DecoderCache { layers: self.layers.iter().map(cache).collect::<Result<_>>()? })
    }

    /// What comes after each of the next `tokens` `[B, T]` of the sequences of a cache: what [`forward`](Self::forward) says of
    /// them at the end of all tokens so far. The same `pass` in every call makes it the same pass.
    ///
    /// # Errors
    /// As [`forward`](Self::forward) and [`LayerCache::check`].
    pub fn forward_cached(
        &self,
        tokens: Tensor<2, Int>,
        cache: &mut DecoderCache,
        pass: Pass,
    ) -> Result<Forward> {
        if cache.layers.len() != self.layers.len() {
            let expected = self.layers.len().to_string();
            return Err(Error::setting("layers of the cache", cache.layers.len(), expected));
        }
        cache.check_whole()?;
        let mut hidden = self.embedding.forward(tokens);
        let mut routings = Vec::new();
        for (index, (layer, cache)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            let (attended, routing) = layer.attend_cached(hidden, index, pass, cache)?;
            hidden = layer.mix_channels(attended);
            routings.push(routing);
        }
        Ok(Forward { logits: self.logits(hidden), routings })
    }

    /// Tokens that the model sees at once.
    pub fn context(&self) -> usize {
        let tabulated = |layer: &Layer| Some(layer.attention.rope()?.freq_complex.dims()[0]);
        self.layers.iter().filter_map(tabulated).min().unwrap_or(usize::MAX)
    }

    /// Of the last layer's hidden states.
    fn logits(&self, hidden: Tensor<3>) -> Tensor<3> {
        let [batch, length, channels] = hidden.dims();
        let rows = self.norm.forward(hidden).reshape([batch * length, channels]);
        let logits = rows.matmul(self.embedding.weight.val().transpose());
        logits.cast(DType::F32).reshape([batch, length, VOCABULARY])
    }

    /// The device that the weights are on, with autodiff or without.
    pub fn device(&self) -> Device {
        self.embedding.weight.lazy_device()
    }

    /// Sets the threshold of a layer's gate; layers without one have nothing to set.
    pub(crate) fn set_threshold(&mut self, layer: usize, threshold: f64) {
        match &mut self.layers[layer].attention {
            Attention::Aha(aha) => aha.threshold = threshold as f32,
            Attention::L2a(l2a) => l2a.threshold = threshold as f32,
            Attention::AhaLinear(aha) => aha.threshold = threshold as f32,
            _ => {}
        }
    }
}

impl Layer {
    fn new(kind: &AttentionKind, config: &ModelConfig, device: &Device) -> Result<Self> {
        let &ModelConfig { d_model, feed_forward, .. } = config;
        let linear = |from, to| LinearConfig::new(from, to).with_bias(false).init(device);
        let attention_norm = match kind {
            // Attention brings its norms along.
            AttentionKind::L2a { .. } => None,
            AttentionKind::L2aLocal { window } => {
                let l2a = L2aAttentionConfig::new(d_model, config.heads, *window);
                Some(RmsNormConfig::new(d_model).with_epsilon(l2a.norm_epsilon).init(device))
            }
            _ => Some(norm(config, device)),
        };
        Ok(Self {
            attention_norm,
            attention: Attention::new(kind, config, device)?,
            feed_forward_norm: norm(config, device),
            gate: linear(d_model, feed_forward),
            up: linear(d_model, feed_forward),
            down: linear(feed_forward, d_model),
        })
    }

    /// The attention half of the layer, residual included, and what its router decided. `index` is the layer's own.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn attend(
        &self,
        hidden: Tensor<3>,
        index: usize,
        pass: Pass,
    ) -> Result<(Tensor<3>, Option<Routing>)> {
        let normed = self.normed(hidden.clone());
        let (output, routing) = match &self.attention {
            Attention::Causal(causal) => (causal.forward(normed)?, None),
            Attention::Rattention(rattention) => (rattention.forward(normed)?, None),
            Attention::Aha(aha) => split(aha.forward(normed)?),
            Attention::AhaLinear(aha) => split(aha.forward(normed)?),
            Attention::MultiWindow(multi) => split(multi.forward(normed)?),
            Attention::Qada(qada) => split(qada.forward(normed)?),
            Attention::Custom(custom) => custom.forward(normed)?,
            Attention::RandomGate(gate) => split(gate.forward(normed, gate_seed(pass, index))?),
            // Residuals are inside.
            Attention::L2a(l2a) => {
                let dense = draws(pass, Purpose::Leaks, index).unit() < pass.leak;
                let training = if dense { Training::Exact } else { Training::Sparse };
                return Ok(split(l2a.forward_with(normed, training)?));
            }
        };
        Ok((hidden + output, routing))
    }

    /// [`attend`](Self::attend) of the next tokens of the sequences of a cache.
    ///
    /// # Errors
    /// As [`Decoder::forward_cached`].
    pub fn attend_cached(
        &self,
        hidden: Tensor<3>,
        index: usize,
        pass: Pass,
        cache: &mut LayerCache,
    ) -> Result<(Tensor<3>, Option<Routing>)> {
        let normed = self.normed(hidden.clone());
        let (output, routing) = match &self.attention {
            Attention::Causal(causal) => (causal.forward_cached(normed, cache)?, None),
            Attention::Rattention(rattention) => (rattention.forward_cached(normed, cache)?, None),
            Attention::Aha(aha) => split(aha.forward_cached(normed, cache)?),
            Attention::AhaLinear(aha) => split(aha.forward_cached(normed, cache)?),
            Attention::MultiWindow(multi) => split(multi.forward_cached(normed, cache)?),
            Attention::Qada(qada) => split(qada.forward_cached(normed, cache)?),
            Attention::RandomGate(gate) => {
                split(gate.forward_cached(normed, gate_seed(pass, index), cache)?)
            }
            Attention::Custom(_) => return Err(attention::uncached()),
            // Residuals are inside.
            Attention::L2a(l2a) => return Ok(split(l2a.forward_cached(normed, cache)?)),
        };
        Ok((hidden + output, routing))
    }

    /// What attention and its router read.
    pub fn normed(&self, hidden: Tensor<3>) -> Tensor<3> {
        match &self.attention_norm {
            Some(norm) => norm.forward(hidden),
            None => hidden,
        }
    }

    /// The feed-forward half of the layer, residual included.
    pub fn mix_channels(&self, hidden: Tensor<3>) -> Tensor<3> {
        let x = self.feed_forward_norm.forward(hidden.clone());
        hidden + self.down.forward(silu(self.gate.forward(x.clone())) * self.up.forward(x))
    }
}

/// What a layer draws in a pass.
fn draws(pass: Pass, purpose: Purpose, index: usize) -> Draws {
    Draws::new(pass.seed, purpose, &[index as u64])
}

/// Where a layer's random gates are drawn from.
fn gate_seed(pass: Pass, index: usize) -> u32 {
    draws(pass, Purpose::Gates, index).bits() as u32
}

fn split(forward: bifocal_burn::AttentionOutput) -> (Tensor<3>, Option<Routing>) {
    (forward.output, Some(forward.routing))
}

fn norm(config: &ModelConfig, device: &Device) -> RmsNorm {
    RmsNormConfig::new(config.d_model).init(device)
}
