//! Both kernels as CUDA C++.

use bifocal_core::{Element, device::Tensor};
use cubecl::{ir::ElemType, prelude::*};

use super::{Blueprints, blueprints, kernel, key::key_kernel, query::query_kernel, resident, sizes};
use crate::{
    portable::strides,
    tensor_core::{
        Blueprint, NumbersLaunch, Shape,
        source::{Gpu, Sample, buffer, handle, samples, target},
    },
    visibility::Visibility,
    wgmma::tensor_map,
};

/// Writes a kernel.
type Source = Box<dyn FnOnce() -> Result<String, String>>;

fn numbers() -> NumbersLaunch {
    NumbersLaunch::new(1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1.0, 1.0, 0.0, 0.0)
}

/// How the copy engine would read keys, or values.
fn map(blueprint: Blueprint) -> TensorMapArg<Tiled> {
    let Shape { operand, keys, dim, .. } = blueprint.shape;
    let tensor = Tensor::new(handle(), operand.element(), [1, 1, keys, dim], [dim, dim, dim, 1]);
    // SAFETY: nothing is launched, so nothing is read or written.
    unsafe { tensor_map(tensor.view(), operand.element().into(), blueprint) }
}

fn key_source(blueprint: Blueprint) -> Result<String, String> {
    let element: ElemType = blueprint.shape.operand.element().into();
    let [scores, weights, sums] = sizes(blueprint);
    let kernel = key_kernel::create_dummy_kernel(
        Gpu::H100.properties(),
        target(),
        CubeCount::Static(1, 1, 1),
        CubeDim::new_1d(kernel::threads(blueprint)),
        buffer(),
        map(resident(blueprint)),
        map(resident(blueprint)),
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
        1.0,
        blueprint,
        element,
        scores,
        weights,
        sums,
    );
    Gpu::H100.compile(&kernel)
}

fn query_source(blueprint: Blueprint) -> Result<String, String> {
    let element: ElemType = blueprint.shape.operand.element().into();
    let [scores, slopes, sums] = sizes(blueprint);
    let kernel = query_kernel::create_dummy_kernel(
        Gpu::H100.properties(),
        target(),
        CubeCount::Static(1, 1, 1),
        CubeDim::new_1d(kernel::threads(blueprint)),
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
        strides([1; 4]),
        strides([1; 4]),
        strides([1; 4]),
        strides([1; 4]),
        numbers(),
        1.0,
        blueprint,
        element,
        scores,
        slopes,
        sums,
    );
    Gpu::H100.compile(&kernel)
}

/// The CUDA C++ of both kernels of some of the cases that [`samples`] asks for, with names and architecture: at head dim
/// 128 all routed ones in bf16 and plain full attention, at others routed full attention.
pub(crate) fn sources() -> impl Iterator<Item = (String, Source)> {
    let chosen = |sample: &Sample| {
        let full = sample.visibility == Visibility::All && !sample.ragged;
        let bf16 = sample.problem.element == Element::Bf16;
        bf16 && if sample.problem.head_dim == 128 { sample.routed || full } else { sample.routed && full }
    };
    samples().filter(chosen).flat_map(|sample| {
        blueprints(&sample.problem, sample.sight()).into_iter().flat_map(move |Blueprints { key, query }| {
            let name = |kind| format!("wgmma-backward-{kind}-{}.{}", sample.name(), Gpu::H100.arch());
            let of_key: Source = Box::new(move || key_source(key));
            let of_query: Source = Box::new(move || query_source(query));
            [(name("key"), of_key), (name("query"), of_query)]
        })
    })
}
