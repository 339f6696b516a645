use bifocal_core::{Error, Result, Window};

/// How a cache lays tokens out in memory: in pages, of which every sequence has a table.
///
/// Token `j` of a sequence is in entry `j / page size` of its table. Where the entries end, a ring begins anew behind its
/// sinks, and overwrites what has left the window. A contiguous cache has one page per sequence, so one kernel reads
/// all three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub(crate) sequences: usize,
    pub(crate) page_size: usize,
    pub(crate) pages: usize,
    /// Entries of a table that hold the first tokens for good.
    pub(crate) fixed_pages: usize,
    /// Entries of a table that are used in turns; 0 unless a ring.
    pub(crate) ring_pages: usize,
    /// Most tokens in a sequence.
    pub(crate) capacity: usize,
    /// Keys that a ring has to keep for the next token.
    pub(crate) window: usize,
}

/// Most tokens in a page of a paged cache.
const MAX_PAGE_SIZE: usize = 256;

/// Positions that a problem can have.
const MAX_TOKENS: usize = 1 << 30;

impl Layout {
    /// Room for `capacity` tokens of each of `sequences`, one after the other: `[sequences, Hk, capacity, D]`.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`], [`Error::TooLarge`].
    pub fn contiguous(sequences: usize, capacity: usize) -> Result<Self> {
        Self {
            sequences,
            page_size: capacity,
            pages: sequences,
            fixed_pages: 1,
            ring_pages: 0,
            capacity,
            window: 0,
        }
        .checked()
    }

    /// `pages` of `page_size` tokens that up to `sequences` of up to `capacity` tokens share (vLLM's paged attention, arXiv
    /// 2309.06180, section 4.1).
    ///
    /// # Errors
    /// [`Error::EmptyDimension`], [`Error::TooLarge`]; [`Error::Option`] for pages of more than 256 tokens.
    pub fn paged(sequences: usize, capacity: usize, page_size: usize, pages: usize) -> Result<Self> {
        check_page_size(page_size)?;
        let fixed_pages = capacity.div_ceil(page_size);
        Self { sequences, page_size, pages, fixed_pages, ring_pages: 0, capacity, window: 0 }.checked()
    }

    /// Room for the last `window` tokens of each of `sequences`, and for `slack` tokens more, whatever the context.
    ///
    /// The slack is what queries and rejected tokens need: a step of `q` queries sees `q - 1` keys beyond the window of
    /// its last one, and after [`truncate`](crate::KvCache::truncate) by `n` tokens the window ends `n` tokens sooner.
    ///
    /// # Errors
    /// As [`paged`](Self::paged).
    pub fn ring(sequences: usize, window: Window, slack: usize, page_size: usize) -> Result<Self> {
        check_page_size(page_size)?;
        let window = window.keys() as usize;
        let ring_pages = window.saturating_add(slack).div_ceil(page_size);
        let pages = sequences.saturating_mul(ring_pages);
        Self { sequences, page_size, pages, fixed_pages: 0, ring_pages, capacity: MAX_TOKENS, window }
            .checked()
    }

    /// Keeps the first `sinks` tokens of every sequence for good, beside the window of a ring (StreamingLLM, arXiv
    /// 2309.17453).
    ///
    /// # Errors
    /// [`Error::Option`] unless this is a ring; [`Error::TooLarge`].
    pub fn with_sinks(self, sinks: usize) -> Result<Self> {
        if self.ring_pages == 0 {
            return Err(Error::option("sinks of a layout", sinks, "a ring: other layouts keep every token"));
        }
        let fixed_pages = sinks.div_ceil(self.page_size);
        let pages = self.sequences.saturating_mul(fixed_pages.saturating_add(self.ring_pages));
        Self { fixed_pages, pages, ..self }.checked()
    }

    /// Tokens of one sequence that are in memory at most.
    pub fn tokens_kept(&self) -> usize {
        self.capacity.min(self.entries() * self.page_size)
    }

    /// Tokens per page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Pages of all sequences together.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Sequences at once.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// Entries of a page table.
    pub(crate) fn entries(&self) -> usize {
        self.fixed_pages + self.ring_pages
    }

    /// Words of a sequence in device memory: its length and its page table.
    pub(crate) fn pitch(&self) -> usize {
        1 + self.entries()
    }

    /// The entry of the page table that holds a position.
    pub(crate) fn entry(&self, position: usize) -> usize {
        let page = position / self.page_size;
        if page < self.fixed_pages {
            page
        } else {
            self.fixed_pages + (page - self.fixed_pages) % self.ring_pages
        }
    }

    /// Tokens that are kept for good, and tokens of the ring.
    pub(crate) fn fixed_tokens(&self) -> usize {
        self.fixed_pages * self.page_size
    }

    pub(crate) fn ring_tokens(&self) -> usize {
        self.ring_pages * self.page_size
    }

    fn checked(self) -> Result<Self> {
        let sizes = [
            ("sequences of a cache", self.sequences),
            ("capacity of a cache", self.capacity),
            ("pages of a cache", self.pages),
        ];
        for (dimension, size) in sizes {
            if size == 0 {
                return Err(Error::EmptyDimension { dimension });
            }
        }
        let words = self.sequences as u128 * (1 + self.fixed_pages as u128 + self.ring_pages as u128);
        for (what, size, limit) in [
            ("tokens in a sequence of the cache", self.capacity as u128, MAX_TOKENS as u128),
            ("pages in a cache", self.pages as u128, u128::from(u32::MAX)),
            ("entries of all page tables", words, u128::from(u32::MAX)),
        ] {
            if size > limit {
                return Err(Error::TooLarge { what, size, limit });
            }
        }
        Ok(self)
    }
}

fn check_page_size(page_size: usize) -> Result<()> {
    match page_size {
        1..=MAX_PAGE_SIZE => Ok(()),
        _ => Err(Error::option("page size", page_size, format!("1 to {MAX_PAGE_SIZE} tokens"))),
    }
}
