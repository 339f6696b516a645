//! What the demo shows of a layer: shares, times, and the error against the oracle.

use std::time::Instant;

use anyhow::{Result, anyhow};
use bifocal::{Reach, Window};
use bifocal_burn::{AhaAttention, AttentionOptions, Routing, aha_attention, full_attention};
use bifocal_reference::{Array, Options, attention_where};
use burn::tensor::Tensor;
use serde::Serialize;

/// Bins along the sequence that the heat map has at most.
const BINS: usize = 128;

#[derive(Serialize)]
pub(crate) struct LayerReport {
    pub(crate) layer: usize,
    pub(crate) far_by_head: Vec<f64>,
    pub(crate) routed_ms: f64,
    pub(crate) dense_ms: f64,
    /// Largest absolute difference from the oracle in any output element.
    pub(crate) error: f64,
    /// What that difference may be: a few roundings of the largest value.
    pub(crate) tolerance: f64,
    /// Per head, the far share of each bin of tokens.
    pub(crate) far_by_bin: Vec<Vec<f64>>,
}

impl LayerReport {
    pub(crate) fn far_share(&self) -> f64 {
        self.far_by_head.iter().sum::<f64>() / self.far_by_head.len() as f64
    }
}

/// What a layer's attention gave, with all that is needed to look at it closely.
pub(crate) struct Attended {
    pub(crate) output: Tensor<3>,
    routing: Routing,
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
}

impl Attended {
    /// Of normed hidden states.
    pub(crate) fn new(aha: &AhaAttention, hidden: Tensor<3>) -> Result<Self> {
        let forward = aha.forward(hidden.clone())?;
        let [query, key, value] = aha.projections.project(hidden, aha.rope.as_ref());
        Ok(Self { output: forward.output, routing: forward.routing, query, key, value })
    }
}

pub(crate) fn layer(index: usize, aha: &AhaAttention, attended: &Attended) -> Result<LayerReport> {
    let window = Window::aha(aha.window)?;
    let options = AttentionOptions::default();
    let inputs = || (attended.query.clone(), attended.key.clone(), attended.value.clone());
    let routed = || {
        let (query, key, value) = inputs();
        aha_attention(query, key, value, &attended.routing, window, &options)
    };
    let dense = || {
        let (query, key, value) = inputs();
        full_attention(query, key, value, &options)
    };
    let (error, largest) = error(attended, &routed()?, window)?;
    let far_by_bin = far_by_bin(attended)?;
    Ok(LayerReport {
        layer: index,
        far_by_head: attended.routing.far_share()?,
        routed_ms: median_ms(routed)?,
        dense_ms: median_ms(dense)?,
        error,
        tolerance: 64.0 * f64::from(f32::EPSILON) * (1.0 + largest),
        far_by_bin,
    })
}

/// Median of five runs after one to warm up, each until the device is done. Reading the result would not do: Burn hands
/// out data that is copied when it is first looked at.
fn median_ms(run: impl Fn() -> bifocal::Result<Tensor<4>>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..6 {
        let start = Instant::now();
        let out = run()?;
        out.device().sync().map_err(|error| anyhow!("the device failed: {error:?}"))?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.remove(0);
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// The largest difference from the oracle, and the largest value.
fn error(attended: &Attended, found: &Tensor<4>, window: Window) -> Result<(f64, f64)> {
    let wide = |tensor: &Tensor<4>| -> Result<Array<f64, 4>> {
        let values = tensor.clone().into_data().try_to_vec::<f32>()?;
        Ok(Array::new(tensor.dims(), values.into_iter().map(f64::from).collect()))
    };
    let (query, key, value) = (wide(&attended.query)?, wide(&attended.key)?, wide(&attended.value)?);
    let [_, heads, tokens, head_dim] = query.shape();
    let [batch, router_heads, _] = attended.routing.shape();
    let routes = Array::new([batch, router_heads, tokens], attended.routing.to_host()?);
    let exact = attention_where(&query, &key, &value, &Options::new(head_dim), |b, h, t| {
        let far = routes[[b, h * router_heads / heads, t]] == 1;
        Some(if far { Reach::All } else { Reach::Window(window) })
    });
    let found = wide(found)?;
    let differences = exact.out.as_slice().iter().zip(found.as_slice()).map(|(x, y)| (x - y).abs());
    // NaN compares with nothing: it has to count as an infinite error, not as none.
    let worst = differences.map(|d| if d.is_nan() { f64::INFINITY } else { d }).fold(0.0, f64::max);
    let largest = value.as_slice().iter().fold(0.0f64, |top, x| top.max(x.abs()));
    Ok((worst, largest))
}

/// Per head, the far share of up to [`BINS`] bins of tokens.
fn far_by_bin(attended: &Attended) -> Result<Vec<Vec<f64>>> {
    let [_, _, tokens] = attended.routing.shape();
    let width = tokens.div_ceil(BINS);
    let share = |bin: &[u8]| bin.iter().map(|&route| f64::from(route)).sum::<f64>() / bin.len() as f64;
    Ok(attended
        .routing
        .to_host()?
        .chunks(tokens)
        .map(|head| head.chunks(width).map(share).collect())
        .collect())
}
