use bifocal_core::{
    DeviceProfile, Element, Error, FeatureMap, Problem, Reach, Refusal, Refusals, Result, Routine, Window,
    device::{Gradients, Tensor, TensorView},
};
use cubecl::client::Client;

use crate::{
    LeavingKey, LinearInputs, State, mma,
    portable::{
        self, Call,
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

    /// `[B, Hk, features, Dv]`: the shape of a state, whatever the context.
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
            Routine::Mma => mma::supports(problem, self.map, profile),
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
        Err(Error::Refused { operator: self.name(), refusals: Refusals(refusals) })
    }

    /// Writes `out` `[B, H, Tq, Dv]`, `f32` or of the problem's element type, and gives the state that the last query met.
    /// With it and the last [`Window::keys`] keys, which it lacks, a later call or [`step`](Self::step) goes on where this
    /// one ended. Nothing is read back to the host.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::Option`] for sink logits and packed sequences; [`Error::Overlap`] when rows of `out` share
    /// memory; [`Error::TooLarge`]; otherwise as [`Inputs::check`](bifocal_core::device::Inputs::check).
    pub fn attend(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &LinearInputs<'_>,
        out: &Tensor<4>,
    ) -> Result<State> {
        inputs.check(client, problem, self.state_shape(problem))?;
        check_out(client, problem, problem.out_shape(), out)?;
        let routine = self.routine(problem, &DeviceProfile::of(client), inputs, out)?;
        if routine == Routine::Mma
            && let Some(state) = mma::attend(client, problem, inputs, (self.window, self.chunk), out)?
        {
            return Ok(state);
        }
        Ok(Call::new(client, problem, inputs, self.geometry(problem)?, self.map).attend(out))
    }

    /// Adds the gradients of queries, keys and values to `gradients`, from that of the outputs (`f32` or of the problem's
    /// element type) and, if the state that was left went on to somewhere, from that of the state. Gives the gradient of the
    /// state that came in, if one did. Nothing of the forward pass is needed but its inputs: states are computed again. Two
    /// runs agree bit for bit.
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
        let state_shape = self.state_shape(problem);
        inputs.check(client, problem, state_shape)?;
        gradients.check(client, problem, &inputs.attention)?;
        let element = float_or(problem.element, d_out.element());
        d_out.check("the gradient of the output", client, problem.out_shape(), element)?;
        if let Some(d_state) = d_state {
            let name = "the gradient of the state";
            d_state.view().check(name, client, state_shape, Element::F32)?;
            d_state.view().check_contiguous(name)?;
        }
        self.first_backward(client, problem)?;
        let call = Call::new(client, problem, inputs, self.geometry(problem)?, self.map);
        let d_start = call.backward(d_out, d_state, gradients);
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
        self.first_backward(client, problem)?;
        portable::step(client, problem, self.map, query, left.as_ref(), state, out);
        Ok(())
    }

    /// The routine of the backward pass, and of steps.
    fn first_backward(&self, client: &Client, problem: &Problem) -> Result<Routine> {
        let profile = DeviceProfile::of(client);
        self.first(|routine| self.supports_backward(routine, problem, &profile))
    }

    fn geometry(&self, problem: &Problem) -> Result<Geometry> {
        Geometry::new(problem, self.window, self.map, self.chunk)
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
