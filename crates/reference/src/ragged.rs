use core::ops::Range;

use bifocal_core::Reach;
use num_traits::Float;

use crate::{
    Array, Gradients, LinearAttentionGradients, LinearOptions, LinearOutput, Options, Partial,
    array::{add_scaled, indices},
    attention_backward_where, attention_where, linear_attention, linear_attention_backward,
};

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
    let [_, heads, query_len, _] = q.shape();
    let value_dim = v.shape()[3];
    let mut packed = Partial::empty([1, heads, query_len, value_dim]);
    for (query, key) in sequences(q, k, (queries, keys)) {
        let start = query.start;
        let (q, k, v) = (tokens(q, query), tokens(k, key.clone()), tokens(v, key));
        let alone = attention_where(&q, &k, &v, options, |_, h, t| reach_of(h, start + t));
        put(&mut packed.out, &alone.out, start);
        for [b, h, t] in indices(alone.lse.shape()) {
            packed.lse[[b, h, start + t]] = alone.lse[[b, h, t]];
        }
    }
    packed
}

/// The backward pass of [`ragged_attention_where`]: as
/// [`attention_backward_where`](crate::attention_backward_where), each sequence on its own.
///
/// # Panics
/// As [`ragged_attention_where`].
pub fn ragged_attention_backward_where<F: Float>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    v: &Array<F, 4>,
    (queries, keys): (&[usize], &[usize]),
    options: &Options<F>,
    partial: &Partial<F>,
    d_out: &Array<F, 4>,
    reach_of: impl Fn(usize, usize) -> Option<Reach>,
) -> Gradients<F> {
    let [_, heads, query_len, _] = q.shape();
    let mut packed = Gradients::zeros(q, k, v);
    let lse = partial.lse.clone().reshape([1, heads, query_len, 1]);
    for (query, key) in sequences(q, k, (queries, keys)) {
        let alone = Partial {
            out: tokens(&partial.out, query.clone()),
            lse: tokens(&lse, query.clone()).reshape([1, heads, query.len()]),
        };
        let alone = attention_backward_where(
            &tokens(q, query.clone()),
            &tokens(k, key.clone()),
            &tokens(v, key.clone()),
            options,
            &alone,
            &tokens(d_out, query.clone()),
            |_, h, t| reach_of(h, query.start + t),
        );
        put(&mut packed.query, &alone.query, query.start);
        put(&mut packed.key, &alone.key, key.start);
        put(&mut packed.value, &alone.value, key.start);
        add_scaled(&mut packed.sink_logits, F::one(), &alone.sink_logits);
    }
    packed
}

/// [`linear_attention`](crate::linear_attention) of packed sequences, each on its own with a state of its own: states are
/// `[sequences, Hk, features, Dv]`.
///
/// # Panics
/// As [`ragged_attention_where`] and [`linear_attention`](crate::linear_attention).
pub fn ragged_linear_attention<F: Float>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    v: &Array<F, 4>,
    lengths: (&[usize], &[usize]),
    options: &LinearOptions<F>,
) -> LinearOutput<F> {
    let ([_, heads, query_len, _], value_dim) = (q.shape(), v.shape()[3]);
    let mut packed = LinearOutput {
        out: Array::filled([1, heads, query_len, value_dim], F::zero()),
        state: Array::filled(state_shape(q, k, v, lengths, options), F::zero()),
    };
    for (at, (query, key)) in sequences(q, k, lengths).enumerate() {
        let (alone_q, alone_k) = (tokens(q, query.clone()), tokens(k, key.clone()));
        let options = options_of(options, at, key.clone());
        let alone = linear_attention(&alone_q, &alone_k, &tokens(v, key), &options);
        put(&mut packed.out, &alone.out, query.start);
        put_state(&mut packed.state, &alone.state, at);
    }
    packed
}

/// The backward pass of [`ragged_linear_attention`].
///
/// # Panics
/// As [`ragged_linear_attention`].
pub fn ragged_linear_attention_backward<F: Float>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    v: &Array<F, 4>,
    lengths: (&[usize], &[usize]),
    options: &LinearOptions<F>,
    d_out: &Array<F, 4>,
    d_state: &Array<F, 4>,
) -> LinearAttentionGradients<F> {
    let mut packed = LinearAttentionGradients {
        query: Array::filled(q.shape(), F::zero()),
        key: Array::filled(k.shape(), F::zero()),
        value: Array::filled(v.shape(), F::zero()),
        state: Array::filled(state_shape(q, k, v, lengths, options), F::zero()),
    };
    for (at, (query, key)) in sequences(q, k, lengths).enumerate() {
        let alone = linear_attention_backward(
            &tokens(q, query.clone()),
            &tokens(k, key.clone()),
            &tokens(v, key.clone()),
            &options_of(options, at, key.clone()),
            &tokens(d_out, query.clone()),
            &state_of(d_state, at),
        );
        put(&mut packed.query, &alone.query, query.start);
        put(&mut packed.key, &alone.key, key.start);
        put(&mut packed.value, &alone.value, key.start);
        put_state(&mut packed.state, &alone.state, at);
    }
    packed
}

/// `[sequences, Hk, features, Dv]`.
fn state_shape<F: Float>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    v: &Array<F, 4>,
    lengths: (&[usize], &[usize]),
    options: &LinearOptions<F>,
) -> [usize; 4] {
    let [_, kv_heads, _, head_dim] = k.shape();
    [sequences(q, k, lengths).count(), kv_heads, options.map.features(head_dim), v.shape()[3]]
}

/// What is the sequence's own: its keys' decays and its state.
fn options_of<F: Float>(options: &LinearOptions<F>, at: usize, keys: Range<usize>) -> LinearOptions<F> {
    let log_decay = options.log_decay.as_ref().map(|decay| {
        let [_, kv_heads, _] = decay.shape();
        Array::from_fn([1, kv_heads, keys.len()], |[_, g, j]| decay[[0, g, keys.start + j]])
    });
    let state = options.state.as_ref().map(|state| state_of(state, at));
    LinearOptions { log_decay, state, ..options.clone() }
}

fn state_of<F: Float>(states: &Array<F, 4>, at: usize) -> Array<F, 4> {
    let [_, kv_heads, features, dim] = states.shape();
    Array::from_fn([1, kv_heads, features, dim], |[_, g, f, d]| states[[at, g, f, d]])
}

fn put_state<F: Float>(states: &mut Array<F, 4>, alone: &Array<F, 4>, at: usize) {
    let [_, kv_heads, features, _] = alone.shape();
    for [g, f] in indices([kv_heads, features]) {
        states.row_mut([at, g, f]).copy_from_slice(alone.row([0, g, f]));
    }
}

/// The query tokens and the key tokens of each sequence.
fn sequences<'a, F>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    (queries, keys): (&'a [usize], &'a [usize]),
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + use<'a, F> {
    let ([batch, _, query_len, _], [_, _, key_len, _]) = (q.shape(), k.shape());
    assert_eq!(batch, 1, "packed sequences are a batch of 1");
    assert_eq!(queries.last(), Some(&query_len), "query lengths end with the query tokens");
    assert_eq!(keys.last(), Some(&key_len), "key lengths end with the key tokens");
    let ranges = |lengths: &'a [usize]| lengths.windows(2).map(|pair| pair[0]..pair[1]);
    ranges(queries).zip(ranges(keys))
}

/// Writes the tokens of one sequence to where it starts.
fn put<F: Float>(packed: &mut Array<F, 4>, alone: &Array<F, 4>, start: usize) {
    let [batch, heads, len, _] = alone.shape();
    for [b, h, t] in indices([batch, heads, len]) {
        packed.row_mut([b, h, start + t]).copy_from_slice(alone.row([b, h, t]));
    }
}

/// Some tokens of `[B, H, T, D]`.
pub(crate) fn tokens<F: Clone>(x: &Array<F, 4>, range: Range<usize>) -> Array<F, 4> {
    let [batch, heads, _, dim] = x.shape();
    Array::from_fn([batch, heads, range.len(), dim], |[b, h, t, d]| x[[b, h, range.start + t, d]].clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        array::dot,
        samples::{assert_gradient, noise},
    };

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

    #[test]
    fn gradients_equal_differences() {
        let noise = |heads, tokens, seed| noise([1, heads, tokens, 2], seed);
        let (q, k, v, d_out) = (noise(4, 7, 0), noise(2, 6, 1), noise(2, 6, 2), noise(4, 7, 3));
        let options = Options { sink_logits: Some(vec![0.1, 0.2, 0.3, -1.0]), ..Options::new(2) };
        // Fewer queries than keys, queries without keys, keys without queries, more queries than keys.
        let lengths: (&[usize], &[usize]) = (&[0, 2, 4, 4, 7], &[0, 3, 3, 4, 6]);
        let reaches = [Some(Reach::All), Some(Reach::NonCausal), None];
        let reach_of = |h: usize, t: usize| reaches[(h + t) % 3];
        let forward = |q: &Array<f64, 4>, k: &Array<f64, 4>, v: &Array<f64, 4>, options: &Options<f64>| {
            ragged_attention_where(q, k, v, lengths, options, reach_of)
        };
        let loss = |partial: Partial<f64>| dot(partial.out.as_slice(), d_out.as_slice());

        let partial = forward(&q, &k, &v, &options);
        let found =
            ragged_attention_backward_where(&q, &k, &v, lengths, &options, &partial, &d_out, reach_of);
        assert_gradient(&q, &found.query, |q| loss(forward(q, &k, &v, &options)));
        assert_gradient(&k, &found.key, |k| loss(forward(&q, k, &v, &options)));
        assert_gradient(&v, &found.value, |v| loss(forward(&q, &k, v, &options)));
        let sinks = Array::new([4], options.sink_logits.clone().unwrap());
        assert_gradient(&sinks, &Array::new([4], found.sink_logits), |sinks| {
            let sink_logits = Some(sinks.as_slice().to_vec());
            loss(forward(&q, &k, &v, &Options { sink_logits, ..options.clone() }))
        });
    }
}
