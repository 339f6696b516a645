//! What systems satisfy that are other combinations of the same parts: soft gates, gated outputs, static heads.

use bifocal::{
    Aha, AttentionOperator, Decision, Element, FixedRouter, Full, Logo, Partial, Reach, RouteGeometry,
    Router, Rows, Tensor, Windowed, merge_routed, mix,
};
use bifocal_reference::{self as reference, Array};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    Device, Effort, Property,
    attention::operator,
    case::{Case, cases, routings, windows},
    compare::{Expected, Read, near, run},
    everywhere,
    inputs::{Data, HostRoutes, array},
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "soft_gates_equal_the_oracle",
        claim: "a soft gate mixes where it is open and is the window elsewhere; gated outputs and routed merges are the oracle's",
        applies: everywhere,
        one_in: 2,
        run: soft_gates_equal_the_oracle,
    },
    Property {
        name: "static_heads_equal_the_oracle",
        claim: "heads that always look far beside heads with sinks and a window are each their own branch",
        applies: everywhere,
        one_in: 2,
        run: static_heads_equal_the_oracle,
    },
];

fn soft_gates_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(
        effort,
        (cases(&device.profile), windows(), routings(), 0..9u32),
        |(case, window, routing, sinks)| {
            let client = &device.client;
            let case = Case { magnitude: 1.0, sink_logits: false, ..case };
            let data = Data::new(&case);
            let on = run(data.upload(client))?;
            let (problem, inputs) = (case.problem(), on.inputs());
            let host_routes = HostRoutes::new(&case, &routing, 2);
            let routes = run(host_routes.upload(client))?;
            let RouteGeometry { batch, heads, tokens, .. } = host_routes.geometry;
            let mut rng = SmallRng::seed_from_u64(case.seed ^ 0x50f7);
            let scores: Vec<f32> =
                (0..host_routes.geometry.len()).map(|_| rng.random_range(0.0..1.0)).collect();
            let exact = |reach: Reach| data.oracle::<f64>(|weight| weight, |_, _, _| Some(reach));
            let (exact_near, exact_full) = (exact(Reach::Window(window)), exact(Reach::All));
            // A row is a mix of two, each of which may have rounded its weights.
            let tolerance = (24.0 * case.element.epsilon()).max(1e-4);

            let decision = Decision {
                scores: Some(run(Tensor::from_f32(
                    client,
                    [batch, heads, 1, tokens],
                    Element::F32,
                    &scores,
                ))?),
                routes: routes.clone(),
                counts: client.create_from_slice(&[0; 4]),
            };
            let soft = run(Logo::new(window).attend(client, &problem, &inputs, &decision))?;
            let open =
                scores.iter().zip(&host_routes.routes).map(|(&score, &route)| score * f32::from(route));
            let open: Array<f64, 3> = array([batch, heads, tokens], &open.collect::<Vec<_>>());
            let mixed = reference::mix(&open, &exact_near, &exact_full);
            near("soft gate: output", mixed.as_slice(), &run(soft.out.to_f32(client))?, tolerance)?;

            // A gated output (arXiv 2505.06708, one gate per head) is a mix with nothing.
            let full = run(Partial::poisoned(client, &problem, Element::F32))?;
            run(Full.attend(client, &problem, &inputs, Rows::All, &full))?;
            let gated = run(Partial::identity(client, &problem, Element::F32))?;
            let weights = run(Tensor::from_f32(client, [batch, heads, tokens], Element::F32, &scores))?;
            run(mix(client, &problem, weights.view(), &gated, &full))?;
            let scores: Array<f64, 3> = array([batch, heads, tokens], &scores);
            let nothing = reference::Partial::empty(exact_full.out.shape());
            let expected = reference::mix(&scores, &nothing, &exact_full);
            near("gated output", expected.as_slice(), &run(gated.out.to_f32(client))?, tolerance)?;

            // Rows that are not routed stay, whatever the far partial holds there.
            let local = run(Partial::poisoned(client, &problem, Element::F32))?;
            let near_reach = Reach::SinksAndWindow { sinks, window };
            run(operator(near_reach).attend(client, &problem, &inputs, Rows::All, &local))?;
            let far = run(Partial::poisoned(client, &problem, Element::F32))?;
            let plan = run(bifocal::plan(client, &problem, &routes))?;
            let far_operator = operator(Reach::Far { sinks, window });
            run(far_operator.attend(client, &problem, &inputs, run(plan.far_rows())?, &far))?;
            run(merge_routed(client, &problem, &routes, 1, &local, &far))?;
            let case = Case { out_f32: true, ..case.clone() };
            let is_far = |b, h, t| host_routes.at(case.heads(), b, h, t) == 1;
            Expected::new(&case, &data, |b, h, t| Some(if is_far(b, h, t) { Reach::All } else { near_reach }))
                .accepts(&run(Read::new(client, &local))?)
        },
    )
}

fn static_heads_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (cases(&device.profile), windows(), 0..9u32, any::<[bool; 12]>(), any::<bool>());
    refute(effort, strategy, |(case, window, sinks, far, by_kv_head)| {
        let client = &device.client;
        let case = Case { out_f32: false, ..case };
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        // One label per kv head (DuoAttention, arXiv 2410.10819), or per query head.
        let router_heads = if by_kv_head { case.kv_heads } else { case.heads() };
        let labels: Vec<u8> = far.iter().map(|&far| u8::from(far)).take(router_heads).collect();
        let router = run(FixedRouter::new(labels.clone(), 2))?;
        let hidden = run(Tensor::filled(client, [case.batch, case.query_len, 1], Element::F32, 0.0))?;
        let routes = run(router.route(client, hidden.view()))?.routes;
        let lens = Aha::with_near(Windowed::new(window).with_sinks(sinks));
        let partial = run(lens.attend(client, &case.problem(), &on.inputs(), &routes))?;
        Expected::new(&case, &data, |_, h, _| {
            let far = labels[h * router_heads / case.heads()] == 1;
            Some(if far { Reach::All } else { Reach::SinksAndWindow { sinks, window } })
        })
        .accepts(&run(Read::new(client, &partial))?)
    })
}
