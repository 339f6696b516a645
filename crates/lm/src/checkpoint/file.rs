//! The file that a checkpoint is kept in.
//!
//! ```text
//! magic (8 bytes) | version (u32) | length of the header (u64) | header (JSON) | numbers (f32) | SHA-256 of all before
//! ```
//!
//! Little-endian. The numbers are, for each parameter in the header's order, its weights and, unless they were left out,
//! both moments.

use std::{fs, io::Write, path::Path};

use sha2::{Digest, Sha256};

use super::{Checkpoint, Header};
use crate::{Error, Result, files};

const MAGIC: &[u8; 8] = b"bifocal\n";
/// Counts up whenever the header or the numbers change their meaning.
const VERSION: u32 = 2;
const PREFIX: usize = MAGIC.len() + 4 + 8;
const DIGEST: usize = 32;

impl Checkpoint {
    /// Writes the file whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`], for a full disk among others; what was at `path` before is then still there.
    pub fn save(&self, path: &Path) -> Result<()> {
        let header = serde_json::to_vec(&self.header).map_err(Error::runtime)?;
        files::replace(path, |to| {
            let mut to = Hashing { to, digest: Sha256::new() };
            to.put(MAGIC)?;
            to.put(&VERSION.to_le_bytes())?;
            to.put(&(header.len() as u64).to_le_bytes())?;
            to.put(&header)?;
            for numbers in self.numbers.iter().flatten() {
                let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
                to.put(&bytes)?;
            }
            let Hashing { to, digest } = to;
            to.write_all(&digest.finalize())
        })
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NotACheckpoint`] for other files and other versions; [`Error::Truncated`];
    /// [`Error::Damaged`].
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        Self::read(&bytes, path)
    }

    /// Checks the bytes of a file, which messages call `path`.
    ///
    /// # Errors
    /// As [`Checkpoint::load`].
    pub fn read(bytes: &[u8], path: &Path) -> Result<Self> {
        let damaged = |reason: String| Error::Damaged { path: path.to_path_buf(), reason };
        let not_ours = |reason: String| Error::NotACheckpoint { path: path.to_path_buf(), reason };
        let at_least = |expected: usize| match bytes.len() < expected {
            true => Err(Error::Truncated {
                path: path.to_path_buf(),
                found: bytes.len() as u64,
                expected: expected as u64,
            }),
            false => Ok(()),
        };
        if !bytes.starts_with(&MAGIC[..bytes.len().min(MAGIC.len())]) {
            return Err(not_ours("it begins with something else".to_string()));
        }
        at_least(PREFIX + DIGEST)?;
        let (version, length) = (number(&bytes[8..12]), number(&bytes[12..PREFIX]));
        if version != u64::from(VERSION) {
            return Err(not_ours(format!("it is of version {version}, expected {VERSION}")));
        }
        let start = usize::try_from(length).unwrap_or(usize::MAX).saturating_add(PREFIX);
        at_least(start.saturating_add(DIGEST))?;
        let header: Header = serde_json::from_slice(&bytes[PREFIX..start])
            .map_err(|error| damaged(format!("its header is no header: {error}")))?;
        let counts = header
            .parameters
            .iter()
            .map(|parameter| parameter.shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size)));
        let counts: Option<Vec<usize>> = counts.collect();
        let counts = counts.ok_or_else(|| damaged("a shape is beyond all memory".to_string()))?;
        let parts = if header.moments { 3 } else { 1 };
        let numbers =
            counts.iter().fold(0usize, |sum, count| sum.saturating_add(count.saturating_mul(4 * parts)));
        let end = start.saturating_add(numbers);
        at_least(end.saturating_add(DIGEST))?;
        if bytes.len() > end + DIGEST {
            let more = bytes.len() - end - DIGEST;
            return Err(damaged(format!("it has {more} bytes more than its header says")));
        }
        if Sha256::digest(&bytes[..end])[..] != bytes[end..] {
            return Err(damaged("its bytes do not have the hash that was written with them".to_string()));
        }
        let mut rest = bytes[start..end]
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
        let numbers = counts
            .iter()
            .map(|&count| (0..parts).map(|_| rest.by_ref().take(count).collect()).collect())
            .collect();
        Ok(Self { header, numbers })
    }
}

/// Little-endian bytes, at most eight, as a number.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| (number << 8) | u64::from(byte))
}

/// Hashes what it passes on.
struct Hashing<'a> {
    to: &'a mut dyn Write,
    digest: Sha256,
}

impl Hashing<'_> {
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.digest.update(bytes);
        self.to.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{checkpoint, saved};
    use super::*;

    #[test]
    fn a_file_cut_off_anywhere_says_so() {
        let (_folder, path, bytes) = saved();
        let header = PREFIX + number(&bytes[12..20]) as usize;
        for length in [0, 5, 8, 19, PREFIX + 1, header - 1, header, header + 100, bytes.len() - 1] {
            fs::write(&path, &bytes[..length]).unwrap();
            match Checkpoint::load(&path).unwrap_err() {
                Error::Truncated { found, expected, .. } => {
                    assert_eq!(found, length as u64);
                    assert!((length as u64) < expected && expected <= bytes.len() as u64, "{expected}");
                }
                other => panic!("cut to {length} bytes: {other}"),
            }
        }
    }

    #[test]
    fn a_changed_byte_anywhere_is_noticed() {
        let (_folder, path, bytes) = saved();
        let header = PREFIX + number(&bytes[12..20]) as usize;
        for at in [0, 9, PREFIX, header - 1, header, header + 7, bytes.len() - 1] {
            let mut changed = bytes.clone();
            changed[at] ^= 4;
            fs::write(&path, &changed).unwrap();
            let error = Checkpoint::load(&path).unwrap_err();
            match at {
                0 | 9 => assert!(matches!(error, Error::NotACheckpoint { .. }), "{at}: {error}"),
                _ => assert!(matches!(error, Error::Damaged { .. }), "{at}: {error}"),
            }
        }
        fs::write(&path, [&bytes[..], b"x"].concat()).unwrap();
        assert!(matches!(Checkpoint::load(&path).unwrap_err(), Error::Damaged { .. }));
        fs::write(&path, "# not a checkpoint").unwrap();
        assert!(matches!(Checkpoint::load(&path).unwrap_err(), Error::NotACheckpoint { .. }));
        fs::remove_file(&path).unwrap();
        assert!(matches!(Checkpoint::load(&path).unwrap_err(), Error::Io { action: "read", .. }));
    }

    #[test]
    fn another_version_is_named() {
        let (_folder, path, mut bytes) = saved();
        bytes[8] = 7;
        fs::write(&path, bytes).unwrap();
        let error = Checkpoint::load(&path).unwrap_err().to_string();
        assert!(error.contains("version 7, expected 2"), "{error}");
    }

    #[test]
    fn a_full_disk_leaves_the_last_checkpoint() {
        let (folder, path, bytes) = saved();
        // A folder that is not there stands for any failure to write.
        let missing = folder.path().join("missing").join("checkpoint");
        assert!(matches!(checkpoint().save(&missing).unwrap_err(), Error::Io { action: "write", .. }));
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
}
