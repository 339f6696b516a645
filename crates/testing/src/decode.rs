//! What caches and decode steps satisfy.

use bifocal::{
    Element, INVALID_ROUTE, Partial, Problem, Reach, RouteGeometry, Routes, Routine, Rows, Tensor, Window,
    cubecl::client::Client,
    decode::{DecodePlan, KvCache, KvShape, Layout, Reaches, SequenceId, Snapshot, Step},
};
use bifocal_reference::{Array, KvModel, Options};
use proptest::{prelude::*, sample::select};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    Device, Effort, Property,
    attention::operator,
    case::{Case, Routing, cases, causal_reaches, reaches, routings},
    compare::{Expected, Read, agree, run},
    everywhere,
    inputs::{Data, HostRoutes, array, round},
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "caches_equal_their_model",
        claim: "whatever is appended, forked, truncated and freed, contents and free pages are the model's",
        applies: everywhere,
        one_in: 1,
        run: caches_equal_their_model,
    },
    Property {
        name: "decode_equals_the_oracle",
        claim: "a step over sequences of any lengths, by any routes, gives the oracle's output and log-sum-exp",
        applies: everywhere,
        one_in: 1,
        run: decode_equals_the_oracle,
    },
    Property {
        name: "decode_is_the_end_of_prefill",
        claim: "a step gives the last rows of prefill",
        applies: everywhere,
        one_in: 1,
        run: decode_is_the_end_of_prefill,
    },
    Property {
        name: "layouts_agree_bit_for_bit",
        claim: "pages of any size and, where the window is all that is seen, a ring give what a contiguous cache gives",
        applies: everywhere,
        one_in: 1,
        run: layouts_agree_bit_for_bit,
    },
    Property {
        name: "neighbours_do_not_matter",
        claim: "a sequence's step gives the same bits alone and in any company",
        applies: everywhere,
        one_in: 1,
        run: neighbours_do_not_matter,
    },
    Property {
        name: "gates_flip_between_steps",
        claim: "new routes in the same buffer and new tokens are what the next step of the same plan goes by",
        applies: everywhere,
        one_in: 1,
        run: gates_flip_between_steps,
    },
    Property {
        name: "decode_never_sees_what_it_should_not",
        claim: "a NaN key or value reaches exactly the rows that see it, and an invalid route those of its own",
        applies: everywhere,
        one_in: 1,
        run: decode_never_sees_what_it_should_not,
    },
];

/// A decode step: a [`Case`] whose key length is that of the longest sequence, and what goes beyond it.
#[derive(Clone, Debug)]
struct StepCase {
    case: Case,
    lengths: Vec<usize>,
    /// One per route; `None` sees nothing.
    reaches: Vec<Option<Reach>>,
    /// Where there is more than one reach.
    routing: Routing,
    /// Pages of so many tokens, or contiguous.
    page_size: Option<usize>,
    chunk: Option<usize>,
}

fn step_cases(device: &Device) -> impl Strategy<Value = StepCase> + use<> {
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
                // Weights stay as they are.
                tensor_cores: false,
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
    fn layout(&self) -> bifocal::Result<Layout> {
        let (sequences, capacity) = (self.lengths.len(), self.case.key_len + 3);
        match self.page_size {
            Some(page_size) => {
                let pages = sequences * capacity.div_ceil(page_size);
                Layout::paged(sequences, capacity, page_size, pages)
            }
            None => Layout::contiguous(sequences, capacity),
        }
    }

    fn routed(&self) -> bool {
        self.reaches.len() > 1
    }
}

/// Keys and values of one sequence, rounded: `[Hk, T, D]` and `[Hk, T, Dv]`.
#[derive(Clone)]
struct Tokens {
    key: Array<f32, 3>,
    value: Array<f32, 3>,
}

impl Tokens {
    fn draw(case: &Case, tokens: usize, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut draw = |dim| {
            Array::from_fn([case.kv_heads, tokens, dim], |_| {
                round(case.element, rng.random_range(-1.7f32..1.7))
            })
        };
        Self { key: draw(case.head_dim), value: draw(case.value_dim) }
    }

    fn part(&self, from: usize, to: usize) -> Self {
        let part = |array: &Array<f32, 3>| {
            let [heads, _, dim] = array.shape();
            Array::from_fn([heads, to - from, dim], |[h, t, d]| array[[h, from + t, d]])
        };
        Self { key: part(&self.key), value: part(&self.value) }
    }

    fn len(&self) -> usize {
        self.key.shape()[1]
    }

    /// `[1, Hk, T, D]` and `[1, Hk, T, Dv]`.
    fn upload(&self, client: &Client, element: Element) -> bifocal::Result<[Tensor<4>; 2]> {
        let upload = |array: &Array<f32, 3>| {
            let [heads, tokens, dim] = array.shape();
            Tensor::from_f32(client, [1, heads, tokens, dim], element, array.as_slice())
        };
        Ok([upload(&self.key)?, upload(&self.value)?])
    }
}

fn shape_of(case: &Case) -> KvShape {
    KvShape {
        kv_heads: case.kv_heads,
        head_dim: case.head_dim,
        value_dim: case.value_dim,
        element: case.element,
    }
}

/// A cache that holds the sequences of a case, and queries for a step.
struct Scene {
    cache: KvCache,
    sequences: Vec<SequenceId>,
    tokens: Vec<Tokens>,
    query: Vec<f32>,
    sinks: Option<Vec<f32>>,
}

impl Scene {
    fn new(client: &Client, step: &StepCase, layout: Layout) -> bifocal::Result<Self> {
        let case = &step.case;
        let seeds = (0..).map(|b| case.seed ^ (b << 32));
        let tokens: Vec<Tokens> =
            step.lengths.iter().zip(seeds).map(|(&t, s)| Tokens::draw(case, t, s)).collect();
        let data = Data::new(&Case { key_len: 1, ..case.clone() });
        Self::with_tokens(client, step, layout, tokens, data)
    }

    /// Appends each sequence in up to three parts, one token alone among them.
    fn with_tokens(
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
    fn attend(
        &self,
        client: &Client,
        step: &StepCase,
        plan: &DecodePlan,
        routes: Option<&Routes>,
    ) -> bifocal::Result<Read> {
        self.attend_some(client, step, plan, routes, &self.sequences, &self.query)
    }

    /// One step of some of the sequences, with their queries.
    fn attend_some(
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
    fn expected(&self, step: &StepCase, reach_of: impl Fn(usize, usize, usize) -> Option<Reach>) -> Expected {
        let case = &step.case;
        let exact = self.oracle::<f64>(step, &reach_of);
        let plain = self.oracle::<f32>(step, &reach_of);
        let values: Vec<f32> =
            self.tokens.iter().flat_map(|tokens| tokens.value.as_slice().to_vec()).collect();
        Expected::of(case, &values, exact, &plain)
    }

    fn oracle<F: num_traits::Float>(
        &self,
        step: &StepCase,
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
            round_weight: |weight| weight,
        };
        let shape = [case.batch, case.heads(), case.query_len, case.head_dim];
        model.attend(&sequences, &array(shape, &self.query), &options, reach_of)
    }
}

/// The plan of a case over a cache of this layout, for a batch of so many sequences.
fn plan_of(client: &Client, step: &StepCase, layout: Layout, batch: usize) -> bifocal::Result<DecodePlan> {
    let mut problem: Problem = step.case.problem();
    (problem.batch, problem.key_len) = (batch, layout.tokens_kept());
    match step.chunk {
        Some(keys) => DecodePlan::in_chunks(client, &problem, keys),
        None => DecodePlan::new(client, &problem),
    }
}

/// Routes of a step, and the reach that each row gets by them.
fn routes_of(step: &StepCase, seed: u64) -> HostRoutes {
    let case = Case { seed: step.case.seed ^ seed, ..step.case.clone() };
    HostRoutes::new(&case, &step.routing, step.reaches.len())
}

fn reach_by<'a>(
    step: &'a StepCase,
    routes: &'a HostRoutes,
) -> impl Fn(usize, usize, usize) -> Option<Reach> + 'a {
    move |b, h, t| match step.routed() {
        true => step.reaches.get(usize::from(routes.at(step.case.heads(), b, h, t))).copied().flatten(),
        false => step.reaches[0],
    }
}

fn decode_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    refute(effort, step_cases(device), |step| {
        let layout = run(step.layout())?;
        let scene = run(Scene::new(client, &step, layout))?;
        let plan = run(plan_of(client, &step, layout, step.case.batch))?;
        let routes = routes_of(&step, 0);
        let uploaded = run(routes.upload(client))?;
        let given = step.routed().then_some(&uploaded);
        let read = run(scene.attend(client, &step, &plan, given))?;
        scene.expected(&step, reach_by(&step, &routes)).accepts(&read)
    })
}

fn decode_is_the_end_of_prefill(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    let strategy = (step_cases(device), causal_reaches(), 1..150usize);
    refute(effort, strategy, |(step, reach, length)| {
        // All sequences of one length, so that prefill takes them as one batch.
        let lengths = vec![length; step.lengths.len()];
        let case = Case { key_len: length, sink_logits: false, ..step.case.clone() };
        let step = StepCase { case, lengths, reaches: vec![Some(reach)], ..step };
        let (case, layout) = (&step.case, run(step.layout())?);
        let scene = run(Scene::new(client, &step, layout))?;
        let read = {
            let plan = run(plan_of(client, &step, layout, case.batch))?;
            run(scene.attend(client, &step, &plan, None))?
        };
        let expected = scene.expected(&step, |_, _, _| Some(reach));
        expected.accepts(&read)?;

        // What prefill reads is what the cache gives back.
        for (b, &sequence) in scene.sequences.iter().enumerate() {
            let (key, value) = run(scene.cache.gather(client, sequence))?;
            let shape = [1, case.heads(), case.query_len, case.head_dim];
            let rows = case.heads() * case.query_len;
            let query = &scene.query[b * rows * case.head_dim..][..rows * case.head_dim];
            let query = run(Tensor::from_f32(client, shape, case.element, query))?;
            let inputs = bifocal::Inputs::new(query.view(), key.view(), value.view());
            // The routine that rounds as the oracle does.
            let mut problem = case.problem().with_routine(Routine::Portable);
            problem.batch = 1;
            let partial = run(Partial::poisoned(client, &problem, case.out_element()))?;
            run(operator(reach).attend(client, &problem, &inputs, Rows::All, &partial))?;
            let prefill = run(Read::new(client, &partial))?;
            let last = Read {
                out: read.out[b * rows * case.value_dim..][..rows * case.value_dim].to_vec(),
                lse: read.lse[b * rows..][..rows].to_vec(),
            };
            agree(&prefill, &last, 2.0 * expected.tolerance())?;
        }
        Ok(())
    })
}

fn layouts_agree_bit_for_bit(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    let strategy = (step_cases(device), select(vec![1, 3, 16, 100, 256]), 1..30usize, 0..4u32);
    refute(effort, strategy, |(step, page_size, window, sinks)| {
        let routes = routes_of(&step, 0);
        let uploaded = run(routes.upload(client))?;
        let attend = |step: &StepCase, layout: Layout| -> bifocal::Result<Read> {
            let scene = Scene::new(client, step, layout)?;
            // The same chunks in each, whatever a layout keeps.
            let step = StepCase { chunk: Some(step.chunk.unwrap_or(64)), ..step.clone() };
            let plan = plan_of(client, &step, layout, step.case.batch)?;
            scene.attend(client, &step, &plan, step.routed().then_some(&uploaded))
        };
        let contiguous = run(StepCase { page_size: None, ..step.clone() }.layout())?;
        let paged = run(StepCase { page_size: Some(page_size), ..step.clone() }.layout())?;
        let whole = run(attend(&step, contiguous))?;
        if !run(attend(&step, paged))?.same_bits(&whole) {
            return Err(format!("pages of {page_size} differ from a contiguous cache"));
        }

        let window = run(Window::new(window))?;
        let near = [Some(Reach::Window(window)), Some(Reach::SinksAndWindow { sinks, window })];
        let reaches = step.reaches.iter().zip(near.into_iter().cycle()).map(|(_, near)| near).collect();
        let step = StepCase { reaches, ..step };
        let slack = step.case.query_len - 1;
        let ring = run(Layout::ring(step.lengths.len(), window, slack, page_size.min(32))
            .and_then(|ring| ring.with_sinks(sinks as usize)))?;
        let whole = run(attend(&step, contiguous))?;
        match run(attend(&step, ring))?.same_bits(&whole) {
            true => Ok(()),
            false => Err("a ring differs from a contiguous cache".into()),
        }
    })
}

fn neighbours_do_not_matter(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    refute(effort, step_cases(device), |step| {
        let step = StepCase { chunk: Some(step.chunk.unwrap_or(64)), ..step };
        let (case, layout) = (&step.case, run(step.layout())?);
        let scene = run(Scene::new(client, &step, layout))?;
        let routes = routes_of(&step, 0);
        let uploaded = run(routes.upload(client))?;
        let plan = run(plan_of(client, &step, layout, case.batch))?;
        let together = run(scene.attend(client, &step, &plan, step.routed().then_some(&uploaded)))?;
        let alone = run(plan_of(client, &step, layout, 1))?;
        for b in 0..case.batch {
            let part = |values: &[f32]| {
                let size = values.len() / case.batch;
                values[b * size..][..size].to_vec()
            };
            let geometry =
                run(RouteGeometry::new(1, routes.geometry.heads, case.query_len, step.reaches.len()))?;
            let size = geometry.len();
            let own = run(Routes::from_host(client, geometry, &routes.routes[b * size..][..size]))?;
            let given = step.routed().then_some(&own);
            let sequence = &scene.sequences[b..=b];
            let read = run(scene.attend_some(client, &step, &alone, given, sequence, &part(&scene.query)))?;
            if !read.same_bits(&Read { out: part(&together.out), lse: part(&together.lse) }) {
                return Err(format!("sequence {b} of {} differs alone", case.batch));
            }
        }
        Ok(())
    })
}

fn gates_flip_between_steps(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    refute(effort, step_cases(device).prop_filter("routes", StepCase::routed), |step| {
        let (case, layout) = (&step.case, run(step.layout())?);
        let mut scene = run(Scene::new(client, &step, layout))?;
        let plan = run(plan_of(client, &step, layout, case.batch))?;
        let first = routes_of(&step, 0);
        let uploaded = run(first.upload(client))?;
        for turn in 0..3u64 {
            let routes = routes_of(&step, turn);
            // Into the buffer that the first step read, as a captured graph would find it.
            run(overwrite(client, &uploaded, &routes.padded()))?;
            let read = run(scene.attend(client, &step, &plan, Some(&uploaded)))?;
            let expected = scene.expected(&step, reach_by(&step, &routes));
            expected.accepts(&read).map_err(|reason| format!("turn {turn}: {reason}"))?;
            for (b, &sequence) in scene.sequences.iter().enumerate() {
                let more = Tokens::draw(case, 1, case.seed ^ (turn << 16) ^ b as u64);
                let [key, value] = run(more.upload(client, case.element))?;
                run(scene.cache.append(client, &[sequence], key.view(), value.view()))?;
                scene.tokens[b] = joined(&scene.tokens[b], &more);
            }
        }
        Ok(())
    })
}

/// Writes other routes into the buffer of some.
fn overwrite(client: &Client, routes: &Routes, padded: &[u8]) -> bifocal::Result<()> {
    let read = client.read_one(routes.handle().clone());
    let mut bytes = read.map_err(|error| bifocal::Error::Runtime(error.to_string()))?;
    bytes.copy_from_slice(padded);
    client.write(routes.handle(), bytes);
    Ok(())
}

fn joined(first: &Tokens, second: &Tokens) -> Tokens {
    let join = |a: &Array<f32, 3>, b: &Array<f32, 3>| {
        let [heads, before, dim] = a.shape();
        Array::from_fn([heads, before + b.shape()[1], dim], |[h, t, d]| match t < before {
            true => a[[h, t, d]],
            false => b[[h, t - before, d]],
        })
    };
    Tokens { key: join(&first.key, &second.key), value: join(&first.value, &second.value) }
}

fn decode_never_sees_what_it_should_not(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    let strategy = (step_cases(device), any::<prop::sample::Index>(), any::<bool>());
    refute(effort, strategy, |(step, at, in_key)| {
        let (case, layout) = (&step.case, run(step.layout())?);
        let tokens: Vec<Tokens> = step
            .lengths
            .iter()
            .map(|&length| {
                let mut tokens = Tokens::draw(case, length, case.seed);
                let at = at.index(length);
                let array = if in_key { &mut tokens.key } else { &mut tokens.value };
                for head in 0..case.kv_heads {
                    array.row_mut([head, at]).fill(f32::NAN);
                }
                tokens
            })
            .collect();
        let data = Data::new(&Case { key_len: 1, ..case.clone() });
        let scene = run(Scene::with_tokens(client, &step, layout, tokens, data))?;
        let plan = run(plan_of(client, &step, layout, case.batch))?;
        let mut routes = routes_of(&step, 0);
        let spoilt = at.index(routes.routes.len());
        routes.routes[spoilt] = INVALID_ROUTE;
        let uploaded = run(routes.upload_unchecked(client))?;
        let read = run(scene.attend(client, &step, &plan, step.routed().then_some(&uploaded)))?;
        let expected = scene.expected(&step, reach_by(&step, &routes));
        for (at, (&x, &y)) in expected.exact.out.as_slice().iter().zip(&read.out).enumerate() {
            let row = at / case.value_dim;
            let (b, h, t) = (
                row / case.query_len / case.heads(),
                row / case.query_len % case.heads(),
                row % case.query_len,
            );
            let invalid = step.routed() && routes.at(case.heads(), b, h, t) == INVALID_ROUTE;
            if (x.is_nan() || invalid) != y.is_nan() {
                return Err(format!("output {at} is {y}, expected {x}, invalid: {invalid}"));
            }
        }
        Ok(())
    })
}

/// What is done to a cache.
#[derive(Clone, Debug)]
enum Operation {
    Start,
    Append { sequences: Vec<prop::sample::Index>, tokens: usize },
    Fork(prop::sample::Index),
    Truncate(prop::sample::Index, prop::sample::Index),
    Free(prop::sample::Index),
    SaveAndRestore(prop::sample::Index),
    Read(prop::sample::Index),
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let index = any::<prop::sample::Index>;
    let tokens = prop_oneof![4 => Just(1usize), 2 => 2..9usize, 1 => 20..60usize];
    let operation = prop_oneof![
        3 => Just(Operation::Start),
        8 => (prop::collection::vec(index(), 1..4), tokens)
            .prop_map(|(sequences, tokens)| Operation::Append { sequences, tokens }),
        3 => index().prop_map(Operation::Fork),
        2 => (index(), index()).prop_map(|(at, length)| Operation::Truncate(at, length)),
        2 => index().prop_map(Operation::Free),
        1 => index().prop_map(Operation::SaveAndRestore),
        2 => index().prop_map(Operation::Read),
    ];
    prop::collection::vec(operation, 1..80)
}

/// A cache beside its model, and the sequences that both have.
struct Soak {
    cache: KvCache,
    model: KvModel<f32>,
    live: Vec<(SequenceId, usize)>,
    case: Case,
    layout: Layout,
}

impl Soak {
    /// Does the same to both; the cache refuses what it has no room for, and the model is left alone then.
    fn apply(&mut self, client: &Client, operation: &Operation, seed: u64) -> Result<(), String> {
        let before = self.cache.free_pages();
        let refused = match operation {
            Operation::Start => match self.cache.start(client) {
                Ok(sequence) => {
                    self.live.push((sequence, self.model.start()));
                    None
                }
                Err(error) => Some((error, self.live.len() == self.layout.sequences())),
            },
            _ if self.live.is_empty() => None,
            Operation::Append { sequences, tokens } => self.append(client, sequences, *tokens, seed)?,
            Operation::Fork(at) => {
                let (sequence, of_model) = *at.get(&self.live);
                match self.cache.fork(client, sequence) {
                    Ok(fork) => {
                        self.live.push((fork, self.model.fork(of_model)));
                        None
                    }
                    Err(error) => Some((error, self.live.len() == self.layout.sequences())),
                }
            }
            Operation::Truncate(at, length) => {
                let (sequence, of_model) = *at.get(&self.live);
                let length = length.index(self.model.length(of_model) + 1);
                run(self.cache.truncate(client, sequence, length))?;
                self.model.truncate(of_model, length);
                None
            }
            Operation::Free(at) => {
                let (sequence, of_model) = self.live.swap_remove(at.index(self.live.len()));
                run(self.cache.free(sequence))?;
                self.model.free(of_model);
                if self.cache.length(sequence).is_ok() || self.cache.free(sequence).is_ok() {
                    return Err("a freed sequence is still known".into());
                }
                None
            }
            Operation::SaveAndRestore(at) => {
                let (sequence, of_model) = *at.get(&self.live);
                if self.model.length(of_model) == 0 {
                    return Ok(());
                }
                let snapshot = run(self.cache.save(client, sequence))?;
                let snapshot = run(Snapshot::from_bytes(&snapshot.to_bytes()))?;
                match self.cache.restore(client, &snapshot) {
                    Ok(restored) => {
                        let copy = self.model.start();
                        let [key, value] = self.model.contents(of_model);
                        let [_, heads, tokens, dim] = key.shape();
                        let value_dim = value.shape()[3];
                        let (key, value) =
                            (key.reshape([heads, tokens, dim]), value.reshape([heads, tokens, value_dim]));
                        self.model.append(copy, &key, &value);
                        self.live.push((restored, copy));
                        None
                    }
                    Err(error) => {
                        let pages = snapshot.tokens().div_ceil(self.layout.page_size());
                        let full = self.live.len() == self.layout.sequences() || pages > before;
                        Some((error, full))
                    }
                }
            }
            Operation::Read(at) => {
                let (sequence, of_model) = *at.get(&self.live);
                self.compare(client, sequence, of_model)?;
                None
            }
        };
        if let Some((error, expected)) = refused
            && (!expected || self.cache.free_pages() != before)
        {
            return Err(format!("{operation:?} was refused: {error}"));
        }
        let (free, used) = (self.cache.free_pages(), self.model.pages());
        if free + used != self.layout.pages() {
            return Err(format!("{free} pages free where the model holds {used}, after {operation:?}"));
        }
        Ok(())
    }

    /// Appends the same tokens to several sequences. Returns a refusal, and whether one was to be expected.
    fn append(
        &mut self,
        client: &Client,
        sequences: &[prop::sample::Index],
        tokens: usize,
        seed: u64,
    ) -> Result<Option<(bifocal::Error, bool)>, String> {
        let mut chosen: Vec<usize> = sequences.iter().map(|at| at.index(self.live.len())).collect();
        chosen.sort_unstable();
        chosen.dedup();
        let case = &self.case;
        let drawn: Vec<Tokens> =
            (0..chosen.len() as u64).map(|b| Tokens::draw(case, tokens, seed ^ (b << 40))).collect();
        // Tokens before heads in memory, as projections give them.
        let upload = |dim: usize, of: fn(&Tokens) -> &Array<f32, 3>| {
            let mut values = Vec::new();
            for one in &drawn {
                for (t, h) in (0..tokens).flat_map(|t| (0..case.kv_heads).map(move |h| (t, h))) {
                    values.extend_from_slice(of(one).row([h, t]));
                }
            }
            let shape = [chosen.len(), case.kv_heads, tokens, dim];
            let strides = [tokens * case.kv_heads * dim, dim, case.kv_heads * dim, 1];
            let tensor = Tensor::from_f32(client, [values.len()], case.element, &values)?;
            Ok(Tensor::new(tensor.into_handle(), case.element, shape, strides))
        };
        let key = run(upload(case.head_dim, |tokens| &tokens.key))?;
        let value = run(upload(case.value_dim, |tokens| &tokens.value))?;
        let ids: Vec<SequenceId> = chosen.iter().map(|&at| self.live[at].0).collect();
        let appended = self.cache.append(client, &ids, key.view(), value.view());
        let capacity = self.layout.tokens_kept();
        let too_long = chosen.iter().any(|&at| self.model.length(self.live[at].1) + tokens > capacity);
        let mut after = self.model.clone();
        if !too_long {
            for (&at, tokens) in chosen.iter().zip(&drawn) {
                after.append(self.live[at].1, &tokens.key, &tokens.value);
            }
        }
        let full = after.pages() > self.layout.pages();
        Ok(match appended {
            Ok(()) if too_long || full => return Err("an append that there is no room for".into()),
            Ok(()) => {
                self.model = after;
                None
            }
            Err(error) => Some((error, too_long || full)),
        })
    }

    fn compare(&self, client: &Client, sequence: SequenceId, of_model: usize) -> Result<(), String> {
        let length = run(self.cache.length(sequence))?;
        if length != self.model.length(of_model) {
            return Err(format!("{length} tokens, expected {}", self.model.length(of_model)));
        }
        if length == 0 {
            return Ok(());
        }
        let (key, value) = run(self.cache.gather(client, sequence))?;
        let [expected_key, expected_value] = self.model.contents(of_model);
        for (name, found, expected) in [("key", key, expected_key), ("value", value, expected_value)] {
            if run(found.to_f32(client))? != expected.as_slice() {
                return Err(format!("a {name} of {sequence:?} is not what was appended"));
            }
        }
        Ok(())
    }
}

fn caches_equal_their_model(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    let page_size = prop_oneof![Just(None), select(vec![1, 3, 16]).prop_map(Some)];
    refute(effort, (cases(&device.profile), page_size, operations()), |(case, page_size, operations)| {
        let (sequences, capacity) = (5, 90);
        let layout = run(match page_size {
            // Fewer pages than all sequences could fill.
            Some(page_size) => Layout::paged(sequences, capacity, page_size, 200usize.div_ceil(page_size)),
            None => Layout::contiguous(sequences, capacity),
        })?;
        let shape = shape_of(&case);
        let model = KvModel::new([case.kv_heads, case.head_dim, case.value_dim], layout.page_size());
        let cache = run(KvCache::new(client, shape, layout))?;
        let mut soak = Soak { cache, model, live: Vec::new(), case: case.clone(), layout };
        for (number, operation) in operations.iter().enumerate() {
            soak.apply(client, operation, case.seed ^ number as u64)?;
        }
        for &(sequence, of_model) in &soak.live {
            soak.compare(client, sequence, of_model)?;
        }
        soak.cache.clear();
        match soak.cache.free_pages() == layout.pages() && soak.cache.free_sequences() == sequences {
            true => Ok(()),
            false => Err("a cache that was cleared still holds pages".into()),
        }
    })
}
