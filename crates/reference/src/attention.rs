use bifocal_core::Reach;
use num_traits::Float;

use crate::{
    Array,
    array::{add_scaled, dot, indices, number, sum},
};

/// What is done to the scores besides masking.
#[derive(Clone, Debug)]
pub struct Options<F> {
    /// Factor on `q . k`; 1/sqrt(D) unless set ("Attention Is All You Need", arXiv 1706.03762, section
    /// 3.2.1).
    pub scale: F,
    /// Scores become `cap * tanh(score / cap)` after scaling (Gemma 2, arXiv 2408.00118, section 2).
    pub softcap: Option<F>,
    /// A learnt logit per query head `[H]` that joins the softmax denominator with a value of 0 (gpt-oss,
    /// arXiv 2508.10925); the log-sum-exp includes it. Merged partials would count it twice:
    /// give it to one of them.
    pub sink_logits: Option<Vec<F>>,
    /// What happens to a weight `exp(score - max)` before it meets its value: nothing, unless a plain computation in
    /// lower precision is asked for, where the product with values takes weights rounded to the inputs' type. The
    /// backward pass does the same with weights before they meet a row of `d_out`, and with the gradients of scores
    /// before they meet queries and keys.
    pub round_weight: fn(F) -> F,
}

impl<F: Float> Options<F> {
    /// Scale 1/sqrt(`head_dim`), no softcap, no sink logits.
    pub fn new(head_dim: usize) -> Self {
        Self {
            scale: number::<F>(head_dim as f64).sqrt().recip(),
            softcap: None,
            sink_logits: None,
            round_weight: |weight| weight,
        }
    }

    /// The score of a query and a key, after scale and softcap.
    pub(crate) fn score(&self, query: &[F], key: &[F]) -> F {
        let scaled = self.scale * dot(query, key);
        self.softcap.map_or(scaled, |cap| cap * (scaled / cap).tanh())
    }
}

/// What one branch gives: outputs and the log-sum-exp of the scores behind them.
///
/// A row without a visible key is `out = 0`, `lse = -inf`, exactly; [`merge`](crate::merge) treats it as the
/// identity.
#[derive(Clone, Debug, PartialEq)]
pub struct Partial<F> {
    /// `[B, H, Tq, Dv]`.
    pub out: Array<F, 4>,
    /// `[B, H, Tq]`, natural logarithm.
    pub lse: Array<F, 3>,
}

impl<F: Float> Partial<F> {
    /// No row has seen a key yet: `out` is 0 and `lse` is -inf. The shape is `[B, H, Tq, Dv]`.
    pub fn empty(shape: [usize; 4]) -> Self {
        let [batch, heads, query_len, _] = shape;
        Self {
            out: Array::filled(shape, F::zero()),
            lse: Array::filled([batch, heads, query_len], F::neg_infinity()),
        }
    }
}

/// Softmax attention of every query over the keys that `reach` lets it see (arXiv 1706.03762, section 3.2.1).
///
/// `q` is `[B, H, Tq, D]`, `k` `[B, Hk, Tk, D]`, `v` `[B, Hk, Tk, Dv]`. Query head `h` reads kv head
/// `h / (H / Hk)` (grouped queries, arXiv 2305.13245). Query `t` has position `t + Tk - Tq`; a causal reach shows a
/// negative position nothing. A NaN in a key or a value reaches exactly the rows that see it.
///
/// # Panics
/// When shapes do not fit each other or H is not a multiple of Hk.
pub fn attention<F: Float>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    v: &Array<F, 4>,
    reach: Reach,
    options: &Options<F>,
) -> Partial<F> {
    attention_where(q, k, v, options, |_, _, _| Some(reach))
}

/// [`attention`] where each row has a reach of its own, `reach_of(batch, query head, token)`; a row of `None`
/// is not computed and stays `out = 0`, `lse = -inf`. The routed operators are compared with this.
///
/// # Panics
/// As [`attention`].
pub fn attention_where<F: Float>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    v: &Array<F, 4>,
    options: &Options<F>,
    reach_of: impl Fn(usize, usize, usize) -> Option<Reach>,
) -> Partial<F> {
    let group = check(q, k, v, options);
    let [batch, heads, query_len, _] = q.shape();
    let [_, _, key_len, value_dim] = v.shape();

    let mut partial = Partial::empty([batch, heads, query_len, value_dim]);
    for [b, h, t] in indices([batch, heads, query_len]) {
        let Some(reach) = reach_of(b, h, t) else { continue };
        let kv_head = h / group;
        let seen: Vec<usize> = seen(reach, t, query_len, key_len).collect();
        // exp(-inf) = 0: no sink.
        let sink = options.sink_logits.as_ref().map_or(F::neg_infinity(), |sinks| sinks[h]);
        if seen.is_empty() && sink == F::neg_infinity() {
            continue;
        }

        let score = |&j: &usize| options.score(q.row([b, h, t]), k.row([b, kv_head, j]));
        let scores: Vec<F> = seen.iter().map(score).collect();
        // `max` passes over NaN; the exponentials below do not.
        let max = scores.iter().copied().fold(sink, F::max);
        let weights: Vec<F> = scores.iter().map(|&score| (score - max).exp()).collect();
        let total = (sink - max).exp() + sum(weights.iter().copied());

        let out = partial.out.row_mut([b, h, t]);
        for (&j, &weight) in seen.iter().zip(&weights) {
            let share = (options.round_weight)(weight) / total;
            add_scaled(out, share, v.row([b, kv_head, j]));
        }
        partial.lse[[b, h, t]] = max + total.ln();
    }
    partial
}

/// Query heads per kv head, once all shapes fit each other.
pub(crate) fn check<F: Float>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    v: &Array<F, 4>,
    options: &Options<F>,
) -> usize {
    let [batch, heads, _, head_dim] = q.shape();
    let [_, kv_heads, key_len, _] = v.shape();
    assert_eq!(k.shape(), [batch, kv_heads, key_len, head_dim], "key does not fit query and value");
    assert_eq!(v.shape()[0], batch, "value has another batch than query");
    assert!(heads.is_multiple_of(kv_heads), "{heads} query heads cannot share {kv_heads} kv heads");
    if let Some(sinks) = &options.sink_logits {
        assert_eq!(sinks.len(), heads, "one sink logit per query head");
    }
    heads / kv_heads
}

/// The keys that query `t` of `query_len` sees, ascending; the last query is aligned with the last key.
pub(crate) fn seen(reach: Reach, t: usize, query_len: usize, key_len: usize) -> impl Iterator<Item = usize> {
    let position = t as i64 + key_len as i64 - query_len as i64;
    (0..key_len).filter(move |&j| reach.sees(position, j as i64))
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;
    use bifocal_core::Window;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        ragged::tokens,
        samples::{assert_close, case, noise},
    };

    fn tiny() -> [Array<f64, 4>; 3] {
        let column = |data: [f64; 2]| Array::new([1, 1, 2, 1], data.to_vec());
        [column([1.0, 1.0]), column([0.0, 3.0_f64.ln()]), column([10.0, 20.0])]
    }

    fn causal_reaches(window: usize, sinks: u32) -> [Reach; 4] {
        let window = Window::new(window).unwrap();
        let near = Reach::SinksAndWindow { sinks, window };
        [Reach::Window(window), near, Reach::Far { sinks, window }, Reach::All]
    }

    #[test]
    fn two_tokens_by_hand() {
        // exp(scores) are 1 and 3: token 0 sees 10 alone, token 1 sees (1 * 10 + 3 * 20) / 4.
        let [q, k, v] = tiny();
        let partial = attention(&q, &k, &v, Reach::All, &Options::new(1));
        assert_abs_diff_eq!(partial.out.as_slice(), [10.0, 17.5].as_slice(), epsilon = 1e-14);
        assert_abs_diff_eq!(
            partial.lse.as_slice(),
            [0.0, 1.386_294_361_119_890_6].as_slice(),
            epsilon = 1e-14
        );
    }

    #[test]
    fn a_sink_logit_joins_the_denominator_by_hand() {
        // exp(sink) = 4: token 0 is 1 * 10 / (1 + 4), token 1 is 70 / (4 + 4).
        let [q, k, v] = tiny();
        let options = Options { sink_logits: Some(vec![4.0_f64.ln()]), ..Options::new(1) };
        let partial = attention(&q, &k, &v, Reach::All, &options);
        assert_abs_diff_eq!(partial.out.as_slice(), [2.0, 8.75].as_slice(), epsilon = 1e-14);
        let lse = [1.609_437_912_434_100_3, 2.079_441_541_679_836];
        assert_abs_diff_eq!(partial.lse.as_slice(), lse.as_slice(), epsilon = 1e-14);
    }

    #[test]
    fn softcap_squashes_the_scaled_score_by_hand() {
        // 2 * ln 3 after scaling, squashed to 0.5 * tanh(4 ln 3) = 0.5 * (1 - 2 / (3^8 + 1)).
        let [q, k, v] = tiny();
        let options = Options { scale: 2.0, softcap: Some(0.5), ..Options::new(1) };
        let partial = attention(&q, &k, &v, Reach::All, &options);
        let weight = (0.5 * (1.0 - 2.0 / 6562.0_f64)).exp();
        assert_abs_diff_eq!(partial.lse[[0, 0, 1]], (1.0 + weight).ln(), epsilon = 1e-14);
        assert_abs_diff_eq!(
            partial.out[[0, 0, 1, 0]],
            (10.0 + 20.0 * weight) / (1.0 + weight),
            epsilon = 1e-13
        );
    }

    #[test]
    fn rows_without_a_key_are_zero_and_minus_infinity() {
        // Three queries, one key: only the last query is at position 0.
        let (q, k, v) = (noise([1, 1, 3, 2], 0), noise([1, 1, 1, 2], 1), noise([1, 1, 1, 2], 2));
        let partial = attention(&q, &k, &v, Reach::All, &Options::new(2));
        assert_eq!(partial.out.row([0, 0]), [&[0.0; 4], v.row([0, 0, 0])].concat());
        assert_eq!(&partial.lse.as_slice()[..2], &[f64::NEG_INFINITY; 2]);
        assert!(partial.lse[[0, 0, 2]].is_finite());

        let options = Options { sink_logits: Some(vec![0.7]), ..Options::new(2) };
        let sunk = attention(&q, &k, &v, Reach::All, &options);
        assert_eq!(&sunk.out.as_slice()[..4], &[0.0; 4]);
        assert_eq!(&sunk.lse.as_slice()[..2], &[0.7; 2]);

        let options = Options { sink_logits: Some(vec![f64::NEG_INFINITY]), ..Options::new(2) };
        assert_eq!(attention(&q, &k, &v, Reach::All, &options), partial);
    }

    #[test]
    fn without_causality_every_query_sees_every_key() {
        // Fewer keys than queries and more; equal scores give the mean of all values.
        for (query_len, key_len) in [(3, 2), (1, 4)] {
            let q = Array::filled([1, 1, query_len, 2], 0.0);
            let (k, v) = (noise([1, 1, key_len, 2], 1), noise([1, 1, key_len, 1], 2));
            let partial = attention(&q, &k, &v, Reach::NonCausal, &Options::new(2));
            let mean = v.as_slice().iter().sum::<f64>() / key_len as f64;
            assert_abs_diff_eq!(partial.out.as_slice(), vec![mean; query_len].as_slice(), epsilon = 1e-14);
            let lse = vec![(key_len as f64).ln(); query_len];
            assert_abs_diff_eq!(partial.lse.as_slice(), lse.as_slice(), epsilon = 1e-14);
        }
    }

    #[test]
    fn rows_that_are_not_asked_for_are_not_computed() {
        let (q, k, v) = (noise([1, 2, 4, 2], 0), noise([1, 1, 4, 2], 1), noise([1, 1, 4, 2], 2));
        let options = Options::new(2);
        let all = attention(&q, &k, &v, Reach::All, &options);
        let odd = attention_where(&q, &k, &v, &options, |_, h, t| ((h + t) % 2 == 1).then_some(Reach::All));
        for [b, h, t] in indices([1, 2, 4]) {
            let computed = (h + t) % 2 == 1;
            let expected = if computed { all.out.row([b, h, t]) } else { &[0.0; 2] };
            assert_eq!(odd.out.row([b, h, t]), expected);
            assert_eq!(odd.lse[[b, h, t]], if computed { all.lse[[b, h, t]] } else { f64::NEG_INFINITY });
        }
    }

    #[test]
    fn huge_scores_stay_finite() {
        let (q, k, v) = (noise([1, 1, 8, 4], 0), noise([1, 1, 8, 4], 1), noise([1, 1, 8, 4], 2));
        let options = Options { scale: 1e4, ..Options::new(4) };
        let partial = attention(&q, &k, &v, Reach::All, &options);
        assert!(partial.out.as_slice().iter().all(|x| x.is_finite() && x.abs() <= 1.0));
        assert!(partial.lse.as_slice().iter().all(|x| x.is_finite()));
        assert!(partial.lse.as_slice().iter().any(|x| x.abs() > 1e3));
    }

    #[test]
    #[should_panic(expected = "3 query heads cannot share 2 kv heads")]
    fn heads_that_do_not_divide_are_named() {
        let (q, k) = (noise([1, 3, 4, 2], 0), noise([1, 2, 4, 2], 1));
        attention(&q, &k, &k, Reach::All, &Options::new(2));
    }

    proptest! {
        #[test]
        fn a_window_of_the_whole_sequence_is_full_attention(c in case(), extra in 0_usize..3) {
            let window = Reach::Window(Window::new(c.tokens + extra).unwrap());
            prop_assert_eq!(c.attention(window), c.attention(Reach::All));
        }

        #[test]
        fn kv_heads_repeated_are_grouped_queries(c in case()) {
            let repeat = |x: &Array<f64, 4>| {
                let [batch, _, len, dim] = x.shape();
                Array::from_fn([batch, c.heads, len, dim], |[b, h, t, d]| {
                    x[[b, h / (c.heads / c.kv_heads), t, d]]
                })
            };
            let repeated = attention(&c.q, &repeat(&c.k), &repeat(&c.v), Reach::All, &c.options());
            prop_assert_eq!(repeated, c.attention(Reach::All));
        }

        #[test]
        fn queries_in_chunks_are_queries_at_once(c in case(), chunk in 1_usize..6) {
            for reach in causal_reaches(c.window, c.sinks) {
                let whole = c.attention(reach);
                for start in (0..c.tokens).step_by(chunk) {
                    let end = (start + chunk).min(c.tokens);
                    let (q, k, v) = (tokens(&c.q, start..end), tokens(&c.k, 0..end), tokens(&c.v, 0..end));
                    let part = attention(&q, &k, &v, reach, &c.options());
                    for [b, h, t] in indices(part.lse.shape()) {
                        prop_assert_eq!(part.lse[[b, h, t]], whole.lse[[b, h, start + t]]);
                    }
                    prop_assert_eq!(part.out, tokens(&whole.out, start..end));
                }
            }
        }

        #[test]
        fn a_nan_key_or_value_reaches_exactly_the_rows_that_see_it(c in case(), at in 0_usize..12) {
            let at = at % c.tokens;
            let spoil = |x: &Array<f64, 4>| {
                Array::from_fn(x.shape(), |i| if i[2] == at { f64::NAN } else { x[i] })
            };
            for reach in causal_reaches(c.window, c.sinks).into_iter().chain([Reach::NonCausal]) {
                let clean = c.attention(reach);
                let key = attention(&c.q, &spoil(&c.k), &c.v, reach, &c.options());
                let value = attention(&c.q, &c.k, &spoil(&c.v), reach, &c.options());
                prop_assert_eq!(&value.lse, &clean.lse);
                for [b, h, t] in indices(clean.lse.shape()) {
                    let row = [b, h, t];
                    if reach.sees(t as i64, at as i64) {
                        prop_assert!(key.lse[row].is_nan());
                        prop_assert!(key.out.row(row).iter().all(|x| x.is_nan()));
                        prop_assert!(value.out.row(row).iter().all(|x| x.is_nan()));
                    } else {
                        prop_assert_eq!(key.lse[row], clean.lse[row]);
                        prop_assert_eq!(key.out.row(row), clean.out.row(row));
                        prop_assert_eq!(value.out.row(row), clean.out.row(row));
                    }
                }
            }
        }

        #[test]
        fn future_keys_and_values_never_matter(c in case(), cut in 1_usize..12) {
            let cut = cut.min(c.tokens);
            let blind = |x: &Array<f64, 4>| {
                Array::from_fn(x.shape(), |i| if i[2] >= cut { f64::NAN } else { x[i] })
            };
            for reach in causal_reaches(c.window, c.sinks) {
                let partial = attention(&c.q, &blind(&c.k), &blind(&c.v), reach, &c.options());
                prop_assert_eq!(tokens(&partial.out, 0..cut), tokens(&c.attention(reach).out, 0..cut));
            }
        }

        #[test]
        fn a_softcap_far_above_the_scores_changes_nothing(c in case()) {
            let capped = Options { softcap: Some(1e9), ..c.options() };
            assert_close(&attention(&c.q, &c.k, &c.v, Reach::All, &capped), &c.attention(Reach::All));
        }
    }
}
