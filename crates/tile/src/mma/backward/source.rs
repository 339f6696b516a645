//! Both kernels as CUDA C++.

use cubecl::prelude::*;

use super::{Blueprints, LARGE, blueprints, key, key::key_kernel, query::query_kernel, sizes};
use crate::{
    mma::SHARED_MEMORY,
    tensor_core::{
        Blueprint,
        source::{Gpu, ONE_CUBE, Sample, Source, backward_tensors, buffer, numbers, samples, target},
    },
    visibility::Visibility,
};

fn key_source(blueprint: Blueprint, gpu: Gpu) -> Result<String, String> {
    let [element, _] = blueprint.elements();
    let kernel = key_kernel::create_dummy_kernel(
        gpu.properties(),
        target(),
        ONE_CUBE,
        CubeDim::new_1d(key::threads(blueprint)),
        backward_tensors(),
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
    gpu.compile(&kernel)
}

fn query_source(blueprint: Blueprint, gpu: Gpu) -> Result<String, String> {
    let [element, _] = blueprint.elements();
    let kernel = query_kernel::create_dummy_kernel(
        gpu.properties(),
        target(),
        ONE_CUBE,
        CubeDim::new_1d(blueprint.threads()),
        backward_tensors(),
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
    gpu.compile(&kernel)
}

/// The CUDA C++ of both kernels of the cases that [`samples`] asks for: for the A100 all of head dim 128, one with a
/// softcap besides, and the plain routed ones of other head dims; for the H100 full attention; one for consumer cards,
/// whose cubes have less shared memory. With names and architectures.
pub(crate) fn sources() -> impl Iterator<Item = (String, Source)> {
    let plain = |sample: &Sample| sample.routed && !sample.ragged;
    let full = move |sample: &Sample| plain(sample) && sample.visibility == Visibility::All;
    let one = || samples().find(|sample| full(sample) && sample.problem.head_dim == 128);
    let capped = one().and_then(|sample| {
        let problem = sample.problem.with_softcap(1.0).ok()?;
        Some(Sample { problem, ..sample })
    });
    let on_a100 =
        samples().filter(move |sample| sample.problem.head_dim == 128 || plain(sample)).chain(capped);
    let on_a100 = on_a100.map(|sample| (Gpu::A100, LARGE, "", sample));
    let on_h100 = samples().filter(full).map(|sample| (Gpu::H100, 227 << 10, "", sample));
    let on_small = one().map(|sample| (Gpu::A100, SHARED_MEMORY, "-small", sample));
    on_a100.chain(on_h100).chain(on_small).flat_map(|(gpu, shared_memory, room, sample)| {
        let of_both = blueprints(&sample.problem, sample.sight(), shared_memory);
        of_both.into_iter().flat_map(move |Blueprints { key, query }| {
            let name = |kind| format!("mma-backward-{kind}{room}-{}.{}", sample.name(), gpu.arch());
            let of_key: Source = Box::new(move || key_source(key, gpu));
            let of_query: Source = Box::new(move || query_source(query, gpu));
            [(name("key"), of_key), (name("query"), of_query)]
        })
    })
}
