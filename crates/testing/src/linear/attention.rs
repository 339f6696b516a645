//! What linear attention satisfies, forward, backward and step by step.

use bifocal::{AttentionOperator, Element, FeatureMap, Partial, Reach, Rows, State, Tensor, Windowed};
use proptest::prelude::*;

use super::case::{
    Bound, LinearCase, LinearData, agree, attend, cut, differentiate, leaving, linear_cases, part,
    self_attention,
};
use crate::{Device, Effort, case::Case, compare::run, gradients::draw_d_out, refute};

pub(super) fn linear_attention_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (linear_cases(&device.profile), any::<bool>()), |(of, swapped)| {
        let data = LinearData::new(&of);
        let [out, state] = attend(device, &of, &data.upload(device, swapped)?)?;
        let (exact, plain) = (data.forward::<f64>(|x| x), data.forward::<f32>(of.round()));
        let [of_out, of_state] = [of.case.out_element(), Element::F32].map(|element| of.rounded_to(element));
        Bound::new(exact.out.into_vec(), plain.out.as_slice(), of_out).accepts("output", &out)?;
        Bound::new(exact.state.into_vec(), plain.state.as_slice(), of_state).accepts("state", &state)
    })
}

pub(super) fn chunks_of_linear_attention_do_not_matter(
    device: &Device,
    effort: Effort,
) -> Result<(), String> {
    let strategy = (linear_cases(&device.profile), 1..50usize);
    refute(effort, strategy, |(of, other)| {
        let (data, element) = (LinearData::new(&of), of.case.out_element());
        let on = data.upload(device, false)?;
        let cut = LinearData { of: LinearCase { chunk: Some(other), ..of.clone() }, ..LinearData::new(&of) };
        let d_out = draw_d_out(&of.case);
        let whole = attend(device, &of, &on)?;
        let parts = attend(device, &cut.of, &on)?;
        for (what, (whole, parts), element) in
            [("output", (&whole[0], &parts[0]), element), ("state", (&whole[1], &parts[1]), Element::F32)]
        {
            agree(what, whole, parts, of.rounded_to(element))?;
        }
        let whole = differentiate(device, &data, &on, &d_out, 1)?;
        let parts = differentiate(device, &cut, &on, &d_out, 1)?;
        for (what, (whole, parts)) in NAMES.into_iter().zip(whole.iter().zip(&parts)) {
            agree(what, whole, parts, Element::F32)?;
        }
        Ok(())
    })
}

pub(crate) const NAMES: [&str; 4] =
    ["gradient of the query", "gradient of the key", "gradient of the value", "gradient of the state"];

pub(super) fn a_state_carries_over(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (linear_cases(&device.profile), any::<prop::sample::Index>());
    refute(effort, strategy, |(of, at)| {
        let of = self_attention(of);
        let data = LinearData::new(&of);
        let length = of.case.query_len;
        let at = 1 + at.index(length - 1);
        let whole = attend(device, &of, &data.upload(device, false)?)?;
        let first = part(&data, data.state.clone(), (0, 0, at));
        let [head, state] = attend(device, &first.of, &first.upload(device, false)?)?;
        let kept = at.saturating_sub(of.window.keys() as usize);
        let second = part(&data, Some(state), (at, kept, length));
        let [tail, state] = attend(device, &second.of, &second.upload(device, false)?)?;
        let (dim, element) = (of.case.value_dim, of.case.out_element());
        agree("state", &whole[1], &state, of.rounded_to(Element::F32))?;
        let element = of.rounded_to(element);
        agree("output before the cut", &cut(&whole[0], length, 0, at, dim), &head, element)?;
        agree("output after the cut", &cut(&whole[0], length, at, length, dim), &tail, element)
    })
}

pub(super) fn window_and_linear_see_every_key_once(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (linear_cases(&device.profile), any::<prop::sample::Index>());
    refute(effort, strategy, |(of, at)| {
        // A state or a query of nothing but zeros would hide what it meets.
        let of = LinearCase { map: FeatureMap::SoftmaxPair, ..of };
        let of = LinearCase { case: Case { magnitude: 1.0, ..of.case }, starts: false, ..of };
        let (case, client) = (&of.case, &device.client);
        let mut data = LinearData::new(&of);
        let token = at.index(case.key_len);
        data.data.spoil(token, false);
        let on = data.upload(device, false)?;
        let far = attend(device, &of, &on)?.into_iter().next().unwrap_or_default();
        let problem = case.problem();
        let partial = run(Partial::poisoned(client, &problem, Element::F32))?;
        run(Windowed::new(of.window).attend(client, &problem, &on.qkv.inputs(), Rows::All, &partial))?;
        let near = run(partial.out.to_f32(client))?;
        for row in 0..case.batch * case.heads() * case.query_len {
            let position = problem.position(row % case.query_len);
            let hit = |out: &[f32]| out[row * case.value_dim..][..case.value_dim].iter().all(|x| x.is_nan());
            let missed =
                |out: &[f32]| out[row * case.value_dim..][..case.value_dim].iter().all(|x| x.is_finite());
            let sees = |reach: Reach| reach.sees(position, token as i64);
            let (window, beyond) = (Reach::Window(of.window), of.operator().reach());
            for (name, out, reach) in [("window", &near, window), ("state", &far, beyond)] {
                let right = if sees(reach) { hit(out) } else { missed(out) };
                if !right {
                    return Err(format!(
                        "row {row} at position {position}: key {token} through the {name}, expected {}",
                        sees(reach)
                    ));
                }
            }
            if sees(window) && sees(beyond) || sees(Reach::All) != (sees(window) || sees(beyond)) {
                return Err(format!("the two branches do not share the past of row {row}"));
            }
        }
        Ok(())
    })
}

pub(super) fn a_step_is_the_last_row(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (linear_cases(&device.profile), 1..6usize);
    refute(effort, strategy, |(of, steps)| {
        let of = self_attention(of);
        let data = LinearData::new(&of);
        let (client, length) = (&device.client, of.case.query_len);
        let first_step = length - steps.min(length - 1);
        let before = part(&data, data.state.clone(), (0, 0, first_step));
        let [_, state] = attend(device, &before.of, &before.upload(device, false)?)?;
        let state = run(State::from_f32(client, of.state_shape(), &state))?;
        for token in first_step..length {
            let row = part(&data, None, (token, token, token + 1));
            let row_on = row.upload(device, false)?;
            let problem = row.of.case.problem();
            let leaves = token.checked_sub(of.window.keys() as usize);
            let left = leaves.map(|key| part(&data, None, (key, key, key + 1)));
            let left_on = left.as_ref().map(|left| left.upload(device, false)).transpose()?;
            let left = left_on.as_ref().map(leaving);
            let out = run(Tensor::filled(client, problem.out_shape(), of.case.out_element(), f32::NAN))?;
            run(of.operator().step(client, &problem, row_on.qkv.query.view(), left, &state, &out))?;
            // All rows up to this one at once.
            let whole = part(&data, data.state.clone(), (0, 0, token + 1));
            let [rows, end] = attend(device, &whole.of, &whole.upload(device, false)?)?;
            let last = cut(&rows, token + 1, token, token + 1, of.case.value_dim);
            let element = of.rounded_to(of.case.out_element());
            agree("output", &last, &run(out.to_f32(client))?, element)?;
            agree("state", &end, &run(state.to_f32(client))?, of.rounded_to(Element::F32))?;
        }
        Ok(())
    })
}

pub(super) fn linear_gradients_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (linear_cases(&device.profile), any::<bool>()), |(of, swapped)| {
        let data = LinearData::new(&of);
        let d_out = draw_d_out(&of.case);
        let on = data.upload(device, swapped)?;
        let found = differentiate(device, &data, &on, &d_out, 2)?;
        let (exact, plain) = (data.backward::<f64>(&d_out), data.backward::<f32>(&d_out));
        for (at, (exact, plain)) in exact.into_iter().zip(&plain).enumerate() {
            // What came in is read once; the other gradients were added to twice.
            let times = if at == 3 { 1.0 } else { 2.0 };
            if at == 3 && !of.starts {
                continue;
            }
            let exact = exact.into_iter().map(|x| times * x).collect();
            let plain: Vec<f32> = plain.iter().map(|&x| times as f32 * x).collect();
            Bound::new(exact, &plain, Element::F32).accepts(NAMES[at], &found[at])?;
        }
        Ok(())
    })
}

pub(super) fn two_linear_runs_agree_bit_for_bit(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, linear_cases(&device.profile), |of| {
        let data = LinearData::new(&of);
        let (on, d_out) = (data.upload(device, false)?, draw_d_out(&of.case));
        let bits = || -> Result<Vec<u32>, String> {
            let forward = attend(device, &of, &on)?.concat();
            let backward = differentiate(device, &data, &on, &d_out, 1)?.concat();
            Ok(forward.iter().chain(&backward).map(|x| x.to_bits()).collect())
        };
        if bits()? == bits()? { Ok(()) } else { Err("two runs differ".into()) }
    })
}
