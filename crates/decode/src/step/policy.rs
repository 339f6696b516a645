use bifocal_core::{DeviceProfile, Error, Problem, Result};

use super::{DecodeRoutine, mma, pieces::Cut, planes};

/// What a piece costs beside its keys, in keys: its queries, and the merge of what it gives.
pub(super) const START: usize = 32;

/// Costs that fall to a worker at least: with less it would be waiting for its first keys most of the time.
pub(super) const LEAST: usize = 32;

/// Rows of a kv head that one tile of the portable routine has at most.
const PORTABLE_ROWS: usize = 16;

/// Portable workers per core of a CPU, and per multiprocessor of a GPU.
const WORKERS_PER_CORE: usize = 4;
const WORKERS_PER_MULTIPROCESSOR: usize = 64;

/// Chunks that there are per portable worker when every row sees every key of a full cache: enough that a tenth of them
/// still keeps most workers busy.
const CHUNKS_PER_WORKER: usize = 8;

/// Keys of such a chunk: fewer, and what chunks give weighs against what they read; more, and workers wait for the last.
const CHUNK: core::ops::RangeInclusive<usize> = 64..=4096;

/// How the steps of a problem are cut into work. The one place where sizes are decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    pub(super) routine: DecodeRoutine,
    /// Rows of a kv head whose keys are read together.
    pub(super) tile_rows: usize,
    /// Tiles of a kv head.
    pub(super) tiles: usize,
    /// Tiles of all kv heads of all sequences.
    pub(super) lists: usize,
    pub(super) workers: usize,
    pub(super) cut: Cut,
    /// Keys per chunk: all that a sequence can have where they are cut evenly.
    pub(super) chunk: usize,
    /// Chunks of a list at most.
    pub(super) max_chunks: usize,
}

impl Policy {
    pub(super) fn new(
        routine: DecodeRoutine,
        problem: &Problem,
        profile: &DeviceProfile,
        chunk: Option<usize>,
    ) -> Result<Self> {
        let rows = problem.packed_rows();
        let multiprocessors = profile.multiprocessors.max(1) as usize;
        let (tile_rows, workers) = match routine {
            DecodeRoutine::Mma => (mma::tile_rows(problem), mma::workers(multiprocessors)),
            DecodeRoutine::Planes => (planes::tile_rows(problem), planes::workers(multiprocessors)),
            DecodeRoutine::Portable => (
                rows.min(PORTABLE_ROWS),
                match profile.cpu_cores {
                    Some(cores) => cores as usize * WORKERS_PER_CORE,
                    None => multiprocessors * WORKERS_PER_MULTIPROCESSOR,
                },
            ),
        };
        let tiles = rows.div_ceil(tile_rows);
        let lists = problem.batch * problem.kv_heads * tiles;
        let (cut, chunk) = match (chunk, routine) {
            (Some(0), _) => return Err(Error::option("keys per chunk", 0, "at least 1")),
            (Some(chunk), _) => (Cut::Chunks, chunk.min(problem.key_len)),
            (None, DecodeRoutine::Portable) => {
                let even = lists.saturating_mul(problem.key_len) / (workers * CHUNKS_PER_WORKER);
                (Cut::Chunks, even.next_power_of_two().clamp(*CHUNK.start(), *CHUNK.end()))
            }
            (None, _) => (Cut::Even, problem.key_len),
        };
        let max_chunks = problem.key_len.div_ceil(chunk);
        Ok(Self { routine, tile_rows, tiles, lists, workers, cut, chunk, max_chunks })
    }

    /// Pieces that there is room for.
    pub(super) fn slots(&self) -> usize {
        match self.cut {
            Cut::Even => self.lists + self.workers,
            Cut::Chunks => self.lists * self.max_chunks,
        }
    }
}
