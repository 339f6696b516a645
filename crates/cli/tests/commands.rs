//! The commands as a user runs them: a process of its own each, on the CPU runtime.

use std::{path::Path, process::Command};

use serde_json::Value;

/// Runs `bifocal` with its cache in `folder`; standard output, or standard error of a failure.
fn bifocal(folder: &Path, arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bifocal"));
    command.args(arguments).env("BIFOCAL_KERNEL_CACHE", folder).current_dir(folder);
    let output = command.output().expect("the tool starts");
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout).expect("UTF-8")),
        false => Err(String::from_utf8(output.stderr).expect("UTF-8")),
    }
}

fn json(folder: &Path, arguments: &[&str]) -> Value {
    let text = bifocal(folder, arguments).expect("a command that works");
    serde_json::from_str(&text).expect("JSON")
}

const SMALL: [&str; 10] =
    ["--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--lengths", "128,256", "--model-dim", "64"];

#[test]
fn doctor_says_where_kernels_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let doctor = ["doctor", "--device", "cpu", "--json", "-"];
    let found = json(folder.path(), &doctor);
    let file = found["kernel_cache"]["file"].as_str().expect("a file");
    assert!(Path::new(file).starts_with(folder.path()), "{file}");
    assert_eq!(found["kernel_cache"]["kernels"], 0);
    assert_eq!(found["devices"][0]["found"]["Ok"]["keeps_kernels"], false);
    // The option goes before the variable.
    let off = json(folder.path(), &[&doctor[..], &["--kernel-cache", "off"]].concat());
    assert_eq!(off["kernel_cache"], Value::Null);
    let inside_a_file = folder.path().join("file");
    std::fs::write(&inside_a_file, "").unwrap();
    let named = ["--kernel-cache", inside_a_file.to_str().unwrap()];
    let error = bifocal(folder.path(), &[&doctor[..], &named].concat()).unwrap_err();
    assert!(error.contains("kernel cache"), "{error}");
}

#[test]
fn warm_runs_every_system_and_says_that_nothing_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let warm = [&["warm", "--device", "cpu", "--windows", "16,64"], &SMALL[..]].concat();
    let found = json(folder.path(), &[&warm[..], &["--json", "-"]].concat());
    let steps = found["steps"].as_array().expect("steps");
    assert_eq!(steps.len(), 12);
    assert!(steps.iter().all(|step| step["kernels"].as_u64() > Some(0)), "{found}");
    let [first, .., last] = &steps[..] else { panic!("steps") };
    assert_eq!((&first["system"], &last["system"]), (&"windowed".into(), &"l2a".into()));
    // The CPU runtime has nothing to keep.
    assert_eq!((&found["compiled"], &found["kernel_cache"]), (&Value::Null, &Value::Null));
    let text = bifocal(folder.path(), &[&warm[..], &["--systems", "full"]].concat()).unwrap();
    assert!(text.contains("the cpu runtime keeps no compiled kernels"), "{text}");
    let error = bifocal(folder.path(), &[&warm[..4], &["64,16"], &SMALL[..]].concat()).unwrap_err();
    assert!(error.contains("ascending"), "{error}");
}

#[test]
fn bench_and_compare_understand_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let bench =
        [&["bench", "--cases", "full,aha,router,plan", "--runs", "1", "--far-share", "0.3"], &SMALL[..]];
    let bench = bench.concat();
    for gates in ["random", "clustered", "skewed"] {
        let file = format!("{gates}.json");
        bifocal(folder.path(), &[&bench[..], &["--gates", gates, "--json", &file]].concat()).unwrap();
        let text = std::fs::read_to_string(folder.path().join(&file)).unwrap();
        let report: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(report["gates"], gates);
        for timing in report["timings"].as_array().unwrap() {
            let routed = ["aha", "plan"].contains(&timing["case"].as_str().unwrap());
            let share = timing["far_share"].as_f64();
            assert_eq!(share.is_some(), routed, "{timing}");
            assert!(share.is_none_or(|share| (0.2..0.6).contains(&share)), "{timing}");
            assert!(timing["useful_bytes"].as_f64() > Some(0.0), "{timing}");
        }
    }
    let peer = std::fs::read_to_string(folder.path().join("random.json")).unwrap();
    let peer = peer.replace("\"full\"", "\"sdpa_flash\"").replacen('{', "{\"library\": \"peer 1\",", 1);
    std::fs::write(folder.path().join("peer.json"), peer).unwrap();
    let files = ["compare", "peer.json", "random.json", "clustered.json", "skewed.json"];
    let plotted = [&files[..], &["--markdown", "out.md", "--plot", "out.svg"]].concat();
    assert_eq!(bifocal(folder.path(), &plotted).unwrap(), "");
    let tables = std::fs::read_to_string(folder.path().join("out.md")).unwrap();
    assert_eq!(tables.matches("sdpa_flash, ms").count(), 3, "{tables}");
    assert!(tables.contains("aha + router"), "{tables}");
    let svg = std::fs::read_to_string(folder.path().join("out.svg")).unwrap();
    assert!(svg.starts_with("<svg"), "{svg}");
    let error = bifocal(folder.path(), &["compare", "out.md"]).unwrap_err();
    assert!(error.contains("out.md is not what a benchmark writes"), "{error}");
}
