use bifocal_core::{
    DeviceProfile, Element, Error, Problem, Refusal, Refusals, Result, Routine, Window,
    device::{
        Decision, Inputs, RouteGeometry, Summaries, Summary, Tensor, TensorView,
        launch::{elements, grid, words},
    },
};
use cubecl::client::Client;

mod kernels;
mod mma;

pub use self::mma::sources;
use self::{
    kernels::{Blueprint, NumbersLaunch, Source, decide_kernel, predict_kernel},
    mma::Bulks,
};
use crate::{
    launch::{outputs, over_quads, strides},
    moments::{Covariance, Moments, Prefix},
};

/// The gate of query-adaptive attention (QAdA, arXiv 2502.09647): a router without weights. A row looks far when the keys
/// outside its local set, the bulk, would hold too much of its softmax, which their moments predict.
///
/// ```text
/// ln A_bulk ~= ln N + scale q . mu + scale^2 / 2 q^T Sigma q          N keys, mean mu, covariance Sigma
/// near iff A_local / (A_local + A_bulk) >= tau,  that is  ln A_bulk - lse_local <= ln(1 / tau - 1)
/// ```
///
/// The local set is a window and the first `sinks` tokens (the paper's 16 unless set); its log-sum-exp is the near
/// branch's. The prediction is the mean of a log-normal, exact where scores are normal. With large deviations it comes out
/// too high, which errs towards looking far: few keys do not fill the tail that the mean counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MomentGate {
    window: Window,
    sinks: u32,
    tau: f32,
    covariance: Covariance,
    chunk: Option<usize>,
}

impl MomentGate {
    /// A gate that keeps a row near iff its local set is predicted to hold at least `tau` of the softmax, by the full
    /// covariance, beside 16 sink tokens.
    ///
    /// # Errors
    /// [`Error::Option`] unless tau is above 0 and at most 1. With 1 every row with a bulk looks far.
    pub fn new(window: Window, tau: f32) -> Result<Self> {
        if !(tau > 0.0 && tau <= 1.0) {
            return Err(Error::option("tau", tau, "a share above 0 and at most 1"));
        }
        Ok(Self { window, sinks: 16, tau, covariance: Covariance::Full, chunk: None })
    }

    /// Sets how many tokens at the start of the sequence are local to every row.
    pub const fn with_sinks(self, sinks: u32) -> Self {
        Self { sinks, ..self }
    }

    /// Sets how much of the covariance is looked at. A low rank asks for moments that are given.
    pub const fn with_covariance(self, covariance: Covariance) -> Self {
        Self { covariance, ..self }
    }

    /// Sets how many keys there are between two sums of moments that are stored. It trades memory (D x D numbers per
    /// kv head and chunk) for time (half a chunk's scores per row) and changes no result by more than rounding; unless set,
    /// there are at most 256 chunks of at least 64 keys.
    ///
    /// # Errors
    /// [`Error::Option`] for 0.
    pub fn with_chunk(self, keys: usize) -> Result<Self> {
        match keys {
            0 => Err(Error::option("keys per chunk of moments", keys, "at least 1")),
            keys => Ok(Self { chunk: Some(keys), ..self }),
        }
    }

    /// The window.
    pub const fn window(&self) -> Window {
        self.window
    }

    /// Tokens at the start of the sequence that are local to every row.
    pub const fn sinks(&self) -> u32 {
        self.sinks
    }

    /// The share of the softmax that keeps a row near.
    pub const fn tau(&self) -> f32 {
        self.tau
    }

    /// How much of the covariance is looked at.
    pub const fn covariance(&self) -> Covariance {
        self.covariance
    }

    /// The predicted logarithm of each bulk's mass, `f32 [B, H, 1, Tq]`; -inf where the bulk has no key. Nothing is read back
    /// to the host.
    ///
    /// Moments are those of the very keys in the bulk of each row, and so are causal; or, where they are `given`, of
    /// whatever keys they were taken from (a calibration, a cache that keeps them up to date), for all rows alike.
    ///
    /// # Errors
    /// [`Error::Option`] with a softcap, under which scores are not normal, with packed sequences, and for a low rank without
    /// moments; [`Error::Shape`] when given moments are of other heads or remember less of the covariance;
    /// [`Error::Refused`] when every routine refuses ([`routine`](Self::routine)); [`Error::TooLarge`]; as [`Inputs::check`].
    pub fn predict(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        given: Option<&Moments>,
    ) -> Result<Tensor<4>> {
        inputs.check(client, problem)?;
        let profile = DeviceProfile::of(client);
        if inputs.sequences.is_some() {
            let expected = "none: moments are those of a batch entry's keys";
            return Err(Error::option("packed sequences", "given", expected));
        }
        takes(problem)?;
        let routine = self.routine(problem, &profile, inputs, given)?;
        let Problem { batch, kv_heads, query_len, key_len, head_dim, .. } = *problem;
        // Positions and windows are below 2^31, and a bulk that is out of reach of every token may be so by less.
        let sinks = (self.sinks as usize).min(key_len);
        let bulk = problem.position(0) + 1 - i64::from(self.window.keys()) - sinks as i64;
        let largest = (bulk + query_len as i64 - 1).max(0) as usize;
        if routine == Routine::Mma {
            let blueprint = mma::blueprint(problem, self.covariance, &profile);
            let blueprint = blueprint.map_err(|refusal| refused(vec![(routine, refusal)]))?;
            let chunk = self.chunk.unwrap_or_else(|| blueprint.chunk(problem, largest, &profile));
            let bulks = Bulks { first: bulk.max(-(1 << 30)), largest, sinks, chunk: chunk.min(key_len) };
            return mma::predict(client, problem, inputs, blueprint, bulks);
        }
        let chunk = self.chunk.unwrap_or(largest.div_ceil(256).next_power_of_two().max(64)).min(key_len);
        let own;
        let (means, scatters, slots, given_lists, given_keys) = match given {
            Some(moments) => {
                self.check_given(client, problem, moments)?;
                let [of_batch, ..] = moments.mean.shape();
                let means = (moments.mean.handle(), moments.scatter.handle());
                (means.0, means.1, 1, of_batch * kv_heads, moments.keys() as f32)
            }
            None => {
                let first = sinks.min(key_len - 1);
                let range = first..first + largest / chunk * chunk;
                own = Prefix::new(client, inputs.key, range, chunk, self.covariance)?;
                (own.means.handle(), own.scatters.handle(), own.slots, batch * kv_heads, 1.0)
            }
        };
        let source = if given.is_some() { Source::Given } else { Source::Bulk };
        let (predicted, blueprint) = self.room(client, problem, &profile, source);
        let (cubes, units) = grid(client, tiles(problem, &blueprint));
        let numbers = NumbersLaunch::new(
            (batch * kv_heads) as u32,
            kv_heads as u32,
            problem.group() as u32,
            query_len as u32,
            head_dim as u32,
            bulk.max(-(1 << 30)) as i32,
            sinks as u32,
            chunk as u32,
            slots as u32,
            given_lists as u32,
            given_keys,
            self.covariance.rows(head_dim) as u32,
            problem.scale,
            f32::NEG_INFINITY,
        );
        // SAFETY: inputs and moments were checked against the problem; each unit checks its rows.
        unsafe {
            predict_kernel::launch_unchecked(
                client,
                cubes,
                units,
                elements(inputs.query),
                elements(inputs.key),
                words(means),
                words(scatters),
                // Nothing reads spans.
                words(means),
                elements(predicted.view()),
                strides(inputs.query),
                strides(inputs.key),
                numbers,
                blueprint,
                problem.element.into(),
                blueprint.lanes,
            );
        }
        Ok(predicted)
    }

    /// [`predict`](Self::predict) for a decode step over a cache that keeps moments (`SummaryCache` in `bifocal-decode`):
    /// `query [B, H, Tq, D]` are the last tokens of their sequences, and moments are those of the very keys in each bulk. The
    /// problem's key length means nothing here.
    ///
    /// # Errors
    /// As [`predict`](Self::predict) and [`Summaries::check`].
    pub fn predict_step(
        &self,
        client: &Client,
        problem: &Problem,
        query: TensorView<'_, 4>,
        summaries: &Summaries<'_>,
    ) -> Result<Tensor<4>> {
        problem.check()?;
        let Problem { batch, heads, kv_heads, query_len, head_dim, .. } = *problem;
        query.check("query", client, [batch, heads, query_len, head_dim], problem.element)?;
        summaries.check(client, problem, &self.part_lengths(kv_heads, head_dim))?;
        let profile = DeviceProfile::of(client);
        self.check_steps(problem, &profile)?;
        let (predicted, blueprint) = self.room(client, problem, &profile, Source::Summaries);
        let (cubes, units) = grid(client, tiles(problem, &blueprint));
        let key = summaries.key.view();
        let numbers = NumbersLaunch::new(
            (batch * kv_heads) as u32,
            kv_heads as u32,
            problem.group() as u32,
            query_len as u32,
            head_dim as u32,
            0,
            0,
            1,
            1,
            1,
            1.0,
            self.covariance.rows(head_dim) as u32,
            problem.scale,
            f32::NEG_INFINITY,
        );
        // SAFETY: queries and summaries were checked against the problem; each unit checks its rows.
        unsafe {
            predict_kernel::launch_unchecked(
                client,
                cubes,
                units,
                elements(query),
                elements(key),
                elements(summaries.parts[0].view()),
                elements(summaries.parts[1].view()),
                words(&summaries.spans),
                elements(predicted.view()),
                strides(query),
                strides(key),
                numbers,
                blueprint,
                problem.element.into(),
                blueprint.lanes,
            );
        }
        Ok(predicted)
    }

    /// Room for a prediction, and what it is compiled for.
    fn room(
        &self,
        client: &Client,
        problem: &Problem,
        profile: &DeviceProfile,
        source: Source,
    ) -> (Tensor<4>, Blueprint) {
        let shape = [problem.batch, problem.heads, 1, problem.query_len];
        (Tensor::empty(client, shape, Element::F32), blueprint(problem, profile, self.covariance, source))
    }

    /// Numbers of the mean, and of the scatter.
    fn part_lengths(&self, kv_heads: usize, head_dim: usize) -> [usize; 2] {
        [kv_heads * head_dim, kv_heads * self.covariance.rows(head_dim) * head_dim]
    }

    /// Routes `[B, H, Tq]` of two reaches from the log-sum-exp of the near branch, `[B, H, Tq]`, and the predicted mass
    /// of the bulk, which become the decision's scores. A NaN in either gives an invalid route; a row without a bulk stays
    /// near. Nothing is read back to the host.
    ///
    /// # Errors
    /// As [`TensorView::check`]; [`Error::NotContiguous`]; [`Error::Refused`] when the device cannot count routes.
    pub fn decide(
        &self,
        client: &Client,
        problem: &Problem,
        near: TensorView<'_, 3>,
        predicted: Tensor<4>,
    ) -> Result<Decision> {
        let Problem { batch, heads, query_len, .. } = *problem;
        near.check("the near log-sum-exp", client, problem.lse_shape(), Element::F32)?;
        near.check_contiguous("the near log-sum-exp")?;
        let mass = predicted.view();
        mass.check("the predicted mass", client, [batch, heads, 1, query_len], Element::F32)?;
        mass.check_contiguous("the predicted mass")?;
        let geometry = RouteGeometry::new(batch, heads, query_len, 2)?;
        let profile = DeviceProfile::of(client);
        let (cubes, units) = over_quads(client, &profile, "moment gate", geometry)?;
        let (routes, counts) = outputs(client, geometry)?;
        // Of a tau of 1 it is -inf: any mass at all is too much.
        let cut = (1.0 / f64::from(self.tau) - 1.0).ln() as f32;
        // SAFETY: both tensors were checked; each unit checks its number against the quads there are.
        unsafe {
            decide_kernel::launch_unchecked(
                client,
                cubes,
                units,
                elements(mass),
                elements(near),
                words(routes.handle()),
                words(&counts),
                (batch * heads) as u32,
                query_len as u32,
                cut,
                profile.has_planes(),
            );
        }
        Ok(Decision { scores: Some(predicted), routes, counts })
    }

    /// Whether `routine` can predict for `problem` on a device with this profile; if not, why. Needs no device. The routine
    /// that a problem asks for is the attention's: it is looked at here only where that is the portable one.
    ///
    /// # Errors
    /// The [`Refusal`] says why not.
    pub fn supports(
        &self,
        routine: Routine,
        problem: &Problem,
        profile: &DeviceProfile,
    ) -> Result<(), Refusal> {
        match routine {
            Routine::Mma if problem.routine == Some(Routine::Portable) => Err(Refusal::NotAsked),
            Routine::Mma => mma::blueprint(problem, self.covariance, profile).map(|_| ()),
            Routine::Portable if !profile.elements.contains(&problem.element) => {
                Err(Refusal::Element { element: problem.element, device: profile.elements.clone() })
            }
            // Queries of a tile live in a unit's private memory.
            Routine::Portable if !(1..=512).contains(&problem.head_dim) => {
                Err(Refusal::HeadDim { head_dim: problem.head_dim, supported: "1 to 512" })
            }
            Routine::Portable => Ok(()),
            _ => Err(Refusal::NotImplemented),
        }
    }

    /// The routine that [`predict`](Self::predict) takes: the fastest that can, which by given moments is the portable one.
    ///
    /// # Errors
    /// [`Error::Refused`] with every routine's reason when none can.
    pub fn routine(
        &self,
        problem: &Problem,
        profile: &DeviceProfile,
        inputs: &Inputs<'_>,
        given: Option<&Moments>,
    ) -> Result<Routine> {
        let mut refusals = Vec::new();
        for routine in Routine::ALL {
            let takes = self.supports(routine, problem, profile).and_then(|()| match routine {
                Routine::Mma if given.is_some() => Err(Refusal::NotImplemented),
                Routine::Mma => mma::takes(inputs),
                _ => Ok(()),
            });
            match takes {
                Ok(()) => return Ok(routine),
                Err(refusal) => refusals.push((routine, refusal)),
            }
        }
        Err(refused(refusals))
    }

    /// Checks what steps of decoding, and caches, which have the portable routine alone, need of the problem.
    fn check_steps(&self, problem: &Problem, profile: &DeviceProfile) -> Result<()> {
        takes(problem)?;
        let supported = self.supports(Routine::Portable, problem, profile);
        supported.map_err(|refusal| refused(vec![(Routine::Portable, refusal)]))
    }

    fn check_given(&self, client: &Client, problem: &Problem, moments: &Moments) -> Result<()> {
        let Problem { batch, kv_heads, head_dim, .. } = *problem;
        let [of_batch, ..] = moments.mean.shape();
        let of_batch = if of_batch == 1 { 1 } else { batch };
        let rows = self.covariance.rows(head_dim);
        let (mean, scatter) = (moments.mean.view(), moments.scatter.view());
        mean.check("the mean key", client, [of_batch, kv_heads, head_dim], Element::F32)?;
        scatter.check("the scatter of keys", client, [of_batch, kv_heads, rows, head_dim], Element::F32)?;
        // As many rows may mean something else.
        let low_rank = [self.covariance, moments.covariance()];
        let low_rank =
            low_rank.into_iter().any(|covariance| matches!(covariance, Covariance::LowRank { .. }));
        if low_rank && moments.covariance() != self.covariance {
            let found = format!("{:?}", moments.covariance());
            return Err(Error::option(
                "the covariance of given moments",
                found,
                format!("{:?}", self.covariance),
            ));
        }
        Ok(())
    }
}

impl Summary for MomentGate {
    fn outside(&self) -> (Window, usize) {
        (self.window, self.sinks as usize)
    }

    /// Two parts: the mean key, and the scatter about it.
    fn parts(&self, client: &Client, problem: &Problem) -> Result<Vec<usize>> {
        self.covariance.check_sums()?;
        self.check_steps(problem, &DeviceProfile::of(client))?;
        Ok(self.part_lengths(problem.kv_heads, problem.head_dim).to_vec())
    }

    fn fold(
        &self,
        client: &Client,
        keys: usize,
        parts: &[Tensor<1>],
        key: TensorView<'_, 4>,
        _value: TensorView<'_, 4>,
    ) -> Result<Vec<Tensor<1>>> {
        let more = Moments::of(client, key, 0..key.shape()[2], self.covariance)?;
        let [mean, scatter] = parts else {
            return Err(Error::shape("the parts of moments", "[2]", &[parts.len()]));
        };
        let all = more.after(client, keys, [mean.handle(), scatter.handle()])?;
        let [mean, scatter] = self.part_lengths(key.shape()[1], key.shape()[3]);
        Ok(vec![
            Tensor::new(all.mean.into_handle(), Element::F32, [mean], [1]),
            Tensor::new(all.scatter.into_handle(), Element::F32, [scatter], [1]),
        ])
    }
}

/// How many units predict.
fn tiles(problem: &Problem, blueprint: &Blueprint) -> usize {
    problem.batch * problem.kv_heads * problem.packed_rows().div_ceil(blueprint.lanes)
}

fn refused(refusals: Vec<(Routine, Refusal)>) -> Error {
    Error::Refused { operator: "moment gate", refusals: Refusals(refusals) }
}

/// Refuses what no routine predicts for.
fn takes(problem: &Problem) -> Result<()> {
    if let Some(cap) = problem.softcap {
        return Err(Error::option("softcap", cap, "none: scores under a softcap are not normal"));
    }
    Ok(())
}

/// The one place where tile sizes are decided. On a CPU a row is a lane of the widest vector register; on a GPU, where
/// every unit already is a lane, four rows share each number of a scatter that is loaded.
fn blueprint(
    problem: &Problem,
    profile: &DeviceProfile,
    covariance: Covariance,
    source: Source,
) -> Blueprint {
    let head_dim = problem.head_dim;
    Blueprint {
        covariance,
        source,
        head_dim,
        lanes: match profile.cpu_cores {
            Some(_) => (profile.vector_bits / 32).clamp(4, 16) as usize,
            None => 4,
        },
        block: (1 << head_dim.trailing_zeros()).min(8),
        staged: profile.cpu_cores.is_some() || profile.cuda_arch.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tau_that_is_no_share_is_refused() {
        let window = Window::new(8).unwrap();
        for tau in [0.0, -0.5, 1.000_001, f32::NAN, f32::INFINITY] {
            assert!(
                matches!(MomentGate::new(window, tau), Err(Error::Option { option: "tau", .. })),
                "{tau}"
            );
        }
        let gate = MomentGate::new(window, 1.0).unwrap();
        assert!(matches!(gate.with_chunk(0), Err(Error::Option { .. })));
    }
}
