use bifocal_core::{
    Element, Error, Result,
    device::{Tensor, TensorView},
};
use cubecl::client::Client;

/// The sum of what left the window: `f32 [B, Hk, features, Dv]`, one matrix per kv head, which its query heads share. Its
/// shape is [`LinearAttention::state_shape`](crate::LinearAttention::state_shape).
///
/// Cloning shares the memory: a [`step`](crate::LinearAttention::step) changes the clones as well.
#[derive(Clone, Debug)]
pub struct State(Tensor<4>);

impl State {
    /// The state before the first key.
    ///
    /// # Errors
    /// As [`Tensor::zeros`].
    pub fn zeros(client: &Client, shape: [usize; 4]) -> Result<Self> {
        Ok(Self(Tensor::zeros(client, shape)?))
    }

    /// A state that was read back earlier.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are more or fewer numbers than the shape holds; [`Error::Option`] for one that is not
    /// finite, which every later row would meet.
    pub fn from_f32(client: &Client, shape: [usize; 4], values: &[f32]) -> Result<Self> {
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let found = format!("{} at {at}", values[at]);
            return Err(Error::option("a number of the state", found, "a finite number"));
        }
        Ok(Self(Tensor::from_f32(client, shape, Element::F32, values)?))
    }

    /// Reads the state back to the host, row-major. Waits for the device.
    ///
    /// # Errors
    /// As [`Tensor::to_f32`].
    pub fn to_f32(&self, client: &Client) -> Result<Vec<f32>> {
        self.0.to_f32(client)
    }

    /// The shape.
    pub fn shape(&self) -> [usize; 4] {
        self.0.shape()
    }

    /// Borrows the numbers.
    pub fn view(&self) -> TensorView<'_, 4> {
        self.0.view()
    }

    /// A contiguous tensor that a kernel has written, or will.
    pub(crate) fn of(tensor: Tensor<4>) -> Self {
        Self(tensor)
    }

    /// Checks that this is a state of this shape on the client's device.
    pub(crate) fn check(&self, client: &Client, shape: [usize; 4]) -> Result<()> {
        self.0.view().check("the state", client, shape, Element::F32)?;
        self.0.view().check_contiguous("the state")
    }
}
