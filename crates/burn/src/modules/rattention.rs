use bifocal::{Result, Window};
use burn::{
    config::Config,
    module::{Module, Param},
    nn::RotaryEncoding,
    tensor::{Device, Tensor},
};

use super::{
    Projections, RopeConfig,
    parts::{Heads, options},
};
use crate::{LayerCache, linear_attention, norm_sum, windowed_attention};

/// Configuration of [`RattentionAttention`].
#[derive(Config, Debug, PartialEq)]
pub struct RattentionAttentionConfig {
    /// Channels of the hidden states M.
    pub d_model: usize,
    /// Query heads H.
    pub n_heads: usize,
    /// How many keys the near branch sees, the query's own included: the paper's w and one more
    /// ([`Window::rattention`]).
    pub window: usize,
    /// Key and value heads Hk, which H is a multiple of; H unless set.
    pub n_kv_heads: Option<usize>,
    /// Channels of a head D; M / H unless set.
    pub head_dim: Option<usize>,
    /// Rotary positions of the near branch; none unless set.
    pub rope: Option<RopeConfig>,
    /// Softcap on the near branch's scores; none unless set.
    pub softcap: Option<f32>,
    /// The epsilon of norms of the near branch's queries and keys; no norms unless set.
    pub qk_norm_epsilon: Option<f64>,
    /// Whether query, key and value projections have a bias.
    #[config(default = false)]
    pub bias: bool,
    /// Whether the output projection has a bias.
    #[config(default = false)]
    pub output_bias: bool,
}

impl RattentionAttentionConfig {
    /// A module with Burn's default initialisation; the scales of the norms start at 1.
    ///
    /// # Errors
    /// As [`AhaAttentionConfig::init`](crate::AhaAttentionConfig::init).
    pub fn init(&self, device: &Device) -> Result<RattentionAttention> {
        Window::new(self.window)?;
        options(self.softcap)?;
        let heads = Heads::new(self.d_model, self.n_heads, self.n_kv_heads, self.head_dim)?;
        let projections = heads.projections(self.bias, self.output_bias, self.qk_norm_epsilon, device)?;
        let scale = || {
            let channels = projections.n_heads * projections.head_dim;
            Param::from_tensor(Tensor::<1>::ones([channels], device))
        };
        Ok(RattentionAttention {
            near_scale: scale(),
            far_scale: scale(),
            rope: heads.rope(self.rope.as_ref(), device)?,
            window: self.window,
            softcap: self.softcap,
            projections,
        })
    }
}

/// RATTENTION (arXiv 2506.15545): softmax attention over a window, linear attention to every key that has left it, from the
/// same projections, and the sum of the two after a norm of each. No router, and no parameters but the norms' scales.
///
/// Made by [`RattentionAttentionConfig`].
#[derive(Module, Debug)]
pub struct RattentionAttention {
    /// Query, key, value and output projections.
    pub projections: Projections,
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
}

impl RattentionAttention {
    /// Attends within hidden states `[B, T, M]`.
    ///
    /// # Errors
    /// As [`windowed_attention`], [`linear_attention`] and [`norm_sum`]; [`Error::TooLarge`](bifocal::Error::TooLarge) for
    /// more tokens than rotary positions are tabulated for.
    pub fn forward(&self, hidden: Tensor<3>) -> Result<Tensor<3>> {
        let rope = self.rope.as_ref();
        self.projections.check(0, &hidden, rope)?;
        let window = Window::new(self.window)?;
        let [query, key, value] = self.projections.split(hidden);
        let [near_query, near_key] = self.projections.position(0, [query.clone(), key.clone()], rope);
        let options = options(self.softcap)?;
        let near = windowed_attention(near_query, near_key, value.clone(), window, &options)?;
        let far = linear_attention(query, key, value, window)?;
        let out = norm_sum(near, far, self.near_scale.val(), self.far_scale.val())?;
        Ok(self.projections.output(out))
    }

    /// An empty cache for `batch` sequences: a ring of the window's keys, and the far branch's state. A `capacity` beyond the
    /// window takes no more memory.
    ///
    /// # Errors
    /// As [`LayerCache::new`].
    pub fn cache(&self, batch: usize, capacity: usize) -> Result<LayerCache> {
        LayerCache::rattention(&self.projections, Window::new(self.window)?, [batch, capacity])
    }

    /// [`forward`](Self::forward) of the next tokens `[B, T, M]` of the sequences of a cache.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), [`LayerCache::check`] and [`LayerCache::attend`].
    pub fn forward_cached(&self, hidden: Tensor<3>, cache: &mut LayerCache) -> Result<Tensor<3>> {
        let rope = self.rope.as_ref();
        let start = cache.check(&self.projections, &hidden, rope)?;
        let [query, key, value] = self.projections.split(hidden);
        let far = [query.clone(), key.clone()];
        let [query, key] = self.projections.position(start, [query, key], rope);
        let window = Window::new(self.window)?;
        let [near, far] =
            cache.attend_near_and_far(window, [query, key, value], far, None, &options(self.softcap)?)?;
        let out = norm_sum(near, far, self.near_scale.val(), self.far_scale.val())?;
        Ok(self.projections.output(out))
    }
}
