//! Modules against compositions of Burn's own operations with the same weights, on Flex; once, small, on wgpu, where
//! Burn tunes every shape of a matrix product for seconds. (Its `cpu` device needs seconds for the product itself; the
//! functions that the modules call are tested on all devices.)

use bifocal_burn::{
    AhaAttentionConfig, AttentionOptions, Error, GateOptions, L2aAttentionConfig, MultiWindowAttentionConfig,
    Projections, RopeConfig, Window, composed,
};
use burn::{
    module::{Module, Param},
    nn::{Linear, RotaryEncoding},
    tensor::{Device, Tensor},
};
use rstest::rstest;

use crate::common::{assert_close, host, noise, wgpu};

const TOLERANCE: f32 = 1e-5;

/// The weights of a linear layer, applied by hand.
fn linear(hidden: &Tensor<3>, layer: &Linear) -> Tensor<3> {
    let out = hidden.clone().matmul(layer.weight.val().unsqueeze());
    match &layer.bias {
        Some(bias) => out + bias.val().unsqueeze(),
        None => out,
    }
}

/// Root-mean-square norm over the last dimension, by hand.
pub(crate) fn norm<const RANK: usize>(x: &Tensor<RANK>, gamma: Tensor<1>, epsilon: f64) -> Tensor<RANK> {
    let mean = x.clone().powi_scalar(2).mean_dim(RANK - 1).add_scalar(epsilon);
    x.clone().div(mean.sqrt()).mul(gamma.unsqueeze())
}

/// Query, key and value by hand, from the module's weights.
pub(crate) fn project(
    hidden: &Tensor<3>,
    projections: &Projections,
    rope: Option<&RotaryEncoding>,
) -> [Tensor<4>; 3] {
    let [batch, tokens, _] = hidden.dims();
    let dim = projections.head_dim;
    let split =
        |layer, heads| linear(hidden, layer).reshape([batch, tokens, heads, dim]).permute([0, 2, 1, 3]);
    let mut q = split(&projections.q_proj, projections.n_heads);
    let mut k = split(&projections.k_proj, projections.n_kv_heads);
    if let (Some(q_norm), Some(k_norm)) = (&projections.q_norm, &projections.k_norm) {
        q = norm(&q, q_norm.gamma.val(), q_norm.epsilon);
        k = norm(&k, k_norm.gamma.val(), k_norm.epsilon);
    }
    if let Some(rope) = rope {
        (q, k) = (rope.forward(q), rope.forward(k));
    }
    [q, k, split(&projections.v_proj, projections.n_kv_heads)]
}

pub(crate) fn output(out: Tensor<4>, layer: &Linear) -> Tensor<3> {
    let [batch, heads, tokens, dim] = out.dims();
    linear(&out.permute([0, 2, 1, 3]).reshape([batch, tokens, heads * dim]), layer)
}

fn window(keys: usize) -> Window {
    Window::new(keys).unwrap()
}

#[rstest]
#[case::plain(AhaAttentionConfig::new(24, 4, 5))]
#[case::all(
    AhaAttentionConfig::new(24, 4, 5)
        .with_n_kv_heads(Some(2))
        .with_head_dim(Some(8))
        .with_rope(Some(RopeConfig::new(64).with_theta(100.0)))
        .with_softcap(Some(2.0))
        .with_bias(true)
        .with_output_bias(true)
        .with_n_router_heads(Some(1))
        .with_router_bias_init(Some(0.1))
)]
#[case::window_beyond_the_sequence(AhaAttentionConfig::new(24, 4, 500))]
fn aha_is_its_composition(#[case] config: AhaAttentionConfig) {
    let device = Device::flex();
    let module = config.init(&device).unwrap();
    let hidden = noise([2, 23, 24], 7, &device).mul_scalar(3.0);
    let found = module.forward(hidden.clone()).unwrap();

    let router = &module.router;
    let bias = router.bias.as_ref().map(|bias| bias.val());
    let (scores, routes) =
        composed::linear_gate(hidden.clone(), router.weight.val(), bias, GateOptions::aha()).unwrap();
    let [q, k, v] = project(&hidden, &module.projections, module.rope.as_ref());
    let options = match config.softcap {
        Some(cap) => AttentionOptions::default().with_softcap(cap),
        None => AttentionOptions::default(),
    };
    let out = composed::aha_attention(q, k, v, routes, window(config.window), &options).unwrap();
    assert_close(found.output, output(out, &module.projections.o_proj), TOLERANCE);
    assert_close(found.routing.scores().unwrap().unwrap(), scores, TOLERANCE);
    let share = found.routing.far_share().unwrap();
    assert!(share.iter().any(|&share| 0.0 < share && share < 1.0), "all one way: {share:?}");
}

#[test]
fn multi_window_is_its_composition() {
    let config = MultiWindowAttentionConfig::new(24, 4, vec![2, 9])
        .with_n_kv_heads(Some(2))
        .with_rope(Some(RopeConfig::new(32)))
        .with_router_bias_init(Some(0.2));
    let device = Device::flex();
    let module = config.init(&device).unwrap();
    let hidden = noise([2, 23, 24], 8, &device).mul_scalar(3.0);
    let found = module.forward(hidden.clone()).unwrap();
    assert_eq!((found.routing.shape(), found.routing.reaches()), ([2, 4, 23], 3));

    let bias = module.router.bias.as_ref().unwrap().val();
    assert_eq!(host(bias.clone()), [0.0, 0.0, 0.2].repeat(4));
    let weight = module.router.weight.val();
    let (scores, routes) = composed::linear_choice(hidden.clone(), weight, Some(bias), 3).unwrap();
    assert_close(found.routing.scores().unwrap().unwrap(), scores, TOLERANCE);
    let [q, k, v] = project(&hidden, &module.projections, module.rope.as_ref());
    let windows = [window(2), window(9)];
    let options = AttentionOptions::default();
    let out = composed::multi_window_attention(q, k, v, routes, &windows, &options).unwrap();
    assert_close(found.output, output(out, &module.projections.o_proj), TOLERANCE);
    let taken = found.routing.to_host().unwrap();
    assert!((0..3).all(|reach| taken.contains(&reach)), "not every reach was taken");
}

#[rstest]
#[case::as_in_the_paper(true, 0.1)]
#[case::without_qk_norm(false, 0.7)]
fn l2a_is_its_composition(#[case] qk_norm: bool, #[case] temperature: f32) {
    let config = L2aAttentionConfig::new(24, 4, 5)
        .with_n_kv_heads(Some(2))
        .with_rope(Some(RopeConfig::new(32)))
        .with_qk_norm(qk_norm)
        .with_temperature(temperature);
    let device = Device::flex();
    let mut module = config.init(&device).unwrap();
    assert_eq!(module.local.q_norm.is_some(), qk_norm);
    let hidden = noise([2, 23, 24], 9, &device);
    // Norms that do something.
    module.local_norm.gamma = Param::from_tensor(noise([24], 1, &device).add_scalar(2.0));
    module.global_norm.gamma = Param::from_tensor(noise([24], 2, &device).add_scalar(2.0));
    for projections in [&mut module.local, &mut module.global] {
        for (seed, norm) in [&mut projections.q_norm, &mut projections.k_norm].into_iter().enumerate() {
            let gamma = || Param::from_tensor(noise([6], 10 + seed as u64, &device).add_scalar(2.0));
            norm.iter_mut().for_each(|norm| norm.gamma = gamma());
        }
    }

    // At its start every token attends globally; then with a router that goes both ways.
    let first = module.forward(hidden.clone()).unwrap();
    assert_eq!(first.routing.far_share().unwrap(), [1.0, 1.0]);
    module.router.weight = Param::from_tensor(noise([24, 1], 3, &device));
    let found = module.forward(hidden.clone()).unwrap();
    let share = found.routing.far_share().unwrap();
    assert!(share.iter().all(|&share| 0.0 < share && share < 1.0), "one way: {share:?}");

    let options = AttentionOptions::default();
    let rope = module.rope.as_ref();
    let u1 = norm(&hidden, module.local_norm.gamma.val(), 1e-6);
    let [q, k, v] = project(&u1, &module.local, rope);
    let near = composed::windowed_attention(q, k, v, window(5), &options).unwrap();
    let x1 = hidden + output(near, &module.local.o_proj);
    let u2 = norm(&x1, module.global_norm.gamma.val(), 1e-6);
    let weight = module.router.weight.val();
    let gate = GateOptions::l2a().with_temperature(temperature);
    let (scores, routes) = composed::linear_gate(u2.clone(), weight, None, gate).unwrap();
    // A temperature of 0.1 magnifies the rounding of logits tenfold.
    assert_close(found.routing.scores().unwrap().unwrap(), scores, 10.0 * TOLERANCE);
    let [q, k, v] = project(&u2, &module.global, rope);
    let far = composed::global_attention(q, k, v, routes, 2, &options).unwrap();
    let gates: Vec<bool> = found.routing.to_host().unwrap().iter().map(|&gate| gate == 1).collect();
    let expected = x1.clone() + output(far, &module.global.o_proj);
    assert_close(found.output.clone(), expected, TOLERANCE);
    // A closed gate leaves the token as the local sub-layer made it.
    let (out, x1) = (host(found.output), host(x1));
    for (token, &open) in gates.iter().enumerate() {
        let row = token * 24..(token + 1) * 24;
        let change = out[row.clone()].iter().zip(&x1[row]).map(|(a, b)| (a - b).abs());
        let change = change.fold(0.0, f32::max);
        assert_eq!(change > 1e-4, open, "token {token} changed by {change}");
    }
}

#[test]
fn modules_move_to_a_gpu() {
    let flex = Device::flex();
    let Some(device) = wgpu() else { return };
    // Shapes of the same matrix products for all three.
    let rope = Some(RopeConfig::new(16));
    let hidden = noise([1, 16, 16], 6, &flex);
    let there = || hidden.clone().to_device(&device);

    let config = AhaAttentionConfig::new(16, 2, 3).with_rope(rope.clone()).with_n_router_heads(Some(1));
    let module = config.init(&flex).unwrap();
    let expected = module.forward(hidden.clone()).unwrap();
    let found = module.to_device(&device).forward(there()).unwrap();
    assert_eq!((found.output.device(), found.routing.device()), (device.clone(), &device));
    assert_eq!(found.routing.to_host().unwrap(), expected.routing.to_host().unwrap());
    assert_close(found.output, expected.output, TOLERANCE);

    let config = MultiWindowAttentionConfig::new(16, 2, vec![2, 5]).with_rope(rope.clone());
    let module = config.init(&flex).unwrap();
    let expected = module.forward(hidden.clone()).unwrap();
    let found = module.to_device(&device).forward(there()).unwrap();
    assert_eq!(found.routing.to_host().unwrap(), expected.routing.to_host().unwrap());
    assert_close(found.output, expected.output, TOLERANCE);

    let mut module = L2aAttentionConfig::new(16, 2, 3).with_rope(rope).init(&flex).unwrap();
    module.router.weight = Param::from_tensor(noise([16, 1], 3, &flex));
    let expected = module.forward(hidden.clone()).unwrap();
    let found = module.to_device(&device).forward(there()).unwrap();
    assert_eq!(found.routing.to_host().unwrap(), expected.routing.to_host().unwrap());
    assert_close(found.output, expected.output, TOLERANCE);
}

#[rstest]
#[case::all_far(1e4, 1.0)]
#[case::all_near(-1e4, 0.0)]
fn a_forced_gate_is_dense_attention(#[case] bias: f32, #[case] share: f64) {
    let device = Device::flex();
    let config = AhaAttentionConfig::new(16, 2, 3).with_router_bias_init(Some(bias));
    let module = config.init(&device).unwrap();
    let hidden = noise([1, 17, 16], 5, &device);
    let found = module.forward(hidden.clone()).unwrap();
    assert_eq!(found.routing.far_share().unwrap(), [share; 2]);
    let [q, k, v] = project(&hidden, &module.projections, None);
    let options = AttentionOptions::default();
    let dense = match share == 1.0 {
        true => composed::full_attention(q, k, v, &options),
        false => composed::windowed_attention(q, k, v, window(3), &options),
    };
    let expected = output(dense.unwrap(), &module.projections.o_proj);
    assert_close(found.output, expected, TOLERANCE);
}

#[test]
fn hidden_states_that_do_not_fit_are_refused() {
    let device = Device::flex();
    let rope = Some(RopeConfig::new(8));
    let module = AhaAttentionConfig::new(16, 2, 3).with_rope(rope).init(&device).unwrap();
    let forward = |shape| module.forward(noise(shape, 1, &device)).unwrap_err();
    assert!(matches!(forward([1, 8, 15]), Error::Shape { tensor: "the hidden states", .. }));
    assert!(matches!(forward([1, 9, 16]), Error::TooLarge { size: 9, limit: 8, .. }));
    assert!(matches!(forward([1, 0, 16]), Error::EmptyDimension { .. }));
    let elsewhere = module.forward(noise([1, 8, 16], 1, &Device::cpu())).unwrap_err();
    assert!(matches!(elsewhere, Error::DeviceMismatch { .. }), "{elsewhere:?}");
    let halves = noise([1, 8, 16], 1, &device).cast(burn::tensor::DType::F16);
    let found = module.forward(halves).unwrap_err();
    assert!(matches!(found, Error::Option { option: "dtype", .. }), "{found:?}");
}

#[test]
fn impossible_configurations_are_refused() {
    let device = Device::flex();
    let aha = || AhaAttentionConfig::new(16, 4, 3);
    let refused = |config: AhaAttentionConfig| config.init(&device).unwrap_err();
    assert_eq!(refused(AhaAttentionConfig::new(16, 4, 0)), Error::EmptyWindow);
    assert_eq!(refused(aha().with_n_kv_heads(Some(3))), Error::HeadRatio { heads: 4, kv_heads: 3 });
    let empty = |dimension| Error::EmptyDimension { dimension };
    assert_eq!(refused(aha().with_n_kv_heads(Some(0))), empty("n_kv_heads"));
    assert_eq!(refused(aha().with_head_dim(Some(0))), empty("head_dim"));
    assert_eq!(refused(AhaAttentionConfig::new(0, 4, 3)), empty("d_model"));
    assert_eq!(refused(AhaAttentionConfig::new(16, 0, 3)), empty("n_heads"));
    assert_eq!(refused(aha().with_rope(Some(RopeConfig::new(0)))), empty("max_seq_len"));
    let option = |error: Error| match error {
        Error::Option { option, .. } => option,
        other => panic!("{other:?}"),
    };
    let odd = aha().with_head_dim(Some(5));
    assert!(odd.init(&device).is_ok(), "an odd head dim is fine without rotary positions");
    assert_eq!(option(refused(odd.with_rope(Some(RopeConfig::new(8))))), "head_dim");
    let theta = RopeConfig::new(8).with_theta(-1.0);
    assert_eq!(option(refused(aha().with_rope(Some(theta)))), "theta");
    assert_eq!(option(refused(AhaAttentionConfig::new(17, 4, 3))), "d_model");
    assert_eq!(option(refused(aha().with_softcap(Some(0.0)))), "softcap");
    assert_eq!(option(refused(aha().with_n_router_heads(Some(3)))), "n_router_heads");
    assert_eq!(option(refused(aha().with_router_bias_init(Some(f32::NAN)))), "router_bias_init");

    let multi = |windows| MultiWindowAttentionConfig::new(16, 4, windows).init(&device).unwrap_err();
    assert_eq!(option(multi(vec![])), "windows");
    assert_eq!(option(multi(vec![3, 3])), "windows");
    assert_eq!(option(multi((1..=32).collect())), "windows");
    assert_eq!(multi(vec![0, 3]), Error::EmptyWindow);

    let l2a = || L2aAttentionConfig::new(16, 4, 3);
    let refused = |config: L2aAttentionConfig| config.init(&device).unwrap_err();
    assert_eq!(refused(L2aAttentionConfig::new(16, 4, 0)), Error::EmptyWindow);
    assert_eq!(option(refused(l2a().with_norm_epsilon(0.0))), "norm_epsilon");
    assert_eq!(option(refused(l2a().with_temperature(0.0))), "temperature");
}

#[test]
fn defaults_are_those_of_the_papers() {
    let device = Device::flex();
    let aha = AhaAttentionConfig::new(32, 4, 128).init(&device).unwrap();
    assert!(aha.router.bias.is_none());
    assert_eq!(aha.router.weight.dims(), [32, 4]);
    let ahnsa = AhaAttentionConfig::new(32, 4, 128).with_router_bias_init(Some(4.0));
    assert_eq!(host(ahnsa.init(&device).unwrap().router.bias.unwrap().val()), [4.0; 4]);
    let l2a = L2aAttentionConfig::new(32, 4, 4095).init(&device).unwrap();
    assert_eq!(l2a.router.weight.dims(), [32, 1]);
    assert!(host(l2a.router.weight.val()).iter().all(|&w| w == 0.0));
    assert_eq!(l2a.temperature, 0.1);
    assert!(l2a.local.q_norm.is_some() && l2a.local.o_proj.bias.is_none());
}
