//! What routers and modules learn, against Burn's own autodiff of the same computation, composed of its operations on
//! Flex. Routers learn from the straight-through surrogate there: gates `g + p - p.detach()`.

use bifocal_burn::{
    AhaAttentionConfig, AttentionOptions, Error, GateOptions, L2aAttentionConfig, MultiWindowAttentionConfig,
    Projections, RopeConfig, Routing, Training, Window, aha_attention, composed, cost_penalty,
    global_attention, linear_choice, linear_gate, mean_penalty, multi_window_attention, squared_penalty,
};
use burn::{
    module::{Module, Param},
    nn::{Linear, RmsNorm},
    tensor::{DType, Device, Gradients, Int, Tensor, TensorData},
};
use rstest::rstest;

use crate::{
    common::{assert_close, devices, host, mixed_routes, noise, qkv},
    gradients::{TOLERANCE, assert_all_close, gradient, gradients, leaf, loss},
    modules::{norm, output, project},
};

fn window(keys: usize) -> Window {
    Window::new(keys).unwrap()
}

fn plain() -> AttentionOptions {
    AttentionOptions::default()
}

/// What a routed attention learns.
struct Leaves {
    qkv: [Tensor<4>; 3],
    hidden: Tensor<3>,
    weight: Tensor<2>,
    bias: Tensor<1>,
}

impl Leaves {
    /// 2 sequences of 19 tokens, 6 query heads on 2 kv heads, 8 channels of hidden states.
    fn new(columns: usize, device: &Device) -> Self {
        let flex = Device::flex();
        Self {
            qkv: qkv([6, 2], [19, 19], 16, &flex).map(|tensor| leaf(&tensor, device)),
            hidden: leaf(&noise([2, 19, 8], 4, &flex), device),
            weight: leaf(&noise([8, columns], 5, &flex), device),
            bias: leaf(&noise([columns], 6, &flex).mul_scalar(0.3), device),
        }
    }

    fn router(&self) -> (Tensor<3>, Tensor<2>, Option<Tensor<1>>) {
        (self.hidden.clone(), self.weight.clone(), Some(self.bias.clone()))
    }

    /// Each leaf's gradient, row-major.
    #[track_caller]
    fn gradients(&self, loss: Tensor<1>) -> [Tensor<1>; 6] {
        let gradients = loss.backward();
        let [q, k, v] = self.qkv.each_ref().map(|leaf| gradient(leaf, &gradients).flatten::<1>(0, 3));
        let hidden = gradient(&self.hidden, &gradients).flatten::<1>(0, 2);
        let weight = gradient(&self.weight, &gradients).flatten::<1>(0, 1);
        [q, k, v, hidden, weight, gradient(&self.bias, &gradients)]
    }
}

#[track_caller]
fn assert_same_gradients(found: [Tensor<1>; 6], expected: &[Tensor<1>; 6], what: &str) {
    let names = ["query", "key", "value", "hidden states", "weight", "bias"];
    for ((found, expected), name) in found.into_iter().zip(expected).zip(names) {
        println!("{what}: {name}");
        assert_close(found, expected.clone(), TOLERANCE);
    }
}

/// `[B, R, K, T]` as `[B, H, T, Dv]` per choice.
fn per_row(scores: &Tensor<4>, choice: usize, shape: [usize; 4]) -> Tensor<4> {
    let [batch, router_heads, _, tokens] = scores.dims();
    let group = shape[1] / router_heads;
    let scores = scores.clone().narrow(2, choice, 1).expand([batch, router_heads, group, tokens]);
    scores.reshape([batch, shape[1], tokens, 1]).expand(shape)
}

/// `sum over k of (g_k + p_k - p_k.detach()) a_k` with probabilities `[B, R, K, T]`, where a branch may be known to the
/// scores by something else than to query, key and value.
fn surrogate(
    outs: &[Tensor<4>],
    known: &[Tensor<4>],
    probabilities: Tensor<4>,
    routes: &Tensor<3, Int>,
) -> Tensor<4> {
    let shape = outs[0].dims();
    let moved = probabilities.clone() - probabilities.detach();
    let mut sum = selected(outs, routes);
    for (choice, known) in known.iter().enumerate() {
        sum = sum + per_row(&moved, choice, shape) * known.clone().detach();
    }
    sum
}

/// Each row by the branch that its route names.
fn selected(outs: &[Tensor<4>], routes: &Tensor<3, Int>) -> Tensor<4> {
    let shape = outs[0].dims();
    let gates =
        (0..outs.len()).map(|reach| routes.clone().equal_elem(reach as i64).float().unsqueeze_dim::<4>(2));
    let gates = Tensor::<4>::cat(gates.collect(), 2).cast(DType::F32);
    let rows = outs.iter().enumerate().map(|(reach, out)| per_row(&gates, reach, shape) * out.clone());
    rows.reduce(|sum, rows| sum + rows).unwrap()
}

/// `[1 - r, r]` of a gate's scores.
fn both(far: Tensor<4>) -> Tensor<4> {
    Tensor::cat(vec![far.clone().neg().add_scalar(1.0), far], 2)
}

/// Which devices a case of router heads is for. One on all: matrix products on Burn's `cpu` device take seconds.
fn devices_for(router_heads: usize) -> Vec<Device> {
    if router_heads == 2 { devices() } else { vec![Device::flex()] }
}

#[rstest]
fn aha_learns_as_its_surrogate(
    #[values(1, 2, 6)] router_heads: usize,
    #[values(Training::Exact, Training::Sparse)] training: Training,
) {
    let flex = Device::flex();
    let options = plain().with_training(training);
    let leaves = Leaves::new(router_heads, &flex);
    let (hidden, weight, bias) = leaves.router();
    let (scores, routes) = composed::linear_gate(hidden, weight, bias, GateOptions::aha()).unwrap();
    let routes = routes.inner();
    let [q, k, v] = leaves.qkv.clone();
    let near = composed::windowed_attention(q, k, v, window(4), &plain()).unwrap();
    let [q, k, v] = leaves.qkv.clone();
    let outs = [near.clone(), composed::full_attention(q, k, v, &plain()).unwrap()];
    let known = match training {
        Training::Exact => outs.clone(),
        Training::Sparse => [near, selected(&outs, &routes)],
    };
    let out = surrogate(&outs, &known, both(scores.clone()), &routes);
    // A loss on the scores too: their gradients add up.
    let expected = leaves.gradients(loss(out) + loss(scores));

    for device in devices_for(router_heads) {
        let leaves = Leaves::new(router_heads, &device);
        let (hidden, weight, bias) = leaves.router();
        let routing = linear_gate(hidden, weight, bias, GateOptions::aha()).unwrap();
        assert_eq!(routing.to_host().unwrap(), routes.to_data().iter::<u8>().collect::<Vec<_>>());
        let [q, k, v] = leaves.qkv.clone();
        let out = aha_attention(q, k, v, &routing, window(4), &options).unwrap();
        let scores = routing.scores().unwrap().unwrap();
        let found = leaves.gradients(loss(out) + loss(scores));
        assert_same_gradients(found, &expected, &format!("{device:?}, {training:?}"));
    }
}

#[rstest]
fn multi_window_learns_as_its_surrogate(
    #[values(1, 2, 6)] router_heads: usize,
    #[values(Training::Exact, Training::Sparse)] training: Training,
) {
    let flex = Device::flex();
    let windows = [window(3), window(8)];
    let leaves = Leaves::new(3 * router_heads, &flex);
    let (hidden, weight, bias) = leaves.router();
    let (scores, routes) = composed::linear_choice(hidden, weight, bias, 3).unwrap();
    let routes = routes.inner();
    let outs = [Some(windows[0]), Some(windows[1]), None].map(|window| {
        let [q, k, v] = leaves.qkv.clone();
        match window {
            Some(window) => composed::windowed_attention(q, k, v, window, &plain()).unwrap(),
            None => composed::full_attention(q, k, v, &plain()).unwrap(),
        }
    });
    let mut known = outs.clone();
    if training == Training::Sparse {
        known[2] = selected(&outs, &routes);
    }
    let expected = leaves.gradients(loss(surrogate(&outs, &known, scores, &routes)));

    for device in devices_for(router_heads) {
        let leaves = Leaves::new(3 * router_heads, &device);
        let (hidden, weight, bias) = leaves.router();
        let routing = linear_choice(hidden, weight, bias, 3).unwrap();
        assert_eq!(routing.to_host().unwrap(), routes.to_data().iter::<u8>().collect::<Vec<_>>());
        let [q, k, v] = leaves.qkv.clone();
        let options = plain().with_training(training);
        let out = multi_window_attention(q, k, v, &routing, &windows, &options).unwrap();
        let found = leaves.gradients(loss(out));
        assert_same_gradients(found, &expected, &format!("{device:?}, {training:?}"));
    }
}

#[rstest]
fn l2a_learns_as_its_surrogate(
    #[values(1, 2, 6)] router_heads: usize,
    #[values(Training::Exact, Training::Sparse)] training: Training,
) {
    let flex = Device::flex();
    let gate = GateOptions::l2a().with_temperature(0.5);
    let leaves = Leaves::new(router_heads, &flex);
    let (hidden, weight, bias) = leaves.router();
    let (scores, routes) = composed::linear_gate(hidden, weight, bias, gate).unwrap();
    let routes = routes.inner();
    let [q, k, v] = leaves.qkv.clone();
    let full = composed::full_attention(q, k, v, &plain()).unwrap();
    let outs = [full.zeros_like(), full];
    let mut known = outs.clone();
    if training == Training::Sparse {
        known[1] = selected(&outs, &routes);
    }
    let expected = leaves.gradients(loss(surrogate(&outs, &known, both(scores), &routes)));

    for device in devices_for(router_heads) {
        let leaves = Leaves::new(router_heads, &device);
        let (hidden, weight, bias) = leaves.router();
        let routing = linear_gate(hidden, weight, bias, gate).unwrap();
        let [q, k, v] = leaves.qkv.clone();
        let options = plain().with_training(training);
        let out = global_attention(q, k, v, &routing, &options).unwrap();
        let found = leaves.gradients(loss(out));
        assert_same_gradients(found, &expected, &format!("{device:?}, {training:?}"));
    }
}

#[test]
fn routes_from_elsewhere_learn_nothing_and_rows_do() {
    let flex = Device::flex();
    let inputs = qkv([6, 2], [19, 19], 16, &flex);
    let routes = mixed_routes([2, 2, 19], 2, 4, &flex);
    let expected = gradients(&inputs, &flex, |q, k, v| {
        composed::aha_attention(q, k, v, routes.clone(), window(4), &plain()).unwrap()
    });
    // Routes of a device with autodiff are routes.
    let routing = Routing::from_routes(routes.autodiff(), 2).unwrap();
    assert!(routing.scores().unwrap().is_none());
    let found =
        gradients(&inputs, &flex, |q, k, v| aha_attention(q, k, v, &routing, window(4), &plain()).unwrap());
    assert_all_close(found, &expected, TOLERANCE);
    // Nor does a router whose inputs are constants; the penalty of its scores is a constant, too.
    let (hidden, weight) = (noise([2, 19, 8], 4, &flex), noise([8, 6], 5, &flex));
    let routing = linear_gate(hidden.autodiff(), weight, None, GateOptions::aha()).unwrap();
    assert!(!mean_penalty(&routing).unwrap().is_tracked());
}

/// The gradient of a weight.
#[track_caller]
fn of_weight(layer: &Linear, gradients: &Gradients) -> Tensor<1> {
    gradient(&layer.weight.val(), gradients).flatten::<1>(0, 1)
}

fn of_norm(norm: &RmsNorm, gradients: &Gradients) -> Tensor<1> {
    gradient(&norm.gamma.val(), gradients)
}

#[track_caller]
fn of_projections(projections: &Projections, gradients: &Gradients) -> Vec<Tensor<1>> {
    let Projections { q_proj, k_proj, v_proj, o_proj, .. } = projections;
    [q_proj, k_proj, v_proj, o_proj].map(|layer| of_weight(layer, gradients)).to_vec()
}

#[track_caller]
fn assert_same(found: Vec<Tensor<1>>, expected: Vec<Tensor<1>>) {
    assert_eq!(found.len(), expected.len());
    for (at, (found, expected)) in found.into_iter().zip(expected).enumerate() {
        println!("parameter {at}");
        assert_close(found, expected, TOLERANCE);
    }
}

#[test]
fn aha_modules_learn_as_their_composition() {
    let device = Device::flex().autodiff();
    let config = AhaAttentionConfig::new(24, 4, 5)
        .with_n_kv_heads(Some(2))
        .with_rope(Some(RopeConfig::new(32)))
        .with_bias(true)
        .with_router_bias_init(Some(0.1));
    let module = config.init(&device).unwrap();
    let hidden = noise([2, 23, 24], 7, &device).mul_scalar(3.0).require_grad();
    let learned = |loss: Tensor<1>| {
        let gradients = loss.backward();
        let bias = module.router.bias.as_ref().unwrap().val();
        let mut all = of_projections(&module.projections, &gradients);
        all.push(of_weight(&module.router, &gradients));
        all.push(gradient(&bias, &gradients));
        all.push(gradient(&module.projections.q_proj.bias.as_ref().unwrap().val(), &gradients));
        all.push(gradient(&hidden, &gradients).flatten::<1>(0, 2));
        all
    };

    let forward = module.forward(hidden.clone()).unwrap();
    let share = forward.routing.far_share().unwrap();
    assert!(share.iter().any(|&share| 0.0 < share && share < 1.0), "all one way: {share:?}");
    let routes = forward.routing.routes().unwrap();
    let penalty = mean_penalty(&forward.routing).unwrap();
    let found = learned(loss(forward.output) + penalty);

    let (weight, bias) = (module.router.weight.val(), module.router.bias.as_ref().map(|bias| bias.val()));
    let (scores, _) = composed::linear_gate(hidden.clone(), weight, bias, GateOptions::aha()).unwrap();
    let qkv = project(&hidden, &module.projections, module.rope.as_ref());
    let [q, k, v] = qkv.clone();
    let near = composed::windowed_attention(q, k, v, window(5), &plain()).unwrap();
    let [q, k, v] = qkv;
    let outs = [near, composed::full_attention(q, k, v, &plain()).unwrap()];
    let out = surrogate(&outs, &outs, both(scores.clone()), &routes);
    let out = output(out, &module.projections.o_proj);
    let expected = learned(loss(out) + scores.narrow(3, 0, 22).mean());
    assert_same(found, expected);

    let inference = module.valid().forward(hidden.inner()).unwrap();
    assert!(!inference.output.is_autodiff() && !inference.routing.scores().unwrap().unwrap().is_autodiff());
}

#[test]
fn multi_window_modules_learn_as_their_composition() {
    let device = Device::flex().autodiff();
    let config = MultiWindowAttentionConfig::new(24, 4, vec![2, 9])
        .with_n_kv_heads(Some(2))
        .with_router_bias_init(Some(0.2));
    let module = config.init(&device).unwrap();
    let hidden = noise([2, 23, 24], 8, &device).mul_scalar(3.0).require_grad();
    let learned = |loss: Tensor<1>| {
        let gradients = loss.backward();
        let bias = module.router.bias.as_ref().unwrap().val();
        let mut all = of_projections(&module.projections, &gradients);
        all.push(of_weight(&module.router, &gradients));
        all.push(gradient(&bias, &gradients));
        all.push(gradient(&hidden, &gradients).flatten::<1>(0, 2));
        all
    };

    let windows = [window(2), window(9)];
    let forward = module.forward(hidden.clone()).unwrap();
    let routes = forward.routing.routes().unwrap();
    let penalty = cost_penalty(&forward.routing, &windows).unwrap();
    let found = learned(loss(forward.output) + penalty);

    let (weight, bias) = (module.router.weight.val(), module.router.bias.as_ref().map(|bias| bias.val()));
    let (scores, _) = composed::linear_choice(hidden.clone(), weight, bias, 3).unwrap();
    let qkv = project(&hidden, &module.projections, None);
    let outs = [Some(windows[0]), Some(windows[1]), None].map(|window| {
        let [q, k, v] = qkv.clone();
        match window {
            Some(window) => composed::windowed_attention(q, k, v, window, &plain()).unwrap(),
            None => composed::full_attention(q, k, v, &plain()).unwrap(),
        }
    });
    let out = surrogate(&outs, &outs, scores.clone(), &routes);
    let out = output(out, &module.projections.o_proj);
    // Keys that a window of n shows token t, of t + 1: at most n.
    let cost = |keys: usize| (0..23).map(move |t| keys.min(t + 1) as f32 / (t + 1) as f32);
    let costs: Vec<f32> = cost(2).chain(cost(9)).chain(cost(23)).collect();
    let costs = Tensor::<4>::from_data(TensorData::new(costs, [1, 1, 3, 23]), &device);
    let penalty = (scores * costs).narrow(3, 0, 22).sum().div_scalar((2 * 4 * 22) as f32);
    assert_same(found, learned(loss(out) + penalty));
}

#[rstest]
#[case::sparse(Training::Sparse)]
#[case::dense(Training::Exact)]
fn l2a_modules_learn_as_their_composition(#[case] training: Training) {
    let device = Device::flex().autodiff();
    let config = L2aAttentionConfig::new(24, 4, 5).with_n_kv_heads(Some(2)).with_temperature(0.7);
    let mut module = config.init(&device).unwrap();
    module.router.weight = Param::from_tensor(noise([24, 1], 3, &device));
    let hidden = noise([2, 23, 24], 9, &device).require_grad();
    let learned = |loss: Tensor<1>| {
        let gradients = loss.backward();
        let mut all = of_projections(&module.local, &gradients);
        all.extend(of_projections(&module.global, &gradients));
        all.extend([&module.local_norm, &module.global_norm].map(|norm| of_norm(norm, &gradients)));
        all.push(of_weight(&module.router, &gradients));
        all.push(gradient(&hidden, &gradients).flatten::<1>(0, 2));
        all
    };

    let forward = module.forward_with(hidden.clone(), training).unwrap();
    let share = forward.routing.far_share().unwrap();
    assert!(share.iter().all(|&share| 0.0 < share && share < 1.0), "one way: {share:?}");
    let routes = forward.routing.routes().unwrap();
    let penalty = squared_penalty(&forward.routing).unwrap();
    let found = learned(loss(forward.output) + penalty.mul_scalar(0.1));

    let u1 = norm(&hidden, module.local_norm.gamma.val(), 1e-6);
    let [q, k, v] = project(&u1, &module.local, None);
    let near = composed::windowed_attention(q, k, v, window(5), &plain()).unwrap();
    let x1 = hidden.clone() + output(near, &module.local.o_proj);
    let u2 = norm(&x1, module.global_norm.gamma.val(), 1e-6);
    let gate = GateOptions::l2a().with_temperature(0.7);
    let (scores, _) = composed::linear_gate(u2.clone(), module.router.weight.val(), None, gate).unwrap();
    let [q, k, v] = project(&u2, &module.global, None);
    let full = composed::full_attention(q, k, v, &plain()).unwrap();
    let outs = [full.zeros_like(), full];
    let mut known = outs.clone();
    if training == Training::Sparse {
        known[1] = selected(&outs, &routes);
    }
    let far = surrogate(&outs, &known, both(scores.clone()), &routes);
    let out = x1 + output(far, &module.global.o_proj);
    let penalty = scores.powi_scalar(2).sum().div_scalar(2.0);
    assert_same(found, learned(loss(out) + penalty.mul_scalar(0.1)));
}

#[test]
fn penalties_are_what_they_say() {
    let flex = Device::flex();
    // One router head, logits 0, ln 3, -ln 3: scores 0.5, 0.75, 0.25, for two sequences; the last counts in L2A's alone.
    let third = 3f32.ln();
    let logits = TensorData::new(vec![0.0, third, -third, 0.0, 0.0, third], [2, 3, 1]);
    let hidden = Tensor::<3>::from_data(logits, &flex);
    let weight = Tensor::<2>::ones([1, 1], &flex);
    let routing = linear_gate(hidden.clone(), weight, None, GateOptions::aha()).unwrap();
    let value = |penalty: Result<Tensor<1>, Error>| host(penalty.unwrap())[0];
    let close = |found: f32, expected: f32| assert!((found - expected).abs() < 1e-6, "{found}, {expected}");
    close(value(mean_penalty(&routing)), (0.5 + 0.75 + 0.5 + 0.5) / 4.0);
    let squares = 0.25 + 0.5625 + 0.0625 + 0.25 + 0.25 + 0.5625;
    close(value(squared_penalty(&routing)), squares / 2.0);

    // Two reaches, logits (0, x): p = sigmoid(x) on full attention. A window of 1 shows token 1 half of what it sees.
    let weight = Tensor::<2>::from_data(TensorData::new(vec![0f32, 1.0], [1, 2]), &flex);
    let choice = linear_choice(hidden, weight, None, 2).unwrap();
    let costs = (1.0 + (0.25 / 2.0 + 0.75) + 1.0 + (0.5 / 2.0 + 0.5)) / 4.0;
    close(value(cost_penalty(&choice, &[window(1)])), costs);

    let shape = |found: Result<Tensor<1>, Error>| {
        assert!(matches!(found, Err(Error::Shape { tensor: "the scores", .. })), "{found:?}");
    };
    shape(mean_penalty(&choice));
    shape(squared_penalty(&choice));
    shape(cost_penalty(&choice, &[window(1), window(2)]));
    shape(cost_penalty(&routing, &[window(1)]));
    let elsewhere = Routing::from_routes(mixed_routes([1, 1, 5], 2, 1, &flex), 2).unwrap();
    let found = mean_penalty(&elsewhere);
    assert!(matches!(found, Err(Error::Option { option: "the routing", .. })), "{found:?}");

    // A sequence of one token has nothing but a last one.
    let (hidden, weight) = (noise([2, 1, 4], 1, &flex), noise([4, 2], 2, &flex));
    let routing = linear_gate(hidden, weight, None, GateOptions::aha()).unwrap();
    assert_eq!(value(mean_penalty(&routing)), 0.0);
}
