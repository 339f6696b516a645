//! What the kernels are compiled for, and how a problem is cut. Sizes are decided here and nowhere else.

use bifocal_core::{DeviceProfile, Problem};
use bifocal_tensor_core::{Operand, PANEL, SWIZZLE, copies::Tile, queries::QueryShape, sums::SumsShape};

/// Rows of a warp, whole: what a row sums up stays in its warp. Also the depth of a product.
pub(super) const STEP: usize = 16;
/// Keys that the kernel of sums takes in a step.
const SUM_TOKENS: usize = 64;

/// The compile-time key of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Blueprint {
    pub(super) operand: Operand,
    pub(super) dim: usize,
    /// Keys of a step, and tokens whose queries it has.
    pub(super) tokens: usize,
}

impl Blueprint {
    /// As many tokens in a step as make a tile of rows, or as there is room for; `None` where there is no kernel for a head
    /// dim or element type, or no room.
    pub(super) fn new(problem: &Problem, shared_memory: usize) -> Option<Self> {
        let operand = Operand::of(problem.element)?;
        let dim = problem.head_dim;
        if !matches!(dim, 64 | 128) {
            return None;
        }
        let fits = |blueprint: &Self| {
            let most = (blueprint.rows() / problem.group()).max(32);
            blueprint.tokens <= most && blueprint.room_bytes() <= shared_memory
        };
        [128, 64, 32].map(|tokens| Self { operand, dim, tokens }).into_iter().find(fits)
    }

    /// The same of the kernel that sums up chunks.
    pub(super) const fn of_sums(self) -> Self {
        Self { tokens: SUM_TOKENS, ..self }
    }

    /// Keys per chunk of `keys`: as many cubes as run at once have one each.
    pub(crate) fn chunk(self, problem: &Problem, keys: usize, profile: &DeviceProfile) -> usize {
        let at_once = (profile.shared_memory / self.room_bytes()).clamp(1, 2);
        let lists = problem.batch * problem.kv_heads;
        let chunks = (at_once * profile.multiprocessors as usize / lists).max(1);
        keys.div_ceil(chunks).next_multiple_of(SUM_TOKENS).max(2 * SUM_TOKENS)
    }

    /// Warps of a cube: each has 16 rows of a matrix, which fills its head dim.
    pub(super) const fn warps(self) -> usize {
        self.dim / STEP
    }

    pub(super) const fn threads(self) -> usize {
        32 * self.warps()
    }

    /// Rows of a tile.
    const fn rows(self) -> usize {
        STEP * self.warps()
    }

    /// The sum of products of differences.
    pub(super) const fn sums(self) -> SumsShape {
        SumsShape {
            operand: self.operand,
            rows: self.dim,
            columns: self.dim,
            keys: self.tokens,
            warps: self.warps(),
        }
    }

    /// Numbers that are kept of a chunk: those sums, and then those of the differences themselves.
    pub(super) const fn numbers(self) -> usize {
        self.dim * (self.dim + 1)
    }

    /// What differences are multiplied by before they are rounded: that of two f16 may be more than f16 holds.
    pub(super) const fn factor(self) -> f32 {
        match self.operand {
            Operand::F16 => 0.5,
            Operand::Bf16 => 1.0,
        }
    }

    pub(super) const fn keys(self) -> Tile {
        Tile { rows: self.tokens, dim: self.dim, threads: self.threads() }
    }

    pub(super) const fn queries(self) -> QueryShape {
        QueryShape {
            tile: Tile { rows: self.rows(), dim: self.dim, threads: self.threads() },
            tokens: self.tokens,
        }
    }

    const fn tile_bytes(self, rows: usize) -> u32 {
        (rows * self.dim.div_ceil(PANEL) * SWIZZLE) as u32
    }

    // Shared memory, in bytes from its beginning: what the kernel of sums has comes first.

    /// Two steps' keys take turns.
    pub(super) const fn key_bytes(self) -> u32 {
        self.tile_bytes(self.tokens)
    }

    pub(super) const fn differences_at(self) -> u32 {
        2 * self.key_bytes()
    }

    /// The matrix in two parts, behind differences in two parts.
    pub(super) const fn matrix_at(self) -> u32 {
        self.differences_at() + 2 * self.key_bytes()
    }

    pub(super) const fn query_at(self) -> u32 {
        self.matrix_at() + 2 * self.sums().bytes()
    }

    /// The sum of differences, then the pivot: a number per channel.
    pub(super) const fn sum_at(self) -> u32 {
        self.query_at() + self.tile_bytes(self.rows())
    }

    pub(super) const fn pivot_at(self) -> u32 {
        self.sum_at() + 4 * self.dim as u32
    }

    pub(super) const fn maxima_at(self) -> u32 {
        self.pivot_at() + 4 * self.dim as u32
    }

    /// Bytes of the kernel of predictions, and of that of sums.
    pub(super) const fn room_bytes(self) -> usize {
        self.maxima_at() as usize + 4 * self.warps()
    }

    pub(super) const fn sum_bytes(self) -> usize {
        self.matrix_at() as usize
    }
}

#[cfg(test)]
mod tests {
    use bifocal_core::Element;

    use super::*;

    #[test]
    fn tiles_fit_where_they_are_used() {
        for (dim, memories) in [(64, vec![227, 163, 99]), (128, vec![227, 163])] {
            for group in 1..20 {
                let problem = Problem::new([1, group, 1, dim], [1, 1, 1, dim], Element::Bf16).unwrap();
                for memory in memories.iter().map(|kib| kib << 10) {
                    let found = Blueprint::new(&problem, memory).expect("a tile");
                    assert!(found.room_bytes() <= memory && found.of_sums().sum_bytes() <= memory);
                    assert_eq!(found.tokens % found.keys().rows_at_once(0), 0);
                }
            }
        }
    }
}
