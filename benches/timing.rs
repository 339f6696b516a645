//! How both benchmarks time. Criterion and Divan would do it too, but each turns on features of crates that CubeCL,
//! Burn or the command-line tool share, which would build those a second time.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use bifocal::{Result, cubecl::client::Client};

/// Samples per case: at least so many, and more while the time lasts.
const SAMPLES: usize = 21;
const TIME: Duration = Duration::from_secs(1);

/// A run of a benchmark: which cases it times, and how thoroughly.
pub(crate) struct Session {
    /// Words of the command line; a case runs if its name contains one of them, or if there are none.
    filters: Vec<String>,
    /// Without `cargo bench`'s own argument each case runs once, to see that it works.
    once: bool,
}

impl Session {
    /// Reads the command line and prints the head of the table.
    pub(crate) fn start() -> Self {
        let (options, filters): (Vec<String>, Vec<String>) =
            std::env::args().skip(1).partition(|argument| argument.starts_with('-'));
        println!(
            "{:<34} {:>12} {:>12} {:>8} {:>14}",
            "case", "median us", "fastest us", "samples", "Mpairs/s"
        );
        Self { filters, once: !options.iter().any(|option| option == "--bench") }
    }

    /// Times `calls` calls at once, after everything queued on the device is done, and prints a row. `pairs` is how
    /// many pairs of a query and a key one call is useful for.
    pub(crate) fn time<T>(
        &self,
        name: &str,
        client: &Client,
        calls: u32,
        pairs: Option<f64>,
        mut call: impl FnMut() -> Result<T>,
    ) -> Result<()> {
        if !self.filters.is_empty() && !self.filters.iter().any(|filter| name.contains(filter)) {
            return Ok(());
        }
        let mut sample = |calls: u32| -> Result<Duration> {
            bifocal::synchronise(client)?;
            let start = Instant::now();
            for _ in 0..calls {
                black_box(call()?);
            }
            Ok(start.elapsed() / calls)
        };
        // The first call compiles kernels, the second fills caches.
        let mut samples = vec![sample(1)?];
        if !self.once {
            sample(calls)?;
            samples.clear();
            let start = Instant::now();
            while samples.len() < SAMPLES || start.elapsed() < TIME {
                samples.push(sample(calls)?);
            }
        }
        bifocal::synchronise(client)?;
        samples.sort_unstable();
        let micros = |duration: Duration| duration.as_secs_f64() * 1e6;
        let median = micros(samples[samples.len() / 2]);
        let rate = pairs.map_or("-".to_string(), |pairs| format!("{:.1}", pairs / median));
        let count = samples.len();
        println!("{name:<34} {median:>12.3} {:>12.3} {count:>8} {rate:>14}", micros(samples[0]));
        Ok(())
    }
}
