//! What a run measures, as lines of JSON.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{Collapse, Error, Result, TokenKind, files};

/// The share of far per layer and router head; `None` for layers without a router.
pub type FarShares = Vec<Option<Vec<f64>>>;

/// One line of a metrics file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Line {
    /// A training step.
    Step(StepLine),
    /// A validation.
    Validation(ValidationLine),
    /// A gate has collapsed.
    Collapse(Collapse),
}

/// A training step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepLine {
    /// Which step, from 1.
    pub step: u64,
    /// Mean cross-entropy in nats per token, without penalties.
    pub loss: f64,
    /// What routers paid, weighted.
    pub penalty: f64,
    /// The norm of all gradients before they were clipped.
    pub gradient_norm: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// Tokens per second since the line before.
    pub tokens_per_s: f64,
    /// Shares of far in this step.
    pub far: FarShares,
    /// The thresholds of gates that a budget steers, per layer; empty without a budget.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub thresholds: Vec<f64>,
}

/// A validation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidationLine {
    /// After which step.
    pub step: u64,
    /// Mean cross-entropy in nats per token.
    pub loss: f64,
    /// Shares of far over all windows.
    pub far: FarShares,
    /// Shares by kind of token, over all layers with a router and all heads; empty without routers.
    pub kinds: Vec<KindShare>,
    /// The share of each route, the far one last, per layer; `None` for layers without a router.
    #[serde(default)]
    pub routes: Vec<Option<Vec<f64>>>,
    /// Keys that a query sees, the mean over layers, heads and tokens; `None` where
    /// [a layer](crate::AttentionKind::keys) does not say.
    #[serde(default)]
    pub keys: Option<f64>,
}

/// The share of far of one kind of token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KindShare {
    /// Which kind.
    pub kind: TokenKind,
    /// Tokens of that kind that were seen.
    pub tokens: u64,
    /// Their share of far.
    pub far: f64,
}

impl Line {
    /// The step that the line is about.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(line) => line.step,
            Self::Validation(line) => line.step,
            Self::Collapse(line) => line.step,
        }
    }
}

/// The mean share over all layers with a router and all heads; `None` without routers.
pub fn mean_share(far: &[Option<Vec<f64>>]) -> Option<f64> {
    let heads: Vec<f64> = far.iter().flatten().flatten().copied().collect();
    (!heads.is_empty()).then(|| heads.iter().sum::<f64>() / heads.len() as f64)
}

/// Reads all lines. A last line that was cut off, by a crash while it was written, does not count.
///
/// # Errors
/// [`Error::Io`]; [`Error::Metrics`] naming the first line that makes no sense.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |(index, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|error| Error::Metrics {
            path: path.to_path_buf(),
            line: index + 1,
            reason: error.to_string(),
        })
    };
    whole.lines().enumerate().map(parse).collect()
}

/// The mean shares of far over the last `records` steps that a metrics file tells of, up to step `last`.
///
/// # Errors
/// As [`read`]; [`Error::NoShares`] when there is no such step; [`Error::Metrics`] when they are of different models.
pub fn recorded_far(path: &Path, last: u64, records: usize) -> Result<FarShares> {
    let lines = read(path)?;
    let steps = lines.iter().enumerate().rev().filter_map(|(index, line)| match line {
        Line::Step(line) if line.step <= last => Some((index + 1, &line.far)),
        _ => None,
    });
    let mut mean: Option<FarShares> = None;
    let count = steps.clone().take(records).count() as f64;
    for (line, far) in steps.take(records) {
        let sum = mean.get_or_insert_with(|| {
            far.iter().map(|heads| heads.as_ref().map(|heads| vec![0.0; heads.len()])).collect()
        });
        let heads =
            |far: &FarShares| -> Vec<_> { far.iter().map(|heads| heads.as_ref().map(Vec::len)).collect() };
        if heads(sum) != heads(far) {
            let reason = "it has other layers or heads than the steps after it".to_string();
            return Err(Error::Metrics { path: path.to_path_buf(), line, reason });
        }
        for (sum, share) in sum.iter_mut().flatten().flatten().zip(far.iter().flatten().flatten()) {
            *sum += share / count;
        }
    }
    mean.ok_or_else(|| Error::NoShares { path: path.to_path_buf(), last })
}

/// A metrics file that grows.
#[derive(Debug)]
pub(crate) struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Starts a file, or goes on with one: lines of steps beyond `resumed` are dropped, because those steps are taken
    /// again.
    pub(crate) fn open(path: &Path, resumed: Option<u64>) -> Result<Self> {
        let kept = match resumed {
            Some(step) if path.exists() => {
                let mut lines = read(path)?;
                lines.retain(|line| line.step() <= step);
                lines
            }
            _ => Vec::new(),
        };
        files::replace(path, |to| kept.iter().try_for_each(|line| to.write_all(&bytes(line)?)))?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io("write", path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    pub(crate) fn write(&mut self, line: &Line) -> Result<()> {
        // At once: what a run has measured is there to be looked at while it goes on.
        let written = bytes(line).and_then(|bytes| self.file.write_all(&bytes));
        written.map_err(Error::io("write", &self.path))
    }
}

/// A line, its end included.
fn bytes(line: &Line) -> std::io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Side;

    fn lines() -> Vec<Line> {
        let step = |step| {
            Line::Step(StepLine {
                step,
                loss: 5.5,
                penalty: 0.25,
                gradient_norm: 1.5,
                learning_rate: 1e-3,
                tokens_per_s: 1234.5,
                far: vec![None, Some(vec![0.5, 0.25])],
                thresholds: Vec::new(),
            })
        };
        let validation = Line::Validation(ValidationLine {
            step: 20,
            loss: 5.0,
            far: vec![None, Some(vec![0.5, 0.0])],
            kinds: vec![KindShare { kind: TokenKind::Digit, tokens: 7, far: 0.125 }],
            routes: vec![None, Some(vec![0.75, 0.25])],
            keys: Some(12.5),
        });
        let collapse = Line::Collapse(Collapse { step: 20, layer: 1, head: 1, side: Side::Near, share: 0.0 });
        vec![step(10), step(20), validation, collapse, step(30)]
    }

    fn write(path: &Path, resumed: Option<u64>, lines: &[Line]) {
        let mut metrics = Metrics::open(path, resumed).unwrap();
        lines.iter().for_each(|line| metrics.write(line).unwrap());
    }

    #[test]
    fn lines_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        write(&path, None, &lines());
        assert_eq!(read(&path).unwrap(), lines());
        // Every line is JSON on its own, and says what it is.
        let text = fs::read_to_string(&path).unwrap();
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!((&first["event"], &first["step"]), (&"step".into(), &10.into()));
    }

    #[test]
    fn a_resumed_run_drops_what_it_takes_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        write(&path, None, &lines());
        write(&path, Some(20), &lines()[4..]);
        assert_eq!(read(&path).unwrap(), lines());
        write(&path, Some(15), &[]);
        assert_eq!(read(&path).unwrap(), lines()[..1]);
    }

    #[test]
    fn a_last_line_cut_off_does_not_count_and_any_other_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        write(&path, None, &lines());
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() - 9]).unwrap();
        assert_eq!(read(&path).unwrap(), lines()[..4]);
        fs::write(&path, text.replacen("\"loss\":5.0", "\"loss\":", 1)).unwrap();
        let error = read(&path).unwrap_err();
        assert!(matches!(error, Error::Metrics { line: 3, .. }), "{error}");
        fs::write(&path, "").unwrap();
        assert!(read(&path).unwrap().is_empty());
    }

    #[test]
    fn recorded_shares_are_those_of_the_last_steps() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut lines = lines();
        if let Line::Step(step) = &mut lines[4] {
            step.far[1] = Some(vec![0.0, 0.75]);
        }
        write(&path, None, &lines);
        let far = |last, records| recorded_far(&path, last, records).unwrap();
        assert_eq!(far(30, 1), [None, Some(vec![0.0, 0.75])]);
        assert_eq!(far(30, 2), [None, Some(vec![0.25, 0.5])]);
        // As many as there are.
        assert_eq!(far(20, 9), [None, Some(vec![0.5, 0.25])]);
        let error = recorded_far(&path, 9, 3).unwrap_err();
        assert!(matches!(error, Error::NoShares { last: 9, .. }), "{error}");
        if let Line::Step(step) = &mut lines[1] {
            step.far[1] = Some(vec![0.5]);
        }
        write(&path, None, &lines);
        let error = recorded_far(&path, 30, 9).unwrap_err();
        assert!(matches!(error, Error::Metrics { line: 2, .. }), "{error}");
        assert_eq!(far(30, 1), [None, Some(vec![0.0, 0.75])]);
    }

    #[test]
    fn the_mean_share_is_over_heads() {
        assert_eq!(mean_share(&[None, Some(vec![0.5, 0.25]), Some(vec![0.0])]), Some(0.25));
        assert_eq!(mean_share(&[None, None]), None);
    }
}
