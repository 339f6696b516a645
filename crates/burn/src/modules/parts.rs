use bifocal::{Error, Result};
use burn::{
    config::Config,
    module::{Initializer, Module, Param},
    nn::{Linear, LinearConfig, RmsNorm, RmsNormConfig, RotaryEncoding, RotaryEncodingConfig},
    tensor::{Device, Tensor},
};

use crate::{
    AttentionOptions,
    place::{Origin, check_together},
};

/// Rotary positions (RoFormer, arXiv 2104.09864) of queries and keys, pairs interleaved as Burn's `RotaryEncoding`
/// has them; the first token of a forward pass has position 0.
#[derive(Config, Debug, PartialEq)]
pub struct RopeConfig {
    /// The longest sequence: how many positions are tabulated.
    pub max_seq_len: usize,
    /// The base of the frequencies.
    #[config(default = "10000.0")]
    pub theta: f32,
}

/// The projections around one attention: query `[M, H * D]`, key and value `[M, Hk * D]`, output `[H * D, M]`, and
/// optionally a root-mean-square norm of each head's query and key before rotary positions (Qwen3, arXiv
/// 2505.09388), with weights `[D]` that all heads share.
#[derive(Module, Debug)]
pub struct Projections {
    /// `[M, H * D]`, heads side by side.
    pub q_proj: Linear,
    /// `[M, Hk * D]`.
    pub k_proj: Linear,
    /// `[M, Hk * D]`.
    pub v_proj: Linear,
    /// `[H * D, M]`.
    pub o_proj: Linear,
    /// `[D]`.
    pub q_norm: Option<RmsNorm>,
    /// `[D]`.
    pub k_norm: Option<RmsNorm>,
    /// Query heads H.
    pub n_heads: usize,
    /// Key and value heads Hk.
    pub n_kv_heads: usize,
    /// Channels of a head D.
    pub head_dim: usize,
}

impl Projections {
    /// Query `[B, H, T, D]`, key and value `[B, Hk, T, D]` of hidden states `[B, T, M]`: projected, normed, rotated.
    ///
    /// # Panics
    /// When M is not the projections' or T is beyond the table of positions; the modules check both.
    pub fn project(&self, hidden: Tensor<3>, rope: Option<&RotaryEncoding>) -> [Tensor<4>; 3] {
        self.project_from(0, hidden, rope)
    }

    /// [`project`](Self::project) of tokens of which the first is at position `start` of its sequence, as
    /// [`LayerCache::check`](crate::LayerCache::check) tells it.
    ///
    /// # Panics
    /// As [`project`](Self::project), for the last position.
    pub fn project_from(
        &self,
        start: usize,
        hidden: Tensor<3>,
        rope: Option<&RotaryEncoding>,
    ) -> [Tensor<4>; 3] {
        let [query, key, value] = self.split(hidden);
        let [query, key] = self.position(start, [query, key], rope);
        [query, key, value]
    }

    /// Query, key and value as they leave their projections: neither normed nor rotated.
    pub(crate) fn split(&self, hidden: Tensor<3>) -> [Tensor<4>; 3] {
        let [batch, tokens, _] = hidden.dims();
        let split = |linear: &Linear, heads: usize| {
            let flat = linear.forward(hidden.clone());
            flat.reshape([batch, tokens, heads, self.head_dim]).swap_dims(1, 2)
        };
        [
            split(&self.q_proj, self.n_heads),
            split(&self.k_proj, self.n_kv_heads),
            split(&self.v_proj, self.n_kv_heads),
        ]
    }

    /// Query and key of [`split`](Self::split), normed and rotated, the first token to position `start`.
    pub(crate) fn position(
        &self,
        start: usize,
        [query, key]: [Tensor<4>; 2],
        rope: Option<&RotaryEncoding>,
    ) -> [Tensor<4>; 2] {
        let norm = |norm: &Option<RmsNorm>, x: Tensor<4>| match norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        // In the element type of the table of positions: half precision would round the positions themselves.
        let rotate = |x: Tensor<4>| match rope {
            Some(rope) => {
                let dtype = x.dtype();
                rope.apply(x.cast(rope.freq_complex.dtype()), start).cast(dtype)
            }
            None => x,
        };
        [rotate(norm(&self.q_norm, query)), rotate(norm(&self.k_norm, key))]
    }

    /// The output projection `[B, T, M]` of attention outputs `[B, H, T, D]`.
    ///
    /// # Panics
    /// When H * D is not the output projection's.
    pub fn output(&self, out: Tensor<4>) -> Tensor<3> {
        let [batch, heads, tokens, dim] = out.dims();
        self.o_proj.forward(out.swap_dims(1, 2).reshape([batch, tokens, heads * dim]))
    }

    /// Checks hidden states against the module that they enter at position `start`, so that Burn's operations have
    /// nothing to panic about.
    ///
    /// # Errors
    /// [`Error::DeviceMismatch`]; [`Error::Option`] for another element type than the weights';
    /// [`Error::Shape`], [`Error::EmptyDimension`]; [`Error::TooLarge`] beyond the table of rotary positions.
    pub fn check(&self, start: usize, hidden: &Tensor<3>, rope: Option<&RotaryEncoding>) -> Result<()> {
        let weight = self.q_proj.weight.val();
        check_together(&[Origin::of("the weights", &weight), Origin::of("the hidden states", hidden)])?;
        let [batch, tokens, model_dim] = hidden.dims();
        let [expected, _] = weight.dims();
        if model_dim != expected {
            let expected = format!("[B, T, {expected}]");
            return Err(Error::shape("the hidden states", expected, &hidden.dims()));
        }
        for (dimension, size) in [("batch", batch), ("tokens", tokens)] {
            if size == 0 {
                return Err(Error::EmptyDimension { dimension });
            }
        }
        match rope.map(|rope| rope.freq_complex.dims()) {
            Some([limit, ..]) if start + tokens > limit => Err(Error::TooLarge {
                what: "tokens, beyond the table of rotary positions",
                size: (start + tokens) as u128,
                limit: limit as u128,
            }),
            _ => Ok(()),
        }
    }
}

/// The part of a configuration that is about heads. Checked once, by [`Heads::new`].
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    model_dim: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    head_dim: usize,
}

impl Heads {
    pub(crate) fn new(
        model_dim: usize,
        heads: usize,
        kv_heads: Option<usize>,
        head_dim: Option<usize>,
    ) -> Result<Self> {
        let kv_heads = kv_heads.unwrap_or(heads);
        let given = head_dim.unwrap_or(1);
        for (dimension, size) in
            [("d_model", model_dim), ("n_heads", heads), ("n_kv_heads", kv_heads), ("head_dim", given)]
        {
            if size == 0 {
                return Err(Error::EmptyDimension { dimension });
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(Error::HeadRatio { heads, kv_heads });
        }
        let head_dim = match head_dim {
            Some(head_dim) => head_dim,
            None if model_dim.is_multiple_of(heads) => model_dim / heads,
            None => {
                let expected = format!("a multiple of the {heads} heads, or head_dim set");
                return Err(Error::option("d_model", model_dim, expected));
            }
        };
        Ok(Self { model_dim, heads, kv_heads, head_dim })
    }

    /// Projections with Burn's default initialisation; `norm_epsilon` asks for norms of queries and keys.
    pub(crate) fn projections(
        self,
        bias: bool,
        output_bias: bool,
        norm_epsilon: Option<f64>,
        device: &Device,
    ) -> Result<Projections> {
        let Self { model_dim, heads, kv_heads, head_dim } = self;
        let linear = |rows, columns, bias| LinearConfig::new(rows, columns).with_bias(bias).init(device);
        let norm = || norm_epsilon.map(|epsilon| rms_norm(head_dim, epsilon, device)).transpose();
        Ok(Projections {
            q_proj: linear(model_dim, heads * head_dim, bias),
            k_proj: linear(model_dim, kv_heads * head_dim, bias),
            v_proj: linear(model_dim, kv_heads * head_dim, bias),
            o_proj: linear(heads * head_dim, model_dim, output_bias),
            q_norm: norm()?,
            k_norm: norm()?,
            n_heads: heads,
            n_kv_heads: kv_heads,
            head_dim,
        })
    }

    pub(crate) fn rope(self, config: Option<&RopeConfig>, device: &Device) -> Result<Option<RotaryEncoding>> {
        let Some(config) = config else { return Ok(None) };
        if !self.head_dim.is_multiple_of(2) {
            let expected = "an even number: rotary positions turn pairs";
            return Err(Error::option("head_dim", self.head_dim, expected));
        }
        if config.max_seq_len == 0 {
            return Err(Error::EmptyDimension { dimension: "max_seq_len" });
        }
        let theta = positive("theta", config.theta.into())? as f32;
        let rope = RotaryEncodingConfig::new(config.max_seq_len, self.head_dim).with_theta(theta);
        Ok(Some(rope.init(device)))
    }

    /// The router heads asked for, or one per query head.
    pub(crate) fn router_heads(self, router_heads: Option<usize>) -> Result<usize> {
        let router_heads = router_heads.unwrap_or(self.heads);
        let choices = [1, self.kv_heads, self.heads];
        if !choices.contains(&router_heads) {
            let expected = format!("1, {} or {}", self.kv_heads, self.heads);
            return Err(Error::option("n_router_heads", router_heads, expected));
        }
        Ok(router_heads)
    }
}

pub(crate) fn rms_norm(channels: usize, epsilon: f64, device: &Device) -> Result<RmsNorm> {
    let epsilon = positive("norm_epsilon", epsilon)?;
    Ok(RmsNormConfig::new(channels).with_epsilon(epsilon).init(device))
}

/// A router with Burn's default weight and the given bias, or none.
pub(crate) fn router(model_dim: usize, columns: usize, bias: Option<Vec<f32>>, device: &Device) -> Linear {
    let router = LinearConfig::new(model_dim, columns).with_bias(false).init(device);
    let bias = bias.map(|bias| Param::from_tensor(Tensor::<1>::from_floats(bias.as_slice(), device)));
    Linear { bias, ..router }
}

/// A router that starts at zero.
pub(crate) fn zero_router(model_dim: usize, device: &Device) -> Linear {
    let config = LinearConfig::new(model_dim, 1).with_bias(false);
    config.with_initializer(Initializer::Zeros).init(device)
}

pub(crate) fn options(softcap: Option<f32>) -> Result<AttentionOptions> {
    match softcap {
        Some(cap) => {
            positive("softcap", cap.into())?;
            Ok(AttentionOptions::default().with_softcap(cap))
        }
        None => Ok(AttentionOptions::default()),
    }
}

/// Checks that a router's bias starts at a number.
pub(crate) fn finite(bias: f32) -> Result<f32> {
    match bias.is_finite() {
        true => Ok(bias),
        false => Err(Error::option("router_bias_init", bias, "a finite number")),
    }
}

/// Checks that a gate's threshold can be passed and missed.
pub(crate) fn threshold(threshold: f32) -> Result<f32> {
    match threshold > 0.0 && threshold < 1.0 {
        true => Ok(threshold),
        false => Err(Error::option("threshold", threshold, "between 0 and 1")),
    }
}

pub(crate) fn positive(option: &'static str, value: f64) -> Result<f64> {
    match value.is_finite() && value > 0.0 {
        true => Ok(value),
        false => Err(Error::option(option, value, "a finite positive number")),
    }
}
