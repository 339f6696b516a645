//! Tensor functions against the composition of Burn's own operations and the float64 oracle, on every device that
//! computes without a GPU. Matrix products on Burn's `cpu` device take seconds, so expectations come from Flex.

use bifocal_burn::{
    AttentionOptions, Error, GateOptions, Routing, Threshold, Window, aha_attention, attention, composed,
    full_attention, global_attention, linear_choice, linear_gate, multi_window_attention, windowed_attention,
};
use bifocal_core::Reach;
use bifocal_reference::{self as reference, Array, Options};
use burn::tensor::{
    Bool, DType, Device, Int, Tensor, TensorData, module::attention as burns_attention,
    ops::AttentionModuleOptions,
};
use rstest::rstest;

use crate::common::{assert_close, devices, host, mixed_routes, noise, noise_of, qkv, values};

const TOLERANCE: f32 = 1e-5;

fn window(keys: usize) -> Window {
    Window::new(keys).unwrap()
}

fn plain() -> AttentionOptions {
    AttentionOptions::default()
}

#[test]
fn composed_attention_is_the_oracle() {
    let device = Device::flex();
    // More keys than queries, and fewer: the first queries of the latter see nothing and are zero.
    for tokens in [[13, 13], [5, 13], [13, 5]] {
        let [q, k, v] = qkv([4, 2], tokens, 8, &device);
        let array = |tensor: Tensor<4>| {
            let shape = tensor.dims();
            Array::new(shape, host(tensor).into_iter().map(f64::from).collect())
        };
        let [qa, ka, va] = [q.clone(), k.clone(), v.clone()].map(array);
        let options = Options { softcap: Some(3.0), scale: 0.7, ..Options::new(8) };
        for (near, reach) in [(Some(window(3)), Reach::Window(window(3))), (None, Reach::All)] {
            let expected = reference::attention(&qa, &ka, &va, reach, &options).out;
            let data: Vec<f32> = expected.as_slice().iter().map(|&x| x as f32).collect();
            let expected = Tensor::from_data(TensorData::new(data, expected.shape()), &device);
            let options = plain().with_softcap(3.0).with_scale(0.7);
            let (q, k, v) = (q.clone(), k.clone(), v.clone());
            let found = match near {
                Some(near) => composed::windowed_attention(q, k, v, near, &options),
                None => composed::full_attention(q, k, v, &options),
            };
            assert_close(found.unwrap(), expected, TOLERANCE);
        }
    }
}

#[rstest]
#[case::mha([2, 2], [37, 37])]
#[case::gqa([6, 2], [37, 37])]
#[case::fewer_queries([4, 1], [5, 37])]
#[case::more_queries([2, 1], [20, 9])]
fn dense_attention_is_the_composition(#[case] heads: [usize; 2], #[case] tokens: [usize; 2]) {
    let [q, k, v] = qkv(heads, tokens, 16, &Device::flex());
    let options = plain().with_softcap(5.0).with_scale(0.5);
    for device in devices() {
        let there = || [&q, &k, &v].map(|tensor| tensor.clone().to_device(&device));
        for options in [plain(), options.clone()] {
            let expected = composed::full_attention(q.clone(), k.clone(), v.clone(), &options).unwrap();
            let [query, key, value] = there();
            let full = full_attention(query, key, value, &options).unwrap();
            assert_eq!(full.device(), device);
            assert_close(full.clone(), expected.clone(), TOLERANCE);
            for keys in [1, 7, 37, 1000] {
                let [query, key, value] = there();
                let near = windowed_attention(query, key, value, window(keys), &options).unwrap();
                let (q, k, v) = (q.clone(), k.clone(), v.clone());
                let expected = composed::windowed_attention(q, k, v, window(keys), &options).unwrap();
                assert_close(near.clone(), expected, TOLERANCE);
                if keys >= 37 {
                    assert_close(near, full.clone(), TOLERANCE);
                }
            }
        }
    }
}

/// Burn's own attention on Flex against the drop-in on every device: the same call, with a `?` behind it.
#[rstest]
#[case::square([37, 37])]
#[case::fewer_queries([5, 37])]
#[case::more_queries([20, 9])]
fn the_drop_in_gives_what_burn_gives(#[case] tokens: [usize; 2]) {
    let causal = AttentionModuleOptions { is_causal: true, ..Default::default() };
    let gemma = AttentionModuleOptions { scale: Some(0.3), softcap: Some(2.0), ..causal };
    let [q, k, v] = qkv([3, 3], tokens, 16, &Device::flex());
    // Values may be of another length than keys.
    let v = v.narrow(3, 0, 12);
    for options in [causal, gemma, AttentionModuleOptions { is_causal: false, ..gemma }] {
        let expected = burns_attention(q.clone(), k.clone(), v.clone(), None, None, options);
        for device in devices() {
            let [query, key, value] = [&q, &k, &v].map(|tensor| tensor.clone().to_device(&device));
            let found = attention(query, key, value, None, None, options).unwrap();
            assert_eq!(found.device(), device);
            assert_close(found, expected.clone(), TOLERANCE);
            // As projections leave them: [B, T, H, D] in memory.
            let rows = |tensor: &Tensor<4>| {
                let rows = tensor.clone().swap_dims(1, 2);
                Tensor::<4>::from_data(TensorData::new(host(rows.clone()), rows.dims()), &device)
                    .swap_dims(1, 2)
            };
            let found = attention(rows(&q), rows(&k), rows(&v), None, None, options).unwrap();
            assert_close(found, expected.clone(), TOLERANCE);
        }
    }
}

#[test]
fn what_the_drop_in_cannot_express_is_refused() {
    let flex = Device::flex();
    let [q, k, v] = qkv([2, 2], [5, 5], 8, &flex);
    let refused =
        |mask: Option<Tensor<4, Bool>>, bias: Option<Tensor<4>>, options: AttentionModuleOptions| {
            match attention(q.clone(), k.clone(), v.clone(), mask, bias, options) {
                Err(Error::Option { option, .. }) => option,
                other => panic!("{other:?}"),
            }
        };
    let causal = AttentionModuleOptions { is_causal: true, ..Default::default() };
    let bias = Tensor::<4>::zeros([2, 2, 5, 5], &flex);
    let mask = bias.clone().greater_elem(1.0);
    assert_eq!(refused(Some(mask), None, causal), "mask");
    assert_eq!(refused(None, Some(bias), causal), "attn_bias");
    assert_eq!(refused(None, None, AttentionModuleOptions { softcap: Some(-1.0), ..causal }), "softcap");
    assert_eq!(refused(None, None, AttentionModuleOptions { scale: Some(f64::NAN), ..causal }), "scale");
}

#[rstest]
#[case::token_wise(1)]
#[case::per_kv_head(2)]
#[case::per_head(6)]
fn routed_attention_is_the_composition(#[case] router_heads: usize) {
    let flex = Device::flex();
    let [q, k, v] = qkv([6, 2], [37, 37], 16, &flex);
    let gates = mixed_routes([2, router_heads, 37], 2, 4, &flex);
    let choices = mixed_routes([2, router_heads, 37], 3, 5, &flex);
    let windows = [window(4), window(11)];
    let (query, key, value) = (q.clone(), k.clone(), v.clone());
    let aha = composed::aha_attention(query, key, value, gates.clone(), window(4), &plain());
    let (query, key, value) = (q.clone(), k.clone(), v.clone());
    let multi = composed::multi_window_attention(query, key, value, choices.clone(), &windows, &plain());
    let (query, key, value) = (q.clone(), k.clone(), v.clone());
    let global = composed::global_attention(query, key, value, gates.clone(), 2, &plain());
    let [aha, multi, global] = [aha, multi, global].map(|out| out.unwrap());

    for device in devices() {
        let there = || [&q, &k, &v].map(|tensor| tensor.clone().to_device(&device));
        let routing = |routes: &Tensor<3, Int>, reaches| {
            Routing::from_routes(routes.clone().to_device(&device), reaches).unwrap()
        };
        let (gates, choices) = (routing(&gates, 2), routing(&choices, 3));
        let [query, key, value] = there();
        let out = aha_attention(query, key, value, &gates, window(4), &plain()).unwrap();
        assert_eq!(out.device(), device);
        assert_close(out, aha.clone(), TOLERANCE);
        let [query, key, value] = there();
        let out = multi_window_attention(query, key, value, &choices, &windows, &plain()).unwrap();
        assert_close(out, multi.clone(), TOLERANCE);
        let [query, key, value] = there();
        let out = global_attention(query, key, value, &gates, &plain()).unwrap();
        assert_close(out, global.clone(), TOLERANCE);
    }
}

#[test]
fn routers_are_the_composition() {
    let flex = Device::flex();
    let (hidden, weight) = (noise([2, 19, 12], 1, &flex), noise([12, 6], 2, &flex));
    let bias = noise([6], 3, &flex);
    let gate = GateOptions::l2a().with_threshold(Threshold::Above(0.7)).with_temperature(0.5);
    let arguments = || (hidden.clone(), weight.clone(), Some(bias.clone()));
    let (x, w, b) = arguments();
    let gated = composed::linear_gate(x, w, b, gate).unwrap();
    let (x, w, b) = arguments();
    let chosen = composed::linear_choice(x, w, b, 3).unwrap();
    for device in devices() {
        let to = |(x, w, b): (Tensor<3>, Tensor<2>, Option<Tensor<1>>)| {
            (x.to_device(&device), w.to_device(&device), b.map(|b| b.to_device(&device)))
        };
        let (x, w, b) = to(arguments());
        let gate = linear_gate(x, w, b, gate).unwrap();
        let (x, w, b) = to(arguments());
        let choice = linear_choice(x, w, b, 3).unwrap();
        assert_eq!((gate.shape(), gate.reaches()), ([2, 6, 19], 2));
        assert_eq!((choice.shape(), choice.reaches()), ([2, 2, 19], 3));
        for (routing, (scores, routes)) in [(gate, &gated), (choice, &chosen)] {
            let found = routing.scores().unwrap().unwrap();
            assert_eq!(found.device(), device);
            assert_close(found, scores.clone(), TOLERANCE);
            let expected: Vec<u8> = routes.to_data().iter::<u8>().collect();
            assert_eq!(routing.to_host().unwrap(), expected);
            let back: Vec<u8> = routing.routes().unwrap().to_data().iter::<u8>().collect();
            assert_eq!(back, expected);
            let far = routing.reaches() as u8 - 1;
            let share = |row: &[u8]| row.iter().filter(|&&k| k == far).count() as f64 / 19.0;
            let expected: Vec<f64> = expected.chunks(19).map(share).collect();
            assert_eq!(routing.far_share().unwrap(), expected);
            assert!(expected.iter().any(|&share| 0.0 < share && share < 1.0), "all one way");
        }
    }
}

#[test]
fn gates_open_exactly_at_the_threshold() {
    for device in devices() {
        // Logits 0, the smallest above it, and below: sigmoid rounds all three to 0.5.
        let hidden = TensorData::new(vec![0.0, 1e-30, -1e-30], [1, 3, 1]);
        let hidden = Tensor::<3>::from_data(hidden, (&device, DType::F32));
        let weight = Tensor::<2>::from_data(TensorData::new(vec![1f32], [1, 1]), (&device, DType::F32));
        let route =
            |options| linear_gate(hidden.clone(), weight.clone(), None, options).unwrap().to_host().unwrap();
        assert_eq!(route(GateOptions::aha()), [0, 1, 0], "{device:?}");
        assert_eq!(route(GateOptions::l2a()), [1, 1, 0], "{device:?}");
    }
}

#[test]
fn a_nan_score_spoils_its_own_token_and_the_shares() {
    let flex = Device::flex();
    let mut data = values(7 * 4, 1);
    data[3 * 4 + 1] = f32::NAN;
    let hidden = Tensor::<3>::from_data(TensorData::new(data, [1, 7, 4]), &flex);
    let weight = noise([4, 1], 2, &flex);
    let [q, k, v] = [1, 2, 3].map(|seed| noise([1, 2, 7, 8], seed, &flex));
    for device in devices() {
        let (hidden, weight) = (hidden.clone().to_device(&device), weight.clone().to_device(&device));
        let routing = linear_gate(hidden, weight, None, GateOptions::aha()).unwrap();
        assert_eq!(routing.far_share(), Err(Error::InvalidScores { count: 1, total: 7 }));
        let [q, k, v] = [&q, &k, &v].map(|tensor| tensor.clone().to_device(&device));
        let out = host(aha_attention(q, k, v, &routing, window(2), &plain()).unwrap());
        for (at, x) in out.iter().enumerate() {
            assert_eq!(x.is_nan(), at / 8 % 7 == 3, "{device:?} at {at}");
        }
    }
}

#[test]
fn strided_tensors_are_read_as_they_are() {
    let flex = Device::flex();
    // [B, T, H, D] in memory, as projections leave it.
    let rows =
        [noise([2, 21, 4, 8], 1, &flex), noise([2, 21, 2, 8], 2, &flex), noise([2, 21, 2, 8], 3, &flex)];
    let [q, k, v] = rows.clone().map(|tensor| tensor.swap_dims(1, 2));
    let expected = composed::windowed_attention(q, k, v, window(5), &plain()).unwrap();
    // One key and value head for all: strides of 0.
    let shared = noise([2, 1, 21, 8], 4, &flex);
    let wide = || shared.clone().expand([2, 4, 21, 8]);
    let query = || rows[0].clone().swap_dims(1, 2);
    let shared_expected =
        composed::full_attention(query(), shared.clone(), shared.clone(), &plain()).unwrap();
    assert_close(full_attention(query(), wide(), wide(), &plain()).unwrap(), shared_expected, TOLERANCE);

    for device in devices() {
        let there = || rows.clone().map(|tensor| tensor.to_device(&device));
        let [q, k, v] = there().map(|tensor| tensor.swap_dims(1, 2));
        let out = windowed_attention(q, k, v, window(5), &plain()).unwrap();
        assert_close(out, expected.clone(), TOLERANCE);
        // The last dimension strided: [B, H, D, T] in memory, copied first.
        let [q, k, v] = [0, 1, 2].map(|i| {
            let transposed = rows[i].clone().permute([0, 2, 3, 1]);
            let data = TensorData::new(host(transposed.clone()), transposed.dims());
            Tensor::<4>::from_data(data, (&device, DType::F32)).swap_dims(2, 3)
        });
        let out = windowed_attention(q, k, v, window(5), &plain()).unwrap();
        assert_close(out, expected.clone(), TOLERANCE);
        // A part of a longer tensor: an offset into the buffer.
        let [q, k, v] = there().map(|tensor| {
            let longer = Tensor::cat(vec![tensor.clone().mul_scalar(9.0), tensor], 1);
            longer.narrow(1, 21, 21).swap_dims(1, 2)
        });
        let out = windowed_attention(q, k, v, window(5), &plain()).unwrap();
        assert_close(out, expected.clone(), TOLERANCE);
        // Read backwards: Flex does that by negative strides.
        let backwards = rows.clone().map(|tensor| host(tensor.flip([1])));
        let [q, k, v] = [0, 1, 2].map(|i| {
            let data = TensorData::new(backwards[i].clone(), rows[i].dims());
            Tensor::<4>::from_data(data, (&device, DType::F32)).flip([1]).swap_dims(1, 2)
        });
        let out = windowed_attention(q, k, v, window(5), &plain()).unwrap();
        assert_close(out, expected.clone(), TOLERANCE);
    }
}

#[rstest]
#[case(DType::F16, 1.0 / 1024.0)]
#[case(DType::BF16, 1.0 / 128.0)]
fn half_precision_stays_half_precision(#[case] dtype: DType, #[case] epsilon: f32) {
    for device in [Device::flex(), Device::cpu()] {
        let tensors = |device: &Device| [1, 2, 3].map(|seed| noise_of([1, 2, 23, 16], seed, device, dtype));
        let [q, k, v] = tensors(&device);
        let out = full_attention(q, k, v, &plain()).unwrap();
        assert_eq!((out.dtype(), out.device()), (dtype, device));
        // The same rounded inputs, computed in f32.
        let [q, k, v] = tensors(&Device::flex()).map(|tensor| tensor.cast(DType::F32));
        let expected = composed::full_attention(q, k, v, &plain()).unwrap();
        assert_close(out, expected, epsilon);
    }
}

#[test]
fn strange_element_types_are_refused() {
    let flex = Device::flex();
    let tensors = |dtype| [1, 2, 3].map(|seed| noise_of([1, 1, 5, 8], seed, &flex, dtype));
    let [q, k, v] = tensors(DType::F64);
    let found = full_attention(q, k, v, &plain()).unwrap_err();
    assert_eq!(found, Error::option("dtype", "F64 (query)", "F32, F16 or BF16"));
    let [q, _, v] = tensors(DType::F32);
    let [_, k, _] = tensors(DType::F16);
    let found = full_attention(q, k, v, &plain()).unwrap_err();
    assert_eq!(found, Error::option("dtype", "F16 (key)", "F32, as query"));
}

#[test]
fn several_devices_are_refused() {
    let (flex, cpu) = (Device::flex(), Device::cpu());
    let mismatch = |tensor: &str, found: Error| match found {
        Error::DeviceMismatch { tensor: named, .. } => assert_eq!(named, tensor),
        other => panic!("{other:?}"),
    };
    let [q, k, _] = qkv([2, 2], [5, 5], 8, &flex);
    let [_, _, v] = qkv([2, 2], [5, 5], 8, &cpu);
    mismatch("value", full_attention(q.clone(), k.clone(), v.clone(), &plain()).unwrap_err());
    mismatch("value", composed::full_attention(q.clone(), k.clone(), v, &plain()).unwrap_err());
    let elsewhere = mixed_routes([2, 1, 5], 2, 1, &cpu);
    let found =
        composed::aha_attention(q.clone(), k.clone(), k.clone(), elsewhere.clone(), window(2), &plain());
    mismatch("routes", found.unwrap_err());
    let routing = Routing::from_routes(elsewhere, 2).unwrap();
    let found = aha_attention(q, k.clone(), k, &routing, window(2), &plain());
    mismatch("routing", found.unwrap_err());
    let found = linear_gate(noise([1, 5, 4], 1, &flex), noise([4, 2], 2, &cpu), None, GateOptions::aha());
    mismatch("the router's weight", found.unwrap_err());
}

#[test]
fn shapes_and_options_that_do_not_fit_are_refused() {
    let flex = Device::flex();
    let [q, k, v] = qkv([3, 2], [5, 5], 8, &flex);
    let ratio = Error::HeadRatio { heads: 3, kv_heads: 2 };
    assert_eq!(full_attention(q.clone(), k.clone(), v.clone(), &plain()).unwrap_err(), ratio);
    assert_eq!(composed::full_attention(q, k.clone(), v, &plain()).unwrap_err(), ratio);
    let short = k.clone().narrow(2, 0, 4);
    let found = full_attention(k.clone(), k.clone(), short.clone(), &plain());
    assert!(matches!(found, Err(Error::Shape { tensor: "value", .. })), "{found:?}");
    let found = composed::full_attention(k.clone(), k.clone(), short, &plain());
    assert!(matches!(found, Err(Error::Shape { tensor: "value", .. })), "{found:?}");
    let found = full_attention(k.clone(), k.clone(), k.clone(), &plain().with_softcap(-1.0));
    assert!(matches!(found, Err(Error::Option { option: "softcap", .. })), "{found:?}");
    let empty = Tensor::<4>::zeros([2, 2, 0, 8], &flex);
    let found = full_attention(k.clone(), empty.clone(), empty, &plain());
    assert!(matches!(found, Err(Error::Shape { tensor: "key", .. })), "{found:?}");
    let routing = Routing::from_routes(mixed_routes([2, 1, 5], 3, 1, &flex), 3).unwrap();
    let found = aha_attention(k.clone(), k.clone(), k, &routing, window(2), &plain());
    assert!(matches!(found, Err(Error::Option { option: "reaches of the routes", .. })), "{found:?}");
    let beyond = Tensor::<3, Int>::from_data([[[0, 1, 300]]], &flex);
    let found = Routing::from_routes(beyond, 2).unwrap_err();
    assert!(matches!(found, Error::RouteOutOfRange { token: 2, .. }), "{found:?}");
}
