use bifocal::{AttentionOperator, DeviceProfile, MomentGate, Partial, Problem, Qada, Result, Routes};
use burn::tensor::{DType, Tensor};

use crate::{
    AttentionOptions, Routing,
    attention::{Imported, differentiate},
    autodiff::Differentiable,
    place::{Origin, Place},
};

/// Query-adaptive attention (QAdA, arXiv 2502.09647): every row attends to a window and the first tokens, and to all other
/// keys where `gate` predicts from their moments that they would hold too much of its softmax. Needs no training: any dense
/// checkpoint's queries, keys and values will do.
///
/// Shapes and copies as in [`windowed_attention`](crate::windowed_attention); the output is contiguous. The routing has one
/// router head per query head, and its scores are the predicted logarithms of the masses of the keys left out.
///
/// With autodiff, query, key, value and sink logits get the gradients of the rows as they were attended to. The gate has
/// none: what it decides is taken as given.
///
/// # Errors
/// As [`windowed_attention`](crate::windowed_attention); [`Error::Option`](bifocal::Error::Option) with a softcap.
pub fn qada_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    gate: MomentGate,
    options: &AttentionOptions,
) -> Result<(Tensor<4>, Routing)> {
    let sinks = options.sink_logits.clone().map(|sinks| sinks.cast(DType::F32));
    let mut origins = vec![Origin::of("query", &query), Origin::of("key", &key), Origin::of("value", &value)];
    origins.extend(sinks.iter().map(|sinks| Origin::of("the sink logits", sinks).of_any_dtype()));
    let place = Place::of(&origins)?;
    let client = place.client();

    let imported = Imported::new(&place, [&query, &key, &value], sinks.as_ref())?;
    let inputs = imported.inputs();
    let problem = options.apply(inputs.problem()?)?;
    let lens = Qada::new(gate);
    let tracked = [&query, &key, &value].into_iter().any(|tensor| tensor.is_tracked());
    if tracked || sinks.as_ref().is_some_and(|sinks| sinks.is_tracked()) {
        let profile = DeviceProfile::of(client);
        lens.near().choose_backward(&problem, &profile)?;
        lens.far().choose_backward(&problem, &profile)?;
    }
    let (partial, decision) = lens.attend(client, &problem, &inputs, None)?;

    let out = place.export(partial.out.clone())?;
    let step = Merged { place: place.clone(), problem, lens, routes: decision.routes.clone(), partial };
    let out = match sinks {
        Some(sinks) => {
            let sinks = sinks.reshape([1, 1, 1, problem.heads]);
            place.record([query, key, value, sinks], out, step)?
        }
        None => place.record([query, key, value], out, step)?,
    };
    Ok((out, Routing::decided(place, decision)))
}

/// Near and, where routed, far, merged, in the autodiff graph: out of query, key, value and, where there are any, sink
/// logits `[1, 1, 1, H]`.
#[derive(Clone, Debug)]
struct Merged {
    place: Place,
    problem: Problem,
    lens: Qada,
    routes: Routes,
    partial: Partial,
}

impl Differentiable for Merged {
    fn backward(self, inputs: Vec<Tensor<4>>, d_out: Tensor<4>) -> Result<Vec<Tensor<4>>> {
        let Self { place, problem, lens, routes, partial } = self;
        let client = place.client();
        let plan = bifocal::plan(client, &problem, &routes)?;
        differentiate(&place, &problem, &partial, &inputs, d_out, |inputs, saved, gradients| {
            lens.backward(client, &problem, inputs, &plan, saved, gradients)
        })
    }
}
