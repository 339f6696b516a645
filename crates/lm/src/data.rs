//! Text as tokens: one per byte, and one at the end of each document. Files are mapped into memory, not read.

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    Error, Result, TrainingConfig,
    draws::{Draws, Purpose},
};

/// The token that ends a document.
pub const DOCUMENT_END: i32 = 256;
/// How many tokens there are: every byte, and the end of a document.
pub const VOCABULARY: usize = 257;

/// What a token is part of, for statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenKind {
    /// An ASCII letter.
    Letter,
    /// A digit.
    Digit,
    /// A space, a tab or a line break.
    Space,
    /// ASCII punctuation and symbols.
    Punctuation,
    /// Bytes of other characters, control characters, document ends.
    Other,
}

impl TokenKind {
    /// All of them, in order.
    pub const ALL: [Self; 5] = [Self::Letter, Self::Digit, Self::Space, Self::Punctuation, Self::Other];

    /// The kind of a token.
    pub fn of(token: i32) -> Self {
        match u8::try_from(token) {
            Ok(byte) if byte.is_ascii_alphabetic() => Self::Letter,
            Ok(byte) if byte.is_ascii_digit() => Self::Digit,
            Ok(byte) if byte.is_ascii_whitespace() => Self::Space,
            Ok(byte) if byte.is_ascii_punctuation() => Self::Punctuation,
            _ => Self::Other,
        }
    }
}

/// Documents one after another.
#[derive(Debug)]
pub struct Corpus {
    documents: Vec<Mmap>,
    /// At which token each document starts; one more entry for where the last one ends.
    starts: Vec<usize>,
    fingerprint: String,
    skipped: usize,
}

impl Corpus {
    /// Maps files, and the files inside folders (hidden ones and links apart), into memory. Files with a NUL byte among
    /// their first 8192 are no text and are left out, as are empty ones. Documents are ordered by `seed`, so that those
    /// at the end, which are kept for validation, are of every sort.
    ///
    /// The files must not change while they are mapped.
    ///
    /// # Errors
    /// [`Error::Io`] for what cannot be read; [`Error::NoText`].
    pub fn open(paths: &[PathBuf], seed: u64) -> Result<Self> {
        let mut files = Vec::new();
        for path in paths {
            collect(path, &mut files)?;
        }
        let mut documents = Vec::new();
        let mut skipped = 0;
        for file in &files {
            let map = map(file)?;
            match map[..map.len().min(8192)].contains(&0) {
                true => skipped += 1,
                false if map.is_empty() => {}
                false => documents.push(map),
            }
        }
        if documents.is_empty() {
            let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
            return Err(Error::NoText { paths: paths.join(", "), skipped });
        }
        // Fisher and Yates, from the end.
        let mut draws = Draws::new(seed, Purpose::Documents, &[]);
        for last in (1..documents.len()).rev() {
            documents.swap(last, draws.below(last + 1));
        }
        let mut starts = vec![0];
        let mut digest = Sha256::new();
        for document in &documents {
            starts.push(starts[starts.len() - 1] + document.len() + 1);
            digest.update((document.len() as u64).to_le_bytes());
            digest.update(&document[..]);
        }
        let fingerprint = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { documents, starts, fingerprint, skipped })
    }

    /// Tokens, document ends included.
    pub fn tokens(&self) -> usize {
        self.starts[self.documents.len()]
    }

    /// Documents.
    pub fn documents(&self) -> usize {
        self.documents.len()
    }

    /// Files that were left out for not being text.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// SHA-256 of all documents in their order: a run can only be resumed on the text that it began with.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Which tokens are for training, and which for validation: the last ones.
    ///
    /// # Errors
    /// [`Error::TooShort`] when either part is too short for one batch: training needs `batch` windows side by side,
    /// validation needs one.
    pub fn split(&self, config: &TrainingConfig) -> Result<Split> {
        let kept = (self.tokens() as f64 * config.validation_share) as usize;
        let cut = self.tokens() - kept;
        let context = config.model.context;
        check_length("training", cut, context, config.batch)?;
        check_length("validation", kept, context, 1)?;
        Ok(Split { training: 0..cut, validation: cut..self.tokens() })
    }

    /// All tokens, to validate on.
    ///
    /// # Errors
    /// [`Error::TooShort`] when that is not one window.
    pub(crate) fn whole(&self, context: usize) -> Result<Range<usize>> {
        check_length("validation", self.tokens(), context, 1)?;
        Ok(0..self.tokens())
    }

    /// Copies tokens from `start` on.
    fn read(&self, start: usize, out: &mut [i32]) {
        let mut document = self.starts.partition_point(|&first| first <= start) - 1;
        let mut at = start - self.starts[document];
        for token in out {
            let bytes = &self.documents[document];
            *token = match bytes.get(at) {
                Some(&byte) => i32::from(byte),
                None => DOCUMENT_END,
            };
            at += 1;
            if at > bytes.len() {
                (document, at) = (document + 1, 0);
            }
        }
    }

    /// `count` windows of `length` tokens at random places of `part`, row-major. The same step draws the same windows.
    pub(crate) fn sample(
        &self,
        part: &Range<usize>,
        count: usize,
        length: usize,
        draws: &mut Draws,
    ) -> Vec<i32> {
        let places = part.len() - length + 1;
        self.windows((0..count).map(|_| part.start + draws.below(places)), length)
    }

    /// Up to `count` windows of `length` tokens, evenly spread over `part` and not overlapping, row-major.
    pub(crate) fn spread(&self, part: &Range<usize>, count: usize, length: usize) -> Vec<i32> {
        let count = count.min(part.len() / length).max(1);
        let gap = (part.len() - length) / (count - 1).max(1);
        self.windows((0..count).map(|index| part.start + index * gap), length)
    }

    fn windows(&self, starts: impl Iterator<Item = usize>, length: usize) -> Vec<i32> {
        let mut tokens = Vec::new();
        for start in starts {
            let from = tokens.len();
            tokens.resize(from + length, 0);
            self.read(start, &mut tokens[from..]);
        }
        tokens
    }
}

/// Checks that a part of a text has so many windows side by side.
fn check_length(part: &'static str, found: usize, context: usize, windows: usize) -> Result<()> {
    // Each token is told the next one, so there is one more.
    let expected = context.saturating_mul(windows).saturating_add(1);
    if found < expected {
        let why = format!("{windows} x a context of {context}, and the token after it");
        return Err(Error::TooShort { part, found, expected, why });
    }
    Ok(())
}

/// Ranges of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// For training.
    pub training: Range<usize>,
    /// For validation.
    pub validation: Range<usize>,
}

/// The files at `path`, those of a folder in the order of their names.
fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let metadata = fs::metadata(path).map_err(Error::io("read", path))?;
    if !metadata.is_dir() {
        files.push(path.to_path_buf());
        return Ok(());
    }
    let mut inside = Vec::new();
    for entry in fs::read_dir(path).map_err(Error::io("read", path))? {
        let entry = entry.map_err(Error::io("read", path))?;
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        // A link may lead in a circle.
        let kind = entry.file_type().map_err(Error::io("read", path))?;
        if !hidden && (kind.is_dir() || kind.is_file()) {
            inside.push(entry.path());
        }
    }
    inside.sort();
    inside.iter().try_for_each(|path| collect(path, files))
}

fn map(path: &Path) -> Result<Mmap> {
    let file = fs::File::open(path).map_err(Error::io("read", path))?;
    // SAFETY: the file is only read. A program that changes it meanwhile changes tokens; one that cuts it short makes
    // reading fail, as with any mapped file.
    unsafe { Mmap::map(&file) }.map_err(Error::io("read", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, files: &[(&str, &[u8])]) {
        for (name, bytes) in files {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }

    fn config(context: usize, batch: usize) -> TrainingConfig {
        let mut config = TrainingConfig { batch, validation_share: 0.25, ..Default::default() };
        config.model.context = context;
        config
    }

    #[test]
    fn documents_are_bytes_and_an_end() {
        let folder = tempfile::tempdir().unwrap();
        let files: [(&str, &[u8]); 5] = [
            ("a.txt", b"ab"),
            ("sub/b.txt", "\u{e9}".as_bytes()),
            (".hidden", b"secret"),
            ("binary", b"\0\x01"),
            ("empty", b""),
        ];
        write(folder.path(), &files);
        let corpus = Corpus::open(&[folder.path().to_path_buf()], 1).unwrap();
        assert_eq!((corpus.documents(), corpus.skipped(), corpus.tokens()), (2, 1, 6));
        let mut tokens = [0; 6];
        corpus.read(0, &mut tokens);
        let either = [[97, 98, 256, 0xc3, 0xa9, 256], [0xc3, 0xa9, 256, 97, 98, 256]];
        assert!(either.contains(&tokens), "{tokens:?}");
        // From the middle of a document, over its end.
        let mut middle = [0; 3];
        corpus.read(1, &mut middle);
        assert_eq!(middle, tokens[1..4]);
    }

    #[test]
    fn order_follows_the_seed_and_the_fingerprint_the_order() {
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..20).map(|n| format!("{n}.txt")).collect();
        for name in &names {
            write(folder.path(), &[(name, name.as_bytes())]);
        }
        let open = |seed| Corpus::open(&[folder.path().to_path_buf()], seed).unwrap();
        let (one, again, other) = (open(1), open(1), open(2));
        assert_eq!(one.fingerprint(), again.fingerprint());
        assert_ne!(one.fingerprint(), other.fingerprint());
        assert_eq!(one.tokens(), other.tokens());
        write(folder.path(), &[("3.txt", b"3.TXT")]);
        assert_ne!(open(1).fingerprint(), one.fingerprint());
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing");
        let error = Corpus::open(std::slice::from_ref(&missing), 1).unwrap_err();
        assert!(error.to_string().contains(missing.to_str().unwrap()), "{error}");
        write(folder.path(), &[("binary", b"\0")]);
        let error = Corpus::open(&[folder.path().to_path_buf()], 1).unwrap_err();
        assert!(matches!(error, Error::NoText { skipped: 1, .. }), "{error}");
    }

    #[test]
    fn a_text_too_short_for_a_batch_says_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &[("a.txt", &[b'a'; 399])]);
        let corpus = Corpus::open(&[folder.path().to_path_buf()], 1).unwrap();
        // 400 tokens: 300 to train on, 100 to validate on.
        let split = corpus.split(&config(99, 3)).unwrap();
        assert_eq!(split, Split { training: 0..300, validation: 300..400 });
        let error = corpus.split(&config(99, 4)).unwrap_err();
        assert!(
            matches!(error, Error::TooShort { part: "training", found: 300, expected: 397, .. }),
            "{error}"
        );
        let error = corpus.split(&config(100, 2)).unwrap_err();
        assert!(
            matches!(error, Error::TooShort { part: "validation", found: 100, expected: 101, .. }),
            "{error}"
        );
    }

    #[test]
    fn windows_stay_in_their_part() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..=255).filter(|&byte| byte != 0).cycle().take(1000).collect();
        write(folder.path(), &[("a.txt", &bytes)]);
        let corpus = Corpus::open(&[folder.path().to_path_buf()], 1).unwrap();
        let part = 100..140;
        let mut all = vec![0; 1001];
        corpus.read(0, &mut all);
        let mut draws = Draws::new(3, Purpose::Windows, &[1]);
        let sampled = corpus.sample(&part, 200, 8, &mut draws.clone());
        for window in sampled.chunks(8) {
            assert!(all[part.clone()].windows(8).any(|inside| inside == window), "{window:?}");
        }
        // The last place is drawn too, and the same draws give the same windows.
        assert!(sampled.chunks(8).any(|window| window == &all[132..140]));
        assert_eq!(sampled, corpus.sample(&part, 200, 8, &mut draws));

        let spread = corpus.spread(&part, 5, 8);
        assert_eq!(spread, all[part.clone()], "five windows of eight fill the part");
        assert_eq!(corpus.spread(&part, 2, 8), [&all[100..108], &all[132..140]].concat());
        assert_eq!(corpus.spread(&part, 1, 8), all[100..108]);
        assert_eq!(corpus.spread(&part, 99, 8).len(), 40);
    }

    #[test]
    fn every_token_has_a_kind() {
        let text = "a Z\n7_\u{e9}";
        let kinds: Vec<_> = text.bytes().map(|byte| TokenKind::of(i32::from(byte))).collect();
        use TokenKind::*;
        assert_eq!(kinds, [Letter, Space, Letter, Space, Digit, Punctuation, Other, Other]);
        assert_eq!(TokenKind::of(DOCUMENT_END), Other);
    }
}
