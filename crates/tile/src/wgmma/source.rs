//! Kernels as CUDA C++, written on the host: what a machine without a GPU can hand to NVRTC and ptxas.

use std::sync::Arc;

use bifocal_core::device::Tensor;
use cubecl::{
    Compiler,
    ir::{
        ContiguousElements, DeviceIdentity, DeviceProperties, ElemType, HardwareProperties,
        MemoryDeviceProperties, MmaProperties, TargetProperties, features::Tma,
    },
    prelude::*,
    profile::TimingMethod,
    server::Handle,
};
use cubecl_core::{
    device::{DeviceId, ServiceId},
    environment::stream::StreamId,
};
use cubecl_cpp::{
    cuda::mma::manual::contiguous_elements_cuda,
    register_supported_types,
    shared::{CompilationOptions, CppCompiler, CppSupportedFeatures},
    target::Cuda,
};

use super::kernel::attend_kernel;
use crate::{
    portable::strides,
    tensor_core::{Blueprint, NumbersLaunch},
};

/// The CUDA C++ of one kernel.
pub(super) fn source(blueprint: Blueprint) -> Result<String, String> {
    let properties = Arc::new(hopper());
    let handle = || {
        let service = ServiceId::of::<Blueprint>(DeviceId::new(0, 0));
        Handle::new(service, StreamId::current(), 1 << 20)
    };
    let target = TargetProperties {
        mma: MmaProperties {
            register_size_bits: 32,
            const_plane_size: 32,
            register_layout_a: cubecl::cmma::MatrixLayout::RowMajor,
            register_layout_b: cubecl::cmma::MatrixLayout::ColMajor,
            register_layout_acc: cubecl::cmma::MatrixLayout::RowMajor,
            register_duplication_a: 1,
            register_duplication_b: 1,
            register_duplication_acc: 1,
            contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
        },
    };
    // SAFETY: nothing is launched, so nothing is read or written.
    let buffer = || unsafe { BufferArg::from_raw_parts(handle(), 1 << 10) };
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
        // SAFETY: as above.
        unsafe { super::tensor_map(tensor.view(), element, blueprint) }
    };
    let kernel = attend_kernel::create_dummy_kernel(
        properties,
        Arc::new(target),
        CubeCount::Static(1, 1, 1),
        CubeDim::new_1d(blueprint.warpgroups() * 128),
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
        strides([1; 4]),
        strides([1; 4]),
        strides([1; 4]),
        strides([1; 4]),
        NumbersLaunch::new(1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1.0, 1.0, 0.0, 0.0),
        blueprint,
        [element, out],
        blueprint.shape.keys / 2,
        blueprint.shape.keys / 4,
        blueprint.shape.columns() / 2,
    );
    let definition = cubecl::define_kernel(&kernel).map_err(|error| format!("{error:?}"))?;
    // As the CUDA runtime sets them for compute capability 9.0.
    let supports_features = CppSupportedFeatures {
        grid_constants: true,
        clusters: true,
        fast_math: true,
        fast_tanh: true,
        elect_sync: true,
        dp4a: true,
    };
    let options = CompilationOptions { supports_features, ..Default::default() };
    let mut compiler = CppCompiler::<Cuda>::default();
    compiler
        .compile(definition, &options)
        .map(|kernel| kernel.to_string())
        .map_err(|error| format!("{error:?}"))
}

/// What the CUDA runtime says of an H100, as far as kernels ask.
fn hopper() -> DeviceProperties {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 1024,
        max_shared_memory_size: 232_448,
        max_cube_count: (i32::MAX as u32, 65_535, 65_535),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: Some(132),
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        num_cpu_cores: None,
        last_level_cache_size: None,
        max_vector_size: usize::MAX,
        cube_mma_reserved_shared_memory: 0,
    };
    let identity =
        DeviceIdentity { name: "H100".to_string(), fingerprint: "ptx_sm90".to_string(), physical: None };
    let memory = MemoryDeviceProperties::new(20 << 30, 512);
    let mut properties =
        DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::Device, identity);
    register_supported_types(&mut properties);
    properties.features.tma.insert(Tma::Base);
    properties.features.copy_async = true;
    properties.features.memory_reinterpret = true;
    properties.features.alignment = true;
    properties
}
