use core::fmt;
use std::sync::OnceLock;

use bifocal::{Element, Error, Result, cubecl::client::Client};
use burn::{
    backend::DispatchDevice,
    tensor::{DType, Device, Tensor, TensorData},
};

#[cfg(any(feature = "cpu", feature = "wgpu", feature = "cuda"))]
use crate::cube;
use crate::flex;

/// What has to be known of an argument before anything is computed.
pub(crate) struct Origin {
    name: &'static str,
    device: Device,
    autodiff: bool,
    dtype: Option<DType>,
}

impl Origin {
    pub(crate) fn of<const RANK: usize>(name: &'static str, tensor: &Tensor<RANK>) -> Self {
        let device = tensor.device();
        Self { name, autodiff: device.is_autodiff(), device, dtype: Some(tensor.dtype()) }
    }

    /// Something whose element type is its own business.
    pub(crate) fn on(name: &'static str, device: &Device) -> Self {
        Self { name, autodiff: device.is_autodiff(), device: device.clone(), dtype: None }
    }

    /// The element type does not have to be that of the others.
    pub(crate) fn of_any_dtype(self) -> Self {
        Self { dtype: None, ..self }
    }
}

/// Checks that all arguments live on the device of the first and hold its element type.
pub(crate) fn check_together(origins: &[Origin]) -> Result<()> {
    let [first, rest @ ..] = origins else { return Ok(()) };
    for origin in rest {
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
    }
    Ok(())
}

/// Refuses arguments that take part in autodiff.
pub(crate) fn check_no_autodiff(operation: &'static str, origins: &[Origin]) -> Result<()> {
    match origins.iter().any(|origin| origin.autodiff) {
        true => Err(Error::NoBackward { operation }),
        false => Ok(()),
    }
}

/// Where a call computes: the arguments' Burn device and the CubeCL client that serves it.
#[derive(Clone)]
pub(crate) struct Place {
    device: Device,
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
    pub(crate) fn of(operation: &'static str, origins: &[Origin]) -> Result<Self> {
        check_no_autodiff(operation, origins)?;
        check_together(origins)?;
        let device = match origins {
            [first, ..] => first.device.clone(),
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
        Ok(Self { device, client, memory })
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Hands a Burn tensor to Bifocal.
    pub(crate) fn import<const RANK: usize>(
        &self,
        name: &'static str,
        tensor: Tensor<RANK>,
    ) -> Result<bifocal::Tensor<RANK>> {
        let element = element(name, tensor.dtype())?;
        if tensor.dims().contains(&0) {
            return Err(Error::shape(name, "every dimension at least 1", &tensor.dims()));
        }
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

    fn export_contiguous(&self, tensor: bifocal::Tensor<4>) -> Result<Tensor<4>> {
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

fn element(name: &'static str, dtype: DType) -> Result<Element> {
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
