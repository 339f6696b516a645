use cubecl::{client::Client, server::Handle};
use half::{bf16, f16};

use crate::{Element, Error, Result};

/// A tensor in device memory: a buffer, a shape and strides in elements. Cloning shares the buffer.
#[derive(Clone, Debug)]
pub struct Tensor<const RANK: usize> {
    handle: Handle,
    element: Element,
    shape: [usize; RANK],
    strides: [usize; RANK],
}

/// A borrowed [`Tensor`]: what operators take as input. Strides are free except the last, which kernels
/// require to be 1; a stride of 0 broadcasts.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a, const RANK: usize> {
    handle: &'a Handle,
    element: Element,
    shape: [usize; RANK],
    strides: [usize; RANK],
}

/// Row-major strides of a shape. Sizes that pass the address space saturate; no buffer is that large, so checks against
/// one refuse them.
fn contiguous<const RANK: usize>(shape: [usize; RANK]) -> [usize; RANK] {
    let mut strides = [1usize; RANK];
    for axis in (0..RANK.saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1].saturating_mul(shape[axis + 1]);
    }
    strides
}

/// Elements of a shape; saturates likewise.
fn elements(shape: &[usize]) -> usize {
    shape.iter().fold(1usize, |product, &size| product.saturating_mul(size))
}

impl<const RANK: usize> Tensor<RANK> {
    /// Wraps a buffer that some other library filled. Bifocal reads it through `shape` and `strides` (elements).
    pub fn new(handle: Handle, element: Element, shape: [usize; RANK], strides: [usize; RANK]) -> Self {
        Self { handle, element, shape, strides }
    }

    /// A contiguous tensor of unspecified contents.
    pub fn empty(client: &Client, shape: [usize; RANK], element: Element) -> Self {
        let bytes = elements(&shape).saturating_mul(element.size());
        // Kernels that read bytes read them four at a time.
        let handle = client.empty(bytes.next_multiple_of(4).max(4));
        Self::new(handle, element, shape, contiguous(shape))
    }

    /// Copies `values` to the device, rounding them to `element`.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are more or fewer values than the shape holds; [`Error::Element`] for `U8`.
    pub fn from_f32(client: &Client, shape: [usize; RANK], element: Element, values: &[f32]) -> Result<Self> {
        if values.len() != elements(&shape) {
            let expected = format!("{} values", elements(&shape));
            return Err(Error::shape("the host data", expected, &[values.len()]));
        }
        let handle = match element {
            Element::F32 => client.create_from_slice(bytemuck::cast_slice(values)),
            Element::F16 => {
                let values: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
                client.create_from_slice(bytemuck::cast_slice(&values))
            }
            Element::Bf16 => {
                let values: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
                client.create_from_slice(bytemuck::cast_slice(&values))
            }
            Element::U8 => {
                return Err(Error::Element {
                    tensor: "the host data",
                    expected: Element::F32,
                    found: element,
                });
            }
        };
        Ok(Self::new(handle, element, shape, contiguous(shape)))
    }

    /// A contiguous tensor filled with one value: NaN to poison an output, 0 to clear it.
    ///
    /// # Errors
    /// As [`Tensor::from_f32`].
    pub fn filled(client: &Client, shape: [usize; RANK], element: Element, value: f32) -> Result<Self> {
        Self::from_f32(client, shape, element, &vec![value; elements(&shape)])
    }

    /// Reads a contiguous float tensor back to the host, row-major. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Runtime`] when an earlier kernel failed; [`Error::NotContiguous`].
    pub fn to_f32(&self, client: &Client) -> Result<Vec<f32>> {
        let view = self.view();
        view.check_contiguous("a tensor read back")?;
        let (expected, found) =
            (elements(&self.shape).saturating_mul(self.element.size()), self.handle.size_in_used());
        if expected as u64 > found {
            return Err(Error::Buffer { tensor: "a tensor read back", expected: expected as u64, found });
        }
        let bytes =
            client.read_one(self.handle.clone()).map_err(|error| Error::Runtime(error.to_string()))?;
        let bytes = &bytes[..elements(&self.shape).saturating_mul(self.element.size())];
        Ok(match self.element {
            Element::F32 => bytemuck::pod_collect_to_vec(bytes),
            Element::F16 => {
                bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            Element::Bf16 => {
                bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            Element::U8 => bytes.iter().map(|&b| f32::from(b)).collect(),
        })
    }

    /// Borrows the tensor.
    pub fn view(&self) -> TensorView<'_, RANK> {
        TensorView { handle: &self.handle, element: self.element, shape: self.shape, strides: self.strides }
    }

    /// The buffer.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Gives the buffer away.
    pub fn into_handle(self) -> Handle {
        self.handle
    }

    /// The element type.
    pub fn element(&self) -> Element {
        self.element
    }

    /// The shape.
    pub fn shape(&self) -> [usize; RANK] {
        self.shape
    }

    /// The strides, in elements.
    pub fn strides(&self) -> [usize; RANK] {
        self.strides
    }
}

impl<'a, const RANK: usize> TensorView<'a, RANK> {
    /// The same memory read through another shape and strides (elements).
    pub fn reinterpret(self, shape: [usize; RANK], strides: [usize; RANK]) -> Self {
        Self { shape, strides, ..self }
    }

    /// The buffer.
    pub fn handle(&self) -> &'a Handle {
        self.handle
    }

    /// The element type.
    pub fn element(&self) -> Element {
        self.element
    }

    /// The shape.
    pub fn shape(&self) -> [usize; RANK] {
        self.shape
    }

    /// The strides, in elements.
    pub fn strides(&self) -> [usize; RANK] {
        self.strides
    }

    /// Elements from the first to one past the last that shape and strides reach: what a kernel may index. Saturates
    /// where that passes the address space, which [`check`](Self::check) refuses.
    pub fn span(&self) -> usize {
        let reach = |(&size, stride): (&usize, usize)| size.saturating_sub(1).saturating_mul(stride);
        let last = self.shape.iter().zip(self.strides).map(reach).fold(0usize, usize::saturating_add);
        last.saturating_add(1)
    }

    /// Checks all that a kernel relies on: the shape, the element type, the device, a contiguous last
    /// dimension, and that shape and strides stay inside the buffer.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Element`], [`Error::DeviceMismatch`], [`Error::Stride`], [`Error::Buffer`] or
    /// [`Error::TooLarge`], each naming `tensor`.
    pub fn check(
        &self,
        tensor: &'static str,
        client: &Client,
        shape: [usize; RANK],
        element: Element,
    ) -> Result<()> {
        if self.shape != shape {
            return Err(Error::shape(tensor, format!("{shape:?}"), &self.shape));
        }
        if self.element != element {
            return Err(Error::Element { tensor, expected: element, found: self.element });
        }
        if self.handle.service != client.service_id() {
            return Err(Error::DeviceMismatch {
                tensor,
                expected: format!("{:?}", client.service_id()),
                found: format!("{:?}", self.handle.service),
            });
        }
        if self.strides[RANK - 1] != 1 && shape[RANK - 1] != 1 {
            return Err(Error::Stride { tensor, found: self.strides[RANK - 1] });
        }
        let span = self.span();
        if span as u64 > u64::from(u32::MAX) {
            return Err(Error::TooLarge {
                what: "elements in a tensor",
                size: span as u128,
                limit: u128::from(u32::MAX),
            });
        }
        let expected = (span * element.size()) as u64;
        let found = self.handle.size_in_used();
        if expected > found {
            return Err(Error::Buffer { tensor, expected, found });
        }
        Ok(())
    }

    /// Checks that elements follow one another row-major.
    ///
    /// # Errors
    /// [`Error::NotContiguous`].
    pub fn check_contiguous(&self, tensor: &'static str) -> Result<()> {
        let expected = contiguous(self.shape);
        let differs = |axis: usize| self.strides[axis] != expected[axis] && self.shape[axis] != 1;
        if (0..RANK).any(differs) {
            let (expected, found) = (expected.to_vec(), self.strides.to_vec());
            return Err(Error::NotContiguous { tensor, expected, found });
        }
        Ok(())
    }

    /// Checks that no two elements share memory, as a tensor that is written must: from the smallest stride to the
    /// largest, each has to pass over all that the smaller ones reach.
    ///
    /// # Errors
    /// [`Error::Overlap`].
    pub fn check_disjoint(&self, tensor: &'static str) -> Result<()> {
        let mut axes: Vec<usize> = (0..RANK).filter(|&axis| self.shape[axis] != 1).collect();
        axes.sort_by_key(|&axis| self.strides[axis]);
        let mut reached = 1;
        for axis in axes {
            if self.strides[axis] < reached {
                let (shape, found) = (self.shape.to_vec(), self.strides.to_vec());
                return Err(Error::Overlap { tensor, shape, found });
            }
            reached = self.strides[axis].saturating_mul(self.shape[axis]);
        }
        Ok(())
    }
}
