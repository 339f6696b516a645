//! Steps that are captured in a graph and replayed.

use bifocal::{
    Element, Error, LinearChoice, Partial, Router, Tensor, capture,
    cubecl::client::Client,
    decode::{Reaches, Step},
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::SliceRandom};

use super::scene::{Scene, StepCase, Tokens, bytes_of, joined, overwrite, plan_of, reach_by, step_cases};
use crate::{
    Device, Effort,
    case::Case,
    compare::{Read, run},
    inputs::HostRoutes,
    refute,
};

/// Length of the hidden states that the router reads.
const MODEL_DIM: usize = 8;

pub(super) fn replays_equal_steps(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, step_cases(device).prop_filter("routes", StepCase::routed), |step| {
        let paged = step.page_size.unwrap_or(7);
        for page_size in [None, Some(paged)] {
            let step = StepCase { page_size, ..step.clone() };
            follows(&device.client, &step).map_err(|reason| format!("pages of {page_size:?}: {reason}"))?;
        }
        Ok(())
    })
}

/// Whether replays of a router and its step follow what is in their buffers.
fn follows(client: &Client, step: &StepCase) -> Result<(), String> {
    let (case, layout) = (&step.case, run(step.layout())?);
    let mut scene = run(Scene::new(client, step, layout))?;
    let mut rng = SmallRng::seed_from_u64(case.seed ^ 0x9e91);
    let columns = step.routing.heads.count(case) * step.reaches.len();
    let weight = run(random(client, &mut rng, [MODEL_DIM, columns]))?;
    let router = run(LinearChoice::new(weight, step.reaches.len()))?;

    // What is recorded, and has to stay as long as the graph.
    let hidden_shape = [case.batch, case.query_len, MODEL_DIM];
    let hidden = run(random(client, &mut rng, hidden_shape))?;
    let query_shape = [case.batch, case.heads(), case.query_len, case.head_dim];
    let upload = |query: &[f32]| run(Tensor::from_f32(client, query_shape, case.element, query));
    let query = upload(&scene.query)?;
    let sinks = match &scene.sinks {
        Some(sinks) => Some(run(Tensor::from_f32(client, [sinks.len()], Element::F32, sinks))?),
        None => None,
    };
    let reaches = run(Reaches::new(client, &step.reaches))?;
    let batch = run(scene.cache.batch(client, &scene.sequences))?;
    let kept = run(plan_of(client, step, layout, case.batch))?;
    let partial = run(Partial::poisoned(client, kept.problem(), case.out_element()))?;
    let outputs = [partial.out.handle(), partial.lse.handle()];
    let poison = [run(bytes_of(client, outputs[0]))?, run(bytes_of(client, outputs[1]))?];
    let (graph, decision) = {
        let view = run(scene.cache.view(&batch))?;
        run(capture(client, || {
            let decision = router.route(client, hidden.view())?;
            let mut asked = Step::new(query.view(), &reaches).with_routes(&decision.routes);
            asked.sink_logits = sinks.as_ref().map(Tensor::view);
            kept.attend(client, &view, &asked, &partial)?;
            Ok(decision)
        }))?
    };

    for turn in 0..3u64 {
        if turn > 0 {
            run(start_anew(client, case, &mut scene, turn))?;
        }
        scene.query.shuffle(&mut rng);
        let new_query = upload(&scene.query)?;
        let new_hidden = run(random(client, &mut rng, hidden_shape))?;
        for (new, old) in [(new_query.handle(), query.handle()), (new_hidden.handle(), hidden.handle())] {
            run(bytes_of(client, new).and_then(|bytes| overwrite(client, old, &bytes)))?;
        }
        for (output, bytes) in outputs.into_iter().zip(&poison) {
            run(overwrite(client, output, bytes))?;
        }

        // SAFETY: what was recorded is still there, and nobody else writes or reads it.
        let replayed = unsafe { graph.replay() };
        run(replayed.map_err(|error| Error::Runtime(error.to_string())))?;
        let replayed = run(Read::new(client, &partial))?;

        let routes = run(router.route(client, new_hidden.view()))?.routes;
        let host = HostRoutes { geometry: routes.geometry(), routes: run(routes.to_host(client))? };
        if run(decision.routes.to_host(client))? != host.routes {
            return Err(format!("turn {turn}: routes differ from those of a launched router"));
        }
        let plan = run(plan_of(client, step, layout, case.batch))?;
        if !replayed.same_bits(&run(scene.attend(client, step, &plan, Some(&routes)))?) {
            return Err(format!("turn {turn} differs from a launched step"));
        }
        let expected = scene.expected(step, reach_by(step, &host));
        expected.accepts(&replayed).map_err(|reason| format!("turn {turn}: {reason}"))?;
    }
    Ok(())
}

/// Every sequence starts anew with the tokens of the next and one more, the last sequence first: in other pages.
fn start_anew(client: &Client, case: &Case, scene: &mut Scene, turn: u64) -> bifocal::Result<()> {
    for &sequence in &scene.sequences {
        scene.cache.truncate(client, sequence, 0)?;
    }
    scene.tokens.rotate_left(1);
    for (b, &sequence) in scene.sequences.iter().enumerate().rev() {
        let more = Tokens::draw(case, 1, case.seed ^ (turn << 16) ^ b as u64);
        scene.tokens[b] = joined(&scene.tokens[b], &more);
        let [key, value] = scene.tokens[b].upload(client, case.element)?;
        scene.cache.append(client, &[sequence], key.view(), value.view())?;
    }
    Ok(())
}

fn random<const RANK: usize>(
    client: &Client,
    rng: &mut SmallRng,
    shape: [usize; RANK],
) -> bifocal::Result<Tensor<RANK>> {
    let size: usize = shape.iter().product();
    let values: Vec<f32> = (0..size).map(|_| rng.random_range(-1.7f32..1.7)).collect();
    Tensor::from_f32(client, shape, Element::F32, &values)
}
