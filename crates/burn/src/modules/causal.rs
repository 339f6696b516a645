use bifocal::{Reach, Result, Window};
use burn::{
    config::Config,
    module::Module,
    nn::RotaryEncoding,
    tensor::{Device, Tensor},
};

use super::{
    Projections, RopeConfig,
    parts::{Heads, options},
};
use crate::{LayerCache, full_attention, windowed_attention};

/// Configuration of [`CausalAttention`].
#[derive(Config, Debug, PartialEq)]
pub struct CausalAttentionConfig {
    /// Channels of the hidden states M.
    pub d_model: usize,
    /// Query heads H.
    pub n_heads: usize,
    /// How many keys a query sees, its own included; all up to its own unless set.
    pub window: Option<usize>,
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
    /// Whether each head's query and key are normed, as in Qwen3.
    #[config(default = false)]
    pub qk_norm: bool,
    /// Added to the mean squares of those norms.
    #[config(default = 1e-6)]
    pub norm_epsilon: f64,
}

impl CausalAttentionConfig {
    /// A module with Burn's default initialisation.
    ///
    /// # Errors
    /// As [`AhaAttentionConfig::init`](crate::AhaAttentionConfig::init).
    pub fn init(&self, device: &Device) -> Result<CausalAttention> {
        self.window.map(Window::new).transpose()?;
        options(self.softcap)?;
        let heads = Heads::new(self.d_model, self.n_heads, self.n_kv_heads, self.head_dim)?;
        let qk_norm = self.qk_norm.then_some(self.norm_epsilon);
        Ok(CausalAttention {
            projections: heads.projections(self.bias, self.output_bias, qk_norm, device)?,
            rope: heads.rope(self.rope.as_ref(), device)?,
            window: self.window,
            softcap: self.softcap,
        })
    }
}

/// Causal attention without a router, over a window or over everything: what routed layers stand beside in a static
/// hybrid, and what they are compared with.
///
/// Made by [`CausalAttentionConfig`].
#[derive(Module, Debug)]
pub struct CausalAttention {
    /// Query, key, value and output projections.
    pub projections: Projections,
    /// Positions of queries and keys.
    pub rope: Option<RotaryEncoding>,
    /// How many keys a query sees, its own included; all up to its own unless set.
    pub window: Option<usize>,
    /// Softcap on the attention scores.
    pub softcap: Option<f32>,
}

impl CausalAttention {
    /// Attends within hidden states `[B, T, M]`.
    ///
    /// # Errors
    /// As [`windowed_attention`]; [`Error::TooLarge`](bifocal::Error::TooLarge) for more tokens than rotary positions
    /// are tabulated for.
    pub fn forward(&self, hidden: Tensor<3>) -> Result<Tensor<3>> {
        let rope = self.rope.as_ref();
        self.projections.check(0, &hidden, rope)?;
        let [query, key, value] = self.projections.project(hidden, rope);
        let options = options(self.softcap)?;
        let out = match self.window {
            Some(window) => windowed_attention(query, key, value, Window::new(window)?, &options)?,
            None => full_attention(query, key, value, &options)?,
        };
        Ok(self.projections.output(out))
    }

    /// An empty cache of `capacity` tokens for each of `batch` sequences; with a window, a ring of its keys.
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
    pub fn forward_cached(&self, hidden: Tensor<3>, cache: &mut LayerCache) -> Result<Tensor<3>> {
        let rope = self.rope.as_ref();
        let start = cache.check(&self.projections, &hidden, rope)?;
        let qkv = self.projections.project_from(start, hidden, rope);
        let out = cache.attend(&self.reaches()?, qkv, None, &options(self.softcap)?)?;
        Ok(self.projections.output(out))
    }

    fn reaches(&self) -> Result<[Option<Reach>; 1]> {
        Ok([Some(match self.window {
            Some(window) => Reach::Window(Window::new(window)?),
            None => Reach::All,
        })])
    }
}
