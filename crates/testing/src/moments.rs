//! What moments of keys, the gate that decides by them, and QAdA satisfy.

use bifocal::{
    AttentionOperator, Calibration, Covariance, Element, INVALID_ROUTE, MomentGate, Moments, Partial,
    Problem, Qada, Reach, Router, Routine, Rows, Tensor, Window,
};
use bifocal_reference::{self as reference, Array};
use proptest::{prelude::*, sample::select};
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::SliceRandom};

use crate::{
    Device, Effort, Property,
    case::{Case, cases, windows},
    compare::{Expected, Read, near, run},
    everywhere,
    inputs::{Data, array, round},
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "moments_equal_the_oracle",
        claim: "mean and covariance of any run of keys are the oracle's, however far the mean is from zero",
        applies: everywhere,
        one_in: 2,
        run: moments_equal_the_oracle,
    },
    Property {
        name: "moments_merge_in_any_order",
        claim: "moments of parts, merged in any order, are those of the whole",
        applies: everywhere,
        one_in: 2,
        run: moments_merge_in_any_order,
    },
    Property {
        name: "predicted_masses_equal_the_oracle",
        claim: "a moment gate predicts the oracle's mass for every bulk, whatever the chunk, and decides by it",
        applies: everywhere,
        one_in: 2,
        run: predicted_masses_equal_the_oracle,
    },
    Property {
        name: "normal_keys_are_predicted_to_a_thousandth",
        claim: "of normal keys the predicted mass is the true one to 1e-3 nats, and decisions are those of who knows",
        applies: everywhere,
        one_in: 4,
        run: normal_keys_are_predicted_to_a_thousandth,
    },
    Property {
        name: "a_nan_key_is_never_routed",
        claim: "a NaN in a key or a query makes exactly the routes invalid of rows that it reaches, and their outputs NaN",
        applies: everywhere,
        one_in: 2,
        run: a_nan_key_is_never_routed,
    },
    Property {
        name: "qada_equals_the_oracle",
        claim: "QAdA is full attention where it looks far and window and sinks elsewhere, and so with static labels",
        applies: everywhere,
        one_in: 2,
        run: qada_equals_the_oracle,
    },
    Property {
        name: "tau_goes_from_near_to_full",
        claim: "with a tau of 1 every row with a bulk looks far, with a tiny one none does",
        applies: everywhere,
        one_in: 2,
        run: tau_goes_from_near_to_full,
    },
];

fn covariances() -> impl Strategy<Value = Covariance> {
    select(vec![Covariance::Full, Covariance::Diagonal])
}

fn sinks() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0u32), 1..6u32, Just(16), 90..120u32]
}

/// Cases without what moments do not know: a softcap.
pub(crate) fn uncapped(device: &Device) -> impl Strategy<Value = Case> + use<> {
    cases(&device.profile).prop_map(|case| Case { softcap: false, magnitude: 1.0, ..case })
}

/// Keys `[B, Hk, Tk, D]` around a mean.
#[derive(Clone, Debug)]
struct KeyCase {
    shape: [usize; 4],
    element: Element,
    mean: f32,
    covariance: Covariance,
    seed: u64,
}

fn key_cases(device: &Device) -> impl Strategy<Value = KeyCase> {
    // Sums are cut into chunks of 256 keys.
    let lengths = prop_oneof![1..20usize, 250..260usize, 500..600usize];
    let dims = prop_oneof![Just(8usize), Just(33), Just(64), 1..20usize];
    let elements = select(device.profile.elements.clone());
    let shape = (1..3usize, 1..3usize, lengths, dims).prop_map(|(b, h, t, d)| [b, h, t, d]);
    let means = select(vec![0.0f32, -1.0, 10.0, 100.0]);
    (shape, elements, means, covariances(), any::<u64>()).prop_map(
        |(shape, element, mean, covariance, seed)| KeyCase { shape, element, mean, covariance, seed },
    )
}

impl KeyCase {
    fn keys(&self) -> Vec<f32> {
        let mut rng = SmallRng::seed_from_u64(self.seed);
        let length = self.shape.iter().product();
        (0..length).map(|_| round(self.element, self.mean + rng.random_range(-1.7f32..1.7))).collect()
    }

    fn upload(&self, device: &Device) -> bifocal::Result<Tensor<4>> {
        Tensor::from_f32(&device.client, self.shape, self.element, &self.keys())
    }

    /// Whether moments are those of the keys in `range`.
    fn check(&self, device: &Device, moments: &Moments, range: std::ops::Range<usize>) -> Result<(), String> {
        let found = run(moments.to_host(&device.client))?;
        if found.keys != range.len() {
            return Err(format!("{} keys, expected {}", found.keys, range.len()));
        }
        let [batch, kv_heads, _, dim] = self.shape;
        let keys: Array<f64, 4> = array(self.shape, &self.keys());
        let (mut means, mut covariances) = (Vec::new(), Vec::new());
        for list in 0..batch * kv_heads {
            let row = |j| keys.row([list / kv_heads, list % kv_heads, j]);
            let exact = reference::Moments::of(dim, range.clone().map(row));
            means.extend(exact.mean());
            let covariance = exact.covariance();
            match self.covariance {
                Covariance::Full => covariances.extend_from_slice(covariance.as_slice()),
                _ => covariances.extend((0..dim).map(|d| covariance[[d, d]])),
            }
        }
        // A rounding of the mean, and a few of numbers of about one.
        let size = 1.0 + f64::from(self.mean.abs());
        near("mean", &means, &found.mean, 8.0 * Element::F32.epsilon() * size)?;
        near(
            "covariance",
            &covariances,
            &found.covariance,
            64.0 * Element::F32.epsilon() * (1.0 + size.sqrt()),
        )
    }
}

fn moments_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let index = any::<prop::sample::Index>;
    refute(effort, (key_cases(device), index(), index()), |(case, from, length)| {
        let key_len = case.shape[2];
        let from = from.index(key_len);
        let range = from..from + 1 + length.index(key_len - from);
        let keys = run(case.upload(device))?;
        let moments = run(Moments::of(&device.client, keys.view(), range.clone(), case.covariance))?;
        case.check(device, &moments, range)?;
        // What was read goes back as it was.
        let host = run(moments.to_host(&device.client))?;
        let [batch, kv_heads, _, dim] = case.shape;
        let again = run(Moments::from_host(&device.client, &host, [batch, kv_heads, dim]))?;
        // A diagonal of one channel is all there is.
        if dim > 1 && again.covariance() != case.covariance {
            return Err(format!("{:?} came back as {:?}", case.covariance, again.covariance()));
        }
        Ok(())
    })
}

fn moments_merge_in_any_order(device: &Device, effort: Effort) -> Result<(), String> {
    let index = any::<prop::sample::Index>;
    refute(effort, (key_cases(device), index(), index()), |(mut case, first, second)| {
        case.shape[2] += 2;
        let key_len = case.shape[2];
        let first = 1 + first.index(key_len - 2);
        let second = first + 1 + second.index(key_len - first - 1);
        let keys = run(case.upload(device))?;
        let of = |range| Moments::of(&device.client, keys.view(), range, case.covariance);
        let (a, b, c) = (run(of(0..first))?, run(of(first..second))?, run(of(second..key_len))?);
        let merge = |a: &Moments, b: &Moments| run(a.merge(&device.client, b));
        for merged in [merge(&merge(&a, &b)?, &c)?, merge(&a, &merge(&b, &c)?)?, merge(&c, &merge(&a, &b)?)?]
        {
            case.check(device, &merged, 0..key_len)?;
        }
        Ok(())
    })
}

/// The oracle of a gate.
pub(crate) fn oracle(gate: &MomentGate, tau: f32) -> reference::Qada<f64> {
    reference::Qada {
        window: gate.window(),
        sinks: gate.sinks(),
        tau: f64::from(tau),
        covariance: match gate.covariance() {
            Covariance::Full => reference::Covariance::Full,
            _ => reference::Covariance::Diagonal,
        },
    }
}

pub(crate) fn options(problem: &Problem) -> reference::Options<f64> {
    reference::Options { scale: f64::from(problem.scale), ..reference::Options::new(problem.head_dim) }
}

/// Predictions are sums of numbers of about one, over as many channels and keys: this many nats is far off for f32.
pub(crate) const NATS: f64 = 2e-4;
/// Tensor cores take differences of keys rounded to the inputs' type.
const ROUNDED_NATS: f64 = 1e-3;

fn predicted_masses_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let chunks = select(vec![None, None, Some(5usize), Some(16), Some(1000)]);
    let taus = select(vec![0.01f32, 0.5, 0.9, 0.999]);
    let strategy = (uncapped(device), windows(), sinks(), covariances(), chunks, taus, 0..3u8);
    refute(effort, strategy, |(case, window, sinks, covariance, chunk, tau, given)| {
        let client = &device.client;
        let case = Case { sink_logits: false, ..case };
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        let (problem, inputs) = (case.problem(), on.inputs());
        let mut gate = run(MomentGate::new(window, tau))?.with_sinks(sinks).with_covariance(covariance);
        if let Some(keys) = chunk {
            gate = run(gate.with_chunk(keys))?;
        }
        // Those of all keys of each sequence, or those of the first sequence for all.
        let query: Array<f64, 4> = array(data.query_shape(), &data.query);
        let key: Array<f64, 4> = array(data.key_shape(), &data.key);
        let of_batch = if given == 1 { 1 } else { case.batch };
        let moments = match given {
            0 => None,
            _ => {
                let shape = [of_batch, case.kv_heads, case.key_len, case.head_dim];
                let keys = on.key.view().reinterpret(shape, on.key.strides());
                Some(run(Moments::of(client, keys, 0..case.key_len, covariance))?)
            }
        };
        let exact_moments: Vec<Vec<reference::Moments<f64>>> = (0..case.batch)
            .map(|b| {
                let rows = |h| (0..case.key_len).map(move |j| [b % of_batch, h, j]);
                let of = |h| reference::Moments::of(case.head_dim, rows(h).map(|at| key.row(at)));
                (0..case.kv_heads).map(of).collect()
            })
            .collect();

        let routine = run(gate.routine(&problem, &device.profile, &inputs, moments.as_ref()))?;
        let nats = if routine == Routine::Mma { ROUNDED_NATS } else { NATS };
        let predicted = run(gate.predict(client, &problem, &inputs, moments.as_ref()))?;
        let exact = oracle(&gate, tau);
        let exact_given = moments.is_some().then_some(exact_moments.as_slice());
        let mass = exact.predict(&query, &key, &options(&problem), exact_given);
        near("mass", mass.as_slice(), &run(predicted.to_f32(client))?, nats)?;

        let near_partial = run(Partial::poisoned(client, &problem, Element::F32))?;
        run(Qada::new(gate).near().attend(client, &problem, &inputs, Rows::All, &near_partial))?;
        let lse = run(near_partial.lse.to_f32(client))?;
        let decision = run(gate.decide(client, &problem, near_partial.lse.view(), predicted))?;
        let routes = run(decision.routes.to_host(client))?;
        let local: Array<f64, 3> = array(problem.lse_shape(), &lse);
        let expected = exact.decide(&local, &mass);
        let cut = (1.0 / f64::from(tau) - 1.0).ln();
        for (at, (&route, &exact)) in routes.iter().zip(expected.as_slice()).enumerate() {
            // A row within rounding of the cut may fall on either side.
            let margin = mass.as_slice()[at] - local.as_slice()[at] - cut;
            if route != exact && margin.abs() > nats {
                return Err(format!("route {at} is {route}, {margin} nats beyond the cut"));
            }
        }
        let counts: Vec<u32> = run(decision.counts(client))?.concat();
        let counted: Vec<u32> = routes
            .chunks(case.query_len)
            .flat_map(|row| [0u8, 1].map(|route| row.iter().filter(|&&r| r == route).count() as u32))
            .collect();
        match counts == counted {
            true => Ok(()),
            false => Err(format!("counts {counts:?} are not those of the routes")),
        }
    })
}

/// The five nodes of Gauss-Hermite quadrature as often as their weights say: normal to the ninth moment, nearly.
fn normal() -> Vec<f32> {
    let nodes = [(0.0, 533), (1.355_626, 222), (-1.355_626, 222), (2.856_97, 11), (-2.856_97, 11)];
    nodes.into_iter().flat_map(|(node, times)| std::iter::repeat_n(node, times)).collect()
}

fn normal_keys_are_predicted_to_a_thousandth(device: &Device, effort: Effort) -> Result<(), String> {
    let deviations = select(vec![0.1f32, 0.5, 1.0]);
    let taus = select(vec![0.02f32, 0.1, 0.5]);
    let strategy = (uncapped(device), 1..80usize, 0..20u32, deviations, taus);
    refute(effort, strategy, |(case, window, sinks, deviation, tau)| {
        let client = &device.client;
        // One query per head, whose bulk is exactly the normal keys. Wide heads have properties of their own.
        let mut bulk = normal();
        let key_len = sinks as usize + bulk.len() + window;
        let dim = case.head_dim.min(64);
        let case = Case { query_len: 1, key_len, head_dim: dim, value_dim: dim, sink_logits: false, ..case };
        let case = Case { element: Element::F32, routine: None, ..case };
        let mut data = Data::new(&case);
        let scale = case.problem().scale;
        let mut rng = SmallRng::seed_from_u64(case.seed);
        let mut draw =
            |length: usize| -> Vec<f32> { (0..length).map(|_| rng.random_range(-1.7f32..1.7)).collect() };
        let lists: Vec<[Vec<f32>; 2]> =
            (0..case.batch * case.kv_heads).map(|_| [draw(dim), draw(dim)]).collect();
        bulk.shuffle(&mut rng);
        for (keys, [mean, along]) in data.key.chunks_mut(key_len * dim).zip(&lists) {
            for (key, x) in keys[sinks as usize * dim..].chunks_mut(dim).zip(&bulk) {
                for ((k, mean), along) in key.iter_mut().zip(mean).zip(along) {
                    *k = mean + x * along;
                }
            }
        }
        for (row, query) in data.query.chunks_mut(dim).enumerate() {
            let [_, along] = &lists[row / case.group];
            let product: f32 = query.iter().zip(along).map(|(q, along)| q * along).sum();
            let factor = deviation / (scale * product.abs().max(1e-3));
            // A query that hardly sees the keys differ stays as it is.
            if factor < 100.0 {
                query.iter_mut().for_each(|q| *q *= factor);
            }
        }
        let on = run(data.upload(client))?;
        let (problem, inputs) = (case.problem(), on.inputs());
        let window = run(Window::new(window))?;
        let gate = run(MomentGate::new(window, tau))?.with_sinks(sinks);
        let lens = Qada::new(gate);
        let far = run(Partial::poisoned(client, &problem, Element::F32))?;
        run(lens.far().attend(client, &problem, &inputs, Rows::All, &far))?;
        let truth: Array<f64, 3> = array(problem.lse_shape(), &run(far.lse.to_f32(client))?);
        let predicted = run(gate.predict(client, &problem, &inputs, None))?;
        let predicted = run(predicted.to_f32(client))?;
        // Large means are large scores, whose own rounding is not what is measured.
        let size = truth.as_slice().iter().fold(1.0f64, |top, x| top.max(x.abs()));
        near("mass", truth.as_slice(), &predicted, 1e-3 + 16.0 * Element::F32.epsilon() * size)?;

        let (partial, decision) = run(lens.attend(client, &problem, &inputs, None))?;
        let routes = run(decision.routes.to_host(client))?;
        let local = run(Partial::poisoned(client, &problem, Element::F32))?;
        run(lens.near().attend(client, &problem, &inputs, Rows::All, &local))?;
        let local: Array<f64, 3> = array(problem.lse_shape(), &run(local.lse.to_f32(client))?);
        let knows = oracle(&gate, tau).decide(&local, &truth);
        let cut = (1.0 / f64::from(tau) - 1.0).ln();
        for (at, (&route, &exact)) in routes.iter().zip(knows.as_slice()).enumerate() {
            let margin = truth.as_slice()[at] - local.as_slice()[at] - cut;
            if route != exact && margin.abs() > 2e-3 {
                return Err(format!("route {at} is {route}, {margin} nats beyond the cut"));
            }
        }
        run(Read::new(client, &partial)).map(|_| ())
    })
}

fn a_nan_key_is_never_routed(device: &Device, effort: Effort) -> Result<(), String> {
    let index = any::<prop::sample::Index>;
    let strategy = (uncapped(device), windows(), sinks(), covariances(), index(), any::<bool>());
    refute(effort, strategy, |(case, window, sinks, covariance, at, in_key)| {
        let client = &device.client;
        let mut data = Data::new(&case);
        let position = |t: usize| t as i64 + case.key_len as i64 - case.query_len as i64;
        let bad = if in_key { at.index(case.key_len) } else { at.index(case.query_len) };
        if in_key {
            data.spoil(bad, true);
        } else {
            data.query
                .chunks_mut(case.query_len * case.head_dim)
                .for_each(|head| head[bad * case.head_dim] = f32::NAN);
        }
        let on = run(data.upload(client))?;
        let gate = run(MomentGate::new(window, 0.5))?.with_sinks(sinks).with_covariance(covariance);
        let gate = run(gate.with_chunk(8))?;
        let (partial, decision) = run(Qada::new(gate).attend(client, &case.problem(), &on.inputs(), None))?;
        let routes = run(decision.routes.to_host(client))?;
        let read = run(Read::new(client, &partial))?;
        for (row, &route) in routes.iter().enumerate() {
            let token = row % case.query_len;
            // A query without any key has no score that could be NaN.
            let reached = match in_key {
                true => position(token) >= bad as i64,
                false => token == bad && position(token) >= 0,
            };
            if (route == INVALID_ROUTE) != reached {
                return Err(format!("route {row} is {route}, reached by a NaN: {reached}"));
            }
            let out = &read.out[row * case.value_dim..][..case.value_dim];
            let spoilt = read.lse[row].is_nan() && out.iter().all(|x| x.is_nan());
            let clean = !read.lse[row].is_nan() && out.iter().all(|x| !x.is_nan());
            if !(if reached { spoilt } else { clean }) {
                return Err(format!(
                    "row {row}, reached by a NaN: {reached}, has log-sum-exp {}",
                    read.lse[row]
                ));
            }
        }
        Ok(())
    })
}

fn qada_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let taus = select(vec![0.3f32, 0.5, 0.7, 0.9, 0.99]);
    refute(effort, (uncapped(device), windows(), sinks(), taus), |(case, window, sinks, tau)| {
        let client = &device.client;
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        let (problem, inputs) = (case.problem(), on.inputs());
        let lens = Qada::new(run(MomentGate::new(window, tau))?.with_sinks(sinks));
        let reach = |route: u8| match route {
            0 => Reach::SinksAndWindow { sinks, window },
            _ => Reach::All,
        };
        let partial = run(Partial::poisoned(client, &problem, case.out_element()))?;
        let decision = run(lens.attend_into(client, &problem, &inputs, None, &partial))?;
        let routes: Array<u8, 3> = Array::new(problem.lse_shape(), run(decision.routes.to_host(client))?);
        let expected = Expected::new(&case, &data, |b, h, t| Some(reach(routes[[b, h, t]])));
        expected.accepts(&run(Read::new(client, &partial))?)?;

        // Frozen, heads keep to what most of their tokens did.
        let mut calibration = Calibration::default();
        run(calibration.add(client, &decision))?;
        let frozen = run(calibration.freeze(0.5))?;
        let labels = reference::static_labels(&routes, 0.5);
        let hidden = run(Tensor::filled(client, [case.batch, case.query_len, 1], Element::F32, 0.0))?;
        let decision = run(frozen.route(client, hidden.view()))?;
        let told = run(decision.routes.to_host(client))?;
        if told.iter().enumerate().any(|(row, &r)| r != labels[row / case.query_len % case.heads()]) {
            return Err(format!("frozen routes are not the labels {labels:?}"));
        }
        let partial = run(lens.attend_routed(client, &problem, &inputs, &decision.routes))?;
        let case = Case { out_f32: false, ..case.clone() };
        Expected::new(&case, &data, |_, h, _| Some(reach(labels[h])))
            .accepts(&run(Read::new(client, &partial))?)
    })
}

fn tau_goes_from_near_to_full(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (uncapped(device), windows(), sinks()), |(case, window, sinks)| {
        let client = &device.client;
        let case = Case { out_f32: false, ..case };
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        let (problem, inputs) = (case.problem(), on.inputs());
        let far = Reach::Far { sinks, window };
        for tau in [1.0, f32::MIN_POSITIVE] {
            let lens = Qada::new(run(MomentGate::new(window, tau))?.with_sinks(sinks));
            let (partial, decision) = run(lens.attend(client, &problem, &inputs, None))?;
            let routes = run(decision.routes.to_host(client))?;
            for (row, &route) in routes.iter().enumerate() {
                let bulk = far.visible(problem.position(row % case.query_len), case.key_len);
                if route != u8::from(tau == 1.0 && bulk > 0) {
                    return Err(format!(
                        "with tau {tau} row {row} with {bulk} keys beyond has route {route}"
                    ));
                }
            }
            let reach = if tau == 1.0 { Reach::All } else { Reach::SinksAndWindow { sinks, window } };
            Expected::new(&case, &data, |_, _, _| Some(reach)).accepts(&run(Read::new(client, &partial))?)?;
        }
        Ok(())
    })
}
