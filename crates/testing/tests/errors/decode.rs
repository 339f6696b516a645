//! Caches and decode steps.

use bifocal::{
    Element, Error, LinearAttention, Partial, Reach, RouteGeometry, Routes, Routine, Tensor, Window,
    cubecl::client::Client,
    decode::{
        DecodePlan, KvCache, KvShape, Layout, LinearCache, NewTokens, PageTables, Reaches, SequenceId, Step,
    },
};

use crate::{cpu, tensor};

/// A cache of two sequences of up to 12 tokens, in 5 pages of 4.
fn small_cache(client: &Client) -> KvCache {
    let layout = Layout::paged(2, 12, 4, 5).expect("a possible layout");
    KvCache::new(client, kv_shape(), layout).expect("room for a small cache")
}

fn kv_shape() -> KvShape {
    KvShape { kv_heads: 1, head_dim: 32, value_dim: 32, element: Element::F32 }
}

#[test]
fn caches_that_make_no_sense() {
    let client = cpu();
    let layout = Layout::contiguous(1, 8).expect("a possible layout");
    for shape in [KvShape { kv_heads: 0, ..kv_shape() }, KvShape { value_dim: 0, ..kv_shape() }] {
        assert!(matches!(KvCache::new(&client, shape, layout), Err(Error::EmptyDimension { .. })));
    }
    let bytes = KvShape { element: Element::U8, ..kv_shape() };
    assert!(matches!(KvCache::new(&client, bytes, layout), Err(Error::Element { .. })));
    let huge = Layout::contiguous(1 << 10, 1 << 20).expect("a possible layout");
    assert!(matches!(KvCache::new(&client, kv_shape(), huge), Err(Error::TooLarge { .. })));
}

#[test]
fn tokens_that_a_cache_does_not_take() {
    let client = cpu();
    let mut cache = small_cache(&client);
    let first = cache.start(&client).expect("room for a sequence");
    let second = cache.start(&client).expect("room for a sequence");
    assert_eq!(cache.start(&client), Err(Error::CacheFull { what: "sequences", needed: 1, free: 0 }));
    let numbers = tensor(&client, [2, 2, 9, 32]);
    let mut append = |ids: &[SequenceId], shape: [usize; 4]| {
        let [_, heads, tokens, dim] = shape;
        let strides = [heads * tokens * dim, tokens * dim, dim, 1];
        let tokens = numbers.view().reinterpret(shape, strides);
        let error = cache.append(&client, ids, tokens, tokens);
        (error, cache.free_pages(), cache.length(first).expect("a live sequence"))
    };
    let (done, free, length) = append(&[first], [1, 1, 9, 32]);
    assert_eq!((done, free, length), (Ok(()), 2, 9));
    let full = Error::CacheFull { what: "pages", needed: 3, free: 2 };
    assert_eq!(append(&[second], [1, 1, 9, 32]), (Err(full), 2, 9));
    let cases: [(&[SequenceId], [usize; 4], &str); 6] = [
        (&[first], [1, 1, 4, 32], "13 tokens in a sequence of the cache, expected at most 12"),
        (&[first], [1, 1, 0, 32], "tokens to append is 0, expected at least 1"),
        (&[], [0, 1, 1, 32], "batch is 0, expected at least 1"),
        (&[first], [1, 2, 1, 32], "key has shape [1, 2, 1, 32], expected [1, 1, 1, 32]"),
        (&[first], [2, 1, 1, 32], "key has shape [2, 1, 1, 32], expected [1, 1, 1, 32]"),
        (
            &[first, first],
            [2, 1, 1, 32],
            "a batch to append to is one with a sequence twice, expected each once",
        ),
    ];
    for (ids, shape, message) in cases {
        let (error, free, length) = append(ids, shape);
        assert_eq!(error.expect_err(message).to_string(), message);
        assert_eq!((free, length), (2, 9));
    }
    let half = Tensor::filled(&client, [1, 1, 1, 32], Element::F16, 0.5).expect("f16 on the CPU");
    let error = cache.append(&client, &[first], half.view(), half.view());
    assert!(matches!(error, Err(Error::Element { tensor: "key", .. })), "{error:?}");
}

#[test]
fn sequences_of_another_cache_and_snapshots_of_another_shape() {
    let client = cpu();
    let (mut cache, mut other) = (small_cache(&client), small_cache(&client));
    let sequence = cache.start(&client).expect("room for a sequence");
    let token = tensor(&client, [1, 1, 3, 32]);
    cache.append(&client, &[sequence], token.view(), token.view()).expect("room for three tokens");
    let unknown = |error: Error| assert!(matches!(error, Error::UnknownSequence { .. }), "{error}");
    unknown(other.length(sequence).expect_err("another cache"));
    unknown(other.fork(&client, sequence).expect_err("another cache"));
    unknown(other.truncate(&client, sequence, 0).expect_err("another cache"));
    unknown(other.batch(&client, &[sequence]).expect_err("another cache"));

    let snapshot = cache.save(&client, sequence).expect("three tokens to save");
    assert!(other.restore(&client, &snapshot).is_ok());
    let wide = KvShape { kv_heads: 2, ..kv_shape() };
    let mut wide = KvCache::new(&client, wide, cache.layout()).expect("room for a small cache");
    let error = wide.restore(&client, &snapshot).expect_err("another shape");
    assert!(matches!(error, Error::Snapshot { .. }), "{error}");
    assert_eq!((wide.free_pages(), wide.free_sequences()), (5, 2));

    let batch = cache.batch(&client, &[sequence]).expect("a live sequence");
    cache.free(sequence).expect("a live sequence");
    unknown(cache.view(&batch).expect_err("a freed sequence"));
    let anew = cache.start(&client).expect("a free slot");
    let empty = cache.batch(&client, &[anew]).expect("a live sequence");
    assert!(matches!(cache.view(&empty), Err(Error::EmptyDimension { dimension: "length of a sequence" })));
    assert!(matches!(cache.gather(&client, anew), Err(Error::EmptyDimension { .. })));
    unknown(cache.length(sequence).expect_err("a freed sequence whose slot is taken"));
}

#[test]
fn page_tables_of_others_that_are_out_of_range() {
    let client = cpu();
    let tables = |tables: &[&[u32]], lengths: &[usize]| {
        PageTables::from_host(&client, [5, 4, 12], tables, lengths).map(|_| ())
    };
    assert_eq!(tables(&[&[4, 0], &[3]], &[5, 4]), Ok(()));
    let error = tables(&[&[4, 0], &[3, 5]], &[5, 6]).expect_err("page 5 of 5");
    assert_eq!(error, Error::PageOutOfRange { sequence: 1, at: 1, found: 5, pages: 5 });
    // What is beyond the length is not read.
    assert_eq!(tables(&[&[4, 9]], &[4]), Ok(()));
    assert!(matches!(tables(&[&[4]], &[5]), Err(Error::Shape { tensor: "a page table", .. })));
    assert!(matches!(tables(&[&[4]], &[0]), Err(Error::EmptyDimension { .. })));
    assert!(matches!(tables(&[&[0, 1, 2, 3]], &[13]), Err(Error::TooLarge { .. })));
    assert!(matches!(tables(&[&[0], &[1]], &[1]), Err(Error::Shape { .. })));
    assert!(matches!(tables(&[], &[]), Err(Error::EmptyDimension { .. })));
}

#[test]
fn pools_of_others_that_are_not_what_their_tables_say() {
    let client = cpu();
    let tables = PageTables::from_host(&client, [5, 4, 12], &[&[4, 0]], &[5]).expect("good tables");
    let query = tensor(&client, [1, 2, 1, 32]);
    let attend = |pool: [usize; 4]| {
        let pool = tensor(&client, pool);
        let view = tables.view(pool.view(), pool.view());
        let problem = view.problem(query.shape(), Element::F32)?;
        let (plan, reaches) = (DecodePlan::new(&client, &problem)?, Reaches::one(&client, Reach::All)?);
        let partial = Partial::empty(&client, &problem, Element::F32);
        plan.attend(&client, &view, &Step::new(query.view(), &reaches), &partial)
    };
    assert_eq!(attend([5, 1, 4, 32]), Ok(()));
    for pool in [[4, 1, 4, 32], [5, 1, 3, 32]] {
        let error = attend(pool).expect_err("another pool");
        assert!(matches!(error, Error::Shape { tensor: "the keys of the cache", .. }), "{error}");
    }
}

#[test]
fn decode_steps_that_do_not_fit() {
    let client = cpu();
    let mut cache = small_cache(&client);
    let sequence = cache.start(&client).expect("room for a sequence");
    let tokens = tensor(&client, [1, 1, 9, 32]);
    cache.append(&client, &[sequence], tokens.view(), tokens.view()).expect("room for nine tokens");
    let batch = cache.batch(&client, &[sequence]).expect("a live sequence");
    let view = cache.view(&batch).expect("a sequence with tokens");
    let problem = view.problem([1, 2, 1, 32], Element::F32).expect("a possible problem");
    assert!(matches!(view.problem([2, 2, 1, 32], Element::F32), Err(Error::Shape { tensor: "query", .. })));
    let plan = DecodePlan::new(&client, &problem).expect("room for a step");
    let partial = Partial::empty(&client, &problem, Element::F32);
    let query = tensor(&client, [1, 2, 1, 32]);
    let window = Window::new(4).expect("a window");
    let reaches = Reaches::new(&client, &[Some(Reach::Window(window)), Some(Reach::All)]).expect("reaches");
    let attend = |query: &Tensor<4>, geometry: [usize; 4]| {
        let [batch, heads, tokens, choices] = geometry;
        let geometry = RouteGeometry::new(batch, heads, tokens, choices).expect("a possible geometry");
        let routes = Routes::from_host(&client, geometry, &vec![0; geometry.len()]).expect("good routes");
        plan.attend(&client, &view, &Step::new(query.view(), &reaches).with_routes(&routes), &partial)
    };
    assert_eq!(attend(&query, [1, 2, 1, 2]), Ok(()));
    for gates in [[2, 2, 1, 2], [1, 3, 1, 2], [1, 2, 2, 2]] {
        let error = attend(&query, gates).expect_err("gates of another shape");
        assert!(matches!(error, Error::Shape { tensor: "routes", .. }), "{error}");
    }
    assert!(matches!(attend(&query, [1, 2, 1, 3]), Err(Error::Option { .. })));
    let other = tensor(&client, [1, 2, 2, 32]);
    assert!(matches!(attend(&other, [1, 2, 1, 2]), Err(Error::Shape { tensor: "query", .. })));
    // Two reaches and no routes to choose by.
    let unrouted = plan.attend(&client, &view, &Step::new(query.view(), &reaches), &partial);
    assert!(matches!(unrouted, Err(Error::Option { .. })), "{unrouted:?}");

    let long = view.problem([1, 2, 17, 32], Element::F32).expect("a possible problem");
    assert!(matches!(DecodePlan::new(&client, &long), Err(Error::Option { .. })));
    assert!(matches!(DecodePlan::in_chunks(&client, &problem, 0), Err(Error::Option { .. })));
    let by_mma = DecodePlan::new(&client, &problem.with_routine(Routine::Mma));
    assert!(matches!(by_mma, Err(Error::Refused { operator: "decode", .. })), "{by_mma:?}");
}

#[test]
fn what_a_ring_has_overwritten() {
    let client = cpu();
    let window = Window::new(4).expect("a window");
    let layout = Layout::ring(1, window, 0, 4).expect("a possible layout");
    let mut cache = KvCache::new(&client, kv_shape(), layout).expect("room for a small cache");
    let sequence = cache.start(&client).expect("room for a sequence");
    let tokens = tensor(&client, [1, 1, 9, 32]);
    cache.append(&client, &[sequence], tokens.view(), tokens.view()).expect("a ring takes any number");
    assert!(matches!(cache.gather(&client, sequence), Err(Error::Overwritten { .. })));
    assert!(matches!(cache.truncate(&client, sequence, 7), Err(Error::Overwritten { needed: 4, first: 5 })));
    let batch = cache.batch(&client, &[sequence]).expect("a live sequence");
    let view = cache.view(&batch).expect("a sequence with tokens");
    let query = tensor(&client, [1, 1, 1, 32]);
    let attend = |reach: Reach| {
        let problem = view.problem([1, 1, 1, 32], Element::F32)?;
        let reaches = Reaches::one(&client, reach)?;
        let partial = Partial::empty(&client, &problem, Element::F32);
        DecodePlan::new(&client, &problem)?.attend(
            &client,
            &view,
            &Step::new(query.view(), &reaches),
            &partial,
        )
    };
    assert_eq!(attend(Reach::Window(window)), Ok(()));
    for reach in [
        Reach::All,
        Reach::Window(Window::new(5).expect("a window")),
        Reach::SinksAndWindow { sinks: 1, window },
        Reach::Far { sinks: 0, window },
    ] {
        assert!(matches!(attend(reach), Err(Error::Overwritten { .. })), "{reach}");
    }
}

#[test]
fn graphs_on_a_runtime_without_them() {
    let client = cpu();
    let failing = bifocal::capture(&client, || Err::<(), _>(Error::EmptyWindow)).map(|(_, made)| made);
    assert_eq!(failing, Err(Error::EmptyWindow));
    let refused = bifocal::capture(&client, || Ok(Tensor::<1>::empty(&client, [4], Element::F32)));
    let error = refused.map(|_| ()).expect_err("the CPU runtime records no graphs");
    assert!(error.to_string().contains("graph capture is not supported"), "{error}");
    assert_eq!(tensor(&client, [1, 1, 1, 2]).to_f32(&client), Ok(vec![0.5, 0.5]));
}

#[test]
fn forks_in_a_cache_of_their_own() {
    let client = cpu();
    let tokens = tensor(&client, [1, 1, 12, 32]);
    let filled = |mut cache: KvCache| {
        let sequence = cache.start(&client).expect("room for a sequence");
        cache.append(&client, &[sequence], tokens.view(), tokens.view()).expect("room for tokens");
        (cache, sequence)
    };
    // The ring holds two tokens, and both are taken back.
    let window = Window::new(1).expect("a window");
    let layout = Layout::ring(1, window, 1, 1).expect("a possible layout");
    let cache = |layout| KvCache::new(&client, kv_shape(), layout).expect("room for a small cache");
    let (mut whole, sequence) = filled(cache(layout));
    assert_eq!(whole.truncate(&client, sequence, 10), Ok(()));
    let (mut apart, forks) = whole.fork_apart(&client, &[sequence]).expect("as much room");
    assert_eq!((apart.length(forks[0]), apart.free_pages()), (Ok(10), 0));
    let lost = Err(Error::Overwritten { needed: 9, first: 10 });
    assert_eq!(whole.check_truncate(&client, sequence, 9), lost);
    assert_eq!(apart.truncate(&client, forks[0], 9), lost);
    let unknown = apart.fork_apart(&client, &[sequence]).map(|_| ());
    assert!(matches!(unknown, Err(Error::UnknownSequence { .. })), "{unknown:?}");

    let (sinks, sequence) = filled(cache(layout.with_sinks(1).expect("a possible layout")));
    let apart = sinks.fork_apart(&client, &[sequence]).map(|_| ());
    assert!(matches!(apart, Err(Error::Overwritten { .. })), "{apart:?}");
    // Of its five pages two sequences share three.
    let (mut small, first) = filled(small_cache(&client));
    let second = small.fork(&client, first).expect("room for a sequence");
    let apart = small.fork_apart(&client, &[first, second]).map(|_| ());
    assert_eq!(apart, Err(Error::CacheFull { what: "pages", needed: 3, free: 2 }));
}

/// A cache of one sequence that keeps a state of what leaves a window of 4, with a slack of 2.
fn state_cache(client: &Client, layout: Layout) -> Result<LinearCache, Error> {
    let far = LinearAttention::beyond(Window::new(4).expect("a window"));
    LinearCache::new(client, far, kv_shape(), layout, 2)
}

fn ring(beyond: usize) -> Layout {
    Layout::ring(2, Window::new(4).expect("a window"), beyond, 1).expect("a possible layout")
}

#[test]
fn caches_of_states_that_make_no_sense() {
    let client = cpu();
    assert!(state_cache(&client, ring(4)).is_ok());
    let sinks = ring(4).with_sinks(1).expect("a possible layout");
    for layout in [ring(3), sinks] {
        assert!(matches!(state_cache(&client, layout), Err(Error::Option { .. })), "{layout:?}");
    }
    let far = LinearAttention::beyond(Window::new(4).expect("a window"));
    let none = LinearCache::new(&client, far, kv_shape(), ring(4), 0);
    assert!(matches!(none, Err(Error::Option { option: "slack of a summary", .. })), "{none:?}");
    let wide = KvShape { head_dim: 1024, ..kv_shape() };
    let wide = LinearCache::new(&client, far, wide, ring(4), 2);
    assert!(matches!(wide, Err(Error::Refused { operator: "linear", .. })), "{wide:?}");
}

#[test]
fn keys_that_are_summed_up() {
    let client = cpu();
    let mut cache = state_cache(&client, ring(4)).expect("room for a small cache");
    let sequence = cache.start(&client).expect("room for a sequence");
    let tokens = tensor(&client, [1, 1, 20, 32]);
    let new = NewTokens::new(tokens.view(), tokens.view());
    let plain = cache.append(&client, &[sequence], &new.with_plain_key(tokens.view()));
    assert!(matches!(plain, Err(Error::Option { option: "plain keys of new tokens", .. })), "{plain:?}");
    assert_eq!((cache.covered(sequence), cache.kv().length(sequence)), (Ok(0), Ok(0)));
    cache.append(&client, &[sequence], &new).expect("a ring takes any number");
    // 16 have left the window; the last two of them are not summed up.
    assert_eq!(cache.covered(sequence), Ok(14));
    let back = cache.truncate(&client, sequence, 17);
    assert_eq!(back, Err(Error::SummedUp { needed: 13, covered: 14 }));
    assert_eq!(cache.check_truncate(&client, sequence, 17), back);
    assert_eq!((cache.covered(sequence), cache.kv().length(sequence)), (Ok(14), Ok(20)));
    assert!(matches!(cache.truncate(&client, sequence, 21), Err(Error::Option { .. })));
    assert_eq!(cache.truncate(&client, sequence, 18), Ok(()));

    // The first of two queries is token 16, whose window begins with key 13.
    let batch = cache.kv().batch(&client, &[sequence]).expect("a live sequence");
    assert!(cache.summaries(&client, &batch, 1).is_ok());
    let two = cache.summaries(&client, &batch, 2).map(|_| ());
    assert_eq!(two, Err(Error::SummedUp { needed: 13, covered: 14 }));

    let snapshot = cache.save(&client, sequence).expect("eighteen tokens to save");
    let paged = Layout::paged(2, 40, 4, 20).expect("a possible layout");
    let mut paged = state_cache(&client, paged).expect("room for a small cache");
    let error = paged.restore(&client, &snapshot).expect_err("tokens that a ring forgot");
    assert!(matches!(error, Error::Snapshot { .. }), "{error}");
    let far = LinearAttention::beyond(Window::new(3).expect("a window"));
    let mut other = LinearCache::new(&client, far, kv_shape(), ring(4), 2).expect("room for a small cache");
    let error = other.restore(&client, &snapshot).expect_err("another window");
    assert!(matches!(error, Error::Snapshot { .. }), "{error}");
    assert_eq!((paged.kv().free_sequences(), other.kv().free_sequences()), (2, 2));
    cache.restore(&client, &snapshot).expect("a second sequence");
    assert_eq!(cache.truncate(&client, sequence, 0), Ok(()));
    assert_eq!(cache.covered(sequence), Ok(0));
}
