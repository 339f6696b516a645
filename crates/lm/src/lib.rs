//! A small decoder language model whose attention Bifocal computes, and its training: text from memory-mapped files,
//! routers that learn when to look far, checkpoints that resume bit for bit, metrics as lines of JSON.
//!
//! | part | what it is |
//! |---|---|
//! | [`Decoder`] | RMS norms, rotary positions, SwiGLU, grouped kv heads, tied embeddings over bytes; [`AttentionKind`] per layer |
//! | [`Corpus`] | files and folders as one text |
//! | [`Trainer`] | AdamW, a cosine schedule with warm-up, clipping, accumulation, router penalties |
//! | [`BudgetController`], [`CollapseDetector`] | steer and watch gates |
//! | [`Checkpoint`] | a saved run |
//! | [`Pruning`] | leaves out the far branches of layers that seldom look far |
//! | [`Decoder::generate`] | text from a prompt, byte by byte, over a [`DecoderCache`] |
//! | [`metrics`] | what a run measures |
//!
//! The command `bifocal train` is this crate with options around it. Attention of your own joins in by
//! [`CustomAttention`] and [`register`].
//!
//! ```no_run
//! use std::{path::Path, sync::atomic::AtomicBool};
//!
//! use bifocal_lm::{Corpus, Trainer, TrainingConfig};
//! use burn::tensor::Device;
//!
//! let mut config = TrainingConfig::default();
//! config.steps = 100;
//! let corpus = Corpus::open(&["docs/src".into()], config.seed)?;
//! let mut trainer = Trainer::new(config, corpus, &Device::flex())?;
//! let stop = AtomicBool::new(false);
//! trainer.run(Path::new("run"), &stop, &mut |progress| println!("{progress:?}"))?;
//! # Ok::<(), bifocal_lm::Error>(())
//! ```

mod checkpoint;
mod config;
mod control;
mod data;
mod draws;
mod error;
mod files;
mod generate;
pub mod metrics;
mod model;
mod optimiser;
mod penalty;
mod prune;
mod schedule;
mod tally;
mod trainer;
mod validation;

pub use checkpoint::Checkpoint;
pub use config::{AttentionKind, Budget, Guard, ModelConfig, Penalties, Precision, TrainingConfig};
pub use control::{BudgetController, Collapse, CollapseDetector, Side};
pub use data::{Corpus, DOCUMENT_END, Split, TokenKind, VOCABULARY};
pub use error::{Error, Result};
pub use generate::{End, Generation, GenerationOptions, Sampling};
pub use metrics::{KindShare, Line, StepLine, ValidationLine};
pub use model::{
    Attention, CustomAttention, CustomLayer, Decoder, DecoderCache, Forward, Layer, Pass, RandomGate,
    register,
};
pub use prune::{PrunedLayer, Pruning};
pub use schedule::{l2a_weight, learning_rate};
pub use trainer::{CHECKPOINT, METRICS, Outcome, Progress, Trainer};
