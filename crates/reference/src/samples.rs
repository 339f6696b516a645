//! Inputs for the tests of this crate.

use approx::{assert_abs_diff_eq, assert_relative_eq};
use bifocal_core::{Reach, Window};
use proptest::prelude::*;

use crate::{
    Array, Options, Partial,
    array::{add_scaled, dot},
    attention,
};

/// Numbers in [-1, 1) that depend on the seed alone (SplitMix64).
pub(crate) fn noise<const N: usize>(shape: [usize; N], seed: u64) -> Array<f64, N> {
    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
    Array::from_fn(shape, |_| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        (bits >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    })
}

/// Routes below `reaches`, and now and then an invalid one where `invalid` says so.
pub(crate) fn noisy_routes(shape: [usize; 3], reaches: usize, invalid: bool, seed: u64) -> Array<u8, 3> {
    noise(shape, seed).map(|x| {
        let unit = 0.5 * (x + 1.0);
        if invalid && unit > 0.9 { u8::MAX } else { (unit * reaches as f64) as u8 }
    })
}

/// Equal within 1e-12, in outputs and log-sum-exps, infinities included.
pub(crate) fn assert_close(a: &Partial<f64>, b: &Partial<f64>) {
    assert_eq!(a.out.shape(), b.out.shape());
    assert_abs_diff_eq!(a.out.as_slice(), b.out.as_slice(), epsilon = 1e-12);
    assert_abs_diff_eq!(a.lse.as_slice(), b.lse.as_slice(), epsilon = 1e-12);
}

/// A small attention problem.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) tokens: usize,
    pub(crate) window: usize,
    pub(crate) sinks: u32,
    pub(crate) seed: u64,
    pub(crate) q: Array<f64, 4>,
    pub(crate) k: Array<f64, 4>,
    pub(crate) v: Array<f64, 4>,
}

impl Case {
    pub(crate) fn options(&self) -> Options<f64> {
        Options::new(self.q.shape()[3])
    }

    pub(crate) fn attention(&self, reach: Reach) -> Partial<f64> {
        attention(&self.q, &self.k, &self.v, reach, &self.options())
    }
}

/// As many queries as keys, any head ratio, value dim unlike head dim, scores of a few units.
pub(crate) fn case() -> impl Strategy<Value = Case> {
    let shape = (1_usize..3, 1_usize..3, 1_usize..4, 1_usize..13);
    (shape, 1_usize..14, 0_u32..5, any::<u64>()).prop_map(
        |((batch, kv_heads, group, tokens), window, sinks, seed)| Case {
            heads: kv_heads * group,
            kv_heads,
            tokens,
            window,
            sinks,
            seed,
            q: noise([batch, kv_heads * group, tokens, 4], seed).map(|x| 3.0 * x),
            k: noise([batch, kv_heads, tokens, 4], seed ^ 1).map(|x| 3.0 * x),
            v: noise([batch, kv_heads, tokens, 3], seed ^ 2),
        },
    )
}

/// An attention problem that is differentiated: any two lengths, so that rows without keys are among them, any reach,
/// scale, softcap and sink logits. A reach per row is one of two, or none.
#[derive(Clone, Debug)]
pub(crate) struct GradientCase {
    pub(crate) q: Array<f64, 4>,
    pub(crate) k: Array<f64, 4>,
    pub(crate) v: Array<f64, 4>,
    pub(crate) d_out: Array<f64, 4>,
    pub(crate) options: Options<f64>,
    pub(crate) reaches: [Reach; 2],
    pub(crate) seed: u64,
}

impl GradientCase {
    /// About a third of the rows each: the first reach, the second, not computed.
    pub(crate) fn reach_of(&self) -> impl Fn(usize, usize, usize) -> Option<Reach> + use<> {
        let [batch, heads, query_len, _] = self.q.shape();
        let routes = noisy_routes([batch, heads, query_len], 3, false, self.seed ^ 4);
        let reaches = self.reaches;
        move |b, h, t| reaches.get(usize::from(routes[[b, h, t]])).copied()
    }
}

pub(crate) fn gradient_case() -> impl Strategy<Value = GradientCase> {
    let shape = (1_usize..3, 1_usize..3, 1_usize..4, 1_usize..9, 1_usize..9);
    let scale = prop_oneof![Just(0.5), Just(1.7), Just(-0.8)];
    let sinks = prop_oneof![Just(None), Just(Some(0.3)), Just(Some(f64::NEG_INFINITY))];
    let softcap = prop_oneof![Just(None), Just(Some(1.5)), Just(Some(20.0))];
    (shape, scale, softcap, sinks, [reach(), reach()], any::<u64>()).prop_map(
        |((batch, kv_heads, group, query_len, key_len), scale, softcap, sink, reaches, seed)| {
            let heads = kv_heads * group;
            // One head differs from the next.
            let sink_logits = sink.map(|sink| (0..heads).map(|h| sink - h as f64).collect());
            GradientCase {
                q: noise([batch, heads, query_len, 4], seed).map(|x| 2.0 * x),
                k: noise([batch, kv_heads, key_len, 4], seed ^ 1).map(|x| 2.0 * x),
                v: noise([batch, kv_heads, key_len, 3], seed ^ 2),
                d_out: noise([batch, heads, query_len, 3], seed ^ 3),
                options: Options { scale, softcap, sink_logits, ..Options::new(4) },
                reaches,
                seed,
            }
        },
    )
}

/// Every kind of reach; windows of one key, and windows longer than the sequences, are among them.
fn reach() -> impl Strategy<Value = Reach> {
    (0..5, 1_usize..11, 0_u32..4).prop_map(|(kind, keys, sinks)| {
        let window = Window::new(keys).unwrap();
        match kind {
            0 => Reach::Window(window),
            1 => Reach::SinksAndWindow { sinks, window },
            2 => Reach::Far { sinks, window },
            3 => Reach::All,
            _ => Reach::NonCausal,
        }
    })
}

/// Compares a gradient with central differences of the loss: along one direction through all elements, where every
/// wrong element shows, and along up to four elements one by one, which say where.
pub(crate) fn assert_gradient<const N: usize>(
    x: &Array<f64, N>,
    gradient: &Array<f64, N>,
    loss: impl Fn(&Array<f64, N>) -> f64,
) {
    assert_eq!(x.shape(), gradient.shape());
    let elements = x.as_slice().len();
    let unit = |at| Array::new([elements], (0..elements).map(|i| f64::from(u8::from(i == at))).collect());
    let single = (0..elements).step_by(elements.div_ceil(4).max(1)).map(unit);
    for direction in [noise([elements], 7)].into_iter().chain(single) {
        let at = |step: f64| {
            let mut moved = x.clone().into_vec();
            add_scaled(&mut moved, step, direction.as_slice());
            loss(&Array::new(x.shape(), moved))
        };
        // The fourth-order difference: its own error is far below the tolerance at a step that rounding does not blur.
        let step = 1e-4;
        let difference = (8.0 * (at(step) - at(-step)) - (at(2.0 * step) - at(-2.0 * step))) / (12.0 * step);
        let expected = dot(gradient.as_slice(), direction.as_slice());
        assert_relative_eq!(expected, difference, max_relative = 1e-7, epsilon = 1e-9);
    }
}
