use core::fmt::Display;

use crate::{Element, Refusals};

/// What every fallible call of Bifocal returns.
pub type Result<T, E = Error> = core::result::Result<T, E>;

/// Why a call was refused. Messages say what was expected and what was found.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor's shape does not fit the others.
    #[error("{tensor} has shape {found:?}, expected {expected}")]
    Shape {
        /// Which tensor.
        tensor: &'static str,
        /// The shape it should have, in words or numbers.
        expected: String,
        /// The shape it has.
        found: Vec<usize>,
    },
    /// A tensor's elements are of another type than the others'.
    #[error("{tensor} holds {found}, expected {expected}")]
    Element {
        /// Which tensor.
        tensor: &'static str,
        /// The type it should have.
        expected: Element,
        /// The type it has.
        found: Element,
    },
    /// The last dimension of a tensor is not contiguous.
    #[error("the last dimension of {tensor} has stride {found}, expected 1: make it contiguous first")]
    Stride {
        /// Which tensor.
        tensor: &'static str,
        /// The stride found, in elements.
        found: usize,
    },
    /// A tensor that has to be contiguous is not.
    #[error("{tensor} has strides {found:?}, expected the contiguous {expected:?}")]
    NotContiguous {
        /// Which tensor.
        tensor: &'static str,
        /// The strides of a contiguous tensor of this shape, in elements.
        expected: Vec<usize>,
        /// The strides found.
        found: Vec<usize>,
    },
    /// Rows of a tensor that is written share memory.
    #[error("{tensor} of shape {shape:?} has strides {found:?}: its rows share memory")]
    Overlap {
        /// Which tensor.
        tensor: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides, in elements.
        found: Vec<usize>,
    },
    /// Shape and strides reach beyond the memory that a tensor has.
    #[error("{tensor} needs {expected} bytes of device memory, its buffer has {found}")]
    Buffer {
        /// Which tensor.
        tensor: &'static str,
        /// Bytes that shape and strides reach.
        expected: u64,
        /// Bytes there.
        found: u64,
    },
    /// A tensor lives on another device than the one asked to compute.
    #[error("{tensor} lives on {found}, expected the memory of {expected}")]
    DeviceMismatch {
        /// Which tensor.
        tensor: &'static str,
        /// The device asked to compute.
        expected: String,
        /// The device that holds the tensor.
        found: String,
    },
    /// The device asked for is not there, or the build leaves its runtime out.
    #[error("no {device} device: {reason}")]
    DeviceUnavailable {
        /// `cpu`, `wgpu` or `cuda`.
        device: String,
        /// What the runtime says.
        reason: String,
    },
    /// A dimension is zero.
    #[error("{dimension} is 0, expected at least 1")]
    EmptyDimension {
        /// Which dimension.
        dimension: &'static str,
    },
    /// Query heads are not a whole multiple of kv heads.
    #[error("{heads} query heads cannot share {kv_heads} kv heads: expected a whole multiple")]
    HeadRatio {
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: usize,
    },
    /// A window of zero keys.
    #[error("a window has 0 keys, expected at least 1 (the query's own)")]
    EmptyWindow,
    /// A route names a reach that is not there.
    #[error(
        "route {found} of batch {batch}, head {head}, token {token} is out of range, expected 0..{reaches}"
    )]
    RouteOutOfRange {
        /// The route.
        found: u8,
        /// How many reaches there are.
        reaches: usize,
        /// Where: the sequence.
        batch: usize,
        /// Where: the router head.
        head: usize,
        /// Where: the token.
        token: usize,
    },
    /// Cumulative lengths of packed sequences do not count up from 0.
    #[error("entry {at} of the cumulative {of} lengths is {found}, expected {expected}")]
    Cumulative {
        /// `query` or `key`.
        of: &'static str,
        /// Which entry.
        at: usize,
        /// The entry.
        found: usize,
        /// What it should be.
        expected: String,
    },
    /// Scores that are NaN cannot be routed.
    #[error("{count} of {total} routes are invalid: their scores are NaN")]
    InvalidScores {
        /// Token-heads without a valid route.
        count: usize,
        /// All token-heads.
        total: usize,
    },
    /// An option has a value that makes no sense.
    #[error("{option} is {found}, expected {expected}")]
    Option {
        /// Which option.
        option: &'static str,
        /// Its value.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// A size is beyond what indices can address.
    #[error("{size} {what}, expected at most {limit}")]
    TooLarge {
        /// What is counted.
        what: &'static str,
        /// How many.
        size: u128,
        /// How many are possible.
        limit: u128,
    },
    /// A cache of keys and values has no room left.
    #[error("the cache is full: {needed} {what} needed, {free} free")]
    CacheFull {
        /// What it has run out of.
        what: &'static str,
        /// How many are needed.
        needed: usize,
        /// How many there are.
        free: usize,
    },
    /// A sequence was freed, or belongs to another cache.
    #[error("{sequence} is not in this cache: it was freed, or is another cache's")]
    UnknownSequence {
        /// Which sequence.
        sequence: String,
    },
    /// A page table names a page that is not there.
    #[error("entry {at} of the page table of sequence {sequence} is {found}, expected 0..{pages}")]
    PageOutOfRange {
        /// Where: the sequence.
        sequence: usize,
        /// Where: the entry.
        at: usize,
        /// The entry.
        found: u32,
        /// How many pages there are.
        pages: usize,
    },
    /// Keys are asked for that a ring has overwritten.
    #[error("keys from position {needed} on are needed, the ring has overwritten those before {first}")]
    Overwritten {
        /// The first position that is needed.
        needed: usize,
        /// The first position that is still there.
        first: usize,
    },
    /// Keys are asked for one by one that a summary of keys has for good.
    #[error("keys from position {needed} on are needed one by one, those before {covered} are summed up")]
    SummedUp {
        /// The first position that is needed.
        needed: usize,
        /// The first position that is not summed up.
        covered: usize,
    },
    /// A saved sequence cannot be read, or was saved from a cache of another shape.
    #[error("the snapshot {found}, expected {expected}")]
    Snapshot {
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// No routine of an operator can run the problem on the device.
    #[error("no routine of {operator} can run this problem here: {refusals}")]
    Refused {
        /// Which operator.
        operator: &'static str,
        /// What each routine says.
        refusals: Refusals,
    },
    /// The runtime failed to compile, launch or read.
    #[error("the runtime failed: {0}")]
    Runtime(String),
}

impl Error {
    /// An [`Error::Option`].
    pub fn option(option: &'static str, found: impl Display, expected: impl Into<String>) -> Self {
        Self::Option { option, found: found.to_string(), expected: expected.into() }
    }

    /// An [`Error::Shape`].
    pub fn shape(tensor: &'static str, expected: impl Into<String>, found: &[usize]) -> Self {
        Self::Shape { tensor, expected: expected.into(), found: found.to_vec() }
    }
}
