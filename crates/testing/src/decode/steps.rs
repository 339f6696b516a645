//! What decode steps satisfy.

use bifocal::{
    INVALID_ROUTE, Partial, Reach, RouteGeometry, Routes, Routine, Rows, Tensor, Window, decode::Layout,
};
use proptest::{prelude::*, sample::select};

use super::scene::{Scene, StepCase, Tokens, joined, overwrite, plan_of, reach_by, routes_of, step_cases};
use crate::{
    Device, Effort,
    attention::operator,
    case::{Case, causal_reaches},
    compare::{Read, agree, run},
    inputs::Data,
    refute,
};

pub(super) fn decode_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    refute(effort, step_cases(device), |step| {
        let layout = run(step.layout())?;
        let scene = run(Scene::new(client, &step, layout))?;
        let plan = run(plan_of(client, &step, layout, step.case.batch))?;
        let routes = routes_of(&step, 0);
        let uploaded = run(routes.upload(client))?;
        let given = step.routed().then_some(&uploaded);
        let read = run(scene.attend(client, &step, &plan, given))?;
        scene.expected(&step, reach_by(&step, &routes)).accepts(&read)
    })
}

pub(super) fn decode_is_the_end_of_prefill(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    let strategy = (step_cases(device), causal_reaches(), 1..150usize);
    refute(effort, strategy, |(step, reach, length)| {
        // All sequences of one length, so that prefill takes them as one batch.
        let lengths = vec![length; step.lengths.len()];
        let case = Case { key_len: length, sink_logits: false, ..step.case.clone() };
        let step = StepCase { case, lengths, reaches: vec![Some(reach)], ..step };
        let (case, layout) = (&step.case, run(step.layout())?);
        let scene = run(Scene::new(client, &step, layout))?;
        let read = {
            let plan = run(plan_of(client, &step, layout, case.batch))?;
            run(scene.attend(client, &step, &plan, None))?
        };
        let expected = scene.expected(&step, |_, _, _| Some(reach));
        expected.accepts(&read)?;

        // What prefill reads is what the cache gives back.
        for (b, &sequence) in scene.sequences.iter().enumerate() {
            let (key, value) = run(scene.cache.gather(client, sequence))?;
            let shape = [1, case.heads(), case.query_len, case.head_dim];
            let rows = case.heads() * case.query_len;
            let query = &scene.query[b * rows * case.head_dim..][..rows * case.head_dim];
            let query = run(Tensor::from_f32(client, shape, case.element, query))?;
            let inputs = bifocal::Inputs::new(query.view(), key.view(), value.view());
            // The routine that rounds as the oracle does.
            let mut problem = case.problem().with_routine(Routine::Portable);
            problem.batch = 1;
            let partial = run(Partial::poisoned(client, &problem, case.out_element()))?;
            run(operator(reach).attend(client, &problem, &inputs, Rows::All, &partial))?;
            let prefill = run(Read::new(client, &partial))?;
            let last = Read {
                out: read.out[b * rows * case.value_dim..][..rows * case.value_dim].to_vec(),
                lse: read.lse[b * rows..][..rows].to_vec(),
            };
            agree(&prefill, &last, 2.0 * expected.tolerance())?;
        }
        Ok(())
    })
}

pub(super) fn layouts_agree_bit_for_bit(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    let strategy = (step_cases(device), select(vec![1, 3, 16, 100, 256]), 1..30usize, 0..4u32);
    refute(effort, strategy, |(step, page_size, window, sinks)| {
        let routes = routes_of(&step, 0);
        let uploaded = run(routes.upload(client))?;
        let attend = |step: &StepCase, layout: Layout| -> bifocal::Result<Read> {
            let scene = Scene::new(client, step, layout)?;
            // The same chunks in each, whatever a layout keeps.
            let step = StepCase { chunk: Some(step.chunk.unwrap_or(64)), ..step.clone() };
            let plan = plan_of(client, &step, layout, step.case.batch)?;
            scene.attend(client, &step, &plan, step.routed().then_some(&uploaded))
        };
        let contiguous = run(StepCase { page_size: None, ..step.clone() }.layout())?;
        let paged = run(StepCase { page_size: Some(page_size), ..step.clone() }.layout())?;
        let whole = run(attend(&step, contiguous))?;
        if !run(attend(&step, paged))?.same_bits(&whole) {
            return Err(format!("pages of {page_size} differ from a contiguous cache"));
        }

        let window = run(Window::new(window))?;
        let near = [Some(Reach::Window(window)), Some(Reach::SinksAndWindow { sinks, window })];
        let reaches = step.reaches.iter().zip(near.into_iter().cycle()).map(|(_, near)| near).collect();
        let step = StepCase { reaches, ..step };
        let slack = step.case.query_len - 1;
        let ring = run(Layout::ring(step.lengths.len(), window, slack, page_size.min(32))
            .and_then(|ring| ring.with_sinks(sinks as usize)))?;
        let whole = run(attend(&step, contiguous))?;
        match run(attend(&step, ring))?.same_bits(&whole) {
            true => Ok(()),
            false => Err("a ring differs from a contiguous cache".into()),
        }
    })
}

pub(super) fn neighbours_do_not_matter(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    refute(effort, step_cases(device), |step| {
        let step = StepCase { chunk: Some(step.chunk.unwrap_or(64)), ..step };
        let (case, layout) = (&step.case, run(step.layout())?);
        let scene = run(Scene::new(client, &step, layout))?;
        let routes = routes_of(&step, 0);
        let uploaded = run(routes.upload(client))?;
        let plan = run(plan_of(client, &step, layout, case.batch))?;
        let together = run(scene.attend(client, &step, &plan, step.routed().then_some(&uploaded)))?;
        let alone = run(plan_of(client, &step, layout, 1))?;
        for b in 0..case.batch {
            let part = |values: &[f32]| {
                let size = values.len() / case.batch;
                values[b * size..][..size].to_vec()
            };
            let geometry =
                run(RouteGeometry::new(1, routes.geometry.heads, case.query_len, step.reaches.len()))?;
            let size = geometry.len();
            let own = run(Routes::from_host(client, geometry, &routes.routes[b * size..][..size]))?;
            let given = step.routed().then_some(&own);
            let sequence = &scene.sequences[b..=b];
            let read = run(scene.attend_some(client, &step, &alone, given, sequence, &part(&scene.query)))?;
            if !read.same_bits(&Read { out: part(&together.out), lse: part(&together.lse) }) {
                return Err(format!("sequence {b} of {} differs alone", case.batch));
            }
        }
        Ok(())
    })
}

pub(super) fn gates_flip_between_steps(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    refute(effort, step_cases(device).prop_filter("routes", StepCase::routed), |step| {
        let (case, layout) = (&step.case, run(step.layout())?);
        let mut scene = run(Scene::new(client, &step, layout))?;
        let plan = run(plan_of(client, &step, layout, case.batch))?;
        let first = routes_of(&step, 0);
        let uploaded = run(first.upload(client))?;
        for turn in 0..3u64 {
            let routes = routes_of(&step, turn);
            // Into the buffer that the first step read, as a captured graph would find it.
            run(overwrite(client, uploaded.handle(), &routes.padded()))?;
            let read = run(scene.attend(client, &step, &plan, Some(&uploaded)))?;
            let expected = scene.expected(&step, reach_by(&step, &routes));
            expected.accepts(&read).map_err(|reason| format!("turn {turn}: {reason}"))?;
            for (b, &sequence) in scene.sequences.iter().enumerate() {
                let more = Tokens::draw(case, 1, case.seed ^ (turn << 16) ^ b as u64);
                let [key, value] = run(more.upload(client, case.element))?;
                run(scene.cache.append(client, &[sequence], key.view(), value.view()))?;
                scene.tokens[b] = joined(&scene.tokens[b], &more);
            }
        }
        Ok(())
    })
}

pub(super) fn decode_never_sees_what_it_should_not(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    let strategy = (step_cases(device), any::<prop::sample::Index>(), any::<bool>());
    refute(effort, strategy, |(step, at, in_key)| {
        let (case, layout) = (&step.case, run(step.layout())?);
        let clean: Vec<Tokens> =
            step.lengths.iter().map(|&length| Tokens::draw(case, length, case.seed)).collect();
        let mut tokens = clean.clone();
        for (tokens, &length) in tokens.iter_mut().zip(&step.lengths) {
            let array = if in_key { &mut tokens.key } else { &mut tokens.value };
            for head in 0..case.kv_heads {
                array.row_mut([head, at.index(length)]).fill(f32::NAN);
            }
        }
        let data = Data::new(&Case { key_len: 1, ..case.clone() });
        let clean = run(Scene::with_tokens(client, &step, layout, clean, data.clone()))?;
        let scene = run(Scene::with_tokens(client, &step, layout, tokens, data))?;
        let plan = run(plan_of(client, &step, layout, case.batch))?;
        let mut routes = routes_of(&step, 0);
        let spoilt = at.index(routes.routes.len());
        routes.routes[spoilt] = INVALID_ROUTE;
        let uploaded = run(routes.upload_unchecked(client))?;
        let given = step.routed().then_some(&uploaded);
        let read = run(scene.attend(client, &step, &plan, given))?;
        let untouched = run(clean.attend(client, &step, &plan, given))?;
        let expected = scene.expected(&step, reach_by(&step, &routes));
        let differs = |x: f64, y: f32, without: f32| !x.is_nan() && y.to_bits() != without.to_bits();
        for (at, (&x, &y)) in expected.exact.out.as_slice().iter().zip(&read.out).enumerate() {
            let row = at / case.value_dim;
            let (b, h, t) = (
                row / case.query_len / case.heads(),
                row / case.query_len % case.heads(),
                row % case.query_len,
            );
            let invalid = step.routed() && routes.at(case.heads(), b, h, t) == INVALID_ROUTE;
            if (x.is_nan() || invalid) != y.is_nan() {
                return Err(format!("output {at} is {y}, expected {x}, invalid: {invalid}"));
            }
            if !invalid && differs(x, y, untouched.out[at]) {
                return Err(format!("output {at} is {y}, and {} without the NaN", untouched.out[at]));
            }
        }
        for (at, (&x, &y)) in expected.exact.lse.as_slice().iter().zip(&read.lse).enumerate() {
            if !y.is_nan() && differs(x, y, untouched.lse[at]) {
                return Err(format!("log-sum-exp {at} is {y}, and {} without the NaN", untouched.lse[at]));
            }
        }
        Ok(())
    })
}
