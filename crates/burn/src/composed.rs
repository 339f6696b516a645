//! The same semantics out of Burn's own operations: matrix products, a mask, a softmax over `[B, H, Tq, Tk]`.
//!
//! For devices that Bifocal has no kernels for, and as a yardstick. Every branch is computed for every token and all
//! scores are kept, so time and memory are those of dense attention, times the number of branches. Half precision is
//! computed in f32 and rounded at the end. Two differences remain: a NaN in a value spoils every row, also those that
//! do not see it, and routes are hard, so with autodiff no gradient reaches a router.

use bifocal::{Element, Error, INVALID_ROUTE, Problem, Result, RouteGeometry, Threshold, Window};
use burn::tensor::{
    Bool, DType, Device, Int, Tensor,
    activation::{sigmoid, softmax},
};

use crate::{
    AhaLinearInputs, AttentionOptions, GateOptions,
    place::{Origin, check_together},
};

/// [`windowed_attention`](crate::windowed_attention) by Burn's operations.
///
/// # Errors
/// [`Error::DeviceMismatch`], [`Error::Shape`], [`Error::HeadRatio`], [`Error::Option`].
pub fn windowed_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    window: Window,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    let problem = problem(&query, &key, &value, options)?;
    Ok(attend([query, key, value], &problem, options, Some(window)))
}

/// [`full_attention`](crate::full_attention) by Burn's operations.
///
/// # Errors
/// As [`windowed_attention`].
pub fn full_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    let problem = problem(&query, &key, &value, options)?;
    Ok(attend([query, key, value], &problem, options, None))
}

/// [`aha_attention`](crate::aha_attention) by Burn's operations; `routes` is `[B, R, Tq]`, 0 near and 1 far, NaN
/// outputs elsewhere.
///
/// # Errors
/// As [`windowed_attention`].
pub fn aha_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    routes: Tensor<3, Int>,
    window: Window,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    multi_window_attention(query, key, value, routes, &[window], options)
}

/// [`multi_window_attention`](crate::multi_window_attention) by Burn's operations; `routes` is `[B, R, Tq]`, one
/// number per window and one more, NaN outputs elsewhere.
///
/// # Errors
/// As [`windowed_attention`].
pub fn multi_window_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    routes: Tensor<3, Int>,
    windows: &[Window],
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    let problem = problem(&query, &key, &value, options)?;
    let routes = per_row(routes, windows.len() + 1, &problem, &query.device())?;
    let tensors = [query, key, value];
    let mut out = attend(tensors.clone(), &problem, options, None);
    for (reach, &window) in windows.iter().enumerate() {
        let branch = attend(tensors.clone(), &problem, options, Some(window));
        out = out.mask_where(routes.clone().equal_elem(reach as i64), branch);
    }
    Ok(spoil_invalid(out, routes, windows.len() + 1))
}

/// [`global_attention`](crate::global_attention) by Burn's operations; `routes` is `[B, R, Tq]`, numbers below
/// `reaches`, of which the last is full attention; NaN outputs elsewhere.
///
/// # Errors
/// As [`windowed_attention`].
pub fn global_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    routes: Tensor<3, Int>,
    reaches: usize,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    let problem = problem(&query, &key, &value, options)?;
    let routes = per_row(routes, reaches, &problem, &query.device())?;
    let out = attend([query, key, value], &problem, options, None);
    let out = out.mask_fill(routes.clone().lower_elem(reaches as i64 - 1), 0.0);
    Ok(spoil_invalid(out, routes, reaches))
}

/// [`linear_attention`](crate::linear_attention) by Burn's operations, over all pairs of a query and a key.
///
/// # Errors
/// As [`windowed_attention`].
pub fn linear_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    window: Window,
) -> Result<Tensor<4>> {
    let problem = problem(&query, &key, &value, &AttentionOptions::default())?;
    let dtype = query.dtype();
    let [query, key, value] = [query, key, value].map(|tensor| precise(tensor, dtype));
    let features = |x: Tensor<4>| Tensor::cat(vec![softmax(x.clone(), 3), softmax(x.neg(), 3)], 3);
    let key = repeat_heads(features(key), problem.group());
    let scores = features(query).matmul(key.swap_dims(2, 3));
    let near = distances(&scores, &problem, 0).lower_elem(i64::from(window.keys()));
    let scores = scores.clone().mask_fill(near.unsqueeze::<4>().expand(scores.dims()), 0.0);
    Ok(scores.matmul(repeat_heads(value, problem.group())).cast(dtype))
}

/// [`norm_sum`](crate::norm_sum) by Burn's operations.
///
/// # Errors
/// [`Error::DeviceMismatch`], [`Error::Shape`].
pub fn norm_sum(
    near: Tensor<4>,
    far: Tensor<4>,
    near_scale: Tensor<1>,
    far_scale: Tensor<1>,
) -> Result<Tensor<4>> {
    check_together(&[
        Origin::of("the near branch", &near),
        Origin::of("the far branch", &far),
        Origin::of("the near scale", &near_scale).of_any_dtype(),
        Origin::of("the far scale", &far_scale).of_any_dtype(),
    ])?;
    let (shape, dtype) = (near.dims(), near.dtype());
    let [_, heads, _, dim] = shape;
    if far.dims() != shape {
        return Err(Error::shape("the far branch", format!("{shape:?}"), &far.dims()));
    }
    let normed = |name, branch: Tensor<4>, scale: Tensor<1>| {
        if scale.dims() != [heads * dim] {
            return Err(Error::shape(name, format!("[{}]", heads * dim), &scale.dims()));
        }
        let branch = precise(branch, dtype);
        let root = (branch.clone().powi_scalar(2).mean_dim(3) + 1e-8).sqrt();
        let scale = scale.cast(branch.dtype()).reshape([1, heads, 1, dim]);
        Ok(branch / root * scale)
    };
    let near = normed("the near scale", near, near_scale)?;
    Ok((near + normed("the far scale", far, far_scale)?).cast(dtype))
}

/// [`aha_linear_attention`](crate::aha_linear_attention) by Burn's operations; `routes` is `[B, R, Tq]`, 0 near and 1 far,
/// NaN outputs elsewhere.
///
/// # Errors
/// As [`windowed_attention`] and [`norm_sum`].
pub fn aha_linear_attention(
    inputs: AhaLinearInputs,
    routes: Tensor<3, Int>,
    window: Window,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    let AhaLinearInputs { near: [near_query, near_key], far: [query, key], value, scales } = inputs;
    let [near_scale, far_scale] = scales;
    let problem = problem(&query, &key, &value, options)?;
    let routes = per_row(routes, 2, &problem, &query.device())?;
    let near = windowed_attention(near_query, near_key, value.clone(), window, options)?;
    let far = linear_attention(query, key, value, window)?;
    let far = far.mask_fill(routes.clone().not_equal_elem(1), 0.0);
    Ok(spoil_invalid(norm_sum(near, far, near_scale, far_scale)?, routes, 2))
}

/// [`linear_gate`](crate::linear_gate) by Burn's operations: scores `[B, R, 1, T]` in f32 and routes `[B, R, T]`.
///
/// # Errors
/// [`Error::DeviceMismatch`], [`Error::Shape`].
pub fn linear_gate(
    hidden: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    options: GateOptions,
) -> Result<(Tensor<4>, Tensor<3, Int>)> {
    let logits = logits(hidden, weight, bias)?.swap_dims(1, 2).div_scalar(options.temperature);
    // sigmoid(z / t) > s iff z / t > ln(s / (1 - s)); the sigmoid itself rounds.
    let cut = |score: f32| (score / (1.0 - score)).ln();
    let far = match options.threshold {
        Threshold::Above(score) => logits.clone().greater_elem(cut(score)),
        Threshold::AtLeast(score) => logits.clone().greater_equal_elem(cut(score)),
        other => return Err(Error::option("threshold", format!("{other:?}"), "above or at least")),
    };
    let invalid = logits.clone().is_nan();
    let routes = far.int().mask_fill(invalid, i64::from(INVALID_ROUTE));
    Ok((sigmoid(logits).unsqueeze_dim(2), routes))
}

/// [`linear_choice`](crate::linear_choice) by Burn's operations: scores `[B, R, K, T]` in f32 and routes `[B, R, T]`.
///
/// # Errors
/// As [`linear_gate`]; [`Error::Shape`] when the columns are not a multiple of `reaches`.
pub fn linear_choice(
    hidden: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    reaches: usize,
) -> Result<(Tensor<4>, Tensor<3, Int>)> {
    let [_, columns] = weight.dims();
    if reaches == 0 || !columns.is_multiple_of(reaches) {
        let expected = format!("[M, a multiple of {reaches}]");
        return Err(Error::shape("the router's weight", expected, &weight.dims()));
    }
    let logits = logits(hidden, weight, bias)?;
    let [batch, tokens, _] = logits.dims();
    let logits = logits.reshape([batch, tokens, columns / reaches, reaches]).permute([0, 2, 3, 1]);
    let invalid = logits.clone().is_nan().any_dim(2).squeeze_dim::<3>(2);
    let routes = logits.clone().argmax(2).squeeze_dim::<3>(2);
    Ok((softmax(logits, 2), routes.mask_fill(invalid, i64::from(INVALID_ROUTE))))
}

/// `x W + b` in f32: `[B, T, columns]`.
fn logits(hidden: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Result<Tensor<3>> {
    let mut origins = vec![
        Origin::of("the hidden states", &hidden).of_any_dtype(),
        Origin::of("the router's weight", &weight).of_any_dtype(),
    ];
    origins.extend(bias.as_ref().map(|bias| Origin::of("the router's bias", bias).of_any_dtype()));
    check_together(&origins)?;
    let [_, _, model_dim] = hidden.dims();
    let [rows, columns] = weight.dims();
    if rows != model_dim {
        let expected = format!("[{model_dim}, R]");
        return Err(Error::shape("the router's weight", expected, &weight.dims()));
    }
    let logits = hidden.cast(DType::F32).matmul(weight.cast(DType::F32).unsqueeze());
    match bias {
        None => Ok(logits),
        Some(bias) if bias.dims() == [columns] => Ok(logits + bias.cast(DType::F32).unsqueeze()),
        Some(bias) => Err(Error::shape("the router's bias", format!("[{columns}]"), &bias.dims())),
    }
}

/// Checks devices, element types and shapes. The problem's element type means nothing here.
fn problem(
    query: &Tensor<4>,
    key: &Tensor<4>,
    value: &Tensor<4>,
    options: &AttentionOptions,
) -> Result<Problem> {
    let mut origins = vec![Origin::of("query", query), Origin::of("key", key), Origin::of("value", value)];
    let sinks = options.sink_logits.as_ref();
    origins.extend(sinks.map(|sinks| Origin::of("the sink logits", sinks).of_any_dtype()));
    check_together(&origins)?;
    let [.., value_dim] = value.dims();
    let problem = Problem::new(query.dims(), key.dims(), Element::F32)?.with_value_dim(value_dim)?;
    let expected = [problem.batch, problem.kv_heads, problem.key_len, value_dim];
    if value.dims() != expected {
        return Err(Error::shape("value", format!("{expected:?}"), &value.dims()));
    }
    if let Some(sinks) = sinks
        && sinks.dims() != [problem.heads]
    {
        return Err(Error::shape("the sink logits", format!("[{}]", problem.heads), &sinks.dims()));
    }
    options.apply(problem)
}

/// Masked softmax attention over all scores.
fn attend(
    [query, key, value]: [Tensor<4>; 3],
    problem: &Problem,
    options: &AttentionOptions,
    window: Option<Window>,
) -> Tensor<4> {
    let dtype = query.dtype();
    let [query, key, value] = [query, key, value].map(|tensor| precise(tensor, dtype));
    let key = repeat_heads(key, problem.group());
    let value = repeat_heads(value, problem.group());
    // Queries before the first key see nothing: they are left out here and are zero below.
    let blind = problem.query_len.saturating_sub(problem.key_len);
    let query = query.narrow(2, blind, problem.query_len - blind);
    let mut scores = query.matmul(key.swap_dims(2, 3)).mul_scalar(problem.scale);
    if let Some(cap) = problem.softcap {
        scores = scores.div_scalar(cap).tanh().mul_scalar(cap);
    }
    let masked = hidden_keys(&scores, problem, blind, window);
    let scores = scores.mask_fill(masked, f32::NEG_INFINITY);
    let weights = match &options.sink_logits {
        None => softmax(scores, 3),
        Some(sinks) => {
            // One more key, whose value is zero.
            let [batch, heads, rows, keys] = scores.dims();
            let sinks = sinks.clone().cast(scores.dtype()).reshape([1, heads, 1, 1]);
            let sinks = sinks.expand([batch, heads, rows, 1]);
            softmax(Tensor::cat(vec![scores, sinks], 3), 3).narrow(3, 0, keys)
        }
    };
    let out = weights.matmul(value).cast(dtype);
    if blind == 0 {
        return out;
    }
    let Problem { batch, heads, value_dim, .. } = *problem;
    let zeros = Tensor::zeros([batch, heads, blind, value_dim], (&out.device(), dtype));
    Tensor::cat(vec![zeros, out], 2)
}

/// Half precision is computed in f32.
fn precise(tensor: Tensor<4>, dtype: DType) -> Tensor<4> {
    match dtype {
        DType::F64 => tensor,
        _ => tensor.cast(DType::F32),
    }
}

/// Where key `j` is not visible to the query at position `i`: `j > i`, or `j <= i - window`.
fn hidden_keys(
    scores: &Tensor<4>,
    problem: &Problem,
    blind: usize,
    window: Option<Window>,
) -> Tensor<4, Bool> {
    let distance = distances(scores, problem, blind);
    let hidden = distance.clone().lower_elem(0);
    let hidden = match window {
        Some(window) => hidden.bool_or(distance.greater_equal_elem(i64::from(window.keys()))),
        None => hidden,
    };
    hidden.unsqueeze::<4>().expand(scores.dims())
}

/// How many keys each key lies before each query, of which the first `blind` are left out: `[rows, keys]`.
fn distances(scores: &Tensor<4>, problem: &Problem, blind: usize) -> Tensor<2, Int> {
    let device = scores.device().inner();
    let key_len = problem.key_len as i64;
    let keys = Tensor::<1, Int>::arange(0..key_len, &device).unsqueeze_dim::<2>(0);
    let positions = Tensor::<1, Int>::arange(problem.position(blind)..key_len, &device);
    let positions = positions.unsqueeze_dim::<2>(1);
    let rows = problem.query_len - blind;
    let [keys, positions] = [keys, positions].map(|index| index.expand([rows, problem.key_len]));
    positions - keys
}

/// `[B, Hk, T, D]` to `[B, Hk * group, T, D]`, each head `group` times in a row.
fn repeat_heads(tensor: Tensor<4>, group: usize) -> Tensor<4> {
    let [batch, heads, tokens, dim] = tensor.dims();
    let repeated = tensor.unsqueeze_dim::<5>(2).expand([batch, heads, group, tokens, dim]);
    repeated.reshape([batch, heads * group, tokens, dim])
}

/// Routes `[B, R, Tq]` as `[B, H, Tq, Dv]`.
fn per_row(
    routes: Tensor<3, Int>,
    reaches: usize,
    problem: &Problem,
    device: &Device,
) -> Result<Tensor<4, Int>> {
    check_together(&[Origin::on("query", device), Origin::on("routes", &routes.device())])?;
    let [batch, heads, tokens] = routes.dims();
    RouteGeometry::new(batch, heads, tokens, reaches)?.check(problem)?;
    let group = problem.heads / heads;
    let routes = routes.unsqueeze_dim::<4>(2).expand([batch, heads, group, tokens]);
    let routes = routes.reshape([batch, problem.heads, tokens]);
    Ok(routes.unsqueeze_dim::<4>(3).expand(problem.out_shape()))
}

/// Rows whose route names no reach become NaN.
fn spoil_invalid(out: Tensor<4>, routes: Tensor<4, Int>, reaches: usize) -> Tensor<4> {
    let invalid = routes.clone().lower_elem(0).bool_or(routes.greater_equal_elem(reaches as i64));
    out.mask_fill(invalid, f32::NAN)
}
