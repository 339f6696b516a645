//! QAdA against compositions by the routes that it chose, and as a dense layer that is left as it was.

use bifocal_burn::{
    AttentionOptions, CausalAttentionConfig, Error, MomentGate, QadaAttentionConfig, RopeConfig, Window,
    composed, full_attention, qada_attention,
};
use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use rstest::rstest;

use crate::{
    common::{assert_close, devices, noise, qkv},
    gradients::{TOLERANCE, assert_all_close, gradient, gradients, leaf, loss},
};

fn gate(tau: f32) -> MomentGate {
    MomentGate::new(Window::new(4).unwrap(), tau).unwrap().with_sinks(0)
}

#[rstest]
#[case::mha([2, 2], [19, 19])]
#[case::gqa([6, 2], [19, 19])]
#[case::fewer_queries([4, 1], [5, 19])]
fn it_is_the_composition_by_its_routes(#[case] heads: [usize; 2], #[case] tokens: [usize; 2]) {
    let flex = Device::flex();
    let inputs = qkv(heads, tokens, 16, &flex);
    let options = AttentionOptions::default().with_scale(0.4);
    for device in devices() {
        let [q, k, v] = inputs.each_ref().map(|tensor| tensor.clone().to_device(&device));
        let (out, routing) = qada_attention(q, k, v, gate(0.25), &options).unwrap();
        let share = routing.far_share().unwrap().iter().sum::<f64>() / routing.shape()[1] as f64 / 2.0;
        assert!(share > 0.05 && share < 0.95, "both branches have rows: {share}");
        assert_eq!(routing.scores().unwrap().unwrap().dims(), [2, heads[0], 1, tokens[0]]);
        // Without sinks, near merged with far is one of AHA's two branches.
        let routes = || routing.routes().unwrap().to_device(&flex);
        let by_routes =
            |q, k, v| composed::aha_attention(q, k, v, routes(), Window::new(4).unwrap(), &options).unwrap();
        let [q, k, v] = inputs.clone();
        assert_close(out, by_routes(q, k, v).to_device(&device), 1e-5);

        let expected = gradients(&inputs, &flex, by_routes);
        let found = gradients(&inputs, &device, |q, k, v| {
            let (out, again) = qada_attention(q, k, v, gate(0.25), &options).unwrap();
            assert_eq!(again.to_host().unwrap(), routing.to_host().unwrap());
            out
        });
        assert_all_close(found, &expected, TOLERANCE);
    }
}

#[test]
fn sink_logits_have_their_gradient() {
    let flex = Device::flex();
    let inputs = qkv([4, 2], [13, 13], 16, &flex);
    let sinks = noise([4], 9, &flex);
    // With a tau of 1 all is full attention.
    let of = |attend: &dyn Fn([Tensor<4>; 3], &AttentionOptions) -> Tensor<4>| {
        let (leaves, sinks) = (inputs.each_ref().map(|tensor| leaf(tensor, &flex)), leaf(&sinks, &flex));
        let options = AttentionOptions::default().with_sink_logits(sinks.clone());
        let gradients = loss(attend(leaves.clone(), &options)).backward();
        (leaves.map(|leaf| gradient(&leaf, &gradients)), gradient(&sinks, &gradients))
    };
    let (expected, expected_sinks) = of(&|[q, k, v], options| full_attention(q, k, v, options).unwrap());
    let (found, found_sinks) =
        of(&|[q, k, v], options| qada_attention(q, k, v, gate(1.0), options).unwrap().0);
    assert_all_close(found, &expected, TOLERANCE);
    assert_close(found_sinks, expected_sinks, TOLERANCE);
}

#[test]
fn a_dense_layer_fits_as_it_is() {
    let device = Device::flex();
    let rope = Some(RopeConfig::new(32));
    let dense = CausalAttentionConfig::new(24, 4).with_n_kv_heads(Some(2)).with_rope(rope.clone());
    let dense = dense.init(&device).unwrap();
    let config = QadaAttentionConfig::new(24, 4, 5, 1.0).with_n_kv_heads(Some(2)).with_rope(rope);
    let qada = config.with_sinks(2).init(&device).unwrap();
    assert_eq!(qada.num_params(), dense.num_params());
    let qada = bifocal_burn::QadaAttention { projections: dense.projections.clone(), ..qada };
    let hidden = noise([2, 23, 24], 7, &device).mul_scalar(3.0);
    let expected = dense.forward(hidden.clone()).unwrap();
    assert_close(qada.forward(hidden).unwrap().output, expected, 1e-5);
}

#[test]
fn what_moments_do_not_know_is_refused() {
    let device = Device::flex();
    let [q, k, v] = qkv([2, 2], [5, 5], 16, &device);
    let options = AttentionOptions::default().with_softcap(3.0);
    let error = qada_attention(q, k, v, gate(0.5), &options).unwrap_err();
    assert!(matches!(error, Error::Option { option: "softcap", .. }), "{error}");
    let error = QadaAttentionConfig::new(16, 2, 3, 1.5).init(&device).unwrap_err();
    assert!(matches!(error, Error::Option { option: "tau", .. }), "{error}");
}
