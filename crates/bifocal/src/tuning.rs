//! How long CubeCL looks for the fastest kernel of an operation.

use std::time::Duration;

use cubecl::{
    client::Client,
    config::{CubeClRuntimeConfig, RuntimeConfig, autotune::AutotuneLevel},
    throughput::{ThroughputCache, ThroughputKey, ThroughputMode, ThroughputValue},
};

/// Ends CubeCL's search for the fastest kernel of an operation at the first one that is good enough: one that takes at most
/// `slack` longer than the operation would at 80 % of what the device was measured to do.
///
/// Bifocal's own operators need no search. Burn searches for every matrix product and every reduction whose shape it meets
/// for the first time, among up to twenty kernels, and each has to be compiled before it can be timed: on CUDA that keeps
/// the first step of a small model waiting for many minutes, for the sake of microseconds in later ones.
///
/// Call it once, when the device is open and nothing has run on it yet. It does nothing where CubeCL is told to search
/// thoroughly: the level `extensive` or `full`, in `cubecl.toml` or by the variable `CUBECL_AUTOTUNE_LEVEL`. What was found is
/// stored next to compiled kernels (see [`keep_kernels`](crate::keep_kernels)), and so is the slack: whoever shares that
/// folder is content with as much, and a thorough search wants a folder of its own.
pub fn settle_within(client: &Client, slack: Duration) {
    if matches!(CubeClRuntimeConfig::get().autotune.level, AutotuneLevel::Extensive | AutotuneLevel::Full) {
        return;
    }
    // The time at which CubeCL stops looking is that of the work at a share of the measured rates, and of a launch
    // besides. It measures what a launch takes as well, unless that is known already.
    let key = ThroughputKey { mode: ThroughputMode::Launch };
    let launch = ThroughputValue { ops_count: 1, duration: slack };
    ThroughputCache::get_for_device(client.name(), client.properties()).lock().insert(key, launch);
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use cubecl::throughput::ThroughputError;

    use super::*;

    #[test]
    fn the_slack_is_taken_for_what_a_launch_takes() {
        let folder = std::env::temp_dir().join(format!("bifocal-tuning-{}", std::process::id()));
        crate::keep_kernels(&folder).unwrap();
        let client = crate::open("cpu").unwrap();
        let slack = Duration::from_micros(700);
        settle_within(&client, slack);
        // Known, so nothing is measured.
        let key = ThroughputKey { mode: ThroughputMode::Launch };
        let launch = client.measure_throughput(key, || Err(ThroughputError::NoTiming)).unwrap();
        assert_eq!(launch.duration_per_op(), slack);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
