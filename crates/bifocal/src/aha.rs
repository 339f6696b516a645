use bifocal_core::{
    Problem, Result, Window,
    device::{AttentionOperator, Inputs, Partial, Routes},
};
use bifocal_full::Full;
use bifocal_windowed::Windowed;
use cubecl::client::Client;

use crate::attend_selected;

/// All-or-Here Attention (arXiv 2512.22562): `o = g a_full + (1 - g) a_window` with a gate g of 0 or 1
/// per token and head, so each output row is exactly one of two softmaxes over shared keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aha {
    near: Windowed,
}

impl Aha {
    /// AHA with this window for tokens that stay here.
    pub const fn new(window: Window) -> Self {
        Self { near: Windowed::new(window) }
    }

    /// AHA with another near branch: a window with sink tokens, say.
    pub const fn with_near(near: Windowed) -> Self {
        Self { near }
    }

    /// The branches by reach: near, then far.
    pub fn branches(&self) -> [&dyn AttentionOperator; 2] {
        [&self.near, &Full]
    }

    /// Attends by routes `[B, R, T]` of two reaches (0 near, 1 far), into a new partial of the inputs' type.
    ///
    /// # Errors
    /// As [`attend_selected`].
    pub fn attend(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        routes: &Routes,
    ) -> Result<Partial> {
        let partial = Partial::empty(client, problem, problem.element);
        self.attend_into(client, problem, inputs, routes, &partial)?;
        Ok(partial)
    }

    /// Attends into `partial`, every row of which is written.
    ///
    /// # Errors
    /// As [`attend_selected`].
    pub fn attend_into(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        routes: &Routes,
        partial: &Partial,
    ) -> Result<()> {
        attend_selected(client, problem, inputs, routes, &self.branches(), partial)
    }
}
