//! What a call costs the host before any work is done: checks, arguments and the launch, on the CPU runtime and at
//! shapes so small that computing them hardly counts.
//!
//! `cargo bench --workspace --all-features --bench host`

mod timing;

use bifocal::{
    AttentionOperator, DeviceProfile, Element, FixedRouter, Inputs, Partial, Problem, Router, Rows, Tensor,
    Window, Windowed,
};
use timing::Session;

fn main() -> bifocal::Result<()> {
    let session = Session::start();
    let client = &bifocal::open("cpu")?;

    // Opaque, so that nothing is computed before the program runs.
    let (query, key) = (std::hint::black_box([1, 2, 16, 16]), std::hint::black_box([1, 1, 16, 16]));
    session.time("problem validation", client, 10_000, None, || {
        Problem::new(query, key, Element::F32)?.with_value_dim(16)?.with_softcap(30.0)
    })?;
    session.time("device profile", client, 1_000, None, || Ok(DeviceProfile::of(client)))?;

    let problem = &Problem::new(query, key, Element::F32)?;
    let query = Tensor::filled(client, query, Element::F32, 0.5)?;
    let key = Tensor::filled(client, key, Element::F32, 0.5)?;
    let hidden = Tensor::filled(client, [1, 16, 4], Element::F32, 0.0)?;
    let inputs = &Inputs::new(query.view(), key.view(), key.view());
    let partial = &Partial::empty(client, problem, Element::F32);
    let windowed = Windowed::new(Window::new(4)?);
    session.time("checking inputs and output", client, 1_000, None, || {
        inputs.check(client, problem)?;
        partial.check(client, problem)
    })?;
    session.time("choosing a routine", client, 1_000, None, || {
        windowed.choose(problem, &DeviceProfile::of(client))
    })?;
    session
        .time("room for outputs", client, 1, None, || Ok(Partial::empty(client, problem, Element::F32)))?;
    session.time("launching windowed, all rows", client, 1, None, || {
        windowed.attend(client, problem, inputs, Rows::All, partial)
    })?;

    let router = FixedRouter::new(vec![0, 1], 2)?;
    session.time("launching a router", client, 1, None, || router.route(client, hidden.view()))?;
    let routes = &router.route(client, hidden.view())?.routes;
    session.time("launching a plan", client, 1, None, || bifocal::plan(client, problem, routes))?;
    let plan = bifocal::plan(client, problem, routes)?;
    session.time("launching windowed, routed rows", client, 1, None, || {
        windowed.attend(client, problem, inputs, plan.rows(0)?, partial)
    })?;
    // The shortest way to a kernel: what of the above is the runtime's own.
    session.time("waiting for nothing", client, 1, None, || bifocal::synchronise(client))
}
