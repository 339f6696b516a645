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

/// What the memory of a gradient holds before a backward pass, and so what the pass does to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Before {
    /// Zeros, or what other passes have left: the pass adds its own.
    #[default]
    Sums,
    /// Anything: the pass stores, zeros included, and saves both clearing and reading.
    Anything,
}

/// Gradients of one attention's inputs, in `f32`. From [`zeros`](Gradients::zeros) on every backward pass **adds** its own to
/// what is there, so that the gradients of several branches sum up. A first pass may [store](Gradients::unset) instead.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// `[B, H, Tq, D]`, contiguous.
    pub query: Tensor<4>,
    /// `[B, Hk, Tk, D]`, contiguous.
    pub key: Tensor<4>,
    /// `[B, Hk, Tk, Dv]`, contiguous.
    pub value: Tensor<4>,
    /// `[H]`; needed where the inputs have sink logits. Always added to.
    pub sink_logits: Option<Tensor<1>>,
    /// Of the gradient of queries: for the rows that a pass computes, and them alone.
    pub query_before: Before,
    /// Of the gradients of keys and values: for all keys, whichever rows a pass computes.
    pub key_before: Before,
}

impl Gradients {
    /// Gradients of a problem before any backward pass, with or without those of sink logits.
    ///
    /// # Errors
    /// As [`Tensor::zeros`].
    pub fn zeros(client: &Client, problem: &Problem, with_sinks: bool) -> Result<Self> {
        Self::unset(client, problem, with_sinks)?.cleared(client)
    }

    /// Gradients in memory that holds anything, but for those of sink logits. Each row has to be in exactly one of the passes
    /// that follow, as rows that routes choose are; of those passes all but the first take [`after`](Self::after)'s.
    ///
    /// # Errors
    /// As [`Tensor::zeros`].
    pub fn unset(client: &Client, problem: &Problem, with_sinks: bool) -> Result<Self> {
        let [query, key, value] = shapes(problem).map(|shape| Tensor::empty(client, shape, Element::F32));
        let sink_logits = match with_sinks {
            true => Some(Tensor::zeros(client, [problem.heads])?),
            false => None,
        };
        let before = Before::Anything;
        Ok(Self { query, key, value, sink_logits, query_before: before, key_before: before })
    }

    /// The same with zeros where anything may be: for a pass that only adds.
    ///
    /// # Errors
    /// As [`Tensor::zeros`].
    pub fn cleared(self, client: &Client) -> Result<Self> {
        let cleared = self.with_query_cleared(client)?;
        if cleared.key_before == Before::Anything {
            clear(client, &cleared.key)?;
            clear(client, &cleared.value)?;
        }
        Ok(Self { key_before: Before::Sums, ..cleared })
    }

    /// The same with zeros in the gradient of queries, where anything may be: for rows that are in no pass, or in several.
    ///
    /// # Errors
    /// As [`Tensor::zeros`].
    pub fn with_query_cleared(self, client: &Client) -> Result<Self> {
        if self.query_before == Before::Anything {
            clear(client, &self.query)?;
        }
        Ok(Self { query_before: Before::Sums, ..self })
    }

    /// The same memory after a first pass, for passes over other rows: keys and values have gradients to add to.
    pub fn after(&self) -> Self {
        Self { key_before: Before::Sums, ..self.clone() }
    }

    /// The same memory after a pass over all rows, for passes over some of them again.
    pub fn after_all_rows(&self) -> Self {
        Self { query_before: Before::Sums, ..self.after() }
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
        let tensor = Self::empty(client, shape, Element::F32);
        clear(client, &tensor)?;
        Ok(tensor)
    }
}

/// Fills a contiguous `f32` tensor with zeros, on the device.
fn clear<const RANK: usize>(client: &Client, tensor: &Tensor<RANK>) -> Result<()> {
    let length = tensor.shape().iter().fold(1usize, |product, &size| product.saturating_mul(size));
    if length as u64 > u64::from(u32::MAX) {
        let limit = u128::from(u32::MAX);
        return Err(Error::TooLarge { what: "elements in a tensor", size: length as u128, limit });
    }
    let units_in_all = length.clamp(1, CLEARING_UNITS);
    let (cubes, units) = grid(client, units_in_all);
    // SAFETY: a contiguous tensor has the memory that its shape reaches; units stop at its end.
    unsafe {
        clear_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(tensor.view()),
            length as u32,
            units_in_all as u32,
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
fn clear_kernel(tensor: &mut [f32], length: u32, units: u32) {
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
