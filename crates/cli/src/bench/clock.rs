//! How calls are timed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bifocal::cubecl::{client::Client, future::block_on};

/// Bytes of inputs that a run rotates through at least: more than the last-level caches of today's devices hold.
pub(super) const ROTATION_BYTES: usize = 256 << 20;

/// How long a timed run is to take, if 32 calls do.
pub(super) const SAMPLE: Duration = Duration::from_millis(4);

/// Median and fastest time of a call over inputs in turn, of so many runs. Short calls, by an estimate of what one takes, are
/// timed several at once, as a model makes them: alone, the host's part would show.
pub(super) fn times<T: Sync>(
    client: &Client,
    (cpu, runs): (bool, u32),
    turns: &[T],
    estimate: Duration,
    call: impl Fn(&T) -> bifocal::Result<()> + Sync,
) -> Result<(Duration, Duration)> {
    let calls = (SAMPLE.as_secs_f64() / estimate.as_secs_f64()).ceil().clamp(1.0, 32.0) as usize;
    let mut turns = turns.iter().cycle();
    let mut times = (0..runs)
        .map(|_| {
            let turns: Vec<&T> = turns.by_ref().take(calls).collect();
            let time = measure(client, cpu, || turns.into_iter().try_for_each(&call))?;
            Ok(time / calls as u32)
        })
        .collect::<Result<Vec<_>>>()?;
    times.sort_unstable();
    Ok((times[times.len() / 2], times[0]))
}

/// Device events on a GPU; the clock around launch and completion on a CPU, whose launches are its work.
pub(super) fn measure(
    client: &Client,
    cpu: bool,
    call: impl FnOnce() -> bifocal::Result<()> + Send,
) -> Result<Duration> {
    if cpu {
        return wall(client, call);
    }
    let (called, duration) =
        client.profile(call, "bench").map_err(|error| anyhow!("cannot time on this device: {error:?}"))?;
    called?;
    let ticks = block_on(duration.resolve()).context("the device gave no time stamps")?;
    Ok(ticks.duration())
}

/// Time from the call until the device is idle again.
pub(super) fn wall(client: &Client, call: impl FnOnce() -> bifocal::Result<()>) -> Result<Duration> {
    bifocal::synchronise(client)?;
    let start = Instant::now();
    call()?;
    bifocal::synchronise(client)?;
    Ok(start.elapsed())
}
