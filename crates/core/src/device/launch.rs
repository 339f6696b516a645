//! How kernels are launched: grids and buffer arguments. Policy that every kernel shares is here once.

use cubecl::{
    client::Client,
    prelude::{BufferArg, CubeCount, CubeDim},
    server::Handle,
};

use super::TensorView;

/// A grid of at least `work` units, one per piece of work; kernels check their number against the work there is.
///
/// On the CPU runtime every unit of a cube is a thread; elsewhere a cube fills a few planes. Cubes spread over two
/// dimensions where one would pass the 65,535 that some devices allow.
pub fn grid(client: &Client, work: usize) -> (CubeCount, CubeDim) {
    let hardware = &client.properties().hardware;
    let units = hardware.num_cpu_cores.unwrap_or(64).min(hardware.max_units_per_cube);
    let cubes = work.div_ceil(units as usize).max(1);
    let rows = cubes.div_ceil(65_535);
    (CubeCount::Static(cubes.div_ceil(rows) as u32, rows as u32, 1), CubeDim::new_1d(units))
}

/// Where loads of a view start: at any sum of multiples of these numbers of elements.
pub fn steps<const RANK: usize>(view: TensorView<'_, RANK>) -> impl Iterator<Item = usize> {
    let start = view.handle().offset_start.unwrap_or(0) as usize / view.element().size();
    core::iter::once(start).chain(view.strides().into_iter().take(RANK - 1))
}

/// Numbers that one load takes, up to `most`, a power of two, where loads start as `steps` say.
pub fn width(most: usize, steps: impl IntoIterator<Item = usize>) -> usize {
    steps.into_iter().fold(most, |width, step| {
        let mut fits = width;
        while !step.is_multiple_of(fits) {
            fits /= 2;
        }
        fits
    })
}

/// A whole buffer as 32-bit words.
pub fn words(handle: &Handle) -> BufferArg {
    // SAFETY: the length is the buffer's own.
    unsafe { BufferArg::from_raw_parts(handle.clone(), handle.size_in_used() as usize / 4) }
}

/// What a view reaches, as a buffer of its elements.
///
/// # Safety
/// The view has passed [`TensorView::check`], so that its span lies inside its buffer.
pub unsafe fn elements<const RANK: usize>(view: TensorView<'_, RANK>) -> BufferArg {
    // SAFETY: the caller's.
    unsafe { BufferArg::from_raw_parts(view.handle().clone(), view.span()) }
}
