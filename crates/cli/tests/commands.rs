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

#[test]
fn decode_is_timed_by_the_bytes_that_it_needs() {
    let folder = tempfile::tempdir().unwrap();
    let bench = ["bench", "decode", "--runs", "1", "--window", "16", "--far-share", "0.25", "--batch", "2"];
    for pages in [&[][..], &["--page-size", "16"]] {
        let report = json(folder.path(), &[&bench[..], &SMALL[..], pages, &["--json", "-"]].concat());
        let timings = report["timings"].as_array().unwrap();
        let bytes = |case: &str, length: usize| {
            let found = timings.iter().find(|timing| timing["case"] == case && timing["length"] == length);
            found.expect("a timing")["useful_bytes"].as_f64().unwrap() as u64
        };
        // Four kv heads of all sequences, f32 keys and values of 32; 8 queries and outputs.
        let of = |keys: u64| 2 * (keys + 8) * 32 * 4;
        for length in [128, 256] {
            assert_eq!(bytes("full", length), of(4 * length as u64));
            assert_eq!(bytes("window", length), of(4 * 16));
            assert_eq!(bytes("off", length), of(0));
            // Two of eight heads look far: in one kv head or in two.
            let far = |kv_heads: u64| of(kv_heads * length as u64 + (4 - kv_heads) * 16);
            assert!([far(1), far(2)].contains(&bytes("aha", length)));
            // Both branches of L2A, of which one sees nothing; layers look far more or less often.
            assert_eq!(bytes("l2a-off", length), of(4 * 16) + of(0));
            assert!((of(4 * 16)..of(4 * length as u64)).contains(&bytes("aha-layers", length)));
            assert!(bytes("router", length) > 0 && bytes("plan", length) > 0);
        }
    }
    // Beside another library's, at the same shape.
    let ours = ["--cases", "full", "--json", "ours.json"];
    bifocal(folder.path(), &[&bench[..], &SMALL[..], &ours].concat()).unwrap();
    let peer = std::fs::read_to_string(folder.path().join("ours.json")).unwrap();
    let peer = peer.replace("\"full\"", "\"flashinfer\"").replacen('{', "{\"library\": \"peer 1\",", 1);
    std::fs::write(folder.path().join("peer.json"), peer).unwrap();
    let tables = bifocal(folder.path(), &["compare", "peer.json", "ours.json"]).unwrap();
    assert!(tables.contains("### decode, 1 per sequence, f32") && tables.contains("(1.00 x)"), "{tables}");
    let error =
        bifocal(folder.path(), &["bench", "decode", "--queries", "17", "--lengths", "64"]).unwrap_err();
    assert!(error.contains("query length of a step is 17, expected 1 to 16"), "{error}");
}

#[test]
fn memory_is_that_of_a_step_and_grows_with_its_length() {
    let folder = tempfile::tempdir().unwrap();
    let cases = ["full", "aha", "aha-exact", "l2a", "linear-portable", "rattention"];
    let bench = ["bench", "--backward", "--runs", "1", "--json", "-", "--cases", &cases.join(",")];
    let found = json(folder.path(), &[&bench[..], &SMALL[..]].concat());
    let of = |case: &str, length: u64| {
        let case = format!("{case}-backward");
        let mut timings = found["timings"].as_array().expect("timings").iter();
        let timing = timings.find(|t| t["case"] == case.as_str() && t["length"] == length).expect("a timing");
        timing["memory_bytes"].as_f64().expect("memory")
    };
    for case in cases {
        // Four heads of outputs, and gradients of as many queries, of two heads of keys and of values: f32, 32 each.
        let least = (4 + 4 + 2 + 2) as f64 * 128.0 * 32.0 * 4.0;
        let (short, long) = (of(case, 128), of(case, 256));
        assert!(short >= least, "{case}: {short} bytes, at least {least}");
        // States do not grow with the length.
        assert!(long / short > 1.2 && long / short < 2.1, "{case}: {short}, {long}");
    }
    assert!(of("aha-exact", 256) > of("aha", 256), "the outputs of both branches are kept");
}

/// A text and the settings of a tiny run on it.
fn tiny_run(folder: &Path) {
    std::fs::write(folder.join("text.md"), "near vision and far vision in one lens. ".repeat(60)).unwrap();
    let settings = r#"{
        "model": { "layers": 1, "d_model": 16, "heads": 2, "kv_heads": 1, "feed_forward": 16, "context": 16 },
        "batch": 2, "warm_up": 2, "log_every": 1, "validate_every": 2
    }"#;
    std::fs::write(folder.join("tiny.json"), settings).unwrap();
}

/// Trains it, with options over its settings.
fn train(folder: &Path, name: &str, more: &[&str]) -> Result<String, String> {
    let train = ["train", "--text", "text.md", "--config", "tiny.json", "--out", name];
    bifocal(folder, &[&train[..], more].concat())
}

#[test]
fn runs_are_trained_resumed_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    tiny_run(here);
    let aha = ["--attention", "aha", "--window", "4", "--steps", "4"];
    let told = train(here, "aha", &aha).unwrap();
    assert!(told.contains("2401 tokens in 1 documents; aha 4 on cpu"), "{told}");
    train(here, "dense", &["--attention", "full", "--steps", "4"]).unwrap();
    let several = ["--attention", "multi-window", "--window", "2,4", "--steps", "2"];
    train(here, "several", &several).unwrap();

    // A run is described by its folder, and goes on from there.
    let again = bifocal(here, &["train", "--resume", "--out", "aha"]).unwrap();
    assert!(again.contains("done: aha"), "{again}");
    let error = bifocal(here, &["train", "--resume", "--out", "aha", "--steps", "9"]).unwrap_err();
    assert!(error.contains("its steps is 4, expected 9"), "{error}");
    let error = train(here, "aha", &aha).unwrap_err();
    assert!(error.contains("aha holds a run already"), "{error}");

    let report = ["report", "aha", "dense", "several", "--plot", "out.svg", "--markdown", "out.md"];
    assert!(bifocal(here, &report).unwrap().contains("multi-window 2/4"));
    let table = std::fs::read_to_string(here.join("out.md")).unwrap();
    assert!(table.contains("| dense | full | 1 | 4 |"), "{table}");
    let svg = std::fs::read_to_string(here.join("out.svg")).unwrap();
    assert!(svg.contains("share of far over window"), "{svg}");
    let found = json(here, &["report", "aha", "--json", "-", "--plot", "one.svg"]);
    assert_eq!((&found[0]["run"], &found[0]["window"]), (&"aha".into(), &4.into()));
    assert!(found[0]["far_share"].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share)), "{found}");
    assert!(std::fs::read_to_string(here.join("one.svg")).unwrap().contains("by layer and head"));

    // The demo shows what the run has learned.
    let shown = bifocal(here, &["demo", "--run", "aha", "--text", "text.md"]).unwrap();
    assert!(shown.contains("The weights are those of aha, after 4 steps."), "{shown}");
    let error = bifocal(here, &["demo", "--run", "dense", "--text", "text.md"]).unwrap_err();
    assert!(error.contains("no AHA layer"), "{error}");
    bifocal(here, &["export", "aha", "aha.bifocal"]).unwrap();
    let size = |file: &str| std::fs::metadata(here.join(file)).unwrap().len();
    assert!(size("aha.bifocal") < size("aha/checkpoint") * 2 / 3);
    let shown = bifocal(here, &["demo", "--run", "aha.bifocal", "--text", "text.md"]).unwrap();
    assert!(shown.contains("The weights are those of aha.bifocal, after 4 steps."), "{shown}");

    // A checkpoint that is cut off.
    let checkpoint = here.join("aha").join("checkpoint");
    let bytes = std::fs::read(&checkpoint).unwrap();
    std::fs::write(&checkpoint, &bytes[..bytes.len() / 2]).unwrap();
    let error = bifocal(here, &["train", "--resume", "--out", "aha"]).unwrap_err();
    assert!(error.contains("checkpoint is cut off"), "{error}");
}

#[test]
fn layers_that_seldom_look_far_are_pruned() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    tiny_run(here);
    // Gates of the one layer that are open for about half of all tokens.
    train(here, "aha", &["--attention", "aha", "--window", "4", "--steps", "2"]).unwrap();
    train(here, "dense", &["--attention", "full", "--steps", "2"]).unwrap();
    let prune = |run: &str, below: &str, out: &str, more: &[&str]| {
        bifocal(here, &[&["prune", run, "--below", below, "--out", out], more].concat())
    };
    let found =
        json(here, &["prune", "aha", "--below", "1", "--out", "near", "--context", "100", "--json", "-"]);
    let layer = &found["layers"][0];
    assert_eq!((&layer["pruned"], &layer["after"]["kind"]), (&true.into(), &"window".into()));
    assert!(layer["far"].as_f64().is_some_and(|far| (0.01..1.0).contains(&far)), "{found}");
    // One kv head of 8: keys and values in f32.
    let bytes = |tokens: u64| tokens * 2 * 8 * 4;
    assert_eq!(found["kv_bytes"]["before"], bytes(100));
    assert_eq!(found["kv_bytes"]["after"], bytes(4));
    assert_eq!(found["loss"], Value::Null);
    // It is a decoder without routers, which the same text tells from the whole one.
    let error = bifocal(here, &["demo", "--run", "near", "--text", "text.md"]).unwrap_err();
    assert!(error.contains("no AHA layer"), "{error}");

    // On the run's own text the loss before is that of its last validation.
    let found =
        json(here, &["prune", "aha", "--below", "1", "--out", "seen", "--text", "text.md", "--json", "-"]);
    let loss = |side: &str| found["loss"][side].as_f64().expect("a loss");
    let reported = json(here, &["report", "aha", "--json", "-"]);
    let last = reported[0]["validation_loss"].as_f64().unwrap();
    assert!((loss("before") - last).abs() < 1e-6, "{found}, {reported}");
    assert!(loss("after") != loss("before") && (loss("after") - last).abs() < 1.0, "{found}");

    let told = prune("aha", "0.01", "whole", &[]).unwrap();
    assert!(told.contains("No layer looks far for less than 1.00 %"), "{told}");
    bifocal(here, &["demo", "--run", "whole", "--text", "text.md"]).unwrap();
    bifocal(here, &["export", "aha", "aha.bifocal"]).unwrap();
    let refused = |run, below, out, text: &str| {
        let error = prune(run, below, out, &[]).unwrap_err();
        assert!(error.contains(text), "{error}");
    };
    refused("aha", "0.5", "near", "near holds a checkpoint already");
    refused("aha", "1.5", "other", "the share to prune below is 1.5, expected 0 to 1");
    refused("dense", "0.5", "other", "model.attention is full, expected a kind with a learned router");
    refused("aha.bifocal", "0.5", "other", "aha.bifocal is no folder with the metrics of a run");
    std::fs::write(here.join("aha/metrics.jsonl"), "").unwrap();
    refused("aha", "0.5", "other", "how often routers look far: measure it on a text");
    assert!(!here.join("other").exists());
}

#[test]
fn the_demo_shows_gates_that_have_learned() {
    let folder = tempfile::tempdir().unwrap();
    let found = json(folder.path(), &["demo", "--tokens", "512", "--json", "-"]);
    let layers = found["layers"].as_array().expect("layers");
    let heads = layers.iter().flat_map(|layer| layer["far_by_head"].as_array().expect("heads"));
    let heads: Vec<f64> = heads.map(|share| share.as_f64().expect("a share")).collect();
    // A gate that has not learned is open for about half of all tokens, whichever head it is of.
    let (least, most) = heads.iter().fold((1.0f64, 0.0f64), |(low, high), &x| (low.min(x), high.max(x)));
    assert!(least < 0.1 && most > least + 0.1, "{heads:?}");
    let random = ["demo", "--random", "--layers", "1", "--tokens", "128"];
    assert!(bifocal(folder.path(), &random).unwrap().contains("not trained"));
    assert!(bifocal(folder.path(), &["demo", "--layers", "1"]).unwrap_err().contains("--random"));
}

#[test]
fn text_comes_from_the_decoder_inside_and_from_runs() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let generate = ["generate", "--max-tokens", "40", "--prompt", "The window shows the near "];
    let told = |more: &[&str]| bifocal(here, &[&generate[..], more].concat());
    let greedy = told(&["--greedy"]).unwrap();
    assert!(greedy.trim_end_matches('\n').len() <= 3 * 40 && greedy.contains("e"), "{greedy}");
    let found = json(here, &[&generate[..], &["--greedy", "--json", "-"]].concat());
    assert_eq!(format!("{}\n", found["text"].as_str().unwrap()), greedy);
    assert_eq!((&found["prompt_tokens"], &found["tokens"]), (&26.into(), &40.into()));
    assert_eq!(found["end"], "length");
    let shares = found["far_share"].as_array().expect("shares");
    assert!(shares.iter().all(|share| share.as_f64().is_some_and(|share| (0.0..=1.0).contains(&share))));
    assert!(found["cache_bytes"].as_u64() > Some(0) && found["tokens_per_s"].as_f64() > Some(0.0), "{found}");

    let drawn = |seed: &str| told(&["--temperature", "1.5", "--top-k", "60", "--seed", seed]).unwrap();
    assert_eq!(drawn("3"), drawn("3"));
    assert_ne!(drawn("3"), drawn("4"));
    let stop: String = greedy.chars().take(2).collect();
    assert_eq!(told(&["--greedy", "--stop", &stop]).unwrap(), format!("{stop}\n"));

    // A run, from its folder and from one file.
    tiny_run(here);
    train(here, "run", &["--attention", "qada", "--window", "4", "--tau", "0.9", "--steps", "2"]).unwrap();
    bifocal(here, &["export", "run", "run.bifocal"]).unwrap();
    std::fs::write(here.join("prompt.txt"), "near ").unwrap();
    let from = |model| bifocal(here, &["generate", model, "--prompt-file", "prompt.txt", "--greedy"]);
    assert_eq!(from("run").unwrap(), from("run.bifocal").unwrap());

    for (more, expected) in [
        (&["--temperature", "0"][..], "temperature is 0, expected a finite number above 0"),
        (&["--top-p", "1.5"], "top-p is 1.5"),
        (&["--top-k", "0"], "top-k is 0"),
        (&["--greedy", "--seed", "1"], "cannot be used with"),
        (&["run", "--prompt-file", "prompt.txt"], "cannot be used with"),
        (&["nowhere"], "cannot read nowhere"),
        (&["run"], "the prompt is 26 bytes long, expected at most the model's context, 16"),
    ] {
        let error = told(more).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn training_says_what_it_misses() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    tiny_run(here);
    let refused = |more: &[&str], text: &str| {
        let error = train(here, "run", more).unwrap_err();
        assert!(error.contains(text), "{error}");
        assert!(!here.join("run").exists(), "nothing is left of a run that did not begin");
    };
    refused(&["--context", "5000"], "the training text has 2161 tokens");
    refused(&["--attention", "aha"], "--window has 0 numbers, expected one for aha");
    refused(&["--window", "4"], "--attention, which is not given");
    refused(&["--attention", "random-gate", "--window", "4"], "random-gate needs --far-share");
    refused(&["--attention", "aha,aha", "--window", "4"], "model.attention is a list of 2");
    refused(&["--attention", "aha", "--window", "0"], "a window has 0 keys");
    refused(&["--attention", "full", "--budget", "0.1"], "no layer has a gate");
    refused(&["--learning-rate", "0"], "learning_rate is 0");
    refused(&["--text", "missing.md"], "cannot read missing.md");
    std::fs::write(here.join("settings.json"), r#"{ "step": 3 }"#).unwrap();
    let strange = ["train", "--text", "text.md", "--config", "settings.json", "--out", "run"];
    let error = bifocal(here, &strange).unwrap_err();
    assert!(error.contains("settings.json holds no settings of a training"), "{error}");
    let error = bifocal(here, &["train", "--resume", "--out", "run"]).unwrap_err();
    assert!(error.contains("run holds no run"), "{error}");
    let error = bifocal(here, &["report", "run"]).unwrap_err();
    assert!(error.contains("run holds no run"), "{error}");
}

/// A tiny run that does not end by itself.
#[cfg(unix)]
fn endless_run(folder: &Path) -> std::process::Child {
    tiny_run(folder);
    let arguments = "train --text text.md --config tiny.json --out run --steps 1000000";
    let mut command = Command::new(env!("CARGO_BIN_EXE_bifocal"));
    command.args(arguments.split_whitespace()).env("BIFOCAL_KERNEL_CACHE", "off").current_dir(folder);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
}

/// Sends it a signal; how it ended, and what it said of it.
#[cfg(unix)]
fn end(child: std::process::Child, signal: &str) -> (Option<i32>, String) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_is_saved() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let child = endless_run(here);
    let begun =
        || std::fs::read_to_string(here.join("run/metrics.jsonl")).is_ok_and(|lines| lines.contains("loss"));
    // It begins by compiling kernels.
    for _ in 0..1200 {
        if begun() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(begun(), "no step within two minutes");
    let (code, error) = end(child, "-INT");
    assert_eq!(code, Some(130), "{error}");
    assert!(error.contains("interrupted after step") && error.contains("--resume --out run"), "{error}");
    assert!(here.join("run/checkpoint").exists());
}

#[cfg(unix)]
#[test]
fn a_run_is_interrupted_at_once_while_it_compiles() {
    use std::io::{BufRead, BufReader};

    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let mut child = endless_run(here);
    let mut told = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(told.any(|line| line.unwrap().contains("first step compiles")));
    // What `timeout` sends.
    let (code, error) = end(child, "-TERM");
    assert_eq!((code, error.as_str()), (Some(130), ""));
    assert!(!here.join("run/checkpoint").exists(), "there was nothing to save");
    // The folder is as good as before: the run begins there.
    let resumed = bifocal(here, &["train", "--resume", "--out", "run", "--steps", "2"]);
    assert!(resumed.unwrap().contains("done: run"));
}
