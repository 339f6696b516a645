//! What a decoder does with text that it does not learn from.

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData, activation::log_softmax};

use crate::{
    Corpus, Decoder, Error, Pass, Result, TrainingConfig, ValidationLine,
    draws::{Draws, Purpose},
    tally::Tally,
};

/// What a validation is of.
pub(crate) struct Validation<'a> {
    pub(crate) config: &'a TrainingConfig,
    pub(crate) corpus: &'a Corpus,
    /// Tokens that windows are spread over.
    pub(crate) part: &'a Range<usize>,
    /// After which step.
    pub(crate) step: u64,
}

impl Validation<'_> {
    /// Mean loss, and shares of far. `finite` refuses a loss that is not finite, before shares are read: NaN scores have none.
    pub(crate) fn run(
        &self,
        decoder: &Decoder,
        finite: impl Fn(f64) -> Result<f64>,
    ) -> Result<ValidationLine> {
        let &TrainingConfig { batch: rows, validation_windows, seed, .. } = self.config;
        let length = self.config.model.context + 1;
        let tokens = self.corpus.spread(self.part, validation_windows, length);
        let device = decoder.device();
        let mut tally = Tally::new(&self.config.model);
        let mut sum = 0.0;
        for (pass, tokens) in tokens.chunks(rows * length).enumerate() {
            // Step 0 is no step of training.
            let seed = Draws::new(seed, Purpose::Passes, &[0, pass as u64]).bits();
            let (inputs, targets) = batch(tokens, length, &device);
            let forward = decoder.forward(inputs, Pass { seed, leak: 0.0 })?;
            let loss = scalar(&cross_entropy(forward.logits, targets))?;
            sum += finite(loss)? * tokens.len() as f64;
            tally.add(tokens, length, &forward.routings)?;
        }
        let loss = sum / tokens.len() as f64;
        Ok(ValidationLine {
            step: self.step,
            loss,
            far: tally.far(),
            kinds: tally.kinds(),
            routes: tally.routes(),
            keys: tally.keys(),
        })
    }
}

/// Windows of `length` tokens, row-major, as inputs `[B, length - 1]` and what comes after each of them.
pub(crate) fn batch(tokens: &[i32], length: usize, device: &Device) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let part = |from: usize| {
        let rows = tokens.chunks(length);
        let values: Vec<i32> = rows.flat_map(|row| row[from..from + length - 1].iter().copied()).collect();
        let shape = [tokens.len() / length, length - 1];
        Tensor::<2, Int>::from_data(TensorData::new(values, shape), device)
    };
    (part(0), part(1))
}

/// The mean over all tokens of minus the log-probability of what comes after, in nats, `[1]`.
pub(crate) fn cross_entropy(logits: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<1> {
    let [batch, tokens, vocabulary] = logits.dims();
    let rows = batch * tokens;
    let log = log_softmax(logits.reshape([rows, vocabulary]), 1);
    log.gather(1, targets.reshape([rows, 1])).mean().neg()
}

/// Reads one number. Waits for the device.
pub(crate) fn scalar(tensor: &Tensor<1>) -> Result<f64> {
    tensor.clone().try_into_scalar::<f32>().map(f64::from).map_err(Error::runtime)
}
