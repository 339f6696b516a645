//! What is drawn: the shapes that hurt, reaches, routes.

use std::ops::Range;

use bifocal::{DeviceProfile, Element, Problem, Reach, Routine, Window};
use proptest::{prelude::*, sample::select};

use crate::inputs::round;

/// An attention problem with a seed for its data.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) batch: usize,
    pub(crate) kv_heads: usize,
    pub(crate) group: usize,
    pub(crate) query_len: usize,
    pub(crate) key_len: usize,
    /// The sequences that are packed into the batch, if they are.
    pub(crate) packed: Option<Packed>,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) element: Element,
    /// Whether outputs are f32 whatever the inputs.
    pub(crate) out_f32: bool,
    pub(crate) softcap: bool,
    pub(crate) sink_logits: bool,
    /// The routine that is asked for, if any.
    pub(crate) routine: Option<Routine>,
    /// Whether the device has routines on tensor cores.
    pub(crate) tensor_cores: bool,
    /// Standard deviation of queries: large ones make softmax nearly one-hot.
    pub(crate) magnitude: f32,
    pub(crate) seed: u64,
}

/// Cumulative lengths of packed sequences.
#[derive(Clone, Debug)]
pub(crate) struct Packed {
    pub(crate) queries: Vec<usize>,
    pub(crate) keys: Vec<usize>,
}

impl Packed {
    fn new(lengths: &[(usize, usize)]) -> Self {
        let ends = |length: fn(&(usize, usize)) -> usize| {
            let mut end = 0;
            let ends = lengths.iter().map(|pair| {
                end += length(pair);
                end
            });
            [0].into_iter().chain(ends).collect()
        };
        Self { queries: ends(|&(queries, _)| queries), keys: ends(|&(_, keys)| keys) }
    }

    /// Which queries and which keys each sequence has.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let range = |pair: &[usize]| pair[0]..pair[1];
        self.queries.windows(2).zip(self.keys.windows(2)).map(move |(q, k)| (range(q), range(k)))
    }
}

impl Case {
    pub(crate) fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    pub(crate) fn problem(&self) -> Problem {
        let query = [self.batch, self.heads(), self.query_len, self.head_dim];
        let key = [self.batch, self.kv_heads, self.key_len, self.head_dim];
        let problem = Problem::new(query, key, self.element)
            .and_then(|problem| problem.with_value_dim(self.value_dim))
            .expect("drawn shapes are possible");
        let problem = match self.routine {
            Some(routine) => problem.with_routine(routine),
            None => problem,
        };
        if self.softcap { problem.with_softcap(3.0).expect("3 is a softcap") } else { problem }
    }

    /// Whether the product with values may take weights rounded to the inputs' type, as it does on tensor cores.
    pub(crate) fn may_round_weights(&self) -> bool {
        self.tensor_cores && self.element != Element::F32 && self.routine != Some(Routine::Portable)
    }

    /// What a plain computation does to weights before they meet their values.
    pub(crate) fn round_weight(&self) -> fn(f32) -> f32 {
        match self.element {
            Element::F16 if self.may_round_weights() => |weight| round(Element::F16, weight),
            Element::Bf16 if self.may_round_weights() => |weight| round(Element::Bf16, weight),
            _ => |weight| weight,
        }
    }

    pub(crate) fn out_element(&self) -> Element {
        if self.out_f32 { Element::F32 } else { self.element }
    }
}

/// Cases of the sizes that hurt: length 1, lengths around multiples of tiles and chunks, more queries than keys and
/// the reverse, every ratio of heads, head dims that are no power of two.
pub(crate) fn cases(profile: &DeviceProfile) -> impl Strategy<Value = Case> + use<> {
    // Tiles of tensor cores are larger than those of units.
    let tensor_cores = profile.cuda_arch.is_some();
    let large = if tensor_cores { 3 } else { 0 };
    let lengths = prop_oneof![
        1 => Just(1usize),
        1 => 2..20usize,
        1 => 30..36usize,
        1 => 60..100usize,
        large => prop_oneof![120..140usize, 250..300usize],
    ];
    // Some shader compilers take a time that grows with the square of the head dim: wide heads are rare where
    // shaders are compiled, and have a property of their own.
    let shaders = profile.runtime.contains("wgpu");
    let wide = if shaders { 1 } else { 16 };
    let dims = prop_oneof![
        32 => select(if tensor_cores { vec![33, 64, 64, 128, 128] } else { vec![32usize, 33, 64, 80] }),
        wide => select(if shaders { vec![96, 128] } else { vec![96, 128, 256] }),
    ];
    let elements = select(profile.elements.clone());
    let shape = (1..3usize, 1..4usize, 1..5usize, lengths.clone(), lengths, 0..4u8);
    let numbers = (dims, any::<bool>(), elements, any::<bool>());
    let magnitudes = select(vec![1.0f32, 1.0, 1.0, 30.0, 3000.0]);
    let options = (0..4u8, 0..4u8, 0..4u8, magnitudes, any::<u64>());
    let profile = profile.clone();
    (shape, numbers, options).prop_map(move |(shape, numbers, options)| {
        let (batch, kv_heads, group, query_len, other_len, lengths) = shape;
        let (head_dim, same_dim, element, out_f32) = numbers;
        let (softcap, sink_logits, routine, magnitude, seed) = options;
        // Mostly self-attention; sometimes a longer or a shorter past.
        let key_len = match lengths {
            0 => query_len + other_len,
            1 => other_len,
            _ => query_len,
        };
        let case = Case {
            batch,
            kv_heads,
            group,
            query_len,
            key_len,
            packed: None,
            head_dim,
            value_dim: if same_dim { head_dim } else { 64 },
            element,
            out_f32,
            softcap: softcap == 0,
            sink_logits: sink_logits == 0,
            routine: (routine == 0).then_some(Routine::Portable),
            tensor_cores,
            magnitude,
            seed,
        };
        // On Hopper nothing is computed by `mma` unless it is asked for.
        let by_mma = Case { routine: Some(Routine::Mma), ..case.clone() };
        let runs = bifocal_tile::supports(Routine::Mma, &by_mma.problem(), &profile).is_ok();
        if routine == 1 && runs { by_mma } else { case }
    })
}

/// Cases whose batch is made of packed sequences: as many keys as queries, more, fewer, none of either.
pub(crate) fn packed_cases(profile: &DeviceProfile) -> impl Strategy<Value = Case> + use<> {
    let large = if profile.cuda_arch.is_some() { 2 } else { 0 };
    let length = prop_oneof![
        2 => Just(0usize),
        2 => Just(1usize),
        4 => 2..20usize,
        2 => 30..36usize,
        1 => 60..100usize,
        large => 120..300usize,
    ];
    let sequence = (length.clone(), length, 0..4u8).prop_map(|(queries, other, kind)| match kind {
        0 => (queries, queries + other),
        1 => (queries, other),
        _ => (queries, queries),
    });
    let sequences = prop::collection::vec(sequence, 1..8);
    (cases(profile), sequences).prop_map(|(case, mut lengths)| {
        // A problem has a query and a key.
        if lengths.iter().all(|&(queries, _)| queries == 0) || lengths.iter().all(|&(_, keys)| keys == 0) {
            lengths.push((1, 1));
        }
        let packed = Packed::new(&lengths);
        let (query_len, key_len) = (packed.queries[lengths.len()], packed.keys[lengths.len()]);
        Case { batch: 1, query_len, key_len, packed: Some(packed), ..case }
    })
}

/// Cases for backward passes: as drawn, but for what a device would refuse or compile for long.
pub(crate) fn backward_cases(profile: &DeviceProfile) -> impl Strategy<Value = Case> + use<> {
    let profile = profile.clone();
    cases(&profile).prop_map(move |case| for_backward(case, &profile))
}

/// [`packed_cases`] for backward passes.
pub(crate) fn packed_backward_cases(profile: &DeviceProfile) -> impl Strategy<Value = Case> + use<> {
    let profile = profile.clone();
    packed_cases(&profile).prop_map(move |case| for_backward(case, &profile))
}

fn for_backward(mut case: Case, profile: &DeviceProfile) -> Case {
    let runs = |routine| bifocal_tile::supports_backward(routine, &case.problem(), profile).is_ok();
    if case.routine.is_some_and(|routine| !runs(routine)) {
        case.routine = None;
    }
    if case.routine == Some(Routine::Mma) {
        // It takes the outputs' gradient in the type of the inputs alone.
        case.out_f32 = false;
    }
    if profile.runtime.contains("wgpu") {
        // A backward pass is three kernels or more, and shaders are compiled for seconds: few different ones.
        (case.head_dim, case.value_dim) = (32, 32);
    }
    case
}

/// Windows from one key to more than there are.
pub(crate) fn windows() -> impl Strategy<Value = Window> {
    prop_oneof![Just(1usize), 2..8usize, 8..40usize, 90..110usize, Just(4096)]
        .prop_map(|n| Window::new(n).expect("at least one key"))
}

/// Every kind of reach.
pub(crate) fn reaches() -> impl Strategy<Value = Reach> {
    prop_oneof![8 => causal_reaches(), 1 => Just(Reach::NonCausal)]
}

/// Every kind of reach that depends on the query's position.
pub(crate) fn causal_reaches() -> impl Strategy<Value = Reach> {
    let sinks = prop_oneof![Just(0u32), 1..6u32, 20..120u32];
    prop_oneof![
        3 => windows().prop_map(Reach::Window),
        2 => (sinks.clone(), windows()).prop_map(|(sinks, window)| Reach::SinksAndWindow { sinks, window }),
        2 => (sinks, windows()).prop_map(|(sinks, window)| Reach::Far { sinks, window }),
        1 => Just(Reach::All),
    ]
}

/// Which heads a router has.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RouterHeads {
    Token,
    KvHead,
    Head,
}

impl RouterHeads {
    pub(crate) fn count(self, case: &Case) -> usize {
        match self {
            RouterHeads::Token => 1,
            RouterHeads::KvHead => case.kv_heads,
            RouterHeads::Head => case.heads(),
        }
    }
}

/// How routes are spread: all near, all far, one far, or a share of them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Spread {
    AllNear,
    AllFar,
    OneFar,
    Share(f64),
}

/// A router's geometry and how it decides.
#[derive(Clone, Debug)]
pub(crate) struct Routing {
    pub(crate) heads: RouterHeads,
    pub(crate) spread: Spread,
}

pub(crate) fn routings() -> impl Strategy<Value = Routing> {
    let heads = select(vec![RouterHeads::Token, RouterHeads::KvHead, RouterHeads::Head]);
    let spread = prop_oneof![
        1 => Just(Spread::AllNear),
        1 => Just(Spread::AllFar),
        1 => Just(Spread::OneFar),
        5 => (0.02..0.98f64).prop_map(Spread::Share),
    ];
    (heads, spread).prop_map(|(heads, spread)| Routing { heads, spread })
}
