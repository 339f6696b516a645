//! Inputs for the tests of this crate.

use approx::assert_abs_diff_eq;
use bifocal_core::Reach;
use proptest::prelude::*;

use crate::{Array, Options, Partial, attention};

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
