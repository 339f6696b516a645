use cubecl::{client::Client, server::Handle};

use super::{Gradients, Partial, Saved, Sequences, TensorView};
use crate::{DeviceProfile, Error, Problem, Reach, Refusal, Refusals, Result, Routine};

/// What attention reads: borrowed views of query `[B, H, Tq, D]`, key `[B, Hk, Tk, D]`, value
/// `[B, Hk, Tk, Dv]`, and optionally one sink logit per query head and the sequences that the tokens belong to.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Inputs<'a> {
    /// `[B, H, Tq, D]`.
    pub query: TensorView<'a, 4>,
    /// `[B, Hk, Tk, D]`.
    pub key: TensorView<'a, 4>,
    /// `[B, Hk, Tk, Dv]`.
    pub value: TensorView<'a, 4>,
    /// `[H]`, `f32`: a learned logit that joins the softmax of every row of its head with a value of zero
    /// (gpt-oss). The log-sum-exp includes it, so of several partials that are to be merged only one may
    /// have it.
    pub sink_logits: Option<TensorView<'a, 1>>,
    /// Where sequences of different lengths lie one after the other in a batch of 1.
    pub sequences: Option<&'a Sequences>,
}

impl<'a> Inputs<'a> {
    /// Query, key and value, without sink logits; each batch entry is one sequence.
    pub fn new(query: TensorView<'a, 4>, key: TensorView<'a, 4>, value: TensorView<'a, 4>) -> Self {
        Self { query, key, value, sink_logits: None, sequences: None }
    }

    /// Adds one sink logit per query head.
    pub fn with_sink_logits(self, sink_logits: TensorView<'a, 1>) -> Self {
        Self { sink_logits: Some(sink_logits), ..self }
    }

    /// Reads the batch of 1 as these sequences, one after the other: rows see keys of their own sequence alone.
    pub fn with_sequences(self, sequences: &'a Sequences) -> Self {
        Self { sequences: Some(sequences), ..self }
    }

    /// The problem that these shapes pose, with default scale and no softcap.
    ///
    /// # Errors
    /// As [`Problem::new`].
    pub fn problem(&self) -> Result<Problem> {
        let problem = Problem::new(self.query.shape(), self.key.shape(), self.query.element())?;
        problem.with_value_dim(self.value.shape()[3])
    }

    /// Checks all that the kernels rely on.
    ///
    /// # Errors
    /// As [`Problem::check`], [`TensorView::check`] and [`Sequences::check`].
    pub fn check(&self, client: &Client, problem: &Problem) -> Result<()> {
        problem.check()?;
        let Problem { batch, heads, kv_heads, query_len, key_len, head_dim, value_dim, element, .. } =
            *problem;
        self.query.check("query", client, [batch, heads, query_len, head_dim], element)?;
        self.key.check("key", client, [batch, kv_heads, key_len, head_dim], element)?;
        self.value.check("value", client, [batch, kv_heads, key_len, value_dim], element)?;
        if let Some(sinks) = self.sink_logits {
            sinks.check("the sink logits", client, [heads], crate::Element::F32)?;
        }
        self.sequences.map_or(Ok(()), |sequences| sequences.check(client, problem))
    }
}

/// The rows that one reach of a dispatch plan routed, in device memory. Built by `bifocal-dispatch`.
///
/// A row of a kv head is `token * G + head`, where `G` is the number of query heads per kv head and `head` counts
/// within that group. Lists are ascending; the highest bit marks a row without a valid route, whose
/// output is NaN.
#[derive(Clone, Copy, Debug)]
pub struct RoutedRows<'a> {
    /// `u32 [reaches, B * Hk, rows]`: the lists, each with room for every packed row of its kv head.
    pub rows: &'a Handle,
    /// `u32 [reaches, B * Hk]`: how many rows each list has.
    pub list_counts: &'a Handle,
    /// `u32 [reaches, max_items, 3]`: batch x kv head, first entry within its list, number of rows.
    pub items: &'a Handle,
    /// `u32 [reaches]`: how many items there are.
    pub item_counts: &'a Handle,
    /// `u32 [reaches, `[`COUNTERS`](Self::COUNTERS)`]`: what a kernel on these rows may count in. All zero before it, and
    /// left so.
    pub counters: &'a Handle,
    /// Which reach these rows take.
    pub reach: u32,
    /// How many items there can be for one reach: what a grid is sized by.
    pub max_items: usize,
    /// Most rows in an item.
    pub item_rows: u32,
    /// The `[batch, kv heads, packed rows]` that the plan was built for.
    pub shape: [usize; 3],
}

impl RoutedRows<'_> {
    /// Counters per reach.
    pub const COUNTERS: usize = 1024;
}

/// Which rows an operator computes. It writes those and leaves the others as they are.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// Every query of every head.
    All,
    /// The rows of a dispatch plan.
    Routed(RoutedRows<'a>),
}

/// One attention branch: softmax attention over the keys that a [`Reach`] shows.
pub trait AttentionOperator {
    /// The operator's name in messages and tables.
    fn name(&self) -> &'static str;

    /// What its queries see.
    fn reach(&self) -> Reach;

    /// Whether `routine` can run `problem` on a device with this profile; if not, why. Needs no device.
    ///
    /// # Errors
    /// The [`Refusal`] says why not.
    fn supports(&self, routine: Routine, problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal>;

    /// Computes `rows` of `problem` into `partial` and leaves other rows untouched. Returns the routine it chose.
    /// Nothing is read back to the host.
    ///
    /// # Errors
    /// [`Error::Refused`] when no routine can run the problem on the client's device; otherwise as
    /// [`Inputs::check`] and [`Partial::check`].
    fn attend(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        rows: Rows<'_>,
        partial: &Partial,
    ) -> Result<Routine>;

    /// Whether `routine` can run the backward pass of `problem` on a device with this profile; if not, why. Needs no
    /// device. An operator without a backward pass leaves this and [`backward`](Self::backward) as they are.
    ///
    /// # Errors
    /// The [`Refusal`] says why not.
    fn supports_backward(
        &self,
        routine: Routine,
        problem: &Problem,
        profile: &DeviceProfile,
    ) -> Result<(), Refusal> {
        let _ = (routine, problem, profile);
        Err(Refusal::NotImplemented)
    }

    /// Adds the gradients of `rows` to `gradients`: those of their queries, and what these rows give to the keys, values
    /// and sink logits that they see. Where these hold [anything](super::Before) it stores them, zeros for keys that no row sees
    /// included; an operator that only adds [clears](Gradients::cleared) them first. Returns the routine it chose. Nothing
    /// is read back to the host, and two runs agree bit for bit.
    ///
    /// # Errors
    /// [`Error::Refused`] when no routine can run the backward pass on the client's device; otherwise as
    /// [`Inputs::check`], [`Saved::check`] and [`Gradients::check`].
    fn backward(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        rows: Rows<'_>,
        saved: &Saved<'_>,
        gradients: &Gradients,
    ) -> Result<Routine> {
        let _ = (client, problem, inputs, rows, saved, gradients);
        fastest(self.name(), |_| Err(Refusal::NotImplemented))
    }

    /// The fastest routine that can run `problem` on a device with this profile.
    ///
    /// # Errors
    /// [`Error::Refused`] with every routine's reason when none can.
    fn choose(&self, problem: &Problem, profile: &DeviceProfile) -> Result<Routine> {
        fastest(self.name(), |routine| self.supports(routine, problem, profile))
    }

    /// The fastest routine that can run the backward pass of `problem` on a device with this profile.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    fn choose_backward(&self, problem: &Problem, profile: &DeviceProfile) -> Result<Routine> {
        fastest(self.name(), |routine| self.supports_backward(routine, problem, profile))
    }
}

/// The first routine that does not refuse, or all refusals.
fn fastest(operator: &'static str, supports: impl Fn(Routine) -> Result<(), Refusal>) -> Result<Routine> {
    let mut refusals = Vec::new();
    for routine in Routine::ALL {
        match supports(routine) {
            Ok(()) => return Ok(routine),
            Err(refusal) => refusals.push((routine, refusal)),
        }
    }
    Err(Error::Refused { operator, refusals: Refusals(refusals) })
}
