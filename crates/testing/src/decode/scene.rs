//! A decode step: what is drawn, the cache that holds its sequences, and what is right.

use bifocal::{
    Element, Partial, Problem, Reach, Routes, Routine, Tensor,
    cubecl::{client::Client, server::Handle},
    decode::{DecodePlan, KvCache, KvShape, Layout, Reaches, SequenceId, Step},
};
use bifocal_reference::{Array, KvModel, Options};
use proptest::{prelude::*, sample::select};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    Device,
    case::{Case, Routing, cases, reaches, routings},
    compare::{Expected, Read},
    inputs::{Data, HostRoutes, array, round},
};

/// A decode step: a [`Case`] whose key length is that of the longest sequence, and what goes beyond it.
#[derive(Clone, Debug)]
pub(super) struct StepCase {
    pub(super) case: Case,
    pub(super) lengths: Vec<usize>,
    /// One per route; `None` sees nothing.
    pub(super) reaches: Vec<Option<Reach>>,
    /// Where there is more than one reach.
    pub(super) routing: Routing,
    /// Pages of so many tokens, or contiguous.
    pub(super) page_size: Option<usize>,
    pub(super) chunk: Option<usize>,
}

pub(super) fn step_cases(device: &Device) -> impl Strategy<Value = StepCase> + use<> {
    let large = if device.profile.cuda_arch.is_some() { 2 } else { 0 };
    let length = prop_oneof![
        1 => Just(1usize),
        3 => 2..40usize,
        2 => 60..200usize,
        large => 200..3000usize,
    ];
    let lengths = prop::collection::vec(length, 1..5);
    let queries = prop_oneof![4 => Just(1usize), 2 => 2..6usize, 1 => Just(16usize)];
    let reach = prop_oneof![6 => reaches().prop_map(Some), 1 => Just(None)];
    let list = prop_oneof![
        1 => reaches().prop_map(|reach| vec![Some(reach)]),
        2 => prop::collection::vec(reach, 2..5),
    ];
    let page_size = prop_oneof![Just(None), select(vec![1, 2, 7, 16, 64, 256]).prop_map(Some)];
    let chunk = prop_oneof![Just(None), select(vec![1, 3, 16, 50]).prop_map(Some)];
    (cases(&device.profile), lengths, queries, list, routings(), page_size, chunk).prop_map(
        |(case, lengths, query_len, reaches, routing, page_size, chunk)| StepCase {
            case: Case {
                batch: lengths.len(),
                query_len,
                key_len: lengths.iter().copied().max().expect("at least one sequence"),
                routine: case.routine.filter(|&routine| routine == Routine::Portable),
                ..case
            },
            lengths,
            reaches,
            routing,
            page_size,
            chunk,
        },
    )
}

impl StepCase {
    pub(super) fn layout(&self) -> bifocal::Result<Layout> {
        let (sequences, capacity) = (self.lengths.len(), self.case.key_len + 3);
        match self.page_size {
            Some(page_size) => {
                let pages = sequences * capacity.div_ceil(page_size);
                Layout::paged(sequences, capacity, page_size, pages)
            }
            None => Layout::contiguous(sequences, capacity),
        }
    }

    pub(super) fn routed(&self) -> bool {
        self.reaches.len() > 1
    }
}

/// Keys and values of one sequence, rounded: `[Hk, T, D]` and `[Hk, T, Dv]`.
#[derive(Clone)]
pub(super) struct Tokens {
    pub(super) key: Array<f32, 3>,
    pub(super) value: Array<f32, 3>,
}

impl Tokens {
    pub(super) fn draw(case: &Case, tokens: usize, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut draw = |dim| {
            Array::from_fn([case.kv_heads, tokens, dim], |_| {
                round(case.element, rng.random_range(-1.7f32..1.7))
            })
        };
        Self { key: draw(case.head_dim), value: draw(case.value_dim) }
    }

    pub(super) fn part(&self, from: usize, to: usize) -> Self {
        let part = |array: &Array<f32, 3>| {
            let [heads, _, dim] = array.shape();
            Array::from_fn([heads, to - from, dim], |[h, t, d]| array[[h, from + t, d]])
        };
        Self { key: part(&self.key), value: part(&self.value) }
    }

    pub(super) fn len(&self) -> usize {
        self.key.shape()[1]
    }

    /// `[1, Hk, T, D]` and `[1, Hk, T, Dv]`.
    pub(super) fn upload(&self, client: &Client, element: Element) -> bifocal::Result<[Tensor<4>; 2]> {
        let upload = |array: &Array<f32, 3>| {
            let [heads, tokens, dim] = array.shape();
            Tensor::from_f32(client, [1, heads, tokens, dim], element, array.as_slice())
        };
        Ok([upload(&self.key)?, upload(&self.value)?])
    }
}

/// Tokens `[Hk, T, D]` of several sequences as a batch, with tokens before heads in memory, as projections give them.
pub(super) fn upload_rows<'a>(
    client: &Client,
    element: Element,
    rows: impl Iterator<Item = &'a Array<f32, 3>>,
) -> bifocal::Result<Tensor<4>> {
    let (mut values, mut batch, mut shape) = (Vec::new(), 0, [0; 3]);
    for row in rows {
        (batch, shape) = (batch + 1, row.shape());
        for (t, h) in (0..shape[1]).flat_map(|t| (0..shape[0]).map(move |h| (t, h))) {
            values.extend_from_slice(row.row([h, t]));
        }
    }
    let [heads, tokens, dim] = shape;
    let strides = [tokens * heads * dim, dim, heads * dim, 1];
    let tensor = Tensor::from_f32(client, [values.len()], element, &values)?;
    Ok(Tensor::new(tensor.into_handle(), element, [batch, heads, tokens, dim], strides))
}

pub(super) fn shape_of(case: &Case) -> KvShape {
    KvShape {
        kv_heads: case.kv_heads,
        head_dim: case.head_dim,
        value_dim: case.value_dim,
        element: case.element,
    }
}

/// A cache that holds the sequences of a case, and queries for a step.
pub(super) struct Scene {
    pub(super) cache: KvCache,
    pub(super) sequences: Vec<SequenceId>,
    pub(super) tokens: Vec<Tokens>,
    pub(super) query: Vec<f32>,
    pub(super) sinks: Option<Vec<f32>>,
}

impl Scene {
    pub(super) fn new(client: &Client, step: &StepCase, layout: Layout) -> bifocal::Result<Self> {
        let case = &step.case;
        let seeds = (0..).map(|b| case.seed ^ (b << 32));
        let tokens: Vec<Tokens> =
            step.lengths.iter().zip(seeds).map(|(&t, s)| Tokens::draw(case, t, s)).collect();
        let data = Data::new(&Case { key_len: 1, ..case.clone() });
        Self::with_tokens(client, step, layout, tokens, data)
    }

    /// Appends each sequence in up to three parts, one token alone among them.
    pub(super) fn with_tokens(
        client: &Client,
        step: &StepCase,
        layout: Layout,
        tokens: Vec<Tokens>,
        data: Data,
    ) -> bifocal::Result<Self> {
        let case = &step.case;
        let mut cache = KvCache::new(client, shape_of(case), layout)?;
        let mut sequences = Vec::new();
        for tokens in &tokens {
            let sequence = cache.start(client)?;
            let length = tokens.len();
            let cuts = [0, length / 3, (length / 3 + 1).min(length), length];
            for cut in cuts.windows(2).filter(|cut| cut[0] < cut[1]) {
                let [key, value] = tokens.part(cut[0], cut[1]).upload(client, case.element)?;
                cache.append(client, &[sequence], key.view(), value.view())?;
            }
            sequences.push(sequence);
        }
        Ok(Self { cache, sequences, tokens, query: data.query, sinks: data.sinks })
    }

    /// One step of all sequences.
    pub(super) fn attend(
        &self,
        client: &Client,
        step: &StepCase,
        plan: &DecodePlan,
        routes: Option<&Routes>,
    ) -> bifocal::Result<Read> {
        self.attend_some(client, step, plan, routes, &self.sequences, &self.query)
    }

    /// One step of some of the sequences, with their queries.
    pub(super) fn attend_some(
        &self,
        client: &Client,
        step: &StepCase,
        plan: &DecodePlan,
        routes: Option<&Routes>,
        sequences: &[SequenceId],
        query: &[f32],
    ) -> bifocal::Result<Read> {
        let case = &step.case;
        let shape = [sequences.len(), case.heads(), case.query_len, case.head_dim];
        let query = Tensor::from_f32(client, shape, case.element, query)?;
        let sinks = match &self.sinks {
            Some(sinks) => Some(Tensor::from_f32(client, [sinks.len()], Element::F32, sinks)?),
            None => None,
        };
        let reaches = Reaches::new(client, &step.reaches)?;
        let mut asked = Step::new(query.view(), &reaches);
        if let Some(routes) = routes {
            asked = asked.with_routes(routes);
        }
        if let Some(sinks) = &sinks {
            asked = asked.with_sink_logits(sinks.view());
        }
        let batch = self.cache.batch(client, sequences)?;
        let partial = Partial::poisoned(client, plan.problem(), case.out_element())?;
        plan.attend(client, &self.cache.view(&batch)?, &asked, &partial)?;
        Read::new(client, &partial)
    }

    /// The oracle's answer, by way of a model with pages of another size.
    pub(super) fn expected(
        &self,
        step: &StepCase,
        reach_of: impl Fn(usize, usize, usize) -> Option<Reach>,
    ) -> Expected {
        let case = &step.case;
        let exact = self.oracle::<f64>(step, |weight| weight, &reach_of);
        let plain = self.oracle::<f32>(step, case.round_weight(), &reach_of);
        let values: Vec<f32> =
            self.tokens.iter().flat_map(|tokens| tokens.value.as_slice().to_vec()).collect();
        Expected::of(case, &values, exact, &plain)
    }

    fn oracle<F: num_traits::Float>(
        &self,
        step: &StepCase,
        round_weight: fn(F) -> F,
        reach_of: impl Fn(usize, usize, usize) -> Option<Reach>,
    ) -> bifocal_reference::Partial<F> {
        let case = &step.case;
        let cast = |x: f32| F::from(x).expect("an f32 fits every float");
        let mut model = KvModel::new([case.kv_heads, case.head_dim, case.value_dim], 5);
        let mut sequences = Vec::new();
        for tokens in &self.tokens {
            let sequence = model.start();
            model.append(sequence, &tokens.key.map(cast), &tokens.value.map(cast));
            sequences.push(sequence);
        }
        let problem = case.problem();
        let options = Options {
            scale: cast(problem.scale),
            softcap: problem.softcap.map(cast),
            sink_logits: self.sinks.as_ref().map(|sinks| sinks.iter().copied().map(cast).collect()),
            round_weight,
        };
        let shape = [case.batch, case.heads(), case.query_len, case.head_dim];
        model.attend(&sequences, &array(shape, &self.query), &options, reach_of)
    }
}

/// The plan of a case over a cache of this layout, for a batch of so many sequences.
pub(super) fn plan_of(
    client: &Client,
    step: &StepCase,
    layout: Layout,
    batch: usize,
) -> bifocal::Result<DecodePlan> {
    let mut problem: Problem = step.case.problem();
    (problem.batch, problem.key_len) = (batch, layout.tokens_kept());
    match step.chunk {
        Some(keys) => DecodePlan::in_chunks(client, &problem, keys),
        None => DecodePlan::new(client, &problem),
    }
}

/// Routes of a step, and the reach that each row gets by them.
pub(super) fn routes_of(step: &StepCase, seed: u64) -> HostRoutes {
    let case = Case { seed: step.case.seed ^ seed, ..step.case.clone() };
    HostRoutes::new(&case, &step.routing, step.reaches.len())
}

pub(super) fn reach_by<'a>(
    step: &'a StepCase,
    routes: &'a HostRoutes,
) -> impl Fn(usize, usize, usize) -> Option<Reach> + 'a {
    move |b, h, t| match step.routed() {
        true => step.reaches.get(usize::from(routes.at(step.case.heads(), b, h, t))).copied().flatten(),
        false => step.reaches[0],
    }
}

/// Writes other bytes into a buffer, as who replays a captured step does.
pub(super) fn overwrite(client: &Client, handle: &Handle, bytes: &[u8]) -> bifocal::Result<()> {
    let read = client.read_one(handle.clone());
    let mut there = read.map_err(|error| bifocal::Error::Runtime(error.to_string()))?;
    there.copy_from_slice(bytes);
    client.write(handle, there);
    Ok(())
}

/// What a buffer holds.
pub(super) fn bytes_of(client: &Client, handle: &Handle) -> bifocal::Result<Vec<u8>> {
    let read = client.read_one(handle.clone());
    read.map(|bytes| bytes.to_vec()).map_err(|error| bifocal::Error::Runtime(error.to_string()))
}

pub(super) fn joined(first: &Tokens, second: &Tokens) -> Tokens {
    let join = |a: &Array<f32, 3>, b: &Array<f32, 3>| {
        let [heads, before, dim] = a.shape();
        Array::from_fn([heads, before + b.shape()[1], dim], |[h, t, d]| match t < before {
            true => a[[h, t, d]],
            false => b[[h, t - before, d]],
        })
    };
    Tokens { key: join(&first.key, &second.key), value: join(&first.value, &second.value) }
}
