use bifocal_core::{
    DeviceProfile, Error, Problem, Reach, Refusal, Refusals, Result, Routine,
    device::{
        Gradients, Inputs, Partial, Rows, Saved, Sequences,
        launch::{elements, words},
    },
};
use cubecl::{client::Client, prelude::BufferArg, server::Handle};

use crate::{
    mma, portable, rows::Sight, sinks, tensor_core::launch::ITEM_ROWS, visibility::Visibility, wgmma,
};

/// Rows per work item on a device: what a dispatch plan cuts its lists into.
pub fn item_rows(profile: &DeviceProfile) -> u32 {
    if profile.cuda_arch.is_some_and(|arch| arch >= 80) { ITEM_ROWS } else { portable::lanes(profile) }
}

/// Whether `routine` can run `problem` on a device with this profile; if not, why.
///
/// # Errors
/// The [`Refusal`] says why not.
pub fn supports(routine: Routine, problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
    if problem.routine.is_some_and(|forced| forced != routine) {
        return Err(Refusal::NotAsked);
    }
    match routine {
        Routine::Wgmma => wgmma::supports(problem, profile),
        Routine::Mma => mma::supports(problem, profile),
        Routine::Portable => portable::supports(problem, profile),
        _ => Err(Refusal::NotImplemented),
    }
}

/// Whether `routine` can run the backward pass of `problem` on a device with this profile; if not, why.
///
/// # Errors
/// The [`Refusal`] says why not.
pub fn supports_backward(
    routine: Routine,
    problem: &Problem,
    profile: &DeviceProfile,
) -> Result<(), Refusal> {
    if problem.routine.is_some_and(|forced| forced != routine) {
        return Err(Refusal::NotAsked);
    }
    match routine {
        Routine::Wgmma => wgmma::backward::supports(problem, profile),
        Routine::Mma => mma::backward::supports(problem, profile),
        Routine::Portable => portable::supports(problem, profile),
        _ => Err(Refusal::NotImplemented),
    }
}

/// The rows of a call and what they see, as every routine's launch needs it. Buffers that a kernel does not read still
/// have to be bound: they are the query's then.
pub(crate) struct Work<'a> {
    pub(crate) visibility: Visibility,
    pub(crate) window: i32,
    pub(crate) sinks: i32,
    /// The bounds of every query token, where the batch is ragged.
    pub(crate) sequences: Option<&'a Handle>,
    pub(crate) routed: bool,
    pub(crate) rows: &'a Handle,
    pub(crate) list_counts: &'a Handle,
    pub(crate) items: &'a Handle,
    pub(crate) item_counts: &'a Handle,
    /// Zeros to count in, where a plan has them.
    pub(crate) counters: Option<&'a Handle>,
    pub(crate) reach: u32,
    pub(crate) max_items: usize,
    pub(crate) item_rows: u32,
}

impl<'a> Work<'a> {
    fn new(
        problem: &Problem,
        profile: &DeviceProfile,
        inputs: &Inputs<'a>,
        reach: Reach,
        rows: Rows<'a>,
        routine: Routine,
    ) -> Result<Self> {
        let (visibility, window, sinks) = Visibility::of(reach, problem.key_len)
            .ok_or_else(|| Error::option("reach", reach, "a reach that this engine knows"))?;
        let lists = problem.batch * problem.kv_heads;
        let unused = inputs.query.handle();
        let sequences = inputs.sequences.map(Sequences::bounds);
        let work = match rows {
            Rows::All => {
                let item_rows = match routine {
                    Routine::Portable => portable::lanes(profile),
                    _ => item_rows(profile),
                };
                Self {
                    visibility,
                    window,
                    sinks,
                    sequences,
                    routed: false,
                    rows: unused,
                    list_counts: unused,
                    items: unused,
                    item_counts: unused,
                    counters: None,
                    reach: 0,
                    max_items: lists * problem.packed_rows().div_ceil(item_rows as usize),
                    item_rows,
                }
            }
            Rows::Routed(routed) => {
                if routed.item_rows != item_rows(profile) {
                    let expected =
                        format!("{} (what the engine computes at once on this device)", item_rows(profile));
                    return Err(Error::option("rows per item of the plan", routed.item_rows, expected));
                }
                let shape = [problem.batch, problem.kv_heads, problem.packed_rows()];
                if routed.shape != shape {
                    return Err(Error::shape("the dispatch plan", format!("{shape:?}"), &routed.shape));
                }
                Self {
                    visibility,
                    window,
                    sinks,
                    sequences,
                    routed: true,
                    rows: routed.rows,
                    list_counts: routed.list_counts,
                    items: routed.items,
                    item_counts: routed.item_counts,
                    counters: Some(routed.counters),
                    reach: routed.reach,
                    max_items: routed.max_items,
                    item_rows: routed.item_rows,
                }
            }
        };
        if work.max_items as u64 > u64::from(u32::MAX) / 3 {
            let limit = u128::from(u32::MAX / 3);
            return Err(Error::TooLarge { what: "work items", size: work.max_items as u128, limit });
        }
        Ok(work)
    }

    /// The bounds of every query token; any buffer where the batch is not ragged.
    pub(crate) fn bounds(&self) -> BufferArg {
        words(self.sequences.unwrap_or(self.items))
    }

    /// The sink logits of the inputs; any buffer where they have none.
    ///
    /// # Safety
    /// The inputs have passed [`Inputs::check`].
    pub(crate) unsafe fn sink_logits(&self, inputs: &Inputs<'_>) -> BufferArg {
        match inputs.sink_logits {
            // SAFETY: the caller's.
            Some(sinks) => unsafe { elements(sinks) },
            None => words(self.items),
        }
    }

    pub(crate) fn sight(&self) -> Sight {
        let Self { visibility, routed, sequences, .. } = *self;
        Sight { visibility, routed, ragged: sequences.is_some() }
    }
}

/// Softmax attention of `rows` over the keys that `reach` shows, with the fastest routine that takes the problem and
/// the layout of its tensors.
///
/// The caller names itself for messages.
///
/// # Errors
/// As [`Inputs::check`] and [`Partial::check`]; [`Error::Refused`] when every routine refuses;
/// [`Error::Option`] when a dispatch plan was cut for another item size than the device's.
pub fn attend(
    operator: &'static str,
    client: &Client,
    problem: &Problem,
    inputs: &Inputs<'_>,
    reach: Reach,
    rows: Rows<'_>,
    partial: &Partial,
) -> Result<Routine> {
    inputs.check(client, problem)?;
    partial.check(client, problem)?;
    let profile = DeviceProfile::of(client);
    let mut refusals = Vec::new();
    for routine in Routine::ALL {
        let takes = supports(routine, problem, &profile).and_then(|()| match routine {
            Routine::Wgmma => wgmma::takes(inputs, partial),
            Routine::Mma => mma::takes(inputs, partial),
            _ => Ok(()),
        });
        match takes {
            Ok(()) => {
                let work = Work::new(problem, &profile, inputs, reach, rows, routine)?;
                match routine {
                    Routine::Wgmma => {
                        wgmma::launch(client, &profile, problem, inputs, &work, partial);
                    }
                    Routine::Mma => {
                        mma::launch(client, problem, inputs, &work, partial);
                    }
                    _ => portable::launch(client, &profile, problem, inputs, &work, partial),
                }
                return Ok(routine);
            }
            Err(refusal) => refusals.push((routine, refusal)),
        }
    }
    Err(Error::Refused { operator, refusals: Refusals(refusals) })
}

/// Adds the gradients of `rows`, whose forward pass saw the keys that `reach` shows, to `gradients`, or stores them where
/// these are unset, with the fastest routine that takes the problem and the layout of its tensors.
///
/// The caller names itself for messages.
///
/// # Errors
/// As [`Inputs::check`], [`Saved::check`] and [`Gradients::check`]; [`Error::Refused`] when every routine refuses;
/// [`Error::Option`] when a dispatch plan was cut for another item size than the device's.
pub fn backward(
    operator: &'static str,
    client: &Client,
    problem: &Problem,
    inputs: &Inputs<'_>,
    reach: Reach,
    rows: Rows<'_>,
    saved: &Saved<'_>,
    gradients: &Gradients,
) -> Result<Routine> {
    inputs.check(client, problem)?;
    saved.check(client, problem)?;
    gradients.check(client, problem, inputs)?;
    let profile = DeviceProfile::of(client);
    let mut refusals = Vec::new();
    for routine in Routine::ALL {
        let takes = supports_backward(routine, problem, &profile).and_then(|()| match routine {
            Routine::Wgmma => wgmma::backward::takes(problem, inputs, saved),
            Routine::Mma => mma::backward::takes(problem, inputs, saved),
            _ => Ok(()),
        });
        match takes {
            Ok(()) => {
                let work = Work::new(problem, &profile, inputs, reach, rows, routine)?;
                match routine {
                    Routine::Wgmma => {
                        wgmma::backward::launch(client, problem, inputs, &work, saved, gradients);
                    }
                    Routine::Mma => {
                        mma::backward::launch(client, &profile, problem, inputs, &work, saved, gradients);
                    }
                    _ => {
                        portable::backward::launch(client, &profile, problem, inputs, &work, saved, gradients)
                    }
                }
                sinks::launch(client, problem, inputs, &work, saved, gradients);
                return Ok(routine);
            }
            Err(refusal) => refusals.push((routine, refusal)),
        }
    }
    Err(Error::Refused { operator, refusals: Refusals(refusals) })
}
