//! The kernel as CUDA C++.

use cubecl::prelude::*;

use super::{kernel::attend_kernel, sizes};
use crate::{
    arguments::strides,
    tensor_core::{
        Blueprint,
        source::{Gpu, ONE_CUBE, buffer, forward_tensors, numbers, target},
    },
};

/// The CUDA C++ of one kernel.
pub(super) fn source(blueprint: Blueprint, gpu: Gpu) -> Result<String, String> {
    let kernel = attend_kernel::create_dummy_kernel(
        gpu.properties(),
        target(),
        ONE_CUBE,
        CubeDim::new_1d(blueprint.threads()),
        forward_tensors(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        strides([1; 4]),
        numbers(),
        blueprint,
        blueprint.elements(),
        sizes(blueprint),
    );
    gpu.compile(&kernel)
}
