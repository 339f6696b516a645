use cubecl::{client::Client, server::Handle};

use super::{Tensor, TensorView};
use crate::{Element, Error, Problem, Result, Window};

/// What is remembered of keys that attention no longer reads one by one: so many `f32` per sequence, whatever the context.
///
/// Keys are summed up in their order and never taken out again, for what was added to a float cannot be subtracted
/// exactly. A cache therefore keeps summaries that lag behind the window (see `SummaryCache` in `bifocal-decode`).
pub trait Summary {
    /// The window that keys leave to be summed up, and how many tokens at the start never are.
    fn outside(&self) -> (Window, usize);

    /// How many numbers each part of a summary has, for a sequence with the kv heads and dims of `problem`. All zeros is a
    /// summary of no key.
    ///
    /// # Errors
    /// [`Error::Refused`] when the device cannot sum up such keys.
    fn parts(&self, client: &Client, problem: &Problem) -> Result<Vec<usize>>;

    /// The summary of `keys` keys, which are summed up in `parts`, and of further ones: `key [1, Hk, N, D]` and
    /// `value [1, Hk, N, Dv]`, in new memory.
    ///
    /// # Errors
    /// As [`TensorView::check`]; [`Error::TooLarge`].
    fn fold(
        &self,
        client: &Client,
        keys: usize,
        parts: &[Tensor<1>],
        key: TensorView<'_, 4>,
        value: TensorView<'_, 4>,
    ) -> Result<Vec<Tensor<1>>>;
}

/// Words of a span.
pub const SPAN: usize = 4;

/// What a decode step reads of keys that left the window: the summaries of a batch, and the keys that these lack.
#[derive(Clone, Debug)]
pub struct Summaries<'a> {
    /// The parts of a [`Summary`], `f32 [sequences of the cache, numbers]` each.
    pub parts: &'a [Tensor<2>],
    /// `u32 [B, 4]`: a sequence's row in the parts; how many keys are summed up there, how many have left the window since,
    /// and the position of the first of these.
    pub spans: Handle,
    /// `[B, Hk, room, D]`: the keys that have left since, one after the other.
    pub key: Tensor<4>,
    /// `[B, Hk, room, Dv]`: their values.
    pub value: Tensor<4>,
}

impl Summaries<'_> {
    /// Keys that there is room for beside those that are summed up.
    pub fn room(&self) -> usize {
        self.key.shape()[2]
    }

    /// Checks that there are parts of so many numbers, and keys and values for `problem`, on the client's device.
    ///
    /// # Errors
    /// [`Error::Shape`] for other parts or a batch of another length; as [`TensorView::check`].
    pub fn check(&self, client: &Client, problem: &Problem, parts: &[usize]) -> Result<()> {
        let Problem { batch, kv_heads, head_dim, value_dim, element, .. } = *problem;
        let found: Vec<usize> = self.parts.iter().map(|part| part.shape()[1]).collect();
        if found != parts {
            return Err(Error::shape("the parts of a summary", format!("{parts:?}"), &found));
        }
        for part in self.parts {
            part.view().check("a summary", client, part.shape(), Element::F32)?;
            part.view().check_contiguous("a summary")?;
        }
        let spans = self.spans.size_in_used() as usize / (4 * SPAN);
        if spans != batch {
            return Err(Error::shape("the spans of a summary", format!("[{batch}, {SPAN}]"), &[spans, SPAN]));
        }
        let room = self.room();
        self.key.view().check("keys beyond a summary", client, [batch, kv_heads, room, head_dim], element)?;
        let shape = [batch, kv_heads, room, value_dim];
        self.value.view().check("values beyond a summary", client, shape, element)
    }
}
