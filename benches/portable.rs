//! The portable routine on the CPU runtime, from the call until the device is idle again, at shapes that take
//! milliseconds. Rates count the pairs of a query and a key that the routes show, whatever the kernels compute.
//!
//! `cargo bench --workspace --all-features --bench portable`; `bifocal bench` times larger shapes and other devices.

use bifocal::{
    Aha, AttentionOperator, Element, Full, Inputs, LinearGate, Partial, Problem, RandomRouter, Reach, Router,
    Rows, Tensor, Window, Windowed, cubecl::client::Client,
};
use criterion::{BenchmarkId, Criterion, Throughput};

const HEADS: usize = 4;
const HEAD_DIM: usize = 64;
const MODEL_DIM: usize = 256;
const WINDOW: usize = 128;
/// AHA's share of token-heads that look far (arXiv 2512.22562).
const FAR_SHARE: f64 = 0.067;

fn portable(criterion: &mut Criterion) {
    let client = &bifocal::open("cpu").expect("the CPU runtime");
    for length in [512, 1024] {
        measure(criterion, client, length).expect("shapes that fit each other");
    }
}

fn measure(criterion: &mut Criterion, client: &Client, length: usize) -> bifocal::Result<()> {
    let window = Window::new(WINDOW)?;
    let shape = [1, HEADS, length, HEAD_DIM];
    let problem = &Problem::new(shape, shape, Element::F32)?;
    let query = wave(client, shape, 0.37)?;
    let key = wave(client, shape, 0.73)?;
    let value = wave(client, shape, 1.31)?;
    let hidden = wave(client, [1, length, MODEL_DIM], 0.11)?;
    let inputs = &Inputs::new(query.view(), key.view(), value.view());
    let partial = &Partial::empty(client, problem, Element::F32);
    let router = RandomRouter::gate(HEADS, FAR_SHARE, 1)?;
    let routes = &router.route(client, hidden.view())?.routes;
    let mut time = |case: &str, pairs: Option<usize>, call: &dyn Fn() -> bifocal::Result<()>| {
        let mut group = criterion.benchmark_group(case);
        group.sample_size(20);
        if let Some(pairs) = pairs {
            group.throughput(Throughput::Elements(pairs as u64));
        }
        group.bench_function(BenchmarkId::from_parameter(length), |bencher| {
            bencher.iter(|| {
                call().expect("a call that was checked before");
                bifocal::synchronise(client).expect("the device is well");
            });
        });
        group.finish();
    };
    let pairs = |reach_of: &dyn Fn(u32, u32) -> Reach| -> usize {
        let rows = (0..HEADS as u32).flat_map(|head| (0..length as u32).map(move |token| (head, token)));
        rows.map(|(head, token)| reach_of(head, token).visible(i64::from(token), length)).sum()
    };

    let (near, far) = (Reach::Window(window), Reach::All);
    let attend = |operator: &dyn AttentionOperator| {
        operator.attend(client, problem, inputs, Rows::All, partial).map(|_| ())
    };
    time("windowed", Some(pairs(&|_, _| near)), &|| attend(&Windowed::new(window)));
    time("full", Some(pairs(&|_, _| far)), &|| attend(&Full));
    let by_route = pairs(&|head, token| if router.route_of(head, token) == 1 { far } else { near });
    time("aha", Some(by_route), &|| Aha::new(window).attend_into(client, problem, inputs, routes, partial));
    time("plan", None, &|| bifocal::plan(client, problem, routes).map(|_| ()));
    let gate = LinearGate::aha(wave(client, [MODEL_DIM, HEADS], 0.59)?);
    time("router", None, &|| gate.route(client, hidden.view()).map(|_| ()));
    Ok(())
}

/// Numbers between -1 and 1 that repeat nowhere near.
fn wave<const RANK: usize>(
    client: &Client,
    shape: [usize; RANK],
    step: f32,
) -> bifocal::Result<Tensor<RANK>> {
    let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| (i as f32 * step).sin()).collect();
    Tensor::from_f32(client, shape, Element::F32, &values)
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    portable(&mut criterion);
    criterion.final_summary();
}
