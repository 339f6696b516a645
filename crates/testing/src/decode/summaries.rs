//! Caches with summaries of keys beside their model, and the steps of RATTENTION and QAdA over them.

use bifocal::{
    Covariance, Error, FeatureMap, LinearAttention, MomentGate, Partial, Problem, Qada, Rattention, Reach,
    RouteGeometry, Routes, Summary, Tensor, Window,
    cubecl::client::Client,
    decode::{
        Layout, LinearCache, MomentCache, NewTokens, QadaDecoder, RattentionDecoder, RattentionQueries,
        SequenceId, SummaryCache, SummarySnapshot,
    },
};
use bifocal_reference::{self as reference, Array, KvModel, LinearOptions, Options, attention_where};
use num_traits::Float;
use proptest::{prelude::*, sample::select};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{
    scene::{Tokens, shape_of, upload_rows},
    soak::{Operation, operations},
};
use crate::{
    Device, Effort,
    case::{Case, cases},
    compare::{Expected, Read, near, run},
    inputs::{array, round},
    linear::{Bound, NormData},
    moments::{NATS, options, oracle},
    refute,
};

/// A sequence of the cache and of its model.
#[derive(Clone, Copy)]
struct Live {
    sequence: SequenceId,
    of_model: usize,
    /// The most tokens that it had since it had none.
    most: usize,
}

/// A cache beside two models: of keys as attention reads them, and as they are summed up.
struct Soak<S> {
    cache: SummaryCache<S>,
    model: KvModel<f32>,
    summed: KvModel<f32>,
    /// Whether the two differ.
    plain: bool,
    live: Vec<Live>,
    case: Case,
    layout: Layout,
    /// What [`Layout`] does not tell: whether tokens are overwritten.
    ring: bool,
    slack: usize,
}

impl<S: Summary + Clone> Soak<S> {
    fn new(
        client: &Client,
        (cache, plain): (SummaryCache<S>, bool),
        case: &Case,
        (ring, slack): (bool, usize),
    ) -> Result<Self, String> {
        let cache = if plain { run(cache.with_plain_keys(client))? } else { cache };
        let layout = cache.kv().layout();
        let model = KvModel::new([case.kv_heads, case.head_dim, case.value_dim], layout.page_size());
        let (summed, live) = (model.clone(), Vec::new());
        Ok(Self { cache, model, summed, plain, live, case: case.clone(), layout, ring, slack })
    }

    /// All operations, with `check` of steps of so many queries over some sequences now and then, and over all that have tokens
    /// in the end, before and after they are saved and restored. One query always finds its keys.
    fn run(
        mut self,
        client: &Client,
        operations: &[Operation],
        query_len: usize,
        check: impl Fn(&Self, &[Live], usize) -> Result<(), String>,
    ) -> Result<(), String> {
        for (number, operation) in operations.iter().enumerate() {
            let seed = self.case.seed ^ number as u64;
            let check = |soak: &Self, live: Live| check(soak, &[live], query_len);
            self.apply(client, operation, seed, check).map_err(|error| format!("{operation:?}: {error}"))?;
        }
        let filled: Vec<Live> =
            self.live.iter().copied().filter(|live| self.model.length(live.of_model) > 0).collect();
        if !filled.is_empty() {
            check(&self, &filled, 1)?;
            let restored = self.restore_all(client, &filled)?;
            check(&self, &restored, 1).map_err(|reason| format!("restored: {reason}"))?;
        }
        for live in std::mem::take(&mut self.live) {
            run(self.cache.free(live.sequence))?;
        }
        match self.cache.kv().free_pages() == self.layout.pages() {
            true => Ok(()),
            false => Err("a cache without sequences still holds pages".into()),
        }
    }

    fn apply(
        &mut self,
        client: &Client,
        operation: &Operation,
        seed: u64,
        check: impl Fn(&Self, Live) -> Result<(), String>,
    ) -> Result<(), String> {
        let full = self.live.len() == self.layout.sequences();
        let expect_full = |error: Error| if full { Ok(()) } else { Err(error.to_string()) };
        match operation {
            Operation::Start => match self.cache.start(client) {
                Ok(sequence) => {
                    let of_model = self.model.start();
                    self.summed.start();
                    self.live.push(Live { sequence, of_model, most: 0 });
                }
                Err(error) => expect_full(error)?,
            },
            _ if self.live.is_empty() => {}
            Operation::Append { sequences, tokens } => self.append(client, sequences, *tokens, seed)?,
            Operation::Fork(at) => {
                let live = *at.get(&self.live);
                match self.cache.fork(client, live.sequence) {
                    Ok(sequence) => {
                        let of_model = self.model.fork(live.of_model);
                        self.summed.fork(live.of_model);
                        self.live.push(Live { sequence, of_model, ..live });
                    }
                    Err(error) => expect_full(error)?,
                }
            }
            Operation::Truncate(at, length) => self.truncate(client, at.index(self.live.len()), length)?,
            Operation::Free(at) => {
                let live = self.live.swap_remove(at.index(self.live.len()));
                run(self.cache.free(live.sequence))?;
                self.model.free(live.of_model);
                self.summed.free(live.of_model);
            }
            Operation::SaveAndRestore(at) => {
                let live = *at.get(&self.live);
                if self.model.length(live.of_model) == 0 {
                    return Ok(());
                }
                let snapshot = run(self.cache.save(client, live.sequence))?;
                let snapshot = run(SummarySnapshot::from_bytes(&snapshot.to_bytes()))?;
                match self.cache.restore(client, &snapshot) {
                    Ok(sequence) => {
                        let of_model = self.model.fork(live.of_model);
                        self.summed.fork(live.of_model);
                        self.live.push(Live { sequence, of_model, ..live });
                    }
                    Err(error) => expect_full(error)?,
                }
            }
            Operation::ForkApart => {
                let ids: Vec<SequenceId> = self.live.iter().map(|live| live.sequence).collect();
                let (cache, forks) = run(self.cache.fork_apart(client, &ids))?;
                self.cache = cache;
                for (live, fork) in self.live.iter_mut().zip(forks) {
                    live.sequence = fork;
                }
            }
            Operation::Read(at) => {
                let live = *at.get(&self.live);
                if self.model.length(live.of_model) > 0 {
                    check(self, live)?;
                }
            }
        }
        Ok(())
    }

    /// Every one of these sequences saved, freed and restored.
    fn restore_all(&mut self, client: &Client, filled: &[Live]) -> Result<Vec<Live>, String> {
        let restore = |live: &Live| -> bifocal::Result<Live> {
            let snapshot = self.cache.save(client, live.sequence)?.to_bytes();
            self.cache.free(live.sequence)?;
            let sequence = self.cache.restore(client, &SummarySnapshot::from_bytes(&snapshot)?)?;
            Ok(Live { sequence, ..*live })
        };
        let restored = run(filled.iter().map(restore).collect::<bifocal::Result<Vec<Live>>>())?;
        self.live.retain(|live| filled.iter().all(|gone| gone.sequence != live.sequence));
        self.live.extend(&restored);
        Ok(restored)
    }

    /// Appends tokens of their own to several sequences.
    fn append(
        &mut self,
        client: &Client,
        sequences: &[prop::sample::Index],
        tokens: usize,
        seed: u64,
    ) -> Result<(), String> {
        let mut chosen: Vec<usize> = sequences.iter().map(|at| at.index(self.live.len())).collect();
        chosen.sort_unstable();
        chosen.dedup();
        let case = &self.case;
        let draw = |salt: u64| -> Vec<Tokens> {
            chosen.iter().map(|&b| Tokens::draw(case, tokens, seed ^ salt ^ ((b as u64) << 40))).collect()
        };
        let (drawn, plain) = (draw(0), draw(if self.plain { 1 << 60 } else { 0 }));
        let upload = |of: &[Tokens], part: fn(&Tokens) -> &Array<f32, 3>| {
            run(upload_rows(client, case.element, of.iter().map(part)))
        };
        let key = upload(&drawn, |tokens| &tokens.key)?;
        let value = upload(&drawn, |tokens| &tokens.value)?;
        let plain_key = upload(&plain, |tokens| &tokens.key)?;
        let mut new = NewTokens::new(key.view(), value.view());
        if self.plain {
            new = new.with_plain_key(plain_key.view());
        }
        let ids: Vec<SequenceId> = chosen.iter().map(|&at| self.live[at].sequence).collect();
        let length = |at: usize| self.model.length(self.live[at].of_model) + tokens;
        let too_long = !self.ring && chosen.iter().any(|&at| length(at) > self.layout.tokens_kept());
        match self.cache.append(client, &ids, &new) {
            Ok(()) if too_long => return Err("there is no room for so many".into()),
            Err(_) if too_long => return Ok(()),
            appended => run(appended)?,
        }
        for (&at, (drawn, plain)) in chosen.iter().zip(drawn.iter().zip(&plain)) {
            let live = &mut self.live[at];
            self.model.append(live.of_model, &drawn.key, &drawn.value);
            self.summed.append(live.of_model, &plain.key, &drawn.value);
            live.most = live.most.max(self.model.length(live.of_model));
        }
        Ok(())
    }

    /// Only a ring may refuse, and only beyond the slack.
    fn truncate(&mut self, client: &Client, at: usize, length: &prop::sample::Index) -> Result<(), String> {
        let live = &mut self.live[at];
        let length = length.index(self.model.length(live.of_model) + 1);
        let of_cache = |cache: &SummaryCache<S>| -> bifocal::Result<[usize; 2]> {
            Ok([cache.kv().length(live.sequence)?, cache.covered(live.sequence)?])
        };
        let before = run(of_cache(&self.cache))?;
        match self.cache.truncate(client, live.sequence, length) {
            Err(Error::SummedUp { .. } | Error::Overwritten { .. })
                if self.ring && length > 0 && length + self.slack < live.most =>
            {
                match run(of_cache(&self.cache))? == before {
                    true => Ok(()),
                    false => Err("a sequence that could not be truncated is not as it was".into()),
                }
            }
            truncated => {
                run(truncated)?;
                self.model.truncate(live.of_model, length);
                self.summed.truncate(live.of_model, length);
                live.most = if length == 0 { 0 } else { live.most };
                let live = *live;
                match self.is_summed_up(&[live], 1)? {
                    true => Err("what the next query sees is summed up".into()),
                    false => Ok(()),
                }
            }
        }
    }

    /// Whether a step of so many queries needs keys one by one that are summed up.
    fn is_summed_up(&self, live: &[Live], query_len: usize) -> Result<bool, String> {
        let (window, first) = self.cache.summary().outside();
        for live in live {
            let end =
                (self.model.length(live.of_model) + 1).saturating_sub(query_len + window.keys() as usize);
            if run(self.cache.covered(live.sequence))? > end.max(first) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Queries `[B, H, Tq, D]`, rounded.
    fn queries(&self, batch: usize, query_len: usize, salt: u64) -> Vec<f32> {
        let case = &self.case;
        let mut rng = SmallRng::seed_from_u64(case.seed ^ salt);
        let count = batch * case.heads() * query_len * case.head_dim;
        (0..count).map(|_| round(case.element, rng.random_range(-1.7f32..1.7))).collect()
    }
}

/// A batch of sequences, and the problem that queries pose to it.
fn problem_of<S: Summary>(
    client: &Client,
    soak: &Soak<S>,
    live: &[Live],
    query_len: usize,
) -> bifocal::Result<(bifocal::decode::Batch, Problem)> {
    let ids: Vec<SequenceId> = live.iter().map(|live| live.sequence).collect();
    let batch = soak.cache.kv().batch(client, &ids)?;
    let shape = [live.len(), soak.case.heads(), query_len, soak.case.head_dim];
    let problem = soak.cache.kv().view(&batch)?.problem(shape, soak.case.element)?;
    Ok((batch, problem))
}

/// What is drawn: a shape, a window, slack, pages, queries per step, and what is done.
type Drawn = (Case, usize, usize, usize, usize, Vec<Operation>);

fn drawn(device: &Device) -> impl Strategy<Value = Drawn> + use<> {
    // Shaders are compiled for seconds: few different ones.
    let shaders = device.profile.runtime.contains("wgpu");
    let case = cases(&device.profile).prop_map(move |case| {
        let (head_dim, value_dim) =
            if shaders { (32, 32) } else { (case.head_dim.min(64), case.value_dim.min(64)) };
        let case = Case { head_dim, value_dim, magnitude: 1.0, routine: None, ..case };
        Case { softcap: false, sink_logits: false, ..case }
    });
    let windows = prop_oneof![1..5usize, 5..30usize];
    (case, windows, 1..12usize, select(vec![1usize, 3, 16]), 1..5usize, operations())
}

const SEQUENCES: usize = 4;

pub(super) fn states_follow_their_cache(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    // Without a map rows can come out next to zero, and a norm makes noise of them.
    let map = select(vec![FeatureMap::SoftmaxPair, FeatureMap::ReluPair]);
    refute(effort, (drawn(device), map, any::<[bool; 3]>()), |(drawn, map, [ring, plain, routed])| {
        let (case, window, slack, page_size, query_len, operations) = drawn;
        let window = run(Window::new(window))?;
        let system = Rattention::new(window).with_feature_map(map);
        // As many queries as may be truncated find their keys.
        let layout = run(match ring {
            true => Layout::ring(SEQUENCES, window, 2 * slack, page_size),
            false => Layout::paged(SEQUENCES, 300, page_size, SEQUENCES * 300usize.div_ceil(page_size)),
        })?;
        let cache = run(LinearCache::new(client, system.far(), shape_of(&case), layout, slack))?;
        let soak = Soak::new(client, (cache, plain), &case, (ring, slack))?;
        soak.run(client, &operations, query_len, |soak, live, query_len| {
            let (batch, problem) = run(problem_of(client, soak, live, query_len))?;
            let decoder = run(RattentionDecoder::new(client, system, &problem))?;
            let queries = [1u64, 2].map(|salt| soak.queries(live.len(), query_len, salt));
            let shape = [live.len(), case.heads(), query_len, case.head_dim];
            let upload = |query: &[f32]| run(Tensor::from_f32(client, shape, case.element, query));
            let (near, far) = (upload(&queries[0])?, upload(&queries[1])?);
            let scales = NormData::scales(&case);
            let near_scale = NormData::upload_scale(device, &case, &scales[0])?;
            let far_scale = NormData::upload_scale(device, &case, &scales[1])?;
            // Without routes, as if all were open.
            let rows = case.heads() * query_len;
            let mut rng = SmallRng::seed_from_u64(case.seed ^ 4);
            let routes: Vec<u8> =
                (0..live.len() * rows).map(|_| u8::from(!routed || rng.random_bool(0.5))).collect();
            let geometry = run(RouteGeometry::new(live.len(), case.heads(), query_len, 2))?;
            let uploaded = run(Routes::from_host(client, geometry, &routes))?;
            let asked = RattentionQueries {
                near: near.view(),
                far: far.view(),
                near_scale: near_scale.view(),
                far_scale: far_scale.view(),
                routes: routed.then_some(&uploaded),
            };
            let out = run(Tensor::filled(client, problem.out_shape(), case.out_element(), f32::NAN))?;
            let summed_up = soak.is_summed_up(live, query_len)?;
            match decoder.step(client, &soak.cache, &batch, &asked, &out) {
                Err(Error::SummedUp { .. } | Error::Overwritten { .. }) if summed_up => return Ok(()),
                done => run(done)?,
            }
            if summed_up {
                return Err("keys of a query's window are summed up".into());
            }
            let found = run(out.to_f32(client))?;
            for (b, &live) in live.iter().enumerate() {
                let of = |values: &[f32], dim: usize| -> Vec<f32> {
                    let numbers = case.heads() * query_len * dim;
                    values[b * numbers..][..numbers].to_vec()
                };
                let queries = queries.each_ref().map(|query| of(query, case.head_dim));
                let routes = Array::new([1, case.heads(), query_len], routes[b * rows..][..rows].to_vec());
                let exact = rattention_rows::<f64>(soak, live, &queries, &routes, &scales, (map, |x| x));
                let rounded = (map, case.round_weight());
                let plain = rattention_rows::<f32>(soak, live, &queries, &routes, &scales, rounded);
                Bound::new(exact, &plain, case.out_element())
                    .accepts(&format!("output of sequence {b}"), &of(&found, case.value_dim))?;
            }
            Ok(())
        })
    })
}

/// The last rows of RATTENTION over a sequence, with the far branch where the route is 1. In `f32` the near branch is rounded
/// as the facade keeps it.
fn rattention_rows<F: Float>(
    soak: &Soak<LinearAttention>,
    live: Live,
    queries: &[Vec<f32>; 2],
    routes: &Array<u8, 3>,
    scales: &[Vec<f32>; 2],
    (map, round_weight): (FeatureMap, fn(F) -> F),
) -> Vec<F> {
    let case = &soak.case;
    let cast = |x: f32| F::from(x).expect("an f32 fits every float");
    let (window, _) = soak.cache.summary().outside();
    let [key, value] = soak.model.contents(live.of_model).map(|array| array.map(cast));
    let [summed, _] = soak.summed.contents(live.of_model).map(|array| array.map(cast));
    let query_len = queries[0].len() / (case.heads() * case.head_dim);
    let shape = [1, case.heads(), query_len, case.head_dim];
    let [near, far] = queries.each_ref().map(|query| array::<F, 4>(shape, query));
    let reach = Some(Reach::Window(window));
    let options = Options { round_weight, ..Options::new(case.head_dim) };
    let mut near = attention_where(&near, &key, &value, &options, |_, _, _| reach).out;
    if size_of::<F>() == 4 {
        near = near.map(|x| cast(round(case.element, x.to_f32().unwrap_or(f32::NAN))));
    }
    let beyond = LinearOptions { map, ..LinearOptions::new(window) };
    let far = reference::linear_attention(&far, &summed, &value, &beyond).out;
    let scales = [NormData::scale::<F>(case, &scales[0]), NormData::scale::<F>(case, &scales[1])];
    reference::aha_linear([&near, &far], routes, [&scales[0], &scales[1]], cast(1e-8)).into_vec()
}

pub(super) fn moments_follow_their_cache(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    let covariance = select(vec![Covariance::Full, Covariance::Diagonal]);
    let gates = (0..6u32, select(vec![0.3f32, 0.7, 0.95]), covariance);
    refute(effort, (drawn(device), gates), |(drawn, (sinks, tau, covariance))| {
        let (case, window, slack, page_size, query_len, operations) = drawn;
        let window = run(Window::new(window))?;
        let gate = run(MomentGate::new(window, tau))?.with_sinks(sinks).with_covariance(covariance);
        let pages = SEQUENCES * 300usize.div_ceil(page_size);
        let layout = run(Layout::paged(SEQUENCES, 300, page_size, pages))?;
        let cache = run(MomentCache::new(client, gate, shape_of(&case), layout, slack))?;
        let soak = Soak::new(client, (cache, false), &case, (false, slack))?;
        soak.run(client, &operations, query_len, |soak, live, query_len| {
            let (batch, problem) = run(problem_of(client, soak, live, query_len))?;
            let decoder = run(QadaDecoder::new(client, Qada::new(gate), &problem))?;
            let query = soak.queries(live.len(), query_len, 3);
            let shape = [live.len(), case.heads(), query_len, case.head_dim];
            let uploaded = run(Tensor::from_f32(client, shape, case.element, &query))?;
            let partial = run(Partial::poisoned(client, &problem, case.out_element()))?;
            let summed_up = soak.is_summed_up(live, query_len)?;
            let decision = match decoder.step(client, &soak.cache, &batch, (uploaded.view(), None), &partial)
            {
                Err(Error::SummedUp { .. }) if summed_up => return Ok(()),
                decision => run(decision)?,
            };
            if summed_up {
                return Err("keys of a query's window are summed up".into());
            }
            let routes = run(decision.routes.to_host(client))?;
            let scores = decision.scores.as_ref().ok_or("a decision without scores")?;
            let (mass, read) = (run(scores.to_f32(client))?, run(Read::new(client, &partial))?);
            let rows = case.heads() * query_len;
            for (b, &live) in live.iter().enumerate() {
                let part = |values: &[f32], dim: usize| values[b * rows * dim..][..rows * dim].to_vec();
                let routes = &routes[b * rows..][..rows];
                let found = Read { out: part(&read.out, case.value_dim), lse: part(&read.lse, 1) };
                let query = part(&query, case.head_dim);
                accept_qada(soak, live, &problem, (&query, query_len), (&part(&mass, 1), routes, &found))
                    .map_err(|reason| format!("sequence {b}: {reason}"))?;
            }
            Ok(())
        })
    })
}

/// Whether a step over a sequence predicts the mass of the oracle, decides by it, and attends as it decided.
fn accept_qada(
    soak: &Soak<MomentGate>,
    live: Live,
    problem: &Problem,
    (query, query_len): (&[f32], usize),
    (mass, routes, found): (&[f32], &[u8], &Read),
) -> Result<(), String> {
    let (case, gate) = (&soak.case, soak.cache.summary());
    let shape = [1, case.heads(), query_len, case.head_dim];
    let [key, value] = soak.model.contents(live.of_model);
    let wide = |array: &Array<f32, 4>| array.map(f64::from);
    let (exact_query, exact_key, exact_value) = (array(shape, query), wide(&key), wide(&value));
    let options = options(problem);
    let exact = oracle(gate, gate.tau());
    let predicted = exact.predict(&exact_query, &exact_key, &options, None);
    near("mass", predicted.as_slice(), mass, NATS)?;
    let local =
        attention_where(&exact_query, &exact_key, &exact_value, &options, |_, _, _| Some(exact.near()));
    let decided = exact.decide(&local.lse, &predicted);
    let cut = (1.0 / f64::from(gate.tau()) - 1.0).ln();
    for (at, (&route, &right)) in routes.iter().zip(decided.as_slice()).enumerate() {
        // A row within rounding of the cut may fall on either side.
        let margin = predicted.as_slice()[at] - local.lse.as_slice()[at] - cut;
        if route != right && margin.abs() > NATS {
            return Err(format!("route {at} is {route}, {margin} nats beyond the cut"));
        }
    }
    let reach = |_: usize, head: usize, token: usize| match routes[head * query_len + token] {
        0 => Some(exact.near()),
        _ => Some(Reach::All),
    };
    let exact = attention_where(&exact_query, &exact_key, &exact_value, &options, reach);
    let options = Options { round_weight: case.round_weight(), ..Options::new(case.head_dim) };
    let plain: reference::Partial<f32> = attention_where(&array(shape, query), &key, &value, &options, reach);
    Expected::of(case, value.as_slice(), exact, &plain).accepts(found)
}
