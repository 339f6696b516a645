use bifocal::{Reach, Result, Threshold, Window};
use burn::{
    config::Config,
    module::Module,
    nn::{Linear, RmsNorm, RotaryEncoding},
    tensor::{Device, Tensor},
};

use super::{
    AttentionOutput, Projections, RopeConfig,
    parts::{Heads, options, positive, rms_norm, threshold, zero_router},
};
use crate::{GateOptions, LayerCache, Routing, Training, global_attention, linear_gate, windowed_attention};

/// Configuration of [`L2aAttention`].
#[derive(Config, Debug, PartialEq)]
pub struct L2aAttentionConfig {
    /// Channels of the hidden states M.
    pub d_model: usize,
    /// Query heads H.
    pub n_heads: usize,
    /// The local sub-layer: how many keys a query sees, its own included ([`Window::l2a`]; the paper's is 4095).
    pub window: usize,
    /// Key and value heads Hk, which H is a multiple of; H unless set.
    pub n_kv_heads: Option<usize>,
    /// Channels of a head D; M / H unless set.
    pub head_dim: Option<usize>,
    /// Rotary positions, the same for both sub-layers; none unless set.
    pub rope: Option<RopeConfig>,
    /// Softcap on the attention scores of both sub-layers; none unless set.
    pub softcap: Option<f32>,
    /// Whether query, key and value projections have a bias. The output projections have none, so that a closed gate
    /// adds nothing.
    #[config(default = false)]
    pub bias: bool,
    /// Whether each head's query and key are normed, as in Qwen3.
    #[config(default = true)]
    pub qk_norm: bool,
    /// Added to the mean squares of all norms.
    #[config(default = 1e-6)]
    pub norm_epsilon: f64,
    /// What the router's logit is divided by.
    #[config(default = 0.1)]
    pub temperature: f32,
    /// A token whose score is at least this attends globally; between 0 and 1.
    #[config(default = 0.5)]
    pub threshold: f32,
}

impl L2aAttentionConfig {
    /// A module with Burn's default initialisation, except that the router starts at zero: every token attends
    /// globally at first.
    ///
    /// # Errors
    /// As [`AhaAttentionConfig::init`](crate::AhaAttentionConfig::init).
    pub fn init(&self, device: &Device) -> Result<L2aAttention> {
        Window::l2a(self.window)?;
        options(self.softcap)?;
        positive("temperature", self.temperature.into())?;
        threshold(self.threshold)?;
        let heads = Heads::new(self.d_model, self.n_heads, self.n_kv_heads, self.head_dim)?;
        let qk_norm = self.qk_norm.then_some(self.norm_epsilon);
        let norm = || rms_norm(self.d_model, self.norm_epsilon, device);
        Ok(L2aAttention {
            local_norm: norm()?,
            local: heads.projections(self.bias, false, qk_norm, device)?,
            global_norm: norm()?,
            global: heads.projections(self.bias, false, qk_norm, device)?,
            router: zero_router(self.d_model, device),
            rope: heads.rope(self.rope.as_ref(), device)?,
            window: self.window,
            softcap: self.softcap,
            temperature: self.temperature,
            threshold: self.threshold,
        })
    }
}

/// Learning To Attend (L2A, arXiv 2603.17484): two residual attention sub-layers in series, each with its own
/// norm and projections. With hidden states `x`:
///
/// ```text
/// u1 = RMSNorm(x)     x1 = x + O_local window(u1)
/// u2 = RMSNorm(x1)    x2 = x1 + O_global (g * full(u2)),   g = sigmoid(u2 w_r / temperature) >= threshold
/// ```
///
/// The gate is one per token. Keys and values of the global sub-layer come from all tokens, also those whose gate
/// is closed. The output is `x2`: norms and residuals are inside, the feed-forward block is the model's.
///
/// Made by [`L2aAttentionConfig`].
#[derive(Module, Debug)]
pub struct L2aAttention {
    /// Before the local sub-layer.
    pub local_norm: RmsNorm,
    /// The local sub-layer's own projections.
    pub local: Projections,
    /// Before the global sub-layer and its router.
    pub global_norm: RmsNorm,
    /// The global sub-layer's own projections.
    pub global: Projections,
    /// `[M, 1]`, no bias.
    pub router: Linear,
    /// Positions of queries and keys, for both sub-layers.
    pub rope: Option<RotaryEncoding>,
    /// How many keys the local sub-layer sees, the query's own included.
    pub window: usize,
    /// Softcap on the attention scores of both sub-layers.
    pub softcap: Option<f32>,
    /// What the router's logit is divided by.
    pub temperature: f32,
    /// A token whose score is at least this attends globally.
    pub threshold: f32,
}

impl L2aAttention {
    /// Attends within hidden states `[B, T, M]`, residuals included; trains by [`Training::Sparse`].
    ///
    /// # Errors
    /// As [`windowed_attention`], [`global_attention`] and [`linear_gate`];
    /// [`Error::TooLarge`](bifocal::Error::TooLarge) for more tokens than rotary positions are tabulated for.
    pub fn forward(&self, hidden: Tensor<3>) -> Result<AttentionOutput> {
        self.forward_with(hidden, Training::Sparse)
    }

    /// [`forward`](Self::forward) with a choice of what a training step computes. The paper takes the dense pass,
    /// [`Training::Exact`], in every layer and step with probability 0.1, so that closed gates learn too. The coin is the
    /// caller's: one that is drawn from the step and the layer falls alike when a layer is computed again.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_with(&self, hidden: Tensor<3>, training: Training) -> Result<AttentionOutput> {
        let rope = self.rope.as_ref();
        self.local.check(0, &hidden, rope)?;
        let options = options(self.softcap)?.with_training(training);

        let [query, key, value] = self.local.project(self.local_norm.forward(hidden.clone()), rope);
        let near = windowed_attention(query, key, value, Window::l2a(self.window)?, &options)?;
        let hidden = hidden + self.local.output(near);

        let normed = self.global_norm.forward(hidden.clone());
        let routing = self.route(normed.clone())?;
        let [query, key, value] = self.global.project(normed, rope);
        let far = global_attention(query, key, value, &routing, &options)?;
        Ok(AttentionOutput { output: hidden + self.global.output(far), routing })
    }

    /// An empty cache of `capacity` tokens for each of `batch` sequences: a ring for the local sub-layer, and room for every
    /// token in the global one.
    ///
    /// # Errors
    /// As [`LayerCache::new`].
    pub fn cache(&self, batch: usize, capacity: usize) -> Result<LayerCache> {
        LayerCache::in_series(&self.local, [&self.local_reach()?, &GLOBAL], [batch, capacity])
    }

    /// [`forward`](Self::forward) of the next tokens `[B, T, M]` of the sequences of a cache.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), [`LayerCache::check`] and [`LayerCache::attend`].
    pub fn forward_cached(&self, hidden: Tensor<3>, cache: &mut LayerCache) -> Result<AttentionOutput> {
        let rope = self.rope.as_ref();
        let start = cache.check(&self.local, &hidden, rope)?;
        let options = options(self.softcap)?;

        let qkv = self.local.project_from(start, self.local_norm.forward(hidden.clone()), rope);
        let near = cache.attend_locally(&self.local_reach()?, qkv, &options)?;
        let hidden = hidden + self.local.output(near);

        let normed = self.global_norm.forward(hidden.clone());
        let routing = self.route(normed.clone())?;
        let qkv = self.global.project_from(start, normed, rope);
        let far = cache.attend_globally(&GLOBAL, qkv, &routing, &options)?;
        Ok(AttentionOutput { output: hidden + self.global.output(far), routing })
    }

    /// The global sub-layer's gate, out of its normed hidden states.
    fn route(&self, normed: Tensor<3>) -> Result<Routing> {
        let gate = GateOptions::l2a()
            .with_temperature(self.temperature)
            .with_threshold(Threshold::AtLeast(self.threshold));
        let (weight, bias) = (self.router.weight.val(), self.router.bias.as_ref().map(|b| b.val()));
        linear_gate(normed, weight, bias, gate)
    }

    fn local_reach(&self) -> Result<[Option<Reach>; 1]> {
        Ok([Some(Reach::Window(Window::l2a(self.window)?))])
    }
}

/// What the global sub-layer shows: nothing where the gate is closed.
const GLOBAL: [Option<Reach>; 2] = [None, Some(Reach::All)];
