//! The kernel as CUDA C++.

use bifocal_core::device::Tensor;
use cubecl::{ir::ElemType, prelude::*};

use super::kernel::{attend_kernel, threads};
use crate::{
    portable::strides,
    tensor_core::{
        Blueprint, NumbersLaunch,
        source::{Gpu, buffer, handle, target},
    },
};

/// The CUDA C++ of one kernel.
pub(super) fn source(blueprint: Blueprint) -> Result<String, String> {
    let element: ElemType = blueprint.shape.operand.element().into();
    let out: ElemType = if blueprint.out_f32 { bifocal_core::Element::F32.into() } else { element };
    let map = || {
        let shape = [1, 1, blueprint.shape.keys, blueprint.shape.dim];
        let strides = [blueprint.shape.dim; 3];
        let tensor = Tensor::new(
            handle(),
            blueprint.shape.operand.element(),
            shape,
            [strides[0], strides[1], strides[2], 1],
        );
        // SAFETY: nothing is launched, so nothing is read or written.
        unsafe { super::tensor_map(tensor.view(), element, blueprint) }
    };
    let kernel = attend_kernel::create_dummy_kernel(
        Gpu::H100.properties(),
        target(),
        CubeCount::Static(1, 1, 1),
        CubeDim::new_1d(threads(blueprint)),
        buffer(),
        map(),
        map(),
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
        buffer(),
        strides([1; 4]),
        strides([1; 4]),
        strides([1; 4]),
        strides([1; 4]),
        NumbersLaunch::new(1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1.0, 1.0, 0.0, 0.0),
        1,
        1,
        blueprint,
        [element, out],
        blueprint.shape.keys / 2,
        blueprint.shape.keys / 4,
        blueprint.shape.columns() / 2,
    );
    Gpu::H100.compile(&kernel)
}
