//! The comparison as an SVG: panels side by side, each with lines over a logarithmic or a linear axis.

use anyhow::{Result, bail};

use super::{DENSE, Section};
use crate::{
    plot::{self, Figure, Lines, Series},
    timings::Report,
};

/// Dense rates over length; speed-ups over the fastest dense attention, over length and over the share of far routes.
/// A line of one point is left out, and so is a panel without lines.
pub(super) fn svg(reports: &[Report], sections: &[Section]) -> Result<String> {
    let mut panels = vec![rates(reports), speed_ups(sections), over_share(sections)];
    for panel in &mut panels {
        panel.series.retain(|series| series.points.len() > 1);
    }
    panels.retain(|panel| !panel.series.is_empty());
    if panels.is_empty() {
        bail!("nothing to draw a line through: the files have one length and one share");
    }
    plot::svg(&panels.into_iter().map(Figure::Lines).collect::<Vec<_>>())
}

fn rates(reports: &[Report]) -> Lines {
    let mut series: Vec<Series> = Vec::new();
    for report in reports {
        for case in DENSE {
            let timings = report.timings.iter().filter(|timing| timing.case == case);
            let by = timings.clone().find_map(|timing| timing.routine.as_deref());
            let point = |length: usize, gflops: f64| ((length as f64).log2(), gflops / 1e3);
            let points = timings.filter_map(|timing| Some(point(timing.length, timing.useful_gflops?)));
            let whose = if report.library.is_none() { "bifocal" } else { case };
            let label = format!("{whose}{}, {} x {}", by_routine(by), heads(report), report.head_dim);
            add(&mut series, label, points.collect());
        }
    }
    let title = "dense causal attention".into();
    Lines { title, x_title: "tokens", y_title: "TFLOP/s", log_x: true, series }
}

fn by_routine(routine: Option<&str>) -> String {
    routine.map_or(String::new(), |routine| format!(" by {routine}"))
}

/// The heads, and of decode steps the sequences as well.
fn heads(report: &Report) -> String {
    let heads = match report.heads == report.kv_heads {
        true => format!("{} heads", report.heads),
        false => format!("{}/{} heads", report.heads, report.kv_heads),
    };
    match report.queries {
        Some(_) => format!("decode of {} x {heads}", report.batch),
        None => heads,
    }
}

/// Of each row that has a dense peer, how many times as fast as the fastest of them it is.
fn speed_up(section: &Section, row: &super::Row) -> Option<f64> {
    let dense = section.peers.iter().zip(&row.peers).filter(|(peer, _)| DENSE.contains(peer));
    let fastest = dense.filter_map(|(_, ms)| *ms).min_by(f64::total_cmp)?;
    Some(fastest / row.ms)
}

fn speed_ups(sections: &[Section]) -> Lines {
    let mut series = Vec::new();
    for section in sections {
        for row in &section.rows {
            let Some(times) = speed_up(section, row) else { continue };
            let share = row.far_share.map_or(String::new(), |share| share_asked(section, &row.case, share));
            let by = by_routine(row.routine.as_deref());
            let label = format!("{}{by}{share}, {}", row.case, heads(&section.ours));
            add(&mut series, label, vec![((row.length as f64).log2(), times)]);
        }
    }
    let title = "how many times as fast as the fastest dense peer".into();
    Lines { title, x_title: "tokens", y_title: "speed-up", log_x: true, series }
}

/// The share asked for, which is the same at every length; of decode steps, which are of several, what came out.
fn share_asked(section: &Section, case: &str, share: f64) -> String {
    let ours = &section.ours;
    let asked = if case == "l2a" { ours.far_tokens } else { ours.far_share };
    let gates = ours.gates.as_deref().unwrap_or("random");
    format!(" {:.1} % ({gates}, window {})", asked.unwrap_or(share) * 100.0, ours.window)
}

fn over_share(sections: &[Section]) -> Lines {
    let mut series = Vec::new();
    for section in sections.iter().filter(|section| section.ours.gates.as_deref() == Some("random")) {
        for row in section.rows.iter().filter(|row| row.case != "l2a") {
            let (Some(share), Some(times)) = (row.far_share, speed_up(section, row)) else { continue };
            let label = format!("{}, {} tokens, {}", row.case, row.length, heads(&section.ours));
            add(&mut series, label, vec![(share * 100.0, times)]);
        }
    }
    let title = "the same over the share of token-heads that look far, at random".into();
    Lines { title, x_title: "far, %", y_title: "speed-up", log_x: false, series }
}

/// Adds points to the series of that label, in order of x.
fn add(series: &mut Vec<Series>, label: String, points: Vec<(f64, f64)>) {
    if points.is_empty() {
        return;
    }
    let at = series.iter().position(|other| other.label == label).unwrap_or_else(|| {
        series.push(Series { label, points: Vec::new() });
        series.len() - 1
    });
    series[at].points.extend(points);
    series[at].points.sort_by(|a, b| a.0.total_cmp(&b.0));
}

#[cfg(test)]
mod tests {
    use super::super::{join, tests::sample};
    use super::*;

    #[test]
    fn lines_are_drawn_where_there_are_two_points() {
        let reports = sample();
        let svg = svg(&reports, &join(&reports).unwrap()).unwrap();
        for text in
            ["dense causal attention", "bifocal by wgmma, 16 heads x 128", "sdpa_cudnn, 16 heads x 128"]
        {
            assert!(svg.contains(text), "{text}");
        }
        assert_eq!(svg.find("</svg>"), Some(svg.trim_end().len() - 6), "one document, ended once");
        // One share at each length: no line over shares.
        assert!(!svg.contains("over the share"));
        let mut more = sample();
        more.push(more[0].clone());
        for timing in &mut more[2].timings {
            timing.far_share = timing.far_share.map(|_| 0.28);
        }
        assert!(super::svg(&more, &join(&more).unwrap()).unwrap().contains("over the share"));
    }

    #[test]
    fn one_point_is_no_line() {
        let mut reports = sample();
        for report in &mut reports {
            report.timings.retain(|timing| timing.length == 16384);
        }
        assert!(svg(&reports, &join(&reports).unwrap()).is_err());
    }
}
