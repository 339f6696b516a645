//! AHA over a linear far branch: against Burn's own autodiff of the same computation, and its module against the oracle.

use bifocal_burn::{
    AhaLinearAttentionConfig, AhaLinearInputs, AttentionOptions, Error, FeatureMap, GateOptions, RopeConfig,
    Routing, Training, Window, aha_linear_attention, composed, linear_attention, linear_gate, norm_sum,
};
use bifocal_reference::{AhaLinearLayer, Array, Projections, RattentionLayer};
use burn::{
    module::Param,
    tensor::{DType, Device, Int, Tensor, TensorData},
};
use rstest::rstest;

use crate::{
    common::{assert_close, devices, host, mixed_routes, noise, qkv, values},
    gradients::{TOLERANCE, gradient, leaf, loss},
    rattention::weight,
};

/// Queries and keys of both branches, values, and scales, as leaves of a device.
fn leaves(inputs: &[Tensor<4>; 5], scales: &[Tensor<1>; 2], device: &Device) -> AhaLinearInputs {
    let [near_query, near_key, query, key, value] = inputs.each_ref().map(|tensor| leaf(tensor, device));
    AhaLinearInputs {
        near: [near_query, near_key],
        far: [query, key],
        value,
        scales: scales.each_ref().map(|scale| leaf(scale, device)),
    }
}

fn tensors(inputs: &AhaLinearInputs) -> [Tensor<4>; 5] {
    let AhaLinearInputs { near: [near_query, near_key], far: [query, key], value, .. } = inputs.clone();
    [near_query, near_key, query, key, value]
}

#[rstest]
#[case::grouped([4, 2], [21, 21], 4)]
#[case::more_keys([2, 2], [5, 30], 1)]
fn the_gradients_are_those_that_burn_has(
    #[case] heads: [usize; 2],
    #[case] tokens: [usize; 2],
    #[case] router_heads: usize,
) {
    let burns = Device::flex();
    let window = Window::new(4).unwrap();
    let [near_query, near_key, value] = qkv(heads, tokens, 16, &burns);
    let query = noise([2, heads[0], tokens[0], 16], 11, &burns);
    let key = noise([2, heads[1], tokens[1], 16], 12, &burns);
    let inputs = [near_query, near_key, query, key, value];
    let scales = [13, 14].map(|seed| noise([heads[0] * 16], seed, &burns));
    let on = |device: &Device| mixed_routes([2, router_heads, tokens[0]], 2, 15, device);
    let options = AttentionOptions::default();

    let theirs = leaves(&inputs, &scales, &burns);
    let expected = composed::aha_linear_attention(theirs.clone(), on(&burns), window, &options).unwrap();
    let expected_gradients = loss(expected.clone()).backward();
    for device in devices() {
        let ours = leaves(&inputs, &scales, &device);
        let routing = Routing::from_routes(on(&device), 2).unwrap();
        let found = aha_linear_attention(ours.clone(), &routing, window, &options).unwrap();
        let gradients = loss(found.clone()).backward();
        assert_close(found.inner(), expected.clone().inner(), TOLERANCE);
        for (ours, theirs) in tensors(&ours).iter().zip(&tensors(&theirs)) {
            assert_close(gradient(ours, &gradients), gradient(theirs, &expected_gradients), TOLERANCE);
        }
        for (ours, theirs) in ours.scales.iter().zip(&theirs.scales) {
            assert_close(gradient(ours, &gradients), gradient(theirs, &expected_gradients), TOLERANCE);
        }
    }
}

#[rstest]
fn scores_get_what_an_open_gate_adds(#[values(Training::Exact, Training::Sparse)] training: Training) {
    let device = Device::flex();
    let window = Window::new(3).unwrap();
    let [query, key, value] = qkv([2, 1], [17, 17], 8, &device);
    let scales = [3, 4].map(|seed| noise([16], seed, &device));
    let inputs = [query.clone(), key.clone(), query.clone(), key.clone(), value.clone()];
    let ours = leaves(&inputs, &scales, &device);
    let autodiff = device.clone().autodiff();
    let hidden = noise([2, 17, 12], 5, &autodiff);
    let router = leaf(&noise([12, 2], 6, &device), &device);
    let routing = linear_gate(hidden.clone(), router.clone(), None, GateOptions::aha()).unwrap();
    let options = AttentionOptions::default().with_training(training);
    let out = aha_linear_attention(ours, &routing, window, &options).unwrap();
    let gradients = loss(out.clone()).backward();

    // The same by Burn: the loss's slope, times what the far branch would add, times the sigmoid's slope.
    let every = linear_attention(query, key, value, window).unwrap();
    let far = norm_sum(every.zeros_like(), every, scales[0].clone(), scales[1].clone()).unwrap();
    let out = leaf(&out.inner(), &device);
    let slope = gradient(&out, &loss(out.clone()).backward());
    let scores = routing.scores().unwrap().unwrap().inner();
    let mut d_scores = (slope * far).sum_dim(3).swap_dims(2, 3);
    if training == Training::Sparse {
        let open = routing.routes().unwrap().equal_elem(1).unsqueeze_dim::<4>(2);
        d_scores = d_scores.mask_fill(open.bool_not(), 0.0);
    }
    let d_logits = d_scores * scores.clone() * scores.neg().add_scalar(1.0);
    let d_logits = d_logits.permute([0, 3, 1, 2]).reshape([2 * 17, 2]);
    let expected = hidden.inner().reshape([2 * 17, 12]).transpose().matmul(d_logits);
    assert_close(gradient(&router, &gradients), expected, 1e-4);
}

#[test]
fn the_module_is_the_oracles_layer() {
    for device in devices() {
        let config = AhaLinearAttentionConfig::new(24, 4, 5).with_n_kv_heads(Some(2));
        let mut module = config.with_rope(Some(RopeConfig::new(32))).init(&device).unwrap();
        let scale = |seed| Array::new([4, 6], values(24, seed).into_iter().map(f64::from).collect());
        module.near_scale = Param::from_tensor(noise([24], 8, &device));
        module.far_scale = Param::from_tensor(noise([24], 9, &device));
        let hidden = noise([2, 23, 24], 7, &device).mul_scalar(3.0);
        let found = module.forward(hidden.clone()).unwrap();
        let shares = found.routing.far_share().unwrap();
        assert!(shares.iter().any(|&share| share > 0.0) && shares.iter().any(|&share| share < 1.0));
        let projections = &module.projections;
        let layer = AhaLinearLayer {
            open: RattentionLayer {
                projections: Projections {
                    heads: 4,
                    kv_heads: 2,
                    wq: weight(&projections.q_proj),
                    wk: weight(&projections.k_proj),
                    wv: weight(&projections.v_proj),
                    wo: weight(&projections.o_proj),
                    qk_norm: None,
                    rope_theta: Some(1e4),
                },
                window: Window::new(5).unwrap(),
                map: FeatureMap::SoftmaxPair,
                near_scale: scale(8),
                far_scale: scale(9),
                epsilon: 1e-8,
            },
            router_weight: weight(&module.router),
            router_bias: None,
        };
        let hidden = Array::new([2, 23, 24], host(hidden).into_iter().map(f64::from).collect());
        let expected = layer.forward(&hidden).output.map(|x| x as f32).into_vec();
        let expected = Tensor::<3>::from_data(TensorData::new(expected, [2, 23, 24]), &device);
        assert_close(found.output, expected, 1e-4);
    }
}

#[test]
fn impossible_calls_are_refused() {
    let device = Device::flex();
    assert_eq!(AhaLinearAttentionConfig::new(16, 4, 0).init(&device).unwrap_err(), Error::EmptyWindow);
    let [query, key, value] = qkv([2, 1], [6, 6], 8, &device);
    let scales = [1, 2].map(|seed| noise([16], seed, &device));
    let inputs = AhaLinearInputs { near: [query.clone(), key.clone()], far: [query, key], value, scales };
    let routes = Tensor::<3, Int>::zeros([2, 1, 6], (&device, DType::I32));
    let three = Routing::from_routes(routes, 3).unwrap();
    let options = AttentionOptions::default();
    let error = aha_linear_attention(inputs, &three, Window::new(2).unwrap(), &options).unwrap_err();
    assert!(matches!(error, Error::Option { option: "reaches of the routes", .. }), "{error}");
}
