use bifocal::{
    Aha, AttentionOperator, Error, Full, Inputs, L2a, MultiWindow, NonCausal, Partial, Problem, Result, Rows,
    Window, Windowed, cubecl::client::Client,
};
use burn::tensor::{Bool, Tensor, ops::AttentionModuleOptions};

use crate::{
    AttentionOptions, Routing,
    place::{Origin, Place},
};

/// Softmax attention over a sliding window: key `j` is visible to the query at position `i` iff
/// `i - window < j <= i` (AHA's local branch, arXiv 2512.22562).
///
/// Query `[B, H, Tq, D]`, key `[B, Hk, Tk, D]`, value `[B, Hk, Tk, Dv]`; H is a multiple of Hk, and query head `h`
/// reads kv head `h / (H / Hk)`. Queries are the last positions when Tq differs from Tk. Gives
/// `[B, H, Tq, Dv]` on the same device, in the same element type.
///
/// Strided tensors (after `swap_dims`, `slice`, `expand`) are read in place as long as the last dimension is
/// contiguous; otherwise they are copied first. Flex tensors are copied to the CubeCL CPU runtime and back. Where the
/// query is a `[B, Tq, H, D]` tensor with its dimensions swapped, as projections leave it, so is the output: the output
/// projection's `swap_dims` and `reshape` then copy nothing either.
///
/// # Errors
/// [`Error::NoBackward`](bifocal::Error::NoBackward) for tensors with autodiff;
/// [`Error::DeviceMismatch`](bifocal::Error::DeviceMismatch) when the tensors live on several devices;
/// [`Error::Option`](bifocal::Error::Option) for devices without Bifocal kernels, element types other than
/// f32, f16 and bf16, or several of them, and senseless options;
/// [`Error::Shape`](bifocal::Error::Shape) and [`Error::HeadRatio`](bifocal::Error::HeadRatio) for shapes that do not
/// fit each other; [`Error::Refused`](bifocal::Error::Refused) when the device cannot run the problem.
pub fn windowed_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    window: Window,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    dense("windowed_attention", [query, key, value], &Windowed::new(window), options)
}

/// Causal softmax attention over every key up to the query's own (arXiv 1706.03762, section 3.2.1).
///
/// Shapes and copies as in [`windowed_attention`].
///
/// # Errors
/// As [`windowed_attention`].
pub fn full_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    dense("full_attention", [query, key, value], &Full, options)
}

/// A drop-in for [`burn::tensor::module::attention`]: the same arguments and the same numbers, computed by Bifocal.
///
/// Query `[B, H, Tq, D]`, key `[B, Hk, Tk, D]`, value `[B, Hk, Tk, Dv]`. Unlike Burn's, key and value may have fewer heads
/// than the query, and the result is a `Result`; apart from that `bifocal_burn::attention(..)?` takes the place of
/// Burn's call. Copies and the layout of the output as in [`windowed_attention`].
///
/// Nothing else is run in the place of what Bifocal cannot express: that is an error, and Burn's own function is there
/// for it.
///
/// # Errors
/// [`Error::Option`] for a mask (windows are [`windowed_attention`]) and for a bias; otherwise as
/// [`windowed_attention`].
pub fn attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    mask: Option<Tensor<4, Bool>>,
    attn_bias: Option<Tensor<4>>,
    options: AttentionModuleOptions,
) -> Result<Tensor<4>> {
    let without = |option: &'static str, dims: Option<[usize; 4]>| match dims {
        Some(dims) => {
            Err(Error::option(option, format!("a tensor {dims:?}"), "none: Burn's attention takes one"))
        }
        None => Ok(()),
    };
    without("mask", mask.map(|mask| mask.dims()))?;
    without("attn_bias", attn_bias.map(|bias| bias.dims()))?;
    let AttentionModuleOptions { scale, softcap, is_causal } = options;
    let options = AttentionOptions { scale: scale.map(|x| x as f32), softcap: softcap.map(|x| x as f32) };
    let operator: &dyn AttentionOperator = if is_causal { &Full } else { &NonCausal };
    dense("attention", [query, key, value], operator, &options)
}

/// All-or-Here Attention (arXiv 2512.22562): each token-head's output is the window's where its route is
/// 0 and full attention's where it is 1. Nothing is computed twice.
///
/// `routing` has two reaches and shape `[B, R, Tq]` with R = 1, Hk or H: see [`linear_gate`](crate::linear_gate).
/// Token-heads without a valid route (a NaN score) become NaN. Shapes and copies as in [`windowed_attention`].
///
/// # Errors
/// As [`windowed_attention`]; [`Error::Option`](bifocal::Error::Option) when `routing` has other than two reaches.
pub fn aha_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    routing: &Routing,
    window: Window,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    routed("aha_attention", [query, key, value], routing, options, |client, problem, inputs| {
        let partial = room(client, problem, inputs);
        Aha::new(window).attend_into(client, problem, inputs, &routing.decision().routes, &partial)?;
        Ok(partial)
    })
}

/// AHA with several windows: reach `k` is the `k`-th window, the last reach full attention (the question that
/// arXiv 2512.22562 leaves open).
///
/// `routing` has one reach per window and one more, see [`linear_choice`](crate::linear_choice); windows ascend.
/// Shapes and copies as in [`windowed_attention`].
///
/// # Errors
/// As [`aha_attention`]; [`Error::Option`](bifocal::Error::Option) when windows do not ascend or do not fit the
/// routing.
pub fn multi_window_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    routing: &Routing,
    windows: &[Window],
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    let system = MultiWindow::new(windows)?;
    let operation = "multi_window_attention";
    routed(operation, [query, key, value], routing, options, |client, problem, inputs| {
        let partial = room(client, problem, inputs);
        system.attend_into(client, problem, inputs, &routing.decision().routes, &partial)?;
        Ok(partial)
    })
}

/// L2A's global sub-layer (arXiv 2603.17484): full attention where the route is the last reach, zero
/// elsewhere. Only routed rows are computed.
///
/// Routing as in [`aha_attention`]; the paper's is one gate per token (R = 1). Shapes and copies as in
/// [`windowed_attention`].
///
/// # Errors
/// As [`windowed_attention`].
pub fn global_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    routing: &Routing,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    // The window belongs to the local sub-layer, which does not run here.
    let system = L2a::new(Window::new(1)?);
    routed("global_attention", [query, key, value], routing, options, |client, problem, inputs| {
        system.global(client, problem, inputs, &routing.decision().routes)
    })
}

fn dense(
    operation: &'static str,
    tensors: [Tensor<4>; 3],
    operator: &dyn AttentionOperator,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    run(operation, tensors, None, options, |client, problem, inputs| {
        let partial = room(client, problem, inputs);
        operator.attend(client, problem, inputs, Rows::All, &partial)?;
        Ok(partial)
    })
}

fn routed(
    operation: &'static str,
    tensors: [Tensor<4>; 3],
    routing: &Routing,
    options: &AttentionOptions,
    attend: impl FnOnce(&Client, &Problem, &Inputs<'_>) -> Result<Partial>,
) -> Result<Tensor<4>> {
    run(operation, tensors, Some(routing), options, attend)
}

/// Room for the result, its heads and tokens in the order that the query has them in memory.
fn room(client: &Client, problem: &Problem, inputs: &Inputs<'_>) -> Partial {
    let mut partial = Partial::empty(client, problem, problem.element);
    let [_, by_head, by_token, _] = inputs.query.strides();
    if by_head < by_token && by_head != 0 {
        let [_, heads, tokens, dim] = problem.out_shape();
        let strides = [tokens * heads * dim, dim, heads * dim, 1];
        let handle = partial.out.into_handle();
        partial.out = bifocal::Tensor::new(handle, problem.element, problem.out_shape(), strides);
    }
    partial
}

/// Checks the arguments, hands them to Bifocal, and its result to Burn.
fn run(
    operation: &'static str,
    [query, key, value]: [Tensor<4>; 3],
    routing: Option<&Routing>,
    options: &AttentionOptions,
    attend: impl FnOnce(&Client, &Problem, &Inputs<'_>) -> Result<Partial>,
) -> Result<Tensor<4>> {
    let mut origins = vec![Origin::of("query", &query), Origin::of("key", &key), Origin::of("value", &value)];
    origins.extend(routing.map(|routing| Origin::on("routing", routing.device())));
    let place = Place::of(operation, &origins)?;
    let query = place.import("query", query)?;
    let key = place.import("key", key)?;
    let value = place.import("value", value)?;
    let inputs = Inputs::new(query.view(), key.view(), value.view());
    let problem = options.apply(inputs.problem()?)?;
    let partial = attend(place.client(), &problem, &inputs)?;
    place.export(partial.out)
}
