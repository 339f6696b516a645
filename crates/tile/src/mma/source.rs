//! The kernel as CUDA C++.

use cubecl::{ir::ElemType, prelude::*};

use super::{kernel::attend_kernel, sizes};
use crate::{
    portable::strides,
    tensor_core::{
        Blueprint, NumbersLaunch,
        source::{Gpu, buffer, target},
    },
};

/// The CUDA C++ of one kernel.
pub(super) fn source(blueprint: Blueprint, gpu: Gpu) -> Result<String, String> {
    let element: ElemType = blueprint.shape.operand.element().into();
    let out: ElemType = if blueprint.out_f32 { bifocal_core::Element::F32.into() } else { element };
    let [scores, weights, outputs, warp_scores, warp_weights, warp_outputs] = sizes(blueprint);
    let kernel = attend_kernel::create_dummy_kernel(
        gpu.properties(),
        target(),
        CubeCount::Static(1, 1, 1),
        CubeDim::new_1d(blueprint.threads()),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        strides([1; 4]),
        strides([1; 4]),
        strides([1; 4]),
        strides([1; 4]),
        NumbersLaunch::new(1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1.0, 1.0, 0.0, 0.0),
        blueprint,
        [element, out],
        scores,
        weights,
        outputs,
        warp_scores,
        warp_weights,
        warp_outputs,
    );
    gpu.compile(&kernel)
}
