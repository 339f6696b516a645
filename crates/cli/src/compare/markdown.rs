//! The comparison as Markdown.

use std::fmt::Write;

use super::{Row, Section};
use crate::timings::Report;

/// One table per report of ours.
pub(super) fn tables(sections: &[Section]) -> String {
    sections.iter().map(table).collect::<Vec<_>>().join("\n")
}

fn table(section: &Section) -> String {
    let ours = &section.ours;
    let mut text = format!(
        "### {}{}, {} x {} heads ({} kv) x {}, window {}{}{} ({})\n\n",
        step(ours),
        ours.element,
        ours.batch,
        ours.heads,
        ours.kv_heads,
        ours.head_dim,
        ours.window,
        ours.softcap.map_or(String::new(), |cap| format!(", softcap {cap}")),
        ours.gates.as_ref().map_or(String::new(), |gates| format!(", {gates} gates")),
        ours.name,
    );
    if !section.libraries.is_empty() {
        let _ = writeln!(text, "Beside it: {}.\n", section.libraries.join("; "));
    }
    let peers = section.peers.iter().map(|peer| format!("{peer}, ms"));
    let header = ["case", "length", "routine", "far", "ms", "useful rate", "over ideal"].map(String::from);
    let header: Vec<String> = header.into_iter().chain(peers).collect();
    let mut line = |cells: &[String]| {
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    };
    line(&header);
    line(&vec!["---".to_string(); header.len()]);
    for row in &section.rows {
        line(&cells(row));
    }
    text
}

/// What a decode step has besides: its queries and its pages.
fn step(ours: &Report) -> String {
    let pages = ours.page_size.map_or(String::new(), |size| format!(" over pages of {size}"));
    ours.queries.map_or(String::new(), |queries| format!("decode, {queries} per sequence{pages}, "))
}

fn cells(row: &Row) -> Vec<String> {
    let or_blank = |cell: Option<String>| cell.unwrap_or_default();
    let own = [
        row.case.clone(),
        row.length.to_string(),
        or_blank(row.routine.clone()),
        or_blank(row.far_share.map(|share| format!("{:.1} %", share * 100.0))),
        milliseconds(row.ms),
        or_blank(rate(row)),
        or_blank(row.over_ideal.map(|times| format!("{times:.2}"))),
    ];
    // How many times as long the peer takes.
    let beside =
        |ms: &Option<f64>| or_blank(ms.map(|ms| format!("{} ({:.2} x)", milliseconds(ms), ms / row.ms)));
    own.into_iter().chain(row.peers.iter().map(beside)).collect()
}

fn milliseconds(ms: f64) -> String {
    if ms < 100.0 { format!("{ms:.3}") } else { format!("{ms:.1}") }
}

/// Operations per second, or bytes where a case has no operations to speak of.
fn rate(row: &Row) -> Option<String> {
    let per_second = |count: f64| count / row.ms / 1e6;
    match (row.useful_flop.map(per_second), row.useful_bytes.map(per_second)) {
        (Some(gflops), _) if gflops >= 1e3 => Some(format!("{:.0} TFLOP/s", gflops / 1e3)),
        (Some(gflops), _) => Some(format!("{gflops:.1} GFLOP/s")),
        (None, Some(gigabytes)) if gigabytes < 10.0 => Some(format!("{gigabytes:.1} GB/s")),
        (None, Some(gigabytes)) => Some(format!("{gigabytes:.0} GB/s")),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{join, tests::sample};
    use super::*;

    #[test]
    fn a_table_has_every_row_and_the_peers_that_fit() {
        let text = tables(&join(&sample()).unwrap());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "### bf16, 1 x 16 heads (16 kv) x 128, window 256, random gates (H100)");
        assert_eq!(lines[2], "Beside it: torch 2.11 on H100.");
        assert_eq!(
            lines[4],
            "| case | length | routine | far | ms | useful rate | over ideal | sdpa_cudnn, ms | flex_window, ms |"
        );
        assert!(
            lines.contains(&"| full | 16384 | wgmma |  | 4.398 | 500 TFLOP/s | 1.00 | 5.498 (1.25 x) |  |"),
            "{text}"
        );
        assert!(lines.contains(&"| router | 16384 |  |  | 0.004 | 1000 GB/s |  |  |  |"), "{text}");
        // Header, rule, and ten rows: four cases and one sum at two lengths.
        assert_eq!(lines.iter().filter(|line| line.starts_with('|')).count(), 12, "{text}");
    }
}
