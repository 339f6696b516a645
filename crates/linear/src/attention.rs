use bifocal_core::{
    DeviceProfile, Element, Error, FeatureMap, Problem, Reach, Refusal, Refusals, Result, Routine, Window,
    device::{Gradients, Summaries, Summary, Tensor, TensorView},
};
use cubecl::client::Client;

use crate::{
    LeavingKey, LinearInputs, State, mma,
    portable::{
        self, AllNorms, Call,
        geometry::{Geometry, LONGEST_CHUNK},
    },
};

/// Linear attention to every key that has left a window: RATTENTION's far branch (arXiv 2506.15545, equation 4).
///
/// ```text
/// S_j = exp(g_j) S_(j-1) + phi(k_j)^T v_j        per kv head, in f32; g = 0 without decay
/// o_i = phi(q_i) S_(i-n)                         n the keys of the window, the query's own included
/// ```
///
/// There is no denominator, and scale and softcap of the problem belong to softmax branches. Queries are the last positions
/// when lengths differ; those that no key has left yet meet the state that came in.
///
/// ```
/// use bifocal_core::{Element, Problem, Window, device::{Tensor, open}};
/// use bifocal_linear::{LinearAttention, LinearInputs};
///
/// # fn example() -> bifocal_core::Result<()> {
/// let client = open("cpu")?;
/// let qkv = Tensor::filled(&client, [1, 2, 100, 64], Element::F32, 0.5)?;
/// let inputs = LinearInputs::new(qkv.view(), qkv.view(), qkv.view());
/// let problem = inputs.attention.problem()?;
/// let far = LinearAttention::beyond(Window::rattention(16)?);
/// let out = Tensor::empty(&client, problem.out_shape(), Element::F32);
/// // What is left for the tokens that come after these.
/// let state = far.attend(&client, &problem, &inputs, &out)?;
/// assert_eq!(state.shape(), [1, 2, 128, 64]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearAttention {
    window: Window,
    map: FeatureMap,
    chunk: Option<usize>,
}

impl LinearAttention {
    /// The keys that `window` leaves out, by RATTENTION's feature map. The paper's w is [`Window::rattention`]`(w)`.
    pub const fn beyond(window: Window) -> Self {
        Self { window, map: FeatureMap::SoftmaxPair, chunk: None }
    }

    /// Takes another feature map.
    pub const fn with_feature_map(self, map: FeatureMap) -> Self {
        Self { map, ..self }
    }

    /// Cuts the keys into chunks of this length instead of one that suits the problem. It changes the time and the memory
    /// that a call takes, and how its sums are rounded.
    ///
    /// # Errors
    /// [`Error::Option`] unless there are 1 to 65,536 keys in a chunk.
    pub fn with_chunk(self, keys: usize) -> Result<Self> {
        if !(1..=LONGEST_CHUNK).contains(&keys) {
            return Err(Error::option("keys per chunk", keys, format!("1 to {LONGEST_CHUNK}")));
        }
        Ok(Self { chunk: Some(keys), ..self })
    }

    /// The name in messages and tables.
    pub const fn name(&self) -> &'static str {
        "linear"
    }

    /// The keys that a query meets.
    pub const fn reach(&self) -> Reach {
        Reach::Far { sinks: 0, window: self.window }
    }

    /// `[B, Hk, features, Dv]`: the shape of a state, whatever the context. Packed sequences have one each in place of B.
    pub fn state_shape(&self, problem: &Problem) -> [usize; 4] {
        let features = self.map.features(problem.head_dim);
        [problem.batch, problem.kv_heads, features, problem.value_dim]
    }

    /// Whether `routine` can run the forward pass of `problem` on a device with this profile; if not, why. Needs no device.
    ///
    /// # Errors
    /// The [`Refusal`] says why not.
    pub fn supports(
        &self,
        routine: Routine,
        problem: &Problem,
        profile: &DeviceProfile,
    ) -> Result<(), Refusal> {
        if problem.routine.is_some_and(|asked| asked != routine) {
            return Err(Refusal::NotAsked);
        }
        match routine {
            Routine::Mma => mma::blueprint(problem, self.map, profile).map(|_| ()),
            Routine::Portable => portable::supports(problem, profile),
            _ => Err(Refusal::NotImplemented),
        }
    }

    /// Whether `routine` can run the backward pass of `problem`, and its steps of decoding, on a device with this profile; if
    /// not, why. Needs no device.
    ///
    /// # Errors
    /// The [`Refusal`] says why not.
    pub fn supports_backward(
        &self,
        routine: Routine,
        problem: &Problem,
        profile: &DeviceProfile,
    ) -> Result<(), Refusal> {
        match routine {
            Routine::Mma if problem.routine.is_none_or(|asked| asked == routine) => {
                Err(Refusal::NotImplemented)
            }
            _ => self.supports(routine, problem, profile),
        }
    }

    /// The fastest routine that can run the forward pass of `problem` on a device with this profile.
    ///
    /// # Errors
    /// [`Error::Refused`] with every routine's reason when none can.
    pub fn choose(&self, problem: &Problem, profile: &DeviceProfile) -> Result<Routine> {
        self.first(|routine| self.supports(routine, problem, profile))
    }

    /// The fastest routine that can run the backward pass of `problem`, and its steps of decoding.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    pub fn choose_backward(&self, problem: &Problem, profile: &DeviceProfile) -> Result<Routine> {
        self.first(|routine| self.supports_backward(routine, problem, profile))
    }

    /// The routine that [`attend`](Self::attend) takes for these inputs: the fastest that can run the problem, that has a kernel
    /// for what the inputs have besides, and that can read and write memory laid out like theirs.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    pub fn routine(
        &self,
        problem: &Problem,
        profile: &DeviceProfile,
        inputs: &LinearInputs<'_>,
        out: &Tensor<4>,
    ) -> Result<Routine> {
        self.first(|routine| {
            self.supports(routine, problem, profile)?;
            if routine == Routine::Mma { mma::takes(inputs, out.view()) } else { Ok(()) }
        })
    }

    fn first(&self, takes: impl Fn(Routine) -> Result<(), Refusal>) -> Result<Routine> {
        let mut refusals = Vec::new();
        for routine in Routine::ALL {
            match takes(routine) {
                Ok(()) => return Ok(routine),
                Err(refusal) => refusals.push((routine, refusal)),
            }
        }
        Err(self.refused(refusals))
    }

    fn refused(&self, refusals: Vec<(Routine, Refusal)>) -> Error {
        Error::Refused { operator: self.name(), refusals: Refusals(refusals) }
    }

    /// Writes the inputs' rows of `out` `[B, H, Tq, Dv]`, `f32` or of the problem's element type, leaves the others, and gives
    /// the state that the last query met, or would. With it and the last [`Window::keys`] keys, which it lacks, a later call
    /// or [`step`](Self::step) goes on where this one ended. Nothing is read back to the host.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::Option`] for sink logits; [`Error::Overlap`] when rows of `out` share memory;
    /// [`Error::Shape`] for a dispatch plan of another problem; [`Error::TooLarge`]; otherwise as
    /// [`Inputs::check`](bifocal_core::device::Inputs::check).
    pub fn attend(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &LinearInputs<'_>,
        out: &Tensor<4>,
    ) -> Result<State> {
        let state_shape = self.states_of(problem, inputs);
        inputs.check(client, problem, state_shape)?;
        check_out(client, problem, problem.out_shape(), out)?;
        let profile = DeviceProfile::of(client);
        let end = Tensor::empty(client, state_shape, Element::F32);
        match self.routine(problem, &profile, inputs, out)? {
            Routine::Mma => {
                let blueprint = mma::blueprint(problem, self.map, &profile);
                let blueprint = blueprint.map_err(|refusal| self.refused(vec![(Routine::Mma, refusal)]))?;
                let chunk = |keys| self.chunk.or_else(|| Some(blueprint.chunk(problem, keys, &profile)));
                let geometries = self.geometries(problem, inputs, chunk)?;
                mma::attend(client, inputs, &geometries, blueprint, out, &end)?;
            }
            _ => {
                for call in self.calls(client, problem, inputs)? {
                    call.attend(out, &end);
                }
            }
        }
        Ok(State::of(end))
    }

    /// Adds the gradients of queries, keys and values, through the inputs' rows, to `gradients`, from that of the outputs
    /// (`f32` or of the problem's element type) and, if the state that was left went on to somewhere, from that of the state.
    /// Gives the gradient of the state that came in, if one did. Nothing of the forward pass is needed but its inputs: states
    /// are computed again. Two runs agree bit for bit.
    ///
    /// # Errors
    /// As [`attend`](Self::attend) and [`Gradients::check`].
    pub fn backward(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &LinearInputs<'_>,
        d_out: TensorView<'_, 4>,
        d_state: Option<&Tensor<4>>,
        gradients: &Gradients,
    ) -> Result<Option<Tensor<4>>> {
        let state_shape = self.states_of(problem, inputs);
        inputs.check(client, problem, state_shape)?;
        gradients.check(client, problem, &inputs.attention)?;
        let element = float_or(problem.element, d_out.element());
        d_out.check("the gradient of the output", client, problem.out_shape(), element)?;
        if let Some(d_state) = d_state {
            let name = "the gradient of the state";
            d_state.view().check(name, client, state_shape, Element::F32)?;
            d_state.view().check_contiguous(name)?;
        }
        self.choose_backward(problem, &DeviceProfile::of(client))?;
        let gradients = gradients.clone().cleared(client)?;
        let d_start = Tensor::empty(client, state_shape, Element::F32);
        for call in self.calls(client, problem, inputs)? {
            call.backward(d_out, d_state, &gradients, &d_start);
        }
        Ok(inputs.state.map(|_| d_start))
    }

    /// One step of decoding: adds the key that has just left the window, if one has, to `state` in place, and writes what
    /// the new token's query `[B, H, 1, D]` gives to `out` `[B, H, 1, Dv]`. The problem's key length means nothing here.
    ///
    /// # Errors
    /// [`Error::Option`] for another query length than 1; otherwise as [`attend`](Self::attend).
    pub fn step(
        &self,
        client: &Client,
        problem: &Problem,
        query: TensorView<'_, 4>,
        left: Option<LeavingKey<'_>>,
        state: &State,
        out: &Tensor<4>,
    ) -> Result<()> {
        problem.check()?;
        if problem.query_len != 1 {
            return Err(Error::option("the query length of a step", problem.query_len, "1"));
        }
        let Problem { batch, heads, head_dim, element, .. } = *problem;
        query.check("query", client, [batch, heads, 1, head_dim], element)?;
        let (size, limit) = (4 * (batch * heads) as u128, u128::from(u32::MAX));
        if size > limit {
            return Err(Error::TooLarge { what: "numbers of the norms of all rows", size, limit });
        }
        if let Some(left) = &left {
            left.check(client, problem)?;
        }
        state.check(client, self.state_shape(problem))?;
        check_out(client, problem, problem.out_shape(), out)?;
        self.choose_backward(problem, &DeviceProfile::of(client))?;
        portable::step(client, problem, self.map, query, left.as_ref(), state, out);
        Ok(())
    }

    /// Several steps of decoding at once, over a cache that keeps states (`SummaryCache` in `bifocal-decode`): each of the
    /// queries `[B, H, Tq, D]`, which are the last tokens of their sequences, meets its sequence's state and the keys that
    /// left its window since. Writes `out` `[B, H, Tq, Dv]`, `f32` or of the problem's element type. The problem's key length
    /// means nothing here.
    ///
    /// # Errors
    /// As [`step`](Self::step) and [`Summaries::check`].
    pub fn meet(
        &self,
        client: &Client,
        problem: &Problem,
        query: TensorView<'_, 4>,
        summaries: &Summaries<'_>,
        out: &Tensor<4>,
    ) -> Result<()> {
        problem.check()?;
        let Problem { batch, heads, kv_heads, query_len, head_dim, value_dim, element, .. } = *problem;
        query.check("query", client, [batch, heads, query_len, head_dim], element)?;
        summaries.check(client, problem, &[self.state_numbers([kv_heads, head_dim, value_dim])])?;
        check_out(client, problem, problem.out_shape(), out)?;
        let rows = (batch * heads * query_len) as u128 * summaries.room().max(4) as u128;
        let keys = 4 * (batch * kv_heads) as u128 * summaries.room() as u128;
        for (what, size) in
            [("scores of keys beside a state", rows), ("numbers of the norms of all rows", keys)]
        {
            let limit = u128::from(u32::MAX);
            if size > limit {
                return Err(Error::TooLarge { what, size, limit });
            }
        }
        self.choose_backward(problem, &DeviceProfile::of(client))?;
        portable::meet(client, problem, self.map, query, summaries, out);
        Ok(())
    }

    fn state_numbers(&self, [kv_heads, head_dim, value_dim]: [usize; 3]) -> usize {
        kv_heads * self.map.features(head_dim) * value_dim
    }

    /// One call by the portable routine of checked inputs, or where sequences are packed one of each.
    fn calls<'a>(
        &self,
        client: &'a Client,
        problem: &'a Problem,
        inputs: &'a LinearInputs<'a>,
    ) -> Result<Vec<Call<'a>>> {
        let geometries = self.geometries(problem, inputs, |_| self.chunk)?;
        let norms = AllNorms::new(client, inputs, self.map);
        let call = |geometry| Call::new(client, problem, inputs, geometry, self.map, &norms);
        Ok(geometries.into_iter().map(call).collect())
    }

    /// How the batch, or each of the sequences that are packed into it, is cut: into chunks of as many keys as `chunk` says of
    /// the number of keys that leave, or of as many as suit the portable routine.
    fn geometries(
        &self,
        problem: &Problem,
        inputs: &LinearInputs<'_>,
        chunk: impl Fn(usize) -> Option<usize>,
    ) -> Result<Vec<Geometry>> {
        let hidden = self.window.keys() as usize;
        match inputs.attention.sequences {
            Some(sequences) => Geometry::packed(problem, sequences, hidden, self.map, chunk),
            None => Ok(vec![Geometry::new(problem, hidden, self.map, chunk)?]),
        }
    }

    /// The shape of the states of these inputs.
    fn states_of(&self, problem: &Problem, inputs: &LinearInputs<'_>) -> [usize; 4] {
        let mut shape = self.state_shape(problem);
        if let Some(sequences) = inputs.attention.sequences {
            shape[0] = sequences.count();
        }
        shape
    }
}

impl Summary for LinearAttention {
    fn outside(&self) -> (Window, usize) {
        (self.window, 0)
    }

    /// One part: the [`State`] of a sequence.
    fn parts(&self, client: &Client, problem: &Problem) -> Result<Vec<usize>> {
        self.choose_backward(problem, &DeviceProfile::of(client))?;
        let Problem { kv_heads, head_dim, value_dim, .. } = *problem;
        Ok(vec![self.state_numbers([kv_heads, head_dim, value_dim])])
    }

    fn fold(
        &self,
        client: &Client,
        _keys: usize,
        parts: &[Tensor<1>],
        key: TensorView<'_, 4>,
        value: TensorView<'_, 4>,
    ) -> Result<Vec<Tensor<1>>> {
        let shape = key.shape();
        let problem = Problem::new(shape, shape, key.element())?.with_value_dim(value.shape()[3])?;
        let state_shape = self.state_shape(&problem);
        let [_, kv_heads, features, value_dim] = state_shape;
        let [state] = parts else {
            return Err(Error::shape("the parts of a state", "[1]".to_string(), &[parts.len()]));
        };
        let strides = [kv_heads * features * value_dim, features * value_dim, value_dim, 1];
        let state = State::of(Tensor::new(state.handle().clone(), Element::F32, state_shape, strides));
        // Sums ask nothing of queries.
        let inputs = LinearInputs::new(key, key, value).with_state(&state);
        inputs.check(client, &problem, state_shape)?;
        let geometry = Geometry::new(&problem, 0, self.map, |_| self.chunk)?;
        let norms = AllNorms::new(client, &inputs, self.map);
        let end = Tensor::empty(client, state_shape, Element::F32);
        Call::new(client, &problem, &inputs, geometry, self.map, &norms).states(&end);
        let numbers = kv_heads * features * value_dim;
        Ok(vec![Tensor::new(end.into_handle(), Element::F32, [numbers], [1])])
    }
}

/// `f32` where that is found, or the problem's own type.
pub(crate) fn float_or(element: Element, found: Element) -> Element {
    if found == Element::F32 { Element::F32 } else { element }
}

/// Checks that `out` has room for every row, in memory of its own.
pub(crate) fn check_out(
    client: &Client,
    problem: &Problem,
    shape: [usize; 4],
    out: &Tensor<4>,
) -> Result<()> {
    let element = float_or(problem.element, out.element());
    out.view().check("the output", client, shape, element)?;
    out.view().check_disjoint("the output")
}
