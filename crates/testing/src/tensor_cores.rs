//! The instructions that tensor-core kernels are made of, against plain loops.

use bifocal::{DeviceProfile, Element};
use proptest::{prelude::*, sample::select};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{Device, Effort, Property, compare::run, refute};

pub(crate) const PROPERTIES: &[Property] = &[Property {
    name: "warpgroup_products_are_plain_sums",
    claim: "bulk copies, the swizzle, both warpgroup products and packing give exactly the sums of plain loops",
    applies: is_hopper,
    one_in: 1,
    run: warpgroup_products_are_plain_sums,
}];

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
