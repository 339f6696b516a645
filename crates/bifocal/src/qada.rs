use bifocal_core::{
    Element, Problem, Result,
    device::{AttentionOperator, Decision, Gradients, Inputs, Partial, Routes, Rows, Saved},
};
use bifocal_dispatch::{Plan, merge_routed};
use bifocal_full::Far;
use bifocal_router::{MomentGate, Moments};
use bifocal_windowed::Windowed;
use cubecl::client::Client;

/// Query-adaptive attention (QAdA, arXiv 2502.09647): every row attends to its local set, a window and the first tokens; a
/// row that would miss too much, as the [`MomentGate`] predicts from the log-sum-exp of that and from the moments of the
/// other keys, attends to those as well, and the two merge by log-sum-exp. A row so routed is full attention. Nothing is
/// trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Qada {
    gate: MomentGate,
}

impl Qada {
    /// QAdA by this gate, whose window and sinks are its local set.
    pub const fn new(gate: MomentGate) -> Self {
        Self { gate }
    }

    /// The gate.
    pub const fn gate(&self) -> &MomentGate {
        &self.gate
    }

    /// The branch of every row.
    pub const fn near(&self) -> Windowed {
        Windowed::new(self.gate.window()).with_sinks(self.gate.sinks())
    }

    /// The branch that is merged in where the route is far: all other keys.
    pub const fn far(&self) -> Far {
        Far::beyond(self.gate.window()).with_sinks(self.gate.sinks())
    }

    /// Attends into a new partial of the inputs' type, and tells what was decided; the decision's scores are the predicted
    /// logarithms of the bulks' masses. Moments are those of each row's own bulk unless they are `given`, see
    /// [`MomentGate::predict`].
    ///
    /// # Errors
    /// As [`MomentGate::predict`], [`MomentGate::decide`] and [`attend_routed`](Self::attend_routed).
    pub fn attend(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        given: Option<&Moments>,
    ) -> Result<(Partial, Decision)> {
        let partial = Partial::empty(client, problem, problem.element);
        let decision = self.attend_into(client, problem, inputs, given, &partial)?;
        Ok((partial, decision))
    }

    /// Attends into `partial`, every row of which is written and whose outputs are contiguous.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    pub fn attend_into(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        given: Option<&Moments>,
        partial: &Partial,
    ) -> Result<Decision> {
        let predicted = self.gate.predict(client, problem, inputs, given)?;
        self.near().attend(client, problem, inputs, Rows::All, partial)?;
        let decision = self.gate.decide(client, problem, partial.lse.view(), predicted)?;
        self.look_far(client, problem, inputs, &decision.routes, partial)?;
        Ok(decision)
    }

    /// Attends by routes `[B, R, T]` of two reaches from elsewhere, such as static labels, into a new partial of the inputs'
    /// type.
    ///
    /// # Errors
    /// As [`AttentionOperator::attend`] and [`plan`](crate::plan).
    pub fn attend_routed(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        routes: &Routes,
    ) -> Result<Partial> {
        let partial = Partial::empty(client, problem, problem.element);
        self.near().attend(client, problem, inputs, Rows::All, &partial)?;
        self.look_far(client, problem, inputs, routes, &partial)?;
        Ok(partial)
    }

    /// Merges the far branch into `near` where `routes` are far.
    fn look_far(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        routes: &Routes,
        near: &Partial,
    ) -> Result<()> {
        let plan = crate::plan(client, problem, routes)?;
        let far = Partial::empty(client, problem, Element::F32);
        self.far().attend(client, problem, &without_sinks(inputs), plan.far_rows()?, &far)?;
        merge_routed(client, problem, routes, routes.geometry().reaches - 1, near, &far)
    }

    /// The gradients of queries, keys, values and sink logits, for the rows that `plan` lists as they were attended to, added to
    /// `gradients` or stored where these are [unset](Gradients::unset). The decision has no gradient.
    ///
    /// # Errors
    /// As [`AttentionOperator::backward`].
    pub fn backward(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        plan: &Plan,
        saved: &Saved<'_>,
        gradients: &Gradients,
    ) -> Result<()> {
        self.near().backward(client, problem, inputs, Rows::All, saved, gradients)?;
        let (far, rows) = (self.far(), plan.far_rows()?);
        far.backward(client, problem, &without_sinks(inputs), rows, saved, &gradients.after_all_rows())?;
        Ok(())
    }
}

/// Of two partials that are to be merged one has the sink logits.
fn without_sinks<'a>(inputs: &Inputs<'a>) -> Inputs<'a> {
    let mut inputs = *inputs;
    inputs.sink_logits = None;
    inputs
}
