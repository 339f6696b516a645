use core::ops::Range;
use std::sync::Arc;

use cubecl::{client::Client, server::Handle};

use crate::{Error, Problem, Result};

/// Most tokens of all sequences together: a key's index and a number of sinks add up to an i32.
const LIMIT: usize = (1 << 30) - 1;

/// Sequences of different lengths that lie one after the other in a batch of 1, without padding (a ragged batch):
/// queries are `[1, H, all query tokens, D]`, keys `[1, Hk, all key tokens, D]`.
///
/// Lengths are given cumulatively, as FlashAttention's `cu_seqlens` and FlashInfer's `indptr` are: sequence `s` has
/// the queries `queries[s]..queries[s + 1]` and the keys `keys[s]..keys[s + 1]`. Each is attended to as if it were
/// alone: reaches, windows, sink tokens and bottom-right alignment count within the sequence. A sequence may have no
/// queries, no keys, or neither.
///
/// Build it once per batch and share it between layers.
#[derive(Clone, Debug)]
pub struct Sequences {
    bounds: Handle,
    /// Cumulative lengths of queries and of keys.
    lengths: Arc<[[usize; 2]]>,
}

impl Sequences {
    /// Copies cumulative lengths from the host, `[sequences + 1]` each, beginning with 0. Self-attention passes the same
    /// twice.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`] without a sequence; [`Error::Shape`] when the two differ in their number;
    /// [`Error::Cumulative`] naming the first entry that is out of order; [`Error::TooLarge`].
    pub fn from_host(client: &Client, queries: &[usize], keys: &[usize]) -> Result<Self> {
        let query_len = total("query", queries)?;
        total("key", keys)?;
        if queries.len() != keys.len() {
            let expected = format!("[{}], as many as query lengths", queries.len());
            return Err(Error::shape("the cumulative key lengths", expected, &[keys.len()]));
        }
        let mut bounds: [Vec<u32>; 3] = core::array::from_fn(|_| Vec::with_capacity(query_len));
        for (query, key) in queries.windows(2).zip(keys.windows(2)) {
            let (first, end) = (key[0], key[1]);
            for token in query[0]..query[1] {
                // Bottom-right: the last query's position is the last key. Queries before the first key see nothing.
                let causal_end = (end + token + 1).saturating_sub(query[1]).max(first);
                for (column, bound) in bounds.iter_mut().zip([first, causal_end, end]) {
                    column.push(bound as u32);
                }
            }
        }
        let mut words = bounds.concat();
        // Not every runtime has buffers of no bytes; without queries no problem fits the sequences.
        words.resize(words.len().max(1), 0);
        let lengths = queries.iter().zip(keys).map(|(&query, &key)| [query, key]).collect();
        Ok(Self { bounds: client.create_from_slice(bytemuck::cast_slice(&words)), lengths })
    }

    /// How many sequences there are.
    pub fn count(&self) -> usize {
        self.lengths.len() - 1
    }

    /// Which query tokens and which key tokens each sequence has.
    pub fn ranges(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let range = |pair: &[[usize; 2]], of: usize| pair[0][of]..pair[1][of];
        self.lengths.windows(2).map(move |pair| (range(pair, 0), range(pair, 1)))
    }

    /// Checks that these are the sequences of `problem`: a batch of 1 with as many query and key tokens, on the client's
    /// device.
    ///
    /// # Errors
    /// [`Error::Option`] for another batch than 1, [`Error::Shape`], [`Error::DeviceMismatch`].
    pub fn check(&self, client: &Client, problem: &Problem) -> Result<()> {
        if problem.batch != 1 {
            return Err(Error::option("the batch of packed sequences", problem.batch, "1"));
        }
        let found = self.lengths[self.count()];
        let expected = [problem.query_len, problem.key_len];
        if found != expected {
            let expected = format!("{expected:?}, the query and key tokens of the problem");
            return Err(Error::shape("the packed sequences", expected, &found));
        }
        if self.bounds.service != client.service_id() {
            return Err(Error::DeviceMismatch {
                tensor: "the packed sequences",
                expected: format!("{:?}", client.service_id()),
                found: format!("{:?}", self.bounds.service),
            });
        }
        Ok(())
    }

    /// `u32 [3, query tokens]`: for each query token the first key of its sequence, one past the key at its position (the
    /// first key where the position lies before it), and one past the last key of its sequence. None of the three
    /// ever decreases from one token to the next.
    pub fn bounds(&self) -> &Handle {
        &self.bounds
    }
}

/// The last of cumulative lengths that count up from 0.
fn total(of: &'static str, lengths: &[usize]) -> Result<usize> {
    if lengths.len() < 2 {
        return Err(Error::EmptyDimension { dimension: "the number of sequences" });
    }
    let mut before = 0;
    for (at, &found) in lengths.iter().enumerate() {
        if found < before || (at == 0 && found != 0) {
            let expected = if at == 0 { "0".to_string() } else { format!("at least {before}") };
            return Err(Error::Cumulative { of, at, found, expected });
        }
        before = found;
    }
    if before > LIMIT {
        let (size, limit) = (before as u128, LIMIT as u128);
        return Err(Error::TooLarge { what: "tokens in packed sequences", size, limit });
    }
    Ok(before)
}
