//! The kernel as CUDA C++.

use bifocal_core::device::Tensor;
use cubecl::prelude::*;

use super::kernel::{attend_kernel, threads};
use crate::{
    arguments::strides,
    tensor_core::{
        Blueprint, Shape,
        source::{Gpu, ONE_CUBE, buffer, handle, numbers, target},
    },
};

/// How the copy engine would read keys, or values.
pub(super) fn map(blueprint: Blueprint) -> TensorMapArg<Tiled> {
    let Shape { operand, keys, dim, .. } = blueprint.shape;
    let tensor = Tensor::new(handle(), operand.element(), [1, 1, keys, dim], [dim, dim, dim, 1]);
    // SAFETY: nothing is launched, so nothing is read or written.
    unsafe { super::tensor_map(tensor.view(), operand.element().into(), blueprint) }
}

/// The CUDA C++ of one kernel.
pub(super) fn source(blueprint: Blueprint) -> Result<String, String> {
    let [element, out] = blueprint.elements();
    let kernel = attend_kernel::create_dummy_kernel(
        Gpu::H100.properties(),
        target(),
        ONE_CUBE,
        CubeDim::new_1d(threads(blueprint)),
        buffer(),
        map(blueprint),
        map(blueprint),
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
        numbers(),
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
