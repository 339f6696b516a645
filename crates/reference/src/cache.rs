use std::{collections::HashSet, rc::Rc};

use bifocal_core::Reach;
use num_traits::Float;

use crate::{Array, Options, Partial, attention_where};

/// The key and the value of one token, of every kv head: `[Hk, D]` and `[Hk, Dv]`.
#[derive(Clone, Debug)]
struct Token<F> {
    key: Vec<F>,
    value: Vec<F>,
}

/// A sequence: how many tokens it has, and the pages that hold them. A page may hold tokens beyond the sequence's own,
/// of another sequence that shares it.
#[derive(Clone, Debug)]
struct Sequence<F> {
    length: usize,
    pages: Vec<Rc<Vec<Token<F>>>>,
}

/// A cache of keys and values as plainly as can be said: pages are shared by counting references, and written to by who
/// owns them alone (vLLM's paged attention, arXiv 2309.06180, sections 4.1 and 4.4).
///
/// The caches of `bifocal-decode` are compared with this, contents and number of pages alike. A contiguous cache is one whose
/// pages hold a whole sequence.
///
/// ```
/// use bifocal_reference::{Array, KvModel};
///
/// let token = |x| Array::filled([1, 1, 2], x);
/// let mut model = KvModel::new([1, 2, 2], 4);
/// let first = model.start();
/// model.append(first, &token(1.0), &token(1.0));
/// let second = model.fork(first);
/// assert_eq!(model.pages(), 1);
/// model.append(second, &token(2.0), &token(2.0));
/// assert_eq!((model.length(first), model.length(second), model.pages()), (1, 2, 2));
/// ```
#[derive(Clone, Debug)]
pub struct KvModel<F> {
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    page_size: usize,
    sequences: Vec<Option<Sequence<F>>>,
}

impl<F: Float> KvModel<F> {
    /// A cache without sequences, for `[kv heads, head dim, value dim]`, in pages of `page_size` tokens.
    ///
    /// # Panics
    /// For pages of no token.
    pub fn new([kv_heads, head_dim, value_dim]: [usize; 3], page_size: usize) -> Self {
        assert!(page_size > 0, "a page holds at least one token");
        Self { kv_heads, head_dim, value_dim, page_size, sequences: Vec::new() }
    }

    /// Starts a sequence without tokens and returns its number.
    pub fn start(&mut self) -> usize {
        self.sequences.push(Some(Sequence { length: 0, pages: Vec::new() }));
        self.sequences.len() - 1
    }

    /// Appends tokens: key `[Hk, T, D]`, value `[Hk, T, Dv]`.
    ///
    /// # Panics
    /// When the sequence is not there, or shapes do not fit.
    pub fn append(&mut self, sequence: usize, key: &Array<F, 3>, value: &Array<F, 3>) {
        let [kv_heads, tokens, _] = key.shape();
        assert_eq!(key.shape(), [self.kv_heads, tokens, self.head_dim], "keys of another shape");
        assert_eq!(value.shape(), [self.kv_heads, tokens, self.value_dim], "values of another shape");
        let page_size = self.page_size;
        let sequence = self.sequences[sequence].as_mut().expect("a sequence that is there");
        for t in 0..tokens {
            let heads =
                |array: &Array<F, 3>| (0..kv_heads).flat_map(|h| array.row([h, t]).to_vec()).collect();
            if sequence.length.is_multiple_of(page_size) {
                sequence.pages.push(Rc::new(Vec::new()));
            }
            let page = Rc::make_mut(sequence.pages.last_mut().expect("the page that was pushed"));
            page.truncate(sequence.length % page_size);
            page.push(Token { key: heads(key), value: heads(value) });
            sequence.length += 1;
        }
    }

    /// Takes back all tokens but the first `length`.
    ///
    /// # Panics
    /// When the sequence is not there, or shorter.
    pub fn truncate(&mut self, sequence: usize, length: usize) {
        let pages = length.div_ceil(self.page_size);
        let sequence = self.sequences[sequence].as_mut().expect("a sequence that is there");
        assert!(length <= sequence.length, "a sequence cannot be truncated to more than it has");
        sequence.length = length;
        sequence.pages.truncate(pages);
    }

    /// Starts a sequence with the tokens of another, whose pages it shares, and returns its number.
    ///
    /// # Panics
    /// When the other is not there.
    pub fn fork(&mut self, sequence: usize) -> usize {
        let copy = self.sequences[sequence].clone();
        self.sequences.push(Some(copy.expect("a sequence that is there")));
        self.sequences.len() - 1
    }

    /// Ends a sequence.
    ///
    /// # Panics
    /// When it is not there.
    pub fn free(&mut self, sequence: usize) {
        self.sequences[sequence].take().expect("a sequence that is there");
    }

    /// How many tokens a sequence has.
    ///
    /// # Panics
    /// When it is not there.
    pub fn length(&self, sequence: usize) -> usize {
        self.sequences[sequence].as_ref().expect("a sequence that is there").length
    }

    /// How many pages all sequences hold together.
    pub fn pages(&self) -> usize {
        let pages = self.sequences.iter().flatten().flat_map(|sequence| &sequence.pages);
        pages.map(Rc::as_ptr).collect::<HashSet<_>>().len()
    }

    /// The tokens of a sequence: key `[1, Hk, T, D]` and value `[1, Hk, T, Dv]`.
    ///
    /// # Panics
    /// When it is not there.
    pub fn contents(&self, sequence: usize) -> [Array<F, 4>; 2] {
        let sequence = self.sequences[sequence].as_ref().expect("a sequence that is there");
        let (pages, length) = (&sequence.pages, sequence.length);
        let token = |t: usize| &pages[t / self.page_size][t % self.page_size];
        let (head_dim, value_dim) = (self.head_dim, self.value_dim);
        let key = |[_, h, t, d]: [usize; 4]| token(t).key[h * head_dim + d];
        let value = |[_, h, t, d]: [usize; 4]| token(t).value[h * value_dim + d];
        [
            Array::from_fn([1, self.kv_heads, length, head_dim], key),
            Array::from_fn([1, self.kv_heads, length, value_dim], value),
        ]
    }

    /// A decode step: the queries `[B, H, Tq, D]` are the last tokens of their sequences, whose keys are in the cache
    /// already. Each row has a reach of its own, as in [`attention_where`].
    ///
    /// # Panics
    /// As [`attention_where`]; when a sequence is not there, or the batch is another.
    pub fn attend(
        &self,
        sequences: &[usize],
        q: &Array<F, 4>,
        options: &Options<F>,
        reach_of: impl Fn(usize, usize, usize) -> Option<Reach>,
    ) -> Partial<F> {
        let [batch, heads, query_len, head_dim] = q.shape();
        assert_eq!(batch, sequences.len(), "one query per sequence");
        let mut partial = Partial::empty([batch, heads, query_len, self.value_dim]);
        for (b, &sequence) in sequences.iter().enumerate() {
            let query = Array::new([1, heads, query_len, head_dim], q.row([b]).to_vec());
            let [key, value] = self.contents(sequence);
            let one = attention_where(&query, &key, &value, options, |_, h, t| reach_of(b, h, t));
            partial.out.row_mut([b]).copy_from_slice(one.out.as_slice());
            partial.lse.row_mut([b]).copy_from_slice(one.lse.as_slice());
        }
        partial
    }
}

#[cfg(test)]
mod tests {
    use bifocal_core::Window;
    use proptest::prelude::*;

    use super::*;
    use crate::{attention, samples::noise};

    fn tokens(count: usize, seed: u64) -> [Array<f64, 3>; 2] {
        [noise([2, count, 3], seed), noise([2, count, 2], seed ^ 1)]
    }

    #[test]
    fn pages_are_shared_until_one_of_the_sequences_writes() {
        let mut model = KvModel::new([2, 3, 2], 4);
        let first = model.start();
        let [key, value] = tokens(6, 0);
        model.append(first, &key, &value);
        let second = model.fork(first);
        assert_eq!(model.pages(), 2);
        let before = model.contents(first);
        let [key, value] = tokens(1, 7);
        model.append(second, &key, &value);
        // The whole page stays shared, the one that was written to is there twice.
        assert_eq!(model.pages(), 3);
        assert_eq!(model.contents(first), before);
        model.free(first);
        assert_eq!(model.pages(), 2);
        model.truncate(second, 0);
        assert_eq!((model.pages(), model.length(second)), (0, 0));
    }

    #[test]
    fn tokens_that_were_taken_back_do_not_come_again() {
        let mut model = KvModel::new([2, 3, 2], 4);
        let [key, value] = tokens(4, 1);
        let sequence = model.start();
        model.append(sequence, &key, &value);
        model.truncate(sequence, 3);
        let [key, value] = tokens(1, 2);
        model.append(sequence, &key, &value);
        let [found, _] = model.contents(sequence);
        assert_eq!(found.row([0, 1, 3]), key.row([1, 0]));
    }

    proptest! {
        #[test]
        fn a_step_is_the_end_of_attention_at_once(
            lengths in prop::collection::vec(1_usize..12, 1..4),
            page_size in 1_usize..6,
            query_len in 1_usize..4,
            window in 1_usize..9,
            seed in any::<u64>(),
        ) {
            let mut model = KvModel::new([2, 3, 2], page_size);
            let q = noise([lengths.len(), 4, query_len, 3], seed);
            let mut sequences = Vec::new();
            for (b, &length) in lengths.iter().enumerate() {
                let [key, value] = tokens(length, seed ^ b as u64);
                sequences.push(model.start());
                // In two chunks.
                let part = |array: &Array<f64, 3>, from: usize, to: usize| {
                    let [heads, _, dim] = array.shape();
                    Array::from_fn([heads, to - from, dim], |[h, t, d]| array[[h, from + t, d]])
                };
                for (from, to) in [(0, length / 2), (length / 2, length)] {
                    model.append(b, &part(&key, from, to), &part(&value, from, to));
                }
            }
            let reaches = [Reach::All, Reach::Window(Window::new(window).unwrap())];
            let options = Options::new(3);
            let found = model.attend(&sequences, &q, &options, |b, h, _| Some(reaches[(b + h) % 2]));
            for (b, &length) in lengths.iter().enumerate() {
                let [key, value] = tokens(length, seed ^ b as u64);
                let key = key.reshape([1, 2, length, 3]);
                let value = value.reshape([1, 2, length, 2]);
                let query = Array::new([1, 4, query_len, 3], q.row([b]).to_vec());
                for h in 0..4 {
                    let whole = attention(&query, &key, &value, reaches[(b + h) % 2], &options);
                    prop_assert_eq!(found.out.row([b, h]), whole.out.row([0, h]));
                    prop_assert_eq!(found.lse.row([b, h]), whole.lse.row([0, h]));
                }
            }
        }
    }
}
