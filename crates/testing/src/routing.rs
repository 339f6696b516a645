//! What routers, plans and combinations satisfy.

use bifocal::{
    Element, Error, FixedRouter, INVALID_ROUTE, INVALID_ROW, LinearChoice, LinearGate, Partial, RandomRouter,
    RouteGeometry, Router, Tensor, Threshold,
};
use bifocal_reference::{self as reference, Array};
use proptest::{prelude::*, sample::select};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    Device, Effort, Property,
    case::{cases, routings, windows},
    compare::{Read, near, run},
    everywhere,
    inputs::{Data, HostRoutes, round},
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "gates_equal_the_oracle",
        claim: "a linear gate's scores, routes and counts are the oracle's, token-wise and head-wise, AHA's and L2A's",
        applies: everywhere,
        one_in: 1,
        run: gates_equal_the_oracle,
    },
    Property {
        name: "choices_equal_the_oracle",
        claim: "a linear choice's softmax, argmax and counts are the oracle's",
        applies: everywhere,
        one_in: 1,
        run: choices_equal_the_oracle,
    },
    Property {
        name: "assigned_routes_are_as_told",
        claim: "fixed and random routers give on the device what they say on the host",
        applies: everywhere,
        one_in: 1,
        run: assigned_routes_are_as_told,
    },
    Property {
        name: "nan_scores_never_pass_silently",
        claim: "a NaN hidden state makes its routes invalid, its rows NaN, and reading the counts an error",
        applies: everywhere,
        one_in: 1,
        run: nan_scores_never_pass_silently,
    },
    Property {
        name: "plans_equal_the_oracle",
        claim: "lists are the oracle's, ascending, and every row is in exactly one item",
        applies: everywhere,
        one_in: 1,
        run: plans_equal_the_oracle,
    },
    Property {
        name: "combinations_equal_the_oracle",
        claim: "merge, mix, select and mask are the oracle's",
        applies: everywhere,
        one_in: 1,
        run: combinations_equal_the_oracle,
    },
];

/// Hidden states and a router's weight and bias.
#[derive(Clone, Debug)]
struct RouterCase {
    batch: usize,
    tokens: usize,
    heads: usize,
    choices: usize,
    model_dim: usize,
    element: Element,
    bias: bool,
    seed: u64,
}

fn router_cases(device: &Device, choices: std::ops::Range<usize>) -> impl Strategy<Value = RouterCase> {
    let tokens = prop_oneof![Just(1usize), 2..9usize, 60..70usize];
    let elements = select(device.profile.elements.clone());
    // Kernels on planes take 256 dims at a time, and what is left one plane at a time.
    let model_dims = prop_oneof![3 => 1..80usize, 1 => 250..600usize];
    (1..3usize, tokens, 1..9usize, choices, model_dims, elements, any::<bool>(), any::<u64>()).prop_map(
        |(batch, tokens, heads, choices, model_dim, element, bias, seed)| RouterCase {
            batch,
            tokens,
            heads,
            choices,
            model_dim,
            element,
            bias,
            seed,
        },
    )
}

struct RouterData {
    hidden: Vec<f32>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl RouterCase {
    fn columns(&self) -> usize {
        self.heads * self.choices
    }

    fn data(&self) -> RouterData {
        let mut rng = SmallRng::seed_from_u64(self.seed);
        let mut draw = |n: usize| -> Vec<f32> {
            (0..n).map(|_| round(self.element, rng.random_range(-1.0..1.0))).collect()
        };
        RouterData {
            hidden: draw(self.batch * self.tokens * self.model_dim),
            weight: draw(self.model_dim * self.columns()),
            bias: self.bias.then(|| draw(self.columns())),
        }
    }

    fn hidden_shape(&self) -> [usize; 3] {
        [self.batch, self.tokens, self.model_dim]
    }

    fn tensors(
        &self,
        device: &Device,
        data: &RouterData,
    ) -> bifocal::Result<(Tensor<3>, Tensor<2>, Option<Tensor<1>>)> {
        let client = &device.client;
        let weight_shape = [self.model_dim, self.columns()];
        Ok((
            Tensor::from_f32(client, self.hidden_shape(), self.element, &data.hidden)?,
            Tensor::from_f32(client, weight_shape, self.element, &data.weight)?,
            match &data.bias {
                Some(bias) => Some(Tensor::from_f32(client, [self.columns()], Element::F32, bias)?),
                None => None,
            },
        ))
    }

    /// Scores are sums of `model_dim` products of numbers below one, each rounded once, over a temperature.
    fn logit_tolerance(&self) -> f64 {
        8.0 * Element::F32.epsilon() * (1.0 + self.model_dim as f64)
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// Counts per batch and router head: the tokens on each reach.
fn count(routes: &[u8], tokens: usize, reaches: usize) -> Vec<Vec<u32>> {
    let rows = routes.chunks(tokens);
    rows.map(|row| {
        (0..reaches).map(|k| row.iter().filter(|&&r| usize::from(r) == k).count() as u32).collect()
    })
    .collect()
}

fn gates_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let kinds = select(vec![Threshold::Above(0.5), Threshold::AtLeast(0.5), Threshold::Above(0.7)]);
    let strategy = (router_cases(device, 1..2), kinds, select(vec![1.0f32, 0.1]));
    refute(effort, strategy, |(case, threshold, temperature)| {
        let data = case.data();
        let (hidden, weight, bias) = run(case.tensors(device, &data))?;
        let mut gate = run(LinearGate::aha(weight).with_threshold(threshold))?;
        gate = run(gate.with_temperature(temperature))?;
        if let Some(bias) = bias {
            gate = gate.with_bias(bias);
        }
        let decision = run(gate.route(&device.client, hidden.view()))?;
        let scores = decision.scores.as_ref().ok_or("a gate has scores")?;
        let scores = run(scores.to_f32(&device.client))?;
        let routes = run(decision.routes.to_host(&device.client))?;

        let hidden = Array::new(case.hidden_shape(), wide(&data.hidden));
        let weight = Array::new([case.model_dim, case.columns()], wide(&data.weight));
        let bias = data.bias.as_deref().map(wide);
        let logits = reference::linear(&hidden, &weight, bias.as_deref());
        let (Threshold::Above(cut) | Threshold::AtLeast(cut)) = threshold else { unreachable!() };
        let inclusive = matches!(threshold, Threshold::AtLeast(_));
        let gate = reference::SigmoidGate {
            threshold: f64::from(cut),
            inclusive,
            temperature: f64::from(temperature),
        };
        let (exact, exact_routes) = gate.forward(&logits);
        let tolerance = case.logit_tolerance() / f64::from(temperature);
        near("score", exact.as_slice(), &scores, tolerance)?;
        for (at, (&route, &score)) in routes.iter().zip(exact.as_slice()).enumerate() {
            // A score within rounding of the threshold may fall on either side.
            let near_tie = (score - f64::from(cut)).abs() <= tolerance;
            if route != exact_routes.as_slice()[at] && !near_tie {
                return Err(format!("route {at} is {route} for score {score}"));
            }
        }
        let counts = run(decision.counts(&device.client))?;
        if counts != count(&routes, case.tokens, 2) {
            return Err(format!("counts {counts:?} are not those of the routes"));
        }
        Ok(())
    })
}

fn choices_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, router_cases(device, 2..6), |case| {
        let data = case.data();
        let (hidden, weight, bias) = run(case.tensors(device, &data))?;
        let mut choice = run(LinearChoice::new(weight, case.choices))?;
        if let Some(bias) = bias {
            choice = choice.with_bias(bias);
        }
        let decision = run(choice.route(&device.client, hidden.view()))?;
        let scores = decision.scores.as_ref().ok_or("a choice has scores")?;
        let scores = run(scores.to_f32(&device.client))?;
        let routes = run(decision.routes.to_host(&device.client))?;

        let hidden = Array::new(case.hidden_shape(), wide(&data.hidden));
        let weight = Array::new([case.model_dim, case.columns()], wide(&data.weight));
        let bias = data.bias.as_deref().map(wide);
        let logits = reference::linear_choice(&hidden, &weight, bias.as_deref(), case.choices);
        let (exact, _) = reference::softmax_choice(&logits);
        let tolerance = case.logit_tolerance();
        near("score", exact.as_slice(), &scores, tolerance)?;
        for row in 0..case.batch * case.heads {
            for token in 0..case.tokens {
                let score = |k: usize| exact.as_slice()[(row * case.choices + k) * case.tokens + token];
                let best = (0..case.choices).map(score).fold(0.0, f64::max);
                let route = usize::from(routes[row * case.tokens + token]);
                if route >= case.choices || score(route) < best - 2.0 * tolerance {
                    return Err(format!("row {row}, token {token}: route {route} is not the best"));
                }
            }
        }
        let counts = run(decision.counts(&device.client))?;
        if counts != count(&routes, case.tokens, case.choices) {
            return Err(format!("counts {counts:?} are not those of the routes"));
        }
        Ok(())
    })
}

fn assigned_routes_are_as_told(device: &Device, effort: Effort) -> Result<(), String> {
    let bursts = prop_oneof![Just(1u32), Just(64), 2..9u32];
    let strategy = (router_cases(device, 1..2), 1..5usize, bursts, any::<u32>());
    refute(effort, strategy, |(case, reaches, burst, seed)| {
        let client = &device.client;
        let hidden = run(Tensor::filled(client, case.hidden_shape(), Element::F32, 0.0))?;
        let shares = vec![1.0 / reaches as f64; reaches];
        let random = match reaches {
            // Gates may treat every head in its own way.
            2 => {
                let share = |head| head as f64 / case.heads as f64;
                RandomRouter::gate_by_head(&(0..case.heads).map(share).collect::<Vec<_>>(), seed)
            }
            _ => RandomRouter::new(case.heads, &shares, seed),
        };
        let random = run(random.and_then(|router| router.with_bursts(burst)))?;
        let decision = run(random.route(client, hidden.view()))?;
        let routes = run(decision.routes.to_host(client))?;
        let told: Vec<u8> = (0..case.batch * case.heads)
            .flat_map(|row| (0..case.tokens).map(move |token| (row as u32, token as u32)))
            .map(|(row, token)| random.route_of(row, token))
            .collect();
        if routes != told {
            return Err("random routes differ from the host's".into());
        }
        if run(decision.counts(client))? != count(&told, case.tokens, reaches) {
            return Err("counts of random routes are wrong".into());
        }
        let per_head: Vec<u8> =
            (0..case.heads).map(|head| ((head + seed as usize % 7) % reaches) as u8).collect();
        let fixed = run(FixedRouter::new(per_head.clone(), reaches))?;
        let decision = run(fixed.route(client, hidden.view()))?;
        let routes = run(decision.routes.to_host(client))?;
        let told: Vec<u8> = (0..case.batch)
            .flat_map(|_| per_head.iter().flat_map(|&route| vec![route; case.tokens]))
            .collect();
        if routes != told || run(decision.counts(client))? != count(&told, case.tokens, reaches) {
            return Err("fixed routes are not as told".into());
        }
        Ok(())
    })
}

fn nan_scores_never_pass_silently(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (cases(&device.profile), windows(), any::<prop::sample::Index>(), any::<bool>());
    refute(effort, strategy, |(case, window, at, softmax)| {
        let client = &device.client;
        let model_dim = 8;
        let bad = at.index(case.query_len);
        let mut hidden = vec![0.25; case.batch * case.query_len * model_dim];
        hidden[bad * model_dim + 3] = f32::NAN;
        let shape = [case.batch, case.query_len, model_dim];
        let hidden = run(Tensor::from_f32(client, shape, Element::F32, &hidden))?;
        let columns = case.heads() * if softmax { 2 } else { 1 };
        let weight = run(Tensor::filled(client, [model_dim, columns], Element::F32, 0.5))?;
        let decision = if softmax {
            run(LinearChoice::new(weight, 2).and_then(|choice| choice.route(client, hidden.view())))?
        } else {
            run(LinearGate::aha(weight).route(client, hidden.view()))?
        };
        let routes = run(decision.routes.to_host(client))?;
        for (at, &route) in routes.iter().enumerate() {
            let is_bad = at % case.query_len == bad && at / (case.query_len * case.heads()) == 0;
            if (route == INVALID_ROUTE) != is_bad {
                return Err(format!("route {at} is {route}"));
            }
        }
        match decision.counts(client) {
            Err(Error::InvalidScores { count, .. }) if count == case.heads() => {}
            other => return Err(format!("counting invalid routes gave {other:?}")),
        }
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        let problem = case.problem();
        let partial =
            run(bifocal::Aha::new(window).attend(client, &problem, &on.inputs(), &decision.routes))?;
        let read = run(Read::new(client, &partial))?;
        for (row, lse) in read.lse.iter().enumerate() {
            let is_bad = row % case.query_len == bad && row / (case.query_len * case.heads()) == 0;
            let out = &read.out[row * case.value_dim..][..case.value_dim];
            let is_nan = lse.is_nan() && out.iter().all(|x| x.is_nan());
            let clean = !lse.is_nan() && out.iter().all(|x| !x.is_nan());
            if is_bad != is_nan || is_bad == clean {
                return Err(format!("row {row} (invalid: {is_bad}) has log-sum-exp {lse}"));
            }
        }
        Ok(())
    })
}

fn plans_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let lengths = prop_oneof![3 => Just(0usize), 1 => 100..300usize];
    let strategy = (cases(&device.profile), routings(), 2..5usize, 1..20u32, any::<bool>(), lengths);
    refute(effort, strategy, |(mut case, routing, reaches, item_rows, invalid, more)| {
        case.query_len += more;
        let client = &device.client;
        let mut routes = HostRoutes::new(&case, &routing, reaches);
        let problem = case.problem();
        let on_device = if invalid {
            // As a router that met a NaN would leave it: only the device sees such routes.
            routes.routes[0] = INVALID_ROUTE;
            run(routes.upload_unchecked(client))?
        } else {
            run(routes.upload(client))?
        };
        let plan = run(bifocal::Plan::build(client, &on_device, &problem, item_rows))?;
        let plan = run(plan.to_host(client))?;
        let exact = reference::lists(&routes.array(), reaches, case.heads(), case.kv_heads);
        if plan.lists != exact.lists {
            return Err(format!("lists are {:?}, expected {:?}", plan.lists, exact.lists));
        }
        for (lists, items) in plan.lists.iter().zip(&plan.items) {
            let mut covered: Vec<Vec<u32>> = lists.iter().map(|list| vec![0; list.len()]).collect();
            for &[list, first, count] in items {
                if count == 0 || count > item_rows {
                    return Err(format!("an item of {count} rows"));
                }
                for entry in first..first + count {
                    *covered[list as usize].get_mut(entry as usize).ok_or("an item beyond its list")? += 1;
                }
            }
            if covered.iter().flatten().any(|&times| times != 1) {
                return Err("a row is not in exactly one item".into());
            }
            // Lists take turns; within a turn the last item of every list comes first.
            let order = |&[list, first, _]: &[u32; 3], at_once: u32| {
                (list / at_once, (lists[list as usize].len() as u32 - 1 - first) / item_rows, list)
            };
            let in_turns = |at_once| items.is_sorted_by_key(|item| order(item, at_once));
            if !(1..=lists.len() as u32).any(in_turns) {
                return Err("items do not stand by turns of lists and their rank from the end".into());
            }
            let ascends = |list: &Vec<u32>| list.is_sorted_by(|a, b| a % INVALID_ROW < b % INVALID_ROW);
            if !lists.iter().all(ascends) {
                return Err("a list does not ascend".into());
            }
        }
        Ok(())
    })
}

fn combinations_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), routings(), any::<u64>()), |(case, routing, seed)| {
        let client = &device.client;
        let problem = case.problem();
        let (out_shape, lse_shape) = (problem.out_shape(), problem.lse_shape());
        let mut rng = SmallRng::seed_from_u64(seed);
        // Partials whose rows now and then have seen no key.
        let mut draw = || {
            let mut lse: Vec<f32> =
                (0..lse_shape.iter().product()).map(|_| rng.random_range(-20.0..20.0)).collect();
            let mut out: Vec<f32> =
                (0..out_shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
            for (row, lse) in lse.iter_mut().enumerate() {
                if rng.random_bool(0.2) {
                    *lse = f32::NEG_INFINITY;
                    out[row * case.value_dim..][..case.value_dim].fill(0.0);
                }
            }
            (out, lse)
        };
        let (a, b) = (draw(), draw());
        let upload = |(out, lse): &(Vec<f32>, Vec<f32>)| -> bifocal::Result<Partial> {
            Ok(Partial {
                out: Tensor::from_f32(client, out_shape, Element::F32, out)?,
                lse: Tensor::from_f32(client, lse_shape, Element::F32, lse)?,
            })
        };
        let exact = |(out, lse): &(Vec<f32>, Vec<f32>)| reference::Partial {
            out: Array::new(out_shape, wide(out)),
            lse: Array::new(lse_shape, wide(lse)),
        };
        let tolerance = 1e-5;
        let check = |what: &str, expected: &reference::Partial<f64>, read: &Read| {
            near(&format!("{what}: output"), expected.out.as_slice(), &read.out, tolerance)?;
            near(&format!("{what}: log-sum-exp"), expected.lse.as_slice(), &read.lse, tolerance)
        };

        let into = run(upload(&a))?;
        run(bifocal::merge(client, &problem, &into, &run(upload(&b))?))?;
        check("merge", &reference::merge(&exact(&a), &exact(&b)), &run(Read::new(client, &into))?)?;

        let routes = HostRoutes::new(&case, &routing, 2);
        let on_device = run(routes.upload(client))?;
        let into = run(Partial::poisoned(client, &problem, Element::F32))?;
        for (reach, from) in [&a, &b].into_iter().enumerate() {
            run(bifocal::select(client, &problem, &on_device, reach, &run(upload(from))?, &into))?;
        }
        let selected = reference::select(&routes.array(), &[&exact(&a), &exact(&b)]);
        check("select", &selected, &run(Read::new(client, &into))?)?;

        let into = run(upload(&a))?;
        run(bifocal::mask(client, &problem, &on_device, 1, &into))?;
        let masked = reference::mask(&routes.array(), &exact(&a));
        check("mask", &masked, &run(Read::new(client, &into))?)?;

        let RouteGeometry { batch, heads, tokens, .. } = routes.geometry;
        let weights: Vec<f32> = (0..routes.geometry.len()).map(|_| rng.random_range(0.0..1.0)).collect();
        let on_device = run(Tensor::from_f32(client, [batch, heads, tokens], Element::F32, &weights))?;
        let into = run(upload(&a))?;
        run(bifocal::mix(client, &problem, on_device.view(), &into, &run(upload(&b))?))?;
        let weights = Array::new([batch, heads, tokens], wide(&weights));
        let mixed = reference::mix(&weights, &exact(&a), &exact(&b));
        near("mix: output", mixed.as_slice(), &run(into.out.to_f32(client))?, tolerance)
    })
}
