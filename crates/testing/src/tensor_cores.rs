//! The instructions that tensor-core kernels are made of, against plain loops.

use bifocal::{DeviceProfile, Element, Partial, Reach, Window};
use proptest::{prelude::*, sample::select};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    Device, Effort, Property,
    attention::{attend, operator},
    case::{Case, RouterHeads, Routing, Spread},
    compare::{Read, agree, run},
    inputs::{Data, HostRoutes},
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "warpgroup_products_are_plain_sums",
        claim: "bulk copies, the swizzle, both warpgroup products and packing give exactly the sums of plain loops",
        applies: is_hopper,
        one_in: 1,
        run: warpgroup_products_are_plain_sums,
    },
    Property {
        name: "long_contexts_equal_all_rows",
        claim: "routed rows of a context long enough to be cut in slices are what all rows together give",
        applies: is_hopper,
        one_in: 1,
        run: long_contexts_equal_all_rows,
    },
];

fn is_hopper(profile: &DeviceProfile) -> bool {
    profile.cuda_arch == Some(90)
}

/// `[n, k]` by `[m, k]`, transposed: `[n, m]`.
fn by_rows(a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
    a.chunks(k).flat_map(|x| b.chunks(k).map(move |y| dot(x, y))).collect()
}

/// `[n, m]` by `[m, k]`: `[n, k]`.
fn product(a: &[f32], b: &[f32], m: usize, k: usize) -> Vec<f32> {
    let sum =
        |row: &[f32], column: usize| row.iter().zip(b.chunks(k)).map(|(x, y)| x * y[column]).sum::<f32>();
    a.chunks(m).flat_map(|row| (0..k).map(move |column| sum(row, column))).collect()
}

fn warpgroup_products_are_plain_sums(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy =
        (select(vec![64usize, 96, 128, 256]), select(vec![Element::F16, Element::Bf16]), any::<u64>());
    refute(effort, strategy, |(dim, element, seed)| {
        // Sums of up to 256 products of -1, 0 and 1 are exact in every type on the way.
        let keys = if dim == 256 { 64 } else { 128 };
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1..=1) as f32).collect() };
        let (query, key, value) = (draw(64 * dim), draw(keys * dim), draw(keys * dim));
        let (scores, out) = run(bifocal_tile::products(&device.client, element, dim, &query, &key, &value))?;
        let exact = by_rows(&query, &key, dim);
        if scores != exact {
            return Err("scores are not query times key".into());
        }
        if out != product(&exact, &value, keys, dim) {
            return Err("outputs are not scores times value".into());
        }
        Ok(())
    })
}

fn long_contexts_equal_all_rows(device: &Device, effort: Effort) -> Result<(), String> {
    let far = Reach::Far { sinks: 3, window: Window::new(300).expect("at least one key") };
    let strategy = (
        (12_300..20_000usize, 5..9usize, 1..3usize),
        select(vec![64usize, 128]),
        select(vec![Element::F16, Element::Bf16]),
        select(vec![Reach::All, far]),
        (0.1..0.5f64, any::<u64>()),
    );
    refute(effort, strategy, |((tokens, kv_heads, group), dim, element, reach, (share, seed))| {
        let client = &device.client;
        let case = Case {
            batch: 1,
            kv_heads,
            group,
            query_len: tokens,
            key_len: tokens,
            packed: None,
            head_dim: dim,
            value_dim: dim,
            element,
            out_f32: true,
            softcap: false,
            sink_logits: false,
            routine: None,
            tensor_cores: true,
            // Weights of few keys each: a slice that is left out, or counted twice, shows.
            magnitude: 8.0,
            seed,
        };
        let problem = case.problem();
        let on = run(Data::new(&case).upload(client))?;
        let routing = Routing { heads: RouterHeads::Head, spread: Spread::Share(share) };
        let routes = HostRoutes::new(&case, &routing, 2);
        let plan = run(routes.upload(client).and_then(|routes| bifocal::plan(client, &problem, &routes)))?;
        let partial = run(Partial::identity(client, &problem, Element::F32))?;
        run(operator(reach).attend(client, &problem, &on.inputs(), run(plan.far_rows())?, &partial))?;
        let routed = run(Read::new(client, &partial))?;
        let mut all = attend(device, &case, &on, reach)?;
        // Rows that are not routed are left as they were.
        for row in 0..all.lse.len() {
            let (head, token) = (row / tokens, row % tokens);
            if routes.at(case.heads(), 0, head, token) == 0 {
                all.lse[row] = f32::NEG_INFINITY;
                all.out[row * dim..(row + 1) * dim].fill(0.0);
            }
        }
        agree(&routed, &all, 0.02)
    })
}
