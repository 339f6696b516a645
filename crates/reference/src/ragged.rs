use core::ops::Range;

use bifocal_core::Reach;
use num_traits::Float;

use crate::{Array, Options, Partial, array::indices, attention_where};

/// Sequences of different lengths, packed one after the other into a batch of 1: each is cut out, run on its own and
/// put back (FlashAttention's varlen interface).
///
/// Sequence `s` has the queries `queries[s]..queries[s + 1]` and the keys `keys[s]..keys[s + 1]`. `reach_of` takes the
/// query head and the token, counted over all sequences.
///
/// # Panics
/// As [`attention_where`](crate::attention_where); when lengths do not ascend, or do not end with the tokens there are.
pub fn ragged_attention_where<F: Float>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    v: &Array<F, 4>,
    (queries, keys): (&[usize], &[usize]),
    options: &Options<F>,
    reach_of: impl Fn(usize, usize) -> Option<Reach>,
) -> Partial<F> {
    let [batch, heads, query_len, _] = q.shape();
    let [_, _, key_len, value_dim] = v.shape();
    assert_eq!(batch, 1, "packed sequences are a batch of 1");
    assert_eq!(queries.last(), Some(&query_len), "query lengths end with the query tokens");
    assert_eq!(keys.last(), Some(&key_len), "key lengths end with the key tokens");

    let mut packed = Partial::empty([1, heads, query_len, value_dim]);
    for (query, key) in queries.windows(2).zip(keys.windows(2)) {
        let (query, key) = (query[0]..query[1], key[0]..key[1]);
        let start = query.start;
        let (q, k, v) = (tokens(q, query), tokens(k, key.clone()), tokens(v, key));
        let alone = attention_where(&q, &k, &v, options, |_, h, t| reach_of(h, start + t));
        for [b, h, t] in indices(alone.lse.shape()) {
            packed.out.row_mut([b, h, start + t]).copy_from_slice(alone.out.row([b, h, t]));
            packed.lse[[b, h, start + t]] = alone.lse[[b, h, t]];
        }
    }
    packed
}

/// Some tokens of `[B, H, T, D]`.
pub(crate) fn tokens<F: Clone>(x: &Array<F, 4>, range: Range<usize>) -> Array<F, 4> {
    let [batch, heads, _, dim] = x.shape();
    Array::from_fn([batch, heads, range.len(), dim], |[b, h, t, d]| x[[b, h, range.start + t, d]].clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::noise;

    #[test]
    fn sequences_do_not_see_each_other() {
        let noise = |heads, tokens, seed| noise([1, heads, tokens, 2], seed);
        let (q, k, v) = (noise(2, 5, 0), noise(1, 6, 1), noise(1, 6, 2));
        let options = Options::new(2);
        // Two queries of four keys, three queries without any, and two keys without a query.
        let lengths: (&[usize], &[usize]) = (&[0, 2, 5, 5], &[0, 4, 4, 6]);
        let packed = ragged_attention_where(&q, &k, &v, lengths, &options, |_, _| Some(Reach::All));
        let first =
            crate::attention(&tokens(&q, 0..2), &tokens(&k, 0..4), &tokens(&v, 0..4), Reach::All, &options);
        for h in 0..2 {
            for t in 0..2 {
                assert_eq!(packed.out.row([0, h, t]), first.out.row([0, h, t]));
            }
            for t in 2..5 {
                assert_eq!(packed.out.row([0, h, t]), [0.0; 2]);
                assert_eq!(packed.lse[[0, h, t]], f64::NEG_INFINITY);
            }
        }
        // One sequence is plain attention.
        let whole = ragged_attention_where(&q, &k, &v, (&[0, 5], &[0, 6]), &options, |h, t| {
            (h + t != 1).then_some(Reach::NonCausal)
        });
        let expected =
            attention_where(&q, &k, &v, &options, |_, h, t| (h + t != 1).then_some(Reach::NonCausal));
        assert_eq!(whole, expected);
    }
}
