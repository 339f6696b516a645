//! What a call costs the host before any work is done: checks, arguments and the launch, on the CPU runtime and at
//! shapes so small that computing them hardly counts.
//!
//! `cargo bench --workspace --all-features --bench host`

use std::{hint::black_box, time::Instant};

use bifocal::{
    AttentionOperator, DeviceProfile, Element, FixedRouter, Inputs, Partial, Problem, Router, Rows, Tensor,
    Window, Windowed, cubecl::client::Client,
};
use criterion::Criterion;

/// Times one launch after another, each with the device idle: a queue that fills up would be timed instead.
fn time_launch<T>(
    criterion: &mut Criterion,
    client: &Client,
    name: &str,
    mut launch: impl FnMut() -> bifocal::Result<T>,
) {
    criterion.bench_function(name, |bencher| {
        bencher.iter_custom(|count| {
            (0..count)
                .map(|_| {
                    bifocal::synchronise(client).expect("the device is well");
                    let start = Instant::now();
                    black_box(launch().expect("a launch that was checked before"));
                    start.elapsed()
                })
                .sum()
        });
    });
    bifocal::synchronise(client).expect("the device is well");
}

fn host(criterion: &mut Criterion) {
    let client = &bifocal::open("cpu").expect("the CPU runtime");
    measure(criterion, client).expect("shapes that fit each other");
}

fn measure(criterion: &mut Criterion, client: &Client) -> bifocal::Result<()> {
    let (query, key) = ([1, 2, 16, 16], [1, 1, 16, 16]);
    criterion.bench_function("problem validation", |bencher| {
        bencher.iter(|| {
            Problem::new(black_box(query), black_box(key), Element::F32)?
                .with_value_dim(16)?
                .with_softcap(30.0)
        });
    });
    criterion.bench_function("device profile", |bencher| bencher.iter(|| DeviceProfile::of(client)));

    let problem = &Problem::new(query, key, Element::F32)?;
    let query = Tensor::filled(client, query, Element::F32, 0.5)?;
    let key = Tensor::filled(client, key, Element::F32, 0.5)?;
    let hidden = Tensor::filled(client, [1, 16, 4], Element::F32, 0.0)?;
    let inputs = &Inputs::new(query.view(), key.view(), key.view());
    let partial = &Partial::empty(client, problem, Element::F32);
    let windowed = Windowed::new(Window::new(4)?);
    criterion.bench_function("checking inputs and output", |bencher| {
        bencher.iter(|| {
            inputs.check(client, problem)?;
            partial.check(client, problem)
        });
    });
    let profile = &DeviceProfile::of(client);
    criterion.bench_function("choosing a routine", |bencher| {
        bencher.iter(|| windowed.choose(problem, profile));
    });
    time_launch(criterion, client, "room for outputs", || Ok(Partial::empty(client, problem, Element::F32)));
    time_launch(criterion, client, "launching windowed, all rows", || {
        windowed.attend(client, problem, inputs, Rows::All, partial)
    });

    let router = FixedRouter::new(vec![0, 1], 2)?;
    time_launch(criterion, client, "launching a router", || router.route(client, hidden.view()));
    let routes = &router.route(client, hidden.view())?.routes;
    time_launch(criterion, client, "launching a plan", || bifocal::plan(client, problem, routes));
    let plan = bifocal::plan(client, problem, routes)?;
    time_launch(criterion, client, "launching windowed, routed rows", || {
        windowed.attend(client, problem, inputs, plan.rows(0)?, partial)
    });
    Ok(())
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    host(&mut criterion);
    criterion.final_summary();
}
