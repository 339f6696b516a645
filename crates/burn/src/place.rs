use core::fmt;
use std::sync::OnceLock;

use bifocal::{Element, Error, Result, cubecl::client::Client};
use burn::{
    backend::{DispatchDevice, Flex},
    tensor::{DType, Device, GradientCheckpointingStrategy, Tensor, TensorData},
};

#[cfg(any(feature = "cpu", feature = "wgpu", feature = "cuda"))]
use crate::cube;
use crate::{
    autodiff::{self, Differentiable},
    flex,
};

/// What has to be known of an argument before anything is computed.
pub(crate) struct Origin {
    name: &'static str,
    device: Device,
    dtype: Option<DType>,
}

impl Origin {
    pub(crate) fn of<const RANK: usize>(name: &'static str, tensor: &Tensor<RANK>) -> Self {
        Self { name, device: tensor.device(), dtype: Some(tensor.dtype()) }
    }

    /// Something whose element type is its own business.
    pub(crate) fn on(name: &'static str, device: &Device) -> Self {
        Self { name, device: device.clone(), dtype: None }
    }

    /// The element type does not have to be that of the others.
    pub(crate) fn of_any_dtype(self) -> Self {
        Self { dtype: None, ..self }
    }
}

/// Checks that all arguments live on the device of the first and hold its element type, and that those with autodiff,
/// which need not be all, checkpoint alike. Gives how they do; `None` when none has autodiff.
pub(crate) fn check_together(origins: &[Origin]) -> Result<Option<GradientCheckpointingStrategy>> {
    let [first, ..] = origins else { return Ok(None) };
    let mut agreed = None;
    for origin in origins {
        if origin.device != first.device {
            return Err(Error::DeviceMismatch {
                tensor: origin.name,
                expected: format!("{:?}", first.device),
                found: format!("{:?}", origin.device),
            });
        }
        match (first.dtype, origin.dtype) {
            (Some(expected), Some(found)) if expected != found => {
                return Err(Error::option("dtype", format!("{found:?} ({})", origin.name), {
                    format!("{expected:?}, as {}", first.name)
                }));
            }
            _ => {}
        }
        match (agreed, origin.device.gradient_checkpointing_strategy()) {
            (Some(agreed), Some(found)) if agreed != found => {
                let found = format!("{found:?} ({})", origin.name);
                return Err(Error::option(
                    "gradient checkpointing",
                    found,
                    format!("{agreed:?}, as before it"),
                ));
            }
            (None, found) => agreed = found,
            _ => {}
        }
    }
    Ok(agreed)
}

/// Where a call computes: the arguments' Burn device (without autodiff) and the CubeCL client that serves it.
#[derive(Clone)]
pub(crate) struct Place {
    device: Device,
    checkpointing: Option<GradientCheckpointingStrategy>,
    client: Client,
    memory: Memory,
}

/// How Burn holds tensors there.
#[derive(Clone)]
enum Memory {
    #[cfg(any(feature = "cpu", feature = "wgpu", feature = "cuda"))]
    Cube(burn::backend::CubeDevice),
    Flex,
}

impl Place {
    /// The place of a call with these arguments.
    pub(crate) fn of(origins: &[Origin]) -> Result<Self> {
        let checkpointing = check_together(origins)?;
        let device = match origins {
            [first, ..] => first.device.clone().inner(),
            [] => return Err(Error::option("arguments", 0, "at least one tensor")),
        };
        // Which variants there are is up to the features of `burn`.
        #[allow(unreachable_patterns)]
        let (client, memory) = match device.as_dispatch() {
            #[cfg(any(feature = "cpu", feature = "wgpu", feature = "cuda"))]
            DispatchDevice::Cube(cube) => (cube.client(), Memory::Cube(cube.clone())),
            DispatchDevice::Flex(_) => (cpu()?, Memory::Flex),
            other => {
                let expected = "a CubeCL or Flex device that this build supports (`composed` runs on any)";
                return Err(Error::option("device", format!("{other:?}"), expected));
            }
        };
        Ok(Self { device, checkpointing, client, memory })
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Whether an argument has autodiff.
    pub(crate) fn has_autodiff(&self) -> bool {
        self.checkpointing.is_some()
    }

    /// Hands a Burn tensor to Bifocal, without its autodiff.
    pub(crate) fn import<const RANK: usize>(
        &self,
        name: &'static str,
        tensor: Tensor<RANK>,
    ) -> Result<bifocal::Tensor<RANK>> {
        let element = element(name, tensor.dtype())?;
        if tensor.dims().contains(&0) {
            return Err(Error::shape(name, "every dimension at least 1", &tensor.dims()));
        }
        let tensor = tensor.inner();
        match &self.memory {
            #[cfg(any(feature = "cpu", feature = "wgpu", feature = "cuda"))]
            Memory::Cube(_) => cube::import(tensor, element),
            Memory::Flex => flex::import(&self.client, tensor, element),
        }
    }

    /// Hands a float tensor of Bifocal to Burn: a contiguous one, or a contiguous `[B, T, H, D]` seen as `[B, H, T, D]`.
    pub(crate) fn export(&self, tensor: bifocal::Tensor<4>) -> Result<Tensor<4>> {
        let ([batch, heads, tokens, dim], [_, by_head, by_token, _]) = (tensor.shape(), tensor.strides());
        if by_head >= by_token {
            return self.export_contiguous(tensor);
        }
        let (element, shape) = (tensor.element(), [batch, tokens, heads, dim]);
        let strides = [tokens * heads * dim, heads * dim, dim, 1];
        let swapped = bifocal::Tensor::new(tensor.into_handle(), element, shape, strides);
        Ok(self.export_contiguous(swapped)?.swap_dims(1, 2))
    }

    /// Hands a contiguous float tensor of Bifocal to Burn.
    pub(crate) fn export_contiguous<const RANK: usize>(
        &self,
        tensor: bifocal::Tensor<RANK>,
    ) -> Result<Tensor<RANK>> {
        let dtype = dtype(tensor.element());
        match &self.memory {
            #[cfg(any(feature = "cpu", feature = "wgpu", feature = "cuda"))]
            Memory::Cube(cube) => cube::export(&self.client, cube, tensor, dtype),
            Memory::Flex => {
                let bytes = flex::read(&self.client, &tensor)?;
                let data = TensorData::from_bytes_vec(bytes, tensor.shape(), dtype);
                Ok(Tensor::from_data(data, (&self.device, dtype)))
            }
        }
    }

    /// Makes `output` what `operation` made of `inputs`, for autodiff; where no argument has it, that is `output` as it
    /// is.
    pub(crate) fn record<const N: usize>(
        &self,
        inputs: [Tensor<4>; N],
        output: Tensor<4>,
        operation: impl Differentiable,
    ) -> Result<Tensor<4>> {
        let Some(checkpointing) = self.checkpointing else { return Ok(output) };
        let output = match &self.memory {
            #[cfg(any(feature = "cpu", feature = "wgpu", feature = "cuda"))]
            Memory::Cube(_) => autodiff::record::<burn::backend::Cube, _, N>(inputs, output, operation)?,
            Memory::Flex => autodiff::record::<Flex, _, N>(inputs, output, operation)?,
        };
        Ok(output.with_gradient_checkpointing_strategy(checkpointing))
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.device)
    }
}

/// The CubeCL CPU runtime, opened once.
fn cpu() -> Result<Client> {
    static CPU: OnceLock<Client> = OnceLock::new();
    match CPU.get() {
        Some(client) => Ok(client.clone()),
        None => {
            let client = bifocal::open("cpu")?;
            Ok(CPU.get_or_init(|| client).clone())
        }
    }
}

pub(crate) fn element(name: &'static str, dtype: DType) -> Result<Element> {
    match dtype {
        DType::F32 => Ok(Element::F32),
        DType::F16 => Ok(Element::F16),
        DType::BF16 => Ok(Element::Bf16),
        other => Err(Error::option("dtype", format!("{other:?} ({name})"), "F32, F16 or BF16")),
    }
}

fn dtype(element: Element) -> DType {
    match element {
        Element::F16 => DType::F16,
        Element::Bf16 => DType::BF16,
        _ => DType::F32,
    }
}
