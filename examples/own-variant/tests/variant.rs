//! The variant keeps the contracts of its parts, and learns.

use std::{fs, sync::atomic::AtomicBool};

use bifocal::{AttentionOperator, Element, Router, Tensor};
use bifocal_lm::{AttentionKind, Corpus, Line, Trainer, TrainingConfig};
use bifocal_own_variant::{EveryNth, Sharpened, register_strided};
use bifocal_testing::{Device, Effort, Float, Subject, check_operator, reference::Options};

/// The branch, and what it is as a plain loop: attention over everything, at another scale.
struct Held(Sharpened);

impl Subject for Held {
    fn operator(&self) -> &dyn AttentionOperator {
        &self.0
    }

    fn options<F: Float>(&self, options: Options<F>) -> Options<F> {
        // As the operator does it, in f32.
        let scale = options.scale.to_f32().unwrap_or(f32::NAN) * self.0.factor;
        Options { scale: F::from(scale).unwrap_or(F::nan()), ..options }
    }
}

#[test]
fn the_branch_keeps_its_contract() {
    let device = Device::open("cpu").expect("the CPU runtime is in this build");
    let effort = Effort { cases: 8, seed: 2026 };
    check_operator(&Held(Sharpened { factor: 1.5 }), &device, effort).expect("a contract that is kept");
}

#[test]
fn a_branch_that_is_something_else_is_found_out() {
    struct Wrong(Sharpened);
    impl Subject for Wrong {
        fn operator(&self) -> &dyn AttentionOperator {
            &self.0
        }
    }
    let device = Device::open("cpu").expect("the CPU runtime is in this build");
    let effort = Effort { cases: 8, seed: 2026 };
    let error =
        check_operator(&Wrong(Sharpened { factor: 1.5 }), &device, effort).expect_err("another scale");
    assert!(error.starts_with("rows: "), "{error}");
}

#[test]
fn every_fourth_token_looks_far() {
    let client = bifocal::open("cpu").expect("the CPU runtime is in this build");
    let hidden = Tensor::filled(&client, [2, 10, 3], Element::F32, 0.0).expect("room");
    let decision = EveryNth { stride: 4 }.route(&client, hidden.view()).expect("routes");
    assert_eq!(decision.routes.to_host(&client).expect("read"), [1, 0, 0, 0, 1, 0, 0, 0, 1, 0].repeat(2));
    assert_eq!(decision.counts(&client).expect("counts"), [[7, 3], [7, 3]]);
}

#[test]
fn it_learns() {
    register_strided().expect("a free name");
    assert!(register_strided().is_err(), "a name that is taken");
    let folder = tempfile::tempdir().expect("a folder");
    let text = folder.path().join("text.txt");
    fs::write(&text, "near and far, here and everywhere; ".repeat(200)).expect("a text");

    let mut config = TrainingConfig::default();
    let model = &mut config.model;
    (model.layers, model.d_model, model.heads, model.kv_heads) = (2, 16, 2, 1);
    (model.feed_forward, model.context) = (24, 24);
    model.attention = vec![AttentionKind::Custom { name: "strided".into() }];
    (config.steps, config.batch, config.warm_up, config.learning_rate) = (60, 4, 5, 1e-2);
    (config.validation_windows, config.log_every) = (4, 1);

    let corpus = Corpus::open(&[text], config.seed).expect("a corpus");
    let mut trainer = Trainer::new(config, corpus, &burn::tensor::Device::flex()).expect("a trainer");
    let (mut losses, mut shares) = (Vec::new(), Vec::new());
    let run = folder.path().join("run");
    fs::create_dir(&run).expect("a folder");
    trainer
        .run(&run, &AtomicBool::new(false), &mut |progress| {
            if let bifocal_lm::Progress::Line(Line::Step(line)) = progress {
                losses.push(line.loss);
                shares.extend(line.far.iter().flatten().flatten().copied());
            }
        })
        .expect("a run");
    assert!(losses[losses.len() - 1] < 0.7 * losses[0], "{losses:?}");
    assert!(shares.iter().all(|&share| share == 0.25), "six of 24 tokens");

    let mut unknown = TrainingConfig::default();
    unknown.model.attention = vec![AttentionKind::Custom { name: "nobody".into() }];
    let error =
        bifocal_lm::Decoder::new(&unknown.model, 1, &burn::tensor::Device::flex()).expect_err("no such name");
    assert!(error.to_string().contains("nobody"), "{error}");
}
