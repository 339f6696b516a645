//! Modules without a router, gates with another threshold, and modules in half precision.

use bifocal_burn::{
    AhaAttentionConfig, AttentionOptions, CausalAttentionConfig, Error, L2aAttentionConfig, RopeConfig,
    Window, composed,
};
use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Device, Tensor},
};
use rstest::rstest;

use crate::common::{assert_close, host, noise};

#[rstest]
#[case::everything(None)]
#[case::a_window(Some(5))]
fn causal_attention_is_its_composition(#[case] window: Option<usize>) {
    let device = Device::flex();
    let config = CausalAttentionConfig::new(24, 4)
        .with_window(window)
        .with_n_kv_heads(Some(2))
        .with_rope(Some(RopeConfig::new(32)))
        .with_softcap(Some(2.0));
    let module = config.init(&device).unwrap();
    let hidden = noise([2, 23, 24], 7, &device).mul_scalar(3.0);
    let found = module.forward(hidden.clone()).unwrap();
    let [q, k, v] = module.projections.project(hidden, module.rope.as_ref());
    let options = AttentionOptions::default().with_softcap(2.0);
    let expected = match window {
        Some(keys) => composed::windowed_attention(q, k, v, Window::new(keys).unwrap(), &options),
        None => composed::full_attention(q, k, v, &options),
    };
    assert_close(found, module.projections.output(expected.unwrap()), 1e-5);
}

#[test]
fn impossible_causal_attention_is_refused() {
    let device = Device::flex();
    let config = CausalAttentionConfig::new(16, 4);
    assert_eq!(config.clone().with_window(Some(0)).init(&device).unwrap_err(), Error::EmptyWindow);
    let error = config.clone().with_qk_norm(true).with_norm_epsilon(0.0).init(&device).unwrap_err();
    assert!(matches!(error, Error::Option { option: "norm_epsilon", .. }), "{error}");
    let module = config.with_rope(Some(RopeConfig::new(8))).init(&device).unwrap();
    let error = module.forward(noise([1, 9, 16], 1, &device)).unwrap_err();
    assert!(matches!(error, Error::TooLarge { size: 9, limit: 8, .. }), "{error}");
}

/// A score of `sigmoid(1)`, about 0.73, against thresholds below and above it.
#[rstest]
#[case(0.7, 1.0)]
#[case(0.75, 0.0)]
fn thresholds_decide_what_looks_far(#[case] threshold: f32, #[case] share: f64) {
    let device = Device::flex();
    let hidden = noise([1, 9, 16], 1, &device);
    let aha = AhaAttentionConfig::new(16, 2, 3).with_threshold(threshold).with_router_bias_init(Some(1.0));
    let mut aha = aha.init(&device).unwrap();
    aha.router.weight = Param::from_tensor(Tensor::zeros([16, 2], &device));
    assert_eq!(aha.forward(hidden.clone()).unwrap().routing.far_share().unwrap(), [share; 2]);

    let l2a = L2aAttentionConfig::new(16, 2, 3).with_threshold(threshold).with_temperature(1.0);
    let mut l2a = l2a.init(&device).unwrap();
    l2a.router.bias = Some(Param::from_tensor(Tensor::ones([1], &device)));
    assert_eq!(l2a.forward(hidden).unwrap().routing.far_share().unwrap(), [share]);
}

#[rstest]
#[case(0.0)]
#[case(1.0)]
#[case(f32::NAN)]
fn thresholds_that_nothing_passes_or_misses_are_refused(#[case] threshold: f32) {
    let device = Device::flex();
    let option = |error: Error| match error {
        Error::Option { option, .. } => option,
        other => panic!("{other:?}"),
    };
    let aha = AhaAttentionConfig::new(16, 2, 3).with_threshold(threshold).init(&device);
    assert_eq!(option(aha.unwrap_err()), "threshold");
    let l2a = L2aAttentionConfig::new(16, 2, 3).with_threshold(threshold).init(&device);
    assert_eq!(option(l2a.unwrap_err()), "threshold");
}

struct Halve;

impl ModuleMapper for Halve {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(DType::BF16))
    }
}

#[test]
fn modules_with_positions_run_in_half_precision() {
    let device = Device::flex();
    let config = CausalAttentionConfig::new(32, 2).with_rope(Some(RopeConfig::new(32)));
    let module = config.init(&device).unwrap();
    let hidden = noise([1, 23, 32], 7, &device);
    let expected = module.forward(hidden.clone()).unwrap();
    let found = module.map(&mut Halve).forward(hidden.cast(DType::BF16)).unwrap();
    assert_eq!(found.dtype(), DType::BF16);
    // Eight bits of mantissa, through four products.
    let (found, expected) = (host(found), host(expected));
    let largest = expected.iter().fold(0f32, |top, x| top.max(x.abs()));
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() < 0.03 * largest, "{found}, expected {expected} (of {largest})");
    }
}
