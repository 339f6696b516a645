use bifocal_core::{
    DeviceProfile, Error, Problem, Result,
    device::{
        RouteGeometry, RoutedRows, Routes, Rows,
        launch::{grid, words},
    },
};
use cubecl::{client::Client, prelude::*, server::Handle};

/// The bit of a row that marks it as having no valid route.
pub const INVALID_ROW: u32 = 1 << 31;

/// Tokens that one unit compacts: few where planes sum what comes before.
const SEGMENT: u32 = 64;
const PLANE_SEGMENT: u32 = 16;

/// Routes turned into work, in device memory: per reach and per (batch, kv head) the ascending list of its rows,
/// packed over the query heads that share the kv head, and the work items cut from all lists.
///
/// A row is `token * G + head in group`. A row whose route names no reach is in the list of the last reach with
/// [`INVALID_ROW`] set, so that its output can be made NaN. Building takes three launches and no read-back: count
/// per segment of tokens, compact (stable, so lists ascend and two runs agree bit for bit), cut.
///
/// Lists take turns, several at once. Within a turn items stand by their rank from the end of their list: the last of
/// every list, then the last but one of every list, and so on. Where keys up to the query's own are visible that is
/// longest first, as nearly as can be told without looking at rows. A turn has about as many items as the device has
/// multiprocessors: they begin together and read the same keys at the same time, from a cache; as they end, shortest
/// first, the items of the next turn begin, longest first, and all of these end together. So turns go in pairs.
#[derive(Clone, Debug)]
pub struct Plan {
    rows: Handle,
    list_counts: Handle,
    items: Handle,
    item_counts: Handle,
    counters: Handle,
    geometry: RouteGeometry,
    lists: usize,
    packed_rows: usize,
    max_items: usize,
    item_rows: u32,
    shape: [usize; 3],
}

/// A [`Plan`] read back to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPlan {
    /// `[reach][batch * kv head]`: ascending rows.
    pub lists: Vec<Vec<Vec<u32>>>,
    /// `[reach]`: (batch * kv head, first entry, rows) of each work item, by turns of lists, and within a turn by their rank
    /// from the end of their list.
    pub items: Vec<Vec<[u32; 3]>>,
}

impl Plan {
    /// Plans `routes` for `problem`, in items of at most `item_rows` rows (the engine's
    /// `bifocal_tile::item_rows`).
    ///
    /// # Errors
    /// [`Error::Shape`] when the routes do not fit the problem, [`Error::Option`] for items of 0 rows,
    /// [`Error::DeviceMismatch`], and [`Error::TooLarge`] when the lists pass 2^32 rows.
    pub fn build(client: &Client, routes: &Routes, problem: &Problem, item_rows: u32) -> Result<Self> {
        let geometry = routes.geometry();
        geometry.check(problem)?;
        routes.check_device(client)?;
        if item_rows == 0 {
            return Err(Error::option("rows per item", item_rows, "at least 1"));
        }
        let lists = problem.batch * problem.kv_heads;
        let packed_rows = problem.packed_rows();
        let max_items = lists * packed_rows.div_ceil(item_rows as usize);
        let room = geometry.reaches as u128 * lists as u128 * packed_rows as u128;
        let limit = u128::from(u32::MAX) / 3;
        if room > limit {
            return Err(Error::TooLarge { what: "rows in a dispatch plan", size: room, limit });
        }
        // Planes take their segments together, and so none of two lists.
        let profile = DeviceProfile::of(client);
        let planes = profile.has_planes();
        let segment = if planes { PLANE_SEGMENT } else { SEGMENT };
        let mut segments = problem.query_len.div_ceil(segment as usize);
        if planes {
            segments = segments.next_multiple_of(DeviceProfile::PLANE as usize);
        }
        let buffer = |words: usize| client.empty(words * 4);
        let segment_counts = buffer(geometry.reaches * lists * segments);
        let group_counts =
            buffer(geometry.reaches * lists * segments.div_ceil(DeviceProfile::PLANE as usize));
        let plan = Self {
            rows: buffer(room as usize),
            list_counts: buffer(geometry.reaches * lists),
            items: buffer(geometry.reaches * max_items * 3),
            item_counts: buffer(geometry.reaches),
            counters: buffer(geometry.reaches * RoutedRows::COUNTERS),
            geometry,
            lists,
            packed_rows,
            max_items,
            item_rows,
            shape: [problem.batch, problem.kv_heads, packed_rows],
        };

        let shape = || {
            ShapeLaunch::new(
                geometry.heads as u32,
                geometry.tokens as u32,
                problem.heads as u32,
                problem.kv_heads as u32,
                lists as u32,
                segments as u32,
            )
        };
        let reaches = geometry.reaches as u32;
        // SAFETY: each unit checks its number against the work there is, and buffers have room for every row.
        unsafe {
            let (cubes, units) = grid(client, lists * segments);
            count_segments::launch_unchecked(
                client,
                cubes.clone(),
                units,
                words(routes.handle()),
                words(&segment_counts),
                words(&group_counts),
                shape(),
                reaches,
                segment,
                planes,
            );
            compact::launch_unchecked(
                client,
                cubes,
                units,
                words(routes.handle()),
                words(&segment_counts),
                words(&group_counts),
                words(&plan.rows),
                words(&plan.list_counts),
                shape(),
                reaches,
                segment,
                planes,
            );
            let (cubes, units) = grid(client, geometry.reaches * max_items.max(RoutedRows::COUNTERS));
            cut_items::launch_unchecked(
                client,
                cubes,
                units,
                words(&plan.list_counts),
                words(&plan.items),
                words(&plan.item_counts),
                words(&plan.counters),
                lists as u32,
                max_items as u32,
                item_rows,
                profile.multiprocessors.max(1),
                reaches,
            );
        }
        Ok(plan)
    }

    /// How many reaches the planned routes choose from.
    pub fn reaches(&self) -> usize {
        self.geometry.reaches
    }

    /// The rows on one reach, for an attention operator.
    ///
    /// # Errors
    /// [`Error::Option`] when the plan has no such reach.
    pub fn rows(&self, reach: usize) -> Result<Rows<'_>> {
        if reach >= self.geometry.reaches {
            return Err(Error::option("reach", reach, format!("0..{}", self.geometry.reaches)));
        }
        Ok(Rows::Routed(RoutedRows {
            rows: &self.rows,
            list_counts: &self.list_counts,
            items: &self.items,
            item_counts: &self.item_counts,
            counters: &self.counters,
            reach: reach as u32,
            max_items: self.max_items,
            item_rows: self.item_rows,
            shape: self.shape,
        }))
    }

    /// The rows on the last reach: full attention.
    ///
    /// # Errors
    /// Never: a plan has at least one reach.
    pub fn far_rows(&self) -> Result<Rows<'_>> {
        self.rows(self.geometry.reaches - 1)
    }

    /// Reads lists and items back, for tests and diagnosis. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Runtime`].
    pub fn to_host(&self, client: &Client) -> Result<HostPlan> {
        let read = |handle: &Handle| -> Result<Vec<u32>> {
            let bytes = client.read_one(handle.clone()).map_err(|error| Error::Runtime(error.to_string()))?;
            Ok(bytemuck::pod_collect_to_vec(&bytes))
        };
        let (rows, counts) = (read(&self.rows)?, read(&self.list_counts)?);
        let (items, item_counts) = (read(&self.items)?, read(&self.item_counts)?);
        let reaches = 0..self.geometry.reaches;
        let list = |reach: usize, list: usize| {
            let at = reach * self.lists + list;
            rows[at * self.packed_rows..][..counts[at] as usize].to_vec()
        };
        let lists =
            reaches.clone().map(|reach| (0..self.lists).map(|at| list(reach, at)).collect()).collect();
        let items = reaches
            .map(|reach| {
                let of_reach = &items[reach * self.max_items * 3..][..item_counts[reach] as usize * 3];
                of_reach.chunks_exact(3).map(|item| [item[0], item[1], item[2]]).collect()
            })
            .collect();
        Ok(HostPlan { lists, items })
    }
}

/// The run-time shape of routes and lists.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Shape {
    router_heads: u32,
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    /// Batch x kv heads.
    lists: u32,
    segments: u32,
}

/// Routes are bytes, read as words because not every runtime can address bytes.
#[cube]
fn route_at(routes: &[u32], row: u32, token: u32, tokens: u32) -> u32 {
    let pitch = tokens.div_ceil(4u32);
    let word = routes[(row * pitch + token / 4u32) as usize];
    (word >> ((token % 4u32) * 8u32)) & 255u32
}

/// The reach whose list takes a row: its route, or the last where the route names none.
#[cube]
fn list_of(route: u32, #[comptime] reaches: u32) -> u32 {
    min(route, comptime![reaches - 1])
}

#[cube]
fn router_row(shape: &Shape, list: u32, head_in_group: u32) -> u32 {
    let group = shape.heads / shape.kv_heads;
    let head = (list % shape.kv_heads) * group + head_in_group;
    (list / shape.kv_heads) * shape.router_heads + head * shape.router_heads / shape.heads
}

/// Counts the rows of every segment on each reach, and of every plane's segments together.
#[cube(launch_unchecked)]
fn count_segments(
    routes: &[u32],
    segment_counts: &mut [u32],
    group_counts: &mut [u32],
    shape: Shape,
    #[comptime] reaches: u32,
    #[comptime] segment_tokens: u32,
    #[comptime] planes: bool,
) {
    // The same for a whole plane, where there are planes.
    if ABSOLUTE_POS >= (shape.lists * shape.segments) as usize {
        terminate!();
    }
    let list = ABSOLUTE_POS as u32 / shape.segments;
    let segment = ABSOLUTE_POS as u32 % shape.segments;
    let mut counts = Array::<u32>::new(comptime![reaches as usize]);
    for reach in 0..comptime![reaches as usize] {
        counts[reach] = 0u32;
    }
    let first = min(segment * segment_tokens, shape.tokens);
    let end = min(first + segment_tokens, shape.tokens);
    for head in 0..shape.heads / shape.kv_heads {
        let row = router_row(&shape, list, head);
        for token in first..end {
            let reach = list_of(route_at(routes, row, token, shape.tokens), reaches);
            counts[reach as usize] += 1u32;
        }
    }
    for reach in 0..comptime![reaches as usize] {
        let at = (reach as u32 * shape.lists + list) * shape.segments + segment;
        segment_counts[at as usize] = counts[reach];
        if comptime![planes] {
            let together = plane_sum(counts[reach]);
            if UNIT_POS_PLANE == 0u32 {
                group_counts[(at / DeviceProfile::PLANE) as usize] = together;
            }
        }
    }
}

#[cube(launch_unchecked)]
fn compact(
    routes: &[u32],
    segment_counts: &[u32],
    group_counts: &[u32],
    rows: &mut [u32],
    list_counts: &mut [u32],
    shape: Shape,
    #[comptime] reaches: u32,
    #[comptime] segment_tokens: u32,
    #[comptime] planes: bool,
) {
    // The same for a whole plane, where there are planes.
    if ABSOLUTE_POS >= (shape.lists * shape.segments) as usize {
        terminate!();
    }
    let list = ABSOLUTE_POS as u32 / shape.segments;
    let segment = ABSOLUTE_POS as u32 % shape.segments;
    let group = shape.heads / shape.kv_heads;
    let packed = shape.tokens * group;
    let mut next = Array::<u32>::new(comptime![reaches as usize]);
    for reach in 0..comptime![reaches as usize] {
        let base = (reach as u32 * shape.lists + list) * shape.segments;
        let mut before = 0u32;
        if comptime![planes] {
            // The units of a plane have 32 segments in a row; those of the planes before are summed by all of them.
            let lane = segment % DeviceProfile::PLANE;
            let group = segment / DeviceProfile::PLANE;
            let groups_base = base / DeviceProfile::PLANE;
            let mut g = lane;
            while g < group {
                before += group_counts[(groups_base + g) as usize];
                g += DeviceProfile::PLANE;
            }
            let own = segment_counts[(base + segment) as usize];
            before = plane_sum(before) + plane_exclusive_sum(own);
        } else {
            for s in 0..segment {
                before += segment_counts[(base + s) as usize];
            }
        }
        next[reach] = before;
    }
    let first = min(segment * segment_tokens, shape.tokens);
    let end = min(first + segment_tokens, shape.tokens);
    for token in first..end {
        for head in 0..group {
            let route = route_at(routes, router_row(&shape, list, head), token, shape.tokens);
            let reach = list_of(route, reaches);
            let mut row = token * group + head;
            if route >= reaches {
                row += INVALID_ROW;
            }
            let at = (reach * shape.lists + list) * packed + next[reach as usize];
            rows[at as usize] = row;
            next[reach as usize] += 1u32;
        }
    }
    if segment + 1u32 == shape.segments {
        for reach in 0..comptime![reaches as usize] {
            list_counts[(reach as u32 * shape.lists + list) as usize] = next[reach];
        }
    }
}

/// One unit per item that there can be, or per counter where those are more.
#[cube(launch_unchecked)]
fn cut_items(
    list_counts: &[u32],
    items: &mut [u32],
    item_counts: &mut [u32],
    counters: &mut [u32],
    lists: u32,
    max_items: u32,
    item_rows: u32,
    multiprocessors: u32,
    #[comptime] reaches: u32,
) {
    if ABSOLUTE_POS < comptime![reaches as usize * RoutedRows::COUNTERS] {
        counters[ABSOLUTE_POS] = 0u32;
    }
    if ABSOLUTE_POS >= (reaches * max_items) as usize {
        terminate!();
    }
    let reach = ABSOLUTE_POS as u32 / max_items;
    // The unit's item, counting list by list.
    let number = ABSOLUTE_POS as u32 % max_items;
    let mut before = 0u32;
    let mut mine = lists;
    let mut item = 0u32;
    for list in 0..lists {
        let cut = list_counts[(reach * lists + list) as usize].div_ceil(item_rows);
        if number >= before && number < before + cut {
            mine = list;
            item = number - before;
        }
        before += cut;
    }
    if number == 0u32 {
        item_counts[reach as usize] = before;
    }
    if mine < lists {
        let count = list_counts[(reach * lists + mine) as usize];
        let rank = count.div_ceil(item_rows) - 1u32 - item;
        // As many pairs of turns as two items per multiprocessor fill.
        let pairs = (before + multiprocessors) / (2u32 * multiprocessors);
        let at_once = max(lists / max(2u32 * pairs, 1u32), 1u32);
        let turn = mine / at_once;
        // Before it stand all items of earlier turns, those of its turn of a smaller rank, and those of the same rank in
        // earlier lists.
        let mut place = 0u32;
        for list in 0..lists {
            let cut = list_counts[(reach * lists + list) as usize].div_ceil(item_rows);
            if list / at_once < turn {
                place += cut;
            } else if list / at_once == turn {
                place += min(cut, rank);
                if list < mine && cut > rank {
                    place += 1u32;
                }
            }
        }
        let at = ((reach * max_items + place) * 3u32) as usize;
        items[at] = mine;
        items[at + 1] = item * item_rows;
        items[at + 2] = min(item_rows, count - item * item_rows);
    }
}
