//! Kernels as CUDA C++, written on the host: what a machine without a GPU can hand to NVRTC and ptxas.

use bifocal_core::{Element, Problem};
pub(crate) use bifocal_tensor_core::source::{Gpu, ONE_CUBE, Source, buffer, handle, target};
use cubecl::prelude::*;

use super::NumbersLaunch;
use crate::{
    arguments::{BackwardTensorsLaunch, ForwardTensorsLaunch, LayoutLaunch, strides},
    rows::Sight,
    visibility::Visibility,
};

/// One of the cases that kernels are compiled for: one for every shape of tile and every visibility; softcap, sink
/// logits and f32 outputs change little.
pub(crate) struct Sample {
    pub(crate) problem: Problem,
    pub(crate) visibility: Visibility,
    pub(crate) routed: bool,
    pub(crate) ragged: bool,
}

impl Sample {
    pub(crate) fn sight(&self) -> Sight {
        Sight { visibility: self.visibility, routed: self.routed, ragged: self.ragged }
    }

    pub(crate) fn name(&self) -> String {
        let Problem { element, head_dim, softcap, .. } = self.problem;
        let routed = if self.routed { "-routed" } else { "" };
        let ragged = if self.ragged { "-ragged" } else { "" };
        let softcap = if softcap.is_some() { "-softcap" } else { "" };
        format!("{:?}-{element}-{head_dim}{routed}{ragged}{softcap}", self.visibility).to_lowercase()
    }
}

/// One kernel for every shape of tile and every visibility; softcap, sink logits and f32 outputs change little.
pub(crate) fn samples() -> impl Iterator<Item = Sample> {
    use Visibility::{All, Far, NonCausal, SinksAndWindow, Window};

    let by_dim = [64, 96, 128, 256].into_iter().flat_map(|head_dim| {
        let cases = [
            (All, false, false),
            (All, true, false),
            (Window, false, false),
            (Window, true, false),
            (All, false, true),
        ];
        cases.map(|(visibility, routed, ragged)| (Element::Bf16, head_dim, visibility, routed, ragged))
    });
    let others = [(Element::F16, All), (Element::Bf16, SinksAndWindow), (Element::Bf16, Far)];
    let others = others.map(|(element, visibility)| (element, 128, visibility, true, false));
    let non_causal = [(Element::Bf16, 128, NonCausal, false, false)];
    let ragged = [All, Window, SinksAndWindow, Far, NonCausal];
    let ragged = ragged.map(|visibility| (Element::Bf16, 128, visibility, true, true));
    let all = by_dim.chain(others).chain(non_causal).chain(ragged);
    all.filter_map(|(element, head_dim, visibility, routed, ragged)| {
        let shape = [1, 1, 128, head_dim];
        let problem = Problem::new(shape, shape, element).ok()?;
        Some(Sample { problem, visibility, routed, ragged })
    })
}

fn layout() -> LayoutLaunch {
    LayoutLaunch::new(strides([1; 4]), strides([1; 4]), strides([1; 4]))
}

pub(crate) fn forward_tensors<E: Float>() -> ForwardTensorsLaunch<E> {
    ForwardTensorsLaunch::new(buffer(), buffer(), buffer(), buffer(), layout())
}

pub(crate) fn backward_tensors<E: Float>() -> BackwardTensorsLaunch<E, E> {
    let [query, key, value, d_out, lse, delta] = [(); 6].map(|()| buffer());
    BackwardTensorsLaunch::new(query, key, value, d_out, lse, delta, layout(), strides([1; 4]))
}

pub(crate) fn numbers() -> NumbersLaunch {
    NumbersLaunch::new(1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1.0, 1.0, 0.0, 0.0)
}
