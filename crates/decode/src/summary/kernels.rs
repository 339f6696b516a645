//! Kernels that find, copy and keep what summaries have and lack.

// In a kernel `%` is one instruction.
#![allow(clippy::manual_is_multiple_of)]

use bifocal_core::device::SPAN;
use cubecl::prelude::*;

use crate::{
    cache::kernels::{Shape, Strides, move_of},
    view::{Places, place},
};

/// Writes the span of every sequence of a batch, from lengths and summaries as they are on the device: its row, the keys
/// that are summed up, those that have left the window since, and the first of these.
#[cube(launch_unchecked)]
pub(super) fn lacking_kernel(
    tables: &[u32],
    slots: &[u32],
    covered: &[u32],
    spans: &mut [u32],
    batch: u32,
    pitch: u32,
    window: u32,
    first: u32,
) {
    if ABSOLUTE_POS >= batch as usize {
        terminate!();
    }
    let slot = slots[ABSOLUTE_POS];
    let length = tables[(slot * pitch) as usize];
    let from = covered[slot as usize];
    let end = max(length, window) - window;
    let span = ABSOLUTE_POS * comptime![SPAN];
    spans[span] = slot;
    spans[span + 1] = from - first;
    spans[span + 2] = max(end, from) - from;
    spans[span + 3] = from;
}

/// Copies the keys of spans to where they follow one another: from the pages, and those from position `length` on from new
/// tokens, whose rows of the batch begin at `new_row`.
#[cube(launch_unchecked)]
pub(super) fn span_kernel<E: Float, N: Size>(
    key_pool: &[Vector<E, N>],
    value_pool: &[Vector<E, N>],
    new_key: &[Vector<E, N>],
    new_value: &[Vector<E, N>],
    tables: &[u32],
    spans: &[u32],
    key: &mut [Vector<E, N>],
    value: &mut [Vector<E, N>],
    shape: Shape,
    length: u32,
    new_row: u32,
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
    let span = own.batch as usize * comptime![SPAN];
    if own.token >= min(spans[span + 2], shape.tokens) {
        terminate!();
    }
    let position = spans[span + 3] + own.token;
    let to = (own.batch * shape.heads + own.head) * shape.tokens + own.token;
    let key_to = (to * shape.key_vectors + own.vector) as usize;
    let value_to = (to * shape.value_vectors + own.vector) as usize;
    if position < length {
        let row = place(position, spans[span] * places.pitch, own.head, tables, &places);
        if own.vector < shape.key_vectors {
            key[key_to] = key_pool[(row * shape.key_vectors + own.vector) as usize];
        }
        if own.vector < shape.value_vectors {
            value[value_to] = value_pool[(row * shape.value_vectors + own.vector) as usize];
        }
    } else {
        let batch = new_row + own.batch;
        let token = position - length;
        let width = comptime![width as u32];
        if own.vector < shape.key_vectors {
            let from = batch * key_strides.batch + own.head * key_strides.head + token * key_strides.token;
            key[key_to] = new_key[(from / width + own.vector) as usize];
        }
        if own.vector < shape.value_vectors {
            let from =
                batch * value_strides.batch + own.head * value_strides.head + token * value_strides.token;
            value[value_to] = new_value[(from / width + own.vector) as usize];
        }
    }
}

/// Copies `count` numbers.
#[cube(launch_unchecked)]
pub(super) fn copy_kernel(from: &[f32], to: &mut [f32], from_at: u32, to_at: u32, count: u32) {
    if ABSOLUTE_POS < count as usize {
        to[to_at as usize + ABSOLUTE_POS] = from[from_at as usize + ABSOLUTE_POS];
    }
}
