//! What attention operators and the systems composed of them satisfy.

use bifocal::{
    Aha, AttentionOperator, Element, Far, Full, L2a, MultiWindow, NonCausal, Partial, Reach, Rows, Tensor,
    Window, Windowed,
};
use proptest::prelude::*;

use crate::{
    Device, Effort, Property,
    case::{Case, cases, causal_reaches, reaches, routings, windows},
    compare::{Expected, Read, agree, run},
    everywhere,
    inputs::{Data, HostRoutes, OnDevice, token_major},
    refute,
};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "attention_equals_the_oracle",
        claim: "every reach, shape, element type, softcap and sink logit gives the oracle's output and log-sum-exp",
        applies: everywhere,
        one_in: 1,
        run: attention_equals_the_oracle,
    },
    Property {
        name: "wide_heads_equal_the_oracle",
        claim: "head dim 256 gives the oracle's output and log-sum-exp",
        applies: everywhere,
        one_in: 1,
        run: wide_heads_equal_the_oracle,
    },
    Property {
        name: "non_causal_equals_the_oracle",
        claim: "without a causal mask every query sees every key, whatever the two lengths",
        applies: everywhere,
        one_in: 1,
        run: non_causal_equals_the_oracle,
    },
    Property {
        name: "long_windows_are_full",
        claim: "Window(n) with n >= length is full attention, and Far beyond it sees nothing",
        applies: everywhere,
        one_in: 1,
        run: long_windows_are_full,
    },
    Property {
        name: "the_future_never_matters",
        claim: "a NaN key or value reaches exactly the rows that see it",
        applies: everywhere,
        one_in: 1,
        run: the_future_never_matters,
    },
    Property {
        name: "near_and_far_merge_to_full",
        claim: "a reach and its complement, merged by log-sum-exp, are full attention",
        applies: everywhere,
        one_in: 1,
        run: near_and_far_merge_to_full,
    },
    Property {
        name: "chunks_equal_at_once",
        claim: "prefill in chunks is prefill at once, and a decode step is the last row",
        applies: everywhere,
        one_in: 1,
        run: chunks_equal_at_once,
    },
    Property {
        name: "strides_do_not_matter",
        claim: "token-major and broadcast inputs and token-major outputs give what contiguous ones give",
        applies: everywhere,
        one_in: 1,
        run: strides_do_not_matter,
    },
    Property {
        name: "heads_and_batches_are_independent",
        claim: "permuting sequences and kv heads permutes the output",
        applies: everywhere,
        one_in: 1,
        run: heads_and_batches_are_independent,
    },
    Property {
        name: "two_runs_agree_bit_for_bit",
        claim: "the same call twice gives the same bits",
        applies: everywhere,
        one_in: 1,
        run: two_runs_agree_bit_for_bit,
    },
    Property {
        name: "aha_equals_the_oracle",
        claim: "AHA's every row is the branch that its route names, whatever the routes and the router's heads",
        applies: everywhere,
        one_in: 1,
        run: aha_equals_the_oracle,
    },
    Property {
        name: "one_reach_for_all_is_that_branch",
        claim: "all routes near is the window, all routes far is full attention, bit for bit",
        applies: everywhere,
        one_in: 1,
        run: one_reach_for_all_is_that_branch,
    },
    Property {
        name: "one_flipped_route_changes_one_row",
        claim: "flipping one route changes the rows of that token and router head, and no other",
        applies: everywhere,
        one_in: 1,
        run: one_flipped_route_changes_one_row,
    },
    Property {
        name: "unrouted_rows_stay_untouched",
        claim: "an operator on routed rows writes those and no other",
        applies: everywhere,
        one_in: 1,
        run: unrouted_rows_stay_untouched,
    },
    Property {
        name: "multi_window_equals_the_oracle",
        claim: "with several windows every row is the window that its route names",
        applies: everywhere,
        one_in: 1,
        run: multi_window_equals_the_oracle,
    },
    Property {
        name: "l2a_equals_the_oracle",
        claim: "L2A's global branch is full attention on routed rows and zero elsewhere",
        applies: everywhere,
        one_in: 1,
        run: l2a_equals_the_oracle,
    },
];

/// The operator that sees `reach`.
pub(crate) fn operator(reach: Reach) -> Box<dyn AttentionOperator> {
    match reach {
        Reach::Window(window) => Box::new(Windowed::new(window)),
        Reach::SinksAndWindow { sinks, window } => Box::new(Windowed::new(window).with_sinks(sinks)),
        Reach::Far { sinks, window } => Box::new(Far::beyond(window).with_sinks(sinks)),
        Reach::NonCausal => Box::new(NonCausal),
        _ => Box::new(Full),
    }
}

/// Runs an operator on all rows into a poisoned partial.
pub(crate) fn attend(device: &Device, case: &Case, on: &OnDevice, reach: Reach) -> Result<Read, String> {
    let partial = run(attend_partial(device, case, on, reach))?;
    run(Read::new(&device.client, &partial))
}

fn attend_partial(device: &Device, case: &Case, on: &OnDevice, reach: Reach) -> bifocal::Result<Partial> {
    let problem = case.problem();
    let partial = Partial::poisoned(&device.client, &problem, case.out_element())?;
    operator(reach).attend(&device.client, &problem, &on.inputs(), Rows::All, &partial)?;
    Ok(partial)
}

fn attention_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), reaches()), |(case, reach)| {
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let read = attend(device, &case, &on, reach)?;
        Expected::new(&case, &data, |_, _, _| Some(reach)).accepts(&read)
    })
}

fn wide_heads_equal_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    // One element type, so that one kernel is compiled however many cases there are.
    refute(effort, (cases(&device.profile), windows()), |(case, window)| {
        let case = Case { head_dim: 256, value_dim: 256, softcap: false, sink_logits: false, ..case };
        let case = Case { element: Element::F32, out_f32: true, routine: None, ..case };
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let reach = Reach::Window(window);
        let read = attend(device, &case, &on, reach)?;
        Expected::new(&case, &data, |_, _, _| Some(reach)).accepts(&read)
    })
}

fn non_causal_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), 0..3u8, 1..150usize), |(case, kind, key_len)| {
        // Cross-attention: keys are as many as they like, often fewer than queries.
        let case = if kind == 0 { case } else { Case { key_len, ..case } };
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let read = attend(device, &case, &on, Reach::NonCausal)?;
        Expected::new(&case, &data, |_, _, _| Some(Reach::NonCausal)).accepts(&read)
    })
}

fn long_windows_are_full(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), 0..3usize), |(case, beyond)| {
        let case = Case { sink_logits: false, ..case };
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let window = run(Window::new(case.key_len + beyond))?;
        let near = attend(device, &case, &on, Reach::Window(window))?;
        Expected::new(&case, &data, |_, _, _| Some(Reach::All)).accepts(&near)?;
        let far = attend(device, &case, &on, Reach::Far { sinks: 0, window })?;
        if far.out.iter().any(|&x| x != 0.0) || far.lse.iter().any(|&x| x != f32::NEG_INFINITY) {
            return Err("Far beyond everything sees something".into());
        }
        Ok(())
    })
}

fn the_future_never_matters(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (cases(&device.profile), reaches(), any::<prop::sample::Index>(), any::<bool>());
    refute(effort, strategy, |(case, reach, at, in_key)| {
        let mut data = Data::new(&case);
        data.spoil(at.index(case.key_len), in_key);
        let on = run(data.upload(&device.client))?;
        let read = attend(device, &case, &on, reach)?;
        // A NaN value leaves scores, and with them the log-sum-exp, as they are; the oracle knows.
        Expected::new(&case, &data, |_, _, _| Some(reach)).accepts(&read)
    })
}

fn near_and_far_merge_to_full(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), windows(), 0..9u32), |(case, window, sinks)| {
        let case = Case { out_f32: true, sink_logits: false, ..case };
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let near = run(attend_partial(device, &case, &on, Reach::SinksAndWindow { sinks, window }))?;
        let far = run(attend_partial(device, &case, &on, Reach::Far { sinks, window }))?;
        run(bifocal::merge(&device.client, &case.problem(), &near, &far))?;
        let read = run(Read::new(&device.client, &near))?;
        Expected::new(&case, &data, |_, _, _| Some(Reach::All)).accepts(&read)
    })
}

/// Rows of a range of every `[batch, head]` of a row-major `[.., rows, width]`.
pub(crate) fn rows(values: &[f32], rows: usize, width: usize, range: std::ops::Range<usize>) -> Vec<f32> {
    let heads = values.chunks(rows * width);
    heads.flat_map(|head| head[range.start * width..range.end * width].iter().copied()).collect()
}

fn chunks_equal_at_once(device: &Device, effort: Effort) -> Result<(), String> {
    // Without causality a chunk would see keys of later ones.
    let strategy = (cases(&device.profile), causal_reaches(), any::<prop::sample::Index>());
    refute(effort, strategy, |(case, reach, cut)| {
        let case = Case { key_len: case.key_len.max(case.query_len), ..case };
        let data = Data::new(&case);
        let expected = Expected::new(&case, &data, |_, _, _| Some(reach));
        // The first chunk ends before `cut`, the last is one decode step.
        let cut = cut.index(case.query_len);
        let ends = [cut, case.query_len - 1, case.query_len];
        let mut whole = Read {
            out: vec![0.0; case.batch * case.heads() * case.query_len * case.value_dim],
            lse: vec![0.0; case.batch * case.heads() * case.query_len],
        };
        let mut start = 0;
        for end in ends {
            if end <= start {
                continue;
            }
            let key_len = case.key_len - (case.query_len - end);
            let chunk = Case { query_len: end - start, key_len, ..case.clone() };
            let mut part = Data::new(&chunk);
            part.query = rows(&data.query, case.query_len, case.head_dim, start..end);
            part.key = rows(&data.key, case.key_len, case.head_dim, 0..key_len);
            part.value = rows(&data.value, case.key_len, case.value_dim, 0..key_len);
            part.sinks = data.sinks.clone();
            let on = run(part.upload(&device.client))?;
            let read = attend(device, &chunk, &on, reach)?;
            for head in 0..case.batch * case.heads() {
                for token in start..end {
                    let (to, from) = (head * case.query_len + token, head * (end - start) + token - start);
                    whole.lse[to] = read.lse[from];
                    whole.out[to * case.value_dim..][..case.value_dim]
                        .copy_from_slice(&read.out[from * case.value_dim..][..case.value_dim]);
                }
            }
            start = end;
        }
        expected.accepts(&whole)
    })
}

fn strides_do_not_matter(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), reaches(), any::<bool>()), |(case, reach, broadcast)| {
        let client = &device.client;
        let mut data = Data::new(&case);
        if broadcast {
            data.share_first_sequence();
        }
        let on = run(data.upload_token_major(client, broadcast))?;
        let problem = case.problem();
        let shape = problem.out_shape();
        let poison = vec![f32::NAN; shape.iter().product()];
        let mut partial = run(Partial::poisoned(client, &problem, case.out_element()))?;
        let flat = run(Tensor::from_f32(client, [poison.len()], case.out_element(), &poison))?;
        let strides = token_major(&poison, shape).1;
        partial.out = Tensor::new(flat.handle().clone(), case.out_element(), shape, strides);
        run(operator(reach).attend(client, &problem, &on.inputs(), Rows::All, &partial))?;
        // Token-major [B, T, H, D] read as [B, H', T', D] with H' = T: moving it again is the way back.
        let [b, h, t, d] = shape;
        let read = Read {
            out: token_major(&run(flat.to_f32(client))?, [b, t, h, d]).0,
            lse: run(partial.lse.to_f32(client))?,
        };
        Expected::new(&case, &data, |_, _, _| Some(reach)).accepts(&read)
    })
}

fn heads_and_batches_are_independent(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), reaches()), |(case, reach)| {
        // Reversing the order of blocks reverses batches and kv heads at once, and with them groups of heads.
        let reverse = |values: &[f32], blocks: usize| -> Vec<f32> {
            values.chunks(values.len() / blocks).rev().flatten().copied().collect()
        };
        let case = Case { sink_logits: false, ..case };
        let data = Data::new(&case);
        let blocks = case.batch * case.kv_heads;
        let mut reversed = Data::new(&case);
        reversed.query = reverse(&data.query, blocks);
        reversed.key = reverse(&data.key, blocks);
        reversed.value = reverse(&data.value, blocks);
        let on = run(reversed.upload(&device.client))?;
        let read = attend(device, &case, &on, reach)?;
        let back = Read { out: reverse(&read.out, blocks), lse: reverse(&read.lse, blocks) };
        Expected::new(&case, &data, |_, _, _| Some(reach)).accepts(&back)?;
        let on = run(data.upload(&device.client))?;
        match back.same_bits(&attend(device, &case, &on, reach)?) {
            true => Ok(()),
            false => Err("a permuted problem gives other bits".into()),
        }
    })
}

fn two_runs_agree_bit_for_bit(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), windows(), routings()), |(case, window, routing)| {
        let on = run(Data::new(&case).upload(&device.client))?;
        let routes = HostRoutes::new(&case, &routing, 2);
        let once = aha(device, &case, &on, &routes, window)?;
        let twice = aha(device, &case, &on, &routes, window)?;
        if once.same_bits(&twice) { Ok(()) } else { Err("two runs differ".into()) }
    })
}

pub(crate) fn aha(
    device: &Device,
    case: &Case,
    on: &OnDevice,
    routes: &HostRoutes,
    window: Window,
) -> Result<Read, String> {
    let problem = case.problem();
    let partial = run(Partial::poisoned(&device.client, &problem, case.out_element()))?;
    let routes = run(routes.upload(&device.client))?;
    run(Aha::new(window).attend_into(&device.client, &problem, &on.inputs(), &routes, &partial))?;
    run(Read::new(&device.client, &partial))
}

pub(crate) fn near_or_far(far: bool, window: Window) -> Option<Reach> {
    Some(if far { Reach::All } else { Reach::Window(window) })
}

fn aha_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), windows(), routings()), |(case, window, routing)| {
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let routes = HostRoutes::new(&case, &routing, 2);
        let read = aha(device, &case, &on, &routes, window)?;
        Expected::new(&case, &data, |b, h, t| near_or_far(routes.at(case.heads(), b, h, t) == 1, window))
            .accepts(&read)
    })
}

fn one_reach_for_all_is_that_branch(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), windows(), routings(), any::<bool>()), |drawn| {
        let (case, window, routing, far) = drawn;
        let on = run(Data::new(&case).upload(&device.client))?;
        let mut routes = HostRoutes::new(&case, &routing, 2);
        routes.routes.fill(u8::from(far));
        let routed = aha(device, &case, &on, &routes, window)?;
        let reach = if far { Reach::All } else { Reach::Window(window) };
        match routed.same_bits(&attend(device, &case, &on, reach)?) {
            true => Ok(()),
            false => Err(format!("routing every row to {reach} differs from {reach}")),
        }
    })
}

fn one_flipped_route_changes_one_row(device: &Device, effort: Effort) -> Result<(), String> {
    let strategy = (cases(&device.profile), 1..6usize, routings(), any::<prop::sample::Index>());
    refute(effort, strategy, |(case, window, routing, at)| {
        let case = Case { out_f32: true, magnitude: 1.0, ..case };
        let window = run(Window::new(window))?;
        let on = run(Data::new(&case).upload(&device.client))?;
        let mut routes = HostRoutes::new(&case, &routing, 2);
        let before = aha(device, &case, &on, &routes, window)?;
        let at = at.index(routes.routes.len());
        let flipped = 1 - routes.routes[at];
        routes.routes[at] = flipped;
        let after = aha(device, &case, &on, &routes, window)?;
        let branch = attend(device, &case, &on, near_or_far(flipped == 1, window).unwrap_or(Reach::All))?;
        let dim = case.value_dim;
        let marker = HostRoutes {
            geometry: routes.geometry,
            routes: (0..routes.routes.len()).map(|i| u8::from(i == at)).collect(),
        };
        // The same row in another tile adds its keys up in another order: a few roundings.
        let tolerance = if case.may_round_weights() { 8.0 * case.element.epsilon() } else { 1e-4 };
        for row in 0..before.lse.len() {
            let (head, token) = (row / case.query_len, row % case.query_len);
            let (batch, head) = (head / case.heads(), head % case.heads());
            let is_flipped = marker.at(case.heads(), batch, head, token) == 1;
            let expected = if is_flipped { &branch } else { &before };
            let of =
                |read: &Read| Read { out: read.out[row * dim..][..dim].to_vec(), lse: vec![read.lse[row]] };
            agree(&of(expected), &of(&after), tolerance)
                .map_err(|error| format!("row {row} (flipped: {is_flipped}): {error}"))?;
        }
        Ok(())
    })
}

fn unrouted_rows_stay_untouched(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), reaches(), routings()), |(case, reach, routing)| {
        let client = &device.client;
        let case = Case { out_f32: true, ..case };
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        let problem = case.problem();
        let routes = HostRoutes::new(&case, &routing, 2);
        let plan = run(routes.upload(client).and_then(|routes| bifocal::plan(client, &problem, &routes)))?;
        let mark = 77.25;
        let partial = Partial {
            out: run(Tensor::filled(client, problem.out_shape(), Element::F32, mark))?,
            lse: run(Tensor::filled(client, problem.lse_shape(), Element::F32, mark))?,
        };
        let rows = run(plan.far_rows())?;
        run(operator(reach).attend(client, &problem, &on.inputs(), rows, &partial))?;
        let read = run(Read::new(client, &partial))?;
        let is_far = |b, h, t| routes.at(case.heads(), b, h, t) == 1;
        let mut expected = Expected::new(&case, &data, |b, h, t| is_far(b, h, t).then_some(reach));
        for b in 0..case.batch {
            for h in 0..case.heads() {
                for t in (0..case.query_len).filter(|&t| !is_far(b, h, t)) {
                    expected.exact.lse[[b, h, t]] = f64::from(mark);
                    expected.exact.out.row_mut([b, h, t]).fill(f64::from(mark));
                }
            }
        }
        expected.accepts(&read)
    })
}

fn multi_window_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    let windows = prop::sample::subsequence(vec![1usize, 2, 7, 16, 33, 64, 200], 1..4);
    refute(effort, (cases(&device.profile), windows, routings()), |(case, windows, routing)| {
        let windows: Vec<Window> = run(windows.into_iter().map(Window::new).collect::<bifocal::Result<_>>())?;
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let lens = run(MultiWindow::new(&windows))?;
        let routes = HostRoutes::new(&case, &routing, lens.reaches());
        let problem = case.problem();
        let partial = run(Partial::poisoned(&device.client, &problem, case.out_element()))?;
        let on_device = run(routes.upload(&device.client))?;
        run(lens.attend_into(&device.client, &problem, &on.inputs(), &on_device, &partial))?;
        let read = run(Read::new(&device.client, &partial))?;
        Expected::new(&case, &data, |b, h, t| {
            let route = usize::from(routes.at(case.heads(), b, h, t));
            Some(windows.get(route).map_or(Reach::All, |&window| Reach::Window(window)))
        })
        .accepts(&read)
    })
}

fn l2a_equals_the_oracle(device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), windows(), routings()), |(case, window, routing)| {
        let case = Case { out_f32: case.element == Element::F32, sink_logits: false, ..case };
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let routes = HostRoutes::new(&case, &routing, 2);
        let on_device = run(routes.upload(&device.client))?;
        let (client, problem, inputs) = (&device.client, case.problem(), on.inputs());
        let lens = L2a::new(window);
        let local = run(lens.local(client, &problem, &inputs))?;
        Expected::new(&case, &data, |_, _, _| Some(Reach::Window(window)))
            .accepts(&run(Read::new(client, &local))?)?;
        let global = run(lens.global(client, &problem, &inputs, &on_device))?;
        Expected::new(&case, &data, |b, h, t| (routes.at(case.heads(), b, h, t) == 1).then_some(Reach::All))
            .accepts(&run(Read::new(client, &global))?)
    })
}
