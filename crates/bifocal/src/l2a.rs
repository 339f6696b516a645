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

    /// [`global`](Self::global) with every row computed: the sub-layer's partial, and full attention before its gate, whose
    /// outputs [`gate_gradient`](crate::gate_gradient) asks for. Tokens that are routed near learn from it what they miss
    /// (the paper's leak).
    ///
    /// # Errors
    /// As [`global`](Self::global).
    pub fn global_dense(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        routes: &Routes,
    ) -> Result<(Partial, Partial)> {
        let far = routes.geometry().reaches - 1;
        let every = Partial::empty(client, problem, problem.element);
        Full.attend(client, problem, inputs, Rows::All, &every)?;
        let partial = Partial::empty(client, problem, problem.element);
        bifocal_dispatch::mask(client, problem, routes, far, &partial)?;
        bifocal_dispatch::select(client, problem, routes, far, &every, &partial)?;
        Ok((partial, every))
    }
}
