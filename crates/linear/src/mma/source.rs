//! The kernels as CUDA C++.

use bifocal_core::{Element, Problem};
use bifocal_tensor_core::source::{Gpu, ONE_CUBE, Source, buffer, target};
use cubecl::prelude::*;

use super::{
    blueprint::{Blueprint, THREADS},
    kernel::{NumbersLaunch, read_kernel, sum_kernel},
};
use crate::portable::strides;

/// The CUDA C++ of one kernel per tile, with its name and architecture (`KERNEL.ARCHITECTURE`).
pub fn sources() -> impl Iterator<Item = (String, Source)> {
    let groups = [1, 2, 4].map(|group| (Element::Bf16, group, 128));
    let others = [(Element::F16, 4, 128), (Element::Bf16, 4, 64), (Element::F16, 1, 64)];
    let cases = groups.into_iter().chain(others);
    [Gpu::A100, Gpu::H100].into_iter().flat_map(move |gpu| {
        cases.clone().flat_map(move |(element, group, dim)| {
            let shared_memory = gpu.properties().hardware.max_shared_memory_size;
            let problem = Problem::new([1, group, 1, dim], [1, 1, 1, dim], element).ok();
            let blueprint = problem.and_then(|problem| Blueprint::new(&problem, shared_memory));
            blueprint.into_iter().flat_map(move |blueprint| {
                let name = |kernel| format!("linear-{kernel}-{element}-{dim}-group-{group}.{}", gpu.arch());
                let read: Source = Box::new(move || read_source(blueprint, gpu));
                let sum: Source = Box::new(move || sum_source(blueprint.of_sums(), gpu));
                let sums = (group == 4).then(|| (name("sum"), sum));
                [(name("read"), read)].into_iter().chain(sums)
            })
        })
    })
}

fn numbers() -> NumbersLaunch {
    NumbersLaunch::new(1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0)
}

fn sum_source(blueprint: Blueprint, gpu: Gpu) -> Result<String, String> {
    let kernel = sum_kernel::create_dummy_kernel(
        gpu.properties(),
        target(),
        ONE_CUBE,
        CubeDim::new_1d(THREADS as u32),
        buffer(),
        buffer(),
        buffer(),
        strides([1; 4]),
        strides([1; 4]),
        numbers(),
        blueprint,
        blueprint.operand.element().into(),
    );
    gpu.compile(&kernel)
}

fn read_source(blueprint: Blueprint, gpu: Gpu) -> Result<String, String> {
    let element = blueprint.operand.element();
    let kernel = read_kernel::create_dummy_kernel(
        gpu.properties(),
        target(),
        ONE_CUBE,
        CubeDim::new_1d(THREADS as u32),
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
        blueprint,
        [element, if blueprint.out_f32 { Element::F32 } else { element }].map(Into::into),
    );
    gpu.compile(&kernel)
}
