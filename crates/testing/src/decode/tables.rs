//! Pages that another library manages, and steps that are replayed.

use bifocal::{
    Element, Partial, Routes, Tensor,
    cubecl::client::Client,
    decode::{DecodePlan, PageTables, Reaches, Step},
};
use bifocal_reference::Array;
use proptest::sample::select;
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::SliceRandom};

use super::scene::{Scene, Tokens, bytes_of, overwrite, reach_by, routes_of, step_cases};
use crate::{
    Device, Effort,
    compare::{Read, run},
    refute,
};

/// The tokens of some sequences in pages that lie in any order, among others that are NaN.
struct Pages {
    page_size: usize,
    pages: usize,
    tables: Vec<Vec<u32>>,
    key: Tensor<4>,
    value: Tensor<4>,
}

impl Pages {
    fn new(
        client: &Client,
        element: Element,
        page_size: usize,
        tokens: &[Tokens],
        rng: &mut SmallRng,
    ) -> bifocal::Result<Self> {
        let needed: Vec<usize> = tokens.iter().map(|tokens| tokens.len().div_ceil(page_size)).collect();
        let pages = needed.iter().sum::<usize>() + 2;
        let mut free: Vec<u32> = (0..pages as u32).collect();
        free.shuffle(rng);
        let tables: Vec<Vec<u32>> =
            needed.into_iter().map(|needed| free.split_off(free.len() - needed)).collect();
        let pool = |of: fn(&Tokens) -> &Array<f32, 3>| {
            let [heads, _, dim] = of(&tokens[0]).shape();
            let mut pool = Array::filled([pages, heads, page_size, dim], f32::NAN);
            for (table, tokens) in tables.iter().zip(tokens) {
                for (t, h) in (0..tokens.len()).flat_map(|t| (0..heads).map(move |h| (t, h))) {
                    let page = table[t / page_size] as usize;
                    pool.row_mut([page, h, t % page_size]).copy_from_slice(of(tokens).row([h, t]));
                }
            }
            Tensor::from_f32(client, pool.shape(), element, pool.as_slice())
        };
        let (key, value) = (pool(|tokens| &tokens.key)?, pool(|tokens| &tokens.value)?);
        Ok(Self { page_size, pages, tables, key, value })
    }

    /// The tables of the sequences in this order, cut to lengths. What is beyond them is no page.
    fn tables(
        &self,
        client: &Client,
        capacity: usize,
        order: &[usize],
        lengths: &[usize],
    ) -> bifocal::Result<PageTables> {
        let mut tables: Vec<Vec<u32>> = order.iter().map(|&b| self.tables[b].clone()).collect();
        for (table, &length) in tables.iter_mut().zip(lengths) {
            table[length.div_ceil(self.page_size)..].fill(u32::MAX);
        }
        let tables: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
        PageTables::from_host(client, [self.pages, self.page_size, capacity], &tables, lengths)
    }
}

pub(super) fn page_tables_are_read_anew(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    refute(effort, (step_cases(device), select(vec![1, 3, 16, 256])), |(step, page_size)| {
        let case = &step.case;
        let scene = run(Scene::new(client, &step, run(step.layout())?))?;
        let mut rng = SmallRng::seed_from_u64(case.seed ^ 0xba9e);
        let pages = run(Pages::new(client, case.element, page_size, &scene.tokens, &mut rng))?;
        let capacity = case.key_len + 5;
        let mut problem = case.problem();
        problem.key_len = capacity;
        let plan = || match step.chunk {
            Some(keys) => DecodePlan::in_chunks(client, &problem, keys),
            None => DecodePlan::new(client, &problem),
        };
        let reaches = run(Reaches::new(client, &step.reaches))?;
        let sinks = match &scene.sinks {
            Some(sinks) => Some(run(Tensor::from_f32(client, [sinks.len()], Element::F32, sinks))?),
            None => None,
        };
        let attend = |plan: &DecodePlan, tables: &PageTables, query: &Tensor<4>, routes: &Routes| {
            let mut asked = Step::new(query.view(), &reaches);
            asked.routes = step.routed().then_some(routes);
            asked.sink_logits = sinks.as_ref().map(Tensor::view);
            let partial = run(Partial::poisoned(client, &problem, case.out_element()))?;
            let view = tables.view(pages.key.view(), pages.value.view());
            run(plan.attend(client, &view, &asked, &partial))?;
            run(Read::new(client, &partial))
        };
        let shape = [case.batch, case.heads(), case.query_len, case.head_dim];
        let upload = |query: &[f32]| run(Tensor::from_f32(client, shape, case.element, query));

        let mut order: Vec<usize> = (0..case.batch).collect();
        let kept = (
            run(plan())?,
            run(pages.tables(client, capacity, &order, &step.lengths))?,
            upload(&scene.query)?,
            run(routes_of(&step, 0).upload(client))?,
        );
        let read = attend(&kept.0, &kept.1, &kept.2, &kept.3)?;
        scene.expected(&step, reach_by(&step, &routes_of(&step, 0))).accepts(&read)?;

        // Everything anew in the buffers that the first step read, as who replays a captured graph writes it.
        let mut query = scene.query.clone();
        for turn in 1..3u64 {
            order.rotate_left(1);
            query.shuffle(&mut rng);
            let lengths: Vec<usize> = order.iter().map(|&b| rng.random_range(1..=step.lengths[b])).collect();
            let fresh = (
                run(plan())?,
                run(pages.tables(client, capacity, &order, &lengths))?,
                upload(&query)?,
                run(routes_of(&step, turn).upload(client))?,
            );
            let buffers = [
                (fresh.1.handle(), kept.1.handle()),
                (fresh.2.handle(), kept.2.handle()),
                (fresh.3.handle(), kept.3.handle()),
            ];
            for (new, old) in buffers {
                run(bytes_of(client, new).and_then(|bytes| overwrite(client, old, &bytes)))?;
            }
            let replayed = attend(&kept.0, &kept.1, &kept.2, &kept.3)?;
            if !replayed.same_bits(&attend(&fresh.0, &fresh.1, &fresh.2, &fresh.3)?) {
                return Err(format!("turn {turn} differs from a fresh step"));
            }
        }
        Ok(())
    })
}
