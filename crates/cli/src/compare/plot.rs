//! The comparison as an SVG: panels side by side, each with lines over a logarithmic or a linear axis.

use anyhow::{Result, anyhow, bail};
use plotters::prelude::*;

use super::{DENSE, Section};
use crate::timings::Report;

const PANEL: (u32, u32) = (560, 420);
const COLOURS: [RGBColor; 8] = [
    RGBColor(8, 48, 107),
    RGBColor(217, 95, 2),
    RGBColor(27, 158, 119),
    RGBColor(117, 112, 179),
    RGBColor(231, 41, 138),
    RGBColor(102, 166, 30),
    RGBColor(166, 118, 29),
    RGBColor(102, 102, 102),
];

struct Panel {
    title: String,
    x_title: &'static str,
    y_title: &'static str,
    /// Whether x is the logarithm, to base 2, of what is written on the axis.
    log_x: bool,
    series: Vec<Series>,
}

struct Series {
    label: String,
    points: Vec<(f64, f64)>,
}

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
    let mut svg = String::new();
    {
        let size = (PANEL.0 * panels.len() as u32, PANEL.1);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let parts = area.split_evenly((1, panels.len()));
        let drawn = panels.iter().zip(&parts).try_for_each(|(panel, part)| draw(panel, part));
        // Once for all of them: it ends the document.
        drawn
            .and_then(|()| Ok(area.present()?))
            .map_err(|error| anyhow!("cannot draw the comparison: {error}"))?;
    }
    Ok(svg)
}

fn rates(reports: &[Report]) -> Panel {
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
    Panel { title, x_title: "tokens", y_title: "TFLOP/s", log_x: true, series }
}

fn by_routine(routine: Option<&str>) -> String {
    routine.map_or(String::new(), |routine| format!(" by {routine}"))
}

fn heads(report: &Report) -> String {
    match report.heads == report.kv_heads {
        true => format!("{} heads", report.heads),
        false => format!("{}/{} heads", report.heads, report.kv_heads),
    }
}

/// Of each row that has a dense peer, how many times as fast as the fastest of them it is.
fn speed_up(section: &Section, row: &super::Row) -> Option<f64> {
    let dense = section.peers.iter().zip(&row.peers).filter(|(peer, _)| DENSE.contains(peer));
    let fastest = dense.filter_map(|(_, ms)| *ms).min_by(f64::total_cmp)?;
    Some(fastest / row.ms)
}

fn speed_ups(sections: &[Section]) -> Panel {
    let mut series = Vec::new();
    for section in sections {
        for row in &section.rows {
            let Some(times) = speed_up(section, row) else { continue };
            let share = row.far_share.map_or(String::new(), |_| share_asked(section, &row.case));
            let by = by_routine(row.routine.as_deref());
            let label = format!("{}{by}{share}, {}", row.case, heads(&section.ours));
            add(&mut series, label, vec![((row.length as f64).log2(), times)]);
        }
    }
    let title = "how many times as fast as the fastest dense peer".into();
    Panel { title, x_title: "tokens", y_title: "speed-up", log_x: true, series }
}

/// The share asked for, which is the same at every length.
fn share_asked(section: &Section, case: &str) -> String {
    let ours = &section.ours;
    let share = if case == "l2a" { ours.far_tokens } else { ours.far_share };
    let gates = ours.gates.as_deref().unwrap_or("random");
    share.map_or(String::new(), |share| format!(" {:.1} % ({gates}, window {})", share * 100.0, ours.window))
}

fn over_share(sections: &[Section]) -> Panel {
    let mut series = Vec::new();
    for section in sections.iter().filter(|section| section.ours.gates.as_deref() == Some("random")) {
        for row in section.rows.iter().filter(|row| row.case != "l2a") {
            let (Some(share), Some(times)) = (row.far_share, speed_up(section, row)) else { continue };
            let label = format!("{}, {} tokens, {}", row.case, row.length, heads(&section.ours));
            add(&mut series, label, vec![(share * 100.0, times)]);
        }
    }
    let title = "the same over the share of token-heads that look far, at random".into();
    Panel { title, x_title: "far, %", y_title: "speed-up", log_x: false, series }
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

fn draw(
    panel: &Panel,
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let points = || panel.series.iter().flat_map(|series| &series.points);
    let fold = |of: &dyn Fn(&(f64, f64)) -> f64| {
        points().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
    };
    let ((left, right), (_, top)) = (fold(&|point| point.0), fold(&|point| point.1));
    let (left, right) = if panel.log_x { (left.floor(), right.ceil()) } else { (0.0, right * 1.05) };
    // Room above the lines for the legend.
    let top = top * (1.1 + 0.09 * panel.series.len() as f64);
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 14))
        .margin(10)
        // The last number on the axis reaches beyond it.
        .margin_right(24)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(left..right.max(left + 1.0), 0.0..top)?;
    let tokens = |x: &f64| match panel.log_x {
        true => format!("{:.0}", x.exp2()),
        false => format!("{x:.0}"),
    };
    let ticks = if panel.log_x { (right - left) as usize + 1 } else { 8 };
    chart
        .configure_mesh()
        .x_labels(ticks.max(2))
        .x_label_formatter(&tokens)
        .y_label_formatter(&|y| format!("{y}"))
        .x_desc(panel.x_title)
        .y_desc(panel.y_title)
        .light_line_style(WHITE)
        .draw()?;
    for (series, &colour) in panel.series.iter().zip(COLOURS.iter().cycle()) {
        let line = PathElement::new(series.points.clone(), colour.stroke_width(2));
        chart
            .draw_series([line])?
            .label(&series.label)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2)));
        chart.draw_series(series.points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    Ok(())
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
