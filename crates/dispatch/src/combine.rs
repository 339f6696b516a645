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
    check(client, problem, into)?;
    check(client, problem, from)?;
    merge_rows(client, None, HostRows::new(problem, problem.heads), into, from);
    Ok(())
}

/// [`merge`] of the rows whose route is `reach`; all others stay as they are and are not read in `from`, so that it may be
/// a partial whose other rows were never written. Rows without a valid route become NaN.
///
/// # Errors
/// As [`select`].
pub fn merge_routed(
    client: &Client,
    problem: &Problem,
    routes: &Routes,
    reach: usize,
    into: &Partial,
    from: &Partial,
) -> Result<()> {
    check(client, problem, from)?;
    let (geometry, rows) = check_routed(client, problem, routes, reach, into)?;
    merge_rows(client, Some((routes, geometry, reach)), rows, into, from);
    Ok(())
}

/// Routes, their geometry, and the reach whose rows are combined.
type Taken<'a> = (&'a Routes, RouteGeometry, usize);

fn merge_rows(client: &Client, taken: Option<Taken<'_>>, rows: HostRows, into: &Partial, from: &Partial) {
    let (cubes, units) = grid(client, rows.rows);
    let [reaches, reach] = taken.map_or([0, 0], |(_, geometry, reach)| [geometry.reaches, reach]);
    // SAFETY: both were checked against the problem; each unit checks its row.
    unsafe {
        merge_kernel::launch_unchecked(
            client,
            cubes,
            units,
            words(taken.map_or(from.lse.handle(), |(routes, ..)| routes.handle())),
            elements(from.out.view()),
            elements(from.lse.view()),
            elements(into.out.view()),
            elements(into.lse.view()),
            rows.launch(),
            reaches as u32,
            reach as u32,
            f32::NEG_INFINITY,
            f32::NAN,
            taken.is_some(),
            [from.out.element().into(), into.out.element().into()],
        );
    }
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
    check(client, problem, into)?;
    let router_heads = check_weights(client, problem, weights)?;
    check(client, problem, far)?;
    mix_rows(client, None, HostRows::new(problem, router_heads), weights, into, far);
    Ok(())
}

/// [`mix`] of the rows whose route is `reach`; all others stay as they are, as if their weight were 0, and are not read in
/// `far` (LoGo, arXiv 2608.29539, whose weights below a threshold are 0). Rows without a valid route become NaN.
///
/// # Errors
/// As [`select`] and [`mix`]; [`Error::Shape`] unless there is a weight per route.
pub fn mix_routed(
    client: &Client,
    problem: &Problem,
    weights: TensorView<'_, 3>,
    routes: &Routes,
    reach: usize,
    into: &Partial,
    far: &Partial,
) -> Result<()> {
    check(client, problem, far)?;
    let (geometry, rows) = check_routed(client, problem, routes, reach, into)?;
    let router_heads = check_weights(client, problem, weights)?;
    if router_heads != geometry.heads {
        let expected = format!("{:?}, as the routes", [geometry.batch, geometry.heads, geometry.tokens]);
        return Err(Error::shape("the mixing weights", expected, &weights.shape()));
    }
    mix_rows(client, Some((routes, geometry, reach)), rows, weights, into, far);
    Ok(())
}

/// Checks mixing weights and gives the router heads that they are for.
fn check_weights(client: &Client, problem: &Problem, weights: TensorView<'_, 3>) -> Result<usize> {
    let [batch, router_heads, tokens] = weights.shape();
    RouteGeometry::new(batch, router_heads, tokens, 2)?.check(problem)?;
    weights.check("the mixing weights", client, [batch, router_heads, tokens], Element::F32)?;
    weights.check_contiguous("the mixing weights")?;
    Ok(router_heads)
}

fn mix_rows(
    client: &Client,
    taken: Option<Taken<'_>>,
    rows: HostRows,
    weights: TensorView<'_, 3>,
    into: &Partial,
    far: &Partial,
) {
    let (cubes, units) = grid(client, rows.rows);
    let [reaches, reach] = taken.map_or([0, 0], |(_, geometry, reach)| [geometry.reaches, reach]);
    // SAFETY: as in `merge_rows`; weights were checked too.
    unsafe {
        mix_kernel::launch_unchecked(
            client,
            cubes,
            units,
            words(taken.map_or(weights.handle(), |(routes, ..)| routes.handle())),
            elements(weights),
            elements(far.out.view()),
            elements(into.out.view()),
            rows.launch(),
            reaches as u32,
            reach as u32,
            f32::NAN,
            taken.is_some(),
            [far.out.element().into(), into.out.element().into()],
        );
    }
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
    // SAFETY: as in `merge_rows`.
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
    // SAFETY: as in `merge_rows`.
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
