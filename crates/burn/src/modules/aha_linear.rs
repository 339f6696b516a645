use bifocal::{Result, Threshold, Window};
use burn::{
    config::Config,
    module::{Module, Param},
    nn::{Linear, RotaryEncoding},
    tensor::{Device, Tensor},
};

use super::{
    AttentionOutput, Projections, RopeConfig,
    parts::{Heads, finite, options, router, threshold},
};
use crate::{
    AhaLinearInputs, GateOptions, LayerCache, Routing, Training, aha_linear_attention, linear_gate, norm_sum,
};

/// Configuration of [`AhaLinearAttention`].
#[derive(Config, Debug, PartialEq)]
pub struct AhaLinearAttentionConfig {
    /// Channels of the hidden states M.
    pub d_model: usize,
    /// Query heads H.
    pub n_heads: usize,
    /// How many keys the near branch sees, the query's own included ([`Window::aha`]).
    pub window: usize,
    /// Key and value heads Hk, which H is a multiple of; H unless set.
    pub n_kv_heads: Option<usize>,
    /// Channels of a head D; M / H unless set.
    pub head_dim: Option<usize>,
    /// Rotary positions of the near branch; none unless set.
    pub rope: Option<RopeConfig>,
    /// Softcap on the near branch's scores; none unless set.
    pub softcap: Option<f32>,
    /// Whether query, key and value projections have a bias.
    #[config(default = false)]
    pub bias: bool,
    /// Whether the output projection has a bias.
    #[config(default = false)]
    pub output_bias: bool,
    /// Router heads: 1, Hk or H; H unless set.
    pub n_router_heads: Option<usize>,
    /// What the router's bias starts from; no bias unless set.
    pub router_bias_init: Option<f32>,
    /// The linear branch joins in where a token-head's score is above this; between 0 and 1.
    #[config(default = 0.5)]
    pub threshold: f32,
}

impl AhaLinearAttentionConfig {
    /// A module with Burn's default initialisation; the scales of the norms start at 1.
    ///
    /// # Errors
    /// As [`AhaAttentionConfig::init`](crate::AhaAttentionConfig::init).
    pub fn init(&self, device: &Device) -> Result<AhaLinearAttention> {
        Window::aha(self.window)?;
        options(self.softcap)?;
        threshold(self.threshold)?;
        let heads = Heads::new(self.d_model, self.n_heads, self.n_kv_heads, self.head_dim)?;
        let router_heads = heads.router_heads(self.n_router_heads)?;
        let bias = self.router_bias_init.map(finite).transpose()?;
        let bias = bias.map(|bias| vec![bias; router_heads]);
        let projections = heads.projections(self.bias, self.output_bias, None, device)?;
        let scale = || {
            let channels = projections.n_heads * projections.head_dim;
            Param::from_tensor(Tensor::<1>::ones([channels], device))
        };
        Ok(AhaLinearAttention {
            near_scale: scale(),
            far_scale: scale(),
            router: router(self.d_model, router_heads, bias, device),
            rope: heads.rope(self.rope.as_ref(), device)?,
            window: self.window,
            softcap: self.softcap,
            threshold: self.threshold,
            projections,
        })
    }
}

/// AHA over a linear far branch, after the second question that arXiv 2512.22562 leaves open:
/// `W_O [RMS(a_window) + g RMS(a_linear)]` with `g = sigmoid(x W_r) > threshold` per token and router head. The branches and
/// their norms are those of [`RattentionAttention`](crate::RattentionAttention), the router reads the hidden states that the
/// query projection reads.
///
/// Made by [`AhaLinearAttentionConfig`].
#[derive(Module, Debug)]
pub struct AhaLinearAttention {
    /// Query, key, value and output projections.
    pub projections: Projections,
    /// `[M, R]`.
    pub router: Linear,
    /// `[H * D]`, heads side by side: the scale of the near branch's norm.
    pub near_scale: Param<Tensor<1>>,
    /// `[H * D]`: the scale of the far branch's norm.
    pub far_scale: Param<Tensor<1>>,
    /// Positions of the near branch's queries and keys; the far branch has none.
    pub rope: Option<RotaryEncoding>,
    /// How many keys the near branch sees, the query's own included.
    pub window: usize,
    /// Softcap on the near branch's scores.
    pub softcap: Option<f32>,
    /// The linear branch joins in where a token-head's score is above this.
    pub threshold: f32,
}

impl AhaLinearAttention {
    /// Attends within hidden states `[B, T, M]`; trains as AHA does ([`Training::Exact`]).
    ///
    /// # Errors
    /// As [`aha_linear_attention`] and [`linear_gate`]; [`Error::TooLarge`](bifocal::Error::TooLarge) for more tokens than
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
        let [query, key, value] = self.projections.split(hidden);
        let near = self.projections.position(0, [query.clone(), key.clone()], rope);
        let scales = [self.near_scale.val(), self.far_scale.val()];
        let inputs = AhaLinearInputs { near, far: [query, key], value, scales };
        let options = options(self.softcap)?.with_training(training);
        let out = aha_linear_attention(inputs, &routing, Window::aha(self.window)?, &options)?;
        Ok(AttentionOutput { output: self.projections.output(out), routing })
    }

    /// An empty cache for `batch` sequences, as [`RattentionAttention::cache`](crate::RattentionAttention::cache): a `capacity`
    /// beyond the window takes no more memory.
    ///
    /// # Errors
    /// As [`LayerCache::new`].
    pub fn cache(&self, batch: usize, capacity: usize) -> Result<LayerCache> {
        LayerCache::rattention(&self.projections, Window::aha(self.window)?, [batch, capacity])
    }

    /// [`forward`](Self::forward) of the next tokens `[B, T, M]` of the sequences of a cache. The state is brought up to date
    /// whatever the gates say, and a step computes the linear branch of every row.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), [`LayerCache::check`] and [`LayerCache::attend`].
    pub fn forward_cached(&self, hidden: Tensor<3>, cache: &mut LayerCache) -> Result<AttentionOutput> {
        let rope = self.rope.as_ref();
        let start = cache.check(&self.projections, &hidden, rope)?;
        let routing = self.route(hidden.clone())?;
        let [query, key, value] = self.projections.split(hidden);
        let far = [query.clone(), key.clone()];
        let [query, key] = self.projections.position(start, [query, key], rope);
        let (window, options) = (Window::aha(self.window)?, options(self.softcap)?);
        let near = [query, key, value];
        let [near, far] = cache.attend_near_and_far(window, near, far, Some(&routing), &options)?;
        let out = norm_sum(near, far, self.near_scale.val(), self.far_scale.val())?;
        Ok(AttentionOutput { output: self.projections.output(out), routing })
    }

    fn route(&self, hidden: Tensor<3>) -> Result<Routing> {
        let (weight, bias) = (self.router.weight.val(), self.router.bias.as_ref().map(|b| b.val()));
        let gate = GateOptions::aha().with_threshold(Threshold::Above(self.threshold));
        linear_gate(hidden, weight, bias, gate)
    }
}
