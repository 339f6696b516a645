//! Every checked constructor with arbitrary numbers: none may panic, and what one accepts keeps its promises.
//!
//! Only memory is bounded: nothing here asks the device for more than a few hundred bytes.
#![no_main]

use std::{fmt::Display, sync::OnceLock};

use bifocal::{
    AttentionOperator, DeviceProfile, Element, Far, FixedRouter, Full, Inputs, LinearChoice, LinearGate,
    MultiWindow, Problem, RandomRouter, Reach, RouteGeometry, Router, Routes, Sequences, Tensor, TensorView,
    Threshold, Window, Windowed,
    cubecl::{client::Client, server::Handle},
};
use libfuzzer_sys::{
    arbitrary::{Result, Unstructured},
    fuzz_target,
};

/// Bytes of the one buffer that hand-made tensors share.
const BUFFER: u64 = 256;

const ELEMENTS: [Element; 4] = [Element::F32, Element::F16, Element::Bf16, Element::U8];

type Call = fn(&mut Unstructured<'_>) -> Result<()>;

const CALLS: [Call; 10] = [
    windows,
    problems,
    problems_of_inputs,
    routes,
    sequences,
    random_routers,
    fixed_routers,
    linear_routers,
    multi_windows,
    tensors,
];

fuzz_target!(|data: &[u8]| {
    let mut bytes = Unstructured::new(data);
    while !bytes.is_empty() {
        // Too few bytes are no finding.
        let Ok(call) = bytes.choose(&CALLS) else { return };
        if call(&mut bytes).is_err() {
            return;
        }
    }
});

/// The device, its profile and the shared buffer.
fn device() -> &'static (Client, DeviceProfile, Handle) {
    static DEVICE: OnceLock<(Client, DeviceProfile, Handle)> = OnceLock::new();
    DEVICE.get_or_init(|| {
        let client = bifocal::open("cpu").expect("the CPU runtime is part of this build");
        let (profile, handle) = (DeviceProfile::of(&client), client.empty(BUFFER as usize));
        (client, profile, handle)
    })
}

/// A number that is small, large, at the end of its range or next to a power of two.
fn number(bytes: &mut Unstructured<'_>) -> Result<usize> {
    Ok(match bytes.int_in_range(0..=5)? {
        0 => bytes.int_in_range(0..=4)?,
        1 => usize::from(bytes.arbitrary::<u8>()?),
        2 => usize::from(bytes.arbitrary::<u16>()?),
        3 => usize::MAX - bytes.int_in_range(0..=2)?,
        4 => {
            (1_usize << bytes.int_in_range(0..=63)?).wrapping_add(bytes.int_in_range(0..=2)?).wrapping_sub(1)
        }
        _ => bytes.arbitrary()?,
    })
}

fn numbers<const N: usize>(bytes: &mut Unstructured<'_>) -> Result<[usize; N]> {
    let mut numbers = [0; N];
    for place in &mut numbers {
        *place = number(bytes)?;
    }
    Ok(numbers)
}

/// Up to `most` arbitrary values.
fn several<T>(
    bytes: &mut Unstructured<'_>,
    most: usize,
    mut one: impl FnMut(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let count = bytes.int_in_range(0..=most)?;
    (0..count).map(|_| one(bytes)).collect()
}

/// What was accepted. A refusal has to be able to say why.
fn accepted<T, E: Display>(result: core::result::Result<T, E>) -> Option<T> {
    result.inspect_err(|error| assert!(!error.to_string().is_empty())).ok()
}

/// A tensor of any shape and strides over the shared buffer, as another library could hand it over.
fn foreign<const RANK: usize>(bytes: &mut Unstructured<'_>) -> Result<Tensor<RANK>> {
    let (_, _, handle) = device();
    let element = *bytes.choose(&ELEMENTS)?;
    Ok(Tensor::new(handle.clone(), element, numbers(bytes)?, numbers(bytes)?))
}

fn windows(bytes: &mut Unstructured<'_>) -> Result<()> {
    let n = number(bytes)?;
    let including = [Window::new(n), Window::aha(n), Window::l2a(n)];
    let before = [Window::rattention(n), Window::from_flash_left(n), Window::from_flex_distance(n)];
    for (windows, keys) in [(including, n as u128), (before, n as u128 + 1)] {
        for window in windows {
            let possible = (1..=i32::MAX as u128).contains(&keys);
            assert_eq!(window.is_ok(), possible, "{n}: {window:?}");
            if let Some(window) = accepted(window) {
                assert_eq!(u128::from(window.keys()), keys);
            }
        }
    }
    Ok(())
}

fn problems(bytes: &mut Unstructured<'_>) -> Result<()> {
    let [batch, mut heads, query_len, head_dim] = numbers(bytes)?;
    let [other_batch, kv_heads, key_len, other_dim] = numbers(bytes)?;
    // Rarely would two arbitrary numbers be equal, or one a multiple of the other.
    if bytes.arbitrary()? {
        heads = kv_heads.saturating_mul(bytes.int_in_range(1..=4)?);
    }
    let key_batch = if bytes.arbitrary()? { batch } else { other_batch };
    let key_dim = if bytes.arbitrary()? { head_dim } else { other_dim };
    let (query, key) = ([batch, heads, query_len, head_dim], [key_batch, kv_heads, key_len, key_dim]);
    let problem = Problem::new(query, key, *bytes.choose(&ELEMENTS)?);
    if let Some(problem) = accepted(problem) {
        check_problem(&problem);
        refine(problem, bytes)?;
    }
    Ok(())
}

fn problems_of_inputs(bytes: &mut Unstructured<'_>) -> Result<()> {
    let (query, key, value) = (foreign(bytes)?, foreign(bytes)?, foreign(bytes)?);
    let inputs = Inputs::new(query.view(), key.view(), value.view());
    if let Some(problem) = accepted(inputs.problem()) {
        check_problem(&problem);
        accepted(inputs.check(&device().0, &problem));
    }
    Ok(())
}

fn check_problem(problem: &Problem) {
    assert!(problem.batch >= 1 && problem.kv_heads >= 1 && problem.head_dim >= 1 && problem.value_dim >= 1);
    assert_eq!(problem.group() * problem.kv_heads, problem.heads);
    assert_eq!(problem.packed_rows(), problem.group() * problem.query_len);
    assert!((1..=1 << 30).contains(&problem.packed_rows()) && (1..=1 << 30).contains(&problem.key_len));
    assert!(problem.scale.is_finite() && problem.scale > 0.0);
    // The last query is at the last key, and differences of positions fit 32 bits.
    assert_eq!(problem.position(problem.query_len - 1), problem.key_len as i64 - 1);
    assert!(i32::try_from(problem.position(0)).is_ok());
}

fn refine(problem: Problem, bytes: &mut Unstructured<'_>) -> Result<()> {
    let (value_dim, scale, cap) = (number(bytes)?, bytes.arbitrary::<f32>()?, bytes.arbitrary::<f32>()?);
    if let Some(problem) = accepted(problem.with_value_dim(value_dim)) {
        assert!(problem.value_dim >= 1);
        assert_eq!(problem.out_shape(), [problem.batch, problem.heads, problem.query_len, value_dim]);
    }
    if let Some(problem) = accepted(problem.with_scale(scale)) {
        assert!(problem.scale.is_finite());
    }
    if let Some(problem) = accepted(problem.with_softcap(cap)) {
        assert!(problem.softcap.is_some_and(|cap| cap.is_finite() && cap > 0.0));
    }

    let Some(window) = accepted(Window::new(number(bytes)?)) else { return Ok(()) };
    let sinks = bytes.arbitrary()?;
    let (near, far) = (Windowed::new(window).with_sinks(sinks), Far::beyond(window).with_sinks(sinks));
    for token in [0, problem.query_len / 2, problem.query_len - 1] {
        let seen = |reach: Reach| reach.visible(problem.position(token), problem.key_len);
        assert!(seen(Reach::All) <= problem.key_len);
        assert_eq!(seen(near.reach()) + seen(far.reach()), seen(Reach::All), "near and far at {token}");
    }
    for operator in [&near as &dyn AttentionOperator, &far, &Full] {
        assert!(!operator.reach().to_string().is_empty());
        accepted(operator.choose(&problem, &device().1));
    }
    Ok(())
}

fn routes(bytes: &mut Unstructured<'_>) -> Result<()> {
    let (client, _, handle) = device();
    let [batch, heads, tokens, reaches] = numbers(bytes)?;
    let checked = accepted(RouteGeometry::new(batch, heads, tokens, reaches));
    if let Some(geometry) = checked {
        assert!(!geometry.is_empty() && geometry.len() <= geometry.bytes());
        assert!(geometry.pitch() >= tokens && geometry.pitch().is_multiple_of(4));
        assert!((1..=255).contains(&geometry.reaches));
    }
    // The fields are public: a geometry may come from elsewhere than its constructor.
    let mut geometry = RouteGeometry::new(1, 1, 1, 1).expect("the smallest geometry");
    (geometry.batch, geometry.heads, geometry.tokens, geometry.reaches) = (batch, heads, tokens, reaches);
    let host = match bytes.int_in_range(0..=2)? {
        // As many as there should be, where that is not too much memory.
        0 => {
            vec![bytes.arbitrary()?; batch.saturating_mul(heads).saturating_mul(tokens).min(BUFFER as usize)]
        }
        _ => several(bytes, 32, |bytes| bytes.arbitrary())?,
    };
    if let Some(routes) = accepted(Routes::from_host(client, geometry, &host)) {
        assert!(checked.is_some(), "routes of an impossible {geometry:?}");
        assert_eq!(routes.geometry(), geometry);
        assert!(host.iter().all(|&route| usize::from(route) < reaches));
        assert_eq!(routes.to_host(client).expect("routes can be read back"), host);
    }
    if let Some(routes) = accepted(Routes::from_device(client, geometry, handle.clone())) {
        assert!(checked.is_some(), "routes of an impossible {geometry:?}");
        let count = routes.to_host(client).expect("routes can be read back").len();
        assert!(count == geometry.len() && count as u64 <= BUFFER, "{count} routes in {BUFFER} bytes");
    }
    Ok(())
}

fn sequences(bytes: &mut Unstructured<'_>) -> Result<()> {
    let client = &device().0;
    let mut lengths = || -> Result<Vec<usize>> {
        let mut lengths = several(bytes, 6, number)?;
        // Arbitrary lengths seldom count up from 0.
        if bytes.arbitrary()? {
            lengths.iter_mut().for_each(|length| *length %= 64);
            lengths.push(0);
            lengths.sort_unstable();
        }
        Ok(lengths)
    };
    let (queries, keys) = (lengths()?, lengths()?);
    // A table has an entry per query: memory is bounded.
    if queries.last().is_some_and(|&end| end > 1 << 12) {
        return Ok(());
    }
    let counts_up = |lengths: &[usize]| {
        lengths.len() >= 2
            && lengths[0] == 0
            && lengths.is_sorted()
            && lengths.iter().all(|&end| end < 1 << 30)
    };
    let possible = counts_up(&queries) && counts_up(&keys) && queries.len() == keys.len();
    let sequences = Sequences::from_host(client, &queries, &keys);
    assert_eq!(sequences.is_ok(), possible, "{queries:?}, {keys:?}: {sequences:?}");
    accepted(sequences);
    Ok(())
}

fn random_routers(bytes: &mut Unstructured<'_>) -> Result<()> {
    let (heads, seed) = (number(bytes)?, bytes.arbitrary()?);
    let mut shares: Vec<f64> = several(bytes, 300, |bytes| bytes.arbitrary())?;
    // Arbitrary shares seldom add up to 1.
    if bytes.arbitrary()? {
        for share in &mut shares {
            *share = share.abs().min(1.0);
        }
        let sum: f64 = shares.iter().sum();
        for share in &mut shares {
            *share /= sum;
        }
    }
    let (row, token) = (bytes.arbitrary()?, bytes.arbitrary()?);
    if let Some(router) = accepted(RandomRouter::new(heads, &shares, seed)) {
        assert!(router.heads() == heads && heads >= 1);
        assert!(router.reaches() == shares.len() && (1..=255).contains(&shares.len()));
        assert!(usize::from(router.route_of(row, token)) < router.reaches());
    }
    let far_share = bytes.arbitrary()?;
    if let Some(router) = accepted(RandomRouter::gate(heads, far_share, seed)) {
        assert!((0.0..=1.0).contains(&far_share));
        let route = router.route_of(row, token);
        // The other share is what is left of 1: nothing where all go near, and all where nothing does.
        assert!(
            route <= 1 && !(far_share == 1.0 && route == 0),
            "route {route} at a far share of {far_share}"
        );
    }
    Ok(())
}

fn fixed_routers(bytes: &mut Unstructured<'_>) -> Result<()> {
    let routes = several(bytes, 32, |bytes| bytes.arbitrary::<u8>())?;
    let reaches = number(bytes)?;
    let possible = !routes.is_empty()
        && (1..=255).contains(&reaches)
        && routes.iter().all(|&route| usize::from(route) < reaches);
    let router = FixedRouter::new(routes.clone(), reaches);
    assert_eq!(router.is_ok(), possible, "{routes:?} of {reaches}: {router:?}");
    if let Some(router) = accepted(router) {
        assert_eq!((router.heads(), router.reaches()), (routes.len(), reaches));
    }
    Ok(())
}

fn linear_routers(bytes: &mut Unstructured<'_>) -> Result<()> {
    let (weight, bias, reaches) = (foreign::<2>(bytes)?, foreign::<1>(bytes)?, number(bytes)?);
    if let Some(choice) = accepted(LinearChoice::new(weight.clone(), reaches)) {
        let choice = choice.with_bias(bias.clone());
        assert!((2..=32).contains(&choice.reaches()));
        assert_eq!(choice.heads() * choice.reaches(), weight.shape()[1]);
    }
    let score = bytes.arbitrary()?;
    let threshold = if bytes.arbitrary()? { Threshold::Above(score) } else { Threshold::AtLeast(score) };
    let temperature: f32 = bytes.arbitrary()?;
    for gate in [LinearGate::aha(weight.clone()), LinearGate::l2a(weight.clone())] {
        let gate = gate.with_bias(bias.clone());
        assert_eq!((gate.heads(), gate.reaches()), (weight.shape()[1], 2));
        assert_eq!(accepted(gate.clone().with_threshold(threshold)).is_some(), score > 0.0 && score < 1.0);
        let warm = temperature > 0.0 && temperature.is_finite();
        assert_eq!(accepted(gate.with_temperature(temperature)).is_some(), warm);
    }
    Ok(())
}

fn multi_windows(bytes: &mut Unstructured<'_>) -> Result<()> {
    let windows = several(bytes, 6, |bytes| Ok(accepted(Window::new(number(bytes)?))))?;
    let windows: Vec<Window> = windows.into_iter().flatten().collect();
    let ascending = !windows.is_empty() && windows.windows(2).all(|pair| pair[0].keys() < pair[1].keys());
    let several = MultiWindow::new(&windows);
    assert_eq!(several.is_ok(), ascending, "{windows:?}");
    if let Some(several) = accepted(several) {
        assert_eq!(several.reaches(), windows.len() + 1);
    }
    Ok(())
}

fn tensors(bytes: &mut Unstructured<'_>) -> Result<()> {
    let (client, ..) = device();
    let element = *bytes.choose(&ELEMENTS)?;
    let shape: [usize; 3] = numbers(bytes)?;
    let mut values: Vec<f32> = several(bytes, 16, |bytes| bytes.arbitrary())?;
    if bytes.arbitrary()? {
        let fits = shape.iter().fold(1, |size: usize, &n| size.saturating_mul(n)).min(64);
        values.resize(fits, bytes.arbitrary()?);
    }
    if let Some(tensor) = accepted(Tensor::from_f32(client, shape, element, &values)) {
        assert_eq!(shape.iter().map(|&n| n as u128).product::<u128>(), values.len() as u128);
        // An empty tensor has no buffer to speak of.
        if !values.is_empty() {
            accepted(tensor.view().check("a new tensor", client, shape, element))
                .expect("a tensor fits its own buffer");
        }
        let back = tensor.to_f32(client).expect("a tensor can be read back");
        assert_eq!(back.len(), values.len());
        let same = |(x, y): (&f32, &f32)| x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan();
        assert!(element != Element::F32 || back.iter().zip(&values).all(same), "{values:?} became {back:?}");
    }

    check_view(foreign::<1>(bytes)?.view());
    check_view(foreign::<4>(bytes)?.view());
    Ok(())
}

/// What passes the checks stays inside its buffer, and what is said to be disjoint is.
fn check_view<const RANK: usize>(view: TensorView<'_, RANK>) {
    let (client, ..) = device();
    let (shape, strides) = (view.shape(), view.strides());
    if accepted(view.check("a foreign tensor", client, shape, view.element())).is_some() {
        // An empty tensor has no last element.
        let last: u128 =
            shape.iter().zip(strides).map(|(&n, stride)| n.saturating_sub(1) as u128 * stride as u128).sum();
        let needed = if shape.contains(&0) { 0 } else { (last + 1) * view.element().size() as u128 };
        assert!(needed <= u128::from(BUFFER), "{shape:?} {strides:?} needs {needed} bytes");
        if accepted(view.check_disjoint("a foreign tensor")).is_some() && needed > 0 {
            let size: u128 = shape.iter().map(|&n| n as u128).product();
            assert!(size <= u128::from(BUFFER), "{shape:?} {strides:?} is said not to share memory");
        }
    }
    // These have to answer for tensors that pass no other check, too.
    accepted(view.check_contiguous("a foreign tensor"));
    accepted(view.check_disjoint("a foreign tensor"));
}
