use bifocal_core::{Element, Error, Problem, Reach, Result, device::TensorView};
use cubecl::{client::Client, prelude::*, server::Handle};

use crate::{Layout, book::Book};

/// What a decode step reads: the keys and values of a batch of sequences, wherever they lie.
///
/// Of a [`KvCache`](crate::KvCache) by [`view`](crate::KvCache::view), of pages that another library manages by
/// [`PageTables::view`].
#[derive(Clone, Debug)]
pub struct CacheView<'a> {
    /// `[pages, Hk, page size, D]`.
    pub(crate) key: TensorView<'a, 4>,
    /// `[pages, Hk, page size, Dv]`.
    pub(crate) value: TensorView<'a, 4>,
    /// `u32 [sequences, 1 + entries]`: length, then the page of each entry.
    pub(crate) tables: &'a Handle,
    /// `u32 [B]`: which of the tables.
    pub(crate) slots: &'a Handle,
    pub(crate) layout: Layout,
    pub(crate) lengths: Vec<usize>,
    /// Who knows what a ring has overwritten, and the slots of the batch.
    pub(crate) ring: Option<(&'a Book, Vec<usize>)>,
}

impl CacheView<'_> {
    /// Tokens of each sequence.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// The problem that queries `[B, H, Tq, D]` pose to this cache, with default scale and no softcap. Its key length is
    /// what a sequence may have in memory at most: a step reads the lengths on the device.
    ///
    /// # Errors
    /// As [`Problem::new`]; [`Error::Shape`] for another batch.
    pub fn problem(&self, query: [usize; 4], element: Element) -> Result<Problem> {
        let batch = self.lengths.len();
        if query[0] != batch {
            return Err(Error::shape("query", format!("[{batch}, H, Tq, D]"), &query));
        }
        let [_, kv_heads, _, head_dim] = self.key.shape();
        let key = [batch, kv_heads, self.layout.tokens_kept(), head_dim];
        Problem::new(query, key, element)?.with_value_dim(self.value.shape()[3])
    }

    /// Checks that this is the cache of `problem`, on the client's device.
    pub(crate) fn check(&self, client: &Client, problem: &Problem) -> Result<()> {
        let Layout { pages, page_size, .. } = self.layout;
        let Problem { batch, kv_heads, head_dim, value_dim, element, .. } = *problem;
        if self.lengths.len() != batch {
            return Err(Error::shape(
                "the sequences of the cache",
                format!("[{batch}]"),
                &[self.lengths.len()],
            ));
        }
        let name = "the keys of the cache";
        self.key.check(name, client, [pages, kv_heads, page_size, head_dim], element)?;
        self.key.check_contiguous(name)?;
        let name = "the values of the cache";
        self.value.check(name, client, [pages, kv_heads, page_size, value_dim], element)?;
        self.value.check_contiguous(name)?;
        if problem.key_len != self.layout.tokens_kept() {
            let expected = format!("{} (what the cache keeps of a sequence)", self.layout.tokens_kept());
            return Err(Error::option("key length of the problem", problem.key_len, expected));
        }
        Ok(())
    }

    /// Checks that every key that `query_len` queries see through `reach` is there still.
    pub(crate) fn check_kept(&self, reach: Reach, query_len: usize) -> Result<()> {
        let Some((book, slots)) = &self.ring else { return Ok(()) };
        for (&slot, &length) in slots.iter().zip(&self.lengths) {
            let start = |window: bifocal_core::Window| {
                (length + 1).saturating_sub(query_len + window.keys() as usize)
            };
            let (sinks, from) = match reach {
                Reach::Window(window) => (0, start(window)),
                Reach::SinksAndWindow { sinks, window } => ((sinks as usize).min(length), start(window)),
                Reach::Far { sinks, .. } => (0, sinks as usize),
                _ => (0, 0),
            };
            book.check_kept(slot, sinks, from)?;
        }
        Ok(())
    }
}

/// Page tables that another library has made, in device memory, for keys and values `[pages, Hk, page size, D]` (the
/// layout that FlashInfer calls HND).
#[derive(Clone, Debug)]
pub struct PageTables {
    tables: Handle,
    slots: Handle,
    layout: Layout,
    lengths: Vec<usize>,
}

impl PageTables {
    /// Copies the tables of a batch from the host: for every sequence its pages, of `page_size` tokens each, and its
    /// length. Entries beyond the length are ignored. `capacity` is the most tokens that a sequence may have, whatever it
    /// has now.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`] without sequences or when one has no token; [`Error::Shape`] when there are more tables
    /// than lengths or a table is too short for its length; [`Error::PageOutOfRange`]; [`Error::TooLarge`] beyond the
    /// capacity; as [`Layout::paged`].
    pub fn from_host(
        client: &Client,
        [pages, page_size, capacity]: [usize; 3],
        tables: &[&[u32]],
        lengths: &[usize],
    ) -> Result<Self> {
        if tables.is_empty() {
            return Err(Error::EmptyDimension { dimension: "batch" });
        }
        if tables.len() != lengths.len() {
            return Err(Error::shape("the lengths", format!("[{}]", tables.len()), &[lengths.len()]));
        }
        let layout = Layout::paged(tables.len(), capacity, page_size, pages)?;
        let mut words = vec![0u32; tables.len() * layout.pitch()];
        for (sequence, (&table, &length)) in tables.iter().zip(lengths).enumerate() {
            if length == 0 {
                return Err(Error::EmptyDimension { dimension: "length of a sequence" });
            }
            if length > capacity {
                let (size, limit) = (length as u128, capacity as u128);
                return Err(Error::TooLarge { what: "tokens in a sequence of the cache", size, limit });
            }
            let entries = length.div_ceil(page_size);
            let Some(used) = table.get(..entries) else {
                let expected = format!("[{entries}] for {length} tokens");
                return Err(Error::shape("a page table", expected, &[table.len()]));
            };
            if let Some(at) = used.iter().position(|&page| page as usize >= pages) {
                return Err(Error::PageOutOfRange { sequence, at, found: used[at], pages });
            }
            let words = &mut words[sequence * layout.pitch()..];
            words[0] = length as u32;
            words[1..=entries].copy_from_slice(used);
        }
        let slots: Vec<u32> = (0..tables.len() as u32).collect();
        Ok(Self {
            tables: client.create_from_slice(bytemuck::cast_slice(&words)),
            slots: client.create_from_slice(bytemuck::cast_slice(&slots)),
            layout,
            lengths: lengths.to_vec(),
        })
    }

    /// The tables in device memory, `u32 [B, 1 + entries]`: of every sequence its length, then the page of each entry, of which
    /// there are as many as the capacity fills. Who replays a captured step writes new lengths and pages here first; those
    /// are not checked.
    pub fn handle(&self) -> &Handle {
        &self.tables
    }

    /// What a decode step reads by these tables; its shapes are checked against them when it does.
    pub fn view<'a>(&'a self, key: TensorView<'a, 4>, value: TensorView<'a, 4>) -> CacheView<'a> {
        CacheView {
            key,
            value,
            tables: &self.tables,
            slots: &self.slots,
            layout: self.layout,
            lengths: self.lengths.clone(),
            ring: None,
        }
    }
}

/// Where tokens are, as kernels need it: a [`Layout`] and the kv heads.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Places {
    /// Words of a sequence's table, its length included.
    pub(crate) pitch: u32,
    pub(crate) page_size: u32,
    pub(crate) fixed_pages: u32,
    pub(crate) ring_pages: u32,
    pub(crate) kv_heads: u32,
}

pub(crate) fn places(layout: &Layout, kv_heads: usize) -> PlacesLaunch {
    PlacesLaunch::new(
        layout.pitch() as u32,
        layout.page_size as u32,
        layout.fixed_pages as u32,
        layout.ring_pages as u32,
        kv_heads as u32,
    )
}

/// The row of the pools that holds a position of the sequence whose table begins at word `table`.
#[cube]
pub(crate) fn place(position: u32, table: u32, head: u32, tables: &[u32], places: &Places) -> u32 {
    let page = position / places.page_size;
    let mut entry = page;
    if page >= places.fixed_pages {
        // Without a ring no position is beyond the fixed pages, and any number may be divided by.
        let turn = max(places.ring_pages, 1u32);
        entry = places.fixed_pages + (page - places.fixed_pages) % turn;
    }
    let held_by = tables[(table + 1u32 + entry) as usize];
    (held_by * places.kv_heads + head) * places.page_size + position % places.page_size
}
