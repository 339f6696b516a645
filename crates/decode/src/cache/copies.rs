use bifocal_core::{
    Error, Result,
    device::{
        Tensor,
        launch::{elements, grid, words},
    },
};
use cubecl::client::Client;

use super::{KvCache, KvShape, NewTokens, SequenceId, kernels::gather_kernel, width};

impl KvCache {
    /// The tokens of a sequence as contiguous tensors, key `[1, Hk, T, D]` and value `[1, Hk, T, Dv]`: what the attention
    /// operators read when a further chunk of a prompt is prefilled.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::EmptyDimension`] without tokens; [`Error::Overwritten`] when a ring does not
    /// have all of them; [`Error::DeviceMismatch`].
    pub fn gather(&self, client: &Client, sequence: SequenceId) -> Result<(Tensor<4>, Tensor<4>)> {
        let slot = self.slot(sequence)?;
        let tokens = self.book.length(slot);
        if tokens == 0 {
            return Err(Error::EmptyDimension { dimension: "length of a sequence" });
        }
        self.book.check_kept(slot, 0, 0)?;
        self.check_device(client)?;
        Ok(self.tokens_from(client, &self.key, slot, 0).into())
    }

    /// Forks of these sequences, in their order, in a cache of their own: one of the same shape and layout, which holds nothing
    /// else and shares no page with this one. All tokens are copied at once, on the device.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::CacheFull`] when they share more pages here than are free there;
    /// [`Error::Overwritten`] for a ring with sinks that has gone round; [`Error::DeviceMismatch`].
    pub fn fork_apart(&self, client: &Client, sequences: &[SequenceId]) -> Result<(Self, Vec<SequenceId>)> {
        self.check_device(client)?;
        let slots = self.slots(sequences)?;
        let mut apart = Self::new(client, self.shape, self.layout())?;
        let fork = |slot| apart.take_over(client, self, slot);
        let forks = slots.into_iter().map(fork).collect::<Result<_>>()?;
        Ok((apart, forks))
    }

    /// Starts a sequence with what the one in `slot` of another cache of this layout has.
    pub(crate) fn take_over(&mut self, client: &Client, other: &Self, slot: usize) -> Result<SequenceId> {
        let (length, from) = (other.book.length(slot), other.book.kept_from(slot));
        if length == 0 {
            return self.start(client);
        }
        if other.book.layout().fixed_pages > 0 {
            other.book.check_kept(slot, 0, 0)?;
        }
        // Behind a window of one key there may be nothing left to copy.
        let first = from.min(length - 1);
        let [key, value] = other.tokens_from(client, &other.key, slot, first);
        let mut last = NewTokens::new(key.view(), value.view());
        let plain_key = other.plain_key.as_ref().filter(|_| self.plain_key.is_some());
        let plain_key = plain_key.map(|pool| other.tokens_from(client, pool, slot, first));
        last.plain_key = plain_key.as_ref().map(|[key, _]| key.view());
        let sequence = self.start_with(client, length, &last)?;
        self.book.forget(sequence.slot as usize, from);
        Ok(sequence)
    }

    /// The tokens in a slot from position `first` on, their keys from one of the pools: `[1, Hk, T, D]` and `[1, Hk, T, Dv]`.
    fn tokens_from(&self, client: &Client, pool: &Tensor<4>, slot: usize, first: usize) -> [Tensor<4>; 2] {
        let KvShape { kv_heads, head_dim, value_dim, element } = self.shape;
        let tokens = self.book.length(slot) - first;
        let key = Tensor::empty(client, [1, kv_heads, tokens, head_dim], element);
        let value = Tensor::empty(client, [1, kv_heads, tokens, value_dim], element);
        let slots = client.create_from_slice(bytemuck::bytes_of(&(slot as u32)));
        let width = width([key.view(), value.view(), pool.view(), self.value.view()]);
        let (cubes, units) = grid(client, kv_heads * tokens * head_dim.max(value_dim) / width);
        // SAFETY: the sequence has so many tokens, and the tensors room for them.
        unsafe {
            gather_kernel::launch_unchecked(
                client,
                cubes,
                units,
                elements(pool.view()),
                elements(self.value.view()),
                words(&self.tables),
                words(&slots),
                elements(key.view()),
                elements(value.view()),
                self.shape_launch([1, tokens], width, true),
                first as u32,
                self.places(),
                element.into(),
                width,
            );
        }
        [key, value]
    }
}
