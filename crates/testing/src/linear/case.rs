//! A call of linear attention: what is drawn, its numbers, and what is right.

use bifocal::{
    DeviceProfile, Element, FeatureMap, Gradients, LeavingKey, LinearAttention, LinearInputs, Routine, State,
    Tensor, Window,
};
use bifocal_reference::{self as reference, Array, LinearOptions};
use num_traits::Float;
use proptest::{prelude::*, sample::select};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    Device,
    case::{Case, Packed, cases},
    compare::{near, run, worst},
    inputs::{Data, OnDevice, array, round},
};

/// A call of linear attention.
#[derive(Clone, Debug)]
pub(crate) struct LinearCase {
    pub(crate) case: Case,
    pub(crate) window: Window,
    pub(crate) map: FeatureMap,
    pub(crate) chunk: Option<usize>,
    /// Whether the state decays: by head, or by head and token.
    pub(crate) decays: Option<bool>,
    /// Whether a state comes in.
    pub(crate) starts: bool,
}

pub(crate) fn linear_cases(profile: &DeviceProfile) -> impl Strategy<Value = LinearCase> + use<> {
    linear_cases_of(profile, cases(profile))
}

/// Calls of linear attention on these problems.
pub(crate) fn linear_cases_of<S: Strategy<Value = Case>>(
    profile: &DeviceProfile,
    cases: S,
) -> impl Strategy<Value = LinearCase> + use<S> {
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
    (cases, options).prop_map(move |(case, (window, map, chunk, decays, starts))| {
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
pub(crate) struct LinearData {
    pub(crate) of: LinearCase,
    pub(crate) data: Data,
    /// `[B, Hk, Tk, 1]`.
    pub(crate) log_decay: Option<Vec<f32>>,
    pub(crate) state: Option<Vec<f32>>,
    /// The gradient of the state that is left.
    pub(crate) d_state: Vec<f32>,
}

impl LinearData {
    pub(crate) fn new(of: &LinearCase) -> Self {
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

    pub(crate) fn upload(&self, device: &Device, swapped: bool) -> Result<LinearOnDevice, String> {
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
    pub(crate) fn oracle<F: Float>(&self, round: fn(F) -> F) -> ([Array<F, 4>; 3], LinearOptions<F>) {
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

    pub(crate) fn forward<F: Float>(&self, round: fn(F) -> F) -> reference::LinearOutput<F> {
        let ([q, k, v], options) = self.oracle(round);
        match &self.of.case.packed {
            Some(Packed { queries, keys }) => {
                reference::ragged_linear_attention(&q, &k, &v, (queries, keys), &options)
            }
            None => reference::linear_attention(&q, &k, &v, &options),
        }
    }

    pub(crate) fn backward<F: Float>(&self, d_out: &[f32]) -> [Vec<F>; 4] {
        let ([q, k, v], options) = self.oracle(|x| x);
        let d_out = array(self.of.case.problem().out_shape(), d_out);
        let d_state = array(self.of.state_shape(), &self.d_state);
        let found = match &self.of.case.packed {
            Some(Packed { queries, keys }) => {
                let lengths: (&[usize], &[usize]) = (queries, keys);
                reference::ragged_linear_attention_backward(&q, &k, &v, lengths, &options, &d_out, &d_state)
            }
            None => reference::linear_attention_backward(&q, &k, &v, &options, &d_out, &d_state),
        };
        [found.query, found.key, found.value, found.state].map(Array::into_vec)
    }
}

impl LinearCase {
    pub(crate) fn operator(&self) -> LinearAttention {
        let operator = LinearAttention::beyond(self.window).with_feature_map(self.map);
        match self.chunk {
            Some(keys) => operator.with_chunk(keys).expect("a length that is allowed"),
            None => operator,
        }
    }

    pub(crate) fn state_shape(&self) -> [usize; 4] {
        let [batch, shape @ ..] = self.operator().state_shape(&self.case.problem());
        let states = self.case.packed.as_ref().map_or(batch, |packed| packed.ranges().count());
        let [kv_heads, features, value_dim] = shape;
        [states, kv_heads, features, value_dim]
    }

    /// Whether products may take features, weights and states rounded to the inputs' type, as they do on tensor cores.
    pub(crate) fn may_round(&self) -> bool {
        self.case.may_round_weights() && self.map == FeatureMap::SoftmaxPair && self.decays.is_none()
    }

    /// What a plain computation does to features and states.
    pub(crate) fn round(&self) -> fn(f32) -> f32 {
        if self.may_round() { self.case.round_weight() } else { |x| x }
    }

    /// The type that an answer has been rounded to on its way: its own, or that of what was multiplied.
    pub(crate) fn rounded_to(&self, element: Element) -> Element {
        if self.may_round() { self.case.element } else { element }
    }
}

pub(crate) struct LinearOnDevice {
    pub(crate) qkv: OnDevice,
    pub(crate) log_decay: Option<Tensor<4>>,
    pub(crate) state: Option<State>,
}

impl LinearOnDevice {
    pub(crate) fn inputs(&self) -> LinearInputs<'_> {
        let mut inputs = LinearInputs::new(self.qkv.query.view(), self.qkv.key.view(), self.qkv.value.view());
        inputs.attention.sequences = self.qkv.sequences.as_ref();
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
pub(crate) fn attend(device: &Device, of: &LinearCase, on: &LinearOnDevice) -> Result<[Vec<f32>; 2], String> {
    let (client, problem) = (&device.client, of.case.problem());
    let out = run(Tensor::filled(client, problem.out_shape(), of.case.out_element(), f32::NAN))?;
    let state = run(of.operator().attend(client, &problem, &on.inputs(), &out))?;
    Ok([run(out.to_f32(client))?, run(state.to_f32(client))?])
}

/// The gradients of query, key and value, to which `times` calls have added, and of the state that came in.
pub(crate) fn differentiate(
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
pub(crate) struct Bound {
    exact: Vec<f64>,
    tolerance: f64,
}

impl Bound {
    pub(crate) fn new(exact: Vec<f64>, plain: &[f32], element: Element) -> Self {
        let largest = exact.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max);
        let measured = worst(&exact, plain.iter().map(|&x| round(element, x)));
        // Sums are cut in other places than the oracle's.
        let roundings = 64.0 * Element::F32.epsilon() + own_rounding(element);
        Self { exact, tolerance: 2.0 * measured + roundings * largest }
    }

    /// The same bound, and no narrower than `tolerance`.
    pub(crate) fn at_least(self, tolerance: f64) -> Self {
        Self { tolerance: self.tolerance.max(tolerance), ..self }
    }

    pub(crate) fn accepts(&self, what: &str, found: &[f32]) -> Result<(), String> {
        near(what, &self.exact, found, self.tolerance)
    }
}

fn own_rounding(element: Element) -> f64 {
    if element == Element::F32 { 0.0 } else { element.epsilon() }
}

/// Two kernels' answers to the same question.
pub(crate) fn agree(what: &str, a: &[f32], b: &[f32], element: Element) -> Result<(), String> {
    let wide: Vec<f64> = a.iter().map(|&x| f64::from(x)).collect();
    let largest = wide.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max);
    near(what, &wide, b, (256.0 * Element::F32.epsilon() + own_rounding(element)) * largest)
}

/// Tokens `from..to` of `[lists, tokens, dim]`.
pub(crate) fn cut(values: &[f32], tokens: usize, from: usize, to: usize, dim: usize) -> Vec<f32> {
    values.chunks(tokens * dim).flat_map(|list| &list[from * dim..to * dim]).copied().collect()
}

/// A part of a self-attention case, from a state: its queries `from..to` and keys `first_key..to`.
pub(crate) fn part(
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
pub(crate) fn self_attention(of: LinearCase) -> LinearCase {
    let length = of.case.query_len.max(2);
    LinearCase { case: Case { query_len: length, key_len: length, ..of.case }, ..of }
}

pub(crate) fn leaving(on: &LinearOnDevice) -> LeavingKey<'_> {
    LeavingKey {
        key: on.qkv.key.view(),
        value: on.qkv.value.view(),
        log_decay: on.log_decay.as_ref().map(Tensor::view),
    }
}
