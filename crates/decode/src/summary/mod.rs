mod kernels;
mod snapshot;

use core::ops::Range;

use bifocal_core::{
    Element, Error, Problem, Result,
    device::{
        SPAN, Summaries, Summary, Tensor,
        launch::{elements, grid, words},
    },
};
use cubecl::{client::Client, server::Handle};

use self::kernels::{copy_kernel, lacking_kernel, span_kernel};
pub use self::snapshot::SummarySnapshot;
use crate::{
    Batch, KvCache, KvShape, Layout, NewTokens, SequenceId,
    cache::{kernels::edit_kernel, strides, width},
};

/// Most keys that are copied to be summed up at once.
const AT_ONCE: usize = 1 << 14;

/// Most slack: a step reads up to twice as many keys one by one.
const MOST_SLACK: usize = 1 << 12;

/// A [`KvCache`] whose sequences have, besides, a [`Summary`] of the keys that left a window: RATTENTION's state, or the
/// moments of keys that QAdA decides by. It is forked, truncated, freed, saved and restored with its sequence.
///
/// What was added to a sum cannot be taken out again exactly. So a summary lags: it has the keys before the position
/// [`covered`](Self::covered), and those between it and the window stay in the pages, where a decode step reads them one by
/// one ([`summaries`](Self::summaries)). Once more than twice the slack have left, all but the last `slack` of them are
/// summed up.
///
/// ```text
///            covered              length - window        length
///  [ summary |  slack to twice that  |       window         ]
///            truncate goes back until the window's begin is here
/// ```
///
/// A sequence can so be truncated by its last `slack` tokens at any time, as a draft model's guesses are. Further back its
/// keys are summed up anew if they are all there still; in a ring they are not, and that is an error.
#[derive(Debug)]
pub struct SummaryCache<S> {
    kv: KvCache,
    summary: S,
    window: usize,
    /// Tokens before the first that is summed up.
    first: usize,
    slack: usize,
    /// By slot: the summary has the keys `first..covered`.
    covered: Vec<usize>,
    /// `u32 [sequences]`: the same on the device.
    covered_there: Handle,
    /// `f32 [sequences, numbers]` each.
    parts: Vec<Tensor<2>>,
}

/// A summary that is to become a slot's.
struct Fold {
    slot: usize,
    covered: usize,
    parts: Vec<Tensor<1>>,
}

impl<S: Summary> SummaryCache<S> {
    /// An empty cache whose sequences can always be truncated by their last `slack` tokens. A ring has to hold twice as many
    /// beyond the window.
    ///
    /// # Errors
    /// As [`KvCache::new`] and [`Summary::parts`]; [`Error::Option`] for a slack of 0 or above 4,096, and for a ring that holds less than that,
    /// or that has sinks, which a summary leaves out by itself; [`Error::TooLarge`].
    pub fn new(client: &Client, summary: S, shape: KvShape, layout: Layout, slack: usize) -> Result<Self> {
        let (window, first) = summary.outside();
        let window = window.keys() as usize;
        if !(1..=MOST_SLACK).contains(&slack) {
            return Err(Error::option("slack of a summary", slack, format!("1 to {MOST_SLACK} tokens")));
        }
        if layout.ring_pages > 0 {
            if layout.fixed_pages > 0 {
                return Err(Error::option(
                    "layout of a summary",
                    "a ring with sinks",
                    "a ring without, or no ring",
                ));
            }
            let held = layout.ring_tokens();
            if held < window.saturating_add(2 * slack) {
                let expected = format!("at most half of what the ring's {held} tokens are beyond {window}");
                return Err(Error::option("slack of a summary", slack, expected));
            }
        }
        let kv = KvCache::new(client, shape, layout)?;
        let parts = summary.parts(client, &problem_of(shape)?)?;
        let sequences = layout.sequences();
        let parts = parts.into_iter().map(|numbers| Tensor::zeros(client, [sequences, numbers]));
        Ok(Self {
            parts: parts.collect::<Result<_>>()?,
            covered: vec![first; sequences],
            covered_there: client.create_from_slice(bytemuck::cast_slice(&vec![first as u32; sequences])),
            kv,
            summary,
            window,
            first,
            slack,
        })
    }

    /// Holds a second key per token, which is the one that is summed up: RATTENTION's far branch has keys without rotary
    /// positions and norms. Each append brings it along ([`NewTokens::plain_key`]).
    ///
    /// # Errors
    /// [`Error::Option`] unless the cache is empty; [`Error::DeviceMismatch`].
    pub fn with_plain_keys(mut self, client: &Client) -> Result<Self> {
        self.kv.check_device(client)?;
        let sequences = self.kv.layout().sequences() - self.kv.free_sequences();
        if sequences > 0 {
            return Err(Error::option(
                "sequences of a cache that is to have plain keys",
                sequences,
                "none yet",
            ));
        }
        self.kv.plain_key = Some(Tensor::empty(client, self.kv.key.shape(), self.kv.shape().element));
        Ok(self)
    }

    /// Keys and values: what a decode step's batch and view are of.
    pub fn kv(&self) -> &KvCache {
        &self.kv
    }

    /// Bytes of device memory for keys, values and summaries, whether there are sequences or not.
    pub fn bytes(&self) -> usize {
        let numbers = |part: &Tensor<2>| part.shape().iter().product::<usize>();
        self.kv.bytes() + self.parts.iter().map(numbers).sum::<usize>() * Element::F32.size()
    }

    /// What keys are summed up by.
    pub fn summary(&self) -> &S {
        &self.summary
    }

    /// The first position of a sequence whose key is not summed up.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn covered(&self, sequence: SequenceId) -> Result<usize> {
        Ok(self.covered[self.kv.slot(sequence)?])
    }

    /// Starts a sequence without tokens.
    ///
    /// # Errors
    /// As [`KvCache::start`].
    pub fn start(&mut self, client: &Client) -> Result<SequenceId> {
        let parts = self.nothing(client)?;
        let sequence = self.kv.start(client)?;
        let slot = self.kv.slot(sequence)?;
        self.take(client, [Fold { slot, covered: self.first, parts }]);
        Ok(sequence)
    }

    /// Appends tokens to each of the sequences, as [`KvCache::append`], and sums up what has left the window for long.
    ///
    /// # Errors
    /// As [`KvCache::append`] and [`Summary::fold`]; [`Error::Option`] when plain keys are given and not asked for, or asked
    /// for and not given.
    pub fn append(&mut self, client: &Client, sequences: &[SequenceId], new: &NewTokens<'_>) -> Result<()> {
        let slots = self.kv.check_append(client, sequences, new)?;
        let tokens = new.key.shape()[2];
        let mut folds = Vec::new();
        for (row, &slot) in slots.iter().enumerate() {
            let (covered, end) = (self.covered[slot], self.left(self.kv.book.length(slot) + tokens));
            if end > covered + 2 * self.slack {
                let parts = self.parts_of(client, slot);
                folds.push(self.fold(client, slot, covered..end - self.slack, parts, Some((new, row)))?);
            }
        }
        self.kv.write(client, &slots, new)?;
        self.take(client, folds);
        Ok(())
    }

    /// Takes back all tokens of a sequence but the first `length`, as [`KvCache::truncate`].
    ///
    /// # Errors
    /// As [`KvCache::truncate`]; [`Error::SummedUp`] when keys would have to be taken out of a summary and a ring does not
    /// have all of them any more.
    pub fn truncate(&mut self, client: &Client, sequence: SequenceId, length: usize) -> Result<()> {
        self.check_truncate(client, sequence, length)?;
        let slot = self.kv.slot(sequence)?;
        let end = self.left(length).max(self.first);
        let fold = if self.covered[slot] <= end {
            None
        } else {
            let to = end.saturating_sub(self.slack).max(self.first);
            Some(self.fold(client, slot, self.first..to, self.nothing(client)?, None)?)
        };
        self.kv.truncate(client, sequence, length)?;
        self.take(client, fold);
        Ok(())
    }

    /// Checks all that [`truncate`](Self::truncate) does, as [`KvCache::check_truncate`].
    ///
    /// # Errors
    /// As [`truncate`](Self::truncate).
    pub fn check_truncate(&self, client: &Client, sequence: SequenceId, length: usize) -> Result<()> {
        let slot = self.kv.slot(sequence)?;
        let (covered, needed) = (self.covered[slot], self.left(length).max(self.first));
        if covered > needed && length > 0 && self.kv.book.kept_from(slot) > 0 {
            return Err(Error::SummedUp { needed, covered });
        }
        self.kv.check_truncate(client, sequence, length)
    }

    /// Starts a sequence with the tokens of another, as [`KvCache::fork`], and with a summary of its own.
    ///
    /// # Errors
    /// As [`KvCache::fork`].
    pub fn fork(&mut self, client: &Client, sequence: SequenceId) -> Result<SequenceId> {
        let fork = self.kv.fork(client, sequence)?;
        let (from, slot) = (self.kv.slot(sequence)?, self.kv.slot(fork)?);
        let parts = self.parts_of(client, from);
        self.take(client, [Fold { slot, covered: self.covered[from], parts }]);
        Ok(fork)
    }

    /// Forks of these sequences in a cache of their own, as [`KvCache::fork_apart`].
    ///
    /// # Errors
    /// As [`KvCache::fork_apart`].
    pub fn fork_apart(&self, client: &Client, sequences: &[SequenceId]) -> Result<(Self, Vec<SequenceId>)>
    where
        S: Clone,
    {
        self.kv.check_device(client)?;
        let slots = self.kv.slots(sequences)?;
        let (summary, layout) = (self.summary.clone(), self.kv.layout());
        let mut apart = Self::new(client, summary, self.kv.shape(), layout, self.slack)?;
        if self.kv.plain_key.is_some() {
            apart = apart.with_plain_keys(client)?;
        }
        let mut forks = Vec::with_capacity(slots.len());
        for from in slots {
            let fork = apart.kv.take_over(client, &self.kv, from)?;
            let slot = apart.kv.slot(fork)?;
            let parts = self.parts_of(client, from);
            apart.take(client, [Fold { slot, covered: self.covered[from], parts }]);
            forks.push(fork);
        }
        Ok((apart, forks))
    }

    /// Ends a sequence, as [`KvCache::free`].
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn free(&mut self, sequence: SequenceId) -> Result<()> {
        self.kv.free(sequence)
    }

    /// What a decode step of `query_len` queries per sequence reads of the keys that left the window. Lengths and summaries
    /// are those that the device has when it gets there; nothing is read back.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::EmptyDimension`] when a sequence has no token; [`Error::SummedUp`] when the first
    /// of several queries still sees in its window what is summed up already; [`Error::DeviceMismatch`].
    pub fn summaries(&self, client: &Client, batch: &Batch, query_len: usize) -> Result<Summaries<'_>> {
        self.kv.check_device(client)?;
        let lengths = self.kv.view(batch)?.lengths;
        for (&sequence, length) in batch.sequences.iter().zip(lengths) {
            let (covered, end) = (self.covered(sequence)?, self.left(length + 1).saturating_sub(query_len));
            if covered > end.max(self.first) {
                return Err(Error::SummedUp { needed: end, covered });
            }
        }
        let batch_len = batch.sequences.len();
        let spans = client.empty(batch_len * SPAN * 4);
        let (cubes, units) = grid(client, batch_len);
        // SAFETY: the batch's slots are the cache's; each unit checks its number.
        unsafe {
            lacking_kernel::launch_unchecked(
                client,
                cubes,
                units,
                words(&self.kv.tables),
                words(&batch.slots),
                words(&self.covered_there),
                words(&spans),
                batch_len as u32,
                self.kv.layout().pitch() as u32,
                self.window as u32,
                self.first as u32,
            );
        }
        let key = self.summed_keys();
        let [key, value] = self.copy(client, key, &spans, [batch_len, 2 * self.slack], None);
        Ok(Summaries { parts: &self.parts, spans, key, value })
    }

    /// Keys that have left the window of a sequence of so many tokens, counted from position 0.
    fn left(&self, length: usize) -> usize {
        length.saturating_sub(self.window)
    }

    fn summed_keys(&self) -> &Tensor<4> {
        self.kv.plain_key.as_ref().unwrap_or(&self.kv.key)
    }

    /// The keys of a range summed up beside what `parts` have, the last of them in new tokens: a row of their batch.
    fn fold(
        &self,
        client: &Client,
        slot: usize,
        range: Range<usize>,
        mut parts: Vec<Tensor<1>>,
        new: Option<(&NewTokens<'_>, usize)>,
    ) -> Result<Fold> {
        for from in range.clone().step_by(AT_ONCE) {
            let keys = (range.end - from).min(AT_ONCE);
            let spans = span(client, slot, from, keys);
            let new = new.map(|(new, row)| (new, row, self.kv.book.length(slot)));
            let [key, value] = self.copy(client, self.summed_keys(), &spans, [1, keys], new);
            parts = self.summary.fold(client, from - self.first, &parts, key.view(), value.view())?;
        }
        Ok(Fold { slot, covered: range.end, parts })
    }

    /// Copies the keys (of one of the pools) and the values of spans: `[batch, Hk, room, ..]`. New tokens are a row of a batch,
    /// and follow so many that the pages have.
    fn copy(
        &self,
        client: &Client,
        pool: &Tensor<4>,
        spans: &Handle,
        [batch, room]: [usize; 2],
        new: Option<(&NewTokens<'_>, usize, usize)>,
    ) -> [Tensor<4>; 2] {
        let KvShape { kv_heads, head_dim, value_dim, element } = self.kv.shape();
        let room_for = |dim| Tensor::empty(client, [batch, kv_heads, room, dim], element);
        let copies = [room_for(head_dim), room_for(value_dim)];
        let pools = [pool.view(), self.kv.value.view()];
        let (new, row, length) = match new {
            Some((new, row, length)) => ([new.plain_key.unwrap_or(new.key), new.value], row, length),
            // Every position is in the pages.
            None => (pools, 0, u32::MAX as usize),
        };
        let width = width([new[0], new[1], pools[0], pools[1], copies[0].view(), copies[1].view()]);
        let (cubes, units) = grid(client, batch * kv_heads * room * head_dim.max(value_dim) / width);
        // SAFETY: new tokens were checked, pools have every page of the tables, and copies room for the spans.
        unsafe {
            span_kernel::launch_unchecked(
                client,
                cubes,
                units,
                elements(pools[0]),
                elements(pools[1]),
                elements(new[0]),
                elements(new[1]),
                words(&self.kv.tables),
                words(spans),
                elements(copies[0].view()),
                elements(copies[1].view()),
                self.kv.shape_launch([batch, room], width, true),
                length as u32,
                row as u32,
                strides(new[0]),
                strides(new[1]),
                self.kv.places(),
                width,
                element.into(),
                width,
            );
        }
        copies
    }

    /// A summary of no key.
    fn nothing(&self, client: &Client) -> Result<Vec<Tensor<1>>> {
        self.parts.iter().map(|part| Tensor::zeros(client, [part.shape()[1]])).collect()
    }

    /// A copy of a slot's summary.
    fn parts_of(&self, client: &Client, slot: usize) -> Vec<Tensor<1>> {
        let copy = |part: &Tensor<2>| {
            let numbers = part.shape()[1];
            let copy = Tensor::empty(client, [numbers], Element::F32);
            copy_numbers(client, (part.handle(), slot * numbers), (copy.handle(), 0), numbers);
            copy
        };
        self.parts.iter().map(copy).collect()
    }

    /// Makes summaries those of their slots.
    fn take(&mut self, client: &Client, folds: impl IntoIterator<Item = Fold>) {
        let mut edits: Vec<u32> = Vec::new();
        for Fold { slot, covered, parts } in folds {
            for (from, part) in parts.iter().zip(&self.parts) {
                let numbers = part.shape()[1];
                copy_numbers(client, (from.handle(), 0), (part.handle(), slot * numbers), numbers);
            }
            self.covered[slot] = covered;
            edits.extend([slot as u32, covered as u32]);
        }
        if edits.is_empty() {
            return;
        }
        let count = edits.len() / 2;
        let numbers = client.create_from_slice(bytemuck::cast_slice(&edits));
        let (cubes, units) = grid(client, count);
        // SAFETY: there is a word for every slot.
        unsafe {
            let (numbers, covered) = (words(&numbers), words(&self.covered_there));
            edit_kernel::launch_unchecked(client, cubes, units, numbers, covered, 0, count as u32);
        }
    }
}

/// One new token of a cache of this shape: what a summary has to know.
fn problem_of(KvShape { kv_heads, head_dim, value_dim, element }: KvShape) -> Result<Problem> {
    let key = [1, kv_heads, 1, head_dim];
    Problem::new(key, key, element)?.with_value_dim(value_dim)
}

/// A span of so many keys from a position on.
fn span(client: &Client, slot: usize, from: usize, keys: usize) -> Handle {
    let words: [u32; SPAN] = [slot as u32, 0, keys as u32, from as u32];
    client.create_from_slice(bytemuck::cast_slice(&words))
}

fn copy_numbers(client: &Client, from: (&Handle, usize), to: (&Handle, usize), count: usize) {
    let (cubes, units) = grid(client, count);
    // SAFETY: who calls has counted; each unit checks its number.
    unsafe {
        let (from_at, to_at) = (from.1 as u32, to.1 as u32);
        let (from, to) = (words(from.0), words(to.0));
        copy_kernel::launch_unchecked(client, cubes, units, from, to, from_at, to_at, count as u32);
    }
}
