use bifocal_core::{Element, Error, Result, device::Tensor};
use cubecl::client::Client;

use super::{KvCache, KvShape, SequenceId};

/// The tokens of one sequence on the host: to be written to disk, and put into another cache of the same shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    shape: KvShape,
    tokens: usize,
    /// `[Hk, T, D]` and `[Hk, T, Dv]`, little-endian.
    key: Vec<u8>,
    value: Vec<u8>,
}

/// What every snapshot begins with; the last byte is the version.
const MAGIC: [u8; 8] = *b"bifocal\x01";

/// Magic, element, kv heads, head dim, value dim, tokens: 8 bytes each.
const HEADER: usize = 48;

const ELEMENTS: [Element; 3] = Element::FLOATS;

impl Snapshot {
    /// How many tokens there are.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// As a file holds it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let KvShape { kv_heads, head_dim, value_dim, element } = self.shape;
        let element = ELEMENTS.iter().position(|&known| known == element).unwrap_or(ELEMENTS.len());
        let mut bytes = MAGIC.to_vec();
        for number in [element, kv_heads, head_dim, value_dim, self.tokens] {
            bytes.extend((number as u64).to_le_bytes());
        }
        bytes.extend(&self.key);
        bytes.extend(&self.value);
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
        let Some(&element) = ELEMENTS.get(number(1)) else {
            return Err(foreign(format!("has element type {}", number(1)), "one of f32, f16, bf16"));
        };
        let shape = KvShape { kv_heads: number(2), head_dim: number(3), value_dim: number(4), element };
        let tokens = number(5);
        let sizes = [shape.head_dim, shape.value_dim].map(|dim| {
            [shape.kv_heads, tokens, dim].iter().fold(element.size(), |n, &m| n.saturating_mul(m))
        });
        let (found, expected) = (bytes.len() - HEADER, sizes[0].saturating_add(sizes[1]));
        if found != expected {
            return Err(foreign(format!("holds {found} bytes of tokens"), format!("{expected}")));
        }
        let (key, value) = bytes[HEADER..].split_at(sizes[0]);
        Ok(Self { shape, tokens, key: key.to_vec(), value: value.to_vec() })
    }
}

impl KvCache {
    /// Copies a sequence to the host. Waits for the device.
    ///
    /// # Errors
    /// As [`gather`](Self::gather); [`Error::Runtime`].
    pub fn save(&self, client: &Client, sequence: SequenceId) -> Result<Snapshot> {
        let (key, value) = self.gather(client, sequence)?;
        let read = |tensor: Tensor<4>| -> Result<Vec<u8>> {
            let bytes = tensor.shape().iter().product::<usize>() * tensor.element().size();
            let found = client.read_one(tensor.into_handle());
            Ok(found.map_err(|error| Error::Runtime(error.to_string()))?[..bytes].to_vec())
        };
        let tokens = key.shape()[2];
        Ok(Snapshot { shape: self.shape, tokens, key: read(key)?, value: read(value)? })
    }

    /// Starts a sequence with the tokens of a snapshot.
    ///
    /// # Errors
    /// [`Error::Snapshot`] when it is of a cache of another shape or has no token; as [`start`](Self::start) and
    /// [`append`](Self::append).
    pub fn restore(&mut self, client: &Client, snapshot: &Snapshot) -> Result<SequenceId> {
        let Snapshot { shape, tokens, .. } = *snapshot;
        if shape != self.shape {
            return Err(foreign(format!("is of {shape:?}"), format!("{:?}", self.shape)));
        }
        if tokens == 0 {
            return Err(foreign("has no token", "at least 1"));
        }
        let KvShape { kv_heads, head_dim, value_dim, element } = shape;
        let upload = |bytes: &[u8], dim: usize| {
            let strides = [kv_heads * tokens * dim, tokens * dim, dim, 1];
            Tensor::new(client.create_from_slice(bytes), element, [1, kv_heads, tokens, dim], strides)
        };
        let sequence = self.start(client)?;
        let (key, value) = (upload(&snapshot.key, head_dim), upload(&snapshot.value, value_dim));
        let appended = self.append(client, &[sequence], key.view(), value.view());
        match appended {
            Ok(()) => Ok(sequence),
            Err(error) => {
                self.free(sequence)?;
                Err(error)
            }
        }
    }
}

pub(crate) fn foreign(found: impl Into<String>, expected: impl Into<String>) -> Error {
    Error::Snapshot { found: found.into(), expected: expected.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        let shape = KvShape { kv_heads: 2, head_dim: 3, value_dim: 1, element: Element::F16 };
        Snapshot { shape, tokens: 5, key: (0..60).collect(), value: (0..20).collect() }
    }

    #[test]
    fn bytes_come_back() {
        assert_eq!(Snapshot::from_bytes(&snapshot().to_bytes()), Ok(snapshot()));
    }

    #[test]
    fn whatever_is_cut_off_or_changed_in_the_header_is_refused() {
        let bytes = snapshot().to_bytes();
        for end in 0..bytes.len() {
            assert!(matches!(Snapshot::from_bytes(&bytes[..end]), Err(Error::Snapshot { .. })), "{end}");
        }
        for at in 0..HEADER {
            let mut other = bytes.clone();
            other[at] ^= 0x80;
            assert!(matches!(Snapshot::from_bytes(&other), Err(Error::Snapshot { .. })), "{at}");
        }
    }
}
