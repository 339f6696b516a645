use bifocal::{
    Error, Full, Gradients, Inputs, MultiWindow, NonCausal, Partial, Problem, Result, Saved, Window,
    Windowed, dot_rows,
};
use burn::tensor::{Bool, DType, Tensor, ops::AttentionModuleOptions};

use crate::{
    AttentionOptions, Routing,
    autodiff::Differentiable,
    place::{Origin, Place},
    straight_through::StraightThrough,
    system::{Branch, System},
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
/// With autodiff, query, key, value and sink logits get gradients, accumulated in f32 and given in the inputs' types. The
/// output and one number per row are kept for that, never the `Tq x Tk` scores. Two runs agree bit for bit.
///
/// # Errors
/// [`Error::DeviceMismatch`](bifocal::Error::DeviceMismatch) when the tensors live on several devices;
/// [`Error::Option`](bifocal::Error::Option) for devices without Bifocal kernels, element types other than
/// f32, f16 and bf16, or several of them, several strategies of gradient checkpointing, and senseless options;
/// [`Error::Shape`](bifocal::Error::Shape) and [`Error::HeadRatio`](bifocal::Error::HeadRatio) for shapes that do not
/// fit each other; [`Error::Refused`](bifocal::Error::Refused) when the device cannot run the problem or, where a
/// gradient is asked for, its backward pass.
pub fn windowed_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    window: Window,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    dense([query, key, value], Windowed::new(window).into(), options)
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
    dense([query, key, value], Full.into(), options)
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
    let [scale, softcap] = [scale, softcap].map(|option| option.map(|x| x as f32));
    let options = AttentionOptions { scale, softcap, ..AttentionOptions::default() };
    dense([query, key, value], if is_causal { Full.into() } else { NonCausal.into() }, &options)
}

/// All-or-Here Attention (arXiv 2512.22562): each token-head's output is the window's where its route is
/// 0 and full attention's where it is 1. Nothing is computed twice.
///
/// `routing` has two reaches and shape `[B, R, Tq]` with R = 1, Hk or H: see [`linear_gate`](crate::linear_gate).
/// Token-heads without a valid route (a NaN score) become NaN. Shapes and copies as in [`windowed_attention`].
///
/// With autodiff, [`Routing::scores`] gets a gradient too, by the straight-through estimator: see
/// [`Training`](crate::Training). What each branch gives is kept for that.
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
    selected_attention(query, key, value, routing, &[Windowed::new(window).into(), Full.into()], options)
}

/// Attention in which every token-head's output is that of the one branch that its route names: AHA and its kin with
/// branches of one's own. Branch `k` serves reach `k`; its gradients are its
/// [`backward`](bifocal::AttentionOperator::backward).
///
/// Shapes and copies as in [`windowed_attention`], routes and gradients as in [`aha_attention`].
///
/// # Errors
/// As [`windowed_attention`]; [`Error::Option`](bifocal::Error::Option) unless there is one branch per reach of `routing`.
pub fn selected_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    routing: &Routing,
    branches: &[Branch],
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    routed([query, key, value], routing, branches.iter().cloned().map(Some).collect(), options)
}

/// AHA with several windows: reach `k` is the `k`-th window, the last reach full attention (the question that
/// arXiv 2512.22562 leaves open).
///
/// `routing` has one reach per window and one more, see [`linear_choice`](crate::linear_choice); windows ascend.
/// Shapes and copies as in [`windowed_attention`], gradients as in [`aha_attention`].
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
    MultiWindow::new(windows)?;
    let windows = windows.iter().map(|&window| Branch::from(Windowed::new(window)));
    let branches: Vec<Branch> = windows.chain([Full.into()]).collect();
    selected_attention(query, key, value, routing, &branches, options)
}

/// L2A's global sub-layer (arXiv 2603.17484): full attention where the route is the last reach, zero
/// elsewhere. Only routed rows are computed.
///
/// Routing as in [`aha_attention`]; the paper's is one gate per token (R = 1). Shapes and copies as in
/// [`windowed_attention`], gradients as in [`aha_attention`]; the paper trains with
/// [`Training::Sparse`](crate::Training::Sparse) except for a few dense passes.
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
    let mut branches = vec![None; routing.reaches()];
    if let Some(last) = branches.last_mut() {
        *last = Some(Full.into());
    }
    routed([query, key, value], routing, branches, options)
}

pub(crate) fn dense(
    tensors: [Tensor<4>; 3],
    branch: Branch,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    run(tensors, None, options, |_, _| Ok(System::dense(branch)))
}

pub(crate) fn routed(
    tensors: [Tensor<4>; 3],
    routing: &Routing,
    branches: Vec<Option<Branch>>,
    options: &AttentionOptions,
) -> Result<Tensor<4>> {
    run(tensors, Some(routing), options, |place, problem| {
        System::routed(place.client(), problem, &routing.decision().routes, branches)
    })
}

/// Checks the arguments, hands them to Bifocal, and its result to Burn.
fn run(
    [query, key, value]: [Tensor<4>; 3],
    routing: Option<&Routing>,
    options: &AttentionOptions,
    system: impl FnOnce(&Place, &Problem) -> Result<System>,
) -> Result<Tensor<4>> {
    let sinks = options.sink_logits.clone().map(|sinks| sinks.cast(DType::F32));
    // Scores that nothing learns from need no gradient.
    let scores = routing.and_then(Routing::tracked_scores);
    let mut origins = vec![Origin::of("query", &query), Origin::of("key", &key), Origin::of("value", &value)];
    origins.extend(sinks.iter().map(|sinks| Origin::of("the sink logits", sinks).of_any_dtype()));
    origins.extend(routing.map(|routing| Origin::on("routing", routing.device())));
    origins.extend(scores.iter().map(|scores| Origin::of("the scores", scores).of_any_dtype()));
    let place = Place::of(&origins)?;

    let imported = Imported::new(&place, [&query, &key, &value], sinks.as_ref())?;
    let inputs = imported.inputs();
    let problem = options.apply(inputs.problem()?)?;
    let system = system(&place, &problem)?;
    let tracked = [&query, &key, &value].into_iter().any(|tensor| tensor.is_tracked());
    if tracked || sinks.as_ref().is_some_and(|sinks| sinks.is_tracked()) {
        system.check_backward(place.client(), &problem)?;
    }
    let (partial, outs) = match &scores {
        Some(_) => system.attend_every(place.client(), &problem, &inputs, options.training)?,
        None => (system.attend(place.client(), &problem, &inputs)?, Vec::new()),
    };
    let out = place.export(partial.out.clone())?;
    let step = Attention { place: place.clone(), problem, system, partial };
    let out = match sinks {
        Some(sinks) => {
            let sinks = sinks.reshape([1, 1, 1, problem.heads]);
            place.record([query, key, value, sinks], out, step)?
        }
        None => place.record([query, key, value], out, step)?,
    };
    match scores {
        Some(scores) => {
            let unchanged = out.clone().inner();
            let step = StraightThrough { place: place.clone(), problem, outs };
            place.record([out, scores], unchanged, step)
        }
        None => Ok(out),
    }
}

/// The inputs of attention in Bifocal's hands.
pub(crate) struct Imported {
    query: bifocal::Tensor<4>,
    key: bifocal::Tensor<4>,
    value: bifocal::Tensor<4>,
    sinks: Option<bifocal::Tensor<1>>,
}

impl Imported {
    pub(crate) fn new(
        place: &Place,
        [query, key, value]: [&Tensor<4>; 3],
        sinks: Option<&Tensor<1>>,
    ) -> Result<Self> {
        Ok(Self {
            query: place.import("query", query.clone())?,
            key: place.import("key", key.clone())?,
            value: place.import("value", value.clone())?,
            sinks: sinks.map(|sinks| place.import("the sink logits", sinks.clone())).transpose()?,
        })
    }

    pub(crate) fn inputs(&self) -> Inputs<'_> {
        let inputs = Inputs::new(self.query.view(), self.key.view(), self.value.view());
        match &self.sinks {
            Some(sinks) => inputs.with_sink_logits(sinks.view()),
            None => inputs,
        }
    }
}

/// Softmax attention in the autodiff graph: out of query, key, value and, where there are any, sink logits
/// `[1, 1, 1, H]`.
#[derive(Clone, Debug)]
struct Attention {
    place: Place,
    problem: Problem,
    system: System,
    partial: Partial,
}

impl Differentiable for Attention {
    fn backward(self, inputs: Vec<Tensor<4>>, d_out: Tensor<4>) -> Result<Vec<Tensor<4>>> {
        let Self { place, problem, system, partial } = self;
        differentiate(&place, &problem, &partial, &inputs, d_out, |inputs, saved, gradients| {
            system.backward(place.client(), &problem, inputs, saved, gradients)
        })
    }
}

/// The gradients of query, key, value and, where there are any, sink logits `[1, 1, 1, H]`, which `backward` stores in
/// memory that is unset.
pub(crate) fn differentiate(
    place: &Place,
    problem: &Problem,
    partial: &Partial,
    inputs: &[Tensor<4>],
    d_out: Tensor<4>,
    backward: impl FnOnce(&Inputs<'_>, &Saved<'_>, &Gradients) -> Result<()>,
) -> Result<Vec<Tensor<4>>> {
    let client = place.client();
    let [query, key, value] = [&inputs[0], &inputs[1], &inputs[2]];
    let sinks = inputs.get(3).map(|sinks| sinks.clone().reshape([problem.heads]));
    let dtype = query.dtype();
    let imported = Imported::new(place, [query, key, value], sinks.as_ref())?;
    let d_out = place.import("the gradient of the output", d_out)?;

    let delta = dot_rows(client, problem, partial.out.view(), d_out.view())?;
    let saved = Saved { partial, d_out: d_out.view(), delta: delta.view() };
    let gradients = Gradients::unset(client, problem, sinks.is_some())?;
    backward(&imported.inputs(), &saved, &gradients)?;

    let Gradients { query, key, value, sink_logits, .. } = gradients;
    let mut gradients = Vec::with_capacity(inputs.len());
    for gradient in [query, key, value] {
        gradients.push(place.export_contiguous(gradient)?.cast(dtype));
    }
    if let Some(sinks) = sink_logits {
        gradients.push(place.export_contiguous(sinks)?.reshape([1, 1, 1, problem.heads]));
    }
    Ok(gradients)
}
