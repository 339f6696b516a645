//! How the small kernels of this crate are launched: one unit per element of work.

use bifocal_core::{DeviceProfile, device::TensorView};
use cubecl::{
    client::Client,
    prelude::{BufferArg, CubeCount, CubeDim},
    server::Handle,
};

/// Cubes and units for `work` units of work.
pub(crate) fn over(client: &Client, work: usize) -> (CubeCount, CubeDim) {
    let profile = DeviceProfile::of(client);
    let units = profile.cpu_cores.unwrap_or(64).min(profile.max_units_per_cube);
    let cubes = work.div_ceil(units as usize).max(1);
    let rows = cubes.div_ceil(65_535);
    (CubeCount::Static(cubes.div_ceil(rows) as u32, rows as u32, 1), CubeDim::new_1d(units))
}

/// A buffer of 32-bit words.
pub(crate) fn words(handle: &Handle) -> BufferArg {
    // SAFETY: the length is the buffer's own.
    unsafe { BufferArg::from_raw_parts(handle.clone(), handle.size_in_used() as usize / 4) }
}

/// A tensor whose span has been checked against its buffer.
pub(crate) fn tensor<const RANK: usize>(view: TensorView<'_, RANK>) -> BufferArg {
    // SAFETY: callers run `TensorView::check` first.
    unsafe { BufferArg::from_raw_parts(view.handle().clone(), view.span()) }
}
