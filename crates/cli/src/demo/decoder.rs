//! A small decoder's trunk: embeddings, AHA layers, gated feed-forward.

use anyhow::Result;
use bifocal_burn::{AhaAttention, AhaAttentionConfig, RopeConfig, Routing};
use burn::{
    nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig},
    tensor::{Device, Int, Tensor, activation::silu},
};

/// The decoder's sizes.
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) window: usize,
    tokens: usize,
}

impl Shape {
    /// Eight heads of 64 over four kv heads: enough for routes to differ, small enough for two cores.
    pub(crate) fn small(window: usize, tokens: usize, layers: usize) -> Self {
        Self { layers, heads: 8, kv_heads: 4, head_dim: 64, window, tokens }
    }

    fn d_model(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// Embeddings and layers.
pub(crate) struct Decoder {
    embedding: Embedding,
    pub(crate) layers: Vec<Layer>,
}

/// One layer: `x + attention(norm(x))`, then `x + feed_forward(norm(x))` with SwiGLU (arXiv 2002.05202).
pub(crate) struct Layer {
    attention_norm: RmsNorm,
    pub(crate) attention: AhaAttention,
    feed_forward_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// What a layer's attention gave, with all that is needed to look at it closely.
pub(crate) struct Attended {
    pub(crate) output: Tensor<3>,
    pub(crate) routing: Routing,
    pub(crate) query: Tensor<4>,
    pub(crate) key: Tensor<4>,
    pub(crate) value: Tensor<4>,
}

impl Decoder {
    pub(crate) fn new(shape: &Shape, device: &Device) -> Result<Self> {
        let d_model = shape.d_model();
        let norm = || RmsNormConfig::new(d_model).init(device);
        let linear = |from, to| LinearConfig::new(from, to).with_bias(false).init(device);
        let layers = (0..shape.layers)
            .map(|index| {
                let config = AhaAttentionConfig::new(d_model, shape.heads, shape.window)
                    .with_n_kv_heads(Some(shape.kv_heads))
                    .with_rope(Some(RopeConfig::new(shape.tokens)))
                    // Later layers look far less often, so that the picture shows more than one share.
                    .with_router_bias_init(Some(-0.4 - 0.3 * index as f32));
                Ok(Layer {
                    attention_norm: norm(),
                    attention: config.init(device)?,
                    feed_forward_norm: norm(),
                    gate: linear(d_model, 2 * d_model),
                    up: linear(d_model, 2 * d_model),
                    down: linear(2 * d_model, d_model),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { embedding: EmbeddingConfig::new(256, d_model).init(device), layers })
    }

    pub(crate) fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        self.embedding.forward(tokens)
    }
}

impl Layer {
    /// Attention of the normed hidden states.
    pub(crate) fn attend(&self, hidden: Tensor<3>) -> Result<Attended> {
        let hidden = self.attention_norm.forward(hidden);
        let forward = self.attention.forward(hidden.clone())?;
        let [query, key, value] = self.attention.projections.project(hidden, self.attention.rope.as_ref());
        Ok(Attended { output: forward.output, routing: forward.routing, query, key, value })
    }

    /// The feed-forward half of the layer, residual included.
    pub(crate) fn mix_channels(&self, hidden: Tensor<3>) -> Tensor<3> {
        let x = self.feed_forward_norm.forward(hidden.clone());
        hidden + self.down.forward(silu(self.gate.forward(x.clone())) * self.up.forward(x))
    }
}
