use bifocal_core::Element;
use bifocal_tensor_core::{Operand, PANEL, SWIZZLE};
use cubecl::ir::ElemType;

use crate::{rows::Sight, visibility::Visibility};

/// The shape of a tile's products, which is all that their PTX depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) operand: Operand,
    /// Rows of the query tile that all warpgroups share.
    pub(crate) rows: usize,
    /// Keys of a tile.
    pub(crate) keys: usize,
    /// Head dim, a multiple of 32.
    pub(crate) dim: usize,
}

impl Shape {
    /// Columns of the accumulated outputs: whole panels, those beyond the head dim zero. (CubeCL aligns a vector to its
    /// size, which has to be a power of two.)
    pub(crate) const fn columns(self) -> usize {
        self.dim.next_multiple_of(PANEL)
    }
}

/// The compile-time key of a kernel: everything its code depends on, and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Blueprint {
    pub(crate) visibility: Visibility,
    /// Rows come from a dispatch plan rather than from counting.
    pub(crate) routed: bool,
    /// Rows belong to sequences that are packed one after the other.
    pub(crate) ragged: bool,
    pub(crate) softcap: bool,
    pub(crate) sink_logits: bool,
    pub(crate) out_f32: bool,
    pub(crate) shape: Shape,
    /// Rows that a warp computes.
    pub(crate) warp_rows: usize,
    /// Tiles that the ring in shared memory holds: `wgmma` has one of keys and one of values, `mma` one for both.
    pub(crate) stages: u32,
    // What follows is `wgmma`'s, whose cubes take many items.
    /// Items whose queries are in shared memory.
    pub(crate) query_stages: u32,
    /// Items whose rows are known: at least as many.
    pub(crate) item_stages: u32,
    /// Warpgroups issue their products in turns.
    pub(crate) turns: bool,
    /// Tiles of keys in a slice, where items of long contexts are cut in slices; 0 where they are not.
    pub(crate) slice_tiles: u32,
}

impl Blueprint {
    /// A kernel of one item per cube, without sink logits, whose output has the inputs' type.
    pub(crate) const fn new(
        sight: Sight,
        softcap: bool,
        shape: Shape,
        warp_rows: usize,
        stages: u32,
    ) -> Self {
        let Sight { visibility, routed, ragged } = sight;
        Self {
            visibility,
            routed,
            ragged,
            softcap,
            sink_logits: false,
            out_f32: false,
            shape,
            warp_rows,
            stages,
            query_stages: 1,
            item_stages: 1,
            turns: false,
            slice_tiles: 0,
        }
    }

    /// Element types of the inputs and of the output.
    pub(crate) fn elements(self) -> [ElemType; 2] {
        let element = self.shape.operand.element();
        [element, if self.out_f32 { Element::F32 } else { element }].map(Into::into)
    }

    pub(crate) const fn sight(self) -> Sight {
        Sight { visibility: self.visibility, routed: self.routed, ragged: self.ragged }
    }

    pub(crate) const fn threads(self) -> u32 {
        (self.shape.rows / self.warp_rows * 32) as u32
    }

    /// Blocks of 16 rows that a warp computes.
    pub(crate) const fn blocks(self) -> usize {
        self.warp_rows / 16
    }

    pub(crate) const fn warpgroups(self) -> u32 {
        self.shape.rows as u32 / 64
    }

    /// Panels of 64 columns that a row of a tile is stored in.
    pub(crate) const fn panels(self) -> usize {
        self.shape.dim.div_ceil(PANEL)
    }

    /// Whether rows fill their panels, so that one bulk copy takes them all.
    pub(crate) const fn whole_panels(self) -> bool {
        self.shape.dim.is_multiple_of(PANEL)
    }

    pub(crate) const fn query_bytes(self) -> usize {
        self.shape.rows * self.panels() * SWIZZLE
    }

    /// Bytes of a tile of keys, and of one of values.
    pub(crate) const fn key_bytes(self) -> usize {
        self.shape.keys * self.panels() * SWIZZLE
    }

    pub(crate) const fn tile_bytes(self) -> usize {
        self.query_stages as usize * self.query_bytes() + 2 * self.stages as usize * self.key_bytes()
    }

    /// Whether items can be cut into parts, each with some of the keys. Rows of a window see too few for it.
    pub(crate) const fn in_parts(self) -> bool {
        matches!(self.visibility, Visibility::All | Visibility::NonCausal | Visibility::Far)
    }

    /// Whether items can be cut into slices, of as many tiles each.
    pub(crate) const fn in_slices(self) -> bool {
        self.slice_tiles > 0
    }

    /// Whether the only keys between an item's first and last that a row does not see are the last ones: then the tiles
    /// that need no mask come first.
    pub(crate) const fn one_edge(self) -> bool {
        self.in_parts() && !self.ragged
    }

    /// Rows that are known.
    pub(crate) const fn staged_rows(self) -> usize {
        self.item_stages as usize * self.shape.rows
    }

    /// Words that are kept of those rows: their ids, and in a ragged batch their two bounds.
    pub(crate) const fn row_words(self) -> usize {
        if self.ragged { 3 * self.staged_rows() } else { self.staged_rows() }
    }
}
