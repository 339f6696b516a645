//! Figures side by side as an SVG.

use anyhow::{Result, anyhow};
use plotters::{
    coord::{Shift, types::RangedCoordf64},
    prelude::*,
};

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

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// One of the figures of a drawing.
pub(crate) enum Figure {
    Lines(Lines),
    Scatter(Scatter),
    Heat(Heat),
    Bars(Bars),
}

/// Lines through points.
pub(crate) struct Lines {
    pub(crate) title: String,
    pub(crate) x_title: &'static str,
    pub(crate) y_title: &'static str,
    /// Whether x is the logarithm, to base 2, of what is written on the axis.
    pub(crate) log_x: bool,
    pub(crate) series: Vec<Series>,
}

/// Points of two quantities in the same unit, which lie on the diagonal where they are equal.
pub(crate) struct Scatter {
    pub(crate) title: String,
    pub(crate) x_title: &'static str,
    pub(crate) y_title: &'static str,
    /// Where a decision falls, on both axes.
    pub(crate) cut: Option<f64>,
    pub(crate) series: Vec<Series>,
}

/// One line, or one sort of points.
pub(crate) struct Series {
    pub(crate) label: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Shares as cells: the darker, the larger.
pub(crate) struct Heat {
    pub(crate) title: String,
    /// A label and the cells of each row; no cells where there is nothing to show.
    pub(crate) rows: Vec<(String, Vec<f64>)>,
}

/// Shares as bars.
pub(crate) struct Bars {
    pub(crate) title: String,
    pub(crate) bars: Vec<(String, f64)>,
}

/// A share's colour: from the page's white to a dark blue.
pub(crate) fn shade(share: f64) -> RGBColor {
    let fade = |full: f64| (255.0 - share * (255.0 - full)) as u8;
    RGBColor(fade(8.0), fade(48.0), fade(107.0))
}

/// Draws figures next to each other, at most three in a row.
pub(crate) fn svg(figures: &[Figure]) -> Result<String> {
    let columns = figures.len().clamp(1, 3);
    let rows = figures.len().div_ceil(columns);
    let mut svg = String::new();
    {
        let size = (PANEL.0 * columns as u32, PANEL.1 * rows as u32);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let parts = area.split_evenly((rows, columns));
        let draw = |(figure, part): (&Figure, &Area<'_>)| match figure {
            Figure::Lines(figure) => lines(figure, part),
            Figure::Scatter(figure) => scatter(figure, part),
            Figure::Heat(figure) => heat(figure, part),
            Figure::Bars(figure) => bars(figure, part),
        };
        let drawn: Drawn = area.fill(&WHITE).map_err(Into::into);
        let drawn = drawn.and_then(|()| figures.iter().zip(&parts).try_for_each(draw));
        // Once for all of them: it ends the document.
        drawn.and_then(|()| Ok(area.present()?)).map_err(|error| anyhow!("cannot draw: {error}"))?;
    }
    Ok(svg)
}

fn lines(figure: &Lines, area: &Area<'_>) -> Drawn {
    let points = || figure.series.iter().flat_map(|series| &series.points);
    let fold = |of: &dyn Fn(&(f64, f64)) -> f64| {
        points().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
    };
    let ((left, right), (_, top)) = (fold(&|point| point.0), fold(&|point| point.1));
    let (left, right) = if figure.log_x { (left.floor(), right.ceil()) } else { (0.0, right * 1.05) };
    // Room above the lines for the legend.
    let top = top * (1.1 + 0.09 * figure.series.len() as f64);
    // An axis needs some length, whatever is on it.
    let top = if top > 0.0 { top } else { 1.0 };
    let mut chart = ChartBuilder::on(area)
        .caption(&figure.title, ("sans-serif", 14))
        .margin(10)
        // The last number on the axis reaches beyond it.
        .margin_right(24)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(left..right.max(left + 1.0), 0.0..top)?;
    let tokens = |x: &f64| match figure.log_x {
        true => format!("{:.0}", x.exp2()),
        false => format!("{x:.0}"),
    };
    let ticks = if figure.log_x { (right - left) as usize + 1 } else { 8 };
    chart
        .configure_mesh()
        .x_labels(ticks.max(2))
        .x_label_formatter(&tokens)
        .y_label_formatter(&|y| format!("{y}"))
        .x_desc(figure.x_title)
        .y_desc(figure.y_title)
        .light_line_style(WHITE)
        .draw()?;
    for (series, &colour) in figure.series.iter().zip(COLOURS.iter().cycle()) {
        let line = PathElement::new(series.points.clone(), colour.stroke_width(2));
        chart
            .draw_series([line])?
            .label(&series.label)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2)));
        // Marks where there is room for them.
        if series.points.len() <= 20 {
            chart.draw_series(series.points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
        }
    }
    legend(&mut chart)
}

/// What the series are called, in the corner that they seldom reach.
fn legend<'a, 'b: 'a>(chart: &mut Chart<'a, 'b>) -> Drawn {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    Ok(())
}

fn scatter(figure: &Scatter, area: &Area<'_>) -> Drawn {
    let points = figure.series.iter().flat_map(|series| &series.points);
    let numbers = points.flat_map(|&(x, y)| [x, y]).chain(figure.cut);
    let (low, high) =
        numbers.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    let (low, high) = if low <= high { (low, high) } else { (0.0, 0.0) };
    // One range for both axes, with room around it.
    let margin = ((high - low) * 0.05).max(0.5);
    let (low, high) = (low - margin, high + margin);
    let mut chart = ChartBuilder::on(area)
        .caption(&figure.title, ("sans-serif", 14))
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(low..high, low..high)?;
    chart
        .configure_mesh()
        .x_labels(8)
        .y_labels(8)
        .x_desc(figure.x_title)
        .y_desc(figure.y_title)
        .light_line_style(WHITE)
        .draw()?;
    let grey = RGBColor(150, 150, 150);
    let cut = figure.cut.map(|cut| [[(low, cut), (high, cut)], [(cut, low), (cut, high)]]);
    for line in cut.into_iter().flatten().chain([[(low, low), (high, high)]]) {
        chart.draw_series([PathElement::new(line, grey)])?;
    }
    for (series, &colour) in figure.series.iter().zip(COLOURS.iter().cycle()) {
        let points = series.points.iter().map(|&point| Circle::new(point, 2, colour.mix(0.6).filled()));
        chart
            .draw_series(points)?
            .label(&series.label)
            .legend(move |(x, y)| Circle::new((x + 8, y), 3, colour.filled()));
    }
    legend(&mut chart)
}

/// Where a figure without axes begins and ends inside of its panel.
const FRAME: (i32, i32, i32, i32) = (72, 40, 536, 396);

fn heat(figure: &Heat, area: &Area<'_>) -> Drawn {
    let font = ("sans-serif", 12).into_font();
    area.draw(&Text::new(figure.title.as_str(), (FRAME.0, 14), ("sans-serif", 14).into_font()))?;
    let columns = figure.rows.iter().map(|(_, cells)| cells.len()).max().unwrap_or(0).max(1) as i32;
    let rows = figure.rows.len().max(1) as i32;
    let cell = ((FRAME.2 - FRAME.0) / columns, ((FRAME.3 - FRAME.1) / rows).min(48));
    for (row, (label, cells)) in figure.rows.iter().enumerate() {
        let top = FRAME.1 + row as i32 * cell.1;
        let middle = top + cell.1 / 2 - 6;
        area.draw(&Text::new(label.as_str(), (10, middle), font.clone()))?;
        for (column, &share) in cells.iter().enumerate() {
            let left = FRAME.0 + column as i32 * cell.0;
            let corners = [(left, top), (left + cell.0 - 1, top + cell.1 - 1)];
            area.draw(&Rectangle::new(corners, shade(share).filled()))?;
            // Black on light cells, white on dark ones; nothing where a number does not fit.
            let ink = if share > 0.5 { WHITE } else { BLACK };
            if cell.0 >= 28 {
                let number = format!("{:.0}", share * 100.0);
                area.draw(&Text::new(number, (left + 4, middle), font.clone().color(&ink)))?;
            }
        }
    }
    Ok(())
}

fn bars(figure: &Bars, area: &Area<'_>) -> Drawn {
    let font = ("sans-serif", 12).into_font();
    area.draw(&Text::new(figure.title.as_str(), (FRAME.0, 14), ("sans-serif", 14).into_font()))?;
    let largest = figure.bars.iter().map(|bar| bar.1).fold(0.0, f64::max);
    let longest = f64::from(FRAME.2 - FRAME.0 - 150);
    for (row, (label, share)) in figure.bars.iter().enumerate() {
        let top = FRAME.1 + 20 + row as i32 * 56;
        let length = if largest > 0.0 { (share / largest * longest) as i32 } else { 0 };
        let left = FRAME.0 + 80;
        area.draw(&Text::new(label.as_str(), (10, top + 8), font.clone()))?;
        area.draw(&Rectangle::new([(left, top), (left + length, top + 28)], COLOURS[0].filled()))?;
        let number = format!("{:.1} %", share * 100.0);
        area.draw(&Text::new(number, (left + length + 8, top + 8), font.clone()))?;
    }
    Ok(())
}
