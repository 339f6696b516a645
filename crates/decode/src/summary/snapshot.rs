use bifocal_core::{
    Element, Error, Result,
    device::{Summary, Tensor},
};
use cubecl::client::Client;

use super::{Fold, SummaryCache, span};
use crate::{KvShape, NewTokens, SequenceId, cache::foreign};

/// One sequence of a [`SummaryCache`] on the host: its summary, and the tokens that are there still. To be written to disk,
/// and put into another cache of the same shape and window.
#[derive(Clone, Debug, PartialEq)]
pub struct SummarySnapshot {
    shape: KvShape,
    /// Keys of the window, and tokens before the first that is summed up.
    outside: [usize; 2],
    length: usize,
    /// Tokens before this one are not there.
    from: usize,
    covered: usize,
    /// `[Hk, T, D]` and `[Hk, T, Dv]`, little-endian; then plain keys, if there are any.
    tokens: [Vec<u8>; 3],
    parts: Vec<Vec<f32>>,
}

/// What every snapshot begins with; the last byte is the version.
const MAGIC: [u8; 8] = *b"bifosum\x01";

/// Magic, then element, kv heads, head dim, value dim, window, first, length, from, covered, whether there are plain keys, and
/// the number of parts: 8 bytes each.
const HEADER: usize = 12 * 8;

/// More parts than any summary has.
const MOST_PARTS: usize = 16;

impl SummarySnapshot {
    /// How many tokens the sequence has.
    pub fn tokens(&self) -> usize {
        self.length
    }

    /// As a file holds it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let KvShape { kv_heads, head_dim, value_dim, element } = self.shape;
        let element = Element::FLOATS.iter().position(|&known| known == element);
        let [window, first] = self.outside;
        let plain = usize::from(!self.tokens[2].is_empty());
        let mut numbers =
            vec![element.unwrap_or(Element::FLOATS.len()), kv_heads, head_dim, value_dim, window];
        numbers.extend([first, self.length, self.from, self.covered, plain, self.parts.len()]);
        numbers.extend(self.parts.iter().map(Vec::len));
        let mut bytes = MAGIC.to_vec();
        bytes.extend(numbers.iter().flat_map(|&number| (number as u64).to_le_bytes()));
        self.tokens.iter().for_each(|tokens| bytes.extend(tokens));
        bytes.extend(self.parts.iter().flatten().flat_map(|number| number.to_le_bytes()));
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// [`Error::Snapshot`] when it is none, is cut off, or has more than it says.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        if !bytes.starts_with(&MAGIC) {
            return Err(foreign("begins with other bytes", "a snapshot of this version"));
        }
        if bytes.len() < HEADER {
            return Err(foreign(format!("has {} bytes", bytes.len()), format!("a header of {HEADER}")));
        }
        let number = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at * 8..][..8]);
            usize::try_from(u64::from_le_bytes(word)).unwrap_or(usize::MAX)
        };
        let Some(&element) = Element::FLOATS.get(number(1)) else {
            return Err(foreign(format!("has element type {}", number(1)), "one of f32, f16, bf16"));
        };
        let shape = KvShape { kv_heads: number(2), head_dim: number(3), value_dim: number(4), element };
        let (outside, [length, from, covered]) = ([number(5), number(6)], [number(7), number(8), number(9)]);
        let left = length.saturating_sub(outside[0]).max(outside[1]);
        if !(outside[1]..=left).contains(&covered) || from >= length || (from > covered) {
            let found = format!("has tokens from {from} on and the first {covered} summed up, of {length}");
            return Err(foreign(found, "every token, or those that are not summed up"));
        }
        let (plain, parts) = (number(10), number(11));
        if plain > 1 || parts > MOST_PARTS || bytes.len() < HEADER + parts * 8 {
            return Err(foreign(
                format!("has {parts} parts"),
                format!("at most {MOST_PARTS}, and their lengths"),
            ));
        }
        let sizes = [shape.head_dim, shape.value_dim, shape.head_dim * plain].map(|dim| {
            [shape.kv_heads, length - from, dim].iter().fold(element.size(), |n, &m| n.saturating_mul(m))
        });
        let lengths: Vec<usize> = (0..parts).map(|part| number(12 + part).saturating_mul(4)).collect();
        let bytes = &bytes[HEADER + parts * 8..];
        let expected = sizes.iter().chain(&lengths).fold(0usize, |sum, &size| sum.saturating_add(size));
        if bytes.len() != expected {
            return Err(foreign(
                format!("holds {} bytes of tokens and sums", bytes.len()),
                format!("{expected}"),
            ));
        }
        let mut rest = bytes;
        let mut next = |size: usize| {
            let (this, others) = rest.split_at(size);
            rest = others;
            this
        };
        let tokens = sizes.map(|size| next(size).to_vec());
        let float = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let parts = lengths.into_iter().map(|size| next(size).chunks_exact(4).map(float).collect()).collect();
        Ok(Self { shape, outside, length, from, covered, tokens, parts })
    }
}

impl<S: Summary> SummaryCache<S> {
    /// Copies a sequence to the host. Waits for the device.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::EmptyDimension`] without tokens; [`Error::DeviceMismatch`]; [`Error::Runtime`].
    pub fn save(&self, client: &Client, sequence: SequenceId) -> Result<SummarySnapshot> {
        self.kv.check_device(client)?;
        let slot = self.kv.slot(sequence)?;
        let (length, from) = (self.kv.book.length(slot), self.kv.book.kept_from(slot));
        if length == 0 {
            return Err(Error::EmptyDimension { dimension: "length of a sequence" });
        }
        let spans = span(client, slot, from, length - from);
        let copy = |pool: &Tensor<4>| self.copy(client, pool, &spans, [1, length - from], None);
        let [key, value] = copy(&self.kv.key);
        let plain_key = match &self.kv.plain_key {
            Some(pool) => bytes_of(client, copy(pool)[0].clone())?,
            None => Vec::new(),
        };
        let parts = self.parts_of(client, slot);
        Ok(SummarySnapshot {
            shape: self.kv.shape(),
            outside: [self.window, self.first],
            length,
            from,
            covered: self.covered[slot],
            tokens: [bytes_of(client, key)?, bytes_of(client, value)?, plain_key],
            parts: parts.iter().map(|part| part.to_f32(client)).collect::<Result<_>>()?,
        })
    }

    /// Starts a sequence with what a snapshot has.
    ///
    /// # Errors
    /// [`Error::Snapshot`] when it is of a cache of another shape, window or summary, lacks tokens that this cache would keep,
    /// or has more beside its summary than twice this cache's slack; as [`start`](Self::start) and
    /// [`append`](Self::append).
    pub fn restore(&mut self, client: &Client, snapshot: &SummarySnapshot) -> Result<SequenceId> {
        self.kv.check_device(client)?;
        let SummarySnapshot { shape, outside, length, from, covered, .. } = *snapshot;
        let [key, value, plain_key] = &snapshot.tokens;
        let numbers = |parts: &[Vec<f32>]| parts.iter().map(Vec::len).collect::<Vec<_>>();
        let found = (shape, outside, !plain_key.is_empty(), numbers(&snapshot.parts));
        let own: Vec<usize> = self.parts.iter().map(|part| part.shape()[1]).collect();
        let expected = (self.kv.shape(), [self.window, self.first], self.kv.plain_key.is_some(), own);
        if found != expected {
            return Err(foreign(format!("is of {found:?}"), format!("{expected:?}")));
        }
        if from > 0 && self.kv.layout().ring_pages == 0 {
            return Err(foreign(format!("begins with token {from}"), "every token: only rings forget"));
        }
        let lacking = self.left(length).saturating_sub(covered);
        if lacking > 2 * self.slack {
            return Err(foreign(
                format!("has {lacking} keys beside its sums"),
                format!("at most {}", 2 * self.slack),
            ));
        }
        let KvShape { kv_heads, head_dim, value_dim, element } = shape;
        let tokens = length - from;
        let upload = |bytes: &[u8], dim: usize| {
            let strides = [kv_heads * tokens * dim, tokens * dim, dim, 1];
            Tensor::new(client.create_from_slice(bytes), element, [1, kv_heads, tokens, dim], strides)
        };
        let (key, value) = (upload(key, head_dim), upload(value, value_dim));
        let plain_key = (!plain_key.is_empty()).then(|| upload(plain_key, head_dim));
        let mut last = NewTokens::new(key.view(), value.view());
        last.plain_key = plain_key.as_ref().map(Tensor::view);
        let upload = |part: &Vec<f32>| Tensor::from_f32(client, [part.len()], Element::F32, part);
        let parts = snapshot.parts.iter().map(upload).collect::<Result<_>>()?;
        let sequence = self.kv.start_with(client, length, &last)?;
        let slot = self.kv.slot(sequence)?;
        self.take(client, [Fold { slot, covered, parts }]);
        Ok(sequence)
    }
}

fn bytes_of(client: &Client, tensor: Tensor<4>) -> Result<Vec<u8>> {
    let bytes = tensor.shape().iter().product::<usize>() * tensor.element().size();
    let found = client.read_one(tensor.into_handle());
    Ok(found.map_err(|error| Error::Runtime(error.to_string()))?[..bytes].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> SummarySnapshot {
        let shape = KvShape { kv_heads: 2, head_dim: 3, value_dim: 1, element: Element::F16 };
        SummarySnapshot {
            shape,
            outside: [4, 1],
            length: 12,
            from: 7,
            covered: 7,
            tokens: [(0..60).collect(), (0..20).collect(), (0..60).collect()],
            parts: vec![vec![0.5; 3], vec![-1.0; 2]],
        }
    }

    #[test]
    fn bytes_come_back() {
        assert_eq!(SummarySnapshot::from_bytes(&snapshot().to_bytes()), Ok(snapshot()));
    }

    #[test]
    fn whatever_is_cut_off_or_changed_in_the_header_is_refused() {
        let bytes = snapshot().to_bytes();
        for end in 0..bytes.len() {
            let cut = SummarySnapshot::from_bytes(&bytes[..end]);
            assert!(matches!(cut, Err(Error::Snapshot { .. })), "{end}");
        }
        for at in 0..HEADER + 16 {
            let mut other = bytes.clone();
            other[at] ^= 0x80;
            // A window is any number: that of another is refused by the cache.
            let window = (5 * 8..6 * 8).contains(&at);
            let read = SummarySnapshot::from_bytes(&other);
            assert!(matches!(read, Err(Error::Snapshot { .. })) || window, "{at}");
        }
    }
}
