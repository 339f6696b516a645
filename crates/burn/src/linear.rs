//! RATTENTION's own parts: linear attention beyond a window, and the sum of two normed branches.

use bifocal::{
    Element, Error, FeatureMap, Gradients, LinearAttention, LinearInputs, NormSum, NormSumGradients, Partial,
    Plan, Problem, Result, Window, mask, norm_sum_backward,
};
use burn::tensor::{DType, Tensor};

use crate::{
    Routing,
    autodiff::Differentiable,
    place::{Origin, Place},
    system::room_like,
};

/// The epsilon of RATTENTION's norms (its code).
const EPSILON: f32 = 1e-8;

/// Linear attention to every key that has left `window` (RATTENTION, arXiv 2506.15545, equation 4), without denominator or
/// scale, by the feature map of the paper, `[softmax(x); softmax(-x)]`.
///
/// Query `[B, H, Tq, D]`, key `[B, Hk, Tk, D]`, value `[B, Hk, Tk, Dv]`, as for
/// [`windowed_attention`](crate::windowed_attention), but before rotary positions and norms. Gives `[B, H, Tq, Dv]`; rows
/// that no key has left are zero. With autodiff all three get gradients; nothing is kept for that but the inputs.
///
/// # Errors
/// As [`windowed_attention`](crate::windowed_attention).
pub fn linear_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    window: Window,
) -> Result<Tensor<4>> {
    linear_attention_with(query, key, value, window, FeatureMap::SoftmaxPair)
}

/// [`linear_attention`] by another feature map.
///
/// # Errors
/// As [`linear_attention`].
pub fn linear_attention_with(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    window: Window,
    map: FeatureMap,
) -> Result<Tensor<4>> {
    let operator = LinearAttention::beyond(window).with_feature_map(map);
    attend([query, key, value], operator, None)
}

/// [`linear_attention`] of the rows whose route is the last reach of `routing`; the others are zero, and cost nothing but
/// their share of the states.
///
/// # Errors
/// As [`linear_attention`].
pub(crate) fn linear_attention_on(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    window: Window,
    routing: &Routing,
) -> Result<Tensor<4>> {
    attend([query, key, value], LinearAttention::beyond(window), Some(routing))
}

/// What [`linear_attention_on`] gives, out of the outputs `[B, H, T, Dv]` of every row over keys of `kv_heads`.
pub(crate) fn routed_rows(
    place: &Place,
    far: Tensor<4>,
    kv_heads: usize,
    routing: &Routing,
) -> Result<Tensor<4>> {
    let client = place.client();
    let [batch, _, tokens, dim] = far.dims();
    let out = place.import("the far branch", far)?;
    let problem = Problem::new(out.shape(), [batch, kv_heads, tokens, dim], out.element())?;
    let lse = bifocal::Tensor::empty(client, problem.lse_shape(), Element::F32);
    let partial = Partial { out, lse };
    mask(client, &problem, &routing.decision().routes, routing.reaches() - 1, &partial)?;
    place.export(partial.out)
}

fn attend(
    tensors: [Tensor<4>; 3],
    operator: LinearAttention,
    routing: Option<&Routing>,
) -> Result<Tensor<4>> {
    let [query, key, value] = &tensors;
    let mut origins = vec![Origin::of("query", query), Origin::of("key", key), Origin::of("value", value)];
    origins.extend(routing.map(|routing| Origin::on("routing", routing.device())));
    let place = Place::of(&origins)?;
    let client = place.client();
    let imported = Imported::new(&place, [query, key, value])?;
    let problem = imported.inputs(None)?.attention.problem()?;
    let plan = routing.map(|routing| bifocal::plan(client, &problem, &routing.decision().routes));
    let plan = plan.transpose()?;
    let out = match &plan {
        None => room_like(client, &problem, imported.query.strides()),
        Some(_) => bifocal::Tensor::zeros(client, problem.out_shape())?,
    };
    operator.attend(client, &problem, &imported.inputs(plan.as_ref())?, &out)?;
    let out = place.export(out)?.cast(query.dtype());
    let step = Linear { place: place.clone(), problem, operator, plan };
    place.record(tensors, out, step)
}

struct Imported {
    query: bifocal::Tensor<4>,
    key: bifocal::Tensor<4>,
    value: bifocal::Tensor<4>,
}

impl Imported {
    fn new(place: &Place, [query, key, value]: [&Tensor<4>; 3]) -> Result<Self> {
        Ok(Self {
            query: place.import("query", query.clone())?,
            key: place.import("key", key.clone())?,
            value: place.import("value", value.clone())?,
        })
    }

    /// Of the rows on the plan's last reach, or of all.
    fn inputs<'a>(&'a self, plan: Option<&'a Plan>) -> Result<LinearInputs<'a>> {
        let inputs = LinearInputs::new(self.query.view(), self.key.view(), self.value.view());
        match plan {
            Some(plan) => Ok(inputs.with_rows(plan.far_rows()?)),
            None => Ok(inputs),
        }
    }
}

/// Linear attention in the autodiff graph.
#[derive(Clone, Debug)]
struct Linear {
    place: Place,
    problem: Problem,
    operator: LinearAttention,
    plan: Option<Plan>,
}

impl Differentiable for Linear {
    fn backward(self, inputs: Vec<Tensor<4>>, d_out: Tensor<4>) -> Result<Vec<Tensor<4>>> {
        let Self { place, problem, operator, plan } = self;
        let client = place.client();
        let dtype = inputs[0].dtype();
        let imported = Imported::new(&place, [&inputs[0], &inputs[1], &inputs[2]])?;
        let d_out = place.import("the gradient of the output", d_out)?;
        let gradients = Gradients::zeros(client, &problem, false)?;
        let inputs = imported.inputs(plan.as_ref())?;
        operator.backward(client, &problem, &inputs, d_out.view(), None, &gradients)?;
        let Gradients { query, key, value, .. } = gradients;
        [query, key, value]
            .into_iter()
            .map(|gradient| Ok(place.export_contiguous(gradient)?.cast(dtype)))
            .collect()
    }
}

/// `RMS(near) + RMS(far)`: two branches' outputs `[B, H, T, Dv]`, each normed over the channels of a head, times a scale
/// `[H * Dv]`, heads side by side; added (RATTENTION, arXiv 2506.15545; its code). Both have the same element type; scales may
/// have any. All four get gradients.
///
/// # Errors
/// As [`windowed_attention`](crate::windowed_attention); [`Error::Shape`] for scales of another length.
pub fn norm_sum(
    near: Tensor<4>,
    far: Tensor<4>,
    near_scale: Tensor<1>,
    far_scale: Tensor<1>,
) -> Result<Tensor<4>> {
    let [near_scale, far_scale] = [near_scale, far_scale].map(|scale| scale.cast(DType::F32));
    let place = Place::of(&[
        Origin::of("the near branch", &near),
        Origin::of("the far branch", &far),
        Origin::of("the near scale", &near_scale).of_any_dtype(),
        Origin::of("the far scale", &far_scale).of_any_dtype(),
    ])?;
    let [batch, heads, tokens, dim] = near.dims();
    for (name, scale) in [("the near scale", &near_scale), ("the far scale", &far_scale)] {
        if scale.dims() != [heads * dim] {
            return Err(Error::shape(name, format!("[{}]", heads * dim), &scale.dims()));
        }
    }
    let [near_scale, far_scale] = [near_scale, far_scale].map(|scale| scale.reshape([1, 1, heads, dim]));
    let inputs = [near, far, near_scale, far_scale];
    let normed = Normed::new(&place, &inputs)?;
    // A problem of outputs alone: as many keys as queries, and heads of their own.
    let shape = [batch, heads, tokens, dim];
    let problem = Problem::new(shape, shape, normed.near.element())?;
    let out = room_like(place.client(), &problem, normed.near.strides());
    bifocal::norm_sum(place.client(), &problem, &normed.inputs(), &out)?;
    let out = place.export(out)?;
    let step = Sum { place: place.clone(), problem };
    place.record(inputs, out, step)
}

struct Normed {
    near: bifocal::Tensor<4>,
    far: bifocal::Tensor<4>,
    near_scale: bifocal::Tensor<2>,
    far_scale: bifocal::Tensor<2>,
}

impl Normed {
    /// Of near, far, and scales `[1, 1, H, Dv]`.
    fn new(place: &Place, [near, far, near_scale, far_scale]: &[Tensor<4>; 4]) -> Result<Self> {
        let scale = |name, scale: &Tensor<4>| {
            let [_, _, heads, dim] = scale.dims();
            place.import(name, scale.clone().reshape([heads, dim]))
        };
        Ok(Self {
            near: place.import("the near branch", near.clone())?,
            far: place.import("the far branch", far.clone())?,
            near_scale: scale("the near scale", near_scale)?,
            far_scale: scale("the far scale", far_scale)?,
        })
    }

    fn inputs(&self) -> NormSum<'_> {
        NormSum {
            near: self.near.view(),
            far: self.far.view(),
            near_scale: self.near_scale.view(),
            far_scale: self.far_scale.view(),
            epsilon: EPSILON,
        }
    }
}

/// The sum of two normed branches in the autodiff graph.
#[derive(Clone, Debug)]
struct Sum {
    place: Place,
    problem: Problem,
}

impl Differentiable for Sum {
    fn backward(self, inputs: Vec<Tensor<4>>, d_out: Tensor<4>) -> Result<Vec<Tensor<4>>> {
        let Self { place, problem } = self;
        let inputs: [Tensor<4>; 4] = inputs
            .try_into()
            .map_err(|inputs: Vec<_>| Error::option("inputs of the sum", inputs.len(), "4"))?;
        let normed = Normed::new(&place, &inputs)?;
        let d_out = place.import("the gradient of the output", d_out)?;
        let NormSumGradients { near, far, near_scale, far_scale } =
            norm_sum_backward(place.client(), &problem, &normed.inputs(), d_out.view())?;
        let shape = [1, 1, problem.heads, problem.value_dim];
        Ok(vec![
            place.export_contiguous(near)?,
            place.export_contiguous(far)?,
            place.export_contiguous(near_scale)?.reshape(shape),
            place.export_contiguous(far_scale)?.reshape(shape),
        ])
    }
}
