use cubecl::{client::Client, prelude::*};

use super::{
    Inputs, Partial, Tensor, TensorView,
    launch::{elements, grid},
};
use crate::{Element, Error, Problem, Result};

/// What a backward pass reads beside the inputs of its forward pass.
///
/// Where several branches were merged by their log-sum-exp, each is differentiated with the merged partial: weights are
/// `exp(score - lse)`, whichever branch the keys belong to, and no gradient of the log-sum-exp is needed.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// Outputs and log-sum-exp of the forward pass. Outputs are read by who computes `delta`, not by the kernels.
    pub partial: &'a Partial,
    /// `[B, H, Tq, Dv]`, the problem's element type or `f32`: the loss's gradient with respect to the outputs.
    pub d_out: TensorView<'a, 4>,
    /// `[B, H, Tq]`, `f32`, contiguous: the product of each output row and its gradient (`bifocal-dispatch`'s `dot_rows`).
    pub delta: TensorView<'a, 3>,
}

impl Saved<'_> {
    /// Checks all that the kernels rely on.
    ///
    /// # Errors
    /// As [`Partial::check`] and [`TensorView::check`]; [`Error::Element`] when the gradient is neither `f32` nor of the
    /// problem's type; [`Error::NotContiguous`].
    pub fn check(&self, client: &Client, problem: &Problem) -> Result<()> {
        self.partial.check(client, problem)?;
        let element = match self.d_out.element() {
            Element::F32 => Element::F32,
            _ => problem.element,
        };
        self.d_out.check("the gradient of the output", client, problem.out_shape(), element)?;
        self.delta.check("delta", client, problem.lse_shape(), Element::F32)?;
        self.delta.check_contiguous("delta")
    }
}

/// Gradients of one attention's inputs, in `f32`. Every backward pass **adds** its own to what is there, so that the
/// gradients of several branches sum up: start from [`zeros`](Gradients::zeros).
#[derive(Clone, Debug)]
pub struct Gradients {
    /// `[B, H, Tq, D]`, contiguous.
    pub query: Tensor<4>,
    /// `[B, Hk, Tk, D]`, contiguous.
    pub key: Tensor<4>,
    /// `[B, Hk, Tk, Dv]`, contiguous.
    pub value: Tensor<4>,
    /// `[H]`; needed where the inputs have sink logits.
    pub sink_logits: Option<Tensor<1>>,
}

impl Gradients {
    /// Gradients of a problem before any backward pass, with or without those of sink logits.
    ///
    /// # Errors
    /// As [`Tensor::zeros`].
    pub fn zeros(client: &Client, problem: &Problem, with_sinks: bool) -> Result<Self> {
        let [query, key, value] = shapes(problem);
        Ok(Self {
            query: Tensor::zeros(client, query)?,
            key: Tensor::zeros(client, key)?,
            value: Tensor::zeros(client, value)?,
            sink_logits: match with_sinks {
                true => Some(Tensor::zeros(client, [problem.heads])?),
                false => None,
            },
        })
    }

    /// Checks that this is room for the gradients of `problem` and `inputs` on the client's device.
    ///
    /// # Errors
    /// As [`TensorView::check`]; [`Error::NotContiguous`]; [`Error::Option`] when the inputs have sink logits and there is
    /// no room for their gradient.
    pub fn check(&self, client: &Client, problem: &Problem, inputs: &Inputs<'_>) -> Result<()> {
        let [query, key, value] = shapes(problem);
        let tensors = [
            ("the gradient of the query", &self.query, query),
            ("the gradient of the key", &self.key, key),
            ("the gradient of the value", &self.value, value),
        ];
        for (name, tensor, shape) in tensors {
            tensor.view().check(name, client, shape, Element::F32)?;
            tensor.view().check_contiguous(name)?;
        }
        let name = "the gradient of the sink logits";
        match &self.sink_logits {
            Some(sinks) => {
                sinks.view().check(name, client, [problem.heads], Element::F32)?;
                sinks.view().check_contiguous(name)
            }
            None if inputs.sink_logits.is_some() => {
                Err(Error::option(name, "absent", "room for it, as the inputs have sink logits"))
            }
            None => Ok(()),
        }
    }
}

/// The shapes of query, key and value.
fn shapes(problem: &Problem) -> [[usize; 4]; 3] {
    let Problem { batch, heads, kv_heads, query_len, key_len, head_dim, value_dim, .. } = *problem;
    [
        [batch, heads, query_len, head_dim],
        [batch, kv_heads, key_len, head_dim],
        [batch, kv_heads, key_len, value_dim],
    ]
}

/// Units that clear a tensor, each of them every so-many-th element, so that neighbours write to neighbours.
const CLEARING_UNITS: usize = 1 << 16;

impl<const RANK: usize> Tensor<RANK> {
    /// A contiguous `f32` tensor of zeros, cleared on the device.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for more than 2^32 - 1 elements.
    pub fn zeros(client: &Client, shape: [usize; RANK]) -> Result<Self> {
        let length = shape.iter().fold(1usize, |product, &size| product.saturating_mul(size));
        if length as u64 > u64::from(u32::MAX) {
            let limit = u128::from(u32::MAX);
            return Err(Error::TooLarge { what: "elements in a tensor", size: length as u128, limit });
        }
        let tensor = Self::empty(client, shape, Element::F32);
        let units_in_all = length.clamp(1, CLEARING_UNITS);
        let (cubes, units) = grid(client, units_in_all);
        // SAFETY: a new contiguous tensor has the memory that its shape reaches; units stop at its end.
        unsafe {
            clear::launch_unchecked(
                client,
                cubes,
                units,
                elements(tensor.view()),
                length as u32,
                units_in_all as u32,
            );
        }
        Ok(tensor)
    }
}

#[cube(launch_unchecked)]
fn clear(tensor: &mut [f32], length: u32, units: u32) {
    if ABSOLUTE_POS >= units as usize {
        terminate!();
    }
    let mut at = ABSOLUTE_POS as u32;
    while at < length {
        tensor[at as usize] = 0.0f32;
        // The last step may not pass what a u32 holds.
        at = select(length - at > units, at + units, length);
    }
}
