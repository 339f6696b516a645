//! Gradients of attention against Burn's own autodiff of the same computation, composed of its operations on Flex.

use bifocal_burn::{
    AhaAttentionConfig, AttentionOptions, Error, RopeConfig, Window, attention, composed, full_attention,
    mean_penalty, windowed_attention,
};
use burn::{
    module::Param,
    tensor::{
        DType, Device, Gradients, Tensor, module::attention as burns_attention, ops::AttentionModuleOptions,
    },
};
use rstest::rstest;

use crate::common::{assert_close, devices, noise, noise_of, qkv};

pub(crate) const TOLERANCE: f32 = 3e-5;

fn window(keys: usize) -> Window {
    Window::new(keys).unwrap()
}

fn plain() -> AttentionOptions {
    AttentionOptions::default()
}

/// A copy that a gradient is asked of.
pub(crate) fn leaf<const RANK: usize>(tensor: &Tensor<RANK>, device: &Device) -> Tensor<RANK> {
    tensor.clone().to_device(device).autodiff().require_grad()
}

/// A loss to which every element matters differently.
pub(crate) fn loss<const RANK: usize>(out: Tensor<RANK>) -> Tensor<1> {
    let weights = noise(out.dims(), 77, &out.device().inner());
    (out.cast(DType::F32) * weights).sum()
}

/// The gradient that a backward pass left for a leaf.
#[track_caller]
pub(crate) fn gradient<const RANK: usize>(leaf: &Tensor<RANK>, gradients: &Gradients) -> Tensor<RANK> {
    leaf.grad(gradients).expect("a gradient")
}

/// The gradients of the inputs of an attention on a device.
pub(crate) fn gradients(
    inputs: &[Tensor<4>; 3],
    device: &Device,
    attend: impl FnOnce(Tensor<4>, Tensor<4>, Tensor<4>) -> Tensor<4>,
) -> [Tensor<4>; 3] {
    let leaves = inputs.each_ref().map(|tensor| leaf(tensor, device));
    let [query, key, value] = leaves.clone();
    let gradients = loss(attend(query, key, value)).backward();
    leaves.map(|leaf| gradient(&leaf, &gradients))
}

#[track_caller]
pub(crate) fn assert_all_close(found: [Tensor<4>; 3], expected: &[Tensor<4>; 3], tolerance: f32) {
    for (found, expected) in found.into_iter().zip(expected) {
        assert_close(found, expected.clone(), tolerance);
    }
}

#[rstest]
#[case::mha([2, 2], [19, 19])]
#[case::gqa([6, 2], [19, 19])]
#[case::fewer_queries([4, 1], [5, 19])]
#[case::more_queries([2, 1], [20, 9])]
fn dense_gradients_are_those_of_the_composition(#[case] heads: [usize; 2], #[case] tokens: [usize; 2]) {
    let flex = Device::flex();
    let inputs = qkv(heads, tokens, 16, &flex);
    for options in [plain(), plain().with_softcap(5.0).with_scale(0.5)] {
        for keys in [None, Some(4), Some(1000)] {
            let expected = gradients(&inputs, &flex, |q, k, v| match keys {
                Some(keys) => composed::windowed_attention(q, k, v, window(keys), &options).unwrap(),
                None => composed::full_attention(q, k, v, &options).unwrap(),
            });
            for device in devices() {
                let found = gradients(&inputs, &device, |q, k, v| {
                    let out = match keys {
                        Some(keys) => windowed_attention(q, k, v, window(keys), &options).unwrap(),
                        None => full_attention(q, k, v, &options).unwrap(),
                    };
                    assert!(out.is_tracked() && out.device() == device);
                    out
                });
                assert_all_close(found, &expected, TOLERANCE);
            }
        }
    }
}

#[rstest]
#[case::causal(true)]
#[case::to_all(false)]
fn the_drop_in_has_the_gradients_that_burn_has(#[case] is_causal: bool) {
    let flex = Device::flex();
    let [q, k, v] = qkv([3, 3], [11, 17], 16, &flex);
    // Values may be of another length than keys.
    let inputs = [q, k, v.narrow(3, 0, 12)];
    let options = AttentionModuleOptions { scale: Some(0.3), softcap: Some(2.0), is_causal };
    let expected = gradients(&inputs, &flex, |q, k, v| burns_attention(q, k, v, None, None, options));
    for device in devices() {
        let found = gradients(&inputs, &device, |q, k, v| attention(q, k, v, None, None, options).unwrap());
        assert_all_close(found, &expected, TOLERANCE);
    }
}

#[test]
fn views_have_gradients() {
    let flex = Device::flex();
    // As projections leave them, [B, T, H, D] in memory; keys and values of one head, shown to all.
    let inputs = [([2, 13, 4, 8], 1), ([2, 13, 1, 8], 2), ([2, 13, 1, 8], 3)];
    let inputs = inputs.map(|(shape, seed)| noise(shape, seed, &flex).mul_scalar(2.0));
    let heads_first = |rows: Tensor<4>| rows.swap_dims(1, 2).expand([2, 4, 13, 8]);
    let expected = gradients(&inputs, &flex, |q, k, v| {
        let [q, k, v] = [q, k, v].map(heads_first);
        let out = composed::windowed_attention(q, k, v, window(5), &plain()).unwrap();
        out.swap_dims(1, 2).reshape([2, 13, 1, 32])
    });
    for device in devices() {
        let found = gradients(&inputs, &device, |q, k, v| {
            let [q, k, v] = [q, k, v].map(heads_first);
            let out = windowed_attention(q, k, v, window(5), &plain()).unwrap();
            out.swap_dims(1, 2).reshape([2, 13, 1, 32])
        });
        assert_all_close(found, &expected, TOLERANCE);
    }
}

#[rstest]
#[case(DType::F16, 1.0 / 512.0)]
#[case(DType::BF16, 1.0 / 64.0)]
fn gradients_of_half_precision_are_half_precision(#[case] dtype: DType, #[case] tolerance: f32) {
    let flex = Device::flex();
    // The same rounded inputs, computed in f32.
    let inputs = [1, 2, 3].map(|seed| noise_of([1, 2, 23, 16], seed, &flex, dtype));
    let precise = inputs.each_ref().map(|tensor| tensor.clone().cast(DType::F32));
    let expected = gradients(&precise, &flex, |q, k, v| composed::full_attention(q, k, v, &plain()).unwrap());
    for device in [flex, Device::cpu()] {
        let found = gradients(&inputs, &device, |q, k, v| full_attention(q, k, v, &plain()).unwrap());
        assert!(found.iter().all(|gradient| gradient.dtype() == dtype));
        assert_all_close(found, &expected, tolerance);
    }
}

#[test]
fn sink_logits_have_gradients() {
    let flex = Device::flex();
    let inputs = qkv([4, 2], [20, 9], 16, &flex);
    let sinks = noise([4], 4, &flex);
    let of = |device: &Device, ours: bool| {
        let sinks = leaf(&sinks, device);
        let leaves = inputs.each_ref().map(|tensor| leaf(tensor, device));
        let [q, k, v] = leaves.clone();
        let options = plain().with_sink_logits(sinks.clone());
        let out = match ours {
            true => windowed_attention(q, k, v, window(4), &options).unwrap(),
            false => composed::windowed_attention(q, k, v, window(4), &options).unwrap(),
        };
        let gradients = loss(out.clone()).backward();
        (out.inner(), leaves.map(|leaf| gradient(&leaf, &gradients)), gradient(&sinks, &gradients))
    };
    let (out, expected, of_sinks) = of(&flex, false);
    for device in devices() {
        let (found, found_gradients, found_of_sinks) = of(&device, true);
        assert_close(found, out.clone(), TOLERANCE);
        assert_all_close(found_gradients, &expected, TOLERANCE);
        assert_close(found_of_sinks, of_sinks.clone(), TOLERANCE);
    }
    let [q, k, v] = inputs;
    let options = plain().with_sink_logits(noise([3], 4, &flex));
    for found in [
        full_attention(q.clone(), k.clone(), v.clone(), &options),
        composed::full_attention(q, k, v, &options),
    ] {
        assert!(matches!(found, Err(Error::Shape { tensor: "the sink logits", .. })), "{found:?}");
    }
}

#[test]
fn constants_stay_constants() {
    let flex = Device::flex();
    let [q, k, v] = qkv([2, 2], [9, 9], 16, &flex);
    let expected = gradients(&[q.clone(), k.clone(), v.clone()], &flex, |q, k, v| {
        composed::full_attention(q, k, v, &plain()).unwrap()
    });
    // Keys without autodiff, values with autodiff but without a gradient.
    let (query, value) = (leaf(&q, &flex), v.clone().autodiff());
    let out = full_attention(query.clone(), k.clone(), value.clone(), &plain()).unwrap();
    let gradients = loss(out).backward();
    assert_close(gradient(&query, &gradients), expected[0].clone(), TOLERANCE);
    assert!(value.grad(&gradients).is_none());
    // Nothing asks for a gradient: nothing is recorded, and the device stays what it is.
    let out = full_attention(q.clone().autodiff(), k.clone(), v.clone(), &plain()).unwrap();
    assert!(out.is_autodiff() && !out.is_tracked());
    // The same tensor three times: its gradient is the sum.
    let all = leaf(&q, &flex);
    let gradients = loss(full_attention(all.clone(), all.clone(), all.clone(), &plain()).unwrap()).backward();
    let found = gradient(&all, &gradients);
    let all = leaf(&q, &flex);
    let composed = composed::full_attention(all.clone(), all.clone(), all.clone(), &plain()).unwrap();
    assert_close(found, gradient(&all, &loss(composed).backward()), TOLERANCE);
}

#[test]
fn two_runs_agree_bit_for_bit_and_checkpointing_changes_nothing() {
    let module = |device: &Device| {
        let config = AhaAttentionConfig::new(24, 4, 5).with_n_kv_heads(Some(2));
        let mut module = config.with_rope(Some(RopeConfig::new(32))).init(device).unwrap();
        let weights = |shape, seed| Param::from_tensor(noise(shape, seed, device).mul_scalar(0.3));
        let projections = &mut module.projections;
        projections.q_proj.weight = weights([24, 24], 1);
        projections.k_proj.weight = weights([24, 12], 2);
        projections.v_proj.weight = weights([24, 12], 3);
        projections.o_proj.weight = weights([24, 24], 4);
        module.router.weight = weights([24, 4], 5);
        module
    };
    let run = |device: Device| {
        let module = module(&device);
        let hidden = noise([2, 23, 24], 7, &device).mul_scalar(3.0).require_grad();
        // The layer's input is the output of something cheap.
        let forward = module.forward(hidden.clone().mul_scalar(1.5)).unwrap();
        let strategy = forward.output.gradient_checkpointing_strategy();
        assert_eq!(strategy, device.gradient_checkpointing_strategy());
        let gradients = (loss(forward.output) + mean_penalty(&forward.routing).unwrap()).backward();
        let q_proj = module.projections.q_proj.weight.val();
        let router = module.router.weight.val();
        (gradient(&hidden, &gradients), gradient(&q_proj, &gradients), gradient(&router, &gradients))
    };
    let device = Device::flex().autodiff();
    let (hidden, q_proj, router) = run(device.clone());
    for device in [device.clone(), device.gradient_checkpointing()] {
        let again = run(device);
        again.0.into_data().assert_eq(&hidden.to_data(), true);
        again.1.into_data().assert_eq(&q_proj.to_data(), true);
        again.2.into_data().assert_eq(&router.to_data(), true);
    }
}

#[test]
fn several_ways_to_checkpoint_are_refused() {
    let flex = Device::flex();
    let [q, k, v] = qkv([2, 2], [5, 5], 16, &flex);
    let strategic = Device::flex().autodiff().gradient_checkpointing();
    let key = noise(k.dims(), 2, &strategic);
    let found = full_attention(q.clone().autodiff(), key.clone(), v.clone(), &plain());
    assert!(matches!(found, Err(Error::Option { option: "gradient checkpointing", .. })), "{found:?}");
    // One that checkpoints and constants go together.
    assert!(full_attention(q, key, v, &plain()).unwrap().is_autodiff());
}
