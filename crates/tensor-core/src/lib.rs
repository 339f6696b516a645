//! What kernels on the tensor cores of NVIDIA GPUs are made of, whatever they compute: instructions as functions
//! ([`ptx`]), tiles in shared memory and the copies that fill them ([`copies`], [`queries`]), matrices that a cube sums up
//! ([`sums`]), kernels as CUDA C++ ([`source`]).
//!
//! Fragments of `mma.sync` (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"): of every 16 rows a warp's
//! thread holds two, `lane / 4` and 8 more, and of every 8 columns two, from `lane % 4 * 2` on.

// In a kernel `%` is one instruction, and `is_multiple_of` is not there. What `#[cube]` makes of a documented item has no
// documentation.
#![allow(clippy::manual_is_multiple_of, missing_docs)]

pub mod copies;
pub mod ptx;
pub mod queries;
pub mod source;
pub mod sums;

use bifocal_core::{Element, Refusal, device::TensorView};
use cubecl::prelude::*;

/// The element types that products take, as PTX spells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    /// IEEE half precision.
    F16,
    /// The upper half of an `f32`.
    Bf16,
}

impl Operand {
    /// The operand of an element type; `None` for types that products do not take.
    pub const fn of(element: Element) -> Option<Self> {
        match element {
            Element::F16 => Some(Operand::F16),
            Element::Bf16 => Some(Operand::Bf16),
            _ => None,
        }
    }

    /// The type's name in PTX.
    pub const fn name(self) -> &'static str {
        match self {
            Operand::F16 => "f16",
            Operand::Bf16 => "bf16",
        }
    }

    /// The element type of the operand.
    pub const fn element(self) -> Element {
        match self {
            Operand::F16 => Element::F16,
            Operand::Bf16 => Element::Bf16,
        }
    }

    /// The bits that are set in a number of this type that is not finite, and not all in any other.
    pub const fn exponent_bits(self) -> u32 {
        match self {
            Operand::F16 => 0x7c00,
            Operand::Bf16 => 0x7f80,
        }
    }
}

/// Whether a tensor lies in memory as accesses of 16 bytes need it, and, for `bulk` copies, without broadcast
/// dimensions; if not, why.
///
/// # Errors
/// [`Refusal::Layout`].
pub fn aligned(tensor: &'static str, view: TensorView<'_, 4>, bulk: bool) -> Result<(), Refusal> {
    let refuse = |layout| Err(Refusal::Layout { tensor, layout });
    let per_16_bytes = 16 / view.element().size();
    for axis in 0..3 {
        if view.shape()[axis] == 1 {
            continue;
        }
        if !view.strides()[axis].is_multiple_of(per_16_bytes) {
            return refuse("a stride that is no multiple of 16 bytes");
        }
        if bulk && view.strides()[axis] == 0 {
            return refuse("a broadcast dimension");
        }
    }
    let offset = view.handle().offset_start.unwrap_or(0);
    if !offset.is_multiple_of(16) {
        return refuse("a start that is no multiple of 16 bytes");
    }
    Ok(())
}

/// Bytes of a row of the 128-byte swizzle; a wider tile is stored as panels of such rows, one after the other.
pub const SWIZZLE: usize = 128;
/// Elements in such a row.
pub const PANEL: usize = SWIZZLE / 2;

/// Where in its 128 bytes of a panel a row has the 16 bytes of a column (counted in 16 bytes): the 128-byte swizzle,
/// which keeps the same column of eight rows in different banks.
#[cube]
pub fn swizzled(row: u32, column: u32) -> u32 {
    ((column % 8u32) ^ (row % 8u32)) * 16u32
}

/// Which row a lane names of 16 rows and 16 columns that lie as they are multiplied: 16 rows, then the same 16 eight
/// columns on. In bytes from the first row of a panel.
#[cube]
pub fn across(lane: u32) -> u32 {
    lane % 16u32 * comptime![SWIZZLE as u32] + swizzled(lane, lane / 16u32)
}

/// Which row a lane names of 16 rows and 16 columns that lie transposed: eight rows, the same eight columns on, then the
/// next eight rows.
#[cube]
pub fn down(lane: u32) -> u32 {
    (lane % 8u32 + lane / 16u32 * 8u32) * comptime![SWIZZLE as u32] + swizzled(lane, lane / 8u32 % 2u32)
}
