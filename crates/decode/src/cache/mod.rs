mod copies;
pub(crate) mod kernels;
mod snapshot;

use std::sync::atomic::{AtomicU64, Ordering};

use bifocal_core::{
    Element, Error, Result,
    device::{
        Tensor, TensorView,
        launch::{elements, grid, words},
    },
};
use cubecl::{client::Client, server::Handle};

use self::kernels::{ShapeLaunch, append_kernel, copy_kernel, edit_kernel};
pub use self::snapshot::Snapshot;
pub(crate) use self::snapshot::foreign;
use crate::{
    Layout,
    book::{Book, Orders},
    view::{CacheView, PlacesLaunch},
};

/// What a cache holds per token: a key and a value for every kv head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Key and value heads (Hk).
    pub kv_heads: usize,
    /// Length of a key (D).
    pub head_dim: usize,
    /// Length of a value (Dv).
    pub value_dim: usize,
    /// `f32`, `f16` or `bf16`.
    pub element: Element,
}

/// Tokens to append to the sequences of a batch, in the cache's element type.
#[derive(Clone, Copy, Debug)]
pub struct NewTokens<'a> {
    /// `[B, Hk, T, D]`: keys as attention reads them, rotated or not.
    pub key: TensorView<'a, 4>,
    /// `[B, Hk, T, Dv]`.
    pub value: TensorView<'a, 4>,
    /// `[B, Hk, T, D]`: keys as a [`SummaryCache`](crate::SummaryCache) sums them up, if it was told that these are others:
    /// RATTENTION's before rotary positions and norms.
    pub plain_key: Option<TensorView<'a, 4>>,
}

impl<'a> NewTokens<'a> {
    /// Keys and values.
    pub fn new(key: TensorView<'a, 4>, value: TensorView<'a, 4>) -> Self {
        Self { key, value, plain_key: None }
    }

    /// Sets the keys that are summed up.
    pub fn with_plain_key(self, plain_key: TensorView<'a, 4>) -> Self {
        Self { plain_key: Some(plain_key), ..self }
    }
}

/// A sequence of a [`KvCache`], until it is freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId {
    cache: u64,
    slot: u32,
    /// How many sequences had the slot before.
    generation: u32,
}

/// The sequences of a decode step, in the order of its queries. It stays good while its sequences grow, shrink and move,
/// until one of them is freed.
#[derive(Clone, Debug)]
pub struct Batch {
    pub(crate) sequences: Vec<SequenceId>,
    /// `u32 [B]`.
    pub(crate) slots: Handle,
}

/// Keys and values of sequences that grow: `key [pages, Hk, page size, D]`, `value [pages, Hk, page size, Dv]`, and on the
/// device every sequence's length and page table.
///
/// What pages are shared and free is known on the host, and what the device needs of it is sent with each change, so that a
/// decode step reads nothing back. Forked sequences share pages until one of them writes (copy on write). After an error
/// the cache is as it was.
///
/// ```no_run
/// use bifocal_core::{Element, device::{self, Tensor}};
/// use bifocal_decode::{KvCache, KvShape, Layout};
///
/// let client = device::open("cpu")?;
/// let shape = KvShape { kv_heads: 2, head_dim: 64, value_dim: 64, element: Element::F32 };
/// let mut cache = KvCache::new(&client, shape, Layout::paged(8, 4096, 16, 512)?)?;
/// let sequence = cache.start(&client)?;
/// let token = Tensor::filled(&client, [1, 2, 1, 64], Element::F32, 0.5)?;
/// cache.append(&client, &[sequence], token.view(), token.view())?;
/// let draft = cache.fork(&client, sequence)?;
/// cache.append(&client, &[draft], token.view(), token.view())?;
/// cache.free(draft)?;
/// assert_eq!(cache.length(sequence)?, 1);
/// # Ok::<(), bifocal_core::Error>(())
/// ```
#[derive(Debug)]
pub struct KvCache {
    id: u64,
    shape: KvShape,
    pub(crate) book: Book,
    generations: Vec<u32>,
    pub(crate) key: Tensor<4>,
    pub(crate) value: Tensor<4>,
    /// Second keys in the same pages, of a cache of summaries.
    pub(crate) plain_key: Option<Tensor<4>>,
    /// `u32 [sequences, 1 + entries]`: length, then the page of each entry.
    pub(crate) tables: Handle,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`]; [`Error::Element`] unless `element` is a float type; [`Error::TooLarge`] for more than
    /// 2^32 - 1 elements of keys or of values.
    pub fn new(client: &Client, shape: KvShape, layout: Layout) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        shape.check()?;
        let (key, value) = shape.pools(layout.pages, layout.page_size)?;
        let tables = vec![0u32; layout.sequences * layout.pitch()];
        Ok(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            shape,
            book: Book::new(layout),
            generations: vec![0; layout.sequences],
            key: Tensor::empty(client, key, shape.element),
            value: Tensor::empty(client, value, shape.element),
            plain_key: None,
            tables: client.create_from_slice(bytemuck::cast_slice(&tables)),
        })
    }

    /// What it holds per token.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// How it lies in memory.
    pub fn layout(&self) -> Layout {
        *self.book.layout()
    }

    /// Bytes of device memory for all its pages, whether a sequence holds them or not.
    pub fn bytes(&self) -> usize {
        let pools = [Some(&self.key), Some(&self.value), self.plain_key.as_ref()];
        let numbers = |pool: &Tensor<4>| pool.shape().iter().product::<usize>();
        pools.into_iter().flatten().map(numbers).sum::<usize>() * self.shape.element.size()
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.book.free_pages()
    }

    /// How many sequences can be started.
    pub fn free_sequences(&self) -> usize {
        self.book.free_slots()
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn length(&self, sequence: SequenceId) -> Result<usize> {
        Ok(self.book.length(self.slot(sequence)?))
    }

    /// Starts a sequence without tokens.
    ///
    /// # Errors
    /// [`Error::CacheFull`]; [`Error::DeviceMismatch`].
    pub fn start(&mut self, client: &Client) -> Result<SequenceId> {
        self.check_device(client)?;
        let (slot, orders) = self.book.start()?;
        self.obey(client, &[], &orders);
        Ok(self.id_of(slot))
    }

    /// Appends `T` tokens to each of the sequences: `key [B, Hk, T, D]` and `value [B, Hk, T, Dv]`, in the cache's element
    /// type, one row of the batch per sequence. Keys are stored as they come, rotated or not. Of more tokens than a ring
    /// holds, the last are kept.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Option`] when one is named twice; as [`TensorView::check`];
    /// [`Error::EmptyDimension`] for no token or no sequence; [`Error::TooLarge`] beyond the capacity;
    /// [`Error::CacheFull`] when too few pages are free.
    pub fn append(
        &mut self,
        client: &Client,
        sequences: &[SequenceId],
        key: TensorView<'_, 4>,
        value: TensorView<'_, 4>,
    ) -> Result<()> {
        let new = NewTokens::new(key, value);
        let slots = self.check_append(client, sequences, &new)?;
        self.write(client, &slots, &new)
    }

    /// Checks all that [`append`](Self::append) does, and returns the slots.
    pub(crate) fn check_append(
        &self,
        client: &Client,
        sequences: &[SequenceId],
        new: &NewTokens<'_>,
    ) -> Result<Vec<usize>> {
        let slots = self.slots(sequences)?;
        let KvShape { kv_heads, head_dim, value_dim, element } = self.shape;
        let (batch, tokens) = (slots.len(), new.key.shape()[2]);
        for (dimension, size) in [("batch", batch), ("tokens to append", tokens)] {
            if size == 0 {
                return Err(Error::EmptyDimension { dimension });
            }
        }
        self.check_device(client)?;
        new.key.check("key", client, [batch, kv_heads, tokens, head_dim], element)?;
        new.value.check("value", client, [batch, kv_heads, tokens, value_dim], element)?;
        match (new.plain_key, &self.plain_key) {
            (Some(key), Some(_)) => {
                key.check("the plain key", client, [batch, kv_heads, tokens, head_dim], element)?;
            }
            (None, None) => {}
            (given, _) => {
                let found = if given.is_some() { "given" } else { "none" };
                let expected = "as the cache was told: of every token, or of none";
                return Err(Error::option("plain keys of new tokens", found, expected));
            }
        }
        self.book.check_append(&slots, tokens)?;
        Ok(slots)
    }

    /// Appends tokens that were checked.
    pub(crate) fn write(&mut self, client: &Client, slots: &[usize], new: &NewTokens<'_>) -> Result<()> {
        let orders = self.book.append(slots, new.key.shape()[2])?;
        let numbers = self.obey(client, slots, &orders);
        self.launch_append(client, &numbers, new);
        Ok(())
    }

    /// Starts a sequence of `length` tokens of which the last are given, and those before them are not there.
    pub(crate) fn start_with(
        &mut self,
        client: &Client,
        length: usize,
        last: &NewTokens<'_>,
    ) -> Result<SequenceId> {
        let sequence = self.start(client)?;
        let slot = sequence.slot as usize;
        match self.book.append(&[slot], length) {
            Ok(orders) => {
                self.book.forget(slot, length - last.key.shape()[2]);
                let numbers = self.obey(client, &[slot], &orders);
                self.launch_append(client, &numbers, last);
                Ok(sequence)
            }
            Err(error) => {
                self.free(sequence)?;
                Err(error)
            }
        }
    }

    /// Writes the last tokens of the sequences in `slots`, whose lengths count them already.
    fn launch_append(&self, client: &Client, slots: &Handle, new: &NewTokens<'_>) {
        let mut keys = vec![(new.key, &self.key, true)];
        keys.extend(new.plain_key.zip(self.plain_key.as_ref()).map(|(new, pool)| (new, pool, false)));
        for (key, pool, values) in keys {
            let [batch, kv_heads, tokens, _] = key.shape();
            let width = width([key, new.value, pool.view(), self.value.view()]);
            let dim = self.shape.head_dim.max(if values { self.shape.value_dim } else { 0 });
            let (cubes, units) = grid(client, batch * kv_heads * tokens * dim / width);
            // SAFETY: views were checked, pools have room for every page, and the book has given each token one.
            unsafe {
                append_kernel::launch_unchecked(
                    client,
                    cubes,
                    units,
                    elements(key),
                    elements(new.value),
                    words(&self.tables),
                    words(slots),
                    elements(pool.view()),
                    elements(self.value.view()),
                    self.shape_launch([batch, tokens], width, values),
                    strides(key),
                    strides(new.value),
                    self.places(),
                    width,
                    self.shape.element.into(),
                    width,
                );
            }
        }
    }

    /// Takes back all tokens of a sequence but the first `length`: speculative tokens that were rejected. With 0 the
    /// sequence starts anew.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Option`] when there are fewer; [`Error::Overwritten`] when a ring has no longer
    /// what the next token would see; [`Error::DeviceMismatch`].
    pub fn truncate(&mut self, client: &Client, sequence: SequenceId, length: usize) -> Result<()> {
        self.check_device(client)?;
        let orders = self.book.truncate(self.slot(sequence)?, length)?;
        self.obey(client, &[], &orders);
        Ok(())
    }

    /// Checks all that [`truncate`](Self::truncate) does: caches that belong together are so truncated all or none.
    ///
    /// # Errors
    /// As [`truncate`](Self::truncate).
    pub fn check_truncate(&self, client: &Client, sequence: SequenceId, length: usize) -> Result<()> {
        self.check_device(client)?;
        self.book.check_truncate(self.slot(sequence)?, length)
    }

    /// Starts a sequence with the tokens of another. They share pages, and memory is taken when one of them writes.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::CacheFull`]; [`Error::DeviceMismatch`].
    pub fn fork(&mut self, client: &Client, sequence: SequenceId) -> Result<SequenceId> {
        self.check_device(client)?;
        let (slot, orders) = self.book.fork(self.slot(sequence)?)?;
        self.obey(client, &[], &orders);
        Ok(self.id_of(slot))
    }

    /// Ends a sequence; pages that no other shares are free again.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn free(&mut self, sequence: SequenceId) -> Result<()> {
        let slot = self.slot(sequence)?;
        self.book.free(slot);
        self.generations[slot] += 1;
        Ok(())
    }

    /// Ends every sequence.
    pub fn clear(&mut self) {
        for slot in 0..self.generations.len() {
            if self.book.is_used(slot) {
                self.book.free(slot);
                self.generations[slot] += 1;
            }
        }
    }

    /// The sequences of a decode step, in the order of its queries.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::EmptyDimension`] without sequences.
    pub fn batch(&self, client: &Client, sequences: &[SequenceId]) -> Result<Batch> {
        if sequences.is_empty() {
            return Err(Error::EmptyDimension { dimension: "batch" });
        }
        self.check_device(client)?;
        let slots: Vec<u32> = self.slots(sequences)?.into_iter().map(|slot| slot as u32).collect();
        let slots = client.create_from_slice(bytemuck::cast_slice(&slots));
        Ok(Batch { sequences: sequences.to_vec(), slots })
    }

    /// What a decode step reads.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`] when one of the batch was freed; [`Error::EmptyDimension`] when one has no token.
    pub fn view<'a>(&'a self, batch: &'a Batch) -> Result<CacheView<'a>> {
        let slots = self.slots(&batch.sequences)?;
        if slots.iter().any(|&slot| self.book.length(slot) == 0) {
            return Err(Error::EmptyDimension { dimension: "length of a sequence" });
        }
        Ok(CacheView {
            key: self.key.view(),
            value: self.value.view(),
            tables: &self.tables,
            slots: &batch.slots,
            layout: *self.book.layout(),
            lengths: slots.iter().map(|&slot| self.book.length(slot)).collect(),
            ring: Some((&self.book, slots)),
        })
    }

    /// Sends what has changed to the device, and returns `slots` in its memory, if there are any.
    fn obey(&self, client: &Client, slots: &[usize], orders: &Orders) -> Handle {
        let Orders { edits, copies } = orders;
        let mut numbers: Vec<u32> = slots.iter().map(|&slot| slot as u32).collect();
        let edits_at = numbers.len();
        numbers.extend(edits.iter().flat_map(|edit| [edit.at, edit.value]));
        let copies_at = numbers.len();
        numbers.extend(copies.iter().flat_map(|copy| [copy.from, copy.to, copy.tokens]));
        let handle = client.create_from_slice(bytemuck::cast_slice(&numbers));
        // SAFETY: edits are of words that the tables have, and copies of pages that the pools have.
        unsafe {
            if !edits.is_empty() {
                let (cubes, units) = grid(client, edits.len());
                let (numbers, tables) = (words(&handle), words(&self.tables));
                let (first, count) = (edits_at as u32, edits.len() as u32);
                edit_kernel::launch_unchecked(client, cubes, units, numbers, tables, first, count);
            }
            if let Some(tokens) = copies.iter().map(|copy| copy.tokens as usize).max() {
                let mut pools = vec![(&self.key, true)];
                pools.extend(self.plain_key.iter().map(|pool| (pool, false)));
                for (pool, values) in pools {
                    let KvShape { kv_heads, head_dim, value_dim, element } = self.shape;
                    let width = width([pool.view(), self.value.view()]);
                    let rows = copies.len() * kv_heads * tokens;
                    let (cubes, units) = grid(client, rows * head_dim.max(value_dim) / width);
                    copy_kernel::launch_unchecked(
                        client,
                        cubes,
                        units,
                        words(&handle),
                        elements(pool.view()),
                        elements(self.value.view()),
                        self.shape_launch([copies.len(), tokens], width, values),
                        copies_at as u32,
                        self.layout().page_size as u32,
                        element.into(),
                        width,
                    );
                }
            }
        }
        handle
    }

    /// Of keys with their values, or of keys alone.
    pub(crate) fn shape_launch(
        &self,
        [batch, tokens]: [usize; 2],
        width: usize,
        values: bool,
    ) -> ShapeLaunch {
        let KvShape { kv_heads, head_dim, value_dim, .. } = self.shape;
        ShapeLaunch::new(
            batch as u32,
            kv_heads as u32,
            tokens as u32,
            (head_dim / width) as u32,
            if values { (value_dim / width) as u32 } else { 0 },
        )
    }

    pub(crate) fn places(&self) -> PlacesLaunch {
        crate::view::places(self.book.layout(), self.shape.kv_heads)
    }

    fn id_of(&self, slot: usize) -> SequenceId {
        SequenceId { cache: self.id, slot: slot as u32, generation: self.generations[slot] }
    }

    pub(crate) fn slot(&self, sequence: SequenceId) -> Result<usize> {
        let slot = sequence.slot as usize;
        let known = sequence.cache == self.id
            && self.book.is_used(slot)
            && self.generations[slot] == sequence.generation;
        match known {
            true => Ok(slot),
            false => Err(Error::UnknownSequence { sequence: format!("{sequence:?}") }),
        }
    }

    pub(crate) fn slots(&self, sequences: &[SequenceId]) -> Result<Vec<usize>> {
        sequences.iter().map(|&sequence| self.slot(sequence)).collect()
    }

    pub(crate) fn check_device(&self, client: &Client) -> Result<()> {
        self.key.view().check("the cache", client, self.key.shape(), self.shape.element)
    }
}

impl KvShape {
    /// Checks that every dimension is at least 1 and that elements are floats.
    fn check(self) -> Result<()> {
        let Self { kv_heads, head_dim, value_dim, element } = self;
        for (dimension, size) in [("kv heads", kv_heads), ("head dim", head_dim), ("value dim", value_dim)] {
            if size == 0 {
                return Err(Error::EmptyDimension { dimension });
            }
        }
        if !Element::FLOATS.contains(&element) {
            return Err(Error::Element { tensor: "the cache", expected: Element::F32, found: element });
        }
        Ok(())
    }

    /// The shapes of all keys and of all values.
    fn pools(self, pages: usize, page_size: usize) -> Result<([usize; 4], [usize; 4])> {
        let Self { kv_heads, head_dim, value_dim, .. } = self;
        let rows = pages as u128 * kv_heads as u128 * page_size as u128;
        let size = rows.saturating_mul(head_dim.max(value_dim) as u128);
        let limit = u128::from(u32::MAX);
        if size > limit {
            return Err(Error::TooLarge { what: "elements in a cache", size, limit });
        }
        Ok(([pages, kv_heads, page_size, head_dim], [pages, kv_heads, page_size, value_dim]))
    }
}

/// Elements that one load of every one of these tensors takes: up to 16 bytes.
pub(crate) fn width<const N: usize>(views: [TensorView<'_, 4>; N]) -> usize {
    let size = views[0].element().size();
    let mut width = 16 / size;
    for view in views {
        let [batch, heads, tokens, dim] = view.shape();
        let [by_batch, by_head, by_token, _] = view.strides();
        let start = view.handle().offset_start.unwrap_or(0) as usize / size;
        // Rows start at any sum of these; what there is one of is not stepped over.
        let steps = [(2, start), (2, dim), (batch, by_batch), (heads, by_head), (tokens, by_token)];
        while steps.iter().any(|&(count, step)| count > 1 && step % width != 0) {
            width /= 2;
        }
    }
    width
}

pub(crate) fn strides(view: TensorView<'_, 4>) -> kernels::StridesLaunch {
    let [batch, head, token, _] = view.strides().map(|stride| stride as u32);
    kernels::StridesLaunch::new(batch, head, token)
}
