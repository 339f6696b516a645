use bifocal_core::{Reach, Window};
use num_traits::Float;

use crate::{
    Array, INVALID_ROUTE, Options, Partial,
    array::{add_scaled, dot, indices, number, sum},
    attention::{attention, attention_where, check, seen},
    combine::merge,
};

/// What is remembered of a set of keys: how many there are, their sum, and the sum of their outer products. Keys are
/// added one by one, as they leave the window, and two sets without a common key merge by adding.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments<F> {
    /// How many keys.
    pub count: usize,
    /// `[D]`.
    pub sum: Vec<F>,
    /// `[D, D]`, row by row.
    pub outer: Vec<F>,
}

impl<F: Float> Moments<F> {
    /// Of no key.
    pub fn empty(head_dim: usize) -> Self {
        Self { count: 0, sum: vec![F::zero(); head_dim], outer: vec![F::zero(); head_dim * head_dim] }
    }

    /// Of these keys.
    pub fn of<'a>(head_dim: usize, keys: impl IntoIterator<Item = &'a [F]>) -> Self
    where
        F: 'a,
    {
        let mut moments = Self::empty(head_dim);
        keys.into_iter().for_each(|key| moments.push(key));
        moments
    }

    /// Adds a key.
    ///
    /// # Panics
    /// When it has another length.
    pub fn push(&mut self, key: &[F]) {
        assert_eq!(key.len(), self.sum.len(), "a key of another head dim");
        self.count += 1;
        add_scaled(&mut self.sum, F::one(), key);
        for (row, &factor) in self.outer.chunks_mut(key.len()).zip(key) {
            add_scaled(row, factor, key);
        }
    }

    /// The moments of both sets of keys together.
    ///
    /// # Panics
    /// When head dims differ.
    pub fn merge(&self, other: &Self) -> Self {
        assert_eq!(self.sum.len(), other.sum.len(), "moments of another head dim");
        let mut merged = self.clone();
        merged.count += other.count;
        add_scaled(&mut merged.sum, F::one(), &other.sum);
        add_scaled(&mut merged.outer, F::one(), &other.outer);
        merged
    }

    /// The mean key `[D]`; NaN of no key.
    pub fn mean(&self) -> Vec<F> {
        let count = number::<F>(self.count as f64);
        self.sum.iter().map(|&sum| sum / count).collect()
    }

    /// The covariance `[D, D]` of the keys, divided by their number (not by one less): `sum k k^T / n - mean mean^T`.
    pub fn covariance(&self) -> Array<F, 2> {
        let (count, mean, dim) = (number::<F>(self.count as f64), self.mean(), self.sum.len());
        Array::from_fn([dim, dim], |[i, j]| self.outer[i * dim + j] / count - mean[i] * mean[j])
    }
}

/// A covariance `[D, D]` by a low rank: as it is along the orthonormal rows U `[r, D]`, and of what is left the diagonal,
/// `P Sigma P + diag(Sigma - P Sigma P)` with `P = U^T U`.
///
/// # Panics
/// When shapes do not fit.
pub fn low_rank<F: Float>(covariance: &Array<F, 2>, directions: &Array<F, 2>) -> Array<F, 2> {
    let [rank, dim] = directions.shape();
    assert_eq!(covariance.shape(), [dim, dim], "a covariance of these channels");
    let projection =
        Array::from_fn([dim, dim], |[i, j]| sum((0..rank).map(|a| directions[[a, i]] * directions[[a, j]])));
    let times = |a: &Array<F, 2>, b: &Array<F, 2>| {
        Array::from_fn([dim, dim], |[i, j]| sum((0..dim).map(|k| a[[i, k]] * b[[k, j]])))
    };
    let along = times(&times(&projection, covariance), &projection);
    Array::from_fn([dim, dim], |at| if at[0] == at[1] { covariance[at] } else { along[at] })
}

/// How much of the keys' covariance is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Covariance {
    /// All of it.
    Full,
    /// The variance of each channel, as if channels were independent.
    Diagonal,
}

/// Query-adaptive attention (QAdA, arXiv 2502.09647): the near keys are attended to always, the others, the bulk, where
/// they would hold too much of the softmax. How much they hold is predicted from their moments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Qada<F> {
    /// The near keys: a window,
    pub window: Window,
    /// and the first tokens.
    pub sinks: u32,
    /// A row stays near iff the near keys hold at least this share of the softmax; in (0, 1].
    pub tau: F,
    /// How much of the covariance is looked at.
    pub covariance: Covariance,
}

/// What [`Qada::forward`] gives.
#[derive(Clone, Debug, PartialEq)]
pub struct QadaOutput<F> {
    /// The window and the sinks; merged with the bulk where it was looked at.
    pub partial: Partial<F>,
    /// The predicted logarithm of the bulk's mass, `[B, H, Tq]`.
    pub predicted: Array<F, 3>,
    /// `[B, H, Tq]`: 1 where the bulk was looked at.
    pub routes: Array<u8, 3>,
}

impl<F: Float> Qada<F> {
    /// What every row sees.
    pub fn near(&self) -> Reach {
        Reach::SinksAndWindow { sinks: self.sinks, window: self.window }
    }

    /// The bulk: the keys that have left window and sinks.
    pub fn far(&self) -> Reach {
        Reach::Far { sinks: self.sinks, window: self.window }
    }

    /// The predicted logarithm of the bulk's mass, `[B, H, Tq]`. If the N keys of the bulk are normal with mean mu and
    /// covariance Sigma, the exponentials of their scores are log-normal, and N times their mean is
    ///
    /// ```text
    /// ln N + scale q . mu + scale^2 / 2 q^T Sigma q
    /// ```
    ///
    /// N is the number of keys in the row's own bulk; a bulk without keys has -inf. The moments are those of these very
    /// keys, or, where they are `given` (`[B][Hk]`), of whatever keys they were taken from.
    ///
    /// # Panics
    /// When shapes do not fit; with a softcap, whose scores are not normal.
    pub fn predict(
        &self,
        q: &Array<F, 4>,
        k: &Array<F, 4>,
        options: &Options<F>,
        given: Option<&[Vec<Moments<F>>]>,
    ) -> Array<F, 3> {
        assert!(options.softcap.is_none(), "scores under a softcap are not normal");
        let group = check(q, k, k, options);
        let [batch, heads, query_len, head_dim] = q.shape();
        let [_, kv_heads, key_len, _] = k.shape();
        let mut predicted = Array::filled([batch, heads, query_len], F::neg_infinity());
        for [b, kv_head] in indices([batch, kv_heads]) {
            let mut own = Moments::empty(head_dim);
            for t in 0..query_len {
                // Keys leave the window in their order, and none comes back.
                let bulk: Vec<usize> = seen(self.far(), t, query_len, key_len).collect();
                bulk[own.count..].iter().for_each(|&j| own.push(k.row([b, kv_head, j])));
                if own.count == 0 {
                    continue;
                }
                let moments = given.map_or(&own, |given| &given[b][kv_head]);
                let (mean, covariance) = (moments.mean(), moments.covariance());
                let count = number::<F>(own.count as f64);
                for h in kv_head * group..(kv_head + 1) * group {
                    let query = q.row([b, h, t]);
                    let score = options.scale * dot(query, &mean);
                    let variance = options.scale * options.scale * self.variance(query, &covariance);
                    predicted[[b, h, t]] = count.ln() + score + number::<F>(0.5) * variance;
                }
            }
        }
        predicted
    }

    /// `q^T Sigma q`, or what its diagonal gives.
    fn variance(&self, query: &[F], covariance: &Array<F, 2>) -> F {
        let dim = query.len();
        match self.covariance {
            Covariance::Full => sum((0..dim).map(|i| query[i] * dot(query, covariance.row([i])))),
            Covariance::Diagonal => sum((0..dim).map(|i| query[i] * query[i] * covariance[[i, i]])),
        }
    }

    /// Routes `[B, H, Tq]`: 0 iff `A_near / (A_near + A_bulk) >= tau`, where `near` and `bulk` are the logarithms of the
    /// two masses, which is `bulk - near <= ln(1 / tau - 1)`; [`INVALID_ROUTE`] where one of them is NaN. A row whose bulk
    /// is empty stays near.
    ///
    /// With the log-sum-exp of the bulk in the place of its prediction this is the decision of someone who knows.
    ///
    /// # Panics
    /// When shapes differ, or tau is not in (0, 1].
    pub fn decide(&self, near: &Array<F, 3>, bulk: &Array<F, 3>) -> Array<u8, 3> {
        assert_eq!(near.shape(), bulk.shape(), "the masses of one row each");
        assert!(self.tau > F::zero() && self.tau <= F::one(), "tau is a share above 0");
        let cut = (self.tau.recip() - F::one()).ln();
        Array::from_fn(near.shape(), |row| {
            let (near, bulk) = (near[row], bulk[row]);
            if near.is_nan() || bulk.is_nan() {
                return INVALID_ROUTE;
            }
            u8::from(bulk - near > cut)
        })
    }

    /// Decides for every row and attends; `given` as in [`predict`](Self::predict). Sink logits are near.
    ///
    /// # Panics
    /// As [`predict`](Self::predict).
    pub fn forward(
        &self,
        q: &Array<F, 4>,
        k: &Array<F, 4>,
        v: &Array<F, 4>,
        options: &Options<F>,
        given: Option<&[Vec<Moments<F>>]>,
    ) -> QadaOutput<F> {
        let near = attention(q, k, v, self.near(), options);
        let predicted = self.predict(q, k, options, given);
        let routes = self.decide(&near.lse, &predicted);
        let partial = self.look_far(q, k, v, options, &near, &routes);
        QadaOutput { partial, predicted, routes }
    }

    /// `near`, merged with the bulk in the rows whose route is 1; a row without a valid route becomes NaN.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn look_far(
        &self,
        q: &Array<F, 4>,
        k: &Array<F, 4>,
        v: &Array<F, 4>,
        options: &Options<F>,
        near: &Partial<F>,
        routes: &Array<u8, 3>,
    ) -> Partial<F> {
        let options = Options { sink_logits: None, ..options.clone() };
        let is_far = |b, h, t| (routes[[b, h, t]] == 1).then_some(self.far());
        let mut far = attention_where(q, k, v, &options, is_far);
        for row in indices(routes.shape()) {
            if routes[row] > 1 {
                far.out.row_mut(row).fill(F::nan());
                far.lse[row] = F::nan();
            }
        }
        merge(near, &far)
    }
}

/// Static labels `[R]`: a head looks far always iff more than `share` of its routes `[B, R, T]` did.
pub fn static_labels(routes: &Array<u8, 3>, share: f64) -> Vec<u8> {
    let [batch, heads, tokens] = routes.shape();
    let far = |r: usize| indices([batch, tokens]).filter(|&[b, t]| routes[[b, r, t]] == 1).count();
    (0..heads).map(|r| u8::from(far(r) as f64 > share * (batch * tokens) as f64)).collect()
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;
    use proptest::prelude::*;

    use super::*;
    use crate::samples::{Case, assert_close, case, noise};

    fn qada(window: usize, sinks: u32, tau: f64) -> Qada<f64> {
        Qada { window: Window::new(window).unwrap(), sinks, tau, covariance: Covariance::Full }
    }

    /// 999 numbers whose distribution is the standard normal's to the ninth moment, nearly: the five nodes of
    /// Gauss-Hermite quadrature, as often as their weights say.
    fn normal() -> Vec<f64> {
        let nodes = [(0.0, 533), (1.355_626, 222), (-1.355_626, 222), (2.856_970, 11), (-2.856_970, 11)];
        nodes.into_iter().flat_map(|(node, times)| std::iter::repeat_n(node, times)).collect()
    }

    #[test]
    fn moments_by_hand() {
        let moments = Moments::of(2, [[1.0, 0.0].as_slice(), &[3.0, 4.0]]);
        assert_eq!((moments.count, moments.sum.clone()), (2, vec![4.0, 4.0]));
        assert_eq!(moments.outer, [10.0, 12.0, 12.0, 16.0]);
        assert_eq!(moments.mean(), [2.0, 2.0]);
        assert_eq!(moments.covariance().into_vec(), [1.0, 2.0, 2.0, 4.0]);
    }

    #[test]
    fn the_mass_of_normal_keys_is_exact_to_a_thousandth() {
        // One query, a window of itself, a bulk of 999 keys with mean 3 in the first channel.
        let keys = normal();
        for deviation in [0.1, 0.5, 1.0] {
            let key_len = keys.len() + 1;
            let k = Array::from_fn([1, 1, key_len, 2], |[.., j, d]| match d {
                0 => 3.0 + keys.get(j).map_or(0.0, |x| deviation * x),
                _ => 0.0,
            });
            let q = Array::new([1, 1, 1, 2], vec![1.0, 0.0]);
            let options = Options { scale: 1.0, ..Options::new(2) };
            let qada = qada(1, 0, 0.5);
            let predicted = qada.predict(&q, &k, &options, None);
            let truth = attention(&q, &k, &k, qada.far(), &options);
            assert_abs_diff_eq!(predicted.as_slice(), truth.lse.as_slice(), epsilon = 1e-3);
        }
    }

    #[test]
    fn the_threshold_is_a_share() {
        // The near keys hold 3 of 4 parts.
        let near = Array::filled([1, 1, 1], 3.0_f64.ln());
        let bulk = Array::filled([1, 1, 1], 0.0);
        let route = |tau: f64| qada(1, 0, tau).decide(&near, &bulk).into_vec()[0];
        assert_eq!([0.1, 0.74, 0.76, 1.0].map(route), [0, 0, 1, 1]);
        let nan = Array::filled([1, 1, 1], f64::NAN);
        assert_eq!(qada(1, 0, 0.5).decide(&nan, &bulk).into_vec(), [INVALID_ROUTE]);
        assert_eq!(qada(1, 0, 0.5).decide(&near, &nan).into_vec(), [INVALID_ROUTE]);
        // No key at all, and no key in the bulk.
        let nothing = Array::filled([1, 1, 1], f64::NEG_INFINITY);
        assert_eq!(qada(1, 0, 1.0).decide(&nothing, &nothing).into_vec(), [0]);
        assert_eq!(qada(1, 0, 1.0).decide(&near, &nothing).into_vec(), [0]);
    }

    #[test]
    fn labels_are_majorities() {
        let routes = Array::new([1, 3, 4], vec![0, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1]);
        assert_eq!(static_labels(&routes, 0.5), [0, 0, 1]);
        assert_eq!(static_labels(&routes, 0.25), [0, 1, 1]);
        assert_eq!(static_labels(&routes, 1.0), [0, 0, 0]);
    }

    #[test]
    fn a_diagonal_forgets_what_channels_have_in_common() {
        // Both channels are the same number, so that the score's variance along (1, 1) is 4 and not 2.
        let k = Array::new([1, 1, 3, 2], vec![1.0, 1.0, -1.0, -1.0, 0.0, 0.0]);
        let q = Array::new([1, 1, 1, 2], vec![1.0, 1.0]);
        let options = Options { scale: 1.0, ..Options::new(2) };
        let full = qada(1, 0, 0.5);
        let diagonal = Qada { covariance: Covariance::Diagonal, ..full };
        assert_abs_diff_eq!(full.predict(&q, &k, &options, None)[[0; 3]], 2.0_f64.ln() + 2.0);
        assert_abs_diff_eq!(diagonal.predict(&q, &k, &options, None)[[0; 3]], 2.0_f64.ln() + 1.0);
    }

    fn forward(c: &Case, qada: Qada<f64>) -> QadaOutput<f64> {
        qada.forward(&c.q, &c.k, &c.v, &c.options(), None)
    }

    proptest! {
        #[test]
        fn merging_moments_is_one_pass(seed in any::<u64>(), cut in 0_usize..10) {
            let keys = noise([9, 3], seed);
            let of = |range: std::ops::Range<usize>| Moments::of(3, range.map(|j| keys.row([j])));
            let merged = of(0..cut.min(9)).merge(&of(cut.min(9)..9));
            let whole = of(0..9);
            prop_assert_eq!(merged.count, 9);
            assert_abs_diff_eq!(merged.sum.as_slice(), whole.sum.as_slice(), epsilon = 1e-12);
            assert_abs_diff_eq!(merged.outer.as_slice(), whole.outer.as_slice(), epsilon = 1e-12);
        }

        #[test]
        fn a_tau_of_one_is_full_attention_and_a_tiny_one_the_near_keys(c in case()) {
            let full = forward(&c, qada(c.window, c.sinks, 1.0));
            assert_close(&full.partial, &c.attention(Reach::All));
            let near = forward(&c, qada(c.window, c.sinks, 1e-300));
            prop_assert!(near.routes.as_slice().iter().all(|&route| route == 0));
            prop_assert_eq!(near.partial, c.attention(qada(c.window, c.sinks, 1.0).near()));
        }

        #[test]
        fn a_bulk_of_one_key_has_its_score(c in case(), sinks in 0_u32..3) {
            // Nothing is predicted where there is nothing to sum over.
            let qada = qada(c.window, sinks, 0.5);
            let predicted = forward(&c, qada).predicted;
            let truth = c.attention(qada.far()).lse;
            for [b, h, t] in indices(predicted.shape()) {
                let (predicted, truth) = (predicted[[b, h, t]], truth[[b, h, t]]);
                match seen(qada.far(), t, c.tokens, c.tokens).count() {
                    0 => prop_assert_eq!(predicted, f64::NEG_INFINITY),
                    1 => assert_abs_diff_eq!(predicted, truth, epsilon = 1e-12),
                    _ => prop_assert!(predicted.is_finite()),
                }
            }
        }

        #[test]
        fn moments_that_are_given_are_used(c in case()) {
            // Those of all keys stand in for those of each row's bulk: the last row of a window of one and no sinks
            // lacks its own key alone.
            let given: Vec<Vec<Moments<f64>>> = (0..c.q.shape()[0])
                .map(|b| {
                    let of = |h| Moments::of(4, (0..c.tokens - 1).map(|j| c.k.row([b, h, j])));
                    (0..c.kv_heads).map(of).collect()
                })
                .collect();
            let qada = qada(1, 0, 0.5);
            let own = qada.predict(&c.q, &c.k, &c.options(), None);
            let given = qada.predict(&c.q, &c.k, &c.options(), Some(&given));
            for [b, h, _] in indices([c.q.shape()[0], c.heads, 1]) {
                let last = [b, h, c.tokens - 1];
                // A single token has no bulk.
                prop_assert!(own[last] == given[last] || (own[last] - given[last]).abs() < 1e-12);
            }
        }
    }
}
