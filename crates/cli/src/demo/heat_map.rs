//! Where each head looks far, as an SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::measure::LayerReport;
use crate::plot::shade;

const CELL: (i32, i32) = (7, 9);
const MARGIN: i32 = 24;

/// One row of cells per layer and head, one column per bin of tokens; the darker, the more of them look far.
pub(crate) fn svg(layers: &[LayerReport]) -> Result<String> {
    let heads = layers.first().map_or(0, |layer| layer.far_by_bin.len() as i32);
    let bins = layers.first().and_then(|layer| layer.far_by_bin.first()).map_or(0, |bins| bins.len() as i32);
    // A blank row between layers.
    let rows = layers.len() as i32 * (heads + 1);
    let size = ((2 * MARGIN + bins * CELL.0).max(360) as u32, (2 * MARGIN + rows * CELL.1) as u32);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        draw(&area, layers, heads).map_err(|error| anyhow!("cannot draw the heat map: {error}"))?;
    }
    Ok(svg)
}

fn draw(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    layers: &[LayerReport],
    heads: i32,
) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let font = ("sans-serif", 12).into_font();
    let title = "share of tokens that look far, by layer and head (rows), along the text (columns)";
    area.draw(&Text::new(title, (MARGIN, 6), font.clone()))?;
    for (index, layer) in layers.iter().enumerate() {
        let top = MARGIN + index as i32 * (heads + 1) * CELL.1;
        area.draw(&Text::new(layer.layer.to_string(), (6, top), font.clone()))?;
        for (head, bins) in layer.far_by_bin.iter().enumerate() {
            for (bin, share) in bins.iter().enumerate() {
                let x = MARGIN + bin as i32 * CELL.0;
                let y = top + head as i32 * CELL.1;
                let cell = [(x, y), (x + CELL.0 - 1, y + CELL.1 - 1)];
                area.draw(&Rectangle::new(cell, shade(*share).filled()))?;
            }
        }
    }
    area.present()?;
    Ok(())
}
