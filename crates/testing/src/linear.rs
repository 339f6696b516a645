//! What linear attention satisfies, and RATTENTION, which is made of it.

use bifocal::{
    AttentionOperator, DeviceProfile, Element, FeatureMap, Gradients, LeavingKey, LinearAttention,
    LinearInputs, NormSum, Partial, Rattention, RattentionInputs, RattentionStep, Reach, Routine, Rows,
    State, Tensor, Window, Windowed,
};
use bifocal_reference::{self as reference, Array, LinearOptions};
use num_traits::Float;
use proptest::{prelude::*, sample::select};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    Device, Effort, Property,
    case::{Case, cases},
    compare::{near, run, worst},
    everywhere,
    gradients::draw_d_out,
    inputs::{Data, OnDevice, array, round},
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "linear_attention_equals_the_oracle",
        claim: "every feature map, window, shape, layout, decay and state that comes in gives the oracle's output and state",
        applies: everywhere,
        one_in: 2,
        run: linear_attention_equals_the_oracle,
    },
    Property {
        name: "chunks_of_linear_attention_do_not_matter",
        claim: "whatever the chunks that keys are cut into, outputs, states and gradients are the same",
        applies: everywhere,
        one_in: 2,
        run: chunks_of_linear_attention_do_not_matter,
    },
    Property {
        name: "a_state_carries_over",
        claim: "a call that goes on from the state of another, and from its window, gives what one call gives",
        applies: everywhere,
        one_in: 2,
        run: a_state_carries_over,
    },
    Property {
        name: "window_and_linear_see_every_key_once",
        claim: "a NaN value reaches a row through the window or through the state, through exactly one of them if it is past",
        applies: everywhere,
        one_in: 2,
        run: window_and_linear_see_every_key_once,
    },
    Property {
        name: "a_step_is_the_last_row",
        claim: "decoding token by token gives the rows and the states of one call",
        applies: everywhere,
        one_in: 2,
        run: a_step_is_the_last_row,
    },
    Property {
        name: "linear_gradients_equal_the_oracle",
        claim: "gradients of queries, keys, values and the state that came in are the oracle's, and add to what is there",
        applies: everywhere,
        one_in: 4,
        run: linear_gradients_equal_the_oracle,
    },
    Property {
        name: "two_linear_runs_agree_bit_for_bit",
        claim: "the same linear attention twice, forward and backward, gives the same bits",
        applies: everywhere,
        one_in: 4,
        run: two_linear_runs_agree_bit_for_bit,
    },
    Property {
        name: "norm_sums_equal_the_oracle",
        claim: "the sum of two normed branches and its gradients are the oracle's, whatever types and layouts",
        applies: everywhere,
        one_in: 4,
        run: norm_sums_equal_the_oracle,
    },
    Property {
        name: "rattention_equals_the_oracle",
        claim: "RATTENTION's output and all of its gradients are the oracle's, and its last step gives the last row",
        applies: everywhere,
        one_in: 8,
        run: rattention_equals_the_oracle,
    },
];

/// A call of linear attention.
#[derive(Clone, Debug)]
struct LinearCase {
    case: Case,
    window: Window,
    map: FeatureMap,
    chunk: Option<usize>,
    /// Whether the state decays: by head, or by head and token.
    decays: Option<bool>,
    /// Whether a state comes in.
    starts: bool,
}

fn linear_cases(profile: &DeviceProfile) -> impl Strategy<Value = LinearCase> + use<> {
    // Shaders are compiled for seconds: few different ones.
    let shaders = profile.runtime.contains("wgpu");
    let chunks = prop_oneof![Just(None), Just(Some(1usize)), (2..40usize).prop_map(Some), Just(Some(64))];
    // Most windows are short enough for keys to leave them.
    let windows = prop_oneof![3 => 1..20usize, 1 => 20..100usize, 1 => Just(4096)];
    let decays = prop_oneof![2 => Just(None), 1 => any::<bool>().prop_map(Some)];
    // Tensor cores compute softmax pairs alone.
    let pairs = if profile.cuda_arch.is_some() { 3 } else { 0 };
    let maps = prop_oneof![pairs => Just(FeatureMap::SoftmaxPair), 3 => select(FeatureMap::ALL.to_vec())];
    let options = (windows, maps, chunks, decays, any::<bool>());
    (cases(profile), options).prop_map(move |(case, (window, map, chunk, decays, starts))| {
        let (head_dim, value_dim) = if shaders { (32, 32) } else { (case.head_dim, case.value_dim) };
        // Without a softmax, large numbers leave what f16 holds.
        let magnitude = if map == FeatureMap::SoftmaxPair { case.magnitude } else { 1.0 };
        let routine = case.routine.filter(|&routine| routine == Routine::Portable);
        let case =
            Case { head_dim, value_dim, magnitude, routine, softcap: false, sink_logits: false, ..case };
        LinearCase {
            case,
            window: Window::new(window).expect("at least one key"),
            map,
            chunk,
            decays,
            starts,
        }
    })
}

/// The numbers of a case.
struct LinearData {
    of: LinearCase,
    data: Data,
    /// `[B, Hk, Tk, 1]`.
    log_decay: Option<Vec<f32>>,
    state: Option<Vec<f32>>,
    /// The gradient of the state that is left.
    d_state: Vec<f32>,
}

impl LinearData {
    fn new(of: &LinearCase) -> Self {
        let case = &of.case;
        let mut rng = SmallRng::seed_from_u64(case.seed ^ 0x11ea);
        let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect() };
        let lists = case.batch * case.kv_heads;
        let numbers = of.state_shape().iter().product();
        let log_decay = of.decays.map(|by_head| {
            let mut decays: Vec<f32> = draw(lists * case.key_len).iter().map(|x| 0.2 * x - 0.2).collect();
            if by_head {
                decays.chunks_mut(case.key_len).for_each(|head| head.fill(head[0]));
            }
            decays
        });
        let (state, d_state) = (of.starts.then(|| draw(numbers)), draw(numbers));
        Self { of: of.clone(), data: Data::new(case), log_decay, state, d_state }
    }

    fn upload(&self, device: &Device, swapped: bool) -> Result<LinearOnDevice, String> {
        let (client, case) = (&device.client, &self.of.case);
        let qkv = run(match swapped {
            true => self.data.upload_token_major(client, false),
            false => self.data.upload(client),
        })?;
        let shape = [case.batch, case.kv_heads, case.key_len, 1];
        let by_head = self.of.decays == Some(true);
        let log_decay = match &self.log_decay {
            Some(decays) => {
                let tensor = run(Tensor::from_f32(client, shape, Element::F32, decays))?;
                let [by_batch, by_kv_head, ..] = tensor.strides();
                let strides = [by_batch, by_kv_head, usize::from(!by_head), 1];
                Some(Tensor::new(tensor.into_handle(), Element::F32, shape, strides))
            }
            None => None,
        };
        let state = match &self.state {
            Some(state) => Some(run(State::from_f32(client, self.of.state_shape(), state))?),
            None => None,
        };
        Ok(LinearOnDevice { qkv, log_decay, state })
    }

    /// Query, key and value for the oracle, and what it depends on besides.
    fn oracle<F: Float>(&self, round: fn(F) -> F) -> ([Array<F, 4>; 3], LinearOptions<F>) {
        let case = &self.of.case;
        let data = &self.data;
        let q = array(data.query_shape(), &data.query);
        let k = array(data.key_shape(), &data.key);
        let v = array(data.value_shape(), &data.value);
        let options = LinearOptions {
            window: self.of.window,
            map: self.of.map,
            log_decay: self
                .log_decay
                .as_ref()
                .map(|decays| array([case.batch, case.kv_heads, case.key_len], decays)),
            state: self.state.as_ref().map(|state| array(self.of.state_shape(), state)),
            round,
        };
        ([q, k, v], options)
    }

    fn forward<F: Float>(&self, round: fn(F) -> F) -> reference::LinearOutput<F> {
        let ([q, k, v], options) = self.oracle(round);
        reference::linear_attention(&q, &k, &v, &options)
    }

    fn backward<F: Float>(&self, d_out: &[f32]) -> [Vec<F>; 4] {
        let ([q, k, v], options) = self.oracle(|x| x);
        let d_out = array(self.of.case.problem().out_shape(), d_out);
        let d_state = array(self.of.state_shape(), &self.d_state);
        let found = reference::linear_attention_backward(&q, &k, &v, &options, &d_out, &d_state);
        [found.query, found.key, found.value, found.state].map(Array::into_vec)
    }
}

impl LinearCase {
    fn operator(&self) -> LinearAttention {
        let operator = LinearAttention::beyond(self.window).with_feature_map(self.map);
        match self.chunk {
            Some(keys) => operator.with_chunk(keys).expect("a length that is allowed"),
            None => operator,
        }
    }

    fn state_shape(&self) -> [usize; 4] {
        self.operator().state_shape(&self.case.problem())
    }

    /// Whether products may take features, weights and states rounded to the inputs' type, as they do on tensor cores.
    fn may_round(&self) -> bool {
        self.case.may_round_weights() && self.map == FeatureMap::SoftmaxPair && self.decays.is_none()
    }

    /// What a plain computation does to features and states.
    fn round(&self) -> fn(f32) -> f32 {
        if self.may_round() { self.case.round_weight() } else { |x| x }
    }

    /// The type that an answer has been rounded to on its way: its own, or that of what was multiplied.
    fn rounded_to(&self, element: Element) -> Element {
        if self.may_round() { self.case.element } else { element }
    }
}

struct LinearOnDevice {
    qkv: OnDevice,
    log_decay: Option<Tensor<4>>,
    state: Option<State>,
}

impl LinearOnDevice {
    fn inputs(&self) -> LinearInputs<'_> {
        let mut inputs = LinearInputs::new(self.qkv.query.view(), self.qkv.key.view(), self.qkv.value.view());
        if let Some(log_decay) = &self.log_decay {
            inputs = inputs.with_log_decay(log_decay.view());
        }
        match &self.state {
            Some(state) => inputs.with_state(state),
            None => inputs,
        }
    }
}

/// Output and state of one call, read back; the output was poisoned.
fn attend(device: &Device, of: &LinearCase, on: &LinearOnDevice) -> Result<[Vec<f32>; 2], String> {
    let (client, problem) = (&device.client, of.case.problem());
    let out = run(Tensor::filled(client, problem.out_shape(), of.case.out_element(), f32::NAN))?;
    let state = run(of.operator().attend(client, &problem, &on.inputs(), &out))?;
    Ok([run(out.to_f32(client))?, run(state.to_f32(client))?])
}

/// The gradients of query, key and value, to which `times` calls have added, and of the state that came in.
fn differentiate(
    device: &Device,
    data: &LinearData,
    on: &LinearOnDevice,
    d_out: &[f32],
    times: usize,
) -> Result<[Vec<f32>; 4], String> {
    let (client, of) = (&device.client, &data.of);
    let problem = of.case.problem();
    let d_out = run(Tensor::from_f32(client, problem.out_shape(), of.case.out_element(), d_out))?;
    let d_state = run(Tensor::from_f32(client, of.state_shape(), Element::F32, &data.d_state))?;
    let gradients = run(Gradients::zeros(client, &problem, false))?;
    let mut d_start = None;
    for _ in 0..times {
        let found =
            of.operator().backward(client, &problem, &on.inputs(), d_out.view(), Some(&d_state), &gradients);
        d_start = run(found)?;
    }
    let d_start = d_start.map_or(Ok(Vec::new()), |d_start| run(d_start.to_f32(client)))?;
    let Gradients { query, key, value, .. } = gradients;
    Ok([run(query.to_f32(client))?, run(key.to_f32(client))?, run(value.to_f32(client))?, d_start])
}

/// What is right, and how far off a kernel may be: twice the error of the same oracle in f32, rounded to `element`, and a few
/// roundings of the largest number.
struct Bound {
    exact: Vec<f64>,
    tolerance: f64,
}

impl Bound {
    fn new(exact: Vec<f64>, plain: &[f32], element: Element) -> Self {
        let largest = exact.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max);
        let measured = worst(&exact, plain.iter().map(|&x| round(element, x)));
        // Sums are cut in other places than the oracle's.
        let roundings = 64.0 * Element::F32.epsilon() + own_rounding(element);
        Self { exact, tolerance: 2.0 * measured + roundings * largest }
    }

    fn accepts(&self, what: &str, found: &[f32]) -> Result<(), String> {
        near(what, &self.exact, found, self.tolerance)
    }
}

fn own_rounding(element: Element) -> f64 {
    if element == Element::F32 { 0.0 } else { element.epsilon() }
}

fn linear_attention_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (linear_cases(&device.profile), any::<bool>()), |(of, swapped)| {
        let data = LinearData::new(&of);
        let [out, state] = attend(device, &of, &data.upload(device, swapped)?)?;
        let (exact, plain) = (data.forward::<f64>(|x| x), data.forward::<f32>(of.round()));
        let [of_out, of_state] = [of.case.out_element(), Element::F32].map(|element| of.rounded_to(element));
        Bound::new(exact.out.into_vec(), plain.out.as_slice(), of_out).accepts("output", &out)?;
        Bound::new(exact.state.into_vec(), plain.state.as_slice(), of_state).accepts("state", &state)
    })
}

fn chunks_of_linear_attention_do_not_matter(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (linear_cases(&device.profile), 1..50usize);
    refute(effort, strategy, |(of, other)| {
        let (data, element) = (LinearData::new(&of), of.case.out_element());
        let on = data.upload(device, false)?;
        let cut = LinearData { of: LinearCase { chunk: Some(other), ..of.clone() }, ..LinearData::new(&of) };
        let d_out = draw_d_out(&of.case);
        let whole = attend(device, &of, &on)?;
        let parts = attend(device, &cut.of, &on)?;
        for (what, (whole, parts), element) in
            [("output", (&whole[0], &parts[0]), element), ("state", (&whole[1], &parts[1]), Element::F32)]
        {
            agree(what, whole, parts, of.rounded_to(element))?;
        }
        let whole = differentiate(device, &data, &on, &d_out, 1)?;
        let parts = differentiate(device, &cut, &on, &d_out, 1)?;
        for (what, (whole, parts)) in NAMES.into_iter().zip(whole.iter().zip(&parts)) {
            agree(what, whole, parts, Element::F32)?;
        }
        Ok(())
    })
}

const NAMES: [&str; 4] =
    ["gradient of the query", "gradient of the key", "gradient of the value", "gradient of the state"];

/// Two kernels' answers to the same question.
fn agree(what: &str, a: &[f32], b: &[f32], element: Element) -> Result<(), String> {
    let wide: Vec<f64> = a.iter().map(|&x| f64::from(x)).collect();
    let largest = wide.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max);
    near(what, &wide, b, (256.0 * Element::F32.epsilon() + own_rounding(element)) * largest)
}

/// Tokens `from..to` of `[lists, tokens, dim]`.
fn cut(values: &[f32], tokens: usize, from: usize, to: usize, dim: usize) -> Vec<f32> {
    values.chunks(tokens * dim).flat_map(|list| &list[from * dim..to * dim]).copied().collect()
}

/// A part of a self-attention case, from a state: its queries `from..to` and keys `first_key..to`.
fn part(
    data: &LinearData,
    state: Option<Vec<f32>>,
    (from, first_key, to): (usize, usize, usize),
) -> LinearData {
    let of = &data.of;
    let Case { query_len, key_len, head_dim, value_dim, .. } = of.case;
    let case = Case { query_len: to - from, key_len: to - first_key, ..of.case.clone() };
    let mut numbers = Data::new(&case);
    numbers.query = cut(&data.data.query, query_len, from, to, head_dim);
    numbers.key = cut(&data.data.key, key_len, first_key, to, head_dim);
    numbers.value = cut(&data.data.value, key_len, first_key, to, value_dim);
    LinearData {
        of: LinearCase { case, starts: state.is_some(), ..of.clone() },
        data: numbers,
        log_decay: data.log_decay.as_ref().map(|decays| cut(decays, key_len, first_key, to, 1)),
        state,
        d_state: data.d_state.clone(),
    }
}

/// Self-attention of at least two tokens.
fn self_attention(of: LinearCase) -> LinearCase {
    let length = of.case.query_len.max(2);
    LinearCase { case: Case { query_len: length, key_len: length, ..of.case }, ..of }
}

fn a_state_carries_over(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (linear_cases(&device.profile), any::<prop::sample::Index>());
    refute(effort, strategy, |(of, at)| {
        let of = self_attention(of);
        let data = LinearData::new(&of);
        let length = of.case.query_len;
        let at = 1 + at.index(length - 1);
        let whole = attend(device, &of, &data.upload(device, false)?)?;
        let first = part(&data, data.state.clone(), (0, 0, at));
        let [head, state] = attend(device, &first.of, &first.upload(device, false)?)?;
        let kept = at.saturating_sub(of.window.keys() as usize);
        let second = part(&data, Some(state), (at, kept, length));
        let [tail, state] = attend(device, &second.of, &second.upload(device, false)?)?;
        let (dim, element) = (of.case.value_dim, of.case.out_element());
        agree("state", &whole[1], &state, of.rounded_to(Element::F32))?;
        let element = of.rounded_to(element);
        agree("output before the cut", &cut(&whole[0], length, 0, at, dim), &head, element)?;
        agree("output after the cut", &cut(&whole[0], length, at, length, dim), &tail, element)
    })
}

fn window_and_linear_see_every_key_once(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (linear_cases(&device.profile), any::<prop::sample::Index>());
    refute(effort, strategy, |(of, at)| {
        // A state or a query of nothing but zeros would hide what it meets.
        let of = LinearCase { map: FeatureMap::SoftmaxPair, ..of };
        let of = LinearCase { case: Case { magnitude: 1.0, ..of.case }, starts: false, ..of };
        let (case, client) = (&of.case, &device.client);
        let mut data = LinearData::new(&of);
        let token = at.index(case.key_len);
        data.data.spoil(token, false);
        let on = data.upload(device, false)?;
        let far = attend(device, &of, &on)?.into_iter().next().unwrap_or_default();
        let problem = case.problem();
        let partial = run(Partial::poisoned(client, &problem, Element::F32))?;
        run(Windowed::new(of.window).attend(client, &problem, &on.qkv.inputs(), Rows::All, &partial))?;
        let near = run(partial.out.to_f32(client))?;
        for row in 0..case.batch * case.heads() * case.query_len {
            let position = problem.position(row % case.query_len);
            let hit = |out: &[f32]| out[row * case.value_dim..][..case.value_dim].iter().all(|x| x.is_nan());
            let missed =
                |out: &[f32]| out[row * case.value_dim..][..case.value_dim].iter().all(|x| x.is_finite());
            let sees = |reach: Reach| reach.sees(position, token as i64);
            let (window, beyond) = (Reach::Window(of.window), of.operator().reach());
            for (name, out, reach) in [("window", &near, window), ("state", &far, beyond)] {
                let right = if sees(reach) { hit(out) } else { missed(out) };
                if !right {
                    return Err(format!(
                        "row {row} at position {position}: key {token} through the {name}, expected {}",
                        sees(reach)
                    ));
                }
            }
            if sees(window) && sees(beyond) || sees(Reach::All) != (sees(window) || sees(beyond)) {
                return Err(format!("the two branches do not share the past of row {row}"));
            }
        }
        Ok(())
    })
}

fn a_step_is_the_last_row(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (linear_cases(&device.profile), 1..6usize);
    refute(effort, strategy, |(of, steps)| {
        let of = self_attention(of);
        let data = LinearData::new(&of);
        let (client, length) = (&device.client, of.case.query_len);
        let first_step = length - steps.min(length - 1);
        let before = part(&data, data.state.clone(), (0, 0, first_step));
        let [_, state] = attend(device, &before.of, &before.upload(device, false)?)?;
        let state = run(State::from_f32(client, of.state_shape(), &state))?;
        for token in first_step..length {
            let row = part(&data, None, (token, token, token + 1));
            let row_on = row.upload(device, false)?;
            let problem = row.of.case.problem();
            let leaves = token.checked_sub(of.window.keys() as usize);
            let left = leaves.map(|key| part(&data, None, (key, key, key + 1)));
            let left_on = left.as_ref().map(|left| left.upload(device, false)).transpose()?;
            let left = left_on.as_ref().map(leaving);
            let out = run(Tensor::filled(client, problem.out_shape(), of.case.out_element(), f32::NAN))?;
            run(of.operator().step(client, &problem, row_on.qkv.query.view(), left, &state, &out))?;
            // All rows up to this one at once.
            let whole = part(&data, data.state.clone(), (0, 0, token + 1));
            let [rows, end] = attend(device, &whole.of, &whole.upload(device, false)?)?;
            let last = cut(&rows, token + 1, token, token + 1, of.case.value_dim);
            let element = of.rounded_to(of.case.out_element());
            agree("output", &last, &run(out.to_f32(client))?, element)?;
            agree("state", &end, &run(state.to_f32(client))?, of.rounded_to(Element::F32))?;
        }
        Ok(())
    })
}

fn linear_gradients_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (linear_cases(&device.profile), any::<bool>()), |(of, swapped)| {
        let data = LinearData::new(&of);
        let d_out = draw_d_out(&of.case);
        let on = data.upload(device, swapped)?;
        let found = differentiate(device, &data, &on, &d_out, 2)?;
        let (exact, plain) = (data.backward::<f64>(&d_out), data.backward::<f32>(&d_out));
        for (at, (exact, plain)) in exact.into_iter().zip(&plain).enumerate() {
            // What came in is read once; the other gradients were added to twice.
            let times = if at == 3 { 1.0 } else { 2.0 };
            if at == 3 && !of.starts {
                continue;
            }
            let exact = exact.into_iter().map(|x| times * x).collect();
            let plain: Vec<f32> = plain.iter().map(|&x| times as f32 * x).collect();
            Bound::new(exact, &plain, Element::F32).accepts(NAMES[at], &found[at])?;
        }
        Ok(())
    })
}

fn two_linear_runs_agree_bit_for_bit(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, linear_cases(&device.profile), |of| {
        let data = LinearData::new(&of);
        let (on, d_out) = (data.upload(device, false)?, draw_d_out(&of.case));
        let bits = || -> Result<Vec<u32>, String> {
            let forward = attend(device, &of, &on)?.concat();
            let backward = differentiate(device, &data, &on, &d_out, 1)?.concat();
            Ok(forward.iter().chain(&backward).map(|x| x.to_bits()).collect())
        };
        if bits()? == bits()? { Ok(()) } else { Err("two runs differ".into()) }
    })
}

/// Two branches' outputs and the scales of their norms.
struct NormData {
    near: Vec<f32>,
    far: Vec<f32>,
    scales: [Vec<f32>; 2],
}

impl NormData {
    fn scales(case: &Case) -> [Vec<f32>; 2] {
        let mut rng = SmallRng::seed_from_u64(case.seed ^ 0x5ca1e);
        let mut draw = || (0..case.heads() * case.value_dim).map(|_| rng.random_range(0.5..1.5)).collect();
        [draw(), draw()]
    }

    fn scale<F: Float>(case: &Case, scale: &[f32]) -> Array<F, 2> {
        array([case.heads(), case.value_dim], scale)
    }

    fn upload_scale(device: &Device, case: &Case, scale: &[f32]) -> Result<Tensor<2>, String> {
        run(Tensor::from_f32(&device.client, [case.heads(), case.value_dim], Element::F32, scale))
    }

    /// The output, and the gradients of near, far and the two scales.
    fn oracle<F: Float>(&self, case: &Case, d_out: &[f32]) -> [Vec<F>; 5] {
        let shape = case.problem().out_shape();
        let branches: [Array<F, 4>; 2] = [array(shape, &self.near), array(shape, &self.far)];
        let scales = [Self::scale(case, &self.scales[0]), Self::scale(case, &self.scales[1])];
        let epsilon = F::from(EPSILON).expect("a float");
        let d_out = array(shape, d_out);
        let out = reference::norm_sum([&branches[0], &branches[1]], [&scales[0], &scales[1]], epsilon);
        let side = |at: usize| reference::norm_sum_backward(&branches[at], &scales[at], epsilon, &d_out);
        let ((near, near_scale), (far, far_scale)) = (side(0), side(1));
        [out.into_vec(), near.into_vec(), far.into_vec(), near_scale.into_vec(), far_scale.into_vec()]
    }
}

const EPSILON: f32 = 1e-6;

fn norm_sums_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (linear_cases(&device.profile), any::<[bool; 2]>()), |(of, [far_f32, swapped])| {
        let (case, client) = (Case { magnitude: 1.0, ..of.case }, &device.client);
        let problem = case.problem();
        let shape = problem.out_shape();
        let far_element = if far_f32 { Element::F32 } else { case.element };
        let rounded = |values: Vec<f32>, element| values.into_iter().map(|x| round(element, x)).collect();
        let data = NormData {
            near: rounded(draw_d_out(&Case { seed: case.seed ^ 1, ..case.clone() }), case.element),
            far: rounded(draw_d_out(&Case { seed: case.seed ^ 2, ..case.clone() }), far_element),
            scales: NormData::scales(&case),
        };
        let d_out = draw_d_out(&case);
        let near_on = run(match swapped {
            true => crate::inputs::upload_token_major(client, case.element, &data.near, shape),
            false => Tensor::from_f32(client, shape, case.element, &data.near),
        })?;
        let far_on = run(Tensor::from_f32(client, shape, far_element, &data.far))?;
        let near_scale = NormData::upload_scale(device, &case, &data.scales[0])?;
        let far_scale = NormData::upload_scale(device, &case, &data.scales[1])?;
        let inputs = NormSum {
            near: near_on.view(),
            far: far_on.view(),
            near_scale: near_scale.view(),
            far_scale: far_scale.view(),
            epsilon: EPSILON,
        };
        let out = run(Tensor::filled(client, shape, case.out_element(), f32::NAN))?;
        run(bifocal::norm_sum(client, &problem, &inputs, &out))?;
        let d_out_on = run(Tensor::from_f32(client, shape, case.out_element(), &d_out))?;
        let found = run(bifocal::norm_sum_backward(client, &problem, &inputs, d_out_on.view()))?;
        let found = [
            run(out.to_f32(client))?,
            run(found.near.to_f32(client))?,
            run(found.far.to_f32(client))?,
            run(found.near_scale.to_f32(client))?,
            run(found.far_scale.to_f32(client))?,
        ];
        let elements = [case.out_element(), case.element, far_element, Element::F32, Element::F32];
        let (exact, plain) = (data.oracle::<f64>(&case, &d_out), data.oracle::<f32>(&case, &d_out));
        let names = ["output", "near", "far", "near scale", "far scale"];
        for (at, (exact, plain)) in exact.into_iter().zip(&plain).enumerate() {
            Bound::new(exact, plain, elements[at]).accepts(names[at], &found[at])?;
        }
        Ok(())
    })
}

/// RATTENTION by the oracle: its output, and the gradients of the near query and key, the values, the far query and key, and
/// the scales. Branches are rounded as the facade keeps them.
fn oracle_rattention<F: Float>(
    data: &LinearData,
    near: &Data,
    scales: &[Vec<f32>; 2],
    d_out: &[f32],
    round_far: fn(F) -> F,
    rounds: bool,
) -> [Vec<F>; 8] {
    let case = &data.of.case;
    let reach = Reach::Window(data.of.window);
    let mut partial: reference::Partial<F> = near.oracle(|weight| weight, |_, _, _| Some(reach));
    if rounds {
        let rounded = |x: F| round(case.element, x.to_f32().unwrap_or(f32::NAN));
        partial.out = partial.out.map(|x| F::from(rounded(x)).unwrap_or(F::nan()));
    }
    let ([q, k, v], options) = data.oracle(round_far);
    let far = reference::linear_attention(&q, &k, &v, &options).out;
    let scales = [NormData::scale::<F>(case, &scales[0]), NormData::scale::<F>(case, &scales[1])];
    let epsilon = F::from(1e-8f32).expect("a float");
    let d_out: Array<F, 4> = array(case.problem().out_shape(), d_out);
    let out = reference::norm_sum([&partial.out, &far], [&scales[0], &scales[1]], epsilon);
    let (d_near, near_scale) = reference::norm_sum_backward(&partial.out, &scales[0], epsilon, &d_out);
    let (d_far, far_scale) = reference::norm_sum_backward(&far, &scales[1], epsilon, &d_out);
    let as_f32 = |x: &Array<F, 4>| -> Vec<f32> {
        x.as_slice().iter().map(|x| x.to_f32().unwrap_or(f32::NAN)).collect()
    };
    let near = near.oracle_backward(|weight| weight, &partial, &as_f32(&d_near), |_, _, _| Some(reach));
    let no_state = Array::filled(data.of.state_shape(), F::zero());
    let far = reference::linear_attention_backward(&q, &k, &v, &options, &d_far, &no_state);
    let value =
        near.value.as_slice().iter().zip(far.value.as_slice()).map(|(&near, &far)| near + far).collect();
    [
        out.into_vec(),
        near.query.into_vec(),
        near.key.into_vec(),
        value,
        far.query.into_vec(),
        far.key.into_vec(),
        near_scale.into_vec(),
        far_scale.into_vec(),
    ]
}

fn rattention_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, linear_cases(&device.profile), |of| {
        // Without a map rows can come out next to zero, and a norm makes noise of them.
        let map = if of.map == FeatureMap::Identity { FeatureMap::SoftmaxPair } else { of.map };
        let of = self_attention(LinearCase { map, decays: None, starts: false, chunk: None, ..of });
        let of = LinearCase { case: Case { magnitude: 1.0, ..of.case }, ..of };
        let (case, client) = (&of.case, &device.client);
        let (data, problem) = (LinearData::new(&of), case.problem());
        // Other queries and keys, as rotary positions make them; the same values.
        let mut near = Data::new(&Case { seed: case.seed ^ 7, ..case.clone() });
        near.value.clone_from(&data.data.value);
        let (on, near_on) = (data.upload(device, false)?, run(near.upload(client))?);
        let scales = NormData::scales(case);
        let near_scale = NormData::upload_scale(device, case, &scales[0])?;
        let far_scale = NormData::upload_scale(device, case, &scales[1])?;
        let inputs = RattentionInputs {
            near: near_on.inputs(),
            far: on.inputs(),
            near_scale: near_scale.view(),
            far_scale: far_scale.view(),
        };
        let rattention = Rattention::new(of.window).with_feature_map(of.map);
        let d_out = draw_d_out(case);
        let out = run(Tensor::filled(client, problem.out_shape(), case.out_element(), f32::NAN))?;
        let forward = run(rattention.attend(client, &problem, &inputs, &out))?;
        let d_out_on = run(Tensor::from_f32(client, problem.out_shape(), case.out_element(), &d_out))?;
        let gradients = run(rattention.backward(client, &problem, &inputs, &forward, d_out_on.view(), None))?;
        let rows = run(out.to_f32(client))?;
        let found = [
            rows.clone(),
            run(gradients.near.query.to_f32(client))?,
            run(gradients.near.key.to_f32(client))?,
            run(gradients.near.value.to_f32(client))?,
            run(gradients.far_query.to_f32(client))?,
            run(gradients.far_key.to_f32(client))?,
            run(gradients.near_scale.to_f32(client))?,
            run(gradients.far_scale.to_f32(client))?,
        ];
        let names =
            ["output", "near query", "near key", "value", "far query", "far key", "near scale", "far scale"];
        let exact = oracle_rattention::<f64>(&data, &near, &scales, &d_out, |x| x, false);
        let plain = oracle_rattention::<f32>(&data, &near, &scales, &d_out, of.round(), true);
        for (at, (exact, plain)) in exact.into_iter().zip(&plain).enumerate() {
            let element = if at == 0 { case.out_element() } else { case.element };
            Bound::new(exact, plain, element).accepts(names[at], &found[at])?;
        }

        // The last row once more, from the state before it.
        let length = case.query_len;
        let before = part(&data, None, (0, 0, length - 1));
        let [_, state] = attend(device, &before.of, &before.upload(device, false)?)?;
        let state = run(State::from_f32(client, of.state_shape(), &state))?;
        let leaves = length.checked_sub(1 + of.window.keys() as usize);
        let left = leaves.map(|key| part(&data, None, (key, key, key + 1)));
        let left_on = left.as_ref().map(|left| left.upload(device, false)).transpose()?;
        let kept = leaves.map_or(0, |key| key + 1);
        let row = part(&data, None, (length - 1, kept, length));
        let near_row = part(
            &LinearData { data: near, of: of.clone(), log_decay: None, state: None, d_state: Vec::new() },
            None,
            (length - 1, kept, length),
        );
        let (row_on, near_row_on) = (row.upload(device, false)?, near_row.upload(device, false)?);
        let step = RattentionStep {
            near: near_row_on.qkv.inputs(),
            far_query: row_on.qkv.query.view(),
            left: left_on.as_ref().map(leaving),
            near_scale: near_scale.view(),
            far_scale: far_scale.view(),
        };
        let problem = row.of.case.problem();
        let out = run(Tensor::filled(client, problem.out_shape(), case.out_element(), f32::NAN))?;
        run(rattention.step(client, &problem, &step, &state, &out))?;
        let last = cut(&rows, length, length - 1, length, case.value_dim);
        let last: Vec<f64> = last.into_iter().map(f64::from).collect();
        // A norm makes more of what is small: rounded branches may differ by a few roundings.
        let tolerance = 8.0 * (case.element.epsilon() + 256.0 * Element::F32.epsilon());
        near_rows(&last, &run(out.to_f32(client))?, tolerance)
    })
}

fn near_rows(exact: &[f64], found: &[f32], relative: f64) -> Result<(), String> {
    let largest = exact.iter().map(|x| x.abs()).fold(0.0, f64::max);
    near("last row", exact, found, relative * largest)
}

fn leaving(on: &LinearOnDevice) -> LeavingKey<'_> {
    LeavingKey {
        key: on.qkv.key.view(),
        value: on.qkv.value.view(),
        log_decay: on.log_decay.as_ref().map(Tensor::view),
    }
}
