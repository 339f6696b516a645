//! What Switch and gated outputs satisfy.

use bifocal::{Element, Switch, Tensor, gate_outputs, gate_outputs_backward};
use bifocal_reference::{self as reference, Array};
use num_traits::Float;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    Device, Effort, Property,
    attention::near_or_far,
    case::{Case, RouterHeads, Routing, cases, routings, windows},
    compare::{Expected, Read, run},
    everywhere,
    gradients::draw_d_out,
    inputs::{Data, HostRoutes, array, upload_token_major},
    linear::Bound,
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "switches_equal_the_oracle",
        claim: "a switch gives every token, with all of its heads, the branch that its route names",
        applies: everywhere,
        one_in: 2,
        run: switches_equal_the_oracle,
    },
    Property {
        name: "gated_outputs_equal_the_oracle",
        claim: "outputs behind a gate per head or per channel, and the gradients of both, are the oracle's",
        applies: everywhere,
        one_in: 2,
        run: gated_outputs_equal_the_oracle,
    },
];

fn switches_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), windows(), routings()), |(case, window, routing)| {
        let case = Case { out_f32: false, ..case };
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let routes = HostRoutes::new(&case, &Routing { heads: RouterHeads::Token, ..routing }, 2);
        let uploaded = run(routes.upload(&device.client))?;
        let partial =
            run(Switch::new(window).attend(&device.client, &case.problem(), &on.inputs(), &uploaded))?;
        Expected::new(&case, &data, |b, h, t| near_or_far(routes.at(case.heads(), b, h, t) == 1, window))
            .accepts(&run(Read::new(&device.client, &partial))?)
    })
}

fn gated_outputs_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), any::<[bool; 3]>()), |(case, [by_channel, swapped, wide])| {
        let (client, problem) = (&device.client, case.problem());
        let shape = problem.out_shape();
        let [batch, heads, tokens, dim] = shape;
        let logit_shape = [batch, heads, tokens, if by_channel { dim } else { 1 }];
        let mut rng = SmallRng::seed_from_u64(case.seed ^ 0x6a7e);
        // Gates from shut to open.
        let logits: Vec<f32> =
            (0..logit_shape.iter().product()).map(|_| rng.random_range(-20.0f32..20.0)).collect();
        let element = if wide { Element::F32 } else { case.element };
        let logits: Vec<f32> = logits.into_iter().map(|x| crate::inputs::round(element, x)).collect();
        let outputs = draw_d_out(&Case { seed: case.seed ^ 1, ..case.clone() });
        let d_out = draw_d_out(&case);

        let on_logits = run(match swapped {
            true => upload_token_major(client, element, &logits, logit_shape),
            false => Tensor::from_f32(client, logit_shape, element, &logits),
        })?;
        let upload = |values: &[f32]| run(Tensor::from_f32(client, shape, case.out_element(), values));
        let (on_outputs, on_d_out) = (upload(&outputs)?, upload(&d_out)?);
        let out = run(Tensor::filled(client, shape, case.out_element(), f32::NAN))?;
        run(gate_outputs(client, &problem, on_logits.view(), on_outputs.view(), &out))?;
        let gradients =
            gate_outputs_backward(client, &problem, on_logits.view(), on_outputs.view(), on_d_out.view());
        let [d_logits, d_outputs] = run(gradients)?;

        let exact = oracle::<f64>(logit_shape, &logits, shape, &outputs, &d_out);
        let plain = oracle::<f32>(logit_shape, &logits, shape, &outputs, &d_out);
        let found = [("output", out), ("logits", d_logits), ("outputs", d_outputs)];
        for ((exact, plain), (name, found)) in exact.into_iter().zip(&plain).zip(&found) {
            Bound::new(exact, plain, found.element()).accepts(name, &run(found.to_f32(client))?)?;
        }
        Ok(())
    })
}

/// The gated output, and the gradients of logits and outputs.
fn oracle<F: Float>(
    logit_shape: [usize; 4],
    logits: &[f32],
    shape: [usize; 4],
    outputs: &[f32],
    d_out: &[f32],
) -> [Vec<F>; 3] {
    let logits: Array<F, 4> = array(logit_shape, logits);
    let (outputs, d_out) = (array(shape, outputs), array(shape, d_out));
    let [d_logits, d_outputs] = reference::gated_output_backward(&logits, &outputs, &d_out);
    [reference::gated_output(&logits, &outputs).into_vec(), d_logits.into_vec(), d_outputs.into_vec()]
}
