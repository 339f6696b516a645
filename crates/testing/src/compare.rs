//! The yardstick, and how differences are reported.

use bifocal::cubecl::client::Client;
use bifocal::{Element, Partial, Reach, Result};
use bifocal_reference as reference;

use crate::{
    case::Case,
    inputs::{Data, round},
};

/// A partial read back to the host.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Read {
    pub(crate) out: Vec<f32>,
    pub(crate) lse: Vec<f32>,
}

impl Read {
    pub(crate) fn new(client: &Client, partial: &Partial) -> Result<Self> {
        Ok(Self { out: partial.out.to_f32(client)?, lse: partial.lse.to_f32(client)? })
    }

    /// Bit for bit the same, NaN included.
    pub(crate) fn same_bits(&self, other: &Self) -> bool {
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        bits(&self.out) == bits(&other.out) && bits(&self.lse) == bits(&other.lse)
    }
}

/// What is right for a case, and how far off a kernel may be.
pub(crate) struct Expected {
    pub(crate) exact: reference::Partial<f64>,
    out_tolerance: f64,
    lse_tolerance: f64,
}

impl Expected {
    /// The oracle's answer in f64, with the tolerance measured: twice the error of the same computation in f32
    /// with its output rounded to the case's type (and its weights too, where tensor cores may compute it), plus a few
    /// roundings of the largest score and value.
    pub(crate) fn new(
        case: &Case,
        data: &Data,
        reach_of: impl Fn(usize, usize, usize) -> Option<Reach>,
    ) -> Self {
        let exact: reference::Partial<f64> = data.oracle(|weight| weight, &reach_of);
        let plain: reference::Partial<f32> = data.oracle(case.round_weight(), &reach_of);
        Self::of(case, &data.value, exact, &plain)
    }

    /// The oracle's answer, and the same computation in f32, to be told apart by where keys and values of a case come from.
    pub(crate) fn of(
        case: &Case,
        value: &[f32],
        exact: reference::Partial<f64>,
        plain: &reference::Partial<f32>,
    ) -> Self {
        let out_element = case.out_element();
        let plain_out = plain.out.as_slice().iter().map(|&x| round(out_element, x));
        let largest = value.iter().fold(0.0f64, |top, x| top.max(f64::from(x.abs())));
        // Scores are about this large, and each carries a rounding error in proportion.
        let score = 1.0 + f64::from(case.magnitude) * (case.head_dim as f64).sqrt();
        let roundings = 8.0 * Element::F32.epsilon() * score;
        let out_floor = (roundings + out_element.epsilon()) * (1.0 + largest);
        Self {
            out_tolerance: 2.0 * worst(exact.out.as_slice(), plain_out) + out_floor,
            lse_tolerance: 2.0 * worst(exact.lse.as_slice(), plain.lse.as_slice().iter().copied())
                + roundings,
            exact,
        }
    }

    /// The larger of what outputs and log-sum-exps may be off by.
    pub(crate) fn tolerance(&self) -> f64 {
        self.out_tolerance.max(self.lse_tolerance)
    }

    /// Whether a kernel's answer is within tolerance everywhere; NaN and infinities have to match exactly.
    pub(crate) fn accepts(&self, read: &Read) -> Result<(), String> {
        near("output", self.exact.out.as_slice(), &read.out, self.out_tolerance)?;
        near("log-sum-exp", self.exact.lse.as_slice(), &read.lse, self.lse_tolerance)
    }
}

/// The largest finite difference.
pub(crate) fn worst(exact: &[f64], found: impl Iterator<Item = f32>) -> f64 {
    exact
        .iter()
        .zip(found)
        .map(|(x, y)| (x - f64::from(y)).abs())
        .filter(|difference| difference.is_finite())
        .fold(0.0, f64::max)
}

/// Whether `found` is `exact` within `tolerance`; NaN matches NaN alone, an infinity itself alone.
pub(crate) fn near(what: &str, exact: &[f64], found: &[f32], tolerance: f64) -> Result<(), String> {
    if exact.len() != found.len() {
        return Err(format!("{what} has {} elements, expected {}", found.len(), exact.len()));
    }
    for (at, (&x, &y)) in exact.iter().zip(found).enumerate() {
        let y = f64::from(y);
        let same = x == y || (x.is_nan() && y.is_nan());
        let close = (x - y).abs() <= tolerance;
        if !same && !close {
            return Err(format!(
                "{what} {at} of {} is {y}, expected {x} (tolerance {tolerance:.2e})",
                exact.len()
            ));
        }
    }
    Ok(())
}

/// Two kernels' answers to the same question, within `tolerance` of each other.
pub(crate) fn agree(a: &Read, b: &Read, tolerance: f64) -> Result<(), String> {
    let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    near("output", &wide(&a.out), &b.out, tolerance)?;
    near("log-sum-exp", &wide(&a.lse), &b.lse, tolerance)
}

/// Turns an unexpected error into a refutation.
pub(crate) fn run<T>(result: Result<T>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}
