use bifocal::{MomentGate, Result, Window};
use burn::{
    config::Config,
    module::Module,
    nn::RotaryEncoding,
    tensor::{Device, Tensor},
};

use super::{AttentionOutput, Projections, RopeConfig, parts::Heads};
use crate::{AttentionOptions, LayerCache, qada_attention};

/// Configuration of [`QadaAttention`].
///
/// ```
/// use bifocal_burn::QadaAttentionConfig;
/// use burn::tensor::{Device, Distribution, Tensor};
///
/// let device = Device::flex();
/// let attention = QadaAttentionConfig::new(64, 4, 8, 0.9).with_sinks(2).init(&device)?;
/// let hidden = Tensor::<3>::random([1, 40, 64], Distribution::Default, &device);
/// let forward = attention.forward(hidden)?;
/// assert_eq!(forward.output.dims(), [1, 40, 64]);
/// assert_eq!(forward.routing.far_share()?.len(), 4);
/// # Ok::<(), bifocal_burn::Error>(())
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct QadaAttentionConfig {
    /// Channels of the hidden states M.
    pub d_model: usize,
    /// Query heads H.
    pub n_heads: usize,
    /// How many keys a query sees near, its own included.
    pub window: usize,
    /// A row stays near iff its near keys are predicted to hold at least this share of the softmax; above 0, at most 1.
    pub tau: f32,
    /// Tokens at the start of the sequence that every query sees.
    #[config(default = 16)]
    pub sinks: u32,
    /// Key and value heads Hk, which H is a multiple of; H unless set.
    pub n_kv_heads: Option<usize>,
    /// Channels of a head D; M / H unless set.
    pub head_dim: Option<usize>,
    /// Rotary positions; none unless set.
    pub rope: Option<RopeConfig>,
    /// Whether query, key and value projections have a bias.
    #[config(default = false)]
    pub bias: bool,
    /// Whether the output projection has a bias.
    #[config(default = false)]
    pub output_bias: bool,
}

impl QadaAttentionConfig {
    /// A module with Burn's default initialisation.
    ///
    /// # Errors
    /// As [`AhaAttentionConfig::init`](crate::AhaAttentionConfig::init), and for a tau that is no share.
    pub fn init(&self, device: &Device) -> Result<QadaAttention> {
        MomentGate::new(Window::new(self.window)?, self.tau)?;
        let heads = Heads::new(self.d_model, self.n_heads, self.n_kv_heads, self.head_dim)?;
        Ok(QadaAttention {
            projections: heads.projections(self.bias, self.output_bias, None, device)?,
            rope: heads.rope(self.rope.as_ref(), device)?,
            window: self.window,
            tau: self.tau,
            sinks: self.sinks,
        })
    }
}

/// Query-adaptive attention (QAdA, arXiv 2502.09647): [`qada_attention`] between the projections of a dense layer. It has the
/// parameters of [`CausalAttention`](crate::CausalAttention) and no others, so that weights of a dense model fit it as they
/// are.
///
/// Made by [`QadaAttentionConfig`].
#[derive(Module, Debug)]
pub struct QadaAttention {
    /// Query, key, value and output projections.
    pub projections: Projections,
    /// Positions of queries and keys.
    pub rope: Option<RotaryEncoding>,
    /// How many keys a query sees near, its own included.
    pub window: usize,
    /// A row stays near iff its near keys are predicted to hold at least this share of the softmax.
    pub tau: f32,
    /// Tokens at the start of the sequence that every query sees.
    pub sinks: u32,
}

impl QadaAttention {
    /// Attends within hidden states `[B, T, M]`.
    ///
    /// # Errors
    /// As [`qada_attention`]; [`Error::TooLarge`](bifocal::Error::TooLarge) for more tokens than rotary positions are
    /// tabulated for.
    pub fn forward(&self, hidden: Tensor<3>) -> Result<AttentionOutput> {
        let rope = self.rope.as_ref();
        self.projections.check(0, &hidden, rope)?;
        let [query, key, value] = self.projections.project(hidden, rope);
        let (out, routing) = qada_attention(query, key, value, self.gate()?, &AttentionOptions::default())?;
        Ok(AttentionOutput { output: self.projections.output(out), routing })
    }

    /// An empty cache of `capacity` tokens for each of `batch` sequences.
    ///
    /// # Errors
    /// As [`LayerCache::new`].
    pub fn cache(&self, batch: usize, capacity: usize) -> Result<LayerCache> {
        LayerCache::qada(&self.projections, self.gate()?, [batch, capacity])
    }

    /// [`forward`](Self::forward) of the next tokens `[B, T, M]` of the sequences of a cache. Up to 16 are a step by the
    /// moments that the cache keeps; more run the forward pass over all keys, whose moments it takes anew.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), [`LayerCache::check`] and [`LayerCache::attend`].
    pub fn forward_cached(&self, hidden: Tensor<3>, cache: &mut LayerCache) -> Result<AttentionOutput> {
        let rope = self.rope.as_ref();
        let start = cache.check(&self.projections, &hidden, rope)?;
        let qkv = self.projections.project_from(start, hidden, rope);
        let (out, routing) = cache.attend_by_moments(&self.gate()?, qkv)?;
        Ok(AttentionOutput { output: self.projections.output(out), routing })
    }

    fn gate(&self) -> Result<MomentGate> {
        Ok(MomentGate::new(Window::new(self.window)?, self.tau)?.with_sinks(self.sinks))
    }
}
