//! Compiled kernels that outlive the process. The store is CubeCL's; what is here turns it on and looks into it.

use std::path::{Path, PathBuf};

use bifocal_core::{DeviceProfile, Error, Result};
use cubecl::{
    config::{CubeClRuntimeConfig, RuntimeConfig, cache::CacheConfig},
    environment,
};

/// The one runtime of [`open`](crate::open) whose compiled kernels CubeCL 0.11 stores, and the name of its store. The CPU
/// runtime keeps machine code in memory alone, and WGSL is compiled by the driver.
const STORED: &str = "cuda";

/// Compiled kernels that are kept on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelCache {
    /// The database that holds them.
    pub file: PathBuf,
    /// How many there are, of all devices and versions.
    pub kernels: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Keeps compiled kernels in `folder`, for this process and for later ones: the first call of a kernel then loads what
/// an earlier process compiled. Off unless this is called or CubeCL's own configuration (`cubecl.toml`,
/// `compilation.cache`) turns it on: a library does not write to disk unasked.
///
/// Call it before a device is opened. All else in CubeCL's configuration stays as files and environment variables have
/// it; results of autotuning go to the same folder. A kernel is found again by its compile-time key and by the
/// program's build id, so another build compiles anew where the generated source differs.
///
/// Only runtimes that have something to keep use it, see [`keeps_kernels`].
///
/// # Errors
/// [`Error::Option`] when the folder cannot be made, when the program has no build id (a changed kernel would pass for
/// the old one), and when CubeCL is configured already because a device was opened.
pub fn keep_kernels(folder: &Path) -> Result<()> {
    let refuse = |found: String, expected: &str| Err(Error::option("the kernel cache", found, expected));
    if buildid::build_id().is_none() {
        return refuse("unsafe without a build id".into(), "a program linked with `--build-id`");
    }
    if let Err(error) = std::fs::create_dir_all(folder) {
        let expected = "a folder that can be written";
        return refuse(format!("in {} ({error})", folder.display()), expected);
    }
    let mut config = CubeClRuntimeConfig::from_current_dir().override_from_env();
    config.compilation.cache = true;
    config.environment.path = CacheConfig::Directory(folder.into());
    match CubeClRuntimeConfig::try_set(config) {
        true => Ok(()),
        false => refuse("asked for too late".into(), "to be asked for before a device is opened"),
    }
}

/// What is kept; `None` unless kernels are kept, see [`keep_kernels`].
pub fn kernel_cache() -> Option<KernelCache> {
    if !CubeClRuntimeConfig::get().compilation.cache {
        return None;
    }
    let file = environment::path();
    // Asking for its contents would make a database where there is none yet.
    let stored = if file.exists() { environment::namespaces() } else { Vec::new() };
    // `cuda/0.11.3/ptx_sm90-cpp`; the index beside it is `cuda-second-line/...`.
    let of_kernels = stored.iter().filter(|store| store.namespace.split('/').next() == Some(STORED));
    let (kernels, bytes) = of_kernels.fold((0, 0), |(n, sum), store| (n + store.entries, sum + store.bytes));
    Some(KernelCache { file, kernels, bytes })
}

/// Whether the runtime of a device has compiled kernels to keep.
pub fn keeps_kernels(profile: &DeviceProfile) -> bool {
    profile.runtime == STORED
}
