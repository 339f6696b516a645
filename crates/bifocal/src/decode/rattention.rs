use bifocal_core::{
    Element, Error, Problem, Reach, Result,
    device::{AttentionOperator, Partial, Routes, Tensor, TensorView},
};
use bifocal_dispatch::mask;
use bifocal_linear::norm_sum;
use cubecl::client::Client;

use super::{Batch, DecodePlan, LinearCache, Reaches, Step};
use crate::{Rattention, select::one_each};

/// RATTENTION's decode steps for one batch: the window by a [`DecodePlan`], what left it by the states of a [`LinearCache`] and
/// by the few keys that these lack. With routes they are those of [`AhaLinear`](crate::AhaLinear), over the same cache.
///
/// ```
/// use bifocal::{
///     Element, Rattention, Tensor, Window,
///     decode::{KvShape, Layout, LinearCache, NewTokens, RattentionDecoder, RattentionQueries},
/// };
///
/// let client = bifocal::open("cpu")?;
/// let system = Rattention::new(Window::rattention(16)?);
/// let shape = KvShape { kv_heads: 2, head_dim: 32, value_dim: 32, element: Element::F32 };
/// // Whatever the context, a sequence takes the window, twice the slack, and its state.
/// let layout = Layout::ring(4, Window::rattention(16)?, 8, 8)?;
/// let mut cache = LinearCache::new(&client, system.far(), shape, layout, 4)?;
/// let sequence = cache.start(&client)?;
/// let prompt = Tensor::filled(&client, [1, 2, 100, 32], Element::F32, 0.5)?;
/// cache.append(&client, &[sequence], &NewTokens::new(prompt.view(), prompt.view()))?;
///
/// let batch = cache.kv().batch(&client, &[sequence])?;
/// let problem = cache.kv().view(&batch)?.problem([1, 4, 1, 32], Element::F32)?;
/// let decoder = RattentionDecoder::new(&client, system, &problem)?;
/// let query = Tensor::filled(&client, [1, 4, 1, 32], Element::F32, 0.5)?;
/// let scale = Tensor::filled(&client, [4, 32], Element::F32, 1.0)?;
/// let queries = RattentionQueries {
///     near: query.view(),
///     far: query.view(),
///     near_scale: scale.view(),
///     far_scale: scale.view(),
///     routes: None,
/// };
/// let out = Tensor::empty(&client, problem.out_shape(), Element::F32);
/// decoder.step(&client, &cache, &batch, &queries, &out)?;
/// assert_eq!(out.to_f32(&client)?.len(), 4 * 32);
/// # Ok::<(), bifocal::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RattentionDecoder {
    system: Rattention,
    plan: DecodePlan,
    window: Reaches,
}

/// What [`RattentionDecoder::step`] reads beside the cache.
#[derive(Clone, Copy, Debug)]
pub struct RattentionQueries<'a> {
    /// `[B, H, Tq, D]`: the near branch's, of tokens whose keys are in the cache already.
    pub near: TensorView<'a, 4>,
    /// `[B, H, Tq, D]`: the same as the far branch reads them, before rotary positions and norms.
    pub far: TensorView<'a, 4>,
    /// `[H, Dv]`, `f32`: the scale of the near branch's norm.
    pub near_scale: TensorView<'a, 2>,
    /// `[H, Dv]`, `f32`: the scale of the far branch's norm.
    pub far_scale: TensorView<'a, 2>,
    /// `[B, R, Tq]` of two reaches, with R = 1, Hk or H: the far branch is added to the rows whose route is the second. To all
    /// rows without them.
    pub routes: Option<&'a Routes>,
}

impl RattentionDecoder {
    /// Room for steps of `problem`, which is that of the cache's view. Steps of one plan may be replayed with other lengths.
    ///
    /// # Errors
    /// As [`DecodePlan::new`].
    pub fn new(client: &Client, system: Rattention, problem: &Problem) -> Result<Self> {
        let window: Reach = system.near().reach();
        Ok(Self { system, plan: DecodePlan::new(client, problem)?, window: Reaches::one(client, window)? })
    }

    /// One step of up to 16 queries per sequence: writes `out` `[B, H, Tq, Dv]`, `f32` or of the problem's element type. Rows
    /// without a valid route become NaN.
    ///
    /// # Errors
    /// As [`branches`](Self::branches) and [`norm_sum`]; [`Error::Option`] for routes of other than two reaches, and
    /// [`Error::Shape`] for those of other rows.
    pub fn step(
        &self,
        client: &Client,
        cache: &LinearCache,
        batch: &Batch,
        queries: &RattentionQueries<'_>,
        out: &Tensor<4>,
    ) -> Result<()> {
        let problem = self.plan.problem();
        let [near, far] = self.branches(client, cache, batch, [queries.near, queries.far])?;
        let far = match queries.routes {
            Some(routes) => {
                one_each(routes.geometry().reaches, 2)?;
                let lse = Tensor::empty(client, problem.lse_shape(), Element::F32);
                let partial = Partial { out: far, lse };
                mask(client, problem, routes, 1, &partial)?;
                partial.out
            }
            None => far,
        };
        let scales = [queries.near_scale, queries.far_scale];
        norm_sum(client, problem, &self.system.norms(&near, &far, scales), out)
    }

    /// Both branches of a step, for all of its rows and before their norms: the near one's outputs `[B, H, Tq, Dv]` in the
    /// problem's element type, the far one's in `f32`. Queries are [`near`](RattentionQueries::near) and
    /// [`far`](RattentionQueries::far).
    ///
    /// # Errors
    /// [`Error::Option`] for a cache of another window or feature map; as [`DecodePlan::attend`], [`SummaryCache::summaries`](super::SummaryCache::summaries)
    /// and [`LinearAttention::meet`](crate::LinearAttention::meet).
    pub fn branches(
        &self,
        client: &Client,
        cache: &LinearCache,
        batch: &Batch,
        [near_query, far_query]: [TensorView<'_, 4>; 2],
    ) -> Result<[Tensor<4>; 2]> {
        let (problem, system) = (self.plan.problem(), &self.system);
        if *cache.summary() != system.far() {
            let expected = format!("{:?}", system.far());
            return Err(Error::option("the state of a cache", format!("{:?}", cache.summary()), expected));
        }
        let near = Partial::empty(client, problem, problem.element);
        let step = Step::new(near_query, &self.window);
        self.plan.attend(client, &cache.kv().view(batch)?, &step, &near)?;
        let summaries = cache.summaries(client, batch, problem.query_len)?;
        let far = Tensor::empty(client, problem.out_shape(), Element::F32);
        system.far().meet(client, problem, far_query, &summaries, &far)?;
        Ok([near.out, far])
    }
}
