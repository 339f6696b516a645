//! The two kernels: sums of chunks, and outputs.

// In a kernel `%` is one instruction and `is_multiple_of` is not there; an `if` on compile-time values stays apart from
// one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_tensor_core::{
    copies::{Source, Tile, copy_tile},
    ptx::{copies_wait_all, global_address, shared_address},
    queries::Queries,
    sums::Sums,
};
use cubecl::prelude::*;

use super::{
    blueprint::{Blueprint, THREADS},
    features::map_rows,
    rows::Rows,
};
use crate::portable::{INVALID_ROW, Strides, offset};

/// The run-time numbers of a call. A query's index is the last key that it meets through the state.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Numbers {
    pub(super) kv_heads: u32,
    pub(super) group: u32,
    pub(super) query_len: u32,
    /// Keys that leave the window of some row.
    pub(super) keys: u32,
    /// Keys per chunk, and chunks.
    pub(super) chunk: u32,
    pub(super) chunks: u32,
    /// The index of the first query.
    pub(super) offset: i32,
    /// The chunk of that index, negative before the first, and chunks from there to the last query's.
    pub(super) first_chunk: i32,
    pub(super) segments: u32,
    /// The first query token, and key token, of the sequence among all that are packed.
    pub(super) first_query: u32,
    pub(super) first_key: u32,
    /// Query tokens that there are, of all sequences that are packed.
    pub(super) queries: u32,
    /// What rows without a valid route give.
    pub(super) nan: f32,
}

/// Keys or values of a list.
#[cube]
fn source_of<E: Float>(tensor: &[E], list: u32, strides: &Strides, numbers: &Numbers) -> Source {
    let start = offset(strides, list / numbers.kv_heads, list % numbers.kv_heads, numbers.first_key);
    Source { address: global_address::<E>(tensor.as_ptr()) + start as u64 * 2u64, stride: strides.token }
}

/// Keys and values of a list as a chunk's steps take them.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Keys {
    key: Source,
    value: Source,
    /// The index of the chunk's first, which is negative where it is before all keys.
    begin: i32,
    /// One past the chunk's last.
    end: u32,
}

#[cube]
impl Keys {
    /// Starts the copies of a step's keys and values; those beyond the chunk are zeros.
    fn copy(&self, step: u32, start: u32, #[comptime] blueprint: Blueprint) {
        let tile = comptime![Tile { rows: blueprint.tokens, dim: blueprint.dim, threads: THREADS }];
        // Before all keys `end` is 0, and so no key is there.
        let first = (self.begin + (step * comptime![blueprint.tokens as u32]) as i32) as u32;
        copy_tile(UNIT_POS, &self.key, first, self.end, start + comptime![blueprint.key_at()], tile);
        copy_tile(UNIT_POS, &self.value, first, self.end, value_of(step, start, blueprint), tile);
    }
}

/// Where the values of a step are.
#[cube]
fn value_of(step: u32, start: u32, #[comptime] blueprint: Blueprint) -> u32 {
    start + comptime![blueprint.value_at()] + step % 2u32 * comptime![blueprint.value_bytes()]
}

/// One cube, one chunk of a kv head: `sum_j phi(k_j)^T v_j` over its keys.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(super) fn sum_kernel<E: Float>(
    key: &[E],
    value: &[E],
    sums: &mut [f32],
    key_strides: Strides,
    value_strides: Strides,
    numbers: Numbers,
    #[comptime] blueprint: Blueprint,
    #[define(E)] _element: ElemType,
) {
    let list = CUBE_POS as u32 / numbers.chunks;
    let chunk = CUBE_POS as u32 % numbers.chunks;
    let room = Shared::<[u32]>::new_aligned_slice(comptime![blueprint.sum_bytes() / 4], 1024usize);
    let start = shared_address(&room);
    let begin = chunk * numbers.chunk;
    let end = min(begin + numbers.chunk, numbers.keys);
    let keys = Keys {
        key: source_of::<E>(key, list, &key_strides, &numbers),
        value: source_of::<E>(value, list, &value_strides, &numbers),
        begin: begin as i32,
        end,
    };
    let steps = (end - begin).div_ceil(comptime![blueprint.tokens as u32]);
    let mut sums_of_chunk = Sums::new(comptime![blueprint.sums()]);
    if steps > 0u32 {
        keys.copy(0u32, start, blueprint);
    }
    for step in 0..steps {
        copies_wait_all();
        sync_cube();
        map_rows(start + comptime![blueprint.key_at()], start, comptime![blueprint.tokens], blueprint);
        sync_cube();
        // All warps have left the keys, and the values before.
        if step + 1u32 < steps {
            keys.copy(step + 1u32, start, blueprint);
        }
        sums_of_chunk.add_keys(start, value_of(step, start, blueprint), comptime![blueprint.sums()]);
    }
    let base = (list * numbers.chunks + chunk) * comptime![(blueprint.features() * blueprint.dim) as u32];
    sums_of_chunk.store(global_address::<f32>(sums.as_ptr()), base, comptime![blueprint.sums()]);
}

/// Marks the packed rows that a dispatch plan lists: one unit, one place of a list.
#[cube(launch_unchecked)]
pub(super) fn mark_kernel(
    rows: &[u32],
    counts: &[u32],
    marks: &mut [u32],
    reach: u32,
    lists: u32,
    packed_rows: u32,
) {
    let list = ABSOLUTE_POS as u32 / packed_rows;
    let place = ABSOLUTE_POS as u32 % packed_rows;
    if list >= lists {
        terminate!();
    }
    let listed = reach * lists + list;
    if place < counts[listed as usize] {
        let row = rows[(listed * packed_rows + place) as usize];
        marks[(list * packed_rows + row % INVALID_ROW) as usize] = 1u32 + row / INVALID_ROW;
    }
}

/// Rounds the state to where rows read it. Gives what they have to multiply by.
#[cube]
fn publish(state: &Sums, start: u32, #[comptime] blueprint: Blueprint) -> f32 {
    state.publish(
        start + comptime![blueprint.state_at()],
        start + comptime![blueprint.maxima_at()],
        1usize,
        comptime![blueprint.sums()],
    )
}

/// One cube, one chunk of a kv head, step by step: the outputs of the queries whose indices lie in the step, from the state
/// before it and its keys; then the state after it.
///
/// ```text
/// O = phi(q) S + tril(phi(q) phi(k)^T) v,    S += phi(k)^T v
/// ```
///
/// (Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv 2312.06635, section 4.2,
/// on states that are kept once per chunk.)
#[cube(launch_unchecked, create_dummy_kernel)]
pub(super) fn read_kernel<E: Float, O: Float>(
    query: &[E],
    key: &[E],
    value: &[E],
    states: &[f32],
    marks: &[u32],
    out: &mut [O],
    query_strides: Strides,
    key_strides: Strides,
    value_strides: Strides,
    out_strides: Strides,
    numbers: Numbers,
    #[comptime] blueprint: Blueprint,
    #[define(E, O)] _elements: [ElemType; 2],
) {
    let list = CUBE_POS as u32 / numbers.segments;
    let chunk = numbers.first_chunk + (CUBE_POS as u32 % numbers.segments) as i32;
    let batch = list / numbers.kv_heads;
    let first_head = list % numbers.kv_heads * numbers.group;
    let room = Shared::<[u32]>::new_aligned_slice(comptime![blueprint.room_bytes() / 4], 1024usize);
    let start = shared_address(&room);
    let tokens = comptime![blueprint.tokens as u32];

    let begin = chunk * numbers.chunk as i32;
    let end = begin + numbers.chunk as i32;
    let keys = Keys {
        key: source_of::<E>(key, list, &key_strides, &numbers),
        value: source_of::<E>(value, list, &value_strides, &numbers),
        begin,
        end: max(min(end, numbers.keys as i32), 0i32) as u32,
    };
    // The chunk of the last query ends with it.
    let end = min(end, numbers.offset + numbers.query_len as i32);
    let list_start = offset(&query_strides, batch, first_head, numbers.first_query);
    let queries = Queries {
        address: global_address::<E>(query.as_ptr()) + list_start as u64 * 2u64,
        head_stride: query_strides.head,
        token_stride: query_strides.token,
        group: numbers.group,
        begin: begin - numbers.offset,
        end: end - numbers.offset,
    };
    let steps = ((end - begin) as u32).div_ceil(tokens);
    let tiles = queries.tiles(comptime![blueprint.queries()]);
    let target = offset(&out_strides, batch, first_head, numbers.first_query) as u64
        * comptime![if blueprint.out_f32 { 4u64 } else { 2u64 }];
    let target = global_address::<O>(out.as_ptr()) + target;
    let first_mark = (list * numbers.queries + numbers.first_query) * numbers.group;
    let query_room = start + comptime![blueprint.query_at()];

    queries.copy(0u32, 0u32, query_room, comptime![blueprint.queries()]);
    keys.copy(0u32, start, blueprint);
    let mut state = Sums::new(comptime![blueprint.sums()]);
    // Before the first chunk is what came in.
    let base = (list * numbers.chunks + max(chunk, 0i32) as u32)
        * comptime![(blueprint.features() * blueprint.dim) as u32];
    state.load(global_address::<f32>(states.as_ptr()), base, comptime![blueprint.sums()]);
    let mut descale = publish(&state, start, blueprint);

    let mut step = 0u32;
    let mut tile = 0u32;
    for turn in 0..steps * tiles {
        let last = tile + 1u32 == tiles;
        copies_wait_all();
        sync_cube();
        map_rows(
            query_room,
            start + comptime![blueprint.query_features_at()],
            comptime![blueprint.rows],
            blueprint,
        );
        if tile == 0u32 {
            map_rows(start + comptime![blueprint.key_at()], start, comptime![blueprint.tokens], blueprint);
        }
        sync_cube();
        // All warps have left the queries and keys, and the values before.
        if turn + 1u32 < steps * tiles {
            let next_step = select(last, step + 1u32, step);
            let next_tile = select(last, 0u32, tile + 1u32);
            queries.copy(next_step, next_tile, query_room, comptime![blueprint.queries()]);
            if last {
                keys.copy(next_step, start, blueprint);
            }
        }

        let values = value_of(step, start, blueprint);
        let mut rows = Rows::new(blueprint);
        rows.add_state(tile, start, descale, &queries, blueprint);
        sync_cube();
        rows.add_keys(tile, values, start, &queries, blueprint);
        rows.store(step, tile, target, &queries, &out_strides, marks, first_mark, numbers.nan, blueprint);
        if last {
            if step + 1u32 < steps {
                state.add_keys(start, values, comptime![blueprint.sums()]);
                descale = publish(&state, start, blueprint);
            }
        }
        step = select(last, step + 1u32, step);
        tile = select(last, 0u32, tile + 1u32);
    }
}
