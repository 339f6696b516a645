//! What the kernels are compiled for, and how a problem is cut. Sizes are decided here and nowhere else.

use bifocal_core::{DeviceProfile, Problem};
use bifocal_tensor_core::{Operand, PANEL, SWIZZLE, copies::Tile, queries::QueryShape, sums::SumsShape};

use crate::portable::geometry::LONGEST_CHUNK;

/// Warps of a cube.
const WARPS: usize = 8;
/// Threads of a cube, whose warps together hold a state in their registers: 128 numbers per thread at head dim 128.
pub(super) const THREADS: usize = 32 * WARPS;
/// Rows of a warp's outputs: the more the less often a state is read from shared memory.
pub(super) const WARP_ROWS: usize = 32;
/// Depth of a product.
pub(super) const STEP: usize = 16;
/// Keys that the kernel of sums takes in a step.
const SUM_TOKENS: usize = 64;

/// The compile-time key of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Blueprint {
    pub(super) operand: Operand,
    /// Head dim, and value dim.
    pub(super) dim: usize,
    /// Packed rows (token by token, all query heads of a kv head) of a tile.
    pub(super) rows: usize,
    /// Keys of a step, and tokens whose queries it has.
    pub(super) tokens: usize,
    /// Whether outputs are `f32`; of the operand's type unless so.
    pub(super) out_f32: bool,
    /// Whether marks say which rows are written.
    pub(super) marked: bool,
}

impl Blueprint {
    /// Of the kernel that writes outputs: the largest tile that there is room for. A step adds its keys to the state and
    /// writes that to shared memory whatever the number of its rows: it should have many. A tile that a step does not fill
    /// is products for nothing. `None` where there is no kernel for a head dim or element type, or no room for its tiles.
    pub(super) fn new(problem: &Problem, shared_memory: usize) -> Option<Self> {
        let operand = Operand::of(problem.element)?;
        if !matches!(problem.head_dim, 64 | 128) || problem.value_dim != problem.head_dim {
            return None;
        }
        let tiles: &[(usize, usize)] = match problem.group() {
            1 => &[(64, 64), (32, 32)],
            2 | 3 => &[(64, 32)],
            _ => &[(128, 32), (64, 32)],
        };
        let dim = problem.head_dim;
        let blueprint =
            |&(rows, tokens): &_| Self { operand, dim, rows, tokens, out_f32: false, marked: false };
        // Columns are multiplied by sixteen.
        let takes = |found: &Self| found.columns() >= 16 && found.room_bytes() <= shared_memory;
        tiles.iter().map(blueprint).find(takes)
    }

    /// The same of the kernel that sums up chunks, which has no rows.
    pub(super) const fn of_sums(self) -> Self {
        Self { rows: 0, tokens: SUM_TOKENS, out_f32: false, marked: false, ..self }
    }

    /// Keys per chunk of `keys` that leave: as many cubes as run at once have one each.
    pub(crate) fn chunk(self, problem: &Problem, keys: usize, profile: &DeviceProfile) -> usize {
        let at_once = (profile.shared_memory / self.room_bytes()).clamp(1, 2);
        let lists = problem.batch * problem.kv_heads;
        let chunks = (at_once * profile.multiprocessors as usize / lists).max(1);
        keys.div_ceil(chunks).next_multiple_of(SUM_TOKENS).clamp(2 * SUM_TOKENS, LONGEST_CHUNK)
    }

    /// Both halves of the softmax pair.
    pub(super) const fn features(self) -> usize {
        2 * self.dim
    }

    /// The state.
    pub(super) const fn sums(self) -> SumsShape {
        SumsShape {
            operand: self.operand,
            rows: self.features(),
            columns: self.dim,
            keys: self.tokens,
            warps: WARPS,
        }
    }

    /// A tile of queries.
    pub(super) const fn queries(self) -> QueryShape {
        QueryShape { tile: Tile { rows: self.rows, dim: self.dim, threads: THREADS }, tokens: self.tokens }
    }

    /// Warps that share the rows of a tile, and those that share its columns.
    pub(super) const fn row_groups(self) -> usize {
        self.rows / WARP_ROWS
    }

    pub(super) const fn column_groups(self) -> usize {
        WARPS / self.row_groups()
    }

    /// Columns of a warp's outputs.
    pub(super) const fn columns(self) -> usize {
        self.dim / self.column_groups()
    }

    /// Bytes of a tile of `rows` rows of `dim` numbers.
    const fn tile_bytes(rows: usize, dim: usize) -> usize {
        rows * dim.div_ceil(PANEL) * SWIZZLE
    }

    // Shared memory, in bytes from its beginning: what the kernel of sums has comes first.

    pub(super) const fn key_at(self) -> u32 {
        Self::tile_bytes(self.tokens, self.features()) as u32
    }

    /// Two steps' values take turns.
    pub(super) const fn value_at(self) -> u32 {
        self.key_at() + Self::tile_bytes(self.tokens, self.dim) as u32
    }

    pub(super) const fn value_bytes(self) -> u32 {
        Self::tile_bytes(self.tokens, self.dim) as u32
    }

    pub(super) const fn state_at(self) -> u32 {
        self.value_at() + 2 * self.value_bytes()
    }

    pub(super) const fn query_features_at(self) -> u32 {
        self.state_at() + self.sums().bytes()
    }

    pub(super) const fn query_at(self) -> u32 {
        self.query_features_at() + Self::tile_bytes(self.rows, self.features()) as u32
    }

    pub(super) const fn weights_at(self) -> u32 {
        self.query_at() + Self::tile_bytes(self.rows, self.dim) as u32
    }

    /// The largest number of each warp's part of the state.
    pub(super) const fn maxima_at(self) -> u32 {
        self.weights_at() + Self::tile_bytes(self.rows, self.tokens) as u32
    }

    /// Bytes of the kernel of outputs, and of that of sums.
    pub(super) const fn room_bytes(self) -> usize {
        self.maxima_at() as usize + 4 * WARPS
    }

    pub(super) const fn sum_bytes(self) -> usize {
        self.state_at() as usize
    }
}

#[cfg(test)]
mod tests {
    use bifocal_core::Element;

    use super::*;

    const H100: usize = 227 << 10;
    const A100: usize = 163 << 10;
    const CONSUMER: usize = 99 << 10;

    fn blueprint(group: usize, dim: usize, shared_memory: usize) -> Option<Blueprint> {
        let problem = Problem::new([1, group, 1, dim], [1, 1, 1, dim], Element::Bf16).unwrap();
        Blueprint::new(&problem, shared_memory)
    }

    #[test]
    fn tiles_fit_where_they_are_used() {
        for (dim, memories) in [(64, vec![H100, A100, CONSUMER]), (128, vec![H100, A100])] {
            for group in 1..20 {
                for &memory in &memories {
                    let found = blueprint(group, dim, memory).expect("a tile");
                    assert!(found.room_bytes() <= memory && found.of_sums().sum_bytes() <= memory);
                    // Weights are computed by one warp per 16 keys.
                    assert!(found.column_groups() >= found.tokens / STEP);
                    assert!(found.columns() >= 16 && found.query_at().is_multiple_of(1024));
                }
            }
        }
        assert_eq!(blueprint(4, 128, CONSUMER), None);
    }
}
