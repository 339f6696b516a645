//! Attention systems: which branch computes which rows, forward and backward.

use core::fmt;
use std::sync::Arc;

use bifocal::{
    AttentionOperator, DeviceProfile, Element, Error, Gradients, Inputs, Partial, Plan, Problem, Result,
    Routes, Rows, Saved, Tensor, attend_every, cubecl::client::Client, mask,
};

use crate::Training;

/// An attention operator that a backward pass can hold on to: `Branch::from(operator)`.
#[derive(Clone)]
pub struct Branch(Arc<dyn AttentionOperator + Send + Sync>);

impl<O: AttentionOperator + Send + Sync + 'static> From<O> for Branch {
    fn from(operator: O) -> Self {
        Self(Arc::new(operator))
    }
}

impl Branch {
    fn operator(&self) -> &dyn AttentionOperator {
        &*self.0
    }
}

impl fmt::Debug for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.0.name(), self.0.reach())
    }
}

/// One branch for every row, or a branch per reach for the rows routed to it.
#[derive(Clone, Debug)]
pub(crate) struct System {
    /// By reach. Either all reaches have one, or the last alone (L2A), and then the rows of the others are zero.
    branches: Vec<Option<Branch>>,
    routed: Option<(Routes, Plan)>,
}

/// By reach, what its branch gives for every row, as far as it was computed; `None` for a branch that gives zero.
pub(crate) type Outs = Vec<Option<Tensor<4>>>;

impl System {
    pub(crate) fn dense(branch: Branch) -> Self {
        Self { branches: vec![Some(branch)], routed: None }
    }

    pub(crate) fn routed(
        client: &Client,
        problem: &Problem,
        routes: &Routes,
        branches: Vec<Option<Branch>>,
    ) -> Result<Self> {
        let reaches = routes.geometry().reaches;
        if reaches != branches.len() {
            return Err(Error::option("reaches of the routes", reaches, branches.len().to_string()));
        }
        let plan = bifocal::plan(client, problem, routes)?;
        Ok(Self { branches, routed: Some((routes.clone(), plan)) })
    }

    /// Computes every row once, or clears it.
    pub(crate) fn attend(&self, client: &Client, problem: &Problem, inputs: &Inputs<'_>) -> Result<Partial> {
        let partial = match &self.routed {
            Some((routes, _)) if self.branches.iter().any(Option::is_none) => {
                let partial = Partial::empty(client, problem, problem.element);
                mask(client, problem, routes, self.branches.len() - 1, &partial)?;
                partial
            }
            _ => room(client, problem, inputs),
        };
        for (branch, rows) in self.parts()? {
            branch.attend(client, problem, inputs, rows, &partial)?;
        }
        Ok(partial)
    }

    /// [`attend`](Self::attend), and what the scores of the routes need for their gradient.
    pub(crate) fn attend_every(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        training: Training,
    ) -> Result<(Partial, Outs)> {
        let Some((routes, plan)) = &self.routed else {
            return Ok((self.attend(client, problem, inputs)?, Vec::new()));
        };
        let partial = Partial::empty(client, problem, problem.element);
        let branches: Vec<_> =
            self.branches.iter().map(|branch| branch.as_ref().map(Branch::operator)).collect();
        let far_rows = match training {
            Training::Exact => Rows::All,
            Training::Sparse => plan.far_rows()?,
        };
        let every = attend_every(client, problem, inputs, routes, &branches, far_rows, &partial)?;
        let outs = every.into_iter().map(|partial| partial.map(|partial| partial.out)).collect();
        Ok((partial, outs))
    }

    /// The gradients of every row, each by its own branch, into memory that is unset.
    pub(crate) fn backward(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        saved: &Saved<'_>,
        gradients: &Gradients,
    ) -> Result<()> {
        let mut gradients = match self.branches.iter().all(Option::is_some) {
            true => gradients.clone(),
            // Some rows are in no pass.
            false => gradients.clone().with_query_cleared(client)?,
        };
        for (branch, rows) in self.parts()? {
            branch.backward(client, problem, inputs, rows, saved, &gradients)?;
            gradients = gradients.after();
        }
        Ok(())
    }

    /// Checks that the device can run the backward pass: when that runs, it is too late for an error.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub(crate) fn check_backward(&self, client: &Client, problem: &Problem) -> Result<()> {
        let profile = DeviceProfile::of(client);
        for (branch, _) in self.parts()? {
            branch.choose_backward(problem, &profile)?;
        }
        Ok(())
    }

    /// The branches that there are, each with its rows.
    fn parts(&self) -> Result<Vec<(&dyn AttentionOperator, Rows<'_>)>> {
        let mut parts = Vec::with_capacity(self.branches.len());
        for (reach, branch) in self.branches.iter().enumerate() {
            let Some(branch) = branch else { continue };
            let rows = match &self.routed {
                Some((_, plan)) => plan.rows(reach)?,
                None => Rows::All,
            };
            parts.push((branch.operator(), rows));
        }
        Ok(parts)
    }
}

/// Room for the result, its heads and tokens in the order that the query has them in memory.
fn room(client: &Client, problem: &Problem, inputs: &Inputs<'_>) -> Partial {
    let out = room_like(client, problem, inputs.query.strides());
    Partial { out, lse: Tensor::empty(client, problem.lse_shape(), Element::F32) }
}

/// Room for outputs, heads and tokens in the order that these strides have them.
pub(crate) fn room_like(client: &Client, problem: &Problem, strides: [usize; 4]) -> Tensor<4> {
    let out = Tensor::empty(client, problem.out_shape(), problem.element);
    let [_, by_head, by_token, _] = strides;
    if by_head >= by_token || by_head == 0 {
        return out;
    }
    let [_, heads, tokens, dim] = problem.out_shape();
    let strides = [tokens * heads * dim, dim, heads * dim, 1];
    Tensor::new(out.into_handle(), problem.element, problem.out_shape(), strides)
}
