//! Models that have learned: those of runs, and the one that comes with the tool.

use std::path::Path;

use bifocal_lm::{CHECKPOINT, Checkpoint, Result};

/// A decoder that has learned from Bifocal's own book; benches/demo-model.sh made it.
const INSIDE: &[u8] = include_bytes!("demo/model");

/// What a run has learned (its folder, or what `bifocal export` made of it), or the decoder inside; and whose it is.
pub(crate) fn read(run: Option<&Path>) -> Result<(Checkpoint, String)> {
    Ok(match run {
        Some(run) if run.is_dir() => (Checkpoint::load(&run.join(CHECKPOINT))?, run.display().to_string()),
        Some(file) => (Checkpoint::load(file)?, file.display().to_string()),
        None => {
            let inside = Checkpoint::read(INSIDE, Path::new("the decoder inside"))?;
            (inside, "a decoder that has read Bifocal's book".to_string())
        }
    })
}
