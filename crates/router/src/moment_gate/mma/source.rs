//! The kernels as CUDA C++.

use bifocal_core::{Element, Problem};
use bifocal_tensor_core::source::{Gpu, ONE_CUBE, Source, buffer, target};
use cubecl::prelude::*;

use super::{
    blueprint::Blueprint,
    kernel::{NumbersLaunch, predict_kernel, sum_kernel},
};
use crate::launch::StridesLaunch;

/// The CUDA C++ of one kernel per tile, with its name and architecture (`KERNEL.ARCHITECTURE`).
pub fn sources() -> impl Iterator<Item = (String, Source)> {
    let cases =
        [(Element::Bf16, 1, 128), (Element::Bf16, 4, 128), (Element::F16, 1, 128), (Element::Bf16, 1, 64)];
    [Gpu::A100, Gpu::H100].into_iter().flat_map(move |gpu| {
        cases.into_iter().flat_map(move |(element, group, dim)| {
            let shared_memory = gpu.properties().hardware.max_shared_memory_size;
            let problem = Problem::new([1, group, 1, dim], [1, 1, 1, dim], element).ok();
            let blueprint = problem.and_then(|problem| Blueprint::new(&problem, shared_memory));
            blueprint.into_iter().flat_map(move |blueprint| {
                let name = |kernel| format!("moments-{kernel}-{element}-{dim}-group-{group}.{}", gpu.arch());
                let predict: Source = Box::new(move || predict_source(blueprint, gpu));
                let sum: Source = Box::new(move || sum_source(blueprint.of_sums(), gpu));
                let sums = (group == 1).then(|| (name("sum"), sum));
                [(name("predict"), predict)].into_iter().chain(sums)
            })
        })
    })
}

fn numbers() -> NumbersLaunch {
    NumbersLaunch::new(1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1.0, 0.0)
}

fn strides() -> StridesLaunch {
    StridesLaunch::new(1, 1, 1)
}

fn sum_source(blueprint: Blueprint, gpu: Gpu) -> Result<String, String> {
    let kernel = sum_kernel::create_dummy_kernel(
        gpu.properties(),
        target(),
        ONE_CUBE,
        CubeDim::new_1d(blueprint.threads() as u32),
        buffer(),
        buffer(),
        strides(),
        numbers(),
        blueprint,
        blueprint.operand.element().into(),
    );
    gpu.compile(&kernel)
}

fn predict_source(blueprint: Blueprint, gpu: Gpu) -> Result<String, String> {
    let kernel = predict_kernel::create_dummy_kernel(
        gpu.properties(),
        target(),
        ONE_CUBE,
        CubeDim::new_1d(blueprint.threads() as u32),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        strides(),
        strides(),
        numbers(),
        blueprint,
        blueprint.operand.element().into(),
    );
    gpu.compile(&kernel)
}
