//! Runs as figures.

use bifocal_lm::{TokenKind, metrics::mean_share};

use super::{Run, Summary};
use crate::plot::{Bars, Figure, Heat, Lines, Series};

/// Points that a line has at most.
const POINTS: usize = 400;

/// One run closely; several side by side.
pub(super) fn of(runs: &[Run], summaries: &[Summary]) -> Vec<Figure> {
    match runs {
        [run] => close(run),
        _ => side_by_side(runs, summaries),
    }
}

/// Loss; where there are routers, shares over steps by layer, by head, and by kind of token.
fn close(run: &Run) -> Vec<Figure> {
    let training = series("training", run.steps().map(|line| (line.step, line.loss)));
    let validation = series("validation", run.validations().map(|line| (line.step, line.loss)));
    let mut figures = vec![over_steps("loss, nats per token", vec![training, validation])];
    let Some(last) = run.validations().next_back() else { return figures };
    if mean_share(&last.far).is_none() {
        return figures;
    }
    let layers = last.far.iter().enumerate().filter(|(_, shares)| shares.is_some());
    let of_layer = |layer: usize| {
        let shares = run.steps().filter_map(move |line| Some((line.step, line.far.get(layer)?)));
        let shares =
            shares.filter_map(|(step, far)| Some((step, mean_share(std::slice::from_ref(far))? * 100.0)));
        series(&format!("layer {layer}"), shares)
    };
    figures.push(over_steps("share of far, %", layers.map(|(layer, _)| of_layer(layer)).collect()));
    let rows = last.far.iter().enumerate();
    let rows = rows.map(|(layer, shares)| (format!("layer {layer}"), shares.clone().unwrap_or_default()));
    let title = "share of far by layer and head, %, last validation".to_string();
    figures.push(Figure::Heat(Heat { title, rows: rows.collect() }));
    let bars = last.kinds.iter().map(|share| (kind(share.kind).to_string(), share.far));
    let title = "share of far by kind of token, last validation".to_string();
    figures.push(Figure::Bars(Bars { title, bars: bars.collect() }));
    figures
}

fn kind(kind: TokenKind) -> &'static str {
    match kind {
        TokenKind::Letter => "letter",
        TokenKind::Digit => "digit",
        TokenKind::Space => "space",
        TokenKind::Punctuation => "punctuation",
        TokenKind::Other => "other",
    }
}

/// Validation loss and shares over steps, and both over the window at the end.
fn side_by_side(runs: &[Run], summaries: &[Summary]) -> Vec<Figure> {
    let losses = |run: &Run| series(&run.name, run.validations().map(|line| (line.step, line.loss)));
    let mut figures = vec![over_steps("validation loss, nats per token", runs.iter().map(losses).collect())];
    let shares = |run: &Run| {
        let shares = run.steps().filter_map(|line| Some((line.step, mean_share(&line.far)? * 100.0)));
        series(&run.name, shares)
    };
    let shares: Vec<Series> = runs.iter().map(shares).filter(|series| !series.points.is_empty()).collect();
    if !shares.is_empty() {
        figures.push(over_steps("share of far, %", shares));
    }
    let shares = over_window(summaries, |summary| Some(summary.far_share? * 100.0));
    let losses = over_window(summaries, |summary| Some(summary.validation_loss));
    for (title, y_title, series) in [
        ("share of far over window, last validation", "far, %", shares),
        ("validation loss over window", "nats per token", losses),
    ] {
        if !series.is_empty() {
            let title = title.to_string();
            figures.push(Figure::Lines(Lines {
                title,
                x_title: "window, keys",
                y_title,
                log_x: true,
                series,
            }));
        }
    }
    figures
}

fn over_steps(title: &str, series: Vec<Series>) -> Figure {
    Figure::Lines(Lines { title: title.to_string(), x_title: "step", y_title: "", log_x: false, series })
}

/// A line of at most [`POINTS`] points: means of neighbours where there are more.
fn series(label: &str, points: impl Iterator<Item = (u64, f64)>) -> Series {
    let points: Vec<(f64, f64)> = points.map(|(step, y)| (step as f64, y)).collect();
    let width = points.len().div_ceil(POINTS).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let count = chunk.len() as f64;
        let sum = chunk.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / count, sum.1 / count)
    };
    Series { label: label.to_string(), points: points.chunks(width).map(mean).collect() }
}

/// What runs with the same window measured, one number per seed.
type OfWindows = Vec<(usize, Vec<f64>)>;

/// A line per kind of attention; runs with the same window, of other seeds, count by their mean.
fn over_window(summaries: &[Summary], y: impl Fn(&Summary) -> Option<f64>) -> Vec<Series> {
    let mut lines: Vec<(String, OfWindows)> = Vec::new();
    for summary in summaries {
        let (Some(window), Some(y)) = (summary.window, y(summary)) else { continue };
        let kind = summary.attention.split(' ').next().unwrap_or_default().to_string();
        let line = entry(&mut lines, kind);
        entry(line, window).push(y);
    }
    let mut series = Vec::new();
    for (label, mut line) in lines {
        line.sort_by_key(|(window, _)| *window);
        let mean = |(window, ys): (usize, Vec<f64>)| {
            ((window as f64).log2(), ys.iter().sum::<f64>() / ys.len() as f64)
        };
        series.push(Series { label, points: line.into_iter().map(mean).collect() });
    }
    series
}

/// What belongs to a key, in order of first appearance.
fn entry<K: PartialEq, V: Default>(entries: &mut Vec<(K, V)>, key: K) -> &mut V {
    let at = entries.iter().position(|(other, _)| *other == key).unwrap_or_else(|| {
        entries.push((key, V::default()));
        entries.len() - 1
    });
    &mut entries[at].1
}
