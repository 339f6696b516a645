//! The kernel cache: on unless it is turned off, because waiting for a compiler is never what was asked for.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use bifocal::cubecl::client::Client;
use etcetera::BaseStrategy;
use serde::Serialize;

/// How much longer than it might a product or a reduction of Burn's may take. A search for less compiles up to twenty
/// kernels for every shape, some seconds each.
const SLACK: Duration = Duration::from_millis(1);

/// What is kept, as commands report it.
#[derive(Serialize)]
pub(crate) struct Kept {
    file: PathBuf,
    pub(crate) kernels: u64,
    bytes: u64,
}

/// Keeps compiled kernels in `wanted`, or in the user's cache folder; not at all for `off`. Has to come before any device
/// is opened.
pub(crate) fn turn_on(wanted: Option<&Path>) -> Result<()> {
    match wanted {
        Some(off) if off == Path::new("off") => Ok(()),
        Some(folder) => Ok(bifocal::keep_kernels(folder)?),
        None => {
            // Nobody asked for this folder, so no command fails for it.
            if let Err(error) = folder().and_then(|folder| Ok(bifocal::keep_kernels(&folder)?)) {
                eprintln!("bifocal: compiled kernels are not kept: {error:#}");
            }
            Ok(())
        }
    }
}

/// Has Burn's operations on this device settle for kernels that are good enough. Only where something is kept: the slack
/// is kept with it, in a store that would otherwise be that of every program that uses CubeCL.
pub(crate) fn settle(client: &Client) {
    if bifocal::kernel_cache().is_some() {
        bifocal::settle_within(client, SLACK);
    }
}

fn folder() -> Result<PathBuf> {
    let user = etcetera::choose_base_strategy().context("the user has no cache folder")?;
    Ok(user.cache_dir().join("bifocal"))
}

impl Kept {
    /// What is kept now; `None` when nothing is to be.
    pub(crate) fn now() -> Option<Self> {
        bifocal::kernel_cache().map(|cache| Self {
            file: cache.file,
            kernels: cache.kernels,
            bytes: cache.bytes,
        })
    }
}

/// One sentence about what is kept.
pub(crate) fn describe(kept: Option<&Kept>) -> String {
    match kept {
        Some(Kept { file, kernels, bytes }) => {
            let (size, file) = (bytes.div_ceil(1024), file.display());
            format!("Compiled kernels are kept in {file} ({kernels} of them, {size} KiB).")
        }
        None => "Compiled kernels are not kept: the cache is off.".into(),
    }
}
