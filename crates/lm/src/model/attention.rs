use bifocal::{RandomRouter, Reach, Window};
use bifocal_burn::{
    AhaAttention, AhaAttentionConfig, AhaLinearAttention, AhaLinearAttentionConfig, AttentionOptions,
    AttentionOutput, CausalAttention, CausalAttentionConfig, L2aAttention, L2aAttentionConfig, LayerCache,
    MultiWindowAttention, MultiWindowAttentionConfig, Projections, QadaAttention, QadaAttentionConfig,
    RattentionAttention, RattentionAttentionConfig, RopeConfig, Routing, aha_attention,
};
use burn::{
    module::Module,
    nn::RotaryEncoding,
    tensor::{DType, Device, Int, Tensor, TensorData},
};

use super::custom::{CustomLayer, registered};
use crate::{AttentionKind, Error, ModelConfig, Result};

/// A layer's attention.
#[derive(Module, Debug)]
// There are as many as layers; a box would be no module.
#[allow(clippy::large_enum_variant)]
pub enum Attention {
    /// Full or window, for all tokens.
    Causal(CausalAttention),
    /// Window or full, by a learned gate.
    Aha(AhaAttention),
    /// One of several windows or full, by a learned choice.
    MultiWindow(MultiWindowAttention),
    /// A window, then full for some. Norms and residuals are inside.
    L2a(L2aAttention),
    /// A window, and all else for some, by the moments of keys.
    Qada(QadaAttention),
    /// A window, and linear attention to what has left it.
    Rattention(RattentionAttention),
    /// A window, and linear attention to what has left it for some, by a learned gate.
    AhaLinear(AhaLinearAttention),
    /// Window or full, at random.
    RandomGate(RandomGate),
    /// From outside this crate.
    Custom(CustomLayer),
}

impl Attention {
    /// The projections and positions that queries, keys and values of all its branches share. L2A, whose sub-layers each have
    /// their own, and those whose far branch is linear and knows no positions have none.
    pub fn projections(&self) -> Option<(&Projections, Option<&RotaryEncoding>)> {
        Some(match self {
            Self::Causal(causal) => (&causal.projections, causal.rope.as_ref()),
            Self::Aha(aha) => (&aha.projections, aha.rope.as_ref()),
            Self::MultiWindow(multi) => (&multi.projections, multi.rope.as_ref()),
            Self::Qada(qada) => (&qada.projections, qada.rope.as_ref()),
            Self::RandomGate(gate) => (&gate.projections, gate.rope.as_ref()),
            Self::Custom(custom) => (&custom.projections, custom.rope.as_ref()),
            Self::L2a(_) | Self::Rattention(_) | Self::AhaLinear(_) => return None,
        })
    }

    /// An empty cache of `capacity` tokens for each of `batch` sequences.
    ///
    /// # Errors
    /// [`Error::Setting`] for attention from outside this crate, which has no cache; [`Error::Attention`].
    pub fn cache(&self, batch: usize, capacity: usize) -> Result<LayerCache> {
        Ok(match self {
            Self::Causal(causal) => causal.cache(batch, capacity)?,
            Self::Aha(aha) => aha.cache(batch, capacity)?,
            Self::MultiWindow(multi) => multi.cache(batch, capacity)?,
            Self::L2a(l2a) => l2a.cache(batch, capacity)?,
            Self::Qada(qada) => qada.cache(batch, capacity)?,
            Self::Rattention(rattention) => rattention.cache(batch, capacity)?,
            Self::RandomGate(gate) => gate.cache(batch, capacity)?,
            Self::AhaLinear(aha) => aha.cache(batch, capacity)?,
            Self::Custom(_) => return Err(uncached()),
        })
    }

    /// Positions of queries and keys.
    pub(super) fn rope(&self) -> Option<&RotaryEncoding> {
        match self {
            Self::L2a(l2a) => l2a.rope.as_ref(),
            Self::Rattention(rattention) => rattention.rope.as_ref(),
            Self::AhaLinear(aha) => aha.rope.as_ref(),
            other => other.projections()?.1,
        }
    }

    pub(super) fn new(kind: &AttentionKind, model: &ModelConfig, device: &Device) -> Result<Self> {
        let &ModelConfig { d_model, heads, kv_heads, context, rope_theta, router_bias, .. } = model;
        let kv_heads = Some(kv_heads);
        let rope = Some(RopeConfig::new(context).with_theta(rope_theta));
        let causal = |window| {
            let config = CausalAttentionConfig::new(d_model, heads).with_window(window);
            config.with_n_kv_heads(kv_heads).with_rope(rope.clone()).init(device)
        };
        Ok(match kind {
            AttentionKind::Full => Self::Causal(causal(None)?),
            AttentionKind::Window { window } => Self::Causal(causal(Some(*window))?),
            AttentionKind::Aha { window } => {
                let config = AhaAttentionConfig::new(d_model, heads, *window)
                    .with_n_kv_heads(kv_heads)
                    .with_rope(rope)
                    .with_router_bias_init(router_bias);
                Self::Aha(config.init(device)?)
            }
            AttentionKind::MultiWindow { windows } => {
                let config = MultiWindowAttentionConfig::new(d_model, heads, windows.clone())
                    .with_n_kv_heads(kv_heads)
                    .with_rope(rope)
                    .with_router_bias_init(router_bias);
                Self::MultiWindow(config.init(device)?)
            }
            AttentionKind::L2a { window } => {
                let config = L2aAttentionConfig::new(d_model, heads, *window);
                Self::L2a(config.with_n_kv_heads(kv_heads).with_rope(rope).init(device)?)
            }
            AttentionKind::L2aLocal { window } => {
                let config = CausalAttentionConfig::new(d_model, heads).with_window(Some(*window));
                let config = config.with_n_kv_heads(kv_heads).with_rope(rope).with_qk_norm(true);
                Self::Causal(config.init(device)?)
            }
            AttentionKind::Rattention { window } => {
                let config = RattentionAttentionConfig::new(d_model, heads, *window);
                Self::Rattention(config.with_n_kv_heads(kv_heads).with_rope(rope).init(device)?)
            }
            AttentionKind::AhaLinear { window } => {
                let config = AhaLinearAttentionConfig::new(d_model, heads, *window)
                    .with_n_kv_heads(kv_heads)
                    .with_rope(rope)
                    .with_router_bias_init(router_bias);
                Self::AhaLinear(config.init(device)?)
            }
            AttentionKind::Qada { window, tau, sinks } => {
                let config =
                    QadaAttentionConfig::new(d_model, heads, *window, *tau as f32).with_sinks(*sinks);
                Self::Qada(config.with_n_kv_heads(kv_heads).with_rope(rope).init(device)?)
            }
            AttentionKind::Custom { name } => {
                let attention = registered(name)?;
                let CausalAttention { projections, rope, .. } = causal(None)?;
                Self::Custom(CustomLayer { projections, rope, attention })
            }
            AttentionKind::RandomGate { window, far_share } => {
                // Checks the share.
                RandomRouter::gate(heads, *far_share, 0)?;
                let CausalAttention { projections, rope, .. } = causal(Some(*window))?;
                Self::RandomGate(RandomGate { projections, rope, window: *window, far_share: *far_share })
            }
        })
    }
}

/// AHA with routes drawn at random in place of its router.
#[derive(Module, Debug)]
pub struct RandomGate {
    /// Query, key, value and output projections.
    pub projections: Projections,
    /// Positions of queries and keys.
    pub rope: Option<RotaryEncoding>,
    /// How many keys the near branch sees, the query's own included.
    pub window: usize,
    /// The share of token-heads that look far.
    pub far_share: f64,
}

impl RandomGate {
    /// Attends within hidden states `[B, T, M]`; the same `seed` draws the same routes.
    ///
    /// # Errors
    /// As [`Projections::check`] and [`aha_attention`].
    pub fn forward(&self, hidden: Tensor<3>, seed: u32) -> Result<AttentionOutput> {
        let rope = self.rope.as_ref();
        self.projections.check(0, &hidden, rope)?;
        let routing = self.route(0, &hidden, seed)?;
        let [query, key, value] = self.projections.project(hidden, rope);
        let window = Window::aha(self.window)?;
        let out = aha_attention(query, key, value, &routing, window, &AttentionOptions::default())?;
        Ok(AttentionOutput { output: self.projections.output(out), routing })
    }

    /// An empty cache of `capacity` tokens for each of `batch` sequences.
    ///
    /// # Errors
    /// As [`LayerCache::new`].
    pub fn cache(&self, batch: usize, capacity: usize) -> Result<LayerCache> {
        Ok(LayerCache::new(&self.projections, &self.reaches()?, batch, capacity)?)
    }

    /// [`forward`](Self::forward) of the next tokens `[B, T, M]` of the sequences of a cache: the same `seed` draws for each
    /// position what the forward pass draws.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), [`LayerCache::check`] and [`LayerCache::attend`].
    pub fn forward_cached(
        &self,
        hidden: Tensor<3>,
        seed: u32,
        cache: &mut LayerCache,
    ) -> Result<AttentionOutput> {
        let rope = self.rope.as_ref();
        let start = cache.check(&self.projections, &hidden, rope)?;
        let routing = self.route(start, &hidden, seed)?;
        let qkv = self.projections.project_from(start, hidden, rope);
        let out = cache.attend(&self.reaches()?, qkv, Some(&routing), &AttentionOptions::default())?;
        Ok(AttentionOutput { output: self.projections.output(out), routing })
    }

    /// Routes for hidden states whose first token is at position `start`.
    fn route(&self, start: usize, hidden: &Tensor<3>, seed: u32) -> Result<Routing> {
        let [batch, tokens, _] = hidden.dims();
        let heads = self.projections.n_heads;
        let router = RandomRouter::gate(heads, self.far_share, seed)?;
        let rows = (batch * heads) as u32;
        let routes: Vec<i32> = (0..rows)
            .flat_map(|row| (start..start + tokens).map(move |token| (row, token as u32)))
            .map(|(row, token)| i32::from(router.route_of(row, token)))
            .collect();
        let routes = TensorData::new(routes, [batch, heads, tokens]);
        let device = hidden.device().inner();
        let routes = Tensor::<3, Int>::from_data(routes, (&device, DType::I32));
        Ok(Routing::from_routes(routes, 2)?)
    }

    fn reaches(&self) -> Result<[Option<Reach>; 2]> {
        Ok([Some(Reach::Window(Window::aha(self.window)?)), Some(Reach::All)])
    }
}

/// Why attention from outside this crate has no cache.
pub(super) fn uncached() -> Error {
    let expected = "a kind that says what it needs of earlier tokens";
    Error::setting("the attention of a cache", "custom", expected)
}

/// What a router decided, read back: the routes of all token-heads, each of them one of the routing's reaches.
pub(crate) fn routes(routing: &Routing) -> Result<Vec<u8>> {
    let routes = routing.to_host()?;
    let [batch, heads, tokens] = routing.shape();
    let invalid = routes.iter().filter(|&&route| usize::from(route) >= routing.reaches()).count();
    if invalid > 0 {
        let error = bifocal::Error::InvalidScores { count: invalid, total: batch * heads * tokens };
        return Err(Error::Attention(error));
    }
    Ok(routes)
}
