use bifocal_core::{FeatureMap, Window};
use num_traits::Float;

use crate::{
    Array,
    array::{add_scaled, dot, sum},
};

/// The features of one query or key.
pub fn features<F: Float>(map: FeatureMap, x: &[F]) -> Vec<F> {
    let negative: Vec<F> = x.iter().map(|&x| -x).collect();
    let both = |half: fn(&[F]) -> Vec<F>| [half(x), half(&negative)].concat();
    match map {
        FeatureMap::SoftmaxPair => both(softmax),
        FeatureMap::ReluPair => both(relu),
        FeatureMap::Identity => x.to_vec(),
    }
}

/// The backward pass of [`features`]: the gradient of x from that of its features.
pub fn features_backward<F: Float>(map: FeatureMap, x: &[F], d_features: &[F]) -> Vec<F> {
    let positive = |x: F, d: F| if x > F::zero() { d } else { F::zero() };
    match map {
        FeatureMap::SoftmaxPair => {
            let (y, dim) = (features(map, x), x.len());
            let half = |at: usize| {
                let (y, d) = (&y[at..at + dim], &d_features[at..at + dim]);
                let mean = dot(y, d);
                y.iter().zip(d).map(|(&y, &d)| y * (d - mean)).collect::<Vec<F>>()
            };
            half(0).into_iter().zip(half(dim)).map(|(plus, minus)| plus - minus).collect()
        }
        FeatureMap::ReluPair => {
            let (plus, minus) = d_features.split_at(x.len());
            let pairs = x.iter().zip(plus).zip(minus);
            pairs.map(|((&x, &plus), &minus)| positive(x, plus) - positive(-x, minus)).collect()
        }
        FeatureMap::Identity => d_features.to_vec(),
    }
}

fn softmax<F: Float>(x: &[F]) -> Vec<F> {
    let top = x.iter().fold(F::neg_infinity(), |top, &x| top.max(x));
    let weights: Vec<F> = x.iter().map(|&x| (x - top).exp()).collect();
    let total = sum(weights.iter().copied());
    weights.into_iter().map(|weight| weight / total).collect()
}

/// A NaN stays one.
fn relu<F: Float>(x: &[F]) -> Vec<F> {
    x.iter().map(|&x| if x < F::zero() { F::zero() } else { x }).collect()
}

/// What linear attention depends on besides queries, keys and values.
#[derive(Clone, Debug)]
pub struct LinearOptions<F> {
    /// What the near branch sees, and this one does not.
    pub window: Window,
    /// The feature map.
    pub map: FeatureMap,
    /// `[B, Hk, Tk]`: before key `j` is added the state shrinks by `exp` of this (a decay of one number per head and token:
    /// GLA's recurrence, arXiv 2312.06635, section 4.1, with one gate for all features). None in RATTENTION.
    pub log_decay: Option<Array<F, 3>>,
    /// `[B, Hk, features, Dv]`: the state before the first key; zeros unless set.
    pub state: Option<Array<F, 4>>,
    /// What happens to features, and to what a row reads of the state, before they are multiplied: nothing, unless a plain
    /// computation in lower precision is asked for. The backward pass leaves them as they are.
    pub round: fn(F) -> F,
}

impl<F: Float> LinearOptions<F> {
    /// RATTENTION's feature map beyond a window, without decay, from nothing.
    pub fn new(window: Window) -> Self {
        Self { window, map: FeatureMap::SoftmaxPair, log_decay: None, state: None, round: |x| x }
    }
}

/// What linear attention gives.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearOutput<F> {
    /// `[B, H, Tq, Dv]`.
    pub out: Array<F, 4>,
    /// `[B, Hk, features, Dv]`: the state that the last query met; without any, that one at the last key would.
    pub state: Array<F, 4>,
}

/// Linear attention to the keys that have left the window (RATTENTION, arXiv 2506.15545, equation 4), as a recurrence:
/// `S_j = exp(g_j) S_(j-1) + phi(k_j)^T v_j`, and the query at position i gives `phi(q_i) S_(i-n)`, n the keys of the
/// window. No denominator, no scale.
///
/// Positions are bottom-right aligned, and query heads share the state of their kv head, as in
/// [`attention`](crate::attention). Queries that no key has left yet meet the state that came in.
///
/// # Panics
/// When shapes do not fit.
pub fn linear_attention<F: Float>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    v: &Array<F, 4>,
    options: &LinearOptions<F>,
) -> LinearOutput<F> {
    let Shape { batch, heads, kv_heads, query_len, value_dim, .. } = Shape::new(q, k, v);
    let mut state = initial(k, v, options);
    let mut out = Array::filled([batch, heads, query_len, value_dim], F::zero());
    let group = heads / kv_heads;
    for (b, g) in pairs(batch, kv_heads) {
        let mut next = 0;
        let mut meet = |state: &mut Array<F, 4>, horizon: i64| {
            while (next as i64) <= horizon {
                let decay = options.log_decay.as_ref().map_or(F::one(), |decay| decay[[b, g, next]].exp());
                let key = features(options.map, k.row([b, g, next]));
                for (f, &feature) in key.iter().enumerate() {
                    let row = state.row_mut([b, g, f]);
                    row.iter_mut().for_each(|x| *x = *x * decay);
                    add_scaled(row, (options.round)(feature), v.row([b, g, next]));
                }
                next += 1;
            }
        };
        for t in 0..query_len {
            meet(&mut state, horizon(q, k, options, t));
            for h in g * group..(g + 1) * group {
                for (f, &feature) in features(options.map, q.row([b, h, t])).iter().enumerate() {
                    let read: Vec<F> = state.row([b, g, f]).iter().map(|&x| (options.round)(x)).collect();
                    add_scaled(out.row_mut([b, h, t]), (options.round)(feature), &read);
                }
            }
        }
        meet(&mut state, last_horizon(k, options));
    }
    LinearOutput { out, state }
}

/// Gradients of what [`linear_attention`] reads; decays are constants.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearAttentionGradients<F> {
    /// `[B, H, Tq, D]`.
    pub query: Array<F, 4>,
    /// `[B, Hk, Tk, D]`.
    pub key: Array<F, 4>,
    /// `[B, Hk, Tk, Dv]`.
    pub value: Array<F, 4>,
    /// `[B, Hk, features, Dv]`, of the state that came in.
    pub state: Array<F, 4>,
}

/// The backward pass of [`linear_attention`], from the gradients of its outputs and of the state that it leaves.
///
/// Written over pairs instead of states: with `w_ij` the product of the decays after key j up to the horizon of query i,
/// `o_i = sum_j w_ij (phi(q_i) . phi(k_j)) v_j + w_i phi(q_i) S`, and the last state likewise.
///
/// # Panics
/// When shapes do not fit.
pub fn linear_attention_backward<F: Float>(
    q: &Array<F, 4>,
    k: &Array<F, 4>,
    v: &Array<F, 4>,
    options: &LinearOptions<F>,
    d_out: &Array<F, 4>,
    d_state: &Array<F, 4>,
) -> LinearAttentionGradients<F> {
    let Shape { batch, heads, kv_heads, query_len, key_len, value_dim } = Shape::new(q, k, v);
    let (map, group) = (options.map, heads / kv_heads);
    let count = map.features(q.shape()[3]);
    let before = initial(k, v, options);
    assert_eq!(d_out.shape(), [batch, heads, query_len, value_dim], "an output has one gradient");
    assert_eq!(d_state.shape(), before.shape(), "a state has one gradient");
    let mut gradients = LinearAttentionGradients {
        query: Array::filled(q.shape(), F::zero()),
        key: Array::filled(k.shape(), F::zero()),
        value: Array::filled(v.shape(), F::zero()),
        state: Array::filled(before.shape(), F::zero()),
    };
    for (b, g) in pairs(batch, kv_heads) {
        let decay = |from: i64, to: i64| match &options.log_decay {
            Some(decay) => sum((from..=to).map(|j| decay[[b, g, j as usize]])).exp(),
            None => F::one(),
        };
        let keys: Vec<Vec<F>> = (0..key_len).map(|j| features(map, k.row([b, g, j]))).collect();
        let mut d_keys = vec![vec![F::zero(); count]; key_len];
        for (h, t) in pairs(group, query_len).map(|(h, t)| (g * group + h, t)) {
            let end = horizon(q, k, options, t);
            let query = features(map, q.row([b, h, t]));
            let d_row = d_out.row([b, h, t]);
            let mut d_query = vec![F::zero(); count];
            for f in 0..count {
                let weight = decay(0, end);
                d_query[f] = weight * dot(d_row, before.row([b, g, f]));
                add_scaled(gradients.state.row_mut([b, g, f]), weight * query[f], d_row);
            }
            for j in 0..=end {
                let (weight, j) = (decay(j + 1, end), j as usize);
                let slope = weight * dot(d_row, v.row([b, g, j]));
                add_scaled(&mut d_query, slope, &keys[j]);
                add_scaled(&mut d_keys[j], slope, &query);
                add_scaled(gradients.value.row_mut([b, g, j]), weight * dot(&query, &keys[j]), d_row);
            }
            let d_q = features_backward(map, q.row([b, h, t]), &d_query);
            gradients.query.row_mut([b, h, t]).copy_from_slice(&d_q);
        }
        let end = last_horizon(k, options);
        for f in 0..count {
            let d_row = d_state.row([b, g, f]);
            add_scaled(gradients.state.row_mut([b, g, f]), decay(0, end), d_row);
            for j in 0..=end {
                let (weight, j) = (decay(j + 1, end), j as usize);
                d_keys[j][f] = d_keys[j][f] + weight * dot(d_row, v.row([b, g, j]));
                add_scaled(gradients.value.row_mut([b, g, j]), weight * keys[j][f], d_row);
            }
        }
        for (j, d_key) in d_keys.iter().enumerate() {
            let d_k = features_backward(map, k.row([b, g, j]), d_key);
            gradients.key.row_mut([b, g, j]).copy_from_slice(&d_k);
        }
    }
    gradients
}

/// The last key that the query of token `t` meets through the state; negative where there is none.
fn horizon<F: Float>(q: &Array<F, 4>, k: &Array<F, 4>, options: &LinearOptions<F>, t: usize) -> i64 {
    t as i64 + k.shape()[2] as i64 - q.shape()[2] as i64 - i64::from(options.window.keys())
}

/// That of the query at the last key.
fn last_horizon<F: Float>(k: &Array<F, 4>, options: &LinearOptions<F>) -> i64 {
    k.shape()[2] as i64 - 1 - i64::from(options.window.keys())
}

/// The state before the first key.
fn initial<F: Float>(k: &Array<F, 4>, v: &Array<F, 4>, options: &LinearOptions<F>) -> Array<F, 4> {
    let [batch, kv_heads, key_len, head_dim] = k.shape();
    let shape = [batch, kv_heads, options.map.features(head_dim), v.shape()[3]];
    if let Some(decay) = &options.log_decay {
        assert_eq!(decay.shape(), [batch, kv_heads, key_len], "a key has one decay");
    }
    match &options.state {
        Some(state) => {
            assert_eq!(state.shape(), shape, "the state's shape follows from keys and values");
            state.clone()
        }
        None => Array::filled(shape, F::zero()),
    }
}

fn pairs(a: usize, b: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..a).flat_map(move |i| (0..b).map(move |j| (i, j)))
}

/// The sizes that query, key and value agree on.
struct Shape {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    query_len: usize,
    key_len: usize,
    value_dim: usize,
}

impl Shape {
    fn new<F>(q: &Array<F, 4>, k: &Array<F, 4>, v: &Array<F, 4>) -> Self {
        let [batch, heads, query_len, head_dim] = q.shape();
        let [_, kv_heads, key_len, _] = k.shape();
        let [.., value_dim] = v.shape();
        assert_eq!(k.shape(), [batch, kv_heads, key_len, head_dim], "keys fit queries");
        assert_eq!(v.shape(), [batch, kv_heads, key_len, value_dim], "values fit keys");
        assert!(heads.is_multiple_of(kv_heads), "{heads} query heads share {kv_heads} kv heads");
        Self { batch, heads, kv_heads, query_len, key_len, value_dim }
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;
    use proptest::prelude::*;

    use super::*;
    use crate::samples::{assert_gradient, noise};

    #[test]
    fn features_by_hand() {
        // exp(ln 3) : exp(0) is 3 : 1, and the other way round for -x.
        let x = [3.0_f64.ln(), 0.0];
        assert_abs_diff_eq!(
            features(FeatureMap::SoftmaxPair, &x).as_slice(),
            [0.75, 0.25, 0.25, 0.75].as_slice(),
            epsilon = 1e-15
        );
        assert_eq!(features(FeatureMap::ReluPair, &[2.0, -3.0]), [2.0, 0.0, 0.0, 3.0]);
        assert_eq!(features(FeatureMap::Identity, &[2.0, -3.0]), [2.0, -3.0]);
        assert!(features(FeatureMap::ReluPair, &[f64::NAN])[1].is_nan());
    }

    #[test]
    fn a_state_by_hand() {
        // Identity on one channel, window 2: the third query is the first that a key has left.
        let row = |values: &[f64]| Array::new([1, 1, values.len(), 1], values.to_vec());
        let (q, k, v) = (row(&[1.0, 1.0, 2.0, 1.0]), row(&[3.0, 5.0, 7.0, 7.0]), row(&[1.0, 10.0, 9.0, 9.0]));
        let options =
            LinearOptions { map: FeatureMap::Identity, ..LinearOptions::new(Window::new(2).unwrap()) };
        let plain = linear_attention(&q, &k, &v, &options);
        assert_eq!(plain.out.as_slice(), [0.0, 0.0, 6.0, 53.0]);
        assert_eq!(plain.state.as_slice(), [53.0]);
        let halving = LinearOptions {
            log_decay: Some(Array::filled([1, 1, 4], 0.5_f64.ln())),
            state: Some(Array::filled([1, 1, 1, 1], 8.0)),
            ..options
        };
        let decayed = linear_attention(&q, &k, &v, &halving);
        // Two queries meet 8, then 8 / 2 + 3, then 7 / 2 + 50.
        assert_abs_diff_eq!(decayed.out.as_slice(), [8.0, 8.0, 14.0, 53.5].as_slice(), epsilon = 1e-12);
    }

    /// A small problem of any two lengths.
    #[derive(Clone, Debug)]
    struct Case {
        q: Array<f64, 4>,
        k: Array<f64, 4>,
        v: Array<f64, 4>,
        options: LinearOptions<f64>,
        seed: u64,
    }

    fn case() -> impl Strategy<Value = Case> {
        let shape = (1_usize..3, 1_usize..3, 1_usize..4, 1_usize..9, 1_usize..9);
        let options = (0_usize..3, 1_usize..7, any::<bool>(), any::<bool>());
        (shape, options, any::<u64>()).prop_map(|(shape, (map, window, decays, starts), seed)| {
            let (batch, kv_heads, group, query_len, key_len) = shape;
            let map = FeatureMap::ALL[map];
            // Differences do not see the kink of a relu.
            let vectors = |shape, seed| noise(shape, seed).map(|x| 2.0 * x + 0.1 * x.signum());
            let state = noise([batch, kv_heads, map.features(4), 3], seed ^ 3);
            let decay = noise([batch, kv_heads, key_len], seed ^ 4).map(|x| 0.5 * x - 0.5);
            Case {
                q: vectors([batch, kv_heads * group, query_len, 4], seed),
                k: vectors([batch, kv_heads, key_len, 4], seed ^ 1),
                v: noise([batch, kv_heads, key_len, 3], seed ^ 2),
                options: LinearOptions {
                    window: Window::new(window).unwrap(),
                    map,
                    log_decay: decays.then_some(decay),
                    state: starts.then_some(state),
                    round: |x| x,
                },
                seed,
            }
        })
    }

    /// Tokens `from..to` of a tensor.
    fn cut<const N: usize>(x: &Array<f64, N>, from: usize, to: usize) -> Array<f64, N> {
        let mut shape = x.shape();
        shape[2] = to - from;
        Array::from_fn(shape, |mut index| {
            index[2] += from;
            x[index]
        })
    }

    proptest! {
        #[test]
        fn gradients_equal_differences(c in case()) {
            let forward = |q: &_, k: &_, v: &_, options: &_| linear_attention(q, k, v, options);
            let output = forward(&c.q, &c.k, &c.v, &c.options);
            let d_out = noise(output.out.shape(), c.seed ^ 5);
            let d_state = noise(output.state.shape(), c.seed ^ 6);
            let loss = |output: LinearOutput<f64>| {
                dot(output.out.as_slice(), d_out.as_slice()) + dot(output.state.as_slice(), d_state.as_slice())
            };
            let found = linear_attention_backward(&c.q, &c.k, &c.v, &c.options, &d_out, &d_state);
            assert_gradient(&c.q, &found.query, |q| loss(forward(q, &c.k, &c.v, &c.options)));
            assert_gradient(&c.k, &found.key, |k| loss(forward(&c.q, k, &c.v, &c.options)));
            assert_gradient(&c.v, &found.value, |v| loss(forward(&c.q, &c.k, v, &c.options)));
            let from = |state: &Array<f64, 4>| LinearOptions { state: Some(state.clone()), ..c.options.clone() };
            let state = initial(&c.k, &c.v, &c.options);
            assert_gradient(&state, &found.state, |state| loss(forward(&c.q, &c.k, &c.v, &from(state))));
        }

        #[test]
        fn a_split_composes_through_the_state(c in case(), at in 0_usize..8) {
            // Self-attention, cut before token `at`: the second part brings the window of the first along.
            let tokens = c.q.shape()[2].min(c.k.shape()[2]);
            let at = 1 + at % tokens;
            prop_assume!(at < tokens);
            let (q, k, v) = (cut(&c.q, 0, tokens), cut(&c.k, 0, tokens), cut(&c.v, 0, tokens));
            let decay = c.options.log_decay.as_ref().map(|decay| cut(decay, 0, tokens));
            let part = |from: usize, first_key: usize, to: usize, state: Option<Array<f64, 4>>| {
                let log_decay = decay.as_ref().map(|decay| cut(decay, first_key, to));
                let options = LinearOptions { log_decay, state, ..c.options.clone() };
                linear_attention(&cut(&q, from, to), &cut(&k, first_key, to), &cut(&v, first_key, to), &options)
            };
            let whole = part(0, 0, tokens, c.options.state.clone());
            let first = part(0, 0, at, c.options.state.clone());
            let kept = at.saturating_sub(c.options.window.keys() as usize);
            let second = part(at, kept, tokens, Some(first.state));
            assert_abs_diff_eq!(second.state.as_slice(), whole.state.as_slice(), epsilon = 1e-12);
            let tail = cut(&whole.out, at, tokens);
            assert_abs_diff_eq!(second.out.as_slice(), tail.as_slice(), epsilon = 1e-12);
        }
    }
}
