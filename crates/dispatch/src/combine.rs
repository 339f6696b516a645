use bifocal_core::{
    Element, Error, Problem, Result,
    device::{
        Partial, RouteGeometry, Routes, TensorView,
        launch::{elements, grid, words},
    },
};
use cubecl::client::Client;

mod kernels;

use kernels::{RowsLaunch, mask_kernel, merge_kernel, mix_kernel, select_kernel};

/// Merges the partial `from` into `into` by their log-sum-exp; the two must be over disjoint sets of keys.
///
/// `lse = ln(e^a + e^b)`, `out = e^(a - lse) out_a + e^(b - lse) out_b` (FlashDecoding's and ring attention's
/// merge). A row with `lse = -inf` on one side is the identity.
///
/// # Errors
/// As [`Partial::check`] for both.
pub fn merge(client: &Client, problem: &Problem, into: &Partial, from: &Partial) -> Result<()> {
    check(client, problem, from)?;
    check(client, problem, into)?;
    let rows = problem.batch * problem.heads * problem.query_len;
    let (cubes, units) = grid(client, rows);
    // SAFETY: both were checked against the problem; each unit checks its row.
    unsafe {
        merge_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(from.out.view()),
            elements(from.lse.view()),
            elements(into.out.view()),
            elements(into.lse.view()),
            rows as u32,
            problem.value_dim as u32,
            f32::NEG_INFINITY,
            [from.out.element().into(), into.out.element().into()],
        );
    }
    Ok(())
}

/// Mixes the far branch into the near one with soft gates: `into = (1 - w) into + w far` (LoGo, arXiv
/// 2608.29539), where `weights` are `[B, R, T]` in `f32` and router head `r` serves the query heads `h` with
/// `h R / H = r` (rounded down).
///
/// A convex mix of two softmaxes has no log-sum-exp of its own: `into.lse` is left as it is.
///
/// # Errors
/// As [`Partial::check`]; [`Error::Shape`] when the weights do not fit.
pub fn mix(
    client: &Client,
    problem: &Problem,
    weights: TensorView<'_, 3>,
    into: &Partial,
    far: &Partial,
) -> Result<()> {
    check(client, problem, far)?;
    check(client, problem, into)?;
    let [batch, router_heads, tokens] = weights.shape();
    RouteGeometry::new(batch, router_heads, tokens, 2)?.check(problem)?;
    weights.check("the mixing weights", client, [batch, router_heads, tokens], Element::F32)?;
    weights.check_contiguous("the mixing weights")?;
    let rows = HostRows::new(problem, router_heads);
    let (cubes, units) = grid(client, rows.rows);
    // SAFETY: as in `merge`.
    unsafe {
        mix_kernel::launch_unchecked(
            client,
            cubes,
            units,
            elements(weights),
            elements(far.out.view()),
            elements(into.out.view()),
            rows.launch(),
            [far.out.element().into(), into.out.element().into()],
        );
    }
    Ok(())
}

/// Scatters the rows of `from` whose route is `reach` into `into`, outputs and log-sum-exp, and leaves the others.
///
/// Called once per reach it selects among branches that were computed for every row; operators that run on a
/// plan's rows write in place and need no select. Rows without a valid route become NaN.
///
/// # Errors
/// As [`Partial::check`]; [`Error::Shape`] when the routes do not fit, [`Error::Option`] when they name no such
/// reach.
pub fn select(
    client: &Client,
    problem: &Problem,
    routes: &Routes,
    reach: usize,
    from: &Partial,
    into: &Partial,
) -> Result<()> {
    check(client, problem, from)?;
    let (geometry, rows) = check_routed(client, problem, routes, reach, into)?;
    let (cubes, units) = grid(client, rows.rows);
    // SAFETY: as in `merge`.
    unsafe {
        select_kernel::launch_unchecked(
            client,
            cubes,
            units,
            words(routes.handle()),
            elements(from.out.view()),
            elements(from.lse.view()),
            elements(into.out.view()),
            elements(into.lse.view()),
            rows.launch(),
            geometry.reaches as u32,
            reach as u32,
            f32::NAN,
            [from.out.element().into(), into.out.element().into()],
        );
    }
    Ok(())
}

/// Clears the rows of `partial` whose route is not `reach` to `out = 0`, `lse = -inf`: an additive branch that is
/// switched off (L2A, arXiv 2603.17484). Rows without a valid route become NaN.
///
/// # Errors
/// As [`select`].
pub fn mask(
    client: &Client,
    problem: &Problem,
    routes: &Routes,
    reach: usize,
    partial: &Partial,
) -> Result<()> {
    let (geometry, rows) = check_routed(client, problem, routes, reach, partial)?;
    let (cubes, units) = grid(client, rows.rows);
    // SAFETY: as in `merge`.
    unsafe {
        mask_kernel::launch_unchecked(
            client,
            cubes,
            units,
            words(routes.handle()),
            elements(partial.out.view()),
            elements(partial.lse.view()),
            rows.launch(),
            geometry.reaches as u32,
            reach as u32,
            f32::NEG_INFINITY,
            f32::NAN,
            partial.out.element().into(),
        );
    }
    Ok(())
}

/// The host's copy of [`Rows`].
struct HostRows {
    rows: usize,
    tokens: usize,
    heads: usize,
    router_heads: usize,
    dim: usize,
}

impl HostRows {
    fn new(problem: &Problem, router_heads: usize) -> Self {
        Self {
            rows: problem.batch * problem.heads * problem.query_len,
            tokens: problem.query_len,
            heads: problem.heads,
            router_heads,
            dim: problem.value_dim,
        }
    }

    fn launch(&self) -> RowsLaunch {
        RowsLaunch::new(
            self.rows as u32,
            self.tokens as u32,
            self.heads as u32,
            self.router_heads as u32,
            self.dim as u32,
        )
    }
}

fn check_routed(
    client: &Client,
    problem: &Problem,
    routes: &Routes,
    reach: usize,
    partial: &Partial,
) -> Result<(RouteGeometry, HostRows)> {
    check(client, problem, partial)?;
    let geometry = routes.geometry();
    geometry.check(problem)?;
    routes.check_device(client)?;
    if reach >= geometry.reaches {
        return Err(Error::option("reach", reach, format!("0..{}", geometry.reaches)));
    }
    Ok((geometry, HostRows::new(problem, geometry.heads)))
}

fn check(client: &Client, problem: &Problem, partial: &Partial) -> Result<()> {
    partial.check(client, problem)?;
    // These kernels walk rows one after the other.
    partial.out.view().check_contiguous("a partial to combine")
}
