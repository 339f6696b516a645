//! RATTENTION, which is made of a window, of linear attention and of the sum of their norms.

use bifocal::{Element, FeatureMap, Rattention, RattentionInputs, RattentionStep, Reach, State, Tensor};
use bifocal_reference::{self as reference, Array};
use num_traits::Float;

use super::{
    case::{
        Bound, LinearCase, LinearData, LinearOnDevice, attend, cut, leaving, linear_cases, part,
        self_attention,
    },
    norm_sum::NormData,
};
use crate::{
    Device, Effort,
    case::Case,
    compare::{near, run},
    gradients::draw_d_out,
    inputs::{Data, OnDevice, array, round},
    refute,
};

/// RATTENTION by the oracle, its far branch on the rows whose route is 1: its output, and the gradients of the near query and
/// key, the values, the far query and key, the scales, and by the straight-through estimator the routes' scores. The far
/// branch rounds what it multiplies as told, and if that is told, too, the near branch is rounded as the facade keeps it.
pub(crate) fn oracle_rattention<F: Float>(
    data: &LinearData,
    near: &Data,
    routes: &Array<u8, 3>,
    scales: &[Vec<f32>; 2],
    d_out: &[f32],
    (round_far, round_near): (fn(F) -> F, bool),
) -> [Vec<F>; 9] {
    let case = &data.of.case;
    let reach = Reach::Window(data.of.window);
    let mut partial: reference::Partial<F> = near.oracle(|weight| weight, |_, _, _| Some(reach));
    if round_near {
        let rounded = |x: F| round(case.element, x.to_f32().unwrap_or(f32::NAN));
        partial.out = partial.out.map(|x| F::from(rounded(x)).unwrap_or(F::nan()));
    }
    let ([q, k, v], options) = data.oracle::<F>(round_far);
    let far = reference::linear_attention(&q, &k, &v, &options).out;
    let scales = [NormData::scale::<F>(case, &scales[0]), NormData::scale::<F>(case, &scales[1])];
    let epsilon = F::from(1e-8f32).expect("a float");
    let d_out: Array<F, 4> = array(case.problem().out_shape(), d_out);
    let (branches, scales) = ([&partial.out, &far], [&scales[0], &scales[1]]);
    let out = reference::aha_linear(branches, routes, scales, epsilon);
    let found = reference::aha_linear_backward(branches, routes, scales, epsilon, &d_out);
    let as_f32 = |x: &Array<F, 4>| -> Vec<f32> {
        x.as_slice().iter().map(|x| x.to_f32().unwrap_or(f32::NAN)).collect()
    };
    let near = near.oracle_backward(|weight| weight, &partial, &as_f32(&found.near), |_, _, _| Some(reach));
    let no_state = Array::filled(data.of.state_shape(), F::zero());
    let far = reference::linear_attention_backward(&q, &k, &v, &options, &found.far, &no_state);
    let value =
        near.value.as_slice().iter().zip(far.value.as_slice()).map(|(&near, &far)| near + far).collect();
    [
        out.into_vec(),
        near.query.into_vec(),
        near.key.into_vec(),
        value,
        far.query.into_vec(),
        far.key.into_vec(),
        found.near_scale.into_vec(),
        found.far_scale.into_vec(),
        found.scores.into_vec(),
    ]
}

/// The case with rows that a norm makes sense of, and with what RATTENTION has.
pub(crate) fn normable(of: LinearCase) -> LinearCase {
    // Without a map rows can come out next to zero, and a norm makes noise of them.
    let map = if of.map == FeatureMap::Identity { FeatureMap::SoftmaxPair } else { of.map };
    let case = Case { magnitude: 1.0, ..of.case };
    LinearCase { case, map, decays: None, starts: false, chunk: None, ..of }
}

/// The numbers of RATTENTION's branches, here and on the device.
pub(crate) struct Branches {
    pub(crate) data: LinearData,
    /// Other queries and keys, as rotary positions make them; the same values.
    pub(crate) near: Data,
    pub(crate) scales: [Vec<f32>; 2],
    data_on: LinearOnDevice,
    near_on: OnDevice,
    scales_on: [Tensor<2>; 2],
}

impl Branches {
    pub(crate) fn upload(device: &Device, of: &LinearCase) -> Result<Self, String> {
        let case = &of.case;
        let data = LinearData::new(of);
        let mut near = Data::new(&Case { seed: case.seed ^ 7, ..case.clone() });
        near.value.clone_from(&data.data.value);
        let scales = NormData::scales(case);
        let scale = |of: usize| NormData::upload_scale(device, case, &scales[of]);
        Ok(Self {
            data_on: data.upload(device, false)?,
            near_on: run(near.upload(&device.client))?,
            scales_on: [scale(0)?, scale(1)?],
            data,
            near,
            scales,
        })
    }

    pub(crate) fn inputs(&self) -> RattentionInputs<'_> {
        let [near_scale, far_scale] = &self.scales_on;
        RattentionInputs {
            near: self.near_on.inputs(),
            far: self.data_on.inputs(),
            near_scale: near_scale.view(),
            far_scale: far_scale.view(),
        }
    }
}

pub(super) fn rattention_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, linear_cases(&device.profile), |of| {
        let of = self_attention(normable(of));
        let (case, client, problem) = (&of.case, &device.client, of.case.problem());
        let branches = Branches::upload(device, &of)?;
        let (Branches { data, near, scales, .. }, inputs) = (&branches, branches.inputs());
        let rattention = Rattention::new(of.window).with_feature_map(of.map);
        let d_out = draw_d_out(case);
        let out = run(Tensor::filled(client, problem.out_shape(), case.out_element(), f32::NAN))?;
        let forward = run(rattention.attend(client, &problem, &inputs, &out))?;
        let d_out_on = run(Tensor::from_f32(client, problem.out_shape(), case.out_element(), &d_out))?;
        let gradients = run(rattention.backward(client, &problem, &inputs, &forward, d_out_on.view(), None))?;
        let rows = run(out.to_f32(client))?;
        let found = [
            rows.clone(),
            run(gradients.near.query.to_f32(client))?,
            run(gradients.near.key.to_f32(client))?,
            run(gradients.near.value.to_f32(client))?,
            run(gradients.far_query.to_f32(client))?,
            run(gradients.far_key.to_f32(client))?,
            run(gradients.near_scale.to_f32(client))?,
            run(gradients.far_scale.to_f32(client))?,
        ];
        let names =
            ["output", "near query", "near key", "value", "far query", "far key", "near scale", "far scale"];
        let everywhere = Array::filled([case.batch, 1, case.query_len], 1);
        let exact = oracle_rattention::<f64>(data, near, &everywhere, scales, &d_out, (|x| x, false));
        let plain = oracle_rattention::<f32>(data, near, &everywhere, scales, &d_out, (of.round(), true));
        // There is no gate here.
        for (at, (exact, plain)) in exact.into_iter().zip(&plain).take(names.len()).enumerate() {
            let element = if at == 0 { case.out_element() } else { case.element };
            Bound::new(exact, plain, element).accepts(names[at], &found[at])?;
        }

        // The last row once more, from the state before it.
        let length = case.query_len;
        let before = part(data, None, (0, 0, length - 1));
        let [_, state] = attend(device, &before.of, &before.upload(device, false)?)?;
        let state = run(State::from_f32(client, of.state_shape(), &state))?;
        let leaves = length.checked_sub(1 + of.window.keys() as usize);
        let left = leaves.map(|key| part(data, None, (key, key, key + 1)));
        let left_on = left.as_ref().map(|left| left.upload(device, false)).transpose()?;
        let kept = leaves.map_or(0, |key| key + 1);
        let row = part(data, None, (length - 1, kept, length));
        let near_row = part(
            &LinearData {
                data: near.clone(),
                of: of.clone(),
                log_decay: None,
                state: None,
                d_state: Vec::new(),
            },
            None,
            (length - 1, kept, length),
        );
        let (row_on, near_row_on) = (row.upload(device, false)?, near_row.upload(device, false)?);
        let step = RattentionStep {
            near: near_row_on.qkv.inputs(),
            far_query: row_on.qkv.query.view(),
            left: left_on.as_ref().map(leaving),
            near_scale: inputs.near_scale,
            far_scale: inputs.far_scale,
        };
        let problem = row.of.case.problem();
        let out = run(Tensor::filled(client, problem.out_shape(), case.out_element(), f32::NAN))?;
        run(rattention.step(client, &problem, &step, &state, &out))?;
        let last = cut(&rows, length, length - 1, length, case.value_dim);
        let last: Vec<f64> = last.into_iter().map(f64::from).collect();
        // A norm makes more of what is small: rounded branches may differ by a few roundings.
        let tolerance = 8.0 * (case.element.epsilon() + 256.0 * Element::F32.epsilon());
        near_rows(&last, &run(out.to_f32(client))?, tolerance)
    })
}

fn near_rows(exact: &[f64], found: &[f32], relative: f64) -> Result<(), String> {
    let largest = exact.iter().map(|x| x.abs()).fold(0.0, f64::max);
    near("last row", exact, found, relative * largest)
}
