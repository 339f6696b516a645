//! Text from a tiny decoder.

use std::{ops::Range, sync::Arc};

use bifocal_burn::{AttentionOptions, Routing, full_attention};
use bifocal_lm::{
    AttentionKind, CustomAttention, Decoder, DecoderCache, End, Error, Forward, GenerationOptions,
    ModelConfig, Pass, Sampling, register,
};
use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Device, Int, Tensor, TensorData},
};
use rstest::rstest;

/// Makes what layers add outweigh the embeddings, so that what comes next depends on all that came before.
struct Louder;

impl ModuleMapper for Louder {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let factor = if D == 2 && param.lazy_shape()[0] != bifocal_lm::VOCABULARY { 12.0 } else { 1.0 };
        param.map(|tensor| tensor.mul_scalar(factor))
    }
}

/// Two layers that attend like `kind`, and see 48 tokens.
fn decoder(kind: AttentionKind) -> Decoder {
    decoder_of(vec![kind])
}

fn decoder_of(attention: Vec<AttentionKind>) -> Decoder {
    let mut model = ModelConfig::default();
    (model.layers, model.d_model, model.heads, model.kv_heads) = (2, 16, 4, 2);
    (model.feed_forward, model.context, model.attention) = (24, 48, attention);
    Decoder::new(&model, 5, &Device::flex()).unwrap().map(&mut Louder)
}

fn aha() -> AttentionKind {
    AttentionKind::Aha { window: 4 }
}

/// The whole text, and why it ended.
fn generate(decoder: &Decoder, prompt: &[u8], options: &GenerationOptions) -> (Vec<u8>, End) {
    let mut generation = decoder.generate(prompt, options).unwrap();
    let text = generation.by_ref().collect::<Result<Vec<u8>, _>>().unwrap();
    assert!(generation.next().is_none());
    (text, generation.end().unwrap())
}

#[rstest]
#[case::full(AttentionKind::Full)]
#[case::window(AttentionKind::Window { window: 4 })]
#[case::aha(aha())]
#[case::multi_window(AttentionKind::MultiWindow { windows: vec![2, 6] })]
#[case::l2a(AttentionKind::L2a { window: 4 })]
#[case::rattention(AttentionKind::Rattention { window: 4 })]
#[case::aha_linear(AttentionKind::AhaLinear { window: 4 })]
#[case::random_gate(AttentionKind::RandomGate { window: 4, far_share: 0.3 })]
#[case::qada(AttentionKind::Qada { window: 4, tau: 0.6, sinks: 2 })]
fn greedy_text_is_that_of_whole_passes(#[case] kind: AttentionKind) {
    let decoder = decoder(kind);
    let prompt = b"near and far";
    let mut generation = decoder.generate(prompt, &GenerationOptions::new(24)).unwrap();
    let found = generation.by_ref().collect::<Result<Vec<u8>, _>>().unwrap();
    assert_eq!((found.len(), generation.end()), (24, Some(End::Length)));

    let mut tokens: Vec<i32> = prompt.iter().map(|&byte| i32::from(byte)).collect();
    loop {
        let data = TensorData::new(tokens.clone(), [1, tokens.len()]);
        let ids = Tensor::<2, Int>::from_data(data, &Device::flex());
        let forward = decoder.forward(ids, Pass::default()).unwrap();
        if tokens.len() == prompt.len() + 23 {
            // What the model has seen, and how far it looked.
            assert_eq!(generation.seen(), tokens.len());
            let share = |routing: &Option<Routing>| {
                let shares = routing.as_ref()?.far_share().unwrap();
                Some(shares.iter().sum::<f64>() / shares.len() as f64)
            };
            for (found, routing) in generation.far_share().iter().zip(&forward.routings) {
                assert_eq!(found.is_some(), routing.is_some());
                let Some((found, expected)) = found.zip(share(routing)) else { continue };
                assert!((found - expected).abs() < 1e-9, "{found}, expected {expected}");
            }
        }
        if tokens.len() == prompt.len() + 24 {
            break;
        }
        let logits: Vec<f32> = forward.logits.into_data().iter::<f32>().collect();
        let last = &logits[logits.len() - bifocal_lm::VOCABULARY..];
        let likeliest = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        tokens.push(likeliest as i32);
    }
    let expected: Vec<u8> = tokens[prompt.len()..].iter().map(|&token| token as u8).collect();
    assert_eq!(found, expected);

    // An untrained decoder repeats itself. What it makes of a text that does not is the same too, byte by byte.
    let text: Vec<i32> =
        b"A window shows what is near; who looks far?".iter().map(|&byte| i32::from(byte)).collect();
    let ids = |part: &[i32]| {
        Tensor::<2, Int>::from_data(TensorData::new(part.to_vec(), [1, part.len()]), &Device::flex())
    };
    let logits = |forward: Forward| -> Vec<f32> { forward.logits.into_data().iter::<f32>().collect() };
    let whole = logits(decoder.forward(ids(&text), Pass::default()).unwrap());
    let mut cache = decoder.cache(1, text.len()).unwrap();
    let (prompt, rest) = text.split_at(9);
    let mut parts = logits(decoder.forward_cached(ids(prompt), &mut cache, Pass::default()).unwrap());
    for token in rest.chunks(1) {
        parts.extend(logits(decoder.forward_cached(ids(token), &mut cache, Pass::default()).unwrap()));
    }
    assert_eq!(whole.len(), parts.len());
    let largest = whole.iter().fold(0.0f32, |top, x| top.max(x.abs()));
    for (at, (found, expected)) in parts.iter().zip(&whole).enumerate() {
        assert!((found - expected).abs() <= 1e-4 * largest, "logit {at}: {found}, expected {expected}");
    }
}

#[test]
fn tokens_are_taken_back_in_all_layers_or_in_none() {
    // The full layer can go back anywhere, the ring of the other cannot.
    let decoder = decoder_of(vec![AttentionKind::Full, AttentionKind::Window { window: 4 }]);
    let text = b"The window shows the near, the gate the far.";
    let next = |cache: &mut DecoderCache, tokens: Range<usize>| -> Vec<f32> {
        let ids: Vec<i32> = text[tokens].iter().map(|&byte| i32::from(byte)).collect();
        let ids = TensorData::new(ids.clone(), [1, ids.len()]);
        let ids = Tensor::<2, Int>::from_data(ids, &Device::flex());
        let forward = decoder.forward_cached(ids, cache, Pass::default()).unwrap();
        forward.logits.into_data().iter::<f32>().collect()
    };
    let mut cache = decoder.cache(1, text.len()).unwrap();
    let prompt = next(&mut cache, 0..30);
    let mut patient = cache.fork().unwrap();
    next(&mut cache, 30..36);
    let Err(Error::Attention(error)) = cache.truncate(10) else { panic!("a ring that forgets nothing") };
    assert!(matches!(error, bifocal_burn::Error::Overwritten { .. }), "{error}");
    assert!(cache.layers().iter().all(|layer| layer.tokens() == 36));
    cache.truncate(30).unwrap();
    assert_eq!(next(&mut cache, 30..32), next(&mut patient, 30..32));
    assert_eq!(next(&mut cache, 32..33), next(&mut patient, 32..33));
    assert_eq!(cache.tokens(), 33);
    cache.reset().unwrap();
    assert_eq!((cache.tokens(), next(&mut cache, 0..30)), (0, prompt));
}

#[test]
fn a_seed_gives_its_text() {
    let decoder = decoder(aha());
    let options = |seed| {
        let sampling = Sampling::Random { temperature: 0.9, top_k: Some(100), top_p: Some(0.95), seed };
        GenerationOptions::new(20).with_sampling(sampling)
    };
    let text = |seed| generate(&decoder, b"near", &options(seed)).0;
    assert_eq!(text(1), text(1));
    assert_ne!(text(1), text(2));
    // However likely the others are, the likeliest is the only one left.
    let sampling = Sampling::Random { temperature: 5.0, top_k: Some(1), top_p: None, seed: 3 };
    let frozen = GenerationOptions::new(20).with_sampling(sampling);
    assert_eq!(
        generate(&decoder, b"near", &frozen),
        generate(&decoder, b"near", &GenerationOptions::new(20))
    );
}

#[test]
fn texts_end_where_they_should() {
    let decoder = decoder(aha());
    let (text, _) = generate(&decoder, b"near", &GenerationOptions::new(20));
    // Of two stops the one that comes first.
    let stop = text[4..7].to_vec();
    let first = text.windows(3).position(|part| part == stop).unwrap() + 3;
    let options = GenerationOptions::new(20).with_stop(stop).with_stop("never: \u{fffd}");
    assert_eq!(generate(&decoder, b"near", &options), (text[..first].to_vec(), End::Stop));
    let options = GenerationOptions::new(20).with_stop([text[0]]);
    assert_eq!(generate(&decoder, b"near", &options), (text[..1].to_vec(), End::Stop));
    // The last token that the model sees says what comes next, and that is all.
    let (text, end) = generate(&decoder, &[b'a'; 48], &GenerationOptions::new(20));
    assert_eq!((text.len(), end), (1, End::Context));
    let (text, end) = generate(&decoder, &[b'a'; 46], &GenerationOptions::new(3));
    assert_eq!((text.len(), end), (3, End::Length));
}

#[derive(Debug)]
struct Own;

impl CustomAttention for Own {
    fn attend(
        &self,
        _hidden: Tensor<3>,
        [query, key, value]: [Tensor<4>; 3],
    ) -> bifocal_burn::Result<(Tensor<4>, Option<Routing>)> {
        Ok((full_attention(query, key, value, &AttentionOptions::default())?, None))
    }
}

#[test]
fn impossible_texts_are_refused() {
    let tiny = decoder(AttentionKind::Full);
    let refused = |decoder: &Decoder, prompt: &[u8], options: GenerationOptions| match decoder
        .generate(prompt, &options)
        .unwrap_err()
    {
        Error::Setting { setting, .. } => setting,
        other => panic!("{other}"),
    };
    let some = || GenerationOptions::new(5);
    assert_eq!(refused(&tiny, b"", some()), "the prompt");
    assert_eq!(refused(&tiny, &[b'a'; 49], some()), "the prompt");
    assert_eq!(refused(&tiny, b"a", GenerationOptions::new(0)), "max_tokens");
    assert_eq!(refused(&tiny, b"a", some().with_stop("")), "stop");
    let cold = Sampling::Random { temperature: 0.0, top_k: None, top_p: None, seed: 0 };
    assert_eq!(refused(&tiny, b"a", some().with_sampling(cold)), "temperature");
    register("uncached", Arc::new(Own)).unwrap();
    let own = decoder(AttentionKind::Custom { name: "uncached".to_string() });
    assert_eq!(refused(&own, b"a", some()), "the attention of a cache");
}

#[rstest]
#[case::full(AttentionKind::Full)]
#[case::random_gate(AttentionKind::RandomGate { window: 4, far_share: 0.3 })]
fn more_than_the_context_is_refused(#[case] kind: AttentionKind) {
    let decoder = decoder(kind);
    let ids = || Tensor::<2, Int>::zeros([1, 49], &Device::flex());
    let mut cache = decoder.cache(1, 100).unwrap();
    for error in [
        decoder.forward(ids(), Pass::default()).unwrap_err(),
        decoder.forward_cached(ids(), &mut cache, Pass::default()).unwrap_err(),
    ] {
        let Error::Attention(error) = error else { panic!("{error}") };
        assert!(matches!(error, bifocal_burn::Error::TooLarge { size: 49, limit: 48, .. }), "{error}");
    }
}
