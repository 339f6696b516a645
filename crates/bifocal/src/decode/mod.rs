//! Decoding: a cache of keys and values, and steps over it whose plan knows which heads look far.
//!
//! ```
//! use bifocal::{
//!     Aha, Element, FixedRouter, Partial, Router, Tensor, Window,
//!     decode::{DecodePlan, KvCache, KvShape, Layout, Step, reaches_of},
//! };
//!
//! let client = bifocal::open("cpu")?;
//! let shape = KvShape { kv_heads: 2, head_dim: 64, value_dim: 64, element: Element::F32 };
//! let mut cache = KvCache::new(&client, shape, Layout::paged(4, 1024, 16, 64)?)?;
//! let sequence = cache.start(&client)?;
//! let prompt = Tensor::filled(&client, [1, 2, 100, 64], Element::F32, 0.5)?;
//! cache.append(&client, &[sequence], prompt.view(), prompt.view())?;
//!
//! // One step: the token's key and value are in the cache before its query asks.
//! let token = Tensor::filled(&client, [1, 2, 1, 64], Element::F32, 0.5)?;
//! cache.append(&client, &[sequence], token.view(), token.view())?;
//! let batch = cache.batch(&client, &[sequence])?;
//! let view = cache.view(&batch)?;
//! let problem = view.problem([1, 2, 1, 64], Element::F32)?;
//! let plan = DecodePlan::new(&client, &problem)?;
//! let reaches = reaches_of(&client, &Aha::new(Window::aha(16)?).branches())?;
//! let hidden = Tensor::filled(&client, [1, 1, 32], Element::F32, 0.0)?;
//! let routes = FixedRouter::new(vec![0, 1], 2)?.route(&client, hidden.view())?.routes;
//! let partial = Partial::empty(&client, &problem, Element::F32);
//! plan.attend(&client, &view, &Step::new(token.view(), &reaches).with_routes(&routes), &partial)?;
//! assert_eq!(partial.out.to_f32(&client)?.len(), 2 * 64);
//! # Ok::<(), bifocal::Error>(())
//! ```

mod qada;
mod rattention;

use bifocal_core::{Result, device::AttentionOperator};
use cubecl::client::Client;

pub use self::{
    qada::QadaDecoder,
    rattention::{RattentionDecoder, RattentionQueries},
};
pub use bifocal_decode::{
    Batch, CacheView, DecodePlan, DecodeRoutine, KvCache, KvShape, Layout, MAX_QUERIES, NewTokens,
    PageTables, Reaches, SequenceId, Snapshot, Step, SummaryCache, SummarySnapshot, supports,
};

/// A cache with RATTENTION's states.
pub type LinearCache = SummaryCache<crate::LinearAttention>;

/// A cache with the moments of keys that QAdA decides by.
pub type MomentCache = SummaryCache<crate::MomentGate>;

/// What the branches of a system see, by route: [`Aha::branches`](crate::Aha::branches),
/// [`MultiWindow::branches`](crate::MultiWindow::branches). L2A's global branch is `[None, Some(Reach::All)]`.
///
/// # Errors
/// As [`Reaches::new`].
pub fn reaches_of(client: &Client, branches: &[&dyn AttentionOperator]) -> Result<Reaches> {
    let list: Vec<_> = branches.iter().map(|branch| Some(branch.reach())).collect();
    Reaches::new(client, &list)
}
