//! Caches: the next tokens, however many at once, get what a forward pass over all of them gives.

use bifocal_burn::{
    AhaAttention, AhaAttentionConfig, AhaLinearAttention, AhaLinearAttentionConfig, AttentionOptions,
    CausalAttention, CausalAttentionConfig, Error, L2aAttention, L2aAttentionConfig, LayerCache,
    MultiWindowAttention, MultiWindowAttentionConfig, Projections, QadaAttention, QadaAttentionConfig,
    RattentionAttention, RattentionAttentionConfig, Reach, RopeConfig, Routing, Window, composed,
};
use burn::{
    module::{Module, Param},
    tensor::{Device, Int, Tensor},
};
use rstest::rstest;

use crate::common::{assert_close, devices, host, mixed_routes, noise, qkv, wgpu};

const TOLERANCE: f32 = 2e-5;

/// What a module gives, and what it decided if it decides.
type Attended = (Tensor<3>, Option<Routing>);

/// A module that caches.
trait Cached {
    fn whole(&self, hidden: Tensor<3>) -> Attended;
    fn cache(&self, batch: usize, capacity: usize) -> LayerCache;
    fn next(&self, hidden: Tensor<3>, cache: &mut LayerCache) -> Result<Attended, Error>;
}

macro_rules! cached {
    ($module:ty, $forward:ident => $attended:expr) => {
        impl Cached for $module {
            fn whole(&self, hidden: Tensor<3>) -> Attended {
                let $forward = self.forward(hidden).unwrap();
                $attended
            }

            fn cache(&self, batch: usize, capacity: usize) -> LayerCache {
                self.cache(batch, capacity).unwrap()
            }

            fn next(&self, hidden: Tensor<3>, cache: &mut LayerCache) -> Result<Attended, Error> {
                let $forward = self.forward_cached(hidden, cache)?;
                Ok($attended)
            }
        }
    };
}

cached!(CausalAttention, output => (output, None));
cached!(RattentionAttention, output => (output, None));
cached!(AhaAttention, forward => (forward.output, Some(forward.routing)));
cached!(AhaLinearAttention, forward => (forward.output, Some(forward.routing)));
cached!(MultiWindowAttention, forward => (forward.output, Some(forward.routing)));
cached!(L2aAttention, forward => (forward.output, Some(forward.routing)));
cached!(QadaAttention, forward => (forward.output, Some(forward.routing)));

fn rope() -> Option<RopeConfig> {
    Some(RopeConfig::new(45))
}

fn causal(window: Option<usize>) -> CausalAttention {
    let config = CausalAttentionConfig::new(24, 4).with_n_kv_heads(Some(2)).with_rope(rope());
    config.with_window(window).with_softcap(Some(3.0)).init(&Device::flex()).unwrap()
}

fn aha(router_heads: usize) -> AhaAttention {
    let config = AhaAttentionConfig::new(24, 4, 5).with_n_kv_heads(Some(2)).with_rope(rope());
    config.with_n_router_heads(Some(router_heads)).init(&Device::flex()).unwrap()
}

fn multi_window() -> MultiWindowAttention {
    let config = MultiWindowAttentionConfig::new(24, 4, vec![2, 9]).with_rope(rope());
    config.with_n_kv_heads(Some(1)).init(&Device::flex()).unwrap()
}

fn l2a() -> L2aAttention {
    let device = Device::flex();
    let config = L2aAttentionConfig::new(24, 4, 5).with_n_kv_heads(Some(2)).with_rope(rope());
    let mut l2a = config.init(&device).unwrap();
    // Routers start at zero: one that goes both ways.
    l2a.router.weight = Param::from_tensor(noise([24, 1], 3, &device));
    l2a
}

fn qada(window: usize, sinks: u32) -> QadaAttention {
    let config = QadaAttentionConfig::new(24, 4, window, 0.5).with_n_kv_heads(Some(2)).with_rope(rope());
    config.with_sinks(sinks).init(&Device::flex()).unwrap()
}

fn rattention(window: usize) -> RattentionAttention {
    let config = RattentionAttentionConfig::new(24, 4, window).with_n_kv_heads(Some(2)).with_rope(rope());
    config.with_qk_norm_epsilon(Some(1e-6)).init(&Device::flex()).unwrap()
}

fn aha_linear(window: usize) -> AhaLinearAttention {
    let config = AhaLinearAttentionConfig::new(24, 4, window).with_n_kv_heads(Some(2)).with_rope(rope());
    config.with_n_router_heads(Some(2)).with_softcap(Some(3.0)).init(&Device::flex()).unwrap()
}

#[rstest]
#[case::full(Box::new(causal(None)))]
#[case::ring(Box::new(causal(Some(5))))]
#[case::window_beyond_the_capacity(Box::new(causal(Some(500))))]
#[case::aha(Box::new(aha(4)))]
#[case::aha_by_token(Box::new(aha(1)))]
#[case::multi_window(Box::new(multi_window()))]
#[case::l2a(Box::new(l2a()))]
#[case::qada(Box::new(qada(4, 2)))]
#[case::qada_without_sinks(Box::new(qada(1, 0)))]
#[case::rattention(Box::new(rattention(5)))]
#[case::rattention_of_one_key(Box::new(rattention(1)))]
#[case::aha_linear(Box::new(aha_linear(5)))]
fn chunks_of_any_size_give_what_all_at_once_gives(#[case] module: Box<dyn Cached>) {
    let device = Device::flex();
    let hidden = noise([2, 45, 24], 7, &device).mul_scalar(3.0);
    let (expected, routing) = module.whole(hidden.clone());
    let routes = routing.as_ref().map(|routing| routing.to_host().unwrap());
    if let Some(routes) = &routes {
        let farthest = routing.as_ref().unwrap().reaches() as u8 - 1;
        assert!((0..=farthest).all(|route| routes.contains(&route)), "not every reach was taken");
    }
    // Prompts of one token and of more than a ring holds; steps of 1 to 16; longer chunks in between, of a ring too.
    for chunks in [&[1, 1, 2, 17, 1, 16, 7][..], &[25, 1, 1, 17, 1]] {
        let mut cache = module.cache(2, 45);
        for &tokens in chunks {
            let start = cache.tokens();
            let part = |tensor: &Tensor<3>| tensor.clone().narrow(1, start, tokens);
            let (found, routing) = module.next(part(&hidden), &mut cache).unwrap();
            assert_close(found, part(&expected), TOLERANCE);
            assert_eq!(routing.is_some(), routes.is_some());
            let Some((routing, routes)) = routing.zip(routes.as_ref()) else { continue };
            let expected: Vec<u8> =
                routes.chunks(45).flat_map(|head| head[start..start + tokens].to_vec()).collect();
            assert_eq!(routing.to_host().unwrap(), expected, "from {start} on");
        }
        assert_eq!(cache.tokens(), 45);
        let full = module.next(hidden.clone().narrow(1, 0, 1), &mut cache).unwrap_err();
        assert!(matches!(full, Error::TooLarge { size: 46, limit: 45, .. }), "{full}");
        assert_eq!(cache.tokens(), 45);
    }
}

#[rstest]
#[case::full(Box::new(causal(None)), true)]
#[case::ring(Box::new(causal(Some(5))), false)]
#[case::aha(Box::new(aha(4)), true)]
#[case::l2a(Box::new(l2a()), false)]
#[case::qada(Box::new(qada(4, 2)), true)]
#[case::rattention(Box::new(rattention(5)), false)]
#[case::aha_linear(Box::new(aha_linear(5)), false)]
fn what_is_taken_back_never_was(#[case] module: Box<dyn Cached>, #[case] keeps_all: bool) {
    let device = Device::flex();
    let [hidden, guesses] = [7, 8].map(|seed| noise([2, 45, 24], seed, &device).mul_scalar(3.0));
    let (expected, _) = module.whole(hidden.clone());
    let next = |cache: &mut LayerCache, of: &Tensor<3>, end: usize| {
        let start = cache.tokens();
        module.next(of.clone().narrow(1, start, end - start), cache).unwrap().0
    };
    let mut cache = module.cache(2, 45);
    let prompt = next(&mut cache, &hidden, 25);
    let mut patient = cache.fork().unwrap();
    next(&mut cache, &guesses, 28);
    cache.truncate(25).unwrap();
    for end in [26, 42] {
        assert_eq!(host(next(&mut cache, &hidden, end)), host(next(&mut patient, &hidden, end)));
    }
    // By now a state has keys.
    let mut patient = cache.fork().unwrap();
    next(&mut cache, &guesses, 45);
    cache.truncate(42).unwrap();
    assert_eq!(host(next(&mut cache, &hidden, 45)), host(next(&mut patient, &hidden, 45)));
    cache.truncate(30).unwrap();
    assert_close(next(&mut cache, &hidden, 45), expected.clone().narrow(1, 30, 15), TOLERANCE);
    // Further back than what is summed up, and than a ring of 20 or 37 goes.
    match cache.truncate(24) {
        Ok(()) => assert!(keeps_all),
        Err(Error::Overwritten { .. } | Error::SummedUp { .. }) => {
            assert!(!keeps_all && cache.tokens() == 45);
            cache.truncate(43).unwrap();
        }
        Err(other) => panic!("{other}"),
    }
    let start = cache.tokens();
    assert_close(next(&mut cache, &hidden, start + 2), expected.narrow(1, start, 2), TOLERANCE);
    cache.reset().unwrap();
    assert_eq!((cache.tokens(), host(next(&mut cache, &hidden, 25))), (0, host(prompt)));
}

/// Projections of 4 heads over 2 kv heads of 6 channels.
fn projections(device: &Device) -> Projections {
    CausalAttentionConfig::new(24, 4).with_n_kv_heads(Some(2)).init(device).unwrap().projections
}

#[test]
fn attention_of_ones_own_is_cached_on_every_device() {
    let flex = Device::flex();
    let window = Window::new(3).unwrap();
    let reaches = [Some(Reach::Window(window)), Some(Reach::All)];
    let [query, key, value] = qkv([4, 2], [33, 33], 6, &flex);
    let routes = mixed_routes([2, 2, 33], 2, 5, &flex);
    let options = AttentionOptions::default().with_scale(0.7).with_sink_logits(noise([4], 4, &flex));
    let expected =
        composed::aha_attention(query.clone(), key.clone(), value.clone(), routes.clone(), window, &options);
    let expected = expected.unwrap();
    for device in devices() {
        let mut cache = LayerCache::new(&projections(&device), &reaches, 2, 40).unwrap();
        let options = AttentionOptions::default()
            .with_scale(0.7)
            .with_sink_logits(noise([4], 4, &flex).to_device(&device));
        for tokens in [5, 1, 2, 18, 7] {
            let start = cache.tokens();
            let part = |tensor: &Tensor<4>| tensor.clone().narrow(2, start, tokens);
            let there = [&query, &key, &value].map(|tensor| part(tensor).to_device(&device));
            let routes: Tensor<3, Int> = routes.clone().narrow(2, start, tokens).to_device(&device);
            let routing = Routing::from_routes(routes, 2).unwrap();
            let found = cache.attend(&reaches, there, Some(&routing), &options).unwrap();
            assert_close(found, part(&expected).to_device(&device), TOLERANCE);
        }
    }
}

#[test]
fn states_and_moments_move_to_a_gpu() {
    let flex = Device::flex();
    let Some(device) = wgpu() else { return };
    // So many that some are summed up.
    let hidden = noise([1, 40, 16], 6, &flex).mul_scalar(3.0);
    let config = QadaAttentionConfig::new(16, 2, 3, 0.6).with_sinks(2).with_rope(rope());
    let qada = config.init(&flex).unwrap();
    let rattention = RattentionAttentionConfig::new(16, 2, 3).with_rope(rope()).init(&flex).unwrap();
    let aha_linear = AhaLinearAttentionConfig::new(16, 2, 3).with_rope(rope()).init(&flex).unwrap();
    let there: [Box<dyn Cached>; 3] = [
        Box::new(qada.clone().to_device(&device)),
        Box::new(rattention.clone().to_device(&device)),
        Box::new(aha_linear.clone().to_device(&device)),
    ];
    let here: [Box<dyn Cached>; 3] = [Box::new(qada), Box::new(rattention), Box::new(aha_linear)];
    for (here, there) in here.iter().zip(&there) {
        let (expected, routing) = here.whole(hidden.clone());
        let routes = routing.map(|routing| routing.to_host().unwrap());
        let mut cache = there.cache(1, 40);
        for tokens in [38, 1, 1] {
            let start = cache.tokens();
            let part = |tensor: &Tensor<3>| tensor.clone().narrow(1, start, tokens);
            let (found, routing) = there.next(part(&hidden).to_device(&device), &mut cache).unwrap();
            assert_close(found.to_device(&flex), part(&expected), TOLERANCE);
            let found = routing.map(|routing| routing.to_host().unwrap());
            let of = |routes: &Vec<u8>| -> Vec<u8> {
                routes.chunks(40).flat_map(|head| head[start..start + tokens].to_vec()).collect()
            };
            assert_eq!(found, routes.as_ref().map(of));
        }
    }
}

#[test]
fn a_ring_takes_no_more_for_a_longer_context() {
    // A window of 5, and 15 for the first of 16 queries; a key and a value of 6 numbers for each of 2 kv heads.
    let bytes = |tokens: usize| 3 * tokens * 2 * (6 + 6) * 4;
    for capacity in [21, 1_000_000] {
        assert_eq!(causal(Some(5)).cache(3, capacity).unwrap().bytes(), bytes(20));
    }
    assert_eq!(causal(Some(5)).cache(3, 20).unwrap().bytes(), bytes(20));
    assert_eq!(causal(None).cache(3, 100).unwrap().bytes(), bytes(100));
    assert_eq!(l2a().cache(3, 100).unwrap().bytes(), bytes(20) + bytes(100));

    // A ring of the window and 32 tokens, a second key for each, and a state of 12 features for 6 channels of values.
    for capacity in [38, 1_000_000] {
        let found = rattention(5).cache(3, capacity).unwrap().bytes();
        assert_eq!(found, bytes(37) / 2 * 3 + 3 * 2 * 12 * 6 * 4);
    }
}

#[test]
fn what_does_not_fit_a_cache_is_refused_and_changes_nothing() {
    let device = Device::flex();
    let module = causal(Some(5));
    let mut cache = module.cache(2, 60).unwrap();
    let hidden = |batch, tokens| noise([batch, tokens, 24], 1, &device);
    module.forward_cached(hidden(2, 40), &mut cache).unwrap();
    let option = |error: Error| match error {
        Error::Option { option, .. } => option,
        other => panic!("{other:?}"),
    };

    let error = module.forward_cached(hidden(3, 1), &mut cache).unwrap_err();
    assert!(matches!(error, Error::Shape { tensor: "the hidden states", .. }), "{error}");
    // Positions are tabulated for 45 tokens.
    let error = module.forward_cached(hidden(2, 6), &mut cache).unwrap_err();
    assert!(matches!(error, Error::TooLarge { size: 46, limit: 45, .. }), "{error}");
    let error = causal(Some(6)).forward_cached(hidden(2, 1), &mut cache).unwrap_err();
    assert_eq!(option(error), "reaches of a step");
    let error = causal(None).forward_cached(hidden(2, 1), &mut cache).unwrap_err();
    assert_eq!(option(error), "reaches of a step");
    for error in [
        l2a().forward_cached(hidden(2, 1), &mut cache).unwrap_err(),
        qada(4, 2).forward_cached(hidden(2, 1), &mut cache).unwrap_err(),
        rattention(5).forward_cached(hidden(2, 1), &mut cache).unwrap_err(),
    ] {
        assert_eq!(option(error), "the cache");
    }
    let learning = CausalAttentionConfig::new(24, 4).init(&Device::flex().autodiff()).unwrap();
    let mut unlearnt = learning.cache(1, 8).unwrap();
    assert_eq!(option(learning.forward_cached(hidden(1, 1), &mut unlearnt).unwrap_err()), "autodiff");
    assert_eq!(option(cache.truncate(41).unwrap_err()), "tokens to truncate to");
    // All that was refused has left no trace.
    assert_eq!(cache.tokens(), 40);
    module.forward_cached(hidden(2, 5), &mut cache).unwrap();

    let projections = projections(&device);
    let window = Some(Reach::Window(Window::new(2).unwrap()));
    for reaches in [&[][..], &[Some(Reach::All), None], &[Some(Reach::NonCausal)]] {
        let error = LayerCache::new(&projections, reaches, 1, 8).unwrap_err();
        assert!(["reaches of a cache", "reach of a cache"].contains(&option(error)));
    }
    for (batch, capacity) in [(0, 8), (1, 0)] {
        let error = LayerCache::new(&projections, &[window], batch, capacity).unwrap_err();
        assert!(matches!(error, Error::EmptyDimension { .. }), "{error}");
    }
    let mut cache = LayerCache::new(&projections, &[window, Some(Reach::All)], 2, 8).unwrap();
    let reaches = [window, Some(Reach::All)];
    let step = || qkv([4, 2], [1, 1], 6, &device);
    let error = cache.attend(&reaches, step(), None, &AttentionOptions::default()).unwrap_err();
    assert_eq!(option(error), "routing of a step");
    let routing = Routing::from_routes(mixed_routes([2, 4, 2], 2, 1, &device), 2).unwrap();
    let error = cache.attend(&reaches, step(), Some(&routing), &AttentionOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    assert_eq!(cache.tokens(), 0);
}
