use bifocal_core::{
    Element, Error, Problem, Result,
    device::{AttentionOperator, Decision, Partial, TensorView},
};
use bifocal_dispatch::merge_routed;
use cubecl::client::Client;

use super::{Batch, DecodePlan, MomentCache, Reaches, Step};
use crate::Qada;

/// QAdA's decode steps for one batch: every row attends to its local set; the gate predicts from the moments of a
/// [`MomentCache`] what it would miss; rows that would miss too much attend to the other keys too, and the two merge. Heads
/// that stay near read no byte of those.
///
/// ```
/// use bifocal::{
///     Element, MomentGate, Partial, Qada, Tensor, Window,
///     decode::{KvShape, Layout, MomentCache, NewTokens, QadaDecoder},
/// };
///
/// let client = bifocal::open("cpu")?;
/// let system = Qada::new(MomentGate::new(Window::new(16)?, 0.9)?.with_sinks(4));
/// let shape = KvShape { kv_heads: 2, head_dim: 32, value_dim: 32, element: Element::F32 };
/// let layout = Layout::paged(4, 1024, 16, 64)?;
/// let mut cache = MomentCache::new(&client, *system.gate(), shape, layout, 16)?;
/// let sequence = cache.start(&client)?;
/// let prompt = Tensor::filled(&client, [1, 2, 100, 32], Element::F32, 0.5)?;
/// cache.append(&client, &[sequence], &NewTokens::new(prompt.view(), prompt.view()))?;
///
/// let batch = cache.kv().batch(&client, &[sequence])?;
/// let problem = cache.kv().view(&batch)?.problem([1, 4, 1, 32], Element::F32)?;
/// let decoder = QadaDecoder::new(&client, system, &problem)?;
/// let query = Tensor::filled(&client, [1, 4, 1, 32], Element::F32, 0.5)?;
/// let partial = Partial::empty(&client, &problem, Element::F32);
/// let decision = decoder.step(&client, &cache, &batch, (query.view(), None), &partial)?;
/// // All keys are alike: the local set's 20 of 100 are a fifth of the softmax.
/// assert_eq!(decision.routes.to_host(&client)?, [1; 4]);
/// # Ok::<(), bifocal::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct QadaDecoder {
    system: Qada,
    plan: DecodePlan,
    near: Reaches,
    far: Reaches,
}

impl QadaDecoder {
    /// Room for steps of `problem`, which is that of the cache's view. Steps of one plan may be replayed with other lengths.
    ///
    /// # Errors
    /// As [`DecodePlan::new`].
    pub fn new(client: &Client, system: Qada, problem: &Problem) -> Result<Self> {
        Ok(Self {
            system,
            plan: DecodePlan::new(client, problem)?,
            near: Reaches::one(client, system.near().reach())?,
            far: Reaches::new(client, &[None, Some(system.far().reach())])?,
        })
    }

    /// One step of up to 16 queries `[B, H, Tq, D]` per sequence, whose keys are in the cache already, and of sink logits
    /// `[H]` in `f32`, if there are any: attends into `partial`, every row of which is written and whose outputs are
    /// contiguous, and tells what was decided.
    ///
    /// # Errors
    /// [`Error::Option`] for a cache of another gate; as [`DecodePlan::attend`], [`SummaryCache::summaries`](super::SummaryCache::summaries),
    /// [`MomentGate::predict_step`](crate::MomentGate::predict_step) and [`MomentGate::decide`](crate::MomentGate::decide).
    pub fn step(
        &self,
        client: &Client,
        cache: &MomentCache,
        batch: &Batch,
        (query, sink_logits): (TensorView<'_, 4>, Option<TensorView<'_, 1>>),
        partial: &Partial,
    ) -> Result<Decision> {
        let (problem, gate) = (self.plan.problem(), self.system.gate());
        if cache.summary() != gate {
            let expected = format!("{gate:?}");
            return Err(Error::option("the moments of a cache", format!("{:?}", cache.summary()), expected));
        }
        let view = cache.kv().view(batch)?;
        let mut near = Step::new(query, &self.near);
        near.sink_logits = sink_logits;
        self.plan.attend(client, &view, &near, partial)?;
        let summaries = cache.summaries(client, batch, problem.query_len)?;
        let predicted = gate.predict_step(client, problem, query, &summaries)?;
        let decision = gate.decide(client, problem, partial.lse.view(), predicted)?;
        let far = Partial::empty(client, problem, Element::F32);
        let step = Step::new(query, &self.far).with_routes(&decision.routes);
        self.plan.attend(client, &view, &step, &far)?;
        merge_routed(client, problem, &decision.routes, 1, partial, &far)?;
        Ok(decision)
    }
}
