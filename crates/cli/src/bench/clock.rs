//! How calls are timed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bifocal::cubecl::{
    client::{Client, Graph},
    future::block_on,
};

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

/// The same for a call that is recorded once for each turn and replayed, where the runtime can do that: what the device alone
/// takes. `None` where it cannot record the call.
pub(super) fn replays<T: Sync>(
    client: &Client,
    (cpu, runs): (bool, u32),
    turns: &[T],
    call: impl Fn(&T) -> bifocal::Result<()> + Sync,
) -> Result<Option<(Duration, Duration)>> {
    if cpu {
        return Ok(None);
    }
    let graph = |turn| bifocal::capture(client, || call(turn)).map(|(graph, ())| graph);
    let graphs = match turns.iter().map(graph).collect::<bifocal::Result<Vec<_>>>() {
        Ok(graphs) => graphs,
        Err(reason) => {
            tracing::warn!("not replayed: {reason}");
            return Ok(None);
        }
    };
    let replay = |graph: &Graph| {
        // SAFETY: what was recorded belongs to the bench, which waits for the device before it writes or frees any of it. Memory
        // that a call took for itself serves one replay after the other.
        let replayed = unsafe { graph.replay() };
        replayed.map_err(|error| bifocal::Error::Runtime(error.to_string()))
    };
    let estimate = wall(client, || replay(&graphs[0]))?;
    times(client, (cpu, runs), &graphs, estimate, replay).map(Some)
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
