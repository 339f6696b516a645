//! Kernels as CUDA C++, written on the host: what a machine without a GPU can hand to NVRTC and ptxas.

use std::sync::Arc;

use cubecl::{
    Compiler, CubeKernel,
    ir::{
        ContiguousElements, DeviceIdentity, DeviceProperties, HardwareProperties, MemoryDeviceProperties,
        MmaProperties, TargetProperties, features::Tma,
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

/// A GPU that kernels are compiled for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Gpu {
    /// Ampere.
    A100,
    /// Hopper.
    H100,
}

impl Gpu {
    /// The architecture, as NVRTC and ptxas call it.
    pub const fn arch(self) -> &'static str {
        match self {
            Gpu::A100 => "sm_80",
            Gpu::H100 => "sm_90a",
        }
    }

    /// What the CUDA runtime says of it, as far as kernels ask.
    pub fn properties(self) -> Arc<DeviceProperties> {
        let hopper = self == Gpu::H100;
        let hardware = HardwareProperties {
            load_width: 128,
            vector_register_count: None,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 1024,
            max_shared_memory_size: if hopper { 227 << 10 } else { 163 << 10 },
            max_cube_count: (i32::MAX as u32, 65_535, 65_535),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(if hopper { 132 } else { 108 }),
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            last_level_cache_size: None,
            max_vector_size: usize::MAX,
            cube_mma_reserved_shared_memory: 0,
        };
        let (name, fingerprint) = if hopper { ("H100", "ptx_sm90") } else { ("A100", "ptx_sm80") };
        let identity =
            DeviceIdentity { name: name.to_string(), fingerprint: fingerprint.to_string(), physical: None };
        let memory = MemoryDeviceProperties::new(20 << 30, 512);
        let mut properties =
            DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::Device, identity);
        register_supported_types(&mut properties);
        if hopper {
            properties.features.tma.insert(Tma::Base);
        }
        properties.features.copy_async = true;
        properties.features.memory_reinterpret = true;
        properties.features.alignment = true;
        Arc::new(properties)
    }

    /// The CUDA C++ of a kernel.
    ///
    /// # Errors
    /// What CubeCL's compiler has to say.
    pub fn compile(self, kernel: &impl CubeKernel) -> Result<String, String> {
        let definition = cubecl::define_kernel(kernel).map_err(|error| format!("{error:?}"))?;
        // As the CUDA runtime sets them.
        let hopper = self == Gpu::H100;
        let supports_features = CppSupportedFeatures {
            grid_constants: true,
            clusters: hopper,
            fast_math: true,
            fast_tanh: true,
            elect_sync: hopper,
            dp4a: true,
        };
        let options = CompilationOptions { supports_features, ..Default::default() };
        let mut compiler = CppCompiler::<Cuda>::default();
        compiler
            .compile(definition, &options)
            .map(|kernel| kernel.to_string())
            .map_err(|error| format!("{error:?}"))
    }
}

/// What kernels are told about products on planes.
pub fn target() -> Arc<TargetProperties> {
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

/// Writes a kernel.
pub type Source = Box<dyn FnOnce() -> Result<String, String>>;

/// The grid of a launch that there is none of.
pub const ONE_CUBE: CubeCount = CubeCount::Static(1, 1, 1);

/// Memory that nobody reads.
pub fn handle() -> Handle {
    let service = ServiceId::of::<Gpu>(DeviceId::new(0, 0));
    Handle::new(service, StreamId::current(), 1 << 20)
}

/// A buffer that nobody reads.
pub fn buffer() -> BufferArg {
    // SAFETY: nothing is launched, so nothing is read or written.
    unsafe { BufferArg::from_raw_parts(handle(), 1 << 10) }
}
