use crate::Element;

/// What a routine needs to know of a device to say whether and how it runs there.
///
/// Read off a live device with [`DeviceProfile::of`](DeviceProfile::of), or written by hand: choosing a
/// routine needs no GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceProfile {
    /// The runtime's name: `cpu`, `wgpu<...>`, `cuda`.
    pub runtime: String,
    /// The device's own name.
    pub name: String,
    /// Float types that the device can compute with.
    pub elements: Vec<Element>,
    /// Cores, where units are operating-system threads (the CPU runtime); `None` on GPUs.
    pub cpu_cores: Option<u32>,
    /// Compute capability of an NVIDIA GPU as CUDA sees it, without the dot: 90 is Hopper.
    pub cuda_arch: Option<u32>,
    /// Streaming multiprocessors (compute units) of a GPU; 1 where the runtime does not say.
    pub multiprocessors: u32,
    /// Most units in one cube.
    pub max_units_per_cube: u32,
    /// Units that run in lockstep: smallest and largest plane.
    pub plane_size: (u32, u32),
    /// Shared memory per cube, bytes.
    pub shared_memory: usize,
    /// Widest register of the device's vector units, bits.
    pub vector_bits: u32,
    /// Whether `u32` atomic addition works on buffers.
    pub atomic_add: bool,
}

impl DeviceProfile {
    /// Units of the planes that kernels are written for where there are any.
    pub const PLANE: u32 = 32;

    /// Whether units run in planes of exactly [`PLANE`](Self::PLANE) and can exchange numbers in them.
    pub fn has_planes(&self) -> bool {
        self.cuda_arch.is_some() && self.plane_size == (Self::PLANE, Self::PLANE)
    }
}

#[cfg(feature = "device")]
impl DeviceProfile {
    /// The profile of the device behind a client.
    pub fn of(client: &cubecl::client::Client) -> Self {
        use cubecl::ir::{
            ElemType, FloatKind, Type, UIntKind,
            features::{AtomicUsage, TypeUsage},
        };

        let properties = client.properties();
        let hardware = &properties.hardware;
        let kinds = [
            (Element::F32, FloatKind::F32),
            (Element::F16, FloatKind::F16),
            (Element::Bf16, FloatKind::BF16),
        ];
        let elements = kinds
            .into_iter()
            .filter(|(_, kind)| {
                let usage = properties.type_usage(ElemType::Float(*kind));
                usage.contains(TypeUsage::Buffer) && usage.contains(TypeUsage::Conversion)
            })
            .map(|(element, _)| element)
            .collect();
        let counter = Type::atomic(ElemType::UInt(UIntKind::U32));
        Self {
            runtime: client.name().to_string(),
            name: properties.identity.name.clone(),
            elements,
            cpu_cores: hardware.num_cpu_cores,
            cuda_arch: properties
                .identity
                .fingerprint
                .strip_prefix("ptx_sm")
                .and_then(|arch| arch.parse().ok()),
            multiprocessors: hardware.num_streaming_multiprocessors.unwrap_or(1),
            max_units_per_cube: hardware.max_units_per_cube,
            plane_size: (hardware.plane_size_min, hardware.plane_size_max),
            shared_memory: hardware.max_shared_memory_size,
            vector_bits: hardware.load_width,
            atomic_add: properties.atomic_type_usage(counter).contains(AtomicUsage::Add),
        }
    }
}
