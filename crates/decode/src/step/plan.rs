//! The first launch: what every list needs, by lengths and routes as they are now.

// In a kernel `%` is one instruction.
#![allow(clippy::manual_is_multiple_of)]

use bifocal_core::DeviceProfile;
use cubecl::prelude::*;

use super::{
    pieces::cost_of,
    rows::{Numbers, row_of, rows_in},
};
use crate::{reaches::rule_of, view::Places};

const PLANE: u32 = DeviceProfile::PLANE;

/// Units of the cube that plans for all lists, at most.
pub(super) const PLANNERS: usize = 1024;

/// Writes the union of what the rows of a list see. Gives what it costs.
#[cube]
fn plan_list(
    list: u32,
    tables: &[u32],
    slots: &[u32],
    routes: &[u32],
    rules: &[i32],
    needs: &mut [u32],
    places: &Places,
    numbers: &Numbers,
    #[comptime] routed: bool,
) -> u32 {
    let batch = list / numbers.tiles / places.kv_heads;
    let length = tables[(slots[batch as usize] * places.pitch) as usize] as i32;
    let mut low = length;
    let mut high = 0i32;
    let mut sinks = 0i32;
    for row in 0..rows_in(list, numbers) {
        let row = row_of(list, row, places.kv_heads, routes, numbers, routed);
        let position = length - numbers.query_len as i32 + row.token as i32;
        let rule = rule_of(rules, row.route, position);
        let end = min(rule.last, length - 1i32) + 1i32;
        let start = max(max(rule.low + 1i32, rule.skip), 0i32);
        if start < end {
            low = min(low, start);
            high = max(high, end);
        }
        sinks = max(sinks, min(rule.sinks, end));
    }
    // Sinks that reach into the other keys are some of them.
    if sinks >= low {
        low = 0i32;
        sinks = 0i32;
    }
    // Room is made for what a sequence can have.
    let keys = min((sinks + max(high - low, 0i32)) as u32, numbers.most_keys);
    let cost = cost_of(keys, numbers);
    let at = list as usize * 4;
    needs[at] = low as u32;
    needs[at + 1] = sinks as u32;
    needs[at + 2] = keys;
    needs[at + 3] = cost;
    cost
}

/// One unit per list.
#[cube(launch_unchecked)]
pub(super) fn plan_kernel(
    tables: &[u32],
    slots: &[u32],
    routes: &[u32],
    rules: &[i32],
    needs: &mut [u32],
    places: Places,
    numbers: Numbers,
    #[comptime] routed: bool,
) {
    if ABSOLUTE_POS >= numbers.lists as usize {
        terminate!();
    }
    plan_list(ABSOLUTE_POS as u32, tables, slots, routes, rules, needs, &places, &numbers, routed);
}

/// One cube for all lists, which also adds up what those before each cost: `starts` has one more than there are lists. `units`
/// is a multiple of a plane.
#[cube(launch_unchecked)]
pub(super) fn plan_and_add_kernel(
    tables: &[u32],
    slots: &[u32],
    routes: &[u32],
    rules: &[i32],
    needs: &mut [u32],
    starts: &mut [u32],
    places: Places,
    numbers: Numbers,
    #[comptime] routed: bool,
    #[comptime] units: u32,
) {
    let planes = comptime![units / PLANE];
    let mut of_planes = Shared::<[u32]>::new_slice(comptime![planes as usize]);
    let plane = UNIT_POS / PLANE;
    let lane = UNIT_POS % PLANE;
    let mut before = 0u32;
    let mut first = 0u32;
    while first < numbers.lists {
        let list = first + UNIT_POS;
        let mut cost = 0u32;
        if list < numbers.lists {
            cost = plan_list(list, tables, slots, routes, rules, needs, &places, &numbers, routed);
        }
        sync_plane();
        let up_to = plane_inclusive_sum(cost);
        if lane == comptime![PLANE - 1] {
            of_planes[plane as usize] = up_to;
        }
        sync_cube();
        let mut of_plane = 0u32;
        if lane < planes {
            of_plane = of_planes[lane as usize];
        }
        let before_plane = plane_sum(select(lane < plane, of_plane, 0u32));
        if list < numbers.lists {
            starts[list as usize] = before + before_plane + up_to - cost;
        }
        before += plane_sum(of_plane);
        sync_cube();
        first += units;
    }
    if UNIT_POS == 0u32 {
        starts[numbers.lists as usize] = before;
    }
}

/// The last list that does not begin beyond a cost, as a plane finds it: of all lists that begin there the one that has costs.
#[cube]
pub(super) fn list_at_cost(cost: u32, starts: &[u32], numbers: &Numbers) -> u32 {
    let lane = UNIT_POS % PLANE;
    let mut low = 0u32;
    let mut high = numbers.lists;
    while high - low > 1u32 {
        let step = (high - low).div_ceil(PLANE);
        let at = low + lane * step;
        let mut begins = 0u32;
        if at < high {
            begins = select(starts[at as usize] <= cost, 1u32, 0u32);
        }
        low += (plane_sum(begins) - 1u32) * step;
        high = min(low + step, high);
    }
    low
}
