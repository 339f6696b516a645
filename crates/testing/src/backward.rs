//! What backward passes of attention operators satisfy.

use bifocal::{
    Aha, AttentionOperator, Element, Far, INVALID_ROUTE, Inputs, Partial, Plan, Reach, Routes, Routine, Rows,
    Tensor, Windowed, attend_planned, backward_selected,
};
use proptest::{option, prelude::*};

use crate::{
    Device, Effort, Property,
    attention::{near_or_far, operator},
    case::{Case, Routing, backward_cases, packed_backward_cases, reaches, routings, windows},
    compare::{near, run},
    everywhere,
    gradients::{ExpectedGradients, ReadGradients, differentiate, draw_d_out},
    inputs::{Data, HostRoutes, OnDevice, upload_token_major},
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "products_of_rows_are_plain_sums",
        claim: "dot_rows gives the plain sums of products, whatever the two types and layouts",
        applies: everywhere,
        one_in: 4,
        run: products_of_rows_are_plain_sums,
    },
    Property {
        name: "gradients_equal_the_oracle",
        claim: "every reach, shape, element type, softcap and sink logit, all rows and routed ones give the oracle's gradients",
        applies: everywhere,
        one_in: 4,
        run: gradients_equal_the_oracle,
    },
    Property {
        name: "a_nan_reaches_no_other_gradient",
        claim: "a NaN query, key, value or output gradient reaches exactly the gradients of the rows and keys that it meets",
        applies: everywhere,
        one_in: 4,
        run: a_nan_reaches_no_other_gradient,
    },
    Property {
        name: "gradients_add_up",
        claim: "near and far with their merged log-sum-exp give the gradients of full attention, twice gives them twice",
        applies: everywhere,
        one_in: 4,
        run: gradients_add_up,
    },
    Property {
        name: "selected_gradients_equal_the_oracle",
        claim: "AHA's gradients are those of the branch of each row, and NaN where a row without a valid route reaches",
        applies: everywhere,
        one_in: 4,
        run: selected_gradients_equal_the_oracle,
    },
    Property {
        name: "two_backward_runs_agree_bit_for_bit",
        claim: "the same backward pass twice gives the same bits",
        applies: everywhere,
        one_in: 4,
        run: two_backward_runs_agree_bit_for_bit,
    },
    Property {
        name: "packed_gradients_equal_the_oracle",
        claim: "packed sequences, all rows and routed ones, give the oracle's gradients, each sequence its own",
        applies: everywhere,
        one_in: 4,
        run: packed_gradients_equal_the_oracle,
    },
];

fn products_of_rows_are_plain_sums(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (backward_cases(&device.profile), any::<[bool; 4]>());
    refute(effort, strategy, |(case, [a_f32, b_f32, a_swapped, b_broadcast])| {
        let (client, problem) = (&device.client, case.problem());
        let shape = problem.out_shape();
        let [_, heads, tokens, dim] = shape;
        let of = |wide: bool| if wide { Element::F32 } else { case.element };
        let data = Data::new(&Case { head_dim: case.value_dim, ..case.clone() });
        let (a, mut b) = (data.query, draw_d_out(&Case { out_f32: b_f32, ..case.clone() }));
        let on_a = run(match a_swapped {
            true => upload_token_major(client, of(a_f32), &a, shape),
            false => Tensor::from_f32(client, shape, of(a_f32), &a),
        })?;
        let mut on_b = run(Tensor::from_f32(client, shape, of(b_f32), &b))?;
        if b_broadcast {
            // One row per sequence for all heads and tokens.
            for sequence in b.chunks_mut(heads * tokens * dim) {
                let row = sequence[..dim].to_vec();
                sequence.chunks_mut(dim).for_each(|other| other.copy_from_slice(&row));
            }
            let strides = [heads * tokens * dim, 0, 0, 1];
            on_b = Tensor::new(on_b.into_handle(), of(b_f32), shape, strides);
        }
        let found = run(bifocal::dot_rows(client, &problem, on_a.view(), on_b.view()))?;
        let pairs = || a.chunks(dim).zip(b.chunks(dim));
        let products = |(x, y): (&[f32], &[f32])| -> Vec<f64> {
            x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).collect()
        };
        let exact: Vec<f64> = pairs().map(|pair| products(pair).iter().sum()).collect();
        let largest = pairs().flat_map(products).fold(0.0f64, |top, x| top.max(x.abs()));
        let tolerance = Element::F32.epsilon() * dim as f64 * largest;
        near("product", &exact, &run(found.to_f32(client))?, tolerance)
    })
}

/// Forward and backward of one operator, on all rows or on those that go far; the gradient of the output is NaN where it
/// must not be read.
fn operator_gradients(
    device: &Device,
    case: &Case,
    on: &OnDevice,
    reach: Reach,
    routes: Option<&HostRoutes>,
    d_out: &[f32],
    swapped: bool,
) -> Result<ReadGradients, String> {
    let (client, problem) = (&device.client, case.problem());
    let plan = match routes {
        Some(routes) => {
            let routes = run(routes.upload(client))?;
            Some(run(bifocal::plan(client, &problem, &routes))?)
        }
        None => None,
    };
    let rows = run(plan.as_ref().map_or(Ok(Rows::All), Plan::far_rows))?;
    let mut d_out = d_out.to_vec();
    for row in 0..case.batch * case.heads() * case.query_len {
        let (head, token) = (row / case.query_len, row % case.query_len);
        if !computed(case, routes, head / case.heads(), head % case.heads(), token) {
            d_out[row * case.value_dim..][..case.value_dim].fill(f32::NAN);
        }
    }
    let (element, shape) = (case.out_element(), problem.out_shape());
    let d_out = run(match swapped {
        true => upload_token_major(client, element, &d_out, shape),
        false => Tensor::from_f32(client, shape, element, &d_out),
    })?;
    let operator = operator(reach);
    differentiate(
        device,
        case,
        d_out.view(),
        |partial| operator.attend(client, &problem, &on.inputs(), rows, partial).map(drop),
        |saved, gradients| {
            let gradients = match routes {
                // Rows that stay near are in no pass.
                Some(_) => gradients.clone().with_query_cleared(client)?,
                None => gradients.clone(),
            };
            operator.backward(client, &problem, &on.inputs(), rows, saved, &gradients).map(drop)
        },
    )
}

/// Whether a row is among those that are computed.
fn computed(case: &Case, routes: Option<&HostRoutes>, b: usize, h: usize, t: usize) -> bool {
    routes.is_none_or(|routes| routes.at(case.heads(), b, h, t) == 1)
}

fn drawn_routes(case: &Case, routing: Option<&Routing>) -> Option<HostRoutes> {
    routing.map(|routing| HostRoutes::new(case, routing, 2))
}

fn gradients_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy =
        (backward_cases(&device.profile), reaches(), option::of(routings()), any::<bool>(), any::<bool>());
    refute(effort, strategy, |(case, reach, routing, swapped, broadcast)| {
        let mut data = Data::new(&case);
        if swapped && broadcast {
            data.share_first_sequence();
        }
        let on = run(match swapped {
            true => data.upload_token_major(&device.client, broadcast),
            false => data.upload(&device.client),
        })?;
        let routes = drawn_routes(&case, routing.as_ref());
        let d_out = draw_d_out(&case);
        let read = operator_gradients(device, &case, &on, reach, routes.as_ref(), &d_out, swapped)?;
        let reach_of = |b, h, t| computed(&case, routes.as_ref(), b, h, t).then_some(reach);
        ExpectedGradients::new(&case, &data, &d_out, reach_of).accepts(&read)
    })
}

fn a_nan_reaches_no_other_gradient(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy =
        (backward_cases(&device.profile), reaches(), any::<prop::sample::Index>(), 0..4u8, any::<bool>());
    refute(effort, strategy, |(case, reach, at, spoiled, packs_heads)| {
        // With grouped queries a tile of rows has other heads of the same token.
        let case = Case { group: if packs_heads { case.group } else { 1 }, ..case };
        let mut data = Data::new(&case);
        let mut d_out = draw_d_out(&case);
        match spoiled {
            0 => data.spoil(at.index(case.key_len), true),
            1 => data.spoil(at.index(case.key_len), false),
            // One row of one head.
            2 => *at.get_mut(&mut data.query) = f32::NAN,
            _ => *at.get_mut(&mut d_out) = f32::NAN,
        }
        let on = run(data.upload(&device.client))?;
        let read = operator_gradients(device, &case, &on, reach, None, &d_out, false)?;
        ExpectedGradients::new(&case, &data, &d_out, |_, _, _| Some(reach)).accepts(&read)
    })
}

fn gradients_add_up(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (backward_cases(&device.profile), windows(), 0..9u32), |(case, window, sinks)| {
        // Merged outputs are f32, and so is their gradient, which `mma` does not take.
        let routine = case.routine.filter(|&routine| routine != Routine::Mma);
        let case = Case { out_f32: true, routine, ..case };
        let (client, problem) = (&device.client, case.problem());
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        let d_out = draw_d_out(&case);
        let on_d_out = run(Tensor::from_f32(client, problem.out_shape(), case.out_element(), &d_out))?;
        let (near, far) = (Windowed::new(window).with_sinks(sinks), Far::beyond(window).with_sinks(sinks));
        // One of the two has the sink logits.
        let (with, without) = (on.inputs(), Inputs::new(on.query.view(), on.key.view(), on.value.view()));
        let read = differentiate(
            device,
            &case,
            on_d_out.view(),
            |partial| {
                near.attend(client, &problem, &with, Rows::All, partial)?;
                let beyond = Partial::poisoned(client, &problem, Element::F32)?;
                far.attend(client, &problem, &without, Rows::All, &beyond)?;
                bifocal::merge(client, &problem, partial, &beyond)
            },
            |saved, gradients| {
                let mut gradients = gradients.clone();
                for _ in 0..2 {
                    near.backward(client, &problem, &with, Rows::All, saved, &gradients)?;
                    gradients = gradients.after_all_rows();
                    far.backward(client, &problem, &without, Rows::All, saved, &gradients)?;
                }
                Ok(())
            },
        )?;
        ExpectedGradients::new(&case, &data, &d_out, |_, _, _| Some(Reach::All)).times(2.0).accepts(&read)
    })
}

/// AHA's gradients.
fn aha_gradients(
    device: &Device,
    case: &Case,
    on: &OnDevice,
    routes: &Routes,
    aha: &Aha,
    d_out: &[f32],
) -> Result<ReadGradients, String> {
    let (client, problem) = (&device.client, case.problem());
    let plan = run(bifocal::plan(client, &problem, routes))?;
    let d_out = run(Tensor::from_f32(client, problem.out_shape(), case.out_element(), d_out))?;
    differentiate(
        device,
        case,
        d_out.view(),
        |partial| attend_planned(client, &problem, &on.inputs(), &plan, &aha.branches(), partial),
        |saved, gradients| {
            backward_selected(client, &problem, &on.inputs(), &plan, &aha.branches(), saved, gradients)
        },
    )
}

fn selected_gradients_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let invalid = option::of(any::<prop::sample::Index>());
    let strategy = (backward_cases(&device.profile), windows(), routings(), invalid);
    refute(effort, strategy, |(case, window, routing, invalid)| {
        let client = &device.client;
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        let mut routes = HostRoutes::new(&case, &routing, 2);
        if let Some(at) = invalid {
            // As a router that met a NaN would leave it: only the device sees such routes.
            let at = at.index(routes.routes.len());
            routes.routes[at] = INVALID_ROUTE;
        }
        let on_device = run(routes.upload_unchecked(client))?;
        let d_out = draw_d_out(&case);
        let read = aha_gradients(device, &case, &on, &on_device, &Aha::new(window), &d_out)?;
        let route = |b, h, t| routes.at(case.heads(), b, h, t);
        let reach_of = |b, h, t| near_or_far(route(b, h, t) > 0, window);
        let is_invalid = |b, h, t| route(b, h, t) == INVALID_ROUTE;
        ExpectedGradients::with_invalid_rows(&case, &data, &d_out, reach_of, is_invalid).accepts(&read)
    })
}

fn two_backward_runs_agree_bit_for_bit(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (backward_cases(&device.profile), windows(), routings()), |(case, window, routing)| {
        let on = run(Data::new(&case).upload(&device.client))?;
        let routes = run(HostRoutes::new(&case, &routing, 2).upload(&device.client))?;
        let d_out = draw_d_out(&case);
        let run_once = || aha_gradients(device, &case, &on, &routes, &Aha::new(window), &d_out);
        if run_once()?.same_bits(&run_once()?) { Ok(()) } else { Err("two backward passes differ".into()) }
    })
}

fn packed_gradients_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (packed_backward_cases(&device.profile), reaches(), option::of(routings()));
    refute(effort, strategy, |(case, reach, routing)| {
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let routes = drawn_routes(&case, routing.as_ref());
        let d_out = draw_d_out(&case);
        let read = operator_gradients(device, &case, &on, reach, routes.as_ref(), &d_out, false)?;
        let reach_of = |b, h, t| computed(&case, routes.as_ref(), b, h, t).then_some(reach);
        ExpectedGradients::new(&case, &data, &d_out, reach_of).accepts(&read)
    })
}
