//! Tensors of Burn's CubeCL devices: buffers change hands, nothing is copied.

use std::any::Any;

use bifocal::{Element, Error, Result, cubecl::client::Client};
use burn::{
    backend::{Cube, CubeDevice, tensor::FloatTensor},
    tensor::{DType, Shape, Tensor},
};
use burn_cubecl::{kernel::into_contiguous, tensor::CubeTensor};

/// Borrows the buffer of a Burn tensor, strides and all. Only a tensor whose last dimension is not contiguous is
/// copied (by Burn's own kernel, on the device).
pub(crate) fn import<const RANK: usize>(
    tensor: Tensor<RANK>,
    element: Element,
) -> Result<bifocal::Tensor<RANK>> {
    let shape = tensor.dims();
    let primitive =
        tensor.try_into_primitive::<Cube>().map_err(|error| Error::Runtime(format!("{error:?}")))?;
    let mut tensor = unfused::<_, CubeTensor>(primitive)?;
    let last = |tensor: &CubeTensor| tensor.meta.strides().last().copied().unwrap_or(1);
    if tensor.meta.is_tiled() || (last(&tensor) != 1 && shape[RANK - 1] != 1) {
        tensor = into_contiguous(tensor);
    }
    let strides = core::array::from_fn(|axis| tensor.meta.strides()[axis]);
    Ok(bifocal::Tensor::new(tensor.handle, element, shape, strides))
}

/// Gives a contiguous buffer to Burn.
pub(crate) fn export<const RANK: usize>(
    client: &Client,
    device: &CubeDevice,
    tensor: bifocal::Tensor<RANK>,
    dtype: DType,
) -> Result<Tensor<RANK>> {
    let shape = Shape::from(tensor.shape());
    let handle = tensor.into_handle();
    let tensor = CubeTensor::new_contiguous(client.clone(), device.clone(), shape, handle, dtype);
    Ok(Tensor::from_primitive::<Cube>(unfused::<_, FloatTensor<Cube>>(tensor)?))
}

/// The same value under the name of the type that it has, unless Burn's fusion hides the buffer behind a tensor of
/// its own. Decided at run time, so that this crate builds with and without the feature.
fn unfused<From: 'static, To: 'static>(tensor: From) -> Result<To> {
    let tensor: Box<dyn Any> = Box::new(tensor);
    match tensor.downcast::<To>() {
        Ok(tensor) => Ok(*tensor),
        Err(_) => Err(Error::option(
            "burn's feature `fusion`",
            "on",
            "off: a fused tensor has no buffer to hand to other kernels",
        )),
    }
}
