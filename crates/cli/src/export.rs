//! `bifocal export`: the model of a training run, to be used elsewhere.

use std::path::PathBuf;

use anyhow::Result;
use bifocal_lm::{CHECKPOINT, Checkpoint};
use clap::Args;

#[derive(Args)]
pub(crate) struct Options {
    /// The folder of a run that `bifocal train` has made.
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Where its weights and settings go; `bifocal demo --run` reads that file as it reads the folder.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let checkpoint = Checkpoint::load(&options.run.join(CHECKPOINT))?.weights_alone();
    checkpoint.save(&options.file)?;
    println!("{}: the weights after {} steps", options.file.display(), checkpoint.step());
    Ok(())
}
