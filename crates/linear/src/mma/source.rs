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
    let plain = |element, group, dim| (element, group, dim, false, false);
    let cases = [
        plain(Element::Bf16, 1, 128),
        plain(Element::Bf16, 2, 128),
        plain(Element::Bf16, 4, 128),
        plain(Element::F16, 4, 128),
        plain(Element::Bf16, 4, 64),
        plain(Element::F16, 1, 64),
        // As RATTENTION keeps its far branch, and AHA over it.
        (Element::Bf16, 4, 128, true, false),
        (Element::Bf16, 4, 128, true, true),
    ];
    [Gpu::A100, Gpu::H100].into_iter().flat_map(move |gpu| {
        cases.into_iter().flat_map(move |(element, group, dim, out_f32, marked)| {
            let shared_memory = gpu.properties().hardware.max_shared_memory_size;
            let problem = Problem::new([1, group, 1, dim], [1, 1, 1, dim], element).ok();
            let blueprint = problem.and_then(|problem| Blueprint::new(&problem, shared_memory));
            blueprint.into_iter().flat_map(move |blueprint| {
                let (wide, rows) = (if out_f32 { "-f32" } else { "" }, if marked { "-marked" } else { "" });
                let name = |kernel| {
                    format!("linear-{kernel}-{element}-{dim}-group-{group}{wide}{rows}.{}", gpu.arch())
                };
                let of_rows = Blueprint { out_f32, marked, ..blueprint };
                let read: Source = Box::new(move || read_source(of_rows, gpu));
                let sum: Source = Box::new(move || sum_source(blueprint.of_sums(), gpu));
                let sums = (group == 4 && !out_f32).then(|| (name("sum"), sum));
                [(name("read"), read)].into_iter().chain(sums)
            })
        })
    })
}

fn numbers() -> NumbersLaunch {
    NumbersLaunch::new(1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 0.0)
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
