use num_traits::Float;

use crate::{Array, Partial, array::indices};

/// Merges two partials over disjoint keys into the partial over their union, by log-sum-exp (online softmax:
/// arXiv 1805.02867; as a merge of partials: FlashInfer, arXiv 2501.01005).
///
/// A row of `lse = -inf` on one side is the identity: the other side's row comes back bit for bit. Rows of
/// -inf on both sides stay 0 and -inf.
///
/// # Panics
/// When the partials differ in shape.
pub fn merge<F: Float>(a: &Partial<F>, b: &Partial<F>) -> Partial<F> {
    assert_eq!(a.out.shape(), b.out.shape(), "partials of different shapes cannot be merged");
    let mut merged = a.clone();
    for row in indices(a.lse.shape()) {
        let (lse_a, lse_b) = (a.lse[row], b.lse[row]);
        if lse_b == F::neg_infinity() {
            continue;
        }
        let out = merged.out.row_mut(row);
        if lse_a == F::neg_infinity() {
            out.copy_from_slice(b.out.row(row));
            merged.lse[row] = lse_b;
            continue;
        }
        let max = lse_a.max(lse_b);
        let (weight_a, weight_b) = ((lse_a - max).exp(), (lse_b - max).exp());
        let total = weight_a + weight_b;
        for (out, &other) in out.iter_mut().zip(b.out.row(row)) {
            *out = (weight_a * *out + weight_b * other) / total;
        }
        merged.lse[row] = max + total.ln();
    }
    merged
}

/// Each row is the row of the one branch that its route names (AHA, arXiv 2512.22562:
/// `g a_full + (1 - g) a_local` with a binary g, so that nothing of the branch not taken is left).
///
/// `routes` is `[B, R, T]` with R dividing H (1, Hk or H): router head `r` serves the heads `h` with
/// `h * R / H == r`. Branch 0 is the nearest reach, the last one is full. A route that names no branch makes
/// a row of NaN.
///
/// # Panics
/// When there is no branch, or shapes do not fit.
pub fn select<F: Float>(routes: &Array<u8, 3>, branches: &[&Partial<F>]) -> Partial<F> {
    let shape = branches.first().expect("at least one branch to select from").out.shape();
    for branch in branches {
        assert_eq!(branch.out.shape(), shape, "branches of different shapes");
    }
    pick(routes, shape, |route| branches.get(usize::from(route)).map(|branch| Some(*branch)))
}

/// The rows whose gate is 1; those whose gate is 0 become `out = 0`, `lse = -inf`, any other gate makes a row
/// of NaN (the mask of L2A's series composition, arXiv 2603.17484: it multiplies the output before its
/// projection).
///
/// `gates` is `[B, R, T]` as the routes of [`select`].
///
/// # Panics
/// When shapes do not fit.
pub fn mask<F: Float>(gates: &Array<u8, 3>, partial: &Partial<F>) -> Partial<F> {
    pick(gates, partial.out.shape(), |gate| match gate {
        0 => Some(None),
        1 => Some(Some(partial)),
        _ => None,
    })
}

/// The convex mix `(1 - w) near + w far` of two branches' outputs `[B, H, T, Dv]` (soft gates, as LoGo's).
///
/// `weights` is `[B, R, T]`, served to heads as the routes of [`select`]. A mix of outputs has no
/// log-sum-exp. The formula is taken literally: a NaN in a branch of weight 0 is still a NaN.
///
/// # Panics
/// When shapes do not fit.
pub fn mix<F: Float>(weights: &Array<F, 3>, near: &Partial<F>, far: &Partial<F>) -> Array<F, 4> {
    let shape = near.out.shape();
    assert_eq!(far.out.shape(), shape, "branches of different shapes");
    check_routes(weights.shape(), shape);
    Array::from_fn(shape, |[b, h, t, d]| {
        let weight = weights[[b, router_head(h, weights.shape()[1], shape[1]), t]];
        (F::one() - weight) * near.out[[b, h, t, d]] + weight * far.out[[b, h, t, d]]
    })
}

/// The router head that serves query head `head`: of `router_heads`, for `heads` query heads.
pub(crate) fn router_head(head: usize, router_heads: usize, heads: usize) -> usize {
    head * router_heads / heads
}

/// Row by row the source that the route names: a partial, nothing (`Some(None)`), or no valid source
/// (`None`).
fn pick<'a, F: Float + 'a>(
    routes: &Array<u8, 3>,
    shape: [usize; 4],
    source: impl Fn(u8) -> Option<Option<&'a Partial<F>>>,
) -> Partial<F> {
    check_routes(routes.shape(), shape);
    let [batch, heads, tokens, _] = shape;
    let mut picked = Partial::empty(shape);
    for [b, h, t] in indices([batch, heads, tokens]) {
        let row = [b, h, t];
        match source(routes[[b, router_head(h, routes.shape()[1], heads), t]]) {
            Some(Some(partial)) => {
                picked.out.row_mut(row).copy_from_slice(partial.out.row(row));
                picked.lse[row] = partial.lse[row];
            }
            Some(None) => {}
            None => {
                picked.out.row_mut(row).fill(F::nan());
                picked.lse[row] = F::nan();
            }
        }
    }
    picked
}

pub(crate) fn check_routes(routes: [usize; 3], [batch, heads, tokens, _]: [usize; 4]) {
    let fits = routes[0] == batch && routes[2] == tokens && heads.is_multiple_of(routes[1]);
    assert!(fits, "routes have shape {routes:?}, expected [{batch}, R, {tokens}] with R dividing {heads}");
}

#[cfg(test)]
mod tests {
    use bifocal_core::{Reach, Window};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        INVALID_ROUTE, attention_where,
        samples::{Case, assert_close, case, noise, noisy_routes},
    };

    /// The near, far and full partials of a case.
    fn branches(c: &Case, sinks: u32) -> [Partial<f64>; 3] {
        let window = Window::new(c.window).unwrap();
        let near = Reach::SinksAndWindow { sinks, window };
        [near, Reach::Far { sinks, window }, Reach::All].map(|reach| c.attention(reach))
    }

    fn routes(c: &Case, value: u8) -> Array<u8, 3> {
        Array::filled([c.q.shape()[0], c.kv_heads, c.tokens], value)
    }

    #[test]
    fn mixing_by_hand() {
        let partial =
            |out| Partial { out: Array::filled([1, 2, 1, 1], out), lse: Array::filled([1, 2, 1], 0.0) };
        let weights = Array::new([1, 2, 1], vec![0.25, 1.0]);
        assert_eq!(mix(&weights, &partial(4.0), &partial(8.0)).into_vec(), [5.0, 8.0]);
    }

    #[test]
    fn merging_nothing_with_nothing_is_nothing() {
        let empty = Partial::<f64>::empty([1, 2, 3, 4]);
        assert_eq!(merge(&empty, &empty), empty);
    }

    #[test]
    fn merging_survives_far_apart_log_sum_exps() {
        let partial =
            |out, lse| Partial { out: Array::filled([1, 1, 1, 1], out), lse: Array::filled([1, 1, 1], lse) };
        let merged = merge(&partial(1.0, 1e4), &partial(2.0, -1e4));
        assert_eq!(merged, partial(1.0, 1e4));
    }

    #[test]
    fn an_invalid_route_makes_a_row_of_nan() {
        let branch = Partial { out: noise([1, 4, 2, 3], 0), lse: noise([1, 4, 2], 1) };
        let mut routes = Array::filled([1, 2, 2], 1);
        routes[[0, 1, 0]] = INVALID_ROUTE;
        for picked in [select(&routes, &[&branch, &branch]), mask(&routes, &branch)] {
            for [b, h, t] in indices([1, 4, 2]) {
                // Router head 1 of 2 serves heads 2 and 3.
                let invalid = h >= 2 && t == 0;
                assert_eq!(picked.lse[[b, h, t]].is_nan(), invalid);
                assert!(picked.out.row([b, h, t]).iter().all(|x| x.is_nan() == invalid));
            }
        }
    }

    #[test]
    #[should_panic(expected = "routes have shape [1, 3, 2], expected [1, R, 2] with R dividing 4")]
    fn router_heads_that_do_not_divide_are_named() {
        let branch = Partial::<f64>::empty([1, 4, 2, 3]);
        mask(&Array::filled([1, 3, 2], 0), &branch);
    }

    proptest! {
        #[test]
        fn near_merged_with_far_is_all(c in case()) {
            for sinks in [0, c.sinks] {
                let [near, far, all] = branches(&c, sinks);
                assert_close(&merge(&near, &far), &all);
                assert_close(&merge(&far, &near), &all);
            }
        }

        #[test]
        fn nothing_is_the_identity_of_merging(c in case()) {
            let [near, ..] = branches(&c, c.sinks);
            let empty = Partial::empty(near.out.shape());
            prop_assert_eq!(&merge(&near, &empty), &near);
            prop_assert_eq!(&merge(&empty, &near), &near);
        }

        #[test]
        fn routes_that_agree_are_one_branch(c in case()) {
            let [near, _, all] = branches(&c, 0);
            prop_assert_eq!(&select(&routes(&c, 0), &[&near, &all]), &near);
            prop_assert_eq!(&select(&routes(&c, 1), &[&near, &all]), &all);
            prop_assert_eq!(&mask(&routes(&c, 1), &all), &all);
            prop_assert_eq!(mask(&routes(&c, 0), &all), Partial::empty(all.out.shape()));
        }

        #[test]
        fn one_flipped_route_changes_only_its_token_and_heads(
            c in case(),
            at in any::<prop::sample::Index>(),
        ) {
            let [near, _, all] = branches(&c, 0);
            let shape = routes(&c, 0).shape();
            let before = noisy_routes(shape, 2, false, c.seed);
            let flipped = indices(shape).nth(at.index(before.as_slice().len())).unwrap();
            let mut after = before.clone();
            after[flipped] = 1 - before[flipped];
            let (old, new) = (select(&before, &[&near, &all]), select(&after, &[&near, &all]));
            for [b, h, t] in indices(all.lse.shape()) {
                let row = [b, h, t];
                let served = [b, h / (c.heads / c.kv_heads), t] == flipped;
                let expected = match (served, after[flipped]) {
                    (false, _) => &old,
                    (true, 0) => &near,
                    (true, _) => &all,
                };
                prop_assert_eq!(new.out.row(row), expected.out.row(row));
                prop_assert_eq!(new.lse[row], expected.lse[row]);
            }
        }

        #[test]
        fn selecting_is_attention_with_a_reach_per_row(c in case()) {
            let [near, _, all] = branches(&c, c.sinks);
            let window = Window::new(c.window).unwrap();
            let reaches = [Reach::SinksAndWindow { sinks: c.sinks, window }, Reach::All];
            for router_heads in [1, c.kv_heads, c.heads] {
                let routes = noisy_routes([c.q.shape()[0], router_heads, c.tokens], 2, false, c.seed);
                let route = |b, h, t| routes[[b, router_head(h, router_heads, c.heads), t]];
                let routed = attention_where(&c.q, &c.k, &c.v, &c.options(), |b, h, t| {
                    Some(reaches[usize::from(route(b, h, t))])
                });
                prop_assert_eq!(select(&routes, &[&near, &all]), routed);
                let gated = attention_where(&c.q, &c.k, &c.v, &c.options(), |b, h, t| {
                    (route(b, h, t) == 1).then_some(Reach::All)
                });
                prop_assert_eq!(mask(&routes, &all), gated);
            }
        }
    }
}
