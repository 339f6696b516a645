use bifocal_core::{
    Error, Problem, Result, Window,
    device::{AttentionOperator, Inputs, Partial, Routes},
};
use bifocal_full::Full;
use bifocal_windowed::Windowed;
use cubecl::client::Client;

use crate::attend_selected;

/// Switch Attention (arXiv 2603.26380): each token takes one of two branches over shared keys and values, with all of its
/// heads. The paper's branches are a window and full attention, and differ from AHA's in that heads do not choose for
/// themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switch<N = Windowed, F = Full> {
    near: N,
    far: F,
}

impl Switch {
    /// A switch between this window and everything.
    pub const fn new(window: Window) -> Self {
        Self::between(Windowed::new(window), Full)
    }
}

impl<N, F> Switch<N, F> {
    /// A switch between any two branches.
    pub const fn between(near: N, far: F) -> Self {
        Self { near, far }
    }
}

impl<N: AttentionOperator, F: AttentionOperator> Switch<N, F> {
    /// The branches by reach: 0 near, 1 far. [`backward_selected`](crate::backward_selected) takes them.
    pub fn branches(&self) -> [&dyn AttentionOperator; 2] {
        [&self.near, &self.far]
    }

    /// Attends by routes `[B, 1, T]` of two reaches into a new partial of the inputs' type.
    ///
    /// # Errors
    /// [`Error::Option`] for routes of several router heads; as [`attend_selected`].
    pub fn attend(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        routes: &Routes,
    ) -> Result<Partial> {
        let router_heads = routes.geometry().heads;
        if router_heads != 1 {
            return Err(Error::option("router heads of a switch", router_heads, "1"));
        }
        let partial = Partial::empty(client, problem, problem.element);
        attend_selected(client, problem, inputs, routes, &self.branches(), &partial)?;
        Ok(partial)
    }
}
