//! What kernels of this crate share: their grid, their counters and strides.

// In a kernel `%` is one instruction.
#![allow(clippy::manual_is_multiple_of)]

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

/// Counts the routes of four tokens of a row, from `first` on: there is one counter per reach, and one for the routes that name
/// none. On `planes` units count together, so that all of a plane have to be here, whether `live` or not.
#[cube]
pub(crate) fn count_routes(
    counts: &[Atomic<u32>],
    route: Vector<u32, Const<4>>,
    row: u32,
    first: u32,
    tokens: u32,
    live: bool,
    #[comptime] reaches: u32,
    #[comptime] planes: bool,
) {
    for reach in 0..reaches + 1u32 {
        let mut here = 0u32;
        #[unroll]
        for lane in 0..4usize {
            let counted = live && first + comptime![lane as u32] < tokens;
            here += select(counted && min(route.extract(lane), reaches) == reach, 1u32, 0u32);
        }
        let mut adds = here > 0u32;
        if comptime![planes] {
            sync_plane();
            // A plane of one row, as nearly all are, adds once.
            if plane_all(row == plane_broadcast(row, 0u32)) {
                here = plane_sum(here);
                adds = here > 0u32 && UNIT_POS % DeviceProfile::PLANE == 0u32;
            }
        }
        if adds {
            counts[(row * (reaches + 1u32) + reach) as usize].fetch_add(here);
        }
    }
}
