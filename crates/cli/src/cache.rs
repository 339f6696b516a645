//! The kernel cache: on unless it is turned off, because waiting for a compiler is never what was asked for.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use etcetera::BaseStrategy;
use serde::Serialize;

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
