//! Kernels that write a cache and copy it. Every unit moves one vector of a key and one of a value.

// In a kernel `%` is one instruction.
#![allow(clippy::manual_is_multiple_of)]

use cubecl::prelude::*;

use crate::view::{Places, place};

/// Rows that are moved: `[batch, heads, tokens]`, and the vectors of a key and of a value.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Shape {
    pub(crate) batch: u32,
    pub(crate) heads: u32,
    pub(crate) tokens: u32,
    pub(crate) key_vectors: u32,
    pub(crate) value_vectors: u32,
}

/// Strides of a `[batch, head, token, dim]` tensor, in elements; the last is 1.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Strides {
    pub(crate) batch: u32,
    pub(crate) head: u32,
    pub(crate) token: u32,
}

/// What a unit moves.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Move {
    pub(crate) batch: u32,
    pub(crate) head: u32,
    pub(crate) token: u32,
    pub(crate) vector: u32,
}

/// The unit's own; its batch is beyond the last where there is nothing left to do.
#[cube]
pub(crate) fn move_of(shape: &Shape) -> Move {
    let vectors = max(shape.key_vectors, shape.value_vectors);
    let unit = ABSOLUTE_POS as u32;
    let row = unit / vectors;
    Move {
        batch: row / shape.tokens / shape.heads,
        head: row / shape.tokens % shape.heads,
        token: row % shape.tokens,
        vector: unit % vectors,
    }
}

/// Writes the last tokens of every sequence, whose lengths count them already.
#[cube(launch_unchecked)]
pub(super) fn append_kernel<E: Float, N: Size>(
    key: &[Vector<E, N>],
    value: &[Vector<E, N>],
    tables: &[u32],
    slots: &[u32],
    key_pool: &mut [Vector<E, N>],
    value_pool: &mut [Vector<E, N>],
    shape: Shape,
    key_strides: Strides,
    value_strides: Strides,
    places: Places,
    #[comptime] width: usize,
    #[define(E)] _element: ElemType,
    #[define(N)] _wide: usize,
) {
    let own = move_of(&shape);
    if own.batch >= shape.batch {
        terminate!();
    }
    let table = slots[own.batch as usize] * places.pitch;
    let left = shape.tokens - own.token;
    let position = tables[table as usize] - left;
    // Of more tokens than a ring holds, the last are kept.
    let kept = position < places.fixed_pages * places.page_size
        || left <= places.ring_pages * places.page_size
        || places.ring_pages == 0u32;
    if kept {
        let row = place(position, table, own.head, tables, &places);
        let width = comptime![width as u32];
        if own.vector < shape.key_vectors {
            let from =
                own.batch * key_strides.batch + own.head * key_strides.head + own.token * key_strides.token;
            key_pool[(row * shape.key_vectors + own.vector) as usize] =
                key[(from / width + own.vector) as usize];
        }
        if own.vector < shape.value_vectors {
            let from = own.batch * value_strides.batch
                + own.head * value_strides.head
                + own.token * value_strides.token;
            value_pool[(row * shape.value_vectors + own.vector) as usize] =
                value[(from / width + own.vector) as usize];
        }
    }
}

/// Copies the tokens of one sequence, from position `first` on, to where they follow one another.
#[cube(launch_unchecked)]
pub(super) fn gather_kernel<E: Float, N: Size>(
    key_pool: &[Vector<E, N>],
    value_pool: &[Vector<E, N>],
    tables: &[u32],
    slots: &[u32],
    key: &mut [Vector<E, N>],
    value: &mut [Vector<E, N>],
    shape: Shape,
    first: u32,
    places: Places,
    #[define(E)] _element: ElemType,
    #[define(N)] _wide: usize,
) {
    let own = move_of(&shape);
    if own.batch >= shape.batch {
        terminate!();
    }
    let table = slots[own.batch as usize] * places.pitch;
    let from = place(first + own.token, table, own.head, tables, &places);
    let to = own.head * shape.tokens + own.token;
    if own.vector < shape.key_vectors {
        key[(to * shape.key_vectors + own.vector) as usize] =
            key_pool[(from * shape.key_vectors + own.vector) as usize];
    }
    if own.vector < shape.value_vectors {
        value[(to * shape.value_vectors + own.vector) as usize] =
            value_pool[(from * shape.value_vectors + own.vector) as usize];
    }
}

/// Copies the first tokens of pages to other pages: `(from, to, tokens)` from word `first` of `numbers` on.
#[cube(launch_unchecked)]
pub(super) fn copy_kernel<E: Float, N: Size>(
    numbers: &[u32],
    key_pool: &mut [Vector<E, N>],
    value_pool: &mut [Vector<E, N>],
    shape: Shape,
    first: u32,
    page_size: u32,
    #[define(E)] _element: ElemType,
    #[define(N)] _wide: usize,
) {
    let own = move_of(&shape);
    if own.batch >= shape.batch {
        terminate!();
    }
    let copy = (first + own.batch * 3u32) as usize;
    if own.token < numbers[copy + 2] {
        let from = (numbers[copy] * shape.heads + own.head) * page_size + own.token;
        let to = (numbers[copy + 1] * shape.heads + own.head) * page_size + own.token;
        if own.vector < shape.key_vectors {
            key_pool[(to * shape.key_vectors + own.vector) as usize] =
                key_pool[(from * shape.key_vectors + own.vector) as usize];
        }
        if own.vector < shape.value_vectors {
            value_pool[(to * shape.value_vectors + own.vector) as usize] =
                value_pool[(from * shape.value_vectors + own.vector) as usize];
        }
    }
}

/// Changes single words of the tables: `(at, value)` from word `first` of `numbers` on.
#[cube(launch_unchecked)]
pub(crate) fn edit_kernel(numbers: &[u32], tables: &mut [u32], first: u32, count: u32) {
    if ABSOLUTE_POS < count as usize {
        let edit = first as usize + ABSOLUTE_POS * 2;
        tables[numbers[edit] as usize] = numbers[edit + 1];
    }
}
