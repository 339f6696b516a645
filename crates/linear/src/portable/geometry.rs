//! How a call is cut into chunks, and what its kernels are compiled for. Sizes are decided here and nowhere else.

use core::ops::Range;

use bifocal_core::{DeviceProfile, Error, FeatureMap, Problem, Result, device::Sequences};

/// Most numbers in the states of all chunks: 1 GiB. Longer contexts have longer chunks.
const STATE_NUMBERS: usize = 1 << 28;

/// Most keys per chunk.
pub(crate) const LONGEST_CHUNK: usize = 1 << 16;

/// A call cut into chunks of keys.
///
/// Only keys that leave the window of some row take part. The last row's horizon is the last of them, so that the state
/// after the last chunk, which may be cut short, is the state that the call leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) kv_heads: usize,
    pub(crate) lists: usize,
    pub(crate) group: usize,
    pub(crate) query_len: usize,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) features: usize,
    /// Keys that leave the window of some row: `0..keys`.
    pub(crate) keys: usize,
    /// Keys per chunk.
    pub(crate) chunk: usize,
    /// At least one, which may be without keys.
    pub(crate) chunks: usize,
    /// The index of the first query: the last key that it meets through the state.
    pub(crate) offset: i64,
    /// The chunk of that index, counted from the first; negative before it.
    pub(crate) first_chunk: i64,
    /// Chunks from that one to the last query's.
    pub(crate) segments: usize,
    pub(crate) place: Place,
}

/// Where a sequence lies among those that are packed with it; one that is alone begins at 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Query tokens, and key tokens, that there are in all.
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) first_query: usize,
    pub(crate) first_key: usize,
    /// Its first state among all.
    pub(crate) first_state: usize,
}

impl Place {
    fn alone(problem: &Problem) -> Self {
        let Problem { query_len, key_len, .. } = *problem;
        Self { queries: query_len, keys: key_len, first_query: 0, first_key: 0, first_state: 0 }
    }
}

impl Geometry {
    /// The geometry of each sequence of a batch of 1 that they are packed into. Chunks have as many keys as `chunk` says of the
    /// number of keys that leave, or as many as suit the portable routine.
    ///
    /// # Errors
    /// As [`Geometry::new`].
    pub(crate) fn packed(
        problem: &Problem,
        sequences: &Sequences,
        hidden: usize,
        map: FeatureMap,
        chunk: impl Fn(usize) -> Option<usize>,
    ) -> Result<Vec<Self>> {
        let of = |(at, (queries, keys)): (usize, (Range<usize>, Range<usize>))| {
            let mut one = *problem;
            (one.query_len, one.key_len) = (queries.len(), keys.len());
            let place = Place {
                first_query: queries.start,
                first_key: keys.start,
                first_state: at * problem.kv_heads,
                ..Place::alone(problem)
            };
            Self::at(&one, place, hidden, map, &chunk)
        };
        sequences.ranges().enumerate().map(of).collect()
    }

    /// Of keys that all leave but for the last `hidden`.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when the states of all chunks, or the kernels' units, are more than indices can address.
    pub(crate) fn new(
        problem: &Problem,
        hidden: usize,
        map: FeatureMap,
        chunk: impl Fn(usize) -> Option<usize>,
    ) -> Result<Self> {
        Self::at(problem, Place::alone(problem), hidden, map, chunk)
    }

    fn at(
        problem: &Problem,
        place: Place,
        hidden: usize,
        map: FeatureMap,
        chunk: impl Fn(usize) -> Option<usize>,
    ) -> Result<Self> {
        let Problem { batch, heads, kv_heads, query_len, key_len, head_dim, value_dim, .. } = *problem;
        let (lists, group, features) = (batch * kv_heads, problem.group(), map.features(head_dim));
        let keys = key_len.saturating_sub(hidden);
        let state = lists.saturating_mul(features).saturating_mul(value_dim);
        let chunk = chunk(keys).unwrap_or_else(|| {
            // With half as many keys as features, a row's share of its chunk costs about half of its share of the state.
            let mut chunk = head_dim.next_power_of_two().clamp(32, 256);
            while chunk < LONGEST_CHUNK && keys.div_ceil(chunk).saturating_mul(state) > STATE_NUMBERS {
                chunk *= 2;
            }
            chunk
        });
        let chunks = keys.div_ceil(chunk).max(1);
        let offset = keys as i64 - query_len as i64;
        let first_chunk = offset.div_euclid(chunk as i64);
        let shift = offset.rem_euclid(chunk as i64) as usize;
        let segments = (query_len + shift).div_ceil(chunk);
        let limit = u128::from(u32::MAX);
        let rows = (batch * heads * place.queries).max(lists * place.keys) as u128;
        // Each kernel has at most a unit per row, counted with the room of whole chunks, or per number of a state.
        let room = segments.max(chunks) as u128 * (chunk * group) as u128 * lists as u128;
        for (what, size) in [
            ("numbers in the states of all chunks", chunks as u128 * state as u128),
            ("numbers of the norms of all rows", 4 * rows),
            ("work items", room),
        ] {
            if size > limit {
                return Err(Error::TooLarge { what, size, limit });
            }
        }
        Ok(Self {
            kv_heads,
            lists,
            group,
            query_len,
            head_dim,
            value_dim,
            features,
            keys,
            chunk,
            chunks,
            offset,
            first_chunk,
            segments,
            place,
        })
    }
}

/// The compile-time key of the kernels that meet rows with rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Blueprint {
    pub(super) map: FeatureMap,
    /// Whether the state decays.
    pub(super) decays: bool,
    /// Whether a unit's rows are keys, and those that it meets queries.
    pub(super) of_keys: bool,
    /// Whether queries are those of a dispatch plan's lists.
    pub(super) routed: bool,
    pub(super) value_dim: usize,
    /// Dims that the arrays of staged tiles have room for; one where tiles are not staged.
    pub(super) head_room: usize,
    pub(super) value_room: usize,
    /// Rows per unit, one per lane of a vector, and rows that meet them at once.
    pub(super) lanes: usize,
    /// Features of a tile are kept in private memory, and blocks that need no mask run without one; right where that is a
    /// cache and compilers are patient: on CPUs.
    pub(super) staged: bool,
    /// Head dims, and value dims, that are computed side by side.
    pub(super) head_block: usize,
    pub(super) value_block: usize,
}

impl Blueprint {
    pub(super) fn new(
        geometry: &Geometry,
        profile: &DeviceProfile,
        map: FeatureMap,
        decays: bool,
        routed: bool,
    ) -> Self {
        let staged = profile.cpu_cores.is_some();
        let (head_dim, value_dim) = (geometry.head_dim, geometry.value_dim);
        Self {
            map,
            decays,
            of_keys: false,
            routed,
            value_dim,
            head_room: if staged { head_dim } else { 1 },
            value_room: if staged { value_dim } else { 1 },
            lanes: lanes(profile),
            staged,
            // Eight accumulators in flight, over both halves of the features.
            head_block: largest_divisor(head_dim, 8 / map.halves()),
            value_block: largest_divisor(value_dim, 8 / map.halves()),
        }
    }

    /// The same for rows that are keys.
    pub(super) fn of_keys(self) -> Self {
        Self { of_keys: true, ..self }
    }

    /// Whether a unit's rows are listed.
    pub(super) fn lists_own(self) -> bool {
        self.routed && !self.of_keys
    }

    /// Whether those that they meet are.
    pub(super) fn lists_others(self) -> bool {
        self.routed && self.of_keys
    }
}

/// Rows that a unit computes at once: on a CPU the lanes of its widest register, on a GPU, whose units are lanes already,
/// as many as share each load and still fit the registers.
pub(super) fn lanes(profile: &DeviceProfile) -> usize {
    match profile.cpu_cores {
        Some(_) => (profile.vector_bits as usize / 32).clamp(4, 16),
        None => 4,
    }
}

/// The largest power of two up to `most` that divides `n`.
pub(super) fn largest_divisor(n: usize, most: usize) -> usize {
    (1 << n.trailing_zeros()).min(most)
}

#[cfg(test)]
mod tests {
    use bifocal_core::Element;

    use super::*;

    fn geometry(query_len: usize, key_len: usize, window: usize, chunk: Option<usize>) -> Geometry {
        let shape = |heads, length| [2, heads, length, 64];
        let problem = Problem::new(shape(4, query_len), shape(2, key_len), Element::F32).unwrap();
        Geometry::new(&problem, window, FeatureMap::SoftmaxPair, |_| chunk).unwrap()
    }

    #[test]
    fn every_row_lies_in_one_segment_of_one_chunk() {
        for query_len in [1, 5, 17, 40] {
            for key_len in [1, 9, 17, 33] {
                for window in [1, 2, 8, 60] {
                    for chunk in [1, 3, 8, 64] {
                        let found = geometry(query_len, key_len, window, Some(chunk));
                        let c = chunk as i64;
                        let last = found.offset + query_len as i64 - 1;
                        // Rows before the first key stay negative, the last row's horizon is the last key.
                        assert_eq!(last, found.keys as i64 - 1);
                        assert!(found.first_chunk * c <= found.offset);
                        assert!(found.offset < (found.first_chunk + 1) * c);
                        let end = (found.first_chunk + found.segments as i64) * c;
                        assert!(last < end && end - c <= last);
                        assert!(
                            found.keys <= found.chunks * chunk && (found.chunks - 1) * chunk <= found.keys
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn long_contexts_have_longer_chunks_and_absurd_ones_are_refused() {
        assert_eq!(geometry(4096, 4096, 512, None).chunk, 64);
        let long = geometry(1 << 20, 1 << 20, 512, None);
        assert!(long.chunk > 64 && long.chunks * 4 * 128 * 64 <= STATE_NUMBERS);
        let shape = [1 << 10, 1, 1 << 14, 64];
        let problem = Problem::new(shape, shape, Element::F32).unwrap();
        let refused = Geometry::new(&problem, 1, FeatureMap::SoftmaxPair, |_| Some(1));
        assert!(matches!(refused, Err(Error::TooLarge { .. })), "{refused:?}");
    }
}
