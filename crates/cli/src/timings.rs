//! What a benchmark measured, as JSON: `bifocal bench` writes it, the scripts in `benches/peers` write the same names
//! for other libraries, and `bifocal compare` reads both.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Report {
    pub(crate) device: String,
    /// The device's own name.
    pub(crate) name: String,
    /// Whose attention, and its version; Bifocal's own unless there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) library: Option<String>,
    pub(crate) element: String,
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) window: usize,
    /// Queries per sequence of a decode step, over keys of the length; attention over whole sequences unless there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) queries: Option<usize>,
    /// Tokens per page of a decode step's cache; contiguous unless there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) page_size: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) softcap: Option<f32>,
    /// How routes were drawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gates: Option<String>,
    /// The share of token-heads that was asked to look far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) far_share: Option<f64>,
    /// The share of tokens that was asked to look far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) far_tokens: Option<f64>,
    /// Length of the hidden states that the router reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) model_dim: Option<usize>,
    pub(crate) runs: u32,
    pub(crate) timings: Vec<Timing>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Timing {
    pub(crate) case: String,
    pub(crate) length: usize,
    /// What attention ran by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) routine: Option<String>,
    /// The first call: it compiles the kernels, or loads them from the cache.
    pub(crate) first_call_ms: f64,
    pub(crate) median_ms: f64,
    pub(crate) fastest_ms: f64,
    /// The share of routes that came out far, of token-heads or, for L2A, of tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) far_share: Option<f64>,
    /// 4 D for every pair of a query and a key that its route shows, 14 D with the backward pass; none for router and plan.
    pub(crate) useful_flop: Option<f64>,
    pub(crate) useful_gflops: Option<f64>,
    /// Every input read once and every output written once; of a decode step the keys and values that some row of a kv head
    /// sees, queries and outputs.
    #[serde(default)]
    pub(crate) useful_bytes: Option<f64>,
    /// Device memory that the call holds beside its inputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) memory_bytes: Option<u64>,
    /// Keys per chunk of a decode step that is cut in chunks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) chunk: Option<usize>,
    /// The rate of useful bytes over what a copy of the cache reaches in the same run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) share_of_copy: Option<f64>,
    /// Against the dense decode step in the same run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) speedup: Option<f64>,
    /// The median of the same call when it is replayed from a graph.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) replayed_ms: Option<f64>,
}
