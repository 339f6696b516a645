//! Runs as rows of a table.

use comfy_table::Table;

use super::Summary;
use crate::output;

const HEADER: [&str; 10] = [
    "run",
    "attention",
    "seed",
    "steps",
    "loss",
    "validation loss",
    "far",
    "far by head",
    "keys",
    "collapses",
];

/// For a terminal.
pub(super) fn terminal(summaries: &[Summary]) -> Table {
    let mut table = output::table(HEADER);
    table.add_rows(summaries.iter().map(cells));
    table
}

/// For a page.
pub(super) fn markdown(summaries: &[Summary]) -> String {
    let line = |cells: [String; 10]| format!("| {} |\n", cells.join(" | "));
    let head = [line(HEADER.map(String::from)), line(std::array::from_fn(|_| "---".to_string()))];
    head.into_iter().chain(summaries.iter().map(|summary| line(cells(summary)))).collect()
}

fn cells(summary: &Summary) -> [String; 10] {
    let percent = |share: f64| format!("{:.1}", share * 100.0);
    let steps = match summary.steps == summary.of_steps {
        true => summary.steps.to_string(),
        false => format!("{} of {}", summary.steps, summary.of_steps),
    };
    [
        summary.run.clone(),
        summary.attention.clone(),
        summary.seed.to_string(),
        steps,
        format!("{:.3}", summary.loss),
        format!("{:.4}", summary.validation_loss),
        summary.far_share.map_or(String::new(), |share| format!("{} %", percent(share))),
        summary
            .far_by_head
            .map_or(String::new(), |[least, most]| format!("{} to {} %", percent(least), percent(most))),
        summary.keys.map_or(String::new(), |keys| format!("{keys:.1}")),
        summary.collapses.to_string(),
    ]
}
