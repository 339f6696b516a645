use bifocal::{Reach, Result, Threshold, Window};
use burn::{
    config::Config,
    module::Module,
    nn::{Linear, RotaryEncoding},
    tensor::{Device, Tensor},
};

use super::{
    AttentionOutput, Projections, RopeConfig,
    parts::{Heads, finite, options, router, threshold},
};
use crate::{GateOptions, LayerCache, Routing, Training, aha_attention, linear_gate};

/// Configuration of [`AhaAttention`].
///
/// ```
/// use bifocal_burn::{AhaAttentionConfig, RopeConfig};
/// use burn::tensor::{Device, Distribution, Tensor};
///
/// let device = Device::flex();
/// let config = AhaAttentionConfig::new(64, 4, 16)
///     .with_n_kv_heads(Some(2))
///     .with_rope(Some(RopeConfig::new(512)));
/// let attention = config.init(&device)?;
/// let hidden = Tensor::<3>::random([1, 40, 64], Distribution::Default, &device);
/// let forward = attention.forward(hidden)?;
/// assert_eq!(forward.output.dims(), [1, 40, 64]);
/// assert_eq!(forward.routing.far_share()?.len(), 4);
/// # Ok::<(), bifocal_burn::Error>(())
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct AhaAttentionConfig {
    /// Channels of the hidden states M.
    pub d_model: usize,
    /// Query heads H.
    pub n_heads: usize,
    /// The near branch: how many keys a query sees, its own included ([`Window::aha`]).
    pub window: usize,
    /// Key and value heads Hk, which H is a multiple of; H unless set.
    pub n_kv_heads: Option<usize>,
    /// Channels of a head D; M / H unless set.
    pub head_dim: Option<usize>,
    /// Rotary positions; none unless set.
    pub rope: Option<RopeConfig>,
    /// Softcap on the attention scores; none unless set.
    pub softcap: Option<f32>,
    /// Whether query, key and value projections have a bias.
    #[config(default = false)]
    pub bias: bool,
    /// Whether the output projection has a bias.
    #[config(default = false)]
    pub output_bias: bool,
    /// Router heads: 1, Hk or H; H unless set.
    pub n_router_heads: Option<usize>,
    /// What the router's bias starts from; no bias unless set, as in the AHA-OLMO2 checkpoint. AHNSA takes 4.0, so that
    /// training starts with (almost) every token looking far.
    pub router_bias_init: Option<f32>,
    /// A token-head whose score is above this looks far; between 0 and 1.
    #[config(default = 0.5)]
    pub threshold: f32,
}

impl AhaAttentionConfig {
    /// A module with Burn's default initialisation.
    ///
    /// # Errors
    /// [`Error::EmptyWindow`](bifocal::Error::EmptyWindow), [`Error::HeadRatio`](bifocal::Error::HeadRatio),
    /// [`Error::EmptyDimension`](bifocal::Error::EmptyDimension), and [`Error::Option`](bifocal::Error::Option) for an
    /// odd head dim with rotary positions, a `d_model` that the heads do not divide, and other values that make
    /// no sense.
    pub fn init(&self, device: &Device) -> Result<AhaAttention> {
        Window::aha(self.window)?;
        options(self.softcap)?;
        threshold(self.threshold)?;
        let heads = Heads::new(self.d_model, self.n_heads, self.n_kv_heads, self.head_dim)?;
        let router_heads = heads.router_heads(self.n_router_heads)?;
        let bias = self.router_bias_init.map(finite).transpose()?;
        let bias = bias.map(|bias| vec![bias; router_heads]);
        Ok(AhaAttention {
            projections: heads.projections(self.bias, self.output_bias, None, device)?,
            router: router(self.d_model, router_heads, bias, device),
            rope: heads.rope(self.rope.as_ref(), device)?,
            window: self.window,
            softcap: self.softcap,
            threshold: self.threshold,
        })
    }
}

/// All-or-Here Attention (AHA, arXiv 2512.22562):
/// `W_O [g a_full + (1 - g) a_window]` with `g = sigmoid(x W_r) > threshold` (the paper's is 0.5) per token and router
/// head. Both branches share queries, keys, values and positions; the router reads the hidden states that the query
/// projection reads.
///
/// Made by [`AhaAttentionConfig`].
#[derive(Module, Debug)]
pub struct AhaAttention {
    /// Query, key, value and output projections.
    pub projections: Projections,
    /// `[M, R]`.
    pub router: Linear,
    /// Positions of queries and keys.
    pub rope: Option<RotaryEncoding>,
    /// How many keys the near branch sees, the query's own included.
    pub window: usize,
    /// Softcap on the attention scores.
    pub softcap: Option<f32>,
    /// A token-head whose score is above this looks far.
    pub threshold: f32,
}

impl AhaAttention {
    /// Attends within hidden states `[B, T, M]`; trains as the paper does ([`Training::Exact`]).
    ///
    /// # Errors
    /// As [`aha_attention`] and [`linear_gate`]; [`Error::TooLarge`](bifocal::Error::TooLarge) for more tokens than
    /// rotary positions are tabulated for.
    pub fn forward(&self, hidden: Tensor<3>) -> Result<AttentionOutput> {
        self.forward_with(hidden, Training::Exact)
    }

    /// [`forward`](Self::forward) with a choice of what a training step computes.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_with(&self, hidden: Tensor<3>, training: Training) -> Result<AttentionOutput> {
        let rope = self.rope.as_ref();
        self.projections.check(0, &hidden, rope)?;
        let routing = self.route(hidden.clone())?;
        let [query, key, value] = self.projections.project(hidden, rope);
        let options = options(self.softcap)?.with_training(training);
        let out = aha_attention(query, key, value, &routing, Window::aha(self.window)?, &options)?;
        Ok(AttentionOutput { output: self.projections.output(out), routing })
    }

    /// An empty cache of `capacity` tokens for each of `batch` sequences.
    ///
    /// # Errors
    /// As [`LayerCache::new`].
    pub fn cache(&self, batch: usize, capacity: usize) -> Result<LayerCache> {
        LayerCache::new(&self.projections, &self.reaches()?, batch, capacity)
    }

    /// [`forward`](Self::forward) of the next tokens `[B, T, M]` of the sequences of a cache.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), [`LayerCache::check`] and [`LayerCache::attend`].
    pub fn forward_cached(&self, hidden: Tensor<3>, cache: &mut LayerCache) -> Result<AttentionOutput> {
        let rope = self.rope.as_ref();
        let start = cache.check(&self.projections, &hidden, rope)?;
        let routing = self.route(hidden.clone())?;
        let qkv = self.projections.project_from(start, hidden, rope);
        let out = cache.attend(&self.reaches()?, qkv, Some(&routing), &options(self.softcap)?)?;
        Ok(AttentionOutput { output: self.projections.output(out), routing })
    }

    fn route(&self, hidden: Tensor<3>) -> Result<Routing> {
        let (weight, bias) = (self.router.weight.val(), self.router.bias.as_ref().map(|b| b.val()));
        let gate = GateOptions::aha().with_threshold(Threshold::Above(self.threshold));
        linear_gate(hidden, weight, bias, gate)
    }

    fn reaches(&self) -> Result<[Option<Reach>; 2]> {
        Ok([Some(Reach::Window(Window::aha(self.window)?)), Some(Reach::All)])
    }
}
