//! `bifocal generate`: text from a model, as it comes.

use std::{
    fs,
    io::{self, IsTerminal, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use bifocal_lm::{End, GenerationOptions, Sampling};
use clap::Args;
use serde::Serialize;

use crate::{DeviceName, model, output};

#[derive(Args)]
pub(crate) struct Options {
    /// The model: a run's folder that `bifocal train` has made, or the file that `bifocal export` made of it. The small decoder
    /// inside, which has read Bifocal's book, unless given.
    #[arg(value_name = "RUN")]
    run: Option<PathBuf>,
    /// The text to go on from; standard input unless this or --prompt-file is given.
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_file", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// A file with the text to go on from.
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// How many tokens (bytes) to write at most.
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_tokens: usize,
    /// Take the likeliest token each time; otherwise tokens are drawn.
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "seed"])]
    greedy: bool,
    /// What logits are divided by before tokens are drawn: below 1 the likely become likelier.
    #[arg(long, value_name = "X", default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f64,
    /// Draw from so many of the likeliest tokens.
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Draw from as few of the likeliest tokens as hold this share of the probability.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Where tokens are drawn from: the same seed, the same text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// A text to stop after; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Where the model runs. On `cpu` its dense parts run on Burn's Flex and attention on the CPU runtime.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    /// Write text and measurements as JSON to this file (`-` for standard output, in place of the text).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    device: &'static str,
    prompt_tokens: usize,
    /// What was generated, bytes that are no UTF-8 replaced.
    text: String,
    tokens: usize,
    /// Why the text ended.
    end: Option<End>,
    /// Until the first token: the prompt, and kernels that are compiled for it.
    first_token_s: f64,
    /// Of the tokens after the first; none where there is no other.
    tokens_per_s: Option<f64>,
    /// By layer, over prompt and text; `null` for layers without a router.
    far_share: Vec<Option<f64>>,
    cache_bytes: usize,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let sampling = match options.greedy {
        true => Sampling::Greedy,
        false => {
            let &Options { temperature, top_k, top_p, seed, .. } = options;
            Sampling::Random { temperature, top_k, top_p, seed }
        }
    };
    // A prompt may come from a terminal, late: what is wrong is said before.
    sampling.check()?;
    let stops = options.stop.iter();
    let generation = GenerationOptions::new(options.max_tokens).with_sampling(sampling);
    let generation = stops.fold(generation, |generation, stop| generation.with_stop(stop.as_bytes()));
    let (checkpoint, _) = model::read(options.run.as_deref())?;
    let prompt = prompt(options)?;
    let decoder = checkpoint.decoder(&options.device.burn()?)?;

    let quiet = options.json.as_deref() == Some(Path::new("-"));
    let mut generation = decoder.generate(&prompt, &generation)?;
    let (mut text, mut characters) = (String::new(), Characters::default());
    let mut tell = |whole: &str| -> Result<()> {
        text.push_str(whole);
        if !quiet {
            let mut out = io::stdout().lock();
            out.write_all(whole.as_bytes()).and_then(|()| out.flush()).context("cannot write the text")?;
        }
        Ok(())
    };
    let (start, mut first, mut tokens) = (Instant::now(), Duration::ZERO, 0);
    for byte in &mut generation {
        let byte = byte?;
        tokens += 1;
        if tokens == 1 {
            first = start.elapsed();
        }
        tell(&characters.push(byte))?;
    }
    let rest = start.elapsed() - first;
    tell(&characters.finish())?;

    let report = Report {
        device: options.device.as_str(),
        prompt_tokens: prompt.len(),
        text,
        tokens,
        end: generation.end(),
        first_token_s: first.as_secs_f64(),
        tokens_per_s: (tokens > 1).then(|| (tokens - 1) as f64 / rest.as_secs_f64()),
        far_share: generation.far_share(),
        cache_bytes: generation.cache_bytes(),
    };
    match &options.json {
        Some(path) => {
            if !quiet {
                println!();
            }
            output::write_json(path, &report)
        }
        None => {
            println!();
            tell_figures(&report);
            Ok(())
        }
    }
}

fn prompt(options: &Options) -> Result<Vec<u8>> {
    if let Some(text) = &options.prompt {
        return Ok(text.clone().into_bytes());
    }
    if let Some(path) = &options.prompt_file {
        return fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    }
    if io::stdin().is_terminal() {
        bail!("no prompt: give --prompt or --prompt-file, or pipe one in");
    }
    let mut prompt = Vec::new();
    io::stdin().read_to_end(&mut prompt).context("cannot read the prompt from standard input")?;
    Ok(prompt)
}

/// To standard error: standard output has the text.
fn tell_figures(report: &Report) {
    let Report { prompt_tokens, tokens, end, first_token_s, tokens_per_s, far_share, cache_bytes, .. } =
        report;
    let why = match end {
        Some(End::Stop) => "a stop",
        Some(End::Document) => "the end of the document",
        Some(End::Context) => "all that the model sees at once",
        Some(End::Length) | None => "as many as asked for",
    };
    let rate = tokens_per_s.map_or(String::new(), |rate| format!(", then {rate:.0} tokens/s"));
    let shares: Vec<String> = far_share
        .iter()
        .map(|share| share.map_or("-".to_string(), |share| format!("{:.1} %", share * 100.0)))
        .collect();
    eprintln!(
        "{prompt_tokens} tokens read, {tokens} written: {why}; the first in {first_token_s:.2} s{rate}"
    );
    eprintln!("far by layer: {}; the cache has {:.1} KiB", shares.join(", "), *cache_bytes as f64 / 1024.0);
}

/// Bytes as characters: those of a character that is not whole yet wait, and those of none become a replacement.
#[derive(Default)]
struct Characters {
    waiting: Vec<u8>,
}

impl Characters {
    /// What is whole by now.
    fn push(&mut self, byte: u8) -> String {
        self.waiting.push(byte);
        let mut whole = String::new();
        loop {
            let (valid, bad) = match std::str::from_utf8(&self.waiting) {
                Ok(_) => (self.waiting.len(), None),
                Err(error) => (error.valid_up_to(), error.error_len()),
            };
            whole.push_str(&String::from_utf8_lossy(&self.waiting[..valid]));
            self.waiting.drain(..valid + bad.unwrap_or(0));
            match bad {
                Some(_) => whole.push(char::REPLACEMENT_CHARACTER),
                None => return whole,
            }
        }
    }

    /// What never became whole.
    fn finish(self) -> String {
        String::from_utf8_lossy(&self.waiting).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes after each byte, and at the end.
    fn pieces(bytes: &[u8]) -> Vec<String> {
        let mut characters = Characters::default();
        let mut pieces: Vec<String> = bytes.iter().map(|&byte| characters.push(byte)).collect();
        pieces.push(characters.finish());
        pieces
    }

    #[test]
    fn characters_wait_until_they_are_whole() {
        assert_eq!(pieces("aé€b".as_bytes()), ["a", "", "é", "", "", "€", "b", ""]);
        // A continuation of nothing, a character that is broken off by a letter, and one by the end.
        assert_eq!(pieces(b"\x80a"), ["\u{fffd}", "a", ""]);
        assert_eq!(pieces(b"\xe2\x82a"), ["", "", "\u{fffd}a", ""]);
        assert_eq!(pieces(b"a\xe2\x82"), ["a", "", "", "\u{fffd}"]);
        for text in [&b"\xff\xc3\xa9\xf0\x9f"[..], &b"\xed\xa0\x80x"[..]] {
            assert_eq!(pieces(text).concat(), String::from_utf8_lossy(text));
        }
    }
}
