//! Queries of a kv head, packed token by token, as a cube takes them step by step: a step has some tokens, and a tile some
//! of their rows.

// In a kernel `%` is one instruction, and `is_multiple_of` is not there.
#![allow(clippy::manual_is_multiple_of)]

use cubecl::prelude::*;

use crate::{
    SWIZZLE,
    copies::{Tile, place},
    ptx::copy_16_or_zeros,
};

/// What tiles of queries are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QueryShape {
    /// The tile.
    pub tile: Tile,
    /// Tokens of a step.
    pub tokens: usize,
}

/// The queries of a kv head's query heads whose tokens lie in a range.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub struct Queries {
    /// The address of token 0 of the first head.
    pub address: u64,
    /// Elements from a head to the next.
    pub head_stride: u32,
    /// Elements from a token to the next.
    pub token_stride: u32,
    /// Heads.
    pub group: u32,
    /// The first token of the first step; before token 0 there is none.
    pub begin: i32,
    /// One past the last token.
    pub end: i32,
}

/// A row of a tile.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub struct Row {
    /// The number of its token in the step.
    pub number: u32,
    /// Its token; 0 where there is no such row.
    pub token: u32,
    /// Which of the heads.
    pub head: u32,
    /// Whether there is such a row.
    pub there: bool,
}

#[cube]
impl Queries {
    /// The `row`-th row of a tile.
    pub fn row(&self, step: u32, tile: u32, row: u32, #[comptime] shape: QueryShape) -> Row {
        let packed = tile * comptime![shape.tile.rows as u32] + row;
        let number = packed / self.group;
        let tokens = comptime![shape.tokens as u32];
        let token = self.begin + (step * tokens + number) as i32;
        let there = number < tokens && token >= 0i32 && token < self.end;
        Row { number, token: select(there, token, 0i32) as u32, head: packed % self.group, there }
    }

    /// Tiles that a step's rows fill.
    pub fn tiles(&self, #[comptime] shape: QueryShape) -> u32 {
        (self.group * comptime![shape.tokens as u32]).div_ceil(comptime![shape.tile.rows as u32])
    }

    /// Starts the copies of a tile to `room`. Rows that are not there are zeros.
    pub fn copy(&self, step: u32, tile: u32, room: u32, #[comptime] shape: QueryShape) {
        let at_once = comptime![shape.tile.rows_at_once(0)];
        let place = place(UNIT_POS, 0usize, comptime![shape.tile]);
        let room = room + place.offset;
        for pass in 0..comptime![(shape.tile.rows / at_once) as u32] {
            let row = self.row(step, tile, place.row + pass * comptime![at_once as u32], shape);
            let start = row.head * self.head_stride + row.token * self.token_stride;
            let from = self.address + start as u64 * 2u64 + (place.column * 16u32) as u64;
            #[unroll]
            for panel in 0..comptime![shape.tile.panels()] {
                copy_16_or_zeros(
                    room + pass * comptime![(at_once * SWIZZLE) as u32] + comptime![shape.tile.at(panel, 0)],
                    from + comptime![(panel * SWIZZLE) as u64],
                    select(row.there, 16u32, 0u32),
                );
            }
        }
    }
}
