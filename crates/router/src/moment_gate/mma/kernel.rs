//! The kernels: sums of chunks, what comes before each, predictions.

// In a kernel `%` is one instruction and `is_multiple_of` is not there; an `if` on compile-time values stays apart from
// one on run-time values.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

use bifocal_tensor_core::{
    Operand, PANEL, SWIZZLE, across,
    copies::{Source, copy_tile},
    down,
    ptx::{
        copies_wait_all, global_address, load_16, load_matrices, load_shared_pair, load_shared_words,
        load_transposed, pack, product, product_of, shared_address, store_shared_four, store_shared_word,
        store_shared_words, unpack,
    },
    queries::Queries,
    sums::Sums,
    swizzled,
};
use cubecl::prelude::*;

use super::blueprint::{Blueprint, STEP};
use crate::launch::{Strides, offset};

/// The run-time numbers of a call. Keys are counted from the first that is no sink; a query's index is the last key in
/// its bulk.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Numbers {
    pub(super) lists: u32,
    pub(super) kv_heads: u32,
    pub(super) group: u32,
    pub(super) query_len: u32,
    pub(super) sinks: u32,
    /// Keys in the bulk of some row.
    pub(super) keys: u32,
    /// Keys per chunk, and chunks.
    pub(super) chunk: u32,
    pub(super) chunks: u32,
    /// A quarter of the keys: see [`keys_of`].
    pub(super) quarter: u32,
    /// The chunks of the queries' indices: how many, from which on (negative before the first).
    pub(super) segments: u32,
    pub(super) first_chunk: i32,
    /// The index of the first query.
    pub(super) offset: i32,
    pub(super) scale: f32,
    pub(super) neg_inf: f32,
}

/// The keys of a list as a chunk's steps take them.
#[derive(CubeType)]
struct Keys {
    source: Source,
    /// The first of the chunk, negative where it is before all keys, and one past its last.
    begin: i32,
    end: u32,
    /// A thread's channels of the pivot: of every panel those of its 16 bytes of a row.
    pivot: Array<f32>,
}

/// The keys of a list's chunk. Differences are taken, channel by channel, from the middle one of three keys: any number will
/// do, and a single key may be like no other, as the first of a sequence often is.
#[cube]
fn keys_of<E: Float>(
    key: &[E],
    list: u32,
    begin: i32,
    end: u32,
    strides: &Strides,
    numbers: &Numbers,
    #[comptime] blueprint: Blueprint,
) -> Keys {
    let start = offset(strides, list / numbers.kv_heads, list % numbers.kv_heads, numbers.sinks);
    let address = global_address::<E>(key.as_ptr()) + start as u64 * 2u64;
    let source = Source { address, stride: strides.token };
    let panels = comptime![blueprint.dim / PANEL];
    let mut pivot = Array::<f32>::new(comptime![panels * 8]);
    let step = (numbers.quarter * strides.token) as u64 * 2u64;
    let from = address + step + (UNIT_POS % 8u32 * 16u32) as u64;
    #[unroll]
    for panel in 0..panels {
        let from = from + comptime![(panel * SWIZZLE) as u64];
        let first = load_16(from);
        let second = load_16(from + step);
        let third = load_16(from + step + step);
        #[unroll]
        for i in 0..4usize {
            let a = unpack(first.extract(i), comptime![blueprint.operand]);
            let b = unpack(second.extract(i), comptime![blueprint.operand]);
            let c = unpack(third.extract(i), comptime![blueprint.operand]);
            #[unroll]
            for half in 0..2usize {
                let low = min(a.extract(half), b.extract(half));
                let high = max(a.extract(half), b.extract(half));
                let x = max(low, min(high, c.extract(half)));
                // One that is not finite would reach rows whose bulk it is not in.
                pivot[comptime![panel * 8 + 2 * i + half]] = select(x.abs() <= f32::MAX, x, 0.0f32);
            }
        }
    }
    Keys { source, begin, end, pivot }
}

#[cube]
impl Keys {
    /// Where the keys of a step are.
    fn room(&self, step: u32, start: u32, #[comptime] blueprint: Blueprint) -> u32 {
        start + step % 2u32 * comptime![blueprint.key_bytes()]
    }

    /// The first key of a step.
    fn first(&self, step: u32, #[comptime] blueprint: Blueprint) -> i32 {
        self.begin + (step * comptime![blueprint.tokens as u32]) as i32
    }

    /// Starts the copy of a step's keys; those beyond the chunk are zeros.
    fn copy(&self, step: u32, start: u32, #[comptime] blueprint: Blueprint) {
        // Before all keys `end` is 0, and so no key is there.
        let first = self.first(step, blueprint) as u32;
        let room = self.room(step, start, blueprint);
        copy_tile(UNIT_POS, &self.source, first, self.end, room, comptime![blueprint.keys()]);
    }

    /// Writes the differences of a step's keys from the pivot, rounded, and what rounding took away; zeros for keys beyond the
    /// chunk.
    fn subtract(&self, step: u32, start: u32, #[comptime] blueprint: Blueprint) {
        let operand = comptime![blueprint.operand];
        let factor = comptime![blueprint.factor()];
        let at_once = comptime![blueprint.keys().rows_at_once(0)];
        let first = self.first(step, blueprint);
        let from = self.room(step, start, blueprint);
        for pass in 0..comptime![(blueprint.tokens / at_once) as u32] {
            let row = UNIT_POS / 8u32 + pass * comptime![at_once as u32];
            let at = row * comptime![SWIZZLE as u32] + swizzled(row, UNIT_POS % 8u32);
            let there = ((first + row as i32) as u32) < self.end;
            #[unroll]
            for panel in 0..comptime![blueprint.dim / PANEL] {
                let further = comptime![blueprint.keys().at(panel, 0)];
                let words = load_shared_words(from + at + further);
                let mut found = Array::<u32>::new(4usize);
                let mut left = Array::<u32>::new(4usize);
                #[unroll]
                for i in 0..4usize {
                    let pair = unpack(words.extract(i), operand);
                    let near = (pair.extract(0usize) - self.pivot[comptime![panel * 8 + 2 * i]]) * factor;
                    let far = (pair.extract(1usize) - self.pivot[comptime![panel * 8 + 2 * i + 1]]) * factor;
                    let word = pack(near, far, operand);
                    let rounded = unpack(word, operand);
                    let rest = pack(near - rounded.extract(0usize), far - rounded.extract(1usize), operand);
                    found[i] = select(there, word, 0u32);
                    left[i] = select(there, rest, 0u32);
                }
                let to = start + comptime![blueprint.differences_at()] + at + further;
                store_shared_words(to, found[0], found[1], found[2], found[3]);
                let to = to + comptime![blueprint.key_bytes()];
                store_shared_words(to, left[0], left[1], left[2], left[3]);
            }
        }
    }

    /// Writes the pivot for who multiplies by it.
    fn publish(&self, start: u32, #[comptime] blueprint: Blueprint) {
        if UNIT_POS < 8u32 {
            #[unroll]
            for four in 0..comptime![blueprint.dim / PANEL * 2] {
                let mut channels = Vector::<f32, Const<4>>::new(0.0f32);
                #[unroll]
                for i in 0..4usize {
                    channels.insert(i, self.pivot[comptime![four * 4 + i]]);
                }
                let channel = UNIT_POS * 8u32 + comptime![(four / 2 * PANEL + four % 2 * 4) as u32];
                store_shared_four(start + comptime![blueprint.pivot_at()] + channel * 4u32, channels);
            }
        }
    }
}

/// Sums of differences from the pivot, and of their products, of some keys. A warp has 16 channels of each.
#[derive(CubeType)]
struct Summed {
    products: Sums,
    /// Of the channels `lane / 4` and 8 more: a product with ones, the same in every column.
    differences: Vector<f32, Const<4>>,
}

#[cube]
impl Summed {
    fn new(#[comptime] blueprint: Blueprint) -> Summed {
        Summed { products: Sums::new(comptime![blueprint.sums()]), differences: Vector::new(0.0f32) }
    }

    /// Adds the differences of a step.
    fn add(&mut self, start: u32, #[comptime] blueprint: Blueprint) {
        let differences = start + comptime![blueprint.differences_at()];
        let rest = differences + comptime![blueprint.key_bytes()];
        // What both roundings took away is too little to count.
        self.products.add_keys(differences, differences, comptime![blueprint.sums()]);
        self.products.add_keys(differences, rest, comptime![blueprint.sums()]);
        self.products.add_keys(rest, differences, comptime![blueprint.sums()]);
        let element = comptime![blueprint.operand.name()];
        let ones = u32::new(comptime![match blueprint.operand {
            Operand::F16 => 0x3c00_3c00i64,
            Operand::Bf16 => 0x3f80_3f80,
        }]);
        let first = UNIT_POS / 32u32 * comptime![STEP as u32];
        let panel = first / comptime![PANEL as u32] * comptime![(blueprint.tokens * SWIZZLE) as u32];
        let at = differences + panel + (down(UNIT_POS % 32u32) ^ (first % comptime![PANEL as u32] * 2u32));
        for step in 0..comptime![(blueprint.tokens / STEP) as u32] {
            #[unroll]
            for part in 0..2u32 {
                let at = at + comptime![part * blueprint.key_bytes()];
                let turned = load_transposed(at + step * comptime![(STEP * SWIZZLE) as u32]);
                self.differences = product(
                    self.differences,
                    turned.extract(0usize),
                    turned.extract(1usize),
                    turned.extract(2usize),
                    turned.extract(3usize),
                    ones,
                    ones,
                    element,
                );
            }
        }
    }

    /// Takes what a chunk begins with.
    fn load(&mut self, sums: &[f32], slot: u32, #[comptime] blueprint: Blueprint) {
        let base = slot * comptime![blueprint.numbers() as u32];
        self.products.load(global_address::<f32>(sums.as_ptr()), base, comptime![blueprint.sums()]);
        let at = base + comptime![(blueprint.dim * blueprint.dim) as u32] + channel();
        let upper = sums[at as usize];
        let lower = sums[(at + 8u32) as usize];
        let mut differences = Vector::<f32, Const<4>>::new(upper);
        differences.insert(2usize, lower);
        differences.insert(3usize, lower);
        self.differences = differences;
    }

    fn store(&self, sums: &mut [f32], slot: u32, #[comptime] blueprint: Blueprint) {
        let base = slot * comptime![blueprint.numbers() as u32];
        self.products.store(global_address::<f32>(sums.as_ptr()), base, comptime![blueprint.sums()]);
        if UNIT_POS % 4u32 == 0u32 {
            let at = base + comptime![(blueprint.dim * blueprint.dim) as u32] + channel();
            sums[at as usize] = self.differences.extract(0usize);
            sums[(at + 8u32) as usize] = self.differences.extract(2usize);
        }
    }

    /// Writes the sums for rows to read, once no warp reads the last. Gives what products with the matrix are multiplied by.
    fn publish(&self, start: u32, #[comptime] blueprint: Blueprint) -> f32 {
        if UNIT_POS % 4u32 == 0u32 {
            let at = start + comptime![blueprint.sum_at()] + channel() * 4u32;
            store_shared_word(at, u32::reinterpret(self.differences.extract(0usize)));
            store_shared_word(at + 32u32, u32::reinterpret(self.differences.extract(2usize)));
        }
        self.products.publish(
            start + comptime![blueprint.matrix_at()],
            start + comptime![blueprint.maxima_at()],
            2usize,
            comptime![blueprint.sums()],
        )
    }
}

/// The first of a thread's two channels.
#[cube]
fn channel() -> u32 {
    UNIT_POS / 32u32 * comptime![STEP as u32] + UNIT_POS % 32u32 / 4u32
}

/// One cube, one chunk of a kv head.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(super) fn sum_kernel<E: Float>(
    key: &[E],
    sums: &mut [f32],
    strides: Strides,
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
    let keys = keys_of::<E>(key, list, begin as i32, end, &strides, &numbers, blueprint);
    let steps = (end - begin).div_ceil(comptime![blueprint.tokens as u32]);
    let mut summed = Summed::new(blueprint);
    if steps > 0u32 {
        keys.copy(0u32, start, blueprint);
    }
    for step in 0..steps {
        copies_wait_all();
        sync_cube();
        // All warps have left the differences, and the keys before.
        if step + 1u32 < steps {
            keys.copy(step + 1u32, start, blueprint);
        }
        keys.subtract(step, start, blueprint);
        sync_cube();
        summed.add(start, blueprint);
    }
    summed.store(sums, list * numbers.chunks + chunk, blueprint);
}

/// One unit, one number of a list: puts in the place of each chunk's sum the sum of what comes before it.
#[cube(launch_unchecked)]
pub(super) fn before_kernel(sums: &mut [f32], numbers: Numbers, count: u32) {
    if ABSOLUTE_POS >= (numbers.lists * count) as usize {
        terminate!();
    }
    let list = ABSOLUTE_POS as u32 / count;
    let mut sum = 0.0f32;
    for chunk in 0..numbers.chunks {
        let at = ((list * numbers.chunks + chunk) * count + ABSOLUTE_POS as u32 % count) as usize;
        let more = sums[at];
        sums[at] = sum;
        sum += more;
    }
}

/// What a thread's two rows sum up, upper and lower.
#[derive(CubeType)]
struct Rows {
    /// `q . pivot`.
    pivots: Array<f32>,
    /// Of `q . (k - pivot)`, and of its squares.
    firsts: Array<f32>,
    squares: Array<f32>,
}

/// The sum over the four threads that share a row.
#[cube]
fn over_row(x: f32) -> f32 {
    let y = x + plane_shuffle_xor(x, 1u32);
    y + plane_shuffle_xor(y, 2u32)
}

/// What rows make of the sums before the step: `q . sum` and `q S . q`. A thread's queries are where products leave sums: of a
/// block of 16 dims a register each for the upper and the lower row's first eight, then the last.
#[cube]
fn meet_sums(
    queries: &Array<Vector<u32, Const<4>>>,
    start: u32,
    descale: f32,
    #[comptime] blueprint: Blueprint,
) -> Rows {
    let operand = comptime![blueprint.operand];
    let element = comptime![operand.name()];
    let lane = UNIT_POS % 32u32;
    let blocks = comptime![blueprint.dim / STEP];
    let mut rows =
        Rows { pivots: Array::new(2usize), firsts: Array::new(2usize), squares: Array::new(2usize) };
    #[unroll]
    for half in 0..2usize {
        rows.pivots[half] = 0.0f32;
        rows.firsts[half] = 0.0f32;
        rows.squares[half] = 0.0f32;
    }
    let pair_at = start + lane % 4u32 * 8u32;
    let matrix_at = start + comptime![blueprint.matrix_at()] + across(lane);
    #[unroll]
    for block in 0..blocks {
        let mut across_matrix = Array::<Vector<f32, Const<4>>>::new(2usize);
        across_matrix[0] = Vector::new(0.0f32);
        across_matrix[1] = Vector::new(0.0f32);
        #[unroll]
        for depth in 0..blocks {
            let a = queries[depth];
            let at = (matrix_at ^ comptime![(block * STEP % PANEL * 2) as u32])
                + comptime![((block * STEP / PANEL * blueprint.dim + depth * STEP) * SWIZZLE) as u32];
            #[unroll]
            for part in 0..2u32 {
                let right = load_transposed(at + comptime![part * blueprint.sums().bytes()]);
                #[unroll]
                for eight in 0..2usize {
                    across_matrix[eight] = product_of(across_matrix[eight], a, right, eight, element);
                }
            }
        }
        #[unroll]
        for eight in 0..2usize {
            let further = comptime![((block * 2 + eight) * 32) as u32];
            let sum = load_shared_pair(pair_at + comptime![blueprint.sum_at()] + further);
            let pivot = load_shared_pair(pair_at + comptime![blueprint.pivot_at()] + further);
            #[unroll]
            for half in 0..2usize {
                let q = unpack(queries[block].extract(comptime![2 * eight + half]), operand);
                #[unroll]
                for i in 0..2usize {
                    let x = q.extract(i);
                    rows.pivots[half] = fma(x, pivot.extract(i), rows.pivots[half]);
                    rows.firsts[half] = fma(x, sum.extract(i), rows.firsts[half]);
                    let y = across_matrix[eight].extract(comptime![half * 2 + i]);
                    rows.squares[half] = fma(x, y, rows.squares[half]);
                }
            }
        }
    }
    let back = comptime![1.0 / blueprint.factor()];
    #[unroll]
    for half in 0..2usize {
        rows.pivots[half] = over_row(rows.pivots[half]);
        rows.firsts[half] *= back;
        rows.squares[half] = rows.squares[half] * descale * back * back;
    }
    rows
}

/// One cube, one chunk of a kv head, step by step: the predicted logarithm of the mass of the bulks that end in the step, from
/// the sums before it and its keys; then the sums after it.
///
/// Squares are summed up about a pivot, channels of some keys, and brought to the mean in the end. Differences from it, and the
/// matrix, are multiplied in two parts each, as if they had twice the operand's digits; the step's own keys meet their rows as
/// they are.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(super) fn predict_kernel<E: Float>(
    query: &[E],
    key: &[E],
    sums: &[f32],
    predicted: &mut [f32],
    query_strides: Strides,
    key_strides: Strides,
    numbers: Numbers,
    #[comptime] blueprint: Blueprint,
    #[define(E)] _element: ElemType,
) {
    let element = comptime![blueprint.operand.name()];
    let list = CUBE_POS as u32 / numbers.segments;
    let chunk = numbers.first_chunk + (CUBE_POS as u32 % numbers.segments) as i32;
    let batch = list / numbers.kv_heads;
    let first_head = list % numbers.kv_heads * numbers.group;
    let room = Shared::<[u32]>::new_aligned_slice(comptime![blueprint.room_bytes() / 4], 1024usize);
    let start = shared_address(&room);
    let lane = UNIT_POS % 32u32;
    let warp_row = UNIT_POS / 32u32 * comptime![STEP as u32];

    let begin = chunk * numbers.chunk as i32;
    let end = begin + numbers.chunk as i32;
    let key_end = max(min(end, numbers.keys as i32), 0i32) as u32;
    let keys = keys_of::<E>(key, list, begin, key_end, &key_strides, &numbers, blueprint);
    // The chunk of the last query ends with it.
    let end = min(end, numbers.offset + numbers.query_len as i32);
    let list_start = offset(&query_strides, batch, first_head, 0u32);
    let queries = Queries {
        address: global_address::<E>(query.as_ptr()) + list_start as u64 * 2u64,
        head_stride: query_strides.head,
        token_stride: query_strides.token,
        group: numbers.group,
        begin: begin - numbers.offset,
        end: end - numbers.offset,
    };
    let steps = ((end - begin) as u32).div_ceil(comptime![blueprint.tokens as u32]);
    let tiles = queries.tiles(comptime![blueprint.queries()]);
    let query_room = start + comptime![blueprint.query_at()];

    queries.copy(0u32, 0u32, query_room, comptime![blueprint.queries()]);
    keys.copy(0u32, start, blueprint);
    keys.publish(start, blueprint);
    let mut summed = Summed::new(blueprint);
    summed.load(sums, list * numbers.chunks + max(chunk, 0i32) as u32, blueprint);
    let mut descale = summed.publish(start, blueprint);

    let mut step = 0u32;
    let mut tile = 0u32;
    for turn in 0..steps * tiles {
        let last = tile + 1u32 == tiles;
        copies_wait_all();
        sync_cube();
        if tile == 0u32 {
            keys.subtract(step, start, blueprint);
        }
        let query_at = query_room + warp_row * comptime![SWIZZLE as u32] + across(lane);
        let mut mine = Array::<Vector<u32, Const<4>>>::new(comptime![blueprint.dim / STEP]);
        #[unroll]
        for block in 0..comptime![blueprint.dim / STEP] {
            mine[block] = load_matrices(
                (query_at ^ comptime![(block * STEP % PANEL * 2) as u32])
                    + comptime![blueprint.queries().tile.at(block * STEP / PANEL, 0)],
            );
        }
        sync_cube();
        // All warps have their queries, and have left the keys before.
        if turn + 1u32 < steps * tiles {
            let next_step = select(last, step + 1u32, step);
            let next_tile = select(last, 0u32, tile + 1u32);
            queries.copy(next_step, next_tile, query_room, comptime![blueprint.queries()]);
            if last {
                keys.copy(next_step, start, blueprint);
            }
        }

        let mut rows = meet_sums(&mine, start, descale, blueprint);
        let of_row = warp_row + lane / 4u32;
        let upper = queries.row(step, tile, of_row, comptime![blueprint.queries()]).number;
        let lower = queries.row(step, tile, of_row + 8u32, comptime![blueprint.queries()]).number;
        let last_row =
            queries.row(step, tile, warp_row + comptime![STEP as u32 - 1], comptime![blueprint.queries()]);
        // Keys after those of the last row are nobody's.
        let blocks =
            min(last_row.number / comptime![STEP as u32] + 1u32, comptime![(blueprint.tokens / STEP) as u32]);
        let key_at = keys.room(step, start, blueprint) + down(lane);
        for block in 0..blocks {
            let mut scores = Array::<Vector<f32, Const<4>>>::new(2usize);
            scores[0] = Vector::new(0.0f32);
            scores[1] = Vector::new(0.0f32);
            #[unroll]
            for depth in 0..comptime![blueprint.dim / STEP] {
                let a = mine[depth];
                let right = load_matrices(
                    (key_at ^ comptime![(depth * STEP % PANEL * 2) as u32])
                        + comptime![blueprint.keys().at(depth * STEP / PANEL, 0)]
                        + block * comptime![(STEP * SWIZZLE) as u32],
                );
                #[unroll]
                for eight in 0..2usize {
                    scores[eight] = product_of(scores[eight], a, right, eight, element);
                }
            }
            #[unroll]
            for i in 0..8usize {
                let half = comptime![i / 2 % 2];
                let number = if comptime![half == 0] { upper } else { lower };
                let at = block * comptime![STEP as u32] + lane % 4u32 * 2u32;
                let at = at + comptime![(i / 4 * 8 + i % 2) as u32];
                let score = scores[comptime![i / 4]].extract(comptime![i % 4]) - rows.pivots[half];
                // What a row does not meet cannot touch it, NaN or not.
                let score = select(at <= number, score, 0.0f32);
                rows.firsts[half] += score;
                rows.squares[half] = fma(score, score, rows.squares[half]);
            }
        }
        #[unroll]
        for half in 0..2usize {
            let first = over_row(rows.firsts[half]);
            let squares = over_row(rows.squares[half]);
            let at = of_row + comptime![half as u32 * 8];
            let row = queries.row(step, tile, at, comptime![blueprint.queries()]);
            let bulk = row.token as i32 + numbers.offset + 1i32;
            let mass = mass_of(rows.pivots[half], first, squares, bulk, &numbers);
            if row.there && lane % 4u32 == 0u32 {
                let head = batch * numbers.kv_heads * numbers.group + first_head + row.head;
                predicted[(head * numbers.query_len + row.token) as usize] = mass;
            }
        }
        if last {
            if step + 1u32 < steps {
                summed.add(start, blueprint);
                // All warps have left the sums before.
                sync_cube();
                descale = summed.publish(start, blueprint);
            }
        }
        step = select(last, step + 1u32, step);
        tile = select(last, 0u32, tile + 1u32);
    }
}

/// The predicted logarithm of the mass of `bulk` keys, of which `first` and `squares` are the sums of `q . (k - pivot)` and of its
/// squares; -inf of none.
#[cube]
fn mass_of(pivot: f32, first: f32, squares: f32, bulk: i32, numbers: &Numbers) -> f32 {
    let count = f32::cast_from(max(bulk, 1i32));
    let mean = first / count;
    // Rounding may leave a little less than nothing; NaN stays.
    let variance = squares / count - mean * mean;
    let variance = select(variance < 0.0f32, 0.0f32, variance);
    let mass =
        count.ln() + numbers.scale * (pivot + mean) + 0.5f32 * numbers.scale * numbers.scale * variance;
    select(bulk <= 0i32, numbers.neg_inf, mass)
}
