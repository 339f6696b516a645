//! Decoding: caches of keys and values, and attention steps over them whose plan knows which heads look far.
//!
//! A step costs the bytes of keys and values that it reads. A [`KvCache`] holds them, contiguous, in pages, or in a ring
//! that forgets what has left a window ([`Layout`]). A [`SummaryCache`] keeps beside them what is remembered of keys that left a
//! window: a state of linear attention, moments of keys. A [`DecodePlan`] has room for the steps of one batch: in each it finds
//! on the device, from routes and lengths, which keys every kv head needs, and deals them to the device's processors in
//! proportion to their bytes, so that the one head that looks far is read by all of them. Grids and buffers do not
//! depend on routes or lengths: a step that was [captured](bifocal_core::device::capture) in a graph may be replayed with new
//! ones.
//!
//! [`DecodeRoutine`] says how: `mma` on tensor cores, `planes` where units run in planes of 32, `portable` everywhere.

mod book;
mod cache;
mod layout;
mod reaches;
mod step;
mod summary;
mod view;

pub use cache::{Batch, KvCache, KvShape, NewTokens, SequenceId, Snapshot};
pub use layout::Layout;
pub use reaches::Reaches;
pub use step::{DecodePlan, DecodeRoutine, MAX_QUERIES, Step, sources, supports};
pub use summary::{SummaryCache, SummarySnapshot};
pub use view::{CacheView, PageTables};
