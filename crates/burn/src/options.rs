use bifocal::{Problem, Result, Threshold};

/// What is done to the attention scores besides masking.
///
/// ```
/// use bifocal_burn::AttentionOptions;
///
/// let options = AttentionOptions::default().with_softcap(50.0);
/// assert_eq!(options.softcap, Some(50.0));
/// assert_eq!(options.scale, None); // 1/sqrt(D)
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct AttentionOptions {
    /// Factor on `q . k`; 1/sqrt(D) unless set (arXiv 1706.03762, section 3.2.1).
    pub scale: Option<f32>,
    /// Scores become `cap * tanh(score / cap)` after scaling (Gemma 2, arXiv 2408.00118, section 2).
    pub softcap: Option<f32>,
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
