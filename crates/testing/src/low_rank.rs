//! What a gate by a low rank of the covariance satisfies.

use bifocal::{Basis, Covariance, MomentGate, Moments};
use bifocal_reference::{self as reference, Array};
use proptest::prelude::*;

use crate::{
    Device, Effort, Property,
    case::{Case, windows},
    compare::{near, run},
    everywhere,
    inputs::{Data, array},
    moments::{NATS, uncapped},
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[Property {
    name: "low_rank_masses_equal_the_oracle",
    claim: "masses by a low rank are the oracle's, within the bound of those by the full covariance, and these at full rank",
    applies: everywhere,
    one_in: 2,
    run: low_rank_masses_equal_the_oracle,
}];

fn low_rank_masses_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (uncapped(device), windows(), 0..6u32, any::<prop::sample::Index>(), any::<bool>());
    refute(effort, strategy, |(case, window, sinks, rank, whole)| {
        let client = &device.client;
        let dim = case.head_dim.min(33);
        let case = Case { head_dim: dim, value_dim: dim, sink_logits: false, ..case };
        let rank = if whole { dim } else { 1 + rank.index(dim) };
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        let (problem, inputs) = (case.problem(), on.inputs());
        let shape = [case.batch, case.kv_heads, dim];

        // Moments of all keys, as a calibration has them.
        let moments = run(Moments::of(client, on.key.view(), 0..case.key_len, Covariance::Full))?;
        let host = run(moments.to_host(client))?;
        let basis = run(Basis::principal(&host, shape, rank))?;
        let low = run(Moments::low_rank(client, &host, &basis))?;
        let gate = run(MomentGate::new(window, 0.5))?.with_sinks(sinks);
        let full = run(gate.predict(client, &problem, &inputs, Some(&moments)))?;
        let full = run(full.to_f32(client))?;
        let gate = gate.with_covariance(Covariance::LowRank { rank });
        let found = run(run(gate.predict(client, &problem, &inputs, Some(&low)))?.to_f32(client))?;

        let query: Array<f64, 4> = array(data.query_shape(), &data.query);
        let scale = f64::from(problem.scale);
        let covariances: Array<f64, 4> = array([case.batch, case.kv_heads, dim, dim], &host.covariance);
        let directions = basis.to_f32();
        let directions: Array<f64, 4> = array([case.batch, case.kv_heads, rank, dim], &directions);
        let mut expected = Vec::with_capacity(found.len());
        for b in 0..case.batch {
            for h in 0..case.heads() {
                let list = [b, h / case.group];
                let matrix = |of: &Array<f64, 4>, rows| Array::new([rows, dim], of.row(list).to_vec());
                let exact = matrix(&covariances, dim);
                let lower = reference::low_rank(&exact, &matrix(&directions, rank));
                let beside = |i: usize, j: usize| lower[[i, j]] - exact[[i, j]];
                let norm = (0..dim * dim).map(|at| beside(at / dim, at % dim).powi(2)).sum::<f64>().sqrt();
                for t in 0..case.query_len {
                    let q = query.row([b, h, t]);
                    let terms =
                        (0..dim * dim).map(|at| q[at / dim] * beside(at / dim, at % dim) * q[at % dim]);
                    let off = 0.5 * scale * scale * terms.sum::<f64>();
                    let bound = 0.5 * scale * scale * norm * q.iter().map(|x| x * x).sum::<f64>();
                    let by_full = f64::from(full[expected.len()]);
                    let by_low = f64::from(found[expected.len()]);
                    // Both are -inf of a row without a bulk.
                    if by_full.is_finite() && (by_low - by_full).abs() > bound + NATS {
                        return Err(format!("{by_low} is not within {bound} of {by_full}"));
                    }
                    if rank == dim && off.abs() > NATS {
                        return Err(format!("all {dim} directions leave {off}"));
                    }
                    expected.push(by_full + off);
                }
            }
        }
        near("mass", &expected, &found, 2.0 * NATS)
    })
}
