//! The kernels as CUDA C++.

use bifocal_core::{Element, Problem};
use bifocal_tensor_core::source::{Gpu, ONE_CUBE, Source, buffer, target};
use cubecl::prelude::*;

use super::{Blueprint, PLANE, PLANES, kernel::attend_kernel};
use crate::{
    step::{
        pieces::Cut,
        rows::{NumbersLaunch, StridesLaunch},
    },
    view::PlacesLaunch,
};

/// The CUDA C++ of one kernel per shape of tile, with its name and architecture (`KERNEL.ARCHITECTURE`).
pub fn sources() -> impl Iterator<Item = (String, Source)> {
    let cases = [(Element::Bf16, 1, 128), (Element::Bf16, 16, 128), (Element::F16, 4, 64)];
    [Gpu::A100, Gpu::H100].into_iter().flat_map(move |gpu| {
        cases.into_iter().filter_map(move |(element, rows, dim)| {
            let problem = Problem::new([1, rows, 1, dim], [1, 1, 64, dim], element).ok()?;
            let blueprint = Blueprint::new(&problem, Cut::Even, true)?;
            let name = format!("decode-{element}-{dim}-rows-{rows}.{}", gpu.arch());
            let source: Source = Box::new(move || source(blueprint, gpu));
            Some((name, source))
        })
    })
}

fn source(blueprint: Blueprint, gpu: Gpu) -> Result<String, String> {
    let kernel = attend_kernel::create_dummy_kernel(
        gpu.properties(),
        target(),
        ONE_CUBE,
        CubeDim::new_1d(PLANE * PLANES as u32),
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
        StridesLaunch::new(1, 1, 1),
        PlacesLaunch::new(1, 1, 1, 1, 1),
        NumbersLaunch::new(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0, 0.0, 0.0),
        blueprint,
        blueprint.operand.element().into(),
    );
    gpu.compile(&kernel)
}
