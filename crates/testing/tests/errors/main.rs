//! Bad input gives a typed error that names what was expected and found: never a panic, never a wrong number.

mod decode;

use bifocal::{
    Aha, AhaLinear, AttentionOperator, Covariance, DeviceProfile, Element, Error, FixedRouter, Full,
    Gradients, HostMoments, Inputs, L2a, LinearAttention, LinearChoice, LinearGate, LinearInputs, Logo,
    MomentGate, Moments, MultiWindow, NormSum, Partial, Plan, Problem, RattentionInputs, Reach, Refusal,
    RouteGeometry, Router, Routes, Routine, Rows, Saved, Sequences, State, Switch, Tensor, Threshold, Window,
    Windowed, add_to_scores, choice_gradient, cubecl::client::Client, gate_gradient,
};

/// A device whose queue is empty when a test is done with it. A process that ends while a runtime still compiles or
/// computes can be taken down by it.
struct Settled(Client);

impl std::ops::Deref for Settled {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.0
    }
}

impl Drop for Settled {
    fn drop(&mut self) {
        bifocal::synchronise(&self.0).expect("what was queued could be done");
    }
}

fn cpu() -> Settled {
    Settled(bifocal::open("cpu").expect("the CPU runtime is in this build"))
}

fn tensor(client: &Client, shape: [usize; 4]) -> Tensor<4> {
    Tensor::filled(client, shape, Element::F32, 0.5).expect("room for a small tensor")
}

/// Attends with the given shapes and returns the error.
fn refusal(query: [usize; 4], key: [usize; 4], value: [usize; 4]) -> Error {
    let client = cpu();
    let (q, k, v) = (tensor(&client, query), tensor(&client, key), tensor(&client, value));
    let inputs = Inputs::new(q.view(), k.view(), v.view());
    let attend = |problem: Problem| {
        let partial = Partial::empty(&client, &problem, Element::F32);
        Full.attend(&client, &problem, &inputs, Rows::All, &partial)
    };
    inputs.problem().and_then(attend).expect_err("impossible shapes")
}

#[test]
fn shapes_that_do_not_fit() {
    let error = refusal([1, 4, 8, 32], [1, 2, 8, 64], [1, 2, 8, 32]);
    assert_eq!(error.to_string(), "key has shape [1, 2, 8, 64], expected [1, Hk, Tk, 32]");
    let error = refusal([1, 4, 8, 32], [1, 2, 8, 32], [1, 2, 9, 32]);
    assert!(matches!(error, Error::Shape { tensor: "value", .. }), "{error}");
    let error = refusal([1, 3, 8, 32], [1, 2, 8, 32], [1, 2, 8, 32]);
    assert_eq!(error, Error::HeadRatio { heads: 3, kv_heads: 2 });
}

#[test]
fn empty_dimensions() {
    for shape in [[0, 1, 8, 32], [1, 1, 0, 32], [1, 0, 8, 32], [1, 1, 8, 0]] {
        let error = Problem::new(shape, shape, Element::F32).expect_err("an empty dimension");
        assert!(matches!(error, Error::EmptyDimension { .. }), "{error}");
    }
}

#[test]
fn head_dims_and_types_that_no_routine_takes() {
    let client = cpu();
    let wide = tensor(&client, [1, 1, 2, 1024]);
    let inputs = Inputs::new(wide.view(), wide.view(), wide.view());
    let problem = inputs.problem().expect("a possible problem");
    let partial = Partial::empty(&client, &problem, Element::F32);
    let error = Full.attend(&client, &problem, &inputs, Rows::All, &partial).expect_err("too wide");
    assert!(matches!(error, Error::Refused { operator: "full", .. }), "{error}");
    assert!(error.to_string().contains("head dim 1024"), "{error}");

    let small = tensor(&client, [1, 1, 2, 32]);
    let bytes = Tensor::new(small.handle().clone(), Element::U8, small.shape(), small.strides());
    let inputs = Inputs::new(bytes.view(), bytes.view(), bytes.view());
    let problem = inputs.problem().expect("a possible problem");
    let partial = Partial::empty(&client, &problem, Element::F32);
    let error = Full.attend(&client, &problem, &inputs, Rows::All, &partial).expect_err("bytes");
    assert!(matches!(error, Error::Refused { .. }), "{error}");
}

#[test]
fn mixed_element_types() {
    let client = cpu();
    let q = tensor(&client, [1, 1, 4, 32]);
    let k = Tensor::filled(&client, [1, 1, 4, 32], Element::F16, 0.5).expect("f16 on the CPU");
    let inputs = Inputs::new(q.view(), k.view(), q.view());
    let problem = inputs.problem().expect("a possible problem");
    let partial = Partial::empty(&client, &problem, Element::F32);
    let error = Full.attend(&client, &problem, &inputs, Rows::All, &partial).expect_err("mixed types");
    let expected = Error::Element { tensor: "key", expected: Element::F32, found: Element::F16 };
    assert_eq!(error, expected);
}

#[test]
fn memory_that_does_not_hold_what_strides_reach() {
    let client = cpu();
    let q = tensor(&client, [1, 1, 4, 32]);
    let problem = Problem::new([1, 1, 4, 32], [1, 1, 4, 32], Element::F32).expect("a possible problem");
    let attend = |key: Tensor<4>, partial: &Partial| {
        let inputs = Inputs::new(q.view(), key.view(), q.view());
        Full.attend(&client, &problem, &inputs, Rows::All, partial).expect_err("bad memory")
    };
    let good = Partial::empty(&client, &problem, Element::F32);
    let shape = [1, 1, 4, 32];
    let beyond = Tensor::new(q.handle().clone(), Element::F32, shape, [1000, 1000, 500, 1]);
    assert!(matches!(attend(beyond, &good), Error::Buffer { tensor: "key", .. }));
    let scattered = Tensor::new(q.handle().clone(), Element::F32, shape, [0, 0, 1, 4]);
    assert!(matches!(attend(scattered, &good), Error::Stride { tensor: "key", found: 4 }));

    let overlapping = Partial {
        out: Tensor::new(good.out.handle().clone(), Element::F32, shape, [128, 128, 0, 1]),
        lse: good.lse.clone(),
    };
    assert!(matches!(attend(q.clone(), &overlapping), Error::Overlap { .. }));
    let problem_of_two = Problem::new([1, 2, 4, 32], shape, Element::F32).expect("a possible problem");
    let two = Partial::empty(&client, &problem_of_two, Element::F32);
    let lse = Tensor::new(two.lse.handle().clone(), Element::F32, [1, 2, 4], [0, 0, 1]);
    let folded = Partial { out: two.out.clone(), lse };
    let error = folded.check(&client, &problem_of_two).expect_err("rows of log-sum-exp share memory");
    assert!(matches!(error, Error::NotContiguous { .. }), "{error}");
}

/// A backward pass of two heads over eight tokens, after what `change` has done to it.
fn backward_error(change: impl FnOnce(&Client, &mut BackwardPass)) -> Error {
    let client = cpu();
    let problem = Problem::new([1, 2, 8, 32], [1, 2, 8, 32], Element::F32).expect("a possible problem");
    let sinks = Tensor::filled(&client, [2], Element::F32, 0.0).expect("room for two logits");
    let mut pass = BackwardPass {
        problem,
        sinks,
        d_out: tensor(&client, [1, 2, 8, 32]),
        delta: Tensor::filled(&client, [1, 2, 8], Element::F32, 0.0).expect("room for products"),
        gradients: Gradients::zeros(&client, &problem, true).expect("room for gradients"),
    };
    change(&client, &mut pass);
    let q = tensor(&client, [1, 2, 8, 32]);
    let inputs = Inputs::new(q.view(), q.view(), q.view()).with_sink_logits(pass.sinks.view());
    let partial = Partial::empty(&client, &problem, Element::F32);
    let saved = Saved { partial: &partial, d_out: pass.d_out.view(), delta: pass.delta.view() };
    Full.backward(&client, &pass.problem, &inputs, Rows::All, &saved, &pass.gradients)
        .expect_err("a backward pass that cannot be run")
}

struct BackwardPass {
    problem: Problem,
    sinks: Tensor<1>,
    d_out: Tensor<4>,
    delta: Tensor<3>,
    gradients: Gradients,
}

#[test]
fn backward_passes_that_do_not_fit() {
    let error = backward_error(|_, pass| pass.gradients.sink_logits = None);
    let expected =
        "the gradient of the sink logits is absent, expected room for it, as the inputs have sink logits";
    assert_eq!(error.to_string(), expected);
    let error = backward_error(|client, pass| pass.gradients.key = tensor(client, [1, 2, 9, 32]));
    assert!(matches!(error, Error::Shape { tensor: "the gradient of the key", .. }), "{error}");
    let error = backward_error(|_, pass| {
        let query = &pass.gradients.query;
        let (handle, shape) = (query.handle().clone(), query.shape());
        pass.gradients.query = Tensor::new(handle, Element::F32, shape, [512, 32, 64, 1]);
    });
    assert!(matches!(error, Error::NotContiguous { tensor: "the gradient of the query", .. }), "{error}");
    let error = backward_error(|client, pass| {
        let shape = pass.gradients.value.shape();
        pass.gradients.value = Tensor::filled(client, shape, Element::F16, 0.0).expect("f16 on the CPU");
    });
    assert!(matches!(error, Error::Element { tensor: "the gradient of the value", .. }), "{error}");
    let error = backward_error(|client, pass| {
        pass.d_out = Tensor::filled(client, [1, 2, 8, 32], Element::F16, 0.5).expect("f16 on the CPU");
    });
    let expected =
        Error::Element { tensor: "the gradient of the output", expected: Element::F32, found: Element::F16 };
    assert_eq!(error, expected);
    let error = backward_error(|client, pass| {
        pass.delta = Tensor::filled(client, [1, 2, 4], Element::F32, 0.0).expect("room for products");
    });
    assert!(matches!(error, Error::Shape { tensor: "delta", .. }), "{error}");
    let error = backward_error(|_, pass| pass.problem = pass.problem.with_routine(Routine::Wgmma));
    assert!(matches!(error, Error::Refused { operator: "full", .. }), "{error}");
    if let Ok(other) = bifocal::open("wgpu").map(Settled) {
        let error = backward_error(|_, pass| pass.d_out = tensor(&other, [1, 2, 8, 32]));
        assert!(
            matches!(error, Error::DeviceMismatch { tensor: "the gradient of the output", .. }),
            "{error}"
        );
    }
}

#[test]
fn operators_without_a_backward_pass() {
    /// Full attention that nobody has differentiated.
    struct Forward;

    impl AttentionOperator for Forward {
        fn name(&self) -> &'static str {
            "forward"
        }

        fn reach(&self) -> Reach {
            Reach::All
        }

        fn supports(
            &self,
            routine: Routine,
            problem: &Problem,
            profile: &DeviceProfile,
        ) -> Result<(), Refusal> {
            Full.supports(routine, problem, profile)
        }

        fn attend(
            &self,
            client: &Client,
            problem: &Problem,
            inputs: &Inputs<'_>,
            rows: Rows<'_>,
            partial: &Partial,
        ) -> bifocal::Result<Routine> {
            Full.attend(client, problem, inputs, rows, partial)
        }
    }

    let client = cpu();
    let q = tensor(&client, [1, 2, 8, 32]);
    let inputs = Inputs::new(q.view(), q.view(), q.view());
    let problem = inputs.problem().expect("a possible problem");
    let partial = Partial::empty(&client, &problem, Element::F32);
    let delta = Tensor::zeros(&client, [1, 2, 8]).expect("room for products");
    let saved = Saved { partial: &partial, d_out: q.view(), delta: delta.view() };
    let gradients = Gradients::zeros(&client, &problem, false).expect("room for gradients");
    let error = Forward.backward(&client, &problem, &inputs, Rows::All, &saved, &gradients);
    assert!(matches!(error, Err(Error::Refused { operator: "forward", .. })), "{error:?}");
    assert!(Forward.choose_backward(&problem, &DeviceProfile::of(&client)).is_err());
    assert!(Full.choose_backward(&problem, &DeviceProfile::of(&client)).is_ok());
}

#[test]
fn scores_that_no_router_gave() {
    let client = cpu();
    let q = tensor(&client, [1, 2, 8, 32]);
    let inputs = Inputs::new(q.view(), q.view(), q.view());
    let problem = inputs.problem().expect("a possible problem");
    let gate = |router_heads, d_out: &Tensor<4>| {
        gate_gradient(&client, &problem, router_heads, None, q.view(), d_out.view())
    };
    assert!(gate(2, &q).is_ok());
    assert!(matches!(gate(3, &q), Err(Error::Shape { tensor: "routes", .. })));
    assert!(matches!(gate(0, &q), Err(Error::EmptyDimension { .. })));
    assert!(matches!(gate(1, &tensor(&client, [1, 2, 9, 32])), Err(Error::Shape { .. })));
    let none = choice_gradient(&client, &problem, 1, &[], q.view());
    assert!(matches!(none, Err(Error::Option { option: "reaches", .. })));
    let products = Tensor::zeros(&client, [1, 2, 8]).expect("room for products");
    let scores = Tensor::zeros(&client, [1, 1, 2, 8]).expect("room for scores");
    let error = add_to_scores(&client, &problem, products.view(), 1.0, 2, &scores);
    assert!(matches!(error, Err(Error::Option { .. })), "{error:?}");
}

#[test]
fn routes_out_of_range_or_of_another_shape() {
    let client = cpu();
    let geometry = RouteGeometry::new(1, 2, 3, 2).expect("a possible geometry");
    let error = Routes::from_host(&client, geometry, &[0, 1, 0, 0, 2, 0]).expect_err("route 2 of 2");
    let expected = Error::RouteOutOfRange { found: 2, reaches: 2, batch: 0, head: 1, token: 1 };
    assert_eq!(error, expected);
    assert!(Routes::from_host(&client, geometry, &[0; 5]).is_err());
    assert!(RouteGeometry::new(1, 1, 0, 2).is_err());
    assert!(RouteGeometry::new(1, 1, 1, 0).is_err());
    assert!(RouteGeometry::new(1, 1, 1, 256).is_err());

    let routes = Routes::from_host(&client, geometry, &[0; 6]).expect("good routes");
    // Two router heads cannot serve three query heads; nor three tokens four.
    for shape in [[1, 3, 3, 32], [1, 2, 4, 32], [2, 2, 3, 32]] {
        let problem = Problem::new(shape, shape, Element::F32).expect("a possible problem");
        let error = Plan::build(&client, &routes, &problem, 4).expect_err("routes of another shape");
        assert!(matches!(error, Error::Shape { tensor: "routes", .. }), "{error}");
    }
    let problem = Problem::new([1, 2, 3, 32], [1, 2, 3, 32], Element::F32).expect("a possible problem");
    assert!(Plan::build(&client, &routes, &problem, 0).is_err());
    let plan = Plan::build(&client, &routes, &problem, 4).expect("a plan");
    assert!(matches!(plan.rows(2), Err(Error::Option { .. })));
}

#[test]
fn plans_for_another_problem_or_item_size() {
    let client = cpu();
    let geometry = RouteGeometry::new(1, 1, 8, 2).expect("a possible geometry");
    let routes = Routes::from_host(&client, geometry, &[0; 8]).expect("good routes");
    let (q, other) = (tensor(&client, [1, 2, 8, 32]), tensor(&client, [1, 4, 8, 32]));
    let inputs = Inputs::new(q.view(), q.view(), q.view());
    let problem = inputs.problem().expect("a possible problem");
    let partial = Partial::empty(&client, &problem, Element::F32);
    let others = Inputs::new(other.view(), other.view(), other.view());
    let plan = bifocal::plan(&client, &others.problem().expect("a possible problem"), &routes);
    let plan = plan.expect("a plan");
    let rows = plan.far_rows().expect("rows");
    let error = Full.attend(&client, &problem, &inputs, rows, &partial).expect_err("another plan");
    assert!(matches!(error, Error::Shape { tensor: "the dispatch plan", .. }), "{error}");

    let plan = Plan::build(&client, &routes, &problem, 1).expect("a plan of single rows");
    let rows = plan.far_rows().expect("rows");
    let error = Full.attend(&client, &problem, &inputs, rows, &partial).expect_err("item size");
    assert!(matches!(error, Error::Option { .. }), "{error}");
}

#[test]
fn options_that_make_no_sense() {
    let client = cpu();
    let weight = || Tensor::filled(&client, [8, 4], Element::F32, 0.1).expect("a weight");
    assert_eq!(Window::new(0), Err(Error::EmptyWindow));
    assert!(MultiWindow::new(&[]).is_err());
    let window = |n| Window::new(n).expect("a window");
    assert!(MultiWindow::new(&[window(8), window(4)]).is_err());
    assert!(LinearGate::aha(weight()).with_temperature(0.0).is_err());
    assert!(LinearGate::aha(weight()).with_threshold(Threshold::Above(1.0)).is_err());
    assert!(LinearChoice::new(weight(), 3).is_err());
    assert!(LinearChoice::new(weight(), 1).is_err());
    let hidden = Tensor::filled(&client, [1, 5, 9], Element::F32, 0.1).expect("hidden states");
    let error = LinearGate::aha(weight()).route(&client, hidden.view()).expect_err("8 is not 9");
    assert_eq!(error.to_string(), "the router's weight has shape [8, 4], expected [9, 4]");
}

#[test]
fn reaches_without_a_branch() {
    let client = cpu();
    let geometry = RouteGeometry::new(1, 1, 8, 3).expect("a possible geometry");
    let routes = Routes::from_host(&client, geometry, &[0; 8]).expect("good routes");
    let q = tensor(&client, [1, 2, 8, 32]);
    let inputs = Inputs::new(q.view(), q.view(), q.view());
    let problem = inputs.problem().expect("a possible problem");
    let window = Window::new(4).expect("a window");
    let error = Aha::new(window).attend(&client, &problem, &inputs, &routes).expect_err("3 reaches");
    assert!(matches!(error, Error::Option { option: "reaches of the routes", .. }), "{error}");
    // L2A takes the last reach, however many there are.
    assert!(L2a::new(window).global(&client, &problem, &inputs, &routes).is_ok());
    assert!(Windowed::new(window).choose(&problem, &DeviceProfile::of(&client)).is_ok());
}

#[test]
fn lengths_that_do_not_count_up_from_0() {
    let client = cpu();
    let error = |queries: &[usize], keys: &[usize]| {
        Sequences::from_host(&client, queries, keys).expect_err("impossible lengths")
    };
    let good = [0, 3, 8];
    let found = error(&[0, 5, 3, 8], &[0, 3, 3, 8]);
    assert_eq!(found.to_string(), "entry 2 of the cumulative query lengths is 3, expected at least 5");
    let found = error(&good, &[1, 3, 8]);
    assert_eq!(found.to_string(), "entry 0 of the cumulative key lengths is 1, expected 0");
    for few in [&[][..], &[0]] {
        assert!(matches!(error(few, &good), Error::EmptyDimension { .. }));
        assert!(matches!(error(&good, few), Error::EmptyDimension { .. }));
    }
    assert!(matches!(error(&good, &[0, 8]), Error::Shape { .. }));
    assert!(matches!(error(&[0, 1 << 40], &[0, 1]), Error::TooLarge { .. }));
}

#[test]
fn sequences_of_another_problem() {
    let client = cpu();
    let sequences = |queries: &[usize], keys: &[usize]| {
        Sequences::from_host(&client, queries, keys).expect("possible lengths")
    };
    let attend = |batch: usize, sequences: &Sequences| {
        let q = tensor(&client, [batch, 1, 8, 32]);
        let inputs = Inputs::new(q.view(), q.view(), q.view()).with_sequences(sequences);
        let problem = inputs.problem().expect("a possible problem");
        let partial = Partial::empty(&client, &problem, Element::F32);
        Full.attend(&client, &problem, &inputs, Rows::All, &partial)
    };
    assert!(attend(1, &sequences(&[0, 3, 8], &[0, 8, 8])).is_ok());
    let error = attend(2, &sequences(&[0, 3, 8], &[0, 3, 8])).expect_err("a batch of 2");
    assert_eq!(error.to_string(), "the batch of packed sequences is 2, expected 1");
    for (queries, keys) in [([0, 3, 7], [0, 3, 8]), ([0, 3, 8], [0, 3, 9]), ([0, 0, 0], [0, 0, 8])] {
        let error = attend(1, &sequences(&queries, &keys)).expect_err("lengths that end elsewhere");
        assert!(matches!(error, Error::Shape { tensor: "the packed sequences", .. }), "{error}");
    }
    if let Ok(other) = bifocal::open("wgpu").map(Settled) {
        let elsewhere = Sequences::from_host(&other, &[0, 8], &[0, 8]).expect("possible lengths");
        let error = attend(1, &elsewhere).expect_err("two devices");
        assert!(matches!(error, Error::DeviceMismatch { .. }), "{error}");
    }
}

#[test]
fn devices_that_are_not_there() {
    let error = bifocal::open("tpu").err().expect("no such runtime");
    assert_eq!(error.to_string(), "no tpu device: expected cpu, wgpu or cuda");
}

#[test]
fn tensors_of_another_device() {
    let Ok(wgpu) = bifocal::open("wgpu").map(Settled) else {
        println!("no second device to take a tensor from");
        return;
    };
    let client = cpu();
    let (q, far) = (tensor(&client, [1, 1, 4, 32]), tensor(&wgpu, [1, 1, 4, 32]));
    let inputs = Inputs::new(q.view(), far.view(), q.view());
    let problem = inputs.problem().expect("a possible problem");
    let partial = Partial::empty(&client, &problem, Element::F32);
    let error = Full.attend(&client, &problem, &inputs, Rows::All, &partial).expect_err("two devices");
    assert!(matches!(error, Error::DeviceMismatch { tensor: "key", .. }), "{error}");
}

/// What a moment gate says to attention over eight tokens of two heads, after what `change` has done to it.
fn gate_error(change: impl FnOnce(&Client, &mut Problem, &mut MomentGate) -> Option<Moments>) -> Error {
    let client = cpu();
    let mut problem = Problem::new([1, 2, 8, 32], [1, 2, 8, 32], Element::F32).expect("a possible problem");
    let mut gate = MomentGate::new(Window::new(2).expect("a window"), 0.5).expect("a share");
    let given = change(&client, &mut problem, &mut gate);
    let q = tensor(&client, [1, 2, 8, 32]);
    let inputs = Inputs::new(q.view(), q.view(), q.view());
    gate.predict(&client, &problem, &inputs, given.as_ref()).expect_err("a gate that cannot decide")
}

#[test]
fn gates_that_cannot_predict() {
    let error = gate_error(|_, problem, _| {
        *problem = problem.with_softcap(3.0).expect("a softcap");
        None
    });
    assert!(matches!(error, Error::Option { option: "softcap", .. }), "{error}");

    let moments = |client: &Client, kv_heads: usize, numbers: usize| {
        let host = HostMoments {
            keys: 3,
            mean: vec![0.0; kv_heads * 32],
            covariance: vec![0.0; kv_heads * 32 * numbers],
        };
        Moments::from_host(client, &host, [1, kv_heads, 32]).expect("possible moments")
    };
    let error = gate_error(|client, _, _| Some(moments(client, 1, 32)));
    assert!(matches!(error, Error::Shape { tensor: "the mean key", .. }), "{error}");
    let error = gate_error(|client, _, _| Some(moments(client, 2, 1)));
    assert!(matches!(error, Error::Shape { tensor: "the scatter of keys", .. }), "{error}");

    let client = cpu();
    let q = tensor(&client, [1, 2, 8, 32]);
    let sequences = Sequences::from_host(&client, &[0, 8], &[0, 8]).expect("one sequence");
    let inputs = Inputs::new(q.view(), q.view(), q.view()).with_sequences(&sequences);
    let gate = MomentGate::new(Window::new(2).expect("a window"), 0.5).expect("a share");
    let problem = inputs.problem().expect("a possible problem");
    let error = gate.predict(&client, &problem, &inputs, None).expect_err("packed sequences");
    assert!(matches!(error, Error::Option { option: "packed sequences", .. }), "{error}");
    // Log-sum-exps of other rows than the problem's.
    let predicted = Tensor::filled(&client, [1, 2, 1, 8], Element::F32, 0.0).expect("room for masses");
    let lse = Tensor::filled(&client, [1, 2, 7], Element::F32, 0.0).expect("room for log-sum-exps");
    let error = gate.decide(&client, &problem, lse.view(), predicted).expect_err("seven rows");
    assert!(matches!(error, Error::Shape { tensor: "the near log-sum-exp", .. }), "{error}");
}

#[test]
fn moments_of_nothing_and_of_no_numbers() {
    let client = cpu();
    let keys = tensor(&client, [1, 2, 8, 4]);
    for range in [3..3, 0..9] {
        let error =
            Moments::of(&client, keys.view(), range, Covariance::Full).expect_err("an impossible range");
        assert!(matches!(error, Error::Option { option: "the keys of moments", .. }), "{error}");
    }
    let host = |keys, mean: f32, variance: f32| HostMoments {
        keys,
        mean: vec![mean; 2],
        covariance: vec![variance, 0.0, 0.0, 1.0],
    };
    let refused = |host| Moments::from_host(&client, &host, [1, 1, 2]).expect_err("impossible moments");
    assert_eq!(refused(host(0, 0.0, 1.0)), Error::EmptyDimension { dimension: "keys of moments" });
    assert!(matches!(refused(host(1, f32::NAN, 1.0)), Error::Option { option: "a moment of keys", .. }));
    assert!(matches!(refused(host(1, 0.0, f32::INFINITY)), Error::Option { option: "a moment of keys", .. }));
    assert!(matches!(refused(host(1, 0.0, -1.0)), Error::Option { option: "a variance of keys", .. }));
    let short = HostMoments { covariance: vec![1.0; 3], ..host(1, 0.0, 1.0) };
    assert!(matches!(refused(short), Error::Shape { tensor: "the covariance of keys", .. }));

    let of = |covariance| Moments::of(&client, keys.view(), 0..8, covariance).expect("possible moments");
    let error = of(Covariance::Full).merge(&client, &of(Covariance::Diagonal)).expect_err("two kinds");
    assert!(matches!(error, Error::Shape { tensor: "the scatter of keys", .. }), "{error}");
}

#[test]
fn a_singular_covariance_is_a_number() {
    // One key, over and over: no variance at all, and its score is its mass.
    let client = cpu();
    let q = tensor(&client, [1, 2, 8, 32]);
    let inputs = Inputs::new(q.view(), q.view(), q.view());
    let gate = MomentGate::new(Window::new(2).expect("a window"), 0.5).expect("a share").with_sinks(0);
    let predicted =
        gate.predict(&client, &inputs.problem().expect("possible"), &inputs, None).expect("a mass");
    let score = 32.0 * 0.25 / 32f32.sqrt();
    for (at, mass) in predicted.to_f32(&client).expect("read").into_iter().enumerate() {
        let bulk = (at % 8).saturating_sub(1) as f32;
        let expected = if bulk == 0.0 { f32::NEG_INFINITY } else { bulk.ln() + score };
        assert!(mass == expected || (mass - expected).abs() < 1e-5, "{mass}, expected {expected}");
    }
}

#[test]
fn a_soft_gate_without_scores() {
    let client = cpu();
    let q = tensor(&client, [1, 2, 8, 32]);
    let inputs = Inputs::new(q.view(), q.view(), q.view());
    let problem = inputs.problem().expect("a possible problem");
    let hidden = Tensor::filled(&client, [1, 8, 4], Element::F32, 0.0).expect("room");
    let decision = FixedRouter::new(vec![1], 2).and_then(|router| router.route(&client, hidden.view()));
    let logo = Logo::new(Window::new(2).expect("a window"));
    let error = logo.attend(&client, &problem, &inputs, &decision.expect("routes")).expect_err("no scores");
    assert!(matches!(error, Error::Option { option: "scores", .. }), "{error}");
}

fn linear() -> LinearAttention {
    LinearAttention::beyond(Window::rattention(2).expect("a window"))
}

/// The error of a call of linear attention on `[1, 2, 8, 32]`, changed by `change`.
fn linear_refusal(change: impl FnOnce(&mut Problem)) -> Error {
    let client = cpu();
    let qkv = tensor(&client, [1, 2, 8, 32]);
    let inputs = LinearInputs::new(qkv.view(), qkv.view(), qkv.view());
    let mut problem = inputs.attention.problem().expect("a possible problem");
    let out = tensor(&client, problem.out_shape());
    change(&mut problem);
    linear().attend(&client, &problem, &inputs, &out).expect_err("an impossible call")
}

#[test]
fn linear_attention_of_what_it_cannot_do() {
    let error = linear_refusal(|problem| problem.key_len = 9);
    assert!(matches!(error, Error::Shape { tensor: "key", .. }), "{error}");
    let error = linear_refusal(|problem| problem.routine = Some(Routine::Mma));
    assert!(matches!(error, Error::Refused { operator: "linear", .. }), "{error}");
    assert!(matches!(linear().with_chunk(0), Err(Error::Option { option: "keys per chunk", .. })));

    let client = cpu();
    let qkv = tensor(&client, [1, 2, 8, 32]);
    let inputs = LinearInputs::new(qkv.view(), qkv.view(), qkv.view());
    let problem = inputs.attention.problem().expect("a possible problem");
    let out = tensor(&client, problem.out_shape());
    let sinks = Tensor::filled(&client, [2], Element::F32, 0.0).expect("room");
    let mut with_sinks = inputs;
    with_sinks.attention = inputs.attention.with_sink_logits(sinks.view());
    let error = linear().attend(&client, &problem, &with_sinks, &out).expect_err("sink logits");
    assert!(matches!(error, Error::Option { option: "sink logits of linear attention", .. }), "{error}");
    let sequences = Sequences::from_host(&client, &[0, 7], &[0, 8]).expect("possible lengths");
    let mut packed = inputs;
    packed.attention = inputs.attention.with_sequences(&sequences);
    let error = linear().attend(&client, &problem, &packed, &out).expect_err("seven of eight queries");
    assert!(matches!(error, Error::Shape { tensor: "the packed sequences", .. }), "{error}");
    let sequences = Sequences::from_host(&client, &[0, 3, 8], &[0, 3, 8]).expect("possible lengths");
    packed.attention = inputs.attention.with_sequences(&sequences);
    let state = State::zeros(&client, linear().state_shape(&problem)).expect("room");
    let error =
        linear().attend(&client, &problem, &packed.with_state(&state), &out).expect_err("one state for two");
    assert!(matches!(error, Error::Shape { tensor: "the state", .. }), "{error}");
    let other = Problem::new([1, 2, 4, 32], [1, 2, 4, 32], Element::F32).expect("a possible problem");
    let plan = bifocal::plan(&client, &other, &far_routes(&client, [1, 2, 4], 2)).expect("a plan");
    let planned = inputs.with_rows(plan.far_rows().expect("two reaches"));
    let error = linear().attend(&client, &problem, &planned, &out).expect_err("a plan of four tokens");
    assert!(matches!(error, Error::Shape { tensor: "the dispatch plan", .. }), "{error}");
    let state = State::zeros(&client, linear().state_shape(&problem)).expect("room");
    let error = linear().step(&client, &problem, qkv.view(), None, &state, &out).expect_err("eight queries");
    assert!(matches!(error, Error::Option { option: "the query length of a step", .. }), "{error}");
}

/// A profile of an H100, which is asked and not run on.
fn hopper(client: &Client) -> DeviceProfile {
    let mut profile = DeviceProfile::of(client);
    (profile.cpu_cores, profile.cuda_arch, profile.plane_size) = (None, Some(90), (32, 32));
    (profile.multiprocessors, profile.shared_memory) = (132, 227 << 10);
    profile.elements = Element::FLOATS.to_vec();
    profile
}

#[test]
fn what_tensor_cores_refuse_is_portable_and_says_so() {
    let client = cpu();
    let profile = hopper(&client);
    let qkv = Tensor::empty(&client, [1, 2, 8, 64], Element::Bf16);
    let inputs = LinearInputs::new(qkv.view(), qkv.view(), qkv.view());
    let problem = inputs.attention.problem().expect("a possible problem");
    let out = tensor(&client, problem.out_shape());
    let routine = |inputs: &LinearInputs<'_>| linear().routine(&problem, &profile, inputs, &out);
    assert_eq!(routine(&inputs), Ok(Routine::Mma));
    let sequences = Sequences::from_host(&client, &[0, 3, 8], &[0, 3, 8]).expect("possible lengths");
    let mut packed = inputs;
    packed.attention = inputs.attention.with_sequences(&sequences);
    assert_eq!(routine(&packed), Ok(Routine::Mma));
    let decays = tensor(&client, [1, 2, 8, 1]);
    assert_eq!(routine(&inputs.with_log_decay(decays.view())), Ok(Routine::Portable));
    let plan = bifocal::plan(&client, &problem, &far_routes(&client, [1, 2, 8], 2)).expect("a plan");
    let planned = inputs.with_rows(plan.far_rows().expect("two reaches"));
    assert_eq!(routine(&planned), Ok(Routine::Mma));
    let asked = problem.with_routine(Routine::Mma);
    let decaying = inputs.with_log_decay(decays.view());
    let error = linear().routine(&asked, &profile, &decaying, &out).expect_err("a state that decays");
    let Error::Refused { refusals, .. } = error else { panic!("{error}") };
    assert!(refusals.0.contains(&(Routine::Mma, Refusal::Decay)), "{refusals}");
    assert_eq!(linear().choose_backward(&problem, &profile), Ok(Routine::Portable));

    let gate = MomentGate::new(Window::new(2).expect("a window"), 0.5).expect("a share");
    let routine = |gate: MomentGate, given| gate.routine(&problem, &profile, &inputs.attention, given);
    assert_eq!(routine(gate, None), Ok(Routine::Mma));
    assert_eq!(routine(gate.with_covariance(Covariance::Diagonal), None), Ok(Routine::Portable));
    let keys = tensor(&client, [1, 2, 8, 64]);
    let moments = Moments::of(&client, keys.view(), 0..8, Covariance::Full).expect("moments");
    assert_eq!(routine(gate, Some(&moments)), Ok(Routine::Portable));
}

#[test]
fn states_that_do_not_fit_or_are_not_finite() {
    let client = cpu();
    let shape = [1, 2, 64, 32];
    let mut numbers = vec![0.5; 2 * 64 * 32];
    numbers[7] = f32::INFINITY;
    let error = State::from_f32(&client, shape, &numbers).expect_err("an infinity");
    assert!(error.to_string().contains("inf at 7"), "{error}");
    let state = State::zeros(&client, [1, 2, 32, 32]).expect("room");
    let qkv = tensor(&client, [1, 2, 8, 32]);
    let inputs = LinearInputs::new(qkv.view(), qkv.view(), qkv.view()).with_state(&state);
    let problem = inputs.attention.problem().expect("a possible problem");
    let out = tensor(&client, problem.out_shape());
    let error = linear().attend(&client, &problem, &inputs, &out).expect_err("a state of other features");
    assert!(matches!(error, Error::Shape { tensor: "the state", .. }), "{error}");
}

#[test]
fn norms_without_room_or_scale() {
    let client = cpu();
    let branch = tensor(&client, [1, 2, 8, 32]);
    let problem = Problem::new([1, 2, 8, 32], [1, 2, 8, 32], Element::F32).expect("a possible problem");
    let scale = Tensor::filled(&client, [2, 32], Element::F32, 1.0).expect("room");
    let inputs = NormSum {
        near: branch.view(),
        far: branch.view(),
        near_scale: scale.view(),
        far_scale: scale.view(),
        epsilon: 1e-8,
    };
    let out = tensor(&client, [1, 2, 8, 32]);
    let error = bifocal::norm_sum(&client, &problem, &NormSum { epsilon: 0.0, ..inputs }, &out);
    assert!(matches!(error, Err(Error::Option { .. })), "{error:?}");
    let other = Tensor::filled(&client, [1, 32], Element::F32, 1.0).expect("room");
    let error = bifocal::norm_sum(&client, &problem, &NormSum { far_scale: other.view(), ..inputs }, &out);
    assert!(matches!(error, Err(Error::Shape { tensor: "the far scale", .. })), "{error:?}");
    let broadcast = Tensor::new(out.into_handle(), Element::F32, [1, 2, 8, 32], [512, 256, 0, 1]);
    let error = bifocal::norm_sum(&client, &problem, &inputs, &broadcast);
    assert!(matches!(error, Err(Error::Overlap { .. })), "{error:?}");
}

/// Routes `[B, R, T]` that are all far.
fn far_routes(client: &Client, [batch, heads, tokens]: [usize; 3], reaches: usize) -> Routes {
    let geometry = RouteGeometry::new(batch, heads, tokens, reaches).expect("possible routes");
    let far = vec![reaches as u8 - 1; geometry.len()];
    Routes::from_host(client, geometry, &far).expect("room for routes")
}

#[test]
fn mixes_of_what_does_not_fit() {
    let client = cpu();
    let qkv = tensor(&client, [1, 2, 8, 32]);
    let inputs = Inputs::new(qkv.view(), qkv.view(), qkv.view());
    let problem = inputs.problem().expect("a possible problem");
    let window = Window::new(2).expect("a window");
    let error = Switch::new(window).attend(&client, &problem, &inputs, &far_routes(&client, [1, 2, 8], 2));
    assert!(matches!(error, Err(Error::Option { option: "router heads of a switch", .. })), "{error:?}");

    let scale = Tensor::filled(&client, [2, 32], Element::F32, 1.0).expect("room");
    let far = LinearInputs::new(qkv.view(), qkv.view(), qkv.view());
    let both = RattentionInputs { near: inputs, far, near_scale: scale.view(), far_scale: scale.view() };
    let three = bifocal::plan(&client, &problem, &far_routes(&client, [1, 2, 8], 3)).expect("a plan");
    let out = tensor(&client, [1, 2, 8, 32]);
    let error = AhaLinear::new(window).attend(&client, &problem, &both, &three, &out);
    assert!(matches!(error, Err(Error::Option { option: "reaches of the routes", .. })), "{error:?}");

    let logits = tensor(&client, [1, 2, 8, 2]);
    let error = bifocal::gate_outputs(&client, &problem, logits.view(), qkv.view(), &out);
    assert!(matches!(error, Err(Error::Shape { tensor: "the logits of output gates", .. })), "{error:?}");
    let broadcast = Tensor::new(out.into_handle(), Element::F32, [1, 2, 8, 32], [512, 256, 0, 1]);
    let error = bifocal::gate_outputs(&client, &problem, qkv.view(), qkv.view(), &broadcast);
    assert!(matches!(error, Err(Error::Overlap { .. })), "{error:?}");
}
