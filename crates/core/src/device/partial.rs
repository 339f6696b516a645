use cubecl::client::Client;

use super::Tensor;
use crate::{Element, Problem, Result};

/// What an attention operator writes: outputs and their log-sum-exp.
///
/// Two partials over disjoint sets of keys merge exactly through their log-sum-exp. A row that sees no key is
/// `out = 0`, `lse = -inf` (a real infinity): merging with it is the identity.
#[derive(Clone, Debug)]
pub struct Partial {
    /// `[B, H, Tq, Dv]`. Partials that are to be merged hold `f32`; a branch that writes the final output may
    /// hold the problem's element type.
    pub out: Tensor<4>,
    /// `[B, H, Tq]`, `f32`, natural logarithm.
    pub lse: Tensor<3>,
}

impl Partial {
    /// Room for the results of a problem, contents unspecified.
    pub fn empty(client: &Client, problem: &Problem, element: Element) -> Self {
        Self {
            out: Tensor::empty(client, problem.out_shape(), element),
            lse: Tensor::empty(client, problem.lse_shape(), Element::F32),
        }
    }

    /// Room whose every element is NaN, so that what an operator leaves unwritten shows.
    ///
    /// # Errors
    /// As [`Tensor::filled`].
    pub fn poisoned(client: &Client, problem: &Problem, element: Element) -> Result<Self> {
        Ok(Self {
            out: Tensor::filled(client, problem.out_shape(), element, f32::NAN)?,
            lse: Tensor::filled(client, problem.lse_shape(), Element::F32, f32::NAN)?,
        })
    }

    /// The partial of no key at all: `out = 0`, `lse = -inf`. What unrouted rows of an additive branch are.
    ///
    /// # Errors
    /// As [`Tensor::filled`].
    pub fn identity(client: &Client, problem: &Problem, element: Element) -> Result<Self> {
        Ok(Self {
            out: Tensor::filled(client, problem.out_shape(), element, 0.0)?,
            lse: Tensor::filled(client, problem.lse_shape(), Element::F32, f32::NEG_INFINITY)?,
        })
    }

    /// Checks that this is room for the results of `problem` on the client's device: every row of the output in
    /// memory of its own, the log-sum-exp contiguous.
    ///
    /// # Errors
    /// As [`TensorView::check`](super::TensorView::check); [`crate::Error::Element`] when outputs are neither `f32` nor of
    /// the problem's type; [`crate::Error::Overlap`] when rows share memory; [`crate::Error::NotContiguous`].
    pub fn check(&self, client: &Client, problem: &Problem) -> Result<()> {
        let element = match self.out.element() {
            Element::F32 => Element::F32,
            _ => problem.element,
        };
        let out = self.out.view();
        out.check("the partial's output", client, problem.out_shape(), element)?;
        out.check_disjoint("the partial's output")?;
        let lse = self.lse.view();
        lse.check("the partial's log-sum-exp", client, problem.lse_shape(), Element::F32)?;
        lse.check_contiguous("the partial's log-sum-exp")
    }
}
