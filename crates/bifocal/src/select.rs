use bifocal_core::{
    DeviceProfile, Error, Problem, Result,
    device::{AttentionOperator, Gradients, Inputs, Partial, Routes, Saved},
};
use bifocal_dispatch::Plan;
use cubecl::client::Client;

/// Plans routes for the engine of the client's device.
///
/// # Errors
/// As [`Plan::build`].
pub fn plan(client: &Client, problem: &Problem, routes: &Routes) -> Result<Plan> {
    Plan::build(client, routes, problem, bifocal_tile::item_rows(&DeviceProfile::of(client)))
}

/// Computes every row of `problem` by the branch that its route names: branch `k` runs on the rows of reach `k`
/// and writes them in place, so that nothing is computed twice and nothing is left to combine.
///
/// Rows without a valid route (a NaN score) become NaN.
///
/// # Errors
/// [`Error::Option`] unless there is one branch per reach; otherwise as the branches' `attend`.
pub fn attend_selected(
    client: &Client,
    problem: &Problem,
    inputs: &Inputs<'_>,
    routes: &Routes,
    branches: &[&dyn AttentionOperator],
    partial: &Partial,
) -> Result<()> {
    let plan = plan(client, problem, routes)?;
    attend_planned(client, problem, inputs, &plan, branches, partial)
}

/// [`attend_selected`] by a plan that is there already, and may serve the backward pass later.
///
/// # Errors
/// As [`attend_selected`].
pub fn attend_planned(
    client: &Client,
    problem: &Problem,
    inputs: &Inputs<'_>,
    plan: &Plan,
    branches: &[&dyn AttentionOperator],
    partial: &Partial,
) -> Result<()> {
    one_each(plan.reaches(), branches.len())?;
    for (reach, branch) in branches.iter().enumerate() {
        branch.attend(client, problem, inputs, plan.rows(reach)?, partial)?;
    }
    Ok(())
}

/// The gradients of [`attend_planned`]'s inputs: those of every row through the one branch that computed it. They are added
/// to `gradients`, or stored where these are [unset](Gradients::unset).
///
/// Routes are discrete, and have no gradient here; see [`gate_gradient`](crate::gate_gradient) and
/// [`choice_gradient`](crate::choice_gradient). Rows without a valid route make NaN of the gradients that they reach.
///
/// # Errors
/// [`Error::Option`] unless there is one branch per reach; otherwise as the branches' `backward`.
pub fn backward_selected(
    client: &Client,
    problem: &Problem,
    inputs: &Inputs<'_>,
    plan: &Plan,
    branches: &[&dyn AttentionOperator],
    saved: &Saved<'_>,
    gradients: &Gradients,
) -> Result<()> {
    one_each(plan.reaches(), branches.len())?;
    for (reach, branch) in branches.iter().enumerate() {
        let gradients = if reach == 0 { gradients } else { &gradients.after() };
        branch.backward(client, problem, inputs, plan.rows(reach)?, saved, gradients)?;
    }
    Ok(())
}

/// Checks that there is one branch per reach.
pub(crate) fn one_each(reaches: usize, branches: usize) -> Result<()> {
    if reaches != branches {
        return Err(Error::option("reaches of the routes", reaches, branches.to_string()));
    }
    Ok(())
}

/// Attention by a system's `branches`, one per reach.
macro_rules! selecting {
    ($system:ty) => {
        impl $system {
            /// Attends by routes `[B, R, T]`, which name one of the [`branches`](Self::branches) each, into a new partial of
            /// the inputs' type.
            ///
            /// # Errors
            /// As [`attend_selected`](crate::attend_selected).
            pub fn attend(
                &self,
                client: &cubecl::client::Client,
                problem: &crate::Problem,
                inputs: &crate::Inputs<'_>,
                routes: &crate::Routes,
            ) -> crate::Result<crate::Partial> {
                let partial = crate::Partial::empty(client, problem, problem.element);
                self.attend_into(client, problem, inputs, routes, &partial)?;
                Ok(partial)
            }

            /// Attends into `partial`, every row of which is written.
            ///
            /// # Errors
            /// As [`attend_selected`](crate::attend_selected).
            pub fn attend_into(
                &self,
                client: &cubecl::client::Client,
                problem: &crate::Problem,
                inputs: &crate::Inputs<'_>,
                routes: &crate::Routes,
                partial: &crate::Partial,
            ) -> crate::Result<()> {
                crate::attend_selected(client, problem, inputs, routes, &self.branches(), partial)
            }
        }
    };
}
pub(crate) use selecting;
