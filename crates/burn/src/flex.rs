//! Tensors of Burn's Flex device: host bytes go to the CubeCL CPU runtime and back.

use bifocal::{Element, Error, Result, cubecl::client::Client};
use burn::{backend::Flex, tensor::Tensor};

/// Copies what a tensor spans to the runtime and keeps its strides. A tensor whose last dimension is not contiguous,
/// or that runs backwards, is gathered first.
pub(crate) fn import<const RANK: usize>(
    client: &Client,
    tensor: Tensor<RANK>,
    element: Element,
) -> Result<bifocal::Tensor<RANK>> {
    let shape = tensor.dims();
    let mut tensor =
        tensor.try_into_primitive::<Flex>().map_err(|error| Error::Runtime(format!("{error:?}")))?;
    let strides = tensor.layout().strides();
    if strides.iter().any(|&stride| stride < 0) || (strides[RANK - 1] != 1 && shape[RANK - 1] != 1) {
        tensor = tensor.to_contiguous();
    }
    let strides: [usize; RANK] = core::array::from_fn(|axis| tensor.layout().strides()[axis].unsigned_abs());
    let last: usize = shape.iter().zip(strides).map(|(&size, stride)| (size - 1) * stride).sum();
    let start = tensor.layout().start_offset() * element.size();
    let mut bytes = tensor.bytes()[start..start + (last + 1) * element.size()].to_vec();
    // Kernels that read bytes read them four at a time.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    Ok(bifocal::Tensor::new(client.create_from_slice(&bytes), element, shape, strides))
}

/// Reads the bytes of a contiguous tensor. Waits for the runtime.
pub(crate) fn read<const RANK: usize>(client: &Client, tensor: &bifocal::Tensor<RANK>) -> Result<Vec<u8>> {
    let bytes =
        client.read_one(tensor.handle().clone()).map_err(|error| Error::Runtime(error.to_string()))?;
    let length = tensor.shape().iter().product::<usize>() * tensor.element().size();
    Ok(bytes[..length].to_vec())
}
