//! What the gradients of routers' scores satisfy.

use bifocal::{
    Aha, AttentionOperator, Element, Inputs, L2a, MultiWindow, Partial, Problem, Reach, Routes, Rows, Tensor,
    Window, attend_every, choice_gradient, cubecl::client::Client, gate_gradient,
};
use bifocal_reference::{self as reference, Training};
use proptest::prelude::*;

use crate::{
    Device, Effort, Property,
    attention::near_or_far,
    case::{Case, backward_cases, routings, windows},
    compare::{Expected, Read, near, run},
    everywhere,
    gradients::draw_d_out,
    inputs::{Data, HostRoutes, array},
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "gate_gradients_equal_the_oracle",
        claim: "AHA's and L2A's gates get the oracle's straight-through gradients, exact and sparse",
        applies: everywhere,
        one_in: 4,
        run: gate_gradients_equal_the_oracle,
    },
    Property {
        name: "choice_gradients_equal_the_oracle",
        claim: "a choice among several windows gets the oracle's straight-through gradients",
        applies: everywhere,
        one_in: 4,
        run: choice_gradients_equal_the_oracle,
    },
];

/// A partial as the oracle takes it, from what a device computed, which was compared before.
fn as_reference(case: &Case, read: &Read) -> reference::Partial<f64> {
    let problem = case.problem();
    reference::Partial {
        out: array(problem.out_shape(), &read.out),
        lse: array(problem.lse_shape(), &read.lse),
    }
}

/// Every row by every branch, all of which there are.
fn every_branch(
    client: &Client,
    problem: &Problem,
    inputs: &Inputs<'_>,
    routes: &Routes,
    branches: &[&dyn AttentionOperator],
    partial: &Partial,
) -> Result<Vec<Partial>, String> {
    let branches: Vec<_> = branches.iter().copied().map(Some).collect();
    let computed = run(attend_every(client, problem, inputs, routes, &branches, Rows::All, partial))?;
    Ok(computed.into_iter().flatten().collect())
}

/// Compares gradients of scores that come from the same outputs: what differs is the order of sums.
fn same_scores(
    device: &Device,
    case: &Case,
    data: &Data,
    exact: &[f64],
    found: &Tensor<4>,
) -> Result<(), String> {
    let largest = data.value.iter().fold(1.0f64, |top, x| top.max(f64::from(x.abs())));
    let terms = (2 * case.heads() * case.value_dim) as f64;
    let tolerance = Element::F32.epsilon() * terms * 1.7 * largest;
    near("gradient of a score", exact, &run(found.to_f32(&device.client))?, tolerance)
}

fn gate_gradients_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (backward_cases(&device.profile), windows(), routings()), |(case, window, routing)| {
        let (client, problem) = (&device.client, case.problem());
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        let routes = HostRoutes::new(&case, &routing, 2);
        let (on_device, router_heads) = (run(routes.upload(client))?, routes.geometry.heads);
        let is_far = |b, h, t| routes.at(case.heads(), b, h, t) == 1;
        let d_out = draw_d_out(&case);
        let on_d_out = run(Tensor::from_f32(client, problem.out_shape(), case.out_element(), &d_out))?;
        let exact_d_out = array::<f64, 4>(problem.out_shape(), &d_out);

        let aha = Aha::new(window);
        let partial = run(Partial::poisoned(client, &problem, case.out_element()))?;
        let branches = every_branch(client, &problem, &on.inputs(), &on_device, &aha.branches(), &partial)?;
        let selected = Expected::new(&case, &data, |b, h, t| near_or_far(is_far(b, h, t), window));
        selected.accepts(&run(Read::new(client, &partial))?)?;
        let reads = branches.iter().map(|branch| Read::new(client, branch));
        let reads = run(reads.collect::<bifocal::Result<Vec<_>>>())?;
        for (far, read) in [false, true].into_iter().zip(&reads) {
            Expected::new(&case, &data, |_, _, _| near_or_far(far, window)).accepts(read)?;
        }
        let (near, far) = (as_reference(&case, &reads[0]), as_reference(&case, &reads[1]));
        let gradient = |near: Option<&Partial>, far: &Partial| {
            let near = near.map(|near| near.out.view());
            run(gate_gradient(client, &problem, router_heads, near, far.out.view(), on_d_out.view()))
        };
        let found = gradient(Some(&branches[0]), &branches[1])?;
        let exact = reference::gate_backward(&exact_d_out, &near, &far, &routes.array(), Training::Exact);
        same_scores(device, &case, &data, exact.as_slice(), &found)?;

        // L2A's passes write the inputs' type.
        let case = Case { out_f32: case.element == Element::F32, sink_logits: false, ..case.clone() };
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        let l2a = L2a::new(window);
        let (dense, every) = run(l2a.global_dense(client, &problem, &on.inputs(), &on_device))?;
        let routed = Expected::new(&case, &data, |b, h, t| is_far(b, h, t).then_some(Reach::All));
        routed.accepts(&run(Read::new(client, &dense))?)?;
        let read = run(Read::new(client, &every))?;
        Expected::new(&case, &data, |_, _, _| Some(Reach::All)).accepts(&read)?;
        let (nothing, all) = (reference::Partial::empty(problem.out_shape()), as_reference(&case, &read));
        let exact = reference::gate_backward(&exact_d_out, &nothing, &all, &routes.array(), Training::Exact);
        same_scores(device, &case, &data, exact.as_slice(), &gradient(None, &every)?)?;

        let sparse = run(l2a.global(client, &problem, &on.inputs(), &on_device))?;
        let read = as_reference(&case, &run(Read::new(client, &sparse))?);
        let exact =
            reference::gate_backward(&exact_d_out, &nothing, &read, &routes.array(), Training::Sparse);
        same_scores(device, &case, &data, exact.as_slice(), &gradient(None, &sparse)?)
    })
}

fn choice_gradients_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let windows = prop::sample::subsequence(vec![1usize, 7, 33, 200], 1..3);
    refute(effort, (backward_cases(&device.profile), windows, routings()), |(case, windows, routing)| {
        let windows: Vec<Window> = run(windows.into_iter().map(Window::new).collect::<bifocal::Result<_>>())?;
        let (client, problem) = (&device.client, case.problem());
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        let lens = run(MultiWindow::new(&windows))?;
        let routes = HostRoutes::new(&case, &routing, lens.reaches());
        let on_device = run(routes.upload(client))?;
        let d_out = draw_d_out(&case);
        let on_d_out = run(Tensor::from_f32(client, problem.out_shape(), case.out_element(), &d_out))?;
        let partial = run(Partial::poisoned(client, &problem, case.out_element()))?;
        let branches = every_branch(client, &problem, &on.inputs(), &on_device, &lens.branches(), &partial)?;
        let reach_of = |route: usize| windows.get(route).map_or(Reach::All, |&window| Reach::Window(window));
        let selected = Expected::new(&case, &data, |b, h, t| {
            Some(reach_of(usize::from(routes.at(case.heads(), b, h, t))))
        });
        selected.accepts(&run(Read::new(client, &partial))?)?;
        let outs: Vec<_> = branches.iter().map(|branch| Some(branch.out.view())).collect();
        let router_heads = routes.geometry.heads;
        let found = run(choice_gradient(client, &problem, router_heads, &outs, on_d_out.view()))?;
        let reads = branches.iter().map(|branch| Read::new(client, branch));
        let reads = run(reads.collect::<bifocal::Result<Vec<_>>>())?;
        let exact: Vec<_> = reads.iter().map(|read| as_reference(&case, read)).collect();
        let exact: Vec<_> = exact.iter().collect();
        let exact = reference::choice_backward(&array(problem.out_shape(), &d_out), &exact, router_heads);
        same_scores(device, &case, &data, exact.as_slice(), &found)
    })
}
