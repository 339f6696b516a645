//! What kernels of this crate share: their grid, their counters and strides.

use bifocal_core::{
    DeviceProfile, Error, Refusal, Refusals, Result, Routine,
    device::{
        RouteGeometry, Routes, TensorView,
        launch::{grid, words},
    },
};
use cubecl::{client::Client, prelude::*, server::Handle};

/// Strides of a `[batch, head, token, dim]` tensor, in elements; the last is 1.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Strides {
    pub(crate) batch: u32,
    pub(crate) head: u32,
    pub(crate) token: u32,
}

pub(crate) fn strides(view: TensorView<'_, 4>) -> StridesLaunch {
    let [batch, head, token, _] = view.strides();
    StridesLaunch::new(batch as u32, head as u32, token as u32)
}

/// Where a row begins.
#[cube]
pub(crate) fn offset(strides: &Strides, batch: u32, head: u32, token: u32) -> usize {
    (batch * strides.batch + head * strides.head + token * strides.token) as usize
}

/// Checks that the device can count routes, and returns cubes and units for one unit per four tokens of a router
/// head: four, because routes are bytes that are written as words.
pub(crate) fn over_quads(
    client: &Client,
    profile: &DeviceProfile,
    router: &'static str,
    geometry: RouteGeometry,
) -> Result<(CubeCount, CubeDim)> {
    if !profile.atomic_add {
        let refusals = Refusals(vec![(Routine::Portable, Refusal::Atomics)]);
        return Err(Error::Refused { operator: router, refusals });
    }
    let quads = geometry.bytes() / 4;
    let limit = u128::from(u32::MAX);
    let size = geometry.len() as u128 * geometry.reaches as u128;
    if size > limit {
        return Err(Error::TooLarge { what: "scores of a router", size, limit });
    }
    Ok(grid(client, quads))
}

/// Room for routes, and counters that start at zero. They are cleared on the device: not every graph can record an upload.
pub(crate) fn outputs(client: &Client, geometry: RouteGeometry) -> Result<(Routes, Handle)> {
    let routes = Routes::from_device(client, geometry, client.empty(geometry.bytes()))?;
    let count = geometry.batch * geometry.heads * (geometry.reaches + 1);
    let counters = client.empty(count * 4);
    let (cubes, units) = grid(client, count);
    // SAFETY: each unit checks its number against the counters there are.
    unsafe {
        clear_kernel::launch_unchecked(client, cubes, units, words(&counters), count as u32);
    }
    Ok((routes, counters))
}

/// One unit per counter.
#[cube(launch_unchecked)]
fn clear_kernel(counters: &mut [u32], count: u32) {
    if ABSOLUTE_POS < count as usize {
        counters[ABSOLUTE_POS] = 0u32;
    }
}
