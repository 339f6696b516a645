use std::{io, path::PathBuf};

/// What every fallible call of this crate returns.
pub type Result<T, E = Error> = core::result::Result<T, E>;

/// Why a model could not be made, trained, saved or loaded. Messages say what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Attention, routers or the device refused.
    #[error(transparent)]
    Attention(#[from] bifocal::Error),
    /// A setting makes no sense.
    #[error("{setting} is {found}, expected {expected}")]
    Setting {
        /// Which setting, by its path in the configuration.
        setting: &'static str,
        /// Its value.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// A file or folder could not be read or written.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// `read`, `write`, ..
        action: &'static str,
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no text in the files and folders given.
    #[error(
        "no text in {paths}: {skipped} files are binary (a NUL byte near their beginning), the rest is empty"
    )]
    NoText {
        /// Where.
        paths: String,
        /// How many files were left out.
        skipped: usize,
    },
    /// The text is too short.
    #[error(
        "the {part} text has {found} tokens (bytes and document ends), expected at least {expected}: {why}; give more \
         text, a smaller batch or a shorter context"
    )]
    TooShort {
        /// `training` or `validation`.
        part: &'static str,
        /// Tokens there are.
        found: usize,
        /// Tokens that are needed.
        expected: usize,
        /// What they are needed for.
        why: String,
    },
    /// A file is no checkpoint, or of another version.
    #[error("{} is not a checkpoint of this version: {reason}", .path.display())]
    NotACheckpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A checkpoint ends too early.
    #[error("the checkpoint {} is cut off: {found} bytes, expected {expected}", .path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes there are.
        found: u64,
        /// Bytes there should be, as far as can be told.
        expected: u64,
    },
    /// A checkpoint's bytes are not those that were written.
    #[error("the checkpoint {} is damaged: {reason}", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// A checkpoint has weights alone, which no run goes on from.
    #[error("{} has weights alone: their model can be used, but a run does not go on from it", .path.display())]
    WeightsAlone {
        /// The file.
        path: PathBuf,
    },
    /// A checkpoint belongs to another run.
    #[error("the checkpoint is of another run: its {setting} is {found}, expected {expected}")]
    OtherRun {
        /// Which setting differs, by its path in the configuration.
        setting: String,
        /// The checkpoint's.
        found: String,
        /// What was asked for.
        expected: String,
    },
    /// A line of a metrics file makes no sense.
    #[error("line {line} of {} is no measurement: {reason}", .path.display())]
    Metrics {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A metrics file has no step with shares of far.
    #[error("{} says of no step up to {last} how often routers look far: measure it on a text", .path.display())]
    NoShares {
        /// The file.
        path: PathBuf,
        /// The last step that counts.
        last: u64,
    },
    /// Training has diverged.
    #[error(
        "the {what} is {value} at step {step}: training has diverged, start anew with a lower learning rate ({kept})"
    )]
    NotFinite {
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// Its value.
        value: f64,
        /// At which step.
        step: u64,
        /// Which checkpoint is intact.
        kept: String,
    },
    /// What a model says of a token is no number.
    #[error("the logit of token {token} is {value}: the model's weights are spoilt")]
    Logit {
        /// Which token.
        token: usize,
        /// Its logit.
        value: f32,
    },
}

impl Error {
    /// An [`Error::Setting`].
    pub(crate) fn setting(
        setting: &'static str,
        found: impl core::fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Self::Setting { setting, found: found.to_string(), expected: expected.into() }
    }

    /// Turns what the file system says into an [`Error::Io`].
    pub(crate) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    /// What Burn says about a tensor that could not be read.
    pub(crate) fn runtime(error: impl core::fmt::Display) -> Self {
        Self::Attention(bifocal::Error::Runtime(error.to_string()))
    }
}
