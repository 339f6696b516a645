//! The prediction on the tensor cores of NVIDIA GPUs since Ampere: `q^T S q` as a product of rows with a matrix, and S as a
//! product of keys with keys.
//!
//! Three launches: sums of chunks, what comes before each, predictions. Chunks are long, as many as there are
//! multiprocessors; within one a cube goes on from the sums that it holds in registers, step by step.

mod blueprint;
mod kernel;
mod source;

use bifocal_core::{
    DeviceProfile, Element, Error, Problem, Refusal, Result,
    device::{
        Inputs, Tensor,
        launch::{elements, grid},
    },
};
use bifocal_tensor_core::{Operand, aligned};
use cubecl::{client::Client, prelude::*};

pub use self::source::sources;
use self::{
    blueprint::Blueprint,
    kernel::{NumbersLaunch, before_kernel, predict_kernel, sum_kernel},
};
use crate::{launch::strides, moments::Covariance};

/// What the kernels are compiled for; or why this routine cannot predict for `problem` on a device with this profile.
pub(super) fn blueprint(
    problem: &Problem,
    covariance: Covariance,
    profile: &DeviceProfile,
) -> Result<Blueprint, Refusal> {
    if profile.cuda_arch.is_none_or(|arch| arch < 80) || !profile.has_planes() {
        return Err(Refusal::Architecture { needs: "an NVIDIA GPU of compute capability 8.0 or above" });
    }
    if Operand::of(problem.element).is_none() {
        let device = vec![Element::F16, Element::Bf16];
        return Err(Refusal::Element { element: problem.element, device });
    }
    // A diagonal is no matrix.
    if covariance != Covariance::Full {
        return Err(Refusal::NotImplemented);
    }
    let head_dim = problem.head_dim;
    if !matches!(head_dim, 64 | 128) {
        return Err(Refusal::HeadDim { head_dim, supported: "64 or 128" });
    }
    let supported = "64 where a cube has less than 163 KiB of shared memory";
    Blueprint::new(problem, profile.shared_memory).ok_or(Refusal::HeadDim { head_dim, supported })
}

/// Whether memory is laid out as 16-byte accesses need it; if not, why.
pub(super) fn takes(inputs: &Inputs<'_>) -> Result<(), Refusal> {
    aligned("query", inputs.query, false)?;
    aligned("key", inputs.key, false)
}

/// The bulks of a call.
#[derive(Clone, Copy)]
pub(super) struct Bulks {
    /// Keys in the bulk of token 0, less than none where it has none and other tokens may have.
    pub(super) first: i64,
    /// Keys in that of the last token.
    pub(super) largest: usize,
    pub(super) sinks: usize,
    /// Keys per chunk.
    pub(super) chunk: usize,
}

/// Predicts by the moments of each row's own bulk. Everything has been checked: [`blueprint()`], [`takes`], and what the gate
/// checks.
///
/// # Errors
/// [`Error::TooLarge`].
pub(super) fn predict(
    client: &Client,
    problem: &Problem,
    inputs: &Inputs<'_>,
    blueprint: Blueprint,
    bulks: Bulks,
) -> Result<Tensor<4>> {
    let Problem { batch, heads, kv_heads, query_len, .. } = *problem;
    let (lists, keys, chunk) = (batch * kv_heads, bulks.largest, bulks.chunk);
    let chunks = keys.div_ceil(chunk).max(1);
    let offset = bulks.first - 1;
    let first_chunk = offset.div_euclid(chunk as i64);
    let segments = (query_len + offset.rem_euclid(chunk as i64) as usize).div_ceil(chunk);
    let limit = u128::from(u32::MAX);
    let cubes = segments.max(chunks) as u128 * lists as u128;
    for (what, size) in
        [("moments of keys", cubes * blueprint.numbers() as u128), ("rows", cubes * chunk as u128)]
    {
        if size > limit {
            return Err(Error::TooLarge { what, size, limit });
        }
    }
    let numbers = || {
        NumbersLaunch::new(
            lists as u32,
            kv_heads as u32,
            problem.group() as u32,
            query_len as u32,
            // Where all keys are sinks there is no bulk, and the last of them is read for nothing.
            bulks.sinks.min(problem.key_len - 1) as u32,
            keys as u32,
            chunk as u32,
            chunks as u32,
            (keys / 4) as u32,
            segments as u32,
            first_chunk as i32,
            offset as i32,
            problem.scale,
            f32::NEG_INFINITY,
        )
    };
    let sums = Tensor::<1>::empty(client, [lists * chunks * blueprint.numbers()], Element::F32);
    let predicted = Tensor::empty(client, [batch, heads, 1, query_len], Element::F32);
    let element = problem.element;
    let cubes = |count: usize| CubeCount::Static(count as u32, 1, 1);
    // SAFETY: the checks before keep every index that shapes and strides can form inside the buffers; rows and keys beyond
    // the problem's are neither read nor written.
    unsafe {
        let of_sums = blueprint.of_sums();
        sum_kernel::launch_unchecked(
            client,
            cubes(lists * chunks),
            CubeDim::new_1d(of_sums.threads() as u32),
            elements(inputs.key),
            elements(sums.view()),
            strides(inputs.key),
            numbers(),
            of_sums,
            element.into(),
        );
        let (count, units) = grid(client, lists * blueprint.numbers());
        before_kernel::launch_unchecked(
            client,
            count,
            units,
            elements(sums.view()),
            numbers(),
            blueprint.numbers() as u32,
        );
        predict_kernel::launch_unchecked(
            client,
            cubes(lists * segments),
            CubeDim::new_1d(blueprint.threads() as u32),
            elements(inputs.query),
            elements(inputs.key),
            elements(sums.view()),
            elements(predicted.view()),
            strides(inputs.query),
            strides(inputs.key),
            numbers(),
            blueprint,
            element.into(),
        );
    }
    Ok(predicted)
}
