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

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;
    use crate::{AttentionOptions, full_attention};

    /// Which buffer a tensor lies in, and its strides there.
    fn memory(tensor: &Tensor<4>) -> (usize, [usize; 4]) {
        let tensor = import(tensor.clone(), Element::F32).unwrap();
        (tensor.handle().memory.descriptor().id.value, tensor.strides())
    }

    #[test]
    fn views_change_hands_without_a_copy() {
        let device = Device::cpu();
        let tensor = Tensor::<4>::zeros([2, 5, 3, 8], &device);
        let (buffer, strides) = memory(&tensor);
        assert_eq!(strides, [120, 24, 8, 1]);
        let heads_first = tensor.clone().swap_dims(1, 2);
        assert_eq!(memory(&heads_first), (buffer, [120, 8, 24, 1]));
        let one_head = Tensor::<4>::zeros([2, 1, 5, 8], &device);
        assert_eq!(memory(&one_head.clone().expand([2, 4, 5, 8])), (memory(&one_head).0, [40, 0, 8, 1]));
        // A strided last dimension is the one that has to be gathered.
        assert_ne!(memory(&tensor.swap_dims(2, 3)).0, buffer);
    }

    #[test]
    fn outputs_lie_in_memory_as_queries_do() {
        let device = Device::cpu();
        let rows = Tensor::<4>::random([2, 5, 3, 8], Distribution::Default, &device);
        let attend = |tensor: Tensor<4>| {
            full_attention(tensor.clone(), tensor.clone(), tensor, &AttentionOptions::default()).unwrap()
        };
        let swapped = attend(rows.clone().swap_dims(1, 2));
        assert_eq!((swapped.dims(), memory(&swapped).1), ([2, 3, 5, 8], [120, 8, 24, 1]));
        // What an output projection does next is a view.
        assert_eq!(memory(&swapped.clone().swap_dims(1, 2)).0, memory(&swapped).0);
        let data = rows.swap_dims(1, 2).into_data();
        let plain = attend(Tensor::from_data(data, &device));
        assert_eq!(memory(&plain).1, [120, 40, 8, 1]);
        plain.into_data().assert_eq(&swapped.into_data(), true);
    }
}
