use bifocal::{Error, MultiWindow, Reach, Result, Window};
use burn::{
    config::Config,
    module::Module,
    nn::{Linear, RotaryEncoding},
    tensor::{Device, Tensor},
};

use super::{
    AttentionOutput, Projections, RopeConfig,
    parts::{Heads, finite, options, router},
};
use crate::{LayerCache, Routing, Training, linear_choice, multi_window_attention};

/// Configuration of [`MultiWindowAttention`].
#[derive(Config, Debug, PartialEq)]
pub struct MultiWindowAttentionConfig {
    /// Channels of the hidden states M.
    pub d_model: usize,
    /// Query heads H.
    pub n_heads: usize,
    /// The windows to choose from, ascending, at most 31; each counts the query's own key ([`Window::aha`]). Full
    /// attention follows as the last choice.
    pub windows: Vec<usize>,
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
    /// What the router's bias towards full attention starts from (towards windows: 0); no bias unless set.
    pub router_bias_init: Option<f32>,
}

impl MultiWindowAttentionConfig {
    /// A module with Burn's default initialisation.
    ///
    /// # Errors
    /// As [`AhaAttentionConfig::init`](crate::AhaAttentionConfig::init);
    /// [`Error::Option`] for windows that do not ascend, none, or more than 31.
    pub fn init(&self, device: &Device) -> Result<MultiWindowAttention> {
        windows(&self.windows)?;
        options(self.softcap)?;
        let heads = Heads::new(self.d_model, self.n_heads, self.n_kv_heads, self.head_dim)?;
        let router_heads = heads.router_heads(self.n_router_heads)?;
        let reaches = self.windows.len() + 1;
        let bias = self.router_bias_init.map(finite).transpose()?.map(|bias| {
            let far = |column: usize| column % reaches == reaches - 1;
            (0..router_heads * reaches).map(|column| if far(column) { bias } else { 0.0 }).collect()
        });
        Ok(MultiWindowAttention {
            projections: heads.projections(self.bias, self.output_bias, None, device)?,
            router: router(self.d_model, router_heads * reaches, bias, device),
            rope: heads.rope(self.rope.as_ref(), device)?,
            windows: self.windows.clone(),
            softcap: self.softcap,
        })
    }
}

/// AHA with several windows to choose from, then full attention (the question that arXiv 2512.22562 leaves open):
/// `W_O a_k` with `k = argmax softmax(x W_r)` per token and router head.
///
/// Made by [`MultiWindowAttentionConfig`].
#[derive(Module, Debug)]
pub struct MultiWindowAttention {
    /// Query, key, value and output projections.
    pub projections: Projections,
    /// `[M, R * K]`: column `r * K + k` scores choice `k` of the K = windows + 1 for router head `r`.
    pub router: Linear,
    /// Positions of queries and keys.
    pub rope: Option<RotaryEncoding>,
    /// How many keys each near branch sees, the query's own included, ascending.
    pub windows: Vec<usize>,
    /// Softcap on the attention scores.
    pub softcap: Option<f32>,
}

impl MultiWindowAttention {
    /// Attends within hidden states `[B, T, M]`; trains by [`Training::Exact`].
    ///
    /// # Errors
    /// As [`multi_window_attention`] and [`linear_choice`]; [`Error::TooLarge`] for more tokens than rotary
    /// positions are tabulated for.
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
        let windows = windows(&self.windows)?;
        let routing = self.route(hidden.clone())?;
        let [query, key, value] = self.projections.project(hidden, rope);
        let options = options(self.softcap)?.with_training(training);
        let out = multi_window_attention(query, key, value, &routing, &windows, &options)?;
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
        linear_choice(hidden, weight, bias, self.windows.len() + 1)
    }

    fn reaches(&self) -> Result<Vec<Option<Reach>>> {
        let windows = windows(&self.windows)?.into_iter().map(Reach::Window);
        Ok(windows.chain([Reach::All]).map(Some).collect())
    }
}

fn windows(windows: &[usize]) -> Result<Vec<Window>> {
    let windows = windows.iter().map(|&window| Window::aha(window)).collect::<Result<Vec<_>>>()?;
    MultiWindow::new(&windows)?;
    if windows.len() > 31 {
        return Err(Error::option("windows", format!("{} windows", windows.len()), "at most 31"));
    }
    Ok(windows)
}
