//! Writes the CUDA C++ of every tensor-core kernel in the choice tables into a folder, one file per kernel, named
//! after the kernel and the architecture it is for. Needs no GPU; `./dev kernels` compiles what this writes.

use std::{fs, path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: sources FOLDER [PART OF A NAME]");
        return ExitCode::FAILURE;
    };
    let part = std::env::args().nth(2).unwrap_or_default();
    let written = fs::create_dir_all(&folder).map_err(|error| error.to_string()).and_then(|()| {
        let others = bifocal_linear::sources()
            .chain(bifocal_router::sources())
            .chain(bifocal_decode::sources())
            .filter(|(name, _)| name.contains(&part));
        let others = others.map(|(name, source)| source().map(|source| (name, source)));
        bifocal_tile::sources(&part).chain(others).try_for_each(|kernel| {
            let (name, source) = kernel?;
            fs::write(folder.join(format!("{name}.cu")), source).map_err(|error| error.to_string())
        })
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("sources: {reason}");
            ExitCode::FAILURE
        }
    }
}
