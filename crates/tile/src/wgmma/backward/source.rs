//! Both kernels as CUDA C++.

use bifocal_core::Element;
use cubecl::prelude::*;

use super::{Blueprints, blueprints, kernel, key::key_kernel, query::query_kernel, resident, sizes};
use crate::{
    tensor_core::{
        Blueprint,
        source::{Gpu, ONE_CUBE, Sample, Source, backward_tensors, buffer, numbers, samples, target},
    },
    visibility::Visibility,
    wgmma::source::map,
};

fn key_source(blueprint: Blueprint) -> Result<String, String> {
    let [element, _] = blueprint.elements();
    let kernel = key_kernel::create_dummy_kernel(
        Gpu::H100.properties(),
        target(),
        ONE_CUBE,
        CubeDim::new_1d(kernel::threads(blueprint)),
        backward_tensors(),
        map(resident(blueprint)),
        map(resident(blueprint)),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        numbers(),
        1.0,
        0,
        blueprint,
        element,
        sizes(blueprint),
    );
    Gpu::H100.compile(&kernel)
}

fn query_source(blueprint: Blueprint) -> Result<String, String> {
    let [element, _] = blueprint.elements();
    let kernel = query_kernel::create_dummy_kernel(
        Gpu::H100.properties(),
        target(),
        ONE_CUBE,
        CubeDim::new_1d(kernel::threads(blueprint)),
        backward_tensors(),
        map(blueprint),
        map(blueprint),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        numbers(),
        1.0,
        0,
        blueprint,
        element,
        sizes(blueprint),
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
