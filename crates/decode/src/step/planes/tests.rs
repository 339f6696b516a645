//! The kernels as CUDA C++, written on the host: whether they can be is known without a GPU.

use std::sync::Arc;

use bifocal_core::Element;
use cubecl::{
    Compiler,
    ir::{
        ContiguousElements, DeviceIdentity, DeviceProperties, ElemType, HardwareProperties,
        MemoryDeviceProperties, MmaProperties, TargetProperties,
    },
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

use super::*;
use crate::{
    step::rows::{NumbersLaunch, StridesLaunch},
    view::PlacesLaunch,
};

/// What the CUDA runtime says of an A100, as far as kernels ask.
fn properties() -> Arc<DeviceProperties> {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 1024,
        max_shared_memory_size: 163 << 10,
        max_cube_count: (i32::MAX as u32, 65_535, 65_535),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: Some(108),
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        num_cpu_cores: None,
        last_level_cache_size: None,
        max_vector_size: usize::MAX,
        cube_mma_reserved_shared_memory: 0,
    };
    let identity = DeviceIdentity { name: "A100".into(), fingerprint: "ptx_sm80".into(), physical: None };
    let memory = MemoryDeviceProperties::new(20 << 30, 512);
    let mut properties =
        DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::Device, identity);
    register_supported_types(&mut properties);
    properties.features.memory_reinterpret = true;
    properties.features.alignment = true;
    Arc::new(properties)
}

fn target() -> Arc<TargetProperties> {
    Arc::new(TargetProperties {
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
    })
}

fn buffer() -> BufferArg {
    let service = ServiceId::of::<DeviceProfile>(DeviceId::new(0, 0));
    let handle = Handle::new(service, StreamId::current(), 1 << 20);
    // SAFETY: nothing is launched, so nothing is read or written.
    unsafe { BufferArg::from_raw_parts(handle, 1 << 10) }
}

fn source(problem: &Problem, routed: bool) -> String {
    let blueprint = Blueprint::new(problem, routed);
    let element: ElemType = problem.element.into();
    let kernel = attend_kernel::create_dummy_kernel(
        properties(),
        target(),
        CubeCount::Static(1, 1, 1),
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
        StridesLaunch::new(1, 1, 1),
        PlacesLaunch::new(1, 1, 1, 1, 1),
        NumbersLaunch::new(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0, 0.0, 0.0),
        blueprint,
        element,
        blueprint.width,
    );
    let definition = cubecl::define_kernel(&kernel).expect("a kernel");
    let supports_features = CppSupportedFeatures {
        grid_constants: true,
        clusters: false,
        fast_math: true,
        fast_tanh: true,
        elect_sync: false,
        dp4a: true,
    };
    let options = CompilationOptions { supports_features, ..Default::default() };
    let compiled = CppCompiler::<Cuda>::default().compile(definition, &options);
    compiled.expect("a kernel that CUDA C++ has words for").to_string()
}

#[test]
fn tiles_can_be_written_as_cuda() {
    for (element, head_dim, group, routed) in [
        (Element::Bf16, 128, 1, true),
        (Element::Bf16, 80, 3, true),
        (Element::Bf16, 128, 4, false),
        (Element::F16, 64, 16, true),
        (Element::F32, 128, 2, false),
    ] {
        let problem =
            Problem::new([1, group, 1, head_dim], [1, 1, 64, head_dim], element).expect("a possible problem");
        let text = source(&problem, routed);
        assert!(text.contains("__shfl"), "{element} {head_dim} {group}");
        // For who wants to compile them.
        if let Ok(folder) = std::env::var("DECODE_SOURCES") {
            let file = format!("{folder}/{element}-{head_dim}-{group}.sm_90a.cu");
            std::fs::write(file, text).expect("a folder to write to");
        }
    }
}

#[test]
fn scores_are_dealt_to_lanes_without_a_rest() {
    for element in [Element::Bf16, Element::F32] {
        for head_dim in (8..=256).step_by(8) {
            for (group, query_len) in [(1, 1), (3, 1), (4, 2), (8, 16)] {
                let problem = Problem::new([1, group, query_len, head_dim], [1, 1, 64, head_dim], element)
                    .expect("a possible problem");
                let Blueprint { rows, width, lanes, loads, .. } = Blueprint::new(&problem, false);
                if head_dim / width < 2 || head_dim / width > 32 {
                    continue;
                }
                assert!(rows <= lanes && rows * width <= 64 && lanes <= 32, "{element} {head_dim}");
                // A lane's scores are of one row.
                assert!(rows * loads < lanes || loads.is_multiple_of(rows * loads / lanes));
                assert!(tile_rows(&problem) <= rows);
            }
        }
    }
}
