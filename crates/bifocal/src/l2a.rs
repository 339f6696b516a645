use bifocal_core::{
    Problem, Result, Window,
    device::{AttentionOperator, Inputs, Partial, Routes, Rows},
};
use bifocal_full::Full;
use bifocal_windowed::Windowed;
use cubecl::client::Client;

/// Learning To Attend (arXiv 2603.17484): two residual attention sub-layers in series, each on its own
/// projections. The local one serves every token; the global one is added where the token's gate is open and is
/// zero elsewhere.
///
/// Norms, projections and residuals between the two belong to the model (see `L2aAttention` in `bifocal-burn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2a {
    local: Windowed,
}

impl L2a {
    /// L2A with this window for the local sub-layer (the paper's is [`Window::l2a`]`(4095)`).
    pub const fn new(window: Window) -> Self {
        Self { local: Windowed::new(window) }
    }

    /// The local sub-layer's attention, for every token.
    ///
    /// # Errors
    /// As [`AttentionOperator::attend`].
    pub fn local(&self, client: &Client, problem: &Problem, inputs: &Inputs<'_>) -> Result<Partial> {
        let partial = Partial::empty(client, problem, problem.element);
        self.local.attend(client, problem, inputs, Rows::All, &partial)?;
        Ok(partial)
    }

    /// The global sub-layer's attention: full attention where the route is far, `out = 0` elsewhere. Only routed
    /// rows are computed. Rows without a valid route (a NaN score) become NaN.
    ///
    /// # Errors
    /// As [`AttentionOperator::attend`] and [`plan`](crate::plan).
    pub fn global(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        routes: &Routes,
    ) -> Result<Partial> {
        let partial = Partial::empty(client, problem, problem.element);
        let plan = crate::plan(client, problem, routes)?;
        bifocal_dispatch::mask(client, problem, routes, routes.geometry().reaches - 1, &partial)?;
        Full.attend(client, problem, inputs, plan.far_rows()?, &partial)?;
        Ok(partial)
    }
}
