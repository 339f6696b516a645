//! What layers remember of the tokens before, so that a step costs a step.

mod qada;
mod rattention;
mod selected;
mod store;
mod summed;

use bifocal::{Error, MomentGate, Problem, Reach, Result, Window, decode::KvShape};
use burn::{nn::RotaryEncoding, tensor::Tensor};

use self::{qada::QadaCache, rattention::RattentionCache, selected::Selected};
use crate::{
    AttentionOptions, Projections, Routing,
    place::{Origin, Place, element},
};

/// What one layer remembers of a batch of sequences: keys and values, and whatever else its kind of attention needs for the
/// next tokens. Made by a module's `cache`, for its `forward_cached`, which appends: every call takes the next tokens of every
/// sequence, a prompt or a single one, and gives what a forward pass over all tokens gives for them. [`truncate`](Self::truncate)
/// takes tokens back, [`fork`](Self::fork) goes on in two ways, [`reset`](Self::reset) starts anew.
///
/// | module | what is kept |
/// |---|---|
/// | [`CausalAttention`](crate::CausalAttention) with a window | its last keys and values, in a ring: a longer context takes no more memory |
/// | without one, [`AhaAttention`](crate::AhaAttention), [`MultiWindowAttention`](crate::MultiWindowAttention) | keys and values, `capacity` of them |
/// | [`L2aAttention`](crate::L2aAttention) | a ring for the local sub-layer, `capacity` keys and values for the global one |
/// | [`QadaAttention`](crate::QadaAttention) | `capacity` keys and values, and the moments of keys that have left the window |
/// | [`RattentionAttention`](crate::RattentionAttention), [`AhaLinearAttention`](crate::AhaLinearAttention) | a ring, and the linear branch's state |
///
/// Up to 16 tokens after the first are a step of [`bifocal::decode`], whose cost is that of the keys that their routes show. More
/// of them, and the first ones, run the operators of the forward pass.
///
/// A cache is for inference: there is no gradient through it, and a device with autodiff is an error. Arguments are checked
/// before anything changes. When the device refuses or fails halfway, the cache is left unfit, and later calls say so until
/// it is truncated to the [`tokens`](Self::tokens) that it had, or further.
///
/// ```
/// use bifocal_burn::AhaAttentionConfig;
/// use burn::tensor::{Device, Distribution, Tensor};
///
/// let device = Device::flex();
/// let attention = AhaAttentionConfig::new(32, 4, 8).init(&device)?;
/// let hidden = Tensor::<3>::random([1, 20, 32], Distribution::Default, &device);
/// let mut cache = attention.cache(1, 64)?;
/// attention.forward_cached(hidden.clone().narrow(1, 0, 19), &mut cache)?;
/// let last = attention.forward_cached(hidden.narrow(1, 19, 1), &mut cache)?;
/// assert_eq!((last.output.dims(), cache.tokens()), ([1, 1, 32], 20));
///
/// // Two guesses of a draft model, of which the first is right.
/// let guesses = Tensor::<3>::random([1, 2, 32], Distribution::Default, &device);
/// attention.forward_cached(guesses, &mut cache)?;
/// cache.truncate(21)?;
/// let other = cache.fork()?;
/// assert_eq!((cache.tokens(), other.tokens()), (21, 21));
/// # Ok::<(), bifocal_burn::Error>(())
/// ```
#[derive(Debug)]
pub struct LayerCache {
    place: Place,
    batch: usize,
    capacity: usize,
    tokens: usize,
    parts: Parts,
}

#[derive(Debug)]
// There are as many as layers.
#[allow(clippy::large_enum_variant)]
enum Parts {
    /// Every row sees the reach that its route names.
    Selected(Selected),
    /// L2A's local and global sub-layer.
    InSeries([Selected; 2]),
    Qada(QadaCache),
    /// A window and a linear state, of AHA over a linear far branch as well.
    Rattention(RattentionCache),
}

impl LayerCache {
    /// For an attention of one's own behind these projections: by [`attend`](Self::attend), every row sees what its route
    /// names of `reaches`, nothing where that is `None`. There is room for `capacity` tokens of each of `batch` sequences.
    ///
    /// # Errors
    /// [`Error::Option`] for reaches that are not causal, none, or `None` as the last, and for devices without Bifocal kernels;
    /// [`Error::EmptyDimension`], [`Error::TooLarge`].
    pub fn new(
        projections: &Projections,
        reaches: &[Option<Reach>],
        batch: usize,
        capacity: usize,
    ) -> Result<Self> {
        Self::with(projections, [batch, capacity], |place, shape, size| {
            Ok(Parts::Selected(Selected::new(place, shape, size, reaches)?))
        })
    }

    /// L2A's: the local sub-layer's reach, and what the global one's routes show.
    pub(crate) fn in_series(
        projections: &Projections,
        [local, global]: [&[Option<Reach>]; 2],
        size: [usize; 2],
    ) -> Result<Self> {
        Self::with(projections, size, |place, shape, size| {
            let part = |reaches| Selected::new(place, shape, size, reaches);
            Ok(Parts::InSeries([part(local)?, part(global)?]))
        })
    }

    pub(crate) fn qada(projections: &Projections, gate: MomentGate, size: [usize; 2]) -> Result<Self> {
        Self::with(projections, size, |place, shape, size| {
            Ok(Parts::Qada(QadaCache::new(place, shape, size, gate)?))
        })
    }

    /// RATTENTION's, and that of AHA over a linear far branch.
    pub(crate) fn rattention(projections: &Projections, window: Window, size: [usize; 2]) -> Result<Self> {
        Self::with(projections, size, |place, shape, size| {
            Ok(Parts::Rattention(RattentionCache::new(place, shape, size, window)?))
        })
    }

    fn with(
        projections: &Projections,
        size: [usize; 2],
        parts: impl FnOnce(&Place, KvShape, [usize; 2]) -> Result<Parts>,
    ) -> Result<Self> {
        let weight = projections.q_proj.weight.val();
        let place = Place::of(&[Origin::of("the weights", &weight)])?;
        let shape = KvShape {
            kv_heads: projections.n_kv_heads,
            head_dim: projections.head_dim,
            value_dim: projections.head_dim,
            element: element("the weights", weight.dtype())?,
        };
        let [batch, capacity] = size;
        let parts = parts(&place, shape, size)?;
        Ok(Self { place, batch, capacity, tokens: 0, parts })
    }

    /// Tokens of each sequence so far, and so the position of the next one.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens that each sequence may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Bytes of device memory for keys, values and states, whether there are tokens yet or not.
    pub fn bytes(&self) -> usize {
        match &self.parts {
            Parts::Selected(selected) => selected.store.bytes(),
            Parts::InSeries(parts) => parts.iter().map(|part| part.store.bytes()).sum(),
            Parts::Qada(qada) => qada.cache.bytes(),
            Parts::Rattention(rattention) => rattention.cache.bytes(),
        }
    }

    /// Another cache with the same tokens: what goes on in one does not change the other. It takes as much memory again, and copies
    /// on the device the keys, values and states that are there.
    ///
    /// # Errors
    /// [`Error::Option`] after a step that failed.
    pub fn fork(&self) -> Result<Self> {
        self.check_whole()?;
        let Self { ref place, batch, capacity, tokens, .. } = *self;
        let parts = match &self.parts {
            Parts::Selected(selected) => Parts::Selected(selected.fork(place)?),
            Parts::InSeries([local, global]) => Parts::InSeries([local.fork(place)?, global.fork(place)?]),
            Parts::Qada(qada) => Parts::Qada(qada.fork(place)?),
            Parts::Rattention(rattention) => Parts::Rattention(rattention.fork(place)?),
        };
        Ok(Self { place: place.clone(), batch, capacity, tokens, parts })
    }

    /// Takes back all tokens of every sequence but the first `tokens`, such as a draft model's guesses that were rejected. What
    /// comes next is as if they had never come; only sums over keys that were summed up since may be rounded otherwise.
    ///
    /// Where keys leave a ring, the last 16 tokens can be taken back at any time, further ones as long as nothing that is needed
    /// again was overwritten, and all of them ([`reset`](Self::reset)). Other caches go back to anywhere.
    ///
    /// # Errors
    /// [`Error::Option`] when there are fewer tokens; [`Error::Overwritten`] and [`Error::SummedUp`] when a ring has no longer
    /// what the next token would see. The cache is then as it was.
    pub fn truncate(&mut self, tokens: usize) -> Result<()> {
        self.check_truncate(tokens)?;
        let place = &self.place;
        match &mut self.parts {
            Parts::Selected(selected) => selected.store.truncate(place, tokens)?,
            Parts::InSeries(parts) => {
                parts.iter_mut().try_for_each(|part| part.store.truncate(place, tokens))?
            }
            Parts::Qada(qada) => qada.truncate(place, tokens)?,
            Parts::Rattention(rattention) => rattention.truncate(place, tokens)?,
        }
        self.tokens = tokens;
        Ok(())
    }

    /// Checks all that [`truncate`](Self::truncate) does: the caches of a model's layers are so truncated all or none.
    ///
    /// # Errors
    /// As [`truncate`](Self::truncate).
    pub fn check_truncate(&self, tokens: usize) -> Result<()> {
        if tokens > self.tokens {
            let expected = format!("at most the {} that the cache has", self.tokens);
            return Err(Error::option("tokens to truncate to", tokens, expected));
        }
        let place = &self.place;
        match &self.parts {
            Parts::Selected(selected) => selected.store.check_truncate(place, tokens),
            Parts::InSeries(parts) => {
                parts.iter().try_for_each(|part| part.store.check_truncate(place, tokens))
            }
            Parts::Qada(qada) => qada.check_truncate(place, tokens),
            Parts::Rattention(rattention) => rattention.check_truncate(place, tokens),
        }
    }

    /// Takes back every token: other sequences begin in the same memory.
    ///
    /// # Errors
    /// Those of the device.
    pub fn reset(&mut self) -> Result<()> {
        self.truncate(0)
    }

    /// Checks that `hidden [B, T, M]` may be the next tokens, for these projections and this table of rotary positions. Gives
    /// the position of the first of them.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::EmptyDimension`] for shapes that do not fit projections or cache;
    /// [`Error::TooLarge`] beyond the capacity or the table; [`Error::DeviceMismatch`]; [`Error::Option`] with autodiff, and
    /// after a step that failed.
    pub fn check(
        &self,
        projections: &Projections,
        hidden: &Tensor<3>,
        rope: Option<&RotaryEncoding>,
    ) -> Result<usize> {
        projections.check(self.tokens, hidden, rope)?;
        let weight = projections.q_proj.weight.val();
        let origins = [Origin::of("the weights", &weight), Origin::of("the hidden states", hidden)];
        let [batch, tokens, model_dim] = hidden.dims();
        if batch != self.batch {
            let expected = format!("[{}, T, {model_dim}], as the cache", self.batch);
            return Err(Error::shape("the hidden states", expected, &hidden.dims()));
        }
        self.check_next(&origins, tokens)?;
        Ok(self.tokens)
    }

    /// Checks where so many more tokens are, and that they have room.
    fn check_next(&self, origins: &[Origin], tokens: usize) -> Result<()> {
        let place = Place::of(origins)?;
        if place.has_autodiff() {
            let expected = "off: nothing that a cache holds has a gradient";
            return Err(Error::option("autodiff", "on", expected));
        }
        if place.device() != self.place.device() {
            let [expected, found] = [&self.place, &place].map(|place| format!("{:?}", place.device()));
            return Err(Error::DeviceMismatch { tensor: "a step of the cache", expected, found });
        }
        let (size, limit) = (self.tokens as u128 + tokens as u128, self.capacity as u128);
        if size > limit {
            return Err(Error::TooLarge { what: "tokens in a sequence of the cache", size, limit });
        }
        self.check_whole()
    }

    /// Checks that all parts have the same tokens.
    fn check_whole(&self) -> Result<()> {
        let held = match &self.parts {
            Parts::Selected(selected) => [selected.store.tokens()?; 2],
            Parts::InSeries([local, global]) => [local.store.tokens()?, global.store.tokens()?],
            Parts::Qada(qada) => [qada.tokens()?; 2],
            Parts::Rattention(rattention) => [rattention.tokens()?; 2],
        };
        match held == [self.tokens; 2] {
            true => Ok(()),
            false => {
                let expected = "one that is truncated to the tokens before it";
                Err(Error::option("the cache", "left by a step that failed", expected))
            }
        }
    }

    /// Attends as the next tokens of every sequence: query `[B, H, T, D]`, key and value `[B, Hk, T, D]`, in their positions
    /// already. `reaches` are those that the cache was [made](Self::new) for; `routing` `[B, R, T]` names one of them for each row
    /// where there are several. Gives `[B, H, T, D]`.
    ///
    /// # Errors
    /// As [`check`](Self::check) and [`selected_attention`](crate::selected_attention); [`Error::Option`] when reaches or
    /// routing are not those of the cache.
    pub fn attend(
        &mut self,
        reaches: &[Option<Reach>],
        qkv: [Tensor<4>; 3],
        routing: Option<&Routing>,
        options: &AttentionOptions,
    ) -> Result<Tensor<4>> {
        self.check_qkv(&qkv, routing, options)?;
        let Parts::Selected(selected) = &mut self.parts else { return Err(self.other_kind()) };
        selected.check(reaches, routing)?;
        let [_, _, tokens, _] = qkv[0].dims();
        let out = selected.attend(&self.place, qkv, routing, options)?;
        self.tokens += tokens;
        Ok(out)
    }

    fn check_qkv(
        &self,
        [query, key, value]: &[Tensor<4>; 3],
        routing: Option<&Routing>,
        options: &AttentionOptions,
    ) -> Result<()> {
        let mut origins =
            vec![Origin::of("query", query), Origin::of("key", key), Origin::of("value", value)];
        origins.extend(routing.map(|routing| Origin::on("routing", routing.device())));
        let sinks = options.sink_logits.as_ref();
        origins.extend(sinks.map(|sinks| Origin::of("the sink logits", sinks).of_any_dtype()));
        let [_, heads, tokens, _] = query.dims();
        self.check_next(&origins, tokens)?;
        let [_, kv_heads, _, dim] = key.dims();
        for (name, tensor, heads) in
            [("query", query, heads), ("key", key, kv_heads), ("value", value, kv_heads)]
        {
            let expected = [self.batch, heads, tokens, dim];
            if tensor.dims() != expected {
                return Err(Error::shape(name, format!("{expected:?}"), &tensor.dims()));
            }
        }
        let problem = Problem::new(query.dims(), key.dims(), element("query", query.dtype())?)?;
        options.apply(problem)?;
        if let Some(sinks) = sinks.filter(|sinks| sinks.dims() != [heads]) {
            return Err(Error::shape("the sink logits", format!("[{heads}]"), &sinks.dims()));
        }
        match routing {
            Some(routing) => routing.decision().routes.geometry().check(&problem),
            None => Ok(()),
        }
    }

    /// L2A's local sub-layer of the next tokens, which [`attend_globally`](Self::attend_globally) has to follow.
    pub(crate) fn attend_locally(
        &mut self,
        reaches: &[Option<Reach>],
        qkv: [Tensor<4>; 3],
        options: &AttentionOptions,
    ) -> Result<Tensor<4>> {
        let Parts::InSeries([local, _]) = &mut self.parts else { return Err(self.other_kind()) };
        local.check(reaches, None)?;
        local.attend(&self.place, qkv, None, options)
    }

    /// L2A's global sub-layer.
    pub(crate) fn attend_globally(
        &mut self,
        reaches: &[Option<Reach>],
        qkv: [Tensor<4>; 3],
        routing: &Routing,
        options: &AttentionOptions,
    ) -> Result<Tensor<4>> {
        let Parts::InSeries([_, global]) = &mut self.parts else { return Err(self.other_kind()) };
        global.check(reaches, Some(routing))?;
        let [_, _, tokens, _] = qkv[0].dims();
        let out = global.attend(&self.place, qkv, Some(routing), options)?;
        self.tokens += tokens;
        Ok(out)
    }

    pub(crate) fn attend_by_moments(
        &mut self,
        gate: &MomentGate,
        qkv: [Tensor<4>; 3],
    ) -> Result<(Tensor<4>, Routing)> {
        let Parts::Qada(qada) = &mut self.parts else { return Err(self.other_kind()) };
        qada.check(gate)?;
        let [_, _, tokens, _] = qkv[0].dims();
        let attended = qada.attend(&self.place, qkv)?;
        self.tokens += tokens;
        Ok(attended)
    }

    /// RATTENTION's near and far branch: `near` rotated, `far` query and key as they were before; the far branch on the rows that
    /// `routing` sends there, or on all.
    pub(crate) fn attend_near_and_far(
        &mut self,
        window: Window,
        near: [Tensor<4>; 3],
        far: [Tensor<4>; 2],
        routing: Option<&Routing>,
        options: &AttentionOptions,
    ) -> Result<[Tensor<4>; 2]> {
        let Parts::Rattention(rattention) = &mut self.parts else { return Err(self.other_kind()) };
        rattention.check(window)?;
        let [_, _, tokens, _] = near[0].dims();
        let attended = rattention.attend(&self.place, near, far, routing, options)?;
        self.tokens += tokens;
        Ok(attended)
    }

    fn other_kind(&self) -> Error {
        let found = match &self.parts {
            Parts::Selected(_) => "one of an attention that selects by routes",
            Parts::InSeries(_) => "one of L2A",
            Parts::Qada(_) => "one of QAdA",
            Parts::Rattention(_) => "one of a window and a linear branch",
        };
        Error::option("the cache", found, "one that a layer of this kind has made")
    }
}
