//! What sequences that are packed into one batch satisfy.

use proptest::prelude::*;

use crate::{
    Device, Effort, Property,
    attention::{aha, attend, near_or_far, rows},
    case::{Case, packed_cases, reaches, routings, windows},
    compare::{Expected, Read, agree, run},
    everywhere,
    inputs::{Data, HostRoutes},
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "packed_sequences_equal_the_oracle",
        claim: "sequences of any lengths, packed into one batch, give the oracle's output for every reach",
        applies: everywhere,
        one_in: 1,
        run: packed_sequences_equal_the_oracle,
    },
    Property {
        name: "packed_sequences_equal_one_by_one",
        claim: "packed sequences give what the same kernels give for each sequence alone",
        applies: everywhere,
        one_in: 1,
        run: packed_sequences_equal_one_by_one,
    },
    Property {
        name: "packed_sequences_never_mix",
        claim: "a NaN key or value reaches exactly the rows of its own sequence that see it",
        applies: everywhere,
        one_in: 1,
        run: packed_sequences_never_mix,
    },
    Property {
        name: "routed_packed_sequences_equal_the_oracle",
        claim: "AHA on packed sequences is the branch that each row's route names, within its sequence",
        applies: everywhere,
        one_in: 1,
        run: routed_packed_sequences_equal_the_oracle,
    },
];

fn packed_sequences_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (packed_cases(&device.profile), reaches()), |(case, reach)| {
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let read = attend(device, &case, &on, reach)?;
        Expected::new(&case, &data, |_, _, _| Some(reach)).accepts(&read)
    })
}

fn packed_sequences_equal_one_by_one(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (packed_cases(&device.profile), reaches()), |(case, reach)| {
        let case = Case { out_f32: true, magnitude: 1.0, ..case };
        let data = Data::new(&case);
        let packed = attend(device, &case, &run(data.upload(&device.client))?, reach)?;
        // The same row in another tile adds its keys up in another order: a few roundings.
        let tolerance = if case.may_round_weights() { 8.0 * case.element.epsilon() } else { 1e-4 };
        let sequences = case.packed.as_ref().ok_or("sequences are packed")?;
        for (queries, keys) in sequences.ranges() {
            if queries.is_empty() || keys.is_empty() {
                continue;
            }
            let alone = Case { query_len: queries.len(), key_len: keys.len(), packed: None, ..case.clone() };
            let mut part = Data::new(&alone);
            part.query = rows(&data.query, case.query_len, case.head_dim, queries.clone());
            part.key = rows(&data.key, case.key_len, case.head_dim, keys.clone());
            part.value = rows(&data.value, case.key_len, case.value_dim, keys);
            part.sinks = data.sinks.clone();
            let alone = attend(device, &alone, &run(part.upload(&device.client))?, reach)?;
            let cut = Read {
                out: rows(&packed.out, case.query_len, case.value_dim, queries.clone()),
                lse: rows(&packed.lse, case.query_len, 1, queries.clone()),
            };
            agree(&alone, &cut, tolerance).map_err(|error| format!("queries {queries:?}: {error}"))?;
        }
        Ok(())
    })
}

fn packed_sequences_never_mix(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (packed_cases(&device.profile), reaches(), any::<prop::sample::Index>(), any::<bool>());
    refute(effort, strategy, |(case, reach, at, in_key)| {
        let mut data = Data::new(&case);
        data.spoil(at.index(case.key_len), in_key);
        let read = attend(device, &case, &run(data.upload(&device.client))?, reach)?;
        Expected::new(&case, &data, |_, _, _| Some(reach)).accepts(&read)
    })
}

fn routed_packed_sequences_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (packed_cases(&device.profile), windows(), routings()), |(case, window, routing)| {
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let routes = HostRoutes::new(&case, &routing, 2);
        let read = aha(device, &case, &on, &routes, window)?;
        Expected::new(&case, &data, |b, h, t| near_or_far(routes.at(case.heads(), b, h, t) == 1, window))
            .accepts(&read)
    })
}
