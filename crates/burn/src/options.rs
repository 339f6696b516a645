use bifocal::{Problem, Result, Threshold};
use burn::tensor::Tensor;

/// Which branches a training step computes besides those that the routes ask for. A score's gradient is, by the
/// straight-through estimator (arXiv 1308.3432, section 3), what its branch gives at that row: `dL/dp_k = <dL/do, a_k>`
/// for a choice, `dL/dr = <dL/do, a_far - a_near>` for a gate, summed over the query heads of the router head.
///
/// Queries, keys and values get the same gradients either way: those of the rows as they were routed. Where the scores
/// take no part in autodiff nothing more is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Training {
    /// Every branch for every row, so that every score gets its gradient: how AHA trains (arXiv 2512.22562), and L2A in
    /// its dense passes (the "stochastic leakage" in the code of arXiv 2603.17484: each layer, each step, with
    /// probability 0.1).
    #[default]
    Exact,
    /// Full attention on its routed rows alone, windows for every row: L2A's other passes. A closed gate gets no
    /// gradient. A choice of a window counts full attention as what the window gave, so that it is neither wanted nor
    /// shunned.
    Sparse,
}

/// What is done to the attention scores besides masking, and what training needs.
///
/// ```
/// use bifocal_burn::AttentionOptions;
///
/// let options = AttentionOptions::default().with_softcap(50.0);
/// assert_eq!(options.softcap, Some(50.0));
/// assert_eq!(options.scale, None); // 1/sqrt(D)
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct AttentionOptions {
    /// Factor on `q . k`; 1/sqrt(D) unless set (arXiv 1706.03762, section 3.2.1).
    pub scale: Option<f32>,
    /// Scores become `cap * tanh(score / cap)` after scaling (Gemma 2, arXiv 2408.00118, section 2).
    pub softcap: Option<f32>,
    /// `[H]`: a learned logit that joins the softmax of every row of its head with a value of zero (gpt-oss).
    pub sink_logits: Option<Tensor<1>>,
    /// Which branches a training step computes.
    pub training: Training,
}

impl AttentionOptions {
    /// Sets the factor on the scores. It has to be finite; attention checks it.
    pub fn with_scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Sets the softcap. It has to be finite and positive; attention checks it.
    pub fn with_softcap(self, softcap: f32) -> Self {
        Self { softcap: Some(softcap), ..self }
    }

    /// Adds one sink logit per query head, of any float type.
    pub fn with_sink_logits(self, sink_logits: Tensor<1>) -> Self {
        Self { sink_logits: Some(sink_logits), ..self }
    }

    /// Sets which branches a training step computes.
    pub fn with_training(self, training: Training) -> Self {
        Self { training, ..self }
    }

    pub(crate) fn apply(&self, problem: Problem) -> Result<Problem> {
        let problem = match self.scale {
            Some(scale) => problem.with_scale(scale)?,
            None => problem,
        };
        match self.softcap {
            Some(softcap) => problem.with_softcap(softcap),
            None => Ok(problem),
        }
    }
}

/// When a linear gate opens: `r = sigmoid(z / temperature)` against a threshold.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GateOptions {
    /// Which scores are far; strictly between 0 and 1.
    pub threshold: Threshold,
    /// What the logit is divided by; finite and positive.
    pub temperature: f32,
}

impl GateOptions {
    /// AHA's gate: far iff `sigmoid(z) > 0.5` (arXiv 2512.22562).
    pub const fn aha() -> Self {
        Self { threshold: Threshold::Above(0.5), temperature: 1.0 }
    }

    /// L2A's gate: far iff `sigmoid(z / 0.1) >= 0.5`, so that `z = 0` attends (arXiv 2603.17484).
    pub const fn l2a() -> Self {
        Self { threshold: Threshold::AtLeast(0.5), temperature: 0.1 }
    }

    /// Sets when the gate opens.
    pub const fn with_threshold(self, threshold: Threshold) -> Self {
        Self { threshold, ..self }
    }

    /// Sets the temperature.
    pub const fn with_temperature(self, temperature: f32) -> Self {
        Self { temperature, ..self }
    }
}
