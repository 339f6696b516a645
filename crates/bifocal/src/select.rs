use bifocal_core::{
    DeviceProfile, Error, Problem, Result,
    device::{AttentionOperator, Inputs, Partial, Routes},
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
    let reaches = routes.geometry().reaches;
    if reaches != branches.len() {
        return Err(Error::option("reaches of the routes", reaches, branches.len().to_string()));
    }
    let plan = plan(client, problem, routes)?;
    for (reach, branch) in branches.iter().enumerate() {
        branch.attend(client, problem, inputs, plan.rows(reach)?, partial)?;
    }
    Ok(())
}
