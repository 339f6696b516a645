//! RATTENTION: its parts against Burn's own autodiff of the same computation, and its module against the oracle.

use bifocal_burn::{
    Error, FeatureMap, RattentionAttentionConfig, RopeConfig, Window, composed, linear_attention,
    linear_attention_with, norm_sum,
};
use bifocal_reference::{Array, Projections, RattentionLayer};
use burn::{
    nn::Linear,
    tensor::{DType, Device, Tensor, TensorData},
};
use rstest::rstest;

use crate::{
    common::{assert_close, devices, host, noise, noise_of, qkv, values},
    gradients::{TOLERANCE, gradient, leaf, loss},
};

#[rstest]
#[case::grouped([4, 2], [21, 21])]
#[case::more_keys([2, 2], [5, 30])]
#[case::more_queries([2, 1], [30, 9])]
fn linear_attention_has_the_gradients_that_burn_has(#[case] heads: [usize; 2], #[case] tokens: [usize; 2]) {
    let burns = Device::flex();
    let window = Window::rattention(3).unwrap();
    let inputs = qkv(heads, tokens, 16, &burns);
    let theirs = inputs.each_ref().map(|tensor| leaf(tensor, &burns));
    let [q, k, v] = theirs.clone();
    let expected = composed::linear_attention(q, k, v, window).unwrap();
    let expected_gradients = loss(expected.clone()).backward();
    for device in devices() {
        let ours = inputs.each_ref().map(|tensor| leaf(tensor, &device));
        let [q, k, v] = ours.clone();
        let found = linear_attention(q, k, v, window).unwrap();
        let gradients = loss(found.clone()).backward();
        assert_close(found.inner(), expected.clone().inner(), TOLERANCE);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_close(gradient(ours, &gradients), gradient(theirs, &expected_gradients), TOLERANCE);
        }
    }
}

#[test]
fn sums_of_norms_have_the_gradients_that_burn_has() {
    let burns = Device::flex();
    let shape = [2, 3, 150, 8];
    let branches = [noise(shape, 1, &burns), noise(shape, 2, &burns)];
    let scales = [noise([24], 3, &burns), noise([24], 4, &burns)];
    let run = |device: &Device, composed_of_burn: bool| {
        let branches = branches.each_ref().map(|branch| leaf(branch, device));
        let scales = scales.each_ref().map(|scale| leaf(scale, device));
        let ([near, far], [near_scale, far_scale]) = (branches.clone(), scales.clone());
        let out = match composed_of_burn {
            true => composed::norm_sum(near, far, near_scale, far_scale),
            false => norm_sum(near, far, near_scale, far_scale),
        };
        let out = out.unwrap();
        let gradients = loss(out.clone()).backward();
        let branches = branches.map(|branch| gradient(&branch, &gradients));
        (out.inner(), branches, scales.map(|scale| gradient(&scale, &gradients)))
    };
    let (expected, d_branches, d_scales) = run(&burns, true);
    for device in devices() {
        let (found, branches, scales) = run(&device, false);
        assert_close(found, expected.clone(), TOLERANCE);
        for (found, expected) in branches.into_iter().zip(d_branches.clone()) {
            assert_close(found, expected, TOLERANCE);
        }
        for (found, expected) in scales.into_iter().zip(d_scales.clone()) {
            assert_close(found, expected, TOLERANCE);
        }
    }
}

/// A matrix as the oracle takes it.
pub(crate) fn weight(linear: &Linear) -> Array<f64, 2> {
    let weight = linear.weight.val();
    let shape = weight.dims();
    Array::new(shape, host(weight).into_iter().map(f64::from).collect())
}

#[test]
fn the_module_is_the_oracles_layer() {
    for device in devices() {
        let config = RattentionAttentionConfig::new(24, 4, 5).with_n_kv_heads(Some(2));
        let mut module = config.with_rope(Some(RopeConfig::new(32))).init(&device).unwrap();
        let scale = |seed| Array::new([4, 6], values(24, seed).into_iter().map(f64::from).collect());
        module.near_scale = burn::module::Param::from_tensor(noise([24], 8, &device));
        module.far_scale = burn::module::Param::from_tensor(noise([24], 9, &device));
        let hidden = noise([2, 23, 24], 7, &device).mul_scalar(3.0);
        let found = module.forward(hidden.clone()).unwrap();
        let projections = &module.projections;
        let layer = RattentionLayer {
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
        };
        let hidden = Array::new([2, 23, 24], host(hidden).into_iter().map(f64::from).collect());
        let expected = layer.forward(&hidden).map(|x| x as f32).into_vec();
        let expected = Tensor::<3>::from_data(TensorData::new(expected, [2, 23, 24]), &device);
        assert_close(found, expected, 1e-4);
    }
}

#[test]
fn every_parameter_learns() {
    let device = Device::flex().autodiff();
    let config = RattentionAttentionConfig::new(16, 2, 3).with_qk_norm_epsilon(Some(1e-6));
    let module = config.with_rope(Some(RopeConfig::new(32))).init(&device).unwrap();
    let gradients = loss(module.forward(noise([1, 20, 16], 1, &device)).unwrap()).backward();
    let projections = &module.projections;
    for linear in [&projections.q_proj, &projections.k_proj, &projections.v_proj, &projections.o_proj] {
        assert!(host(gradient(&linear.weight.val(), &gradients)).iter().any(|&x| x != 0.0));
    }
    for scale in [&module.near_scale, &module.far_scale] {
        assert!(host(gradient(&scale.val(), &gradients)).iter().any(|&x| x != 0.0));
    }
}

#[test]
fn half_precision_is_as_good_as_its_inputs() {
    let device = Device::flex();
    let window = Window::new(4).unwrap();
    let [q, k, v] = [1, 2, 3].map(|seed| noise_of([1, 2, 20, 16], seed, &device, DType::BF16));
    let found = linear_attention(q.clone(), k.clone(), v.clone(), window).unwrap();
    assert_eq!(found.dtype(), DType::BF16);
    let [q, k, v] = [q, k, v].map(|tensor| tensor.cast(DType::F32));
    let expected = linear_attention(q, k, v, window).unwrap();
    assert_close(found.cast(DType::F32), expected, 0.01);
}

#[test]
fn impossible_calls_are_refused() {
    let device = Device::flex();
    let config = RattentionAttentionConfig::new(16, 4, 0);
    assert_eq!(config.init(&device).unwrap_err(), Error::EmptyWindow);
    let branch = noise([1, 2, 5, 8], 1, &device);
    let scale = |length| Tensor::<1>::ones([length], &device);
    let error = norm_sum(branch.clone(), branch.clone(), scale(16), scale(8)).unwrap_err();
    assert!(matches!(error, Error::Shape { tensor: "the far scale", .. }), "{error}");
    let other = noise([1, 2, 4, 8], 1, &device);
    let error = norm_sum(branch.clone(), other, scale(16), scale(16)).unwrap_err();
    assert!(matches!(error, Error::Shape { tensor: "the far branch", .. }), "{error}");
}

#[test]
fn another_feature_map_is_another_branch() {
    let device = Device::flex();
    let window = Window::new(2).unwrap();
    let [q, k, v] = qkv([2, 1], [9, 9], 8, &device);
    // Without a map, and with keys of one window, what is left is a plain product over the rest.
    let found = linear_attention_with(q.clone(), k.clone(), v.clone(), window, FeatureMap::Identity).unwrap();
    let scores = q.matmul(k.expand([2, 2, 9, 8]).swap_dims(2, 3)).into_data();
    let scores: Vec<f32> = scores.iter::<f32>().collect();
    let masked: Vec<f32> = scores
        .iter()
        .enumerate()
        .map(|(at, &score)| if at % 9 + 2 <= at / 9 % 9 { score } else { 0.0 })
        .collect();
    let scores = Tensor::<4>::from_data(TensorData::new(masked, [2, 2, 9, 9]), &device);
    assert_close(found, scores.matmul(v.expand([2, 2, 9, 8])), 1e-5);
}
