//! `bifocal compare`: what `bifocal bench` and other libraries measured, joined into a table and a plot.

mod markdown;
mod plot;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{
    output,
    timings::{Report, Timing},
};

#[derive(Args)]
pub(crate) struct Options {
    /// What `bifocal bench --json` and the scripts in benches/peers wrote, in any order.
    #[arg(required = true, value_name = "FILE.json")]
    files: Vec<PathBuf>,
    /// Write the tables to this file in place of standard output.
    #[arg(long, value_name = "FILE.md")]
    markdown: Option<PathBuf>,
    /// Draw rates and speed-ups into this file.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// The cases of other libraries, and which of ours they stand beside.
const PEERS: [(&str, &[&str]); 14] = [
    ("sdpa_cudnn", &["full", "aha", "aha-layers", WITH_ROUTER, "l2a", "moments", "qada"]),
    ("sdpa_flash", &["full", "aha", "aha-layers", WITH_ROUTER, "l2a", "moments", "qada"]),
    ("flashinfer", &["full", "aha", "aha-layers", WITH_ROUTER]),
    ("flashinfer_window", &["window"]),
    ("sdpa_cudnn-backward", &["full-backward", "aha-backward", "aha-exact-backward", "l2a-backward"]),
    ("sdpa_flash-backward", &["full-backward", "aha-backward", "aha-exact-backward", "l2a-backward"]),
    ("flex_full", &["full"]),
    ("flex_full-backward", &["full-backward"]),
    ("flex_window", &["windowed"]),
    ("flex_window-backward", &["windowed-backward"]),
    ("flex_aha", &["aha", WITH_ROUTER]),
    ("flex_aha-backward", &["aha-backward"]),
    ("sdpa_mask", &["windowed"]),
    ("sdpa_chunks", &["windowed"]),
];

/// Those that compute dense causal attention: the yardstick of what a device can do.
const DENSE: [&str; 5] = ["full", "sdpa_cudnn", "sdpa_flash", "flex_full", "flashinfer"];

/// What the name of a case ends with that has a backward pass too.
const BACKWARD: &str = "-backward";

/// AHA and the router that decides for it: the sum of two medians.
const WITH_ROUTER: &str = "aha + router";

/// One report of ours and what stands beside it.
struct Section {
    ours: Report,
    /// Which libraries the peers are of, and on which device.
    libraries: Vec<String>,
    /// Cases of peers that some row has.
    peers: Vec<&'static str>,
    rows: Vec<Row>,
}

struct Row {
    case: String,
    length: usize,
    routine: Option<String>,
    far_share: Option<f64>,
    ms: f64,
    useful_flop: Option<f64>,
    useful_bytes: Option<f64>,
    /// The time over that of its useful operations at the best dense rate of the same head dim; of a decode step over that of
    /// its useful bytes at the rate of a copy.
    over_ideal: Option<f64>,
    /// Milliseconds of each of the section's peers.
    peers: Vec<Option<f64>>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let reports = options.files.iter().map(|path| read(path)).collect::<Result<Vec<_>>>()?;
    let sections = join(&reports)?;
    let tables = markdown::tables(&sections);
    match &options.markdown {
        Some(path) => output::write(path, tables.as_bytes())?,
        None => print!("{tables}"),
    }
    if let Some(path) = &options.plot {
        output::write(path, plot::svg(&reports, &sections)?.as_bytes())?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Report> {
    let json = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&json)
        .with_context(|| format!("{} is not what a benchmark writes with --json", path.display()))
}

/// Puts beside each report of ours what peers measured at the same shape.
fn join(reports: &[Report]) -> Result<Vec<Section>> {
    let (ours, peers): (Vec<&Report>, Vec<&Report>) =
        reports.iter().partition(|report| report.library.is_none());
    if ours.is_empty() {
        bail!("none of the files is from `bifocal bench`");
    }
    Ok(ours.into_iter().map(|ours| section(ours, &peers, reports)).collect())
}

fn section(ours: &Report, peers: &[&Report], reports: &[Report]) -> Section {
    let beside: Vec<&Report> = peers.iter().copied().filter(|peer| same_shape(ours, peer)).collect();
    let mut timings: Vec<Timing> = ours.timings.iter().cloned().chain(with_router(&ours.timings)).collect();
    // Case by case, in the order in which cases first come.
    let order: Vec<String> = timings.iter().map(|timing| timing.case.clone()).collect();
    timings.sort_by_key(|timing| (order.iter().position(|case| *case == timing.case), timing.length));
    let ms = |timing: &Timing, peer: &str, cases: &[&str]| {
        let fits = |report: &&&Report| !depends_on_window(peer) || report.window == ours.window;
        let measured = beside.iter().filter(fits).flat_map(|report| &report.timings);
        let measured = measured.filter(|other| {
            let same = other.case == peer && other.length == timing.length;
            same && cases.contains(&timing.case.as_str()) && same_routes(ours, timing, other)
        });
        // Of several runs the fastest, as a peer would choose.
        measured.map(|other| other.median_ms).min_by(f64::total_cmp)
    };
    let has =
        |(peer, cases): &(&str, &[&str])| timings.iter().any(|timing| ms(timing, peer, cases).is_some());
    let columns: Vec<_> = PEERS.into_iter().filter(has).collect();
    let rows = timings
        .iter()
        .map(|timing| Row {
            case: timing.case.clone(),
            length: timing.length,
            // Router and plan are no attention.
            routine: timing.useful_flop.or(timing.share_of_copy).and_then(|_| timing.routine.clone()),
            far_share: timing.far_share,
            ms: timing.median_ms,
            useful_flop: timing.useful_flop,
            useful_bytes: timing.useful_bytes,
            over_ideal: timing
                .useful_flop
                .zip(best_dense_rate(ours, reports, timing.case.ends_with(BACKWARD)))
                .map(|(flop, rate)| timing.median_ms * 1e6 * rate / flop)
                .or(timing.share_of_copy.map(|share| share.recip())),
            peers: columns.iter().map(|(peer, cases)| ms(timing, peer, cases)).collect(),
        })
        .collect();
    let mut libraries: Vec<String> = beside
        .iter()
        .map(|peer| format!("{} on {}", peer.library.as_deref().unwrap_or_default(), peer.name))
        .collect();
    libraries.sort();
    libraries.dedup();
    Section { ours: ours.clone(), libraries, peers: columns.iter().map(|(peer, _)| *peer).collect(), rows }
}

/// Whether both attend alike, to whole sequences or in a decode step. How a cache lays out its pages is its own business.
fn same_shape(a: &Report, b: &Report) -> bool {
    let shape = |report: &Report| [report.batch, report.heads, report.kv_heads, report.head_dim];
    let kind =
        |report: &Report| (report.device.clone(), report.element.clone(), report.softcap, report.queries);
    kind(a) == kind(b) && shape(a) == shape(b)
}

/// Whether a peer that has routes of its own, which are random, has as many far ones.
fn same_routes(ours: &Report, timing: &Timing, other: &Timing) -> bool {
    let random = ours.gates.as_deref() == Some("random");
    match (timing.far_share, other.far_share) {
        (Some(share), Some(others)) => random && (share - others).abs() < 0.01,
        _ => true,
    }
}

fn depends_on_window(peer: &str) -> bool {
    !DENSE.contains(&peer.trim_end_matches(BACKWARD))
}

/// `aha` and `router` as one, at each length that has both.
fn with_router(timings: &[Timing]) -> Vec<Timing> {
    let at = |case: &str, length: usize| timings.iter().find(|t| t.case == case && t.length == length);
    let both = timings.iter().filter(|timing| timing.case == "aha");
    both.filter_map(|aha| {
        let router = at("router", aha.length)?;
        Some(Timing {
            case: WITH_ROUTER.into(),
            median_ms: aha.median_ms + router.median_ms,
            fastest_ms: aha.fastest_ms + router.fastest_ms,
            first_call_ms: aha.first_call_ms + router.first_call_ms,
            ..aha.clone()
        })
    })
    .collect()
}

/// Useful GFLOP/s of the fastest dense attention that any file has for this device, element type and head dim, forward
/// or with the backward pass.
fn best_dense_rate(ours: &Report, reports: &[Report], backward: bool) -> Option<f64> {
    let alike = |report: &&Report| {
        report.device == ours.device && report.element == ours.element && report.head_dim == ours.head_dim
    };
    let timings = reports.iter().filter(alike).flat_map(|report| &report.timings);
    let dense = timings.filter(|timing| {
        let forward = timing.case.strip_suffix(BACKWARD);
        forward.is_some() == backward && DENSE.contains(&forward.unwrap_or(&timing.case))
    });
    dense.filter_map(|timing| timing.useful_gflops).max_by(f64::total_cmp)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn timing(case: &str, length: usize, median_ms: f64, flop: Option<f64>) -> Timing {
        Timing {
            case: case.into(),
            length,
            routine: (!case.contains('_')).then(|| "wgmma".into()),
            first_call_ms: 100.0,
            median_ms,
            fastest_ms: median_ms,
            far_share: (case == "aha").then_some(0.067),
            useful_flop: flop,
            useful_gflops: flop.map(|flop| flop / median_ms / 1e6),
            useful_bytes: Some(4e6),
            memory_bytes: None,
            chunk: None,
            share_of_copy: None,
            speedup: None,
            replayed_ms: None,
        }
    }

    pub(crate) fn report(library: Option<&str>, timings: Vec<Timing>) -> Report {
        Report {
            device: "cuda".into(),
            name: "H100".into(),
            library: library.map(Into::into),
            element: "bf16".into(),
            batch: 1,
            heads: 16,
            kv_heads: 16,
            head_dim: 128,
            window: 256,
            queries: None,
            page_size: None,
            softcap: None,
            gates: library.is_none().then(|| "random".into()),
            far_share: None,
            far_tokens: None,
            model_dim: None,
            runs: 9,
            timings,
        }
    }

    /// Dense attention at 500 TFLOP/s, AHA at a tenth of its operations in an eighth of its time; cuDNN at 400.
    pub(crate) fn sample() -> Vec<Report> {
        let dense = |length: usize| 8192.0 * (length as f64).powi(2);
        let ours = [16384, 32768].map(|length| {
            let ms = dense(length) / 500e9;
            vec![
                timing("full", length, ms, Some(dense(length))),
                timing("aha", length, ms / 8.0, Some(dense(length) / 10.0)),
                timing("router", length, 0.004, None),
                timing("windowed", length, 0.5, Some(1e11)),
            ]
        });
        let torch = [16384, 32768].map(|length| {
            vec![
                timing("sdpa_cudnn", length, dense(length) / 400e9, Some(dense(length))),
                timing("flex_window", length, 1.0, Some(1e11)),
            ]
        });
        vec![report(None, ours.concat()), report(Some("torch 2.11"), torch.concat())]
    }

    #[test]
    fn peers_stand_beside_what_they_compute() {
        let sections = join(&sample()).unwrap();
        let [section] = &sections[..] else { panic!("one report of ours") };
        assert_eq!(section.peers, ["sdpa_cudnn", "flex_window"]);
        assert_eq!(section.libraries, ["torch 2.11 on H100"]);
        let row =
            |case: &str| section.rows.iter().find(|row| row.case == case && row.length == 32768).unwrap();
        let speed_up =
            |case: &str, peer: usize| row(case).peers[peer].map(|ms| (ms / row(case).ms * 100.0).round());
        assert_eq!(speed_up("full", 0), Some(125.0));
        assert_eq!(speed_up("aha", 0), Some(1000.0));
        assert_eq!(speed_up("windowed", 0), None);
        assert_eq!(speed_up("windowed", 1), Some(200.0));
        assert_eq!(speed_up("router", 0), None);
        // The best dense rate is ours, so dense attention is at its ideal and AHA takes 10 / 8 of it.
        assert!((row("full").over_ideal.unwrap() - 1.0).abs() < 1e-9);
        assert!((row("aha").over_ideal.unwrap() - 1.25).abs() < 1e-9);
        assert!((row(WITH_ROUTER).ms - row("aha").ms - 0.004).abs() < 1e-9);
        assert_eq!(row(WITH_ROUTER).routine.as_deref(), Some("wgmma"));
        assert_eq!(row("router").routine, None);
    }

    #[test]
    fn other_shapes_and_windows_stand_beside_nothing() {
        let mut reports = sample();
        reports[1].kv_heads = 4;
        assert!(join(&reports).unwrap()[0].peers.is_empty());
        let mut reports = sample();
        reports[0].softcap = Some(50.0);
        assert!(join(&reports).unwrap()[0].peers.is_empty());
        let mut reports = sample();
        reports[1].window = 128;
        assert_eq!(join(&reports).unwrap()[0].peers, ["sdpa_cudnn"]);
        // Routed peers have to have as many far routes, drawn alike.
        let mut routed = timing("flex_aha", 32768, 9.0, None);
        routed.far_share = Some(0.068);
        let mut reports = sample();
        reports[1].timings.push(routed);
        let has = |reports: &[Report]| join(reports).unwrap()[0].peers.contains(&"flex_aha");
        assert!(has(&reports));
        reports[0].gates = Some("clustered".into());
        assert!(!has(&reports));
        reports[0].gates = Some("random".into());
        reports[1].timings.last_mut().unwrap().far_share = Some(0.28);
        assert!(!has(&reports));
        // Of several runs the fastest.
        let mut reports = sample();
        reports.push(reports[1].clone());
        reports[2].timings[0].median_ms /= 2.0;
        let full = |reports: &[Report]| join(reports).unwrap()[0].rows[0].peers[0].unwrap();
        assert!((full(&reports) * 2.0 - full(&sample())).abs() < 1e-9);
    }

    #[test]
    fn decode_steps_stand_beside_decode_steps() {
        let step = |library: Option<&str>, page_size, timings| Report {
            queries: Some(1),
            page_size,
            ..report(library, timings)
        };
        let attended =
            Timing { share_of_copy: Some(0.8), far_share: None, ..timing("full", 32768, 2.0, None) };
        let aha = Timing { share_of_copy: Some(0.5), ..timing("aha", 32768, 0.5, None) };
        let ours = step(None, None, vec![attended, aha, timing("window", 32768, 0.1, None)]);
        let flashinfer = ["flashinfer", "flashinfer_window"].map(|case| timing(case, 32768, 3.0, None));
        let flashinfer = step(Some("flashinfer 0.5"), Some(16), flashinfer.to_vec());
        let mut reports = sample();
        reports.extend([ours, flashinfer]);
        let sections = join(&reports).unwrap();
        let [whole, decode] = &sections[..] else { panic!("two reports of ours") };
        assert_eq!(whole.peers, ["sdpa_cudnn", "flex_window"]);
        assert_eq!(decode.peers, ["flashinfer", "flashinfer_window"]);
        let row = |case: &str| decode.rows.iter().find(|row| row.case == case).unwrap();
        assert_eq!((row("full").over_ideal, row("full").routine.as_deref()), (Some(1.25), Some("wgmma")));
        assert_eq!(row("full").peers, [Some(3.0), None]);
        assert_eq!(row("aha").peers, [Some(3.0), None]);
        assert_eq!(
            (row("window").over_ideal, row("window").peers.as_slice()),
            (None, &[None, Some(3.0)][..])
        );
    }

    #[test]
    fn without_figures_of_ours_there_is_nothing_to_compare() {
        assert!(join(&sample()[1..]).is_err());
    }
}
