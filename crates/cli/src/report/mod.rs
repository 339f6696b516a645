//! `bifocal report`: what training runs have measured.

mod figures;
mod table;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use bifocal_lm::{
    Collapse, KindShare, Line, METRICS, StepLine, TrainingConfig, ValidationLine,
    metrics::{self, mean_share},
};
use clap::Args;
use serde::Serialize;

use crate::{output, plot, train};

#[derive(Args)]
pub(crate) struct Options {
    /// Folders of runs that `bifocal train` has made.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Draw loss and shares to this file.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Write the table as Markdown to this file.
    #[arg(long, value_name = "FILE.md")]
    markdown: Option<PathBuf>,
    /// Write what is in the table as JSON to this file (`-` for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A run and what it measured.
struct Run {
    name: String,
    config: TrainingConfig,
    lines: Vec<Line>,
}

/// A run in numbers, as of its last validation.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Summary {
    run: String,
    attention: String,
    /// The window, where all layers have the same.
    window: Option<usize>,
    seed: u64,
    steps: u64,
    /// Steps that the run was to take.
    of_steps: u64,
    loss: f64,
    validation_loss: f64,
    /// The mean share of far over layers with a router and heads.
    far_share: Option<f64>,
    /// The share of the head that looks far least often, and of the one that does most often.
    far_by_head: Option<[f64; 2]>,
    /// Keys that a query sees, the mean over layers, heads and tokens.
    keys: Option<f64>,
    /// The share of each route per layer, the far one last.
    routes: Vec<Option<Vec<f64>>>,
    kinds: Vec<KindShare>,
    collapses: usize,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let runs = options.runs.iter().map(|folder| Run::read(folder)).collect::<Result<Vec<_>>>()?;
    let summaries = runs.iter().map(Run::summary).collect::<Result<Vec<_>>>()?;
    if let Some(path) = &options.plot {
        output::write(path, plot::svg(&figures::of(&runs, &summaries))?.as_bytes())?;
    }
    if let Some(path) = &options.markdown {
        output::write(path, table::markdown(&summaries).as_bytes())?;
    }
    if let Some(path) = &options.json {
        output::write_json(path, &summaries)?;
    }
    if options.json.as_deref() != Some(Path::new("-")) {
        println!("{}", table::terminal(&summaries));
    }
    Ok(())
}

impl Run {
    fn read(folder: &Path) -> Result<Self> {
        let config = train::Run::read(folder)?.config;
        let lines = metrics::read(&folder.join(METRICS))?;
        let name = folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into_owned();
        Ok(Self { name, config, lines })
    }

    fn steps(&self) -> impl DoubleEndedIterator<Item = &StepLine> {
        self.lines.iter().filter_map(|line| match line {
            Line::Step(line) => Some(line),
            _ => None,
        })
    }

    fn validations(&self) -> impl DoubleEndedIterator<Item = &ValidationLine> {
        self.lines.iter().filter_map(|line| match line {
            Line::Validation(line) => Some(line),
            _ => None,
        })
    }

    fn collapses(&self) -> impl Iterator<Item = &Collapse> {
        self.lines.iter().filter_map(|line| match line {
            Line::Collapse(line) => Some(line),
            _ => None,
        })
    }

    fn summary(&self) -> Result<Summary> {
        let (Some(step), Some(validation)) = (self.steps().next_back(), self.validations().next_back())
        else {
            bail!("{} has no validation yet: let it run on", self.name)
        };
        let heads = || validation.far.iter().flatten().flatten().copied();
        let far_share = mean_share(&validation.far);
        let kinds = &self.config.model.attention;
        let window = kinds.first().and_then(|kind| kind.window());
        Ok(Summary {
            run: self.name.clone(),
            attention: train::kinds(&self.config),
            window: window.filter(|_| kinds.iter().all(|kind| kind.window() == window)),
            seed: self.config.seed,
            steps: step.step,
            of_steps: self.config.steps,
            loss: step.loss,
            validation_loss: validation.loss,
            far_share,
            far_by_head: far_share
                .map(|_| [heads().fold(f64::INFINITY, f64::min), heads().fold(f64::NEG_INFINITY, f64::max)]),
            keys: validation.keys,
            routes: validation.routes.clone(),
            kinds: validation.kinds.clone(),
            collapses: self.collapses().count(),
        })
    }
}

#[cfg(test)]
mod tests {
    use bifocal_lm::{AttentionKind, Side, TokenKind};

    use super::*;

    /// A run of two layers of two heads that has got to step 20.
    fn sample(name: &str, kind: AttentionKind, far: Option<[f64; 2]>) -> Run {
        let mut config = TrainingConfig::default();
        config.model.layers = 2;
        config.steps = 20;
        config.model.attention = vec![kind];
        let far = vec![None, far.map(|far| far.to_vec())];
        let step = |step, loss| {
            Line::Step(StepLine {
                step,
                loss,
                penalty: 0.0,
                gradient_norm: 1.0,
                learning_rate: 1e-3,
                tokens_per_s: 1000.0,
                far: far.clone(),
                thresholds: Vec::new(),
            })
        };
        let kinds = match far[1] {
            Some(_) => vec![KindShare { kind: TokenKind::Digit, tokens: 5, far: 0.2 }],
            None => Vec::new(),
        };
        let validation = |step, loss| {
            let routes = far.iter().map(|heads| heads.as_ref().map(|_| vec![0.75, 0.25])).collect();
            let (far, kinds) = (far.clone(), kinds.clone());
            Line::Validation(ValidationLine { step, loss, far, kinds, routes, keys: Some(9.5) })
        };
        let collapse = Collapse { step: 20, layer: 1, head: 0, side: Side::Near, share: 0.0 };
        let lines = vec![
            step(10, 4.0),
            validation(10, 4.5),
            step(20, 3.0),
            validation(20, 3.5),
            Line::Collapse(collapse),
        ];
        Run { name: name.to_string(), config, lines }
    }

    fn runs() -> Vec<Run> {
        let aha = |window| AttentionKind::Aha { window };
        vec![
            sample("aha-16", aha(16), Some([0.0, 0.5])),
            sample("aha-32", aha(32), Some([0.0, 0.25])),
            sample("dense", AttentionKind::Full, None),
        ]
    }

    #[test]
    fn a_summary_is_of_the_last_validation() {
        let summary = runs()[0].summary().unwrap();
        assert_eq!((summary.attention.as_str(), summary.window), ("aha 16", Some(16)));
        assert_eq!((summary.loss, summary.validation_loss, summary.collapses), (3.0, 3.5, 1));
        assert_eq!((summary.far_share, summary.far_by_head), (Some(0.25), Some([0.0, 0.5])));
        let mut early = sample("early", AttentionKind::Full, None);
        early.lines.truncate(1);
        assert!(early.summary().unwrap_err().to_string().contains("early has no validation"));
    }

    #[test]
    fn tables_have_a_row_per_run() {
        let summaries: Vec<_> = runs().iter().map(|run| run.summary().unwrap()).collect();
        let text = table::markdown(&summaries);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert_eq!(
            lines[0],
            "| run | attention | seed | steps | loss | validation loss | far | far by head | keys | collapses |"
        );
        assert_eq!(
            lines[2],
            "| aha-16 | aha 16 | 1 | 20 | 3.000 | 3.5000 | 25.0 % | 0.0 to 50.0 % | 9.5 | 1 |"
        );
        assert_eq!(lines[4], "| dense | full | 1 | 20 | 3.000 | 3.5000 |  |  | 9.5 | 1 |");
        assert!(table::terminal(&summaries).to_string().contains("aha-32"));
    }

    #[test]
    fn one_run_is_drawn_closely_and_several_side_by_side() {
        let runs = runs();
        let svg = |runs: &[Run]| {
            let summaries: Vec<_> = runs.iter().map(|run| run.summary().unwrap()).collect();
            plot::svg(&figures::of(runs, &summaries)).unwrap()
        };
        let one = svg(&runs[..1]);
        for text in ["loss", "layer 1", "share of far by layer and head", "digit", "50"] {
            assert!(one.contains(text), "{text}: {one}");
        }
        let dense = svg(&runs[2..]);
        assert!(!dense.contains("layer 1"), "there is nothing to show of routers");
        let all = svg(&runs);
        for text in ["aha-16", "dense", "share of far over window", "validation loss over window"] {
            assert!(all.contains(text), "{text}: {all}");
        }
        for svg in [one, dense, all] {
            assert_eq!(svg.matches("</svg>").count(), 1, "one document, ended once");
        }
    }
}
