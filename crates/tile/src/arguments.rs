//! What kernels of every routine are launched with: the tensors of a call, and how they lie in memory.

use bifocal_core::device::{Inputs, Saved, launch::elements};
use cubecl::prelude::*;

use crate::engine::Work;

/// Strides of a `[batch, head, token, dim]` tensor, in elements; the last is 1.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Strides {
    pub(crate) batch: u32,
    pub(crate) head: u32,
    pub(crate) token: u32,
}

#[cube]
impl Strides {
    /// Where a row begins.
    pub(crate) fn at(&self, batch: u32, head: u32, token: u32) -> u32 {
        batch * self.batch + head * self.head + token * self.token
    }
}

pub(crate) fn strides(strides: [usize; 4]) -> StridesLaunch {
    StridesLaunch::new(strides[0] as u32, strides[1] as u32, strides[2] as u32)
}

/// How queries, keys and values lie in memory.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Layout {
    pub(crate) query: Strides,
    pub(crate) key: Strides,
    pub(crate) value: Strides,
}

fn layout(inputs: &Inputs<'_>) -> LayoutLaunch {
    let [query, key, value] = [inputs.query, inputs.key, inputs.value].map(|view| strides(view.strides()));
    LayoutLaunch::new(query, key, value)
}

/// What a forward kernel reads of the tensors of a call.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct ForwardTensors<E: Float> {
    pub(crate) query: Box<[E]>,
    pub(crate) key: Box<[E]>,
    pub(crate) value: Box<[E]>,
    /// One per query head, where the inputs have any.
    pub(crate) sink_logits: Box<[f32]>,
    pub(crate) layout: Layout,
}

/// # Safety
/// The inputs have passed [`Inputs::check`].
pub(crate) unsafe fn forward_tensors<E: Float>(
    inputs: &Inputs<'_>,
    work: &Work<'_>,
) -> ForwardTensorsLaunch<E> {
    // SAFETY: the caller's.
    unsafe {
        ForwardTensorsLaunch::new(
            elements(inputs.query),
            elements(inputs.key),
            elements(inputs.value),
            work.sink_logits(inputs),
            layout(inputs),
        )
    }
}

/// What a backward kernel reads of the tensors of a call.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct BackwardTensors<E: Float, O: Float> {
    pub(crate) query: Box<[E]>,
    pub(crate) key: Box<[E]>,
    pub(crate) value: Box<[E]>,
    pub(crate) d_out: Box<[O]>,
    /// The log-sum-exp of every row.
    pub(crate) lse: Box<[f32]>,
    /// The product of every row's output and its gradient.
    pub(crate) delta: Box<[f32]>,
    pub(crate) layout: Layout,
    pub(crate) d_out_strides: Strides,
}

/// # Safety
/// The inputs have passed [`Inputs::check`], and what was saved [`Saved::check`].
pub(crate) unsafe fn backward_tensors<E: Float, O: Float>(
    inputs: &Inputs<'_>,
    saved: &Saved<'_>,
) -> BackwardTensorsLaunch<E, O> {
    // SAFETY: the caller's.
    unsafe {
        BackwardTensorsLaunch::new(
            elements(inputs.query),
            elements(inputs.key),
            elements(inputs.value),
            elements(saved.d_out),
            elements(saved.partial.lse.view()),
            elements(saved.delta),
            layout(inputs),
            strides(saved.d_out.strides()),
        )
    }
}
