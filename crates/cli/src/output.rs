//! What every command prints, and how it writes files.

use std::{io::Write, path::Path};

use anyhow::{Context, Result};
use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};

/// A table for a terminal.
pub(crate) fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header);
    table
}

/// A progress bar of `steps` steps; invisible where stderr is not a terminal.
pub(crate) fn progress(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps as u64).with_style(style)
}

/// Writes a file whole or not at all: what is at `path` changes only once everything is written.
pub(crate) fn write(path: &Path, contents: &[u8]) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let write = || -> Result<()> {
        let mut file = tempfile::Builder::new().prefix(".bifocal-").tempfile_in(folder)?;
        file.write_all(contents)?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
        }
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Writes JSON to a file, or to standard output for `-`.
pub(crate) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(value)?;
    if path == Path::new("-") {
        println!("{json}");
        return Ok(());
    }
    write(path, json.as_bytes())
}

/// Loading a GPU's driver can panic inside its bindings where there is none. The panic is caught and reported as
/// an error with its device; this keeps its backtrace off the screen.
pub(crate) fn quiet_driver_panics() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let in_bindings = info.location().is_some_and(|location| {
            ["cudarc", "wgpu", "cubecl"].iter().any(|name| location.file().contains(name))
        });
        if !in_bindings || std::env::var_os("RUST_BACKTRACE").is_some() {
            default(info);
        }
    }));
}
