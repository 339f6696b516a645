//! What linear attention satisfies on some of the rows and on packed sequences, and AHA over it.

use bifocal::{AhaLinear, Element, Gradients, Tensor};
use proptest::prelude::*;

use crate::{
    Device, Effort, Property,
    case::{packed_cases, routings},
    compare::run,
    everywhere,
    gradients::draw_d_out,
    inputs::HostRoutes,
    linear::{
        Bound, Branches, LinearData, NAMES, linear_cases, linear_cases_of, normable, oracle_rattention,
    },
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "routed_linear_rows_equal_the_oracle",
        claim: "a plan's rows, of batches and of packed sequences, have the oracle's output and gradients; others do not matter",
        applies: everywhere,
        one_in: 4,
        run: routed_linear_rows_equal_the_oracle,
    },
    Property {
        name: "aha_linear_equals_the_oracle",
        claim: "AHA over linear attention, all of its gradients and those of its gate's scores are the oracle's",
        applies: everywhere,
        one_in: 8,
        run: aha_linear_equals_the_oracle,
    },
];

fn routed_linear_rows_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let packed = linear_cases_of(&device.profile, packed_cases(&device.profile));
    let drawn = prop_oneof![1 => linear_cases(&device.profile), 3 => packed];
    refute(effort, (drawn, routings(), 0..4u8), |(of, routing, all)| {
        let (data, client, case) = (LinearData::new(&of), &device.client, &of.case);
        let (on, problem) = (data.upload(device, false)?, case.problem());
        let routes = HostRoutes::new(case, &routing, 2);
        let plan = run(bifocal::plan(client, &problem, &run(routes.upload(client))?))?;
        let inputs = match all {
            0 => on.inputs(),
            _ => on.inputs().with_rows(run(plan.far_rows())?),
        };
        let [shape @ .., dim] = problem.out_shape();
        let taken: Vec<bool> = (0..shape.iter().product())
            .map(|row: usize| {
                let [_, heads, tokens] = shape;
                all == 0 || routes.at(heads, row / tokens / heads, row / tokens % heads, row % tokens) == 1
            })
            .collect();
        // In rows that are not taken, `value`.
        let others = |numbers: &mut [f32], value: f32| {
            for (row, taken) in numbers.chunks_mut(dim).zip(&taken) {
                if !taken {
                    row.fill(value);
                }
            }
        };

        let untouched = 0.5;
        let out = run(Tensor::filled(client, problem.out_shape(), case.out_element(), untouched))?;
        let state = run(of.operator().attend(client, &problem, &inputs, &out))?;
        let (exact, plain) = (data.forward::<f64>(|x| x), data.forward::<f32>(of.round()));
        let [of_out, of_state] = [case.out_element(), Element::F32].map(|element| of.rounded_to(element));
        let mut expected: Vec<f64> = exact.out.into_vec();
        for (row, taken) in expected.chunks_mut(dim).zip(&taken) {
            if !taken {
                row.fill(f64::from(untouched));
            }
        }
        let mut plain_out = plain.out.into_vec();
        others(&mut plain_out, untouched);
        Bound::new(expected, &plain_out, of_out).accepts("output", &run(out.to_f32(client))?)?;
        Bound::new(exact.state.into_vec(), plain.state.as_slice(), of_state)
            .accepts("state", &run(state.to_f32(client))?)?;

        // Gradients of rows that are not taken are not read.
        let mut d_out = draw_d_out(case);
        others(&mut d_out, f32::NAN);
        let on_d_out = run(Tensor::from_f32(client, problem.out_shape(), case.out_element(), &d_out))?;
        let d_state = run(Tensor::from_f32(client, of.state_shape(), Element::F32, &data.d_state))?;
        let gradients = run(Gradients::zeros(client, &problem, false))?;
        let operator = of.operator();
        let d_start =
            operator.backward(client, &problem, &inputs, on_d_out.view(), Some(&d_state), &gradients);
        let d_start = match run(d_start)? {
            Some(d_start) => run(d_start.to_f32(client))?,
            None => Vec::new(),
        };
        let Gradients { query, key, value, .. } = gradients;
        let found =
            [run(query.to_f32(client))?, run(key.to_f32(client))?, run(value.to_f32(client))?, d_start];
        others(&mut d_out, 0.0);
        let (exact, plain) = (data.backward::<f64>(&d_out), data.backward::<f32>(&d_out));
        for (at, (exact, plain)) in exact.into_iter().zip(&plain).enumerate() {
            if at < 3 || of.starts {
                Bound::new(exact, plain, Element::F32).accepts(NAMES[at], &found[at])?;
            }
        }
        Ok(())
    })
}

fn aha_linear_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (linear_cases(&device.profile), routings()), |(of, routing)| {
        let of = normable(of);
        let (case, client, problem) = (&of.case, &device.client, of.case.problem());
        let branches = Branches::upload(device, &of)?;
        let (Branches { data, near, scales, .. }, inputs) = (&branches, branches.inputs());
        let routes = HostRoutes::new(case, &routing, 2);
        let plan = run(bifocal::plan(client, &problem, &run(routes.upload(client))?))?;
        let lens = AhaLinear::new(of.window).with_feature_map(of.map);
        let d_out = draw_d_out(case);
        let out = run(Tensor::filled(client, problem.out_shape(), case.out_element(), f32::NAN))?;
        let forward = run(lens.attend(client, &problem, &inputs, &plan, &out))?;
        let on_d_out = run(Tensor::from_f32(client, problem.out_shape(), case.out_element(), &d_out))?;
        let d_out_view = on_d_out.view();
        let gradients = lens.backward(client, &problem, &inputs, &plan, &forward, d_out_view, None);
        let gradients = run(gradients)?;
        let scores = lens.gate_gradient(client, &problem, &inputs, routes.geometry.heads, d_out_view);
        let found = [
            ("output", run(out.to_f32(client))?),
            ("near query", run(gradients.near.query.to_f32(client))?),
            ("near key", run(gradients.near.key.to_f32(client))?),
            ("value", run(gradients.near.value.to_f32(client))?),
            ("far query", run(gradients.far_query.to_f32(client))?),
            ("far key", run(gradients.far_key.to_f32(client))?),
            ("near scale", run(gradients.near_scale.to_f32(client))?),
            ("far scale", run(gradients.far_scale.to_f32(client))?),
            ("scores", run(run(scores)?.to_f32(client))?),
        ];
        let exact = oracle_rattention::<f64>(data, near, &routes.array(), scales, &d_out, (|x| x, false));
        let plain = oracle_rattention::<f32>(data, near, &routes.array(), scales, &d_out, (of.round(), true));
        let largest = d_out.iter().fold(0.0f64, |top, x| top.max(f64::from(x.abs())));
        let cancelled = 64.0 * Element::F32.epsilon() * largest;
        for ((exact, plain), (name, found)) in exact.into_iter().zip(&plain).zip(&found) {
            let element = if *name == "output" { case.out_element() } else { case.element };
            let bound = Bound::new(exact, plain, element);
            // With one key in the window these gradients are 0, which a kernel has as the difference of two products of `d_out`.
            let differences = matches!(*name, "near query" | "near key");
            let bound = if differences { bound.at_least(cancelled) } else { bound };
            bound.accepts(name, found)?;
        }
        Ok(())
    })
}
