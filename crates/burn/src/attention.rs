use bifocal::{
    Aha, AttentionOperator, Full, Inputs, L2a, MultiWindow, Partial, Problem, Result, Rows, Window, Windowed,
    cubecl::client::Client,
};
use burn::tensor::Tensor;

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
/// contiguous; otherwise they are copied first. Flex tensors are copied to the CubeCL CPU runtime and back.
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
        Aha::new(window).attend(client, problem, inputs, &routing.decision().routes)
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
        system.attend(client, problem, inputs, &routing.decision().routes)
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
        let partial = Partial::empty(client, problem, problem.element);
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
