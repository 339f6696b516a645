//! Caches beside their model.

use bifocal::{
    cubecl::client::Client,
    decode::{KvCache, Layout, SequenceId, Snapshot},
};
use bifocal_reference::{Array, KvModel};
use proptest::{prelude::*, sample::select};

use super::scene::{Tokens, shape_of, upload_rows};
use crate::{
    Device, Effort,
    case::{Case, cases},
    compare::run,
    refute,
};

/// What is done to a cache.
#[derive(Clone, Debug)]
pub(super) enum Operation {
    Start,
    Append {
        sequences: Vec<prop::sample::Index>,
        tokens: usize,
    },
    Fork(prop::sample::Index),
    Truncate(prop::sample::Index, prop::sample::Index),
    Free(prop::sample::Index),
    SaveAndRestore(prop::sample::Index),
    /// All sequences go on in a cache of their own.
    ForkApart,
    Read(prop::sample::Index),
}

pub(super) fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let index = any::<prop::sample::Index>;
    let tokens = prop_oneof![4 => Just(1usize), 2 => 2..9usize, 1 => 20..60usize];
    let operation = prop_oneof![
        3 => Just(Operation::Start),
        8 => (prop::collection::vec(index(), 1..4), tokens)
            .prop_map(|(sequences, tokens)| Operation::Append { sequences, tokens }),
        3 => index().prop_map(Operation::Fork),
        2 => (index(), index()).prop_map(|(at, length)| Operation::Truncate(at, length)),
        2 => index().prop_map(Operation::Free),
        1 => index().prop_map(Operation::SaveAndRestore),
        1 => Just(Operation::ForkApart),
        2 => index().prop_map(Operation::Read),
    ];
    prop::collection::vec(operation, 1..80)
}

/// A cache beside its model, and the sequences that both have.
struct Soak {
    cache: KvCache,
    model: KvModel<f32>,
    live: Vec<(SequenceId, usize)>,
    case: Case,
    layout: Layout,
}

impl Soak {
    /// Does the same to both; the cache refuses what it has no room for, and the model is left alone then.
    fn apply(&mut self, client: &Client, operation: &Operation, seed: u64) -> Result<(), String> {
        let before = self.cache.free_pages();
        let refused = match operation {
            Operation::Start => match self.cache.start(client) {
                Ok(sequence) => {
                    self.live.push((sequence, self.model.start()));
                    None
                }
                Err(error) => Some((error, self.live.len() == self.layout.sequences())),
            },
            _ if self.live.is_empty() => None,
            Operation::Append { sequences, tokens } => self.append(client, sequences, *tokens, seed)?,
            Operation::Fork(at) => {
                let (sequence, of_model) = *at.get(&self.live);
                match self.cache.fork(client, sequence) {
                    Ok(fork) => {
                        self.live.push((fork, self.model.fork(of_model)));
                        None
                    }
                    Err(error) => Some((error, self.live.len() == self.layout.sequences())),
                }
            }
            Operation::Truncate(at, length) => {
                let (sequence, of_model) = *at.get(&self.live);
                let length = length.index(self.model.length(of_model) + 1);
                run(self.cache.truncate(client, sequence, length))?;
                self.model.truncate(of_model, length);
                None
            }
            Operation::Free(at) => {
                let (sequence, of_model) = self.live.swap_remove(at.index(self.live.len()));
                run(self.cache.free(sequence))?;
                self.model.free(of_model);
                if self.cache.length(sequence).is_ok() || self.cache.free(sequence).is_ok() {
                    return Err("a freed sequence is still known".into());
                }
                None
            }
            Operation::SaveAndRestore(at) => {
                let (sequence, of_model) = *at.get(&self.live);
                if self.model.length(of_model) == 0 {
                    return Ok(());
                }
                let snapshot = run(self.cache.save(client, sequence))?;
                let snapshot = run(Snapshot::from_bytes(&snapshot.to_bytes()))?;
                match self.cache.restore(client, &snapshot) {
                    Ok(restored) => {
                        let copy = copy_of(&mut self.model, of_model);
                        self.live.push((restored, copy));
                        None
                    }
                    Err(error) => {
                        let pages = snapshot.tokens().div_ceil(self.layout.page_size());
                        let full = self.live.len() == self.layout.sequences() || pages > before;
                        Some((error, full))
                    }
                }
            }
            Operation::ForkApart => {
                let mut model = self.model.clone();
                let (ids, originals): (Vec<SequenceId>, Vec<usize>) = self.live.iter().copied().unzip();
                let copies: Vec<usize> = originals.iter().map(|&of| copy_of(&mut model, of)).collect();
                originals.iter().for_each(|&of| model.free(of));
                match self.cache.fork_apart(client, &ids) {
                    Ok((cache, forks)) => {
                        self.live = forks.into_iter().zip(copies).collect();
                        (self.cache, self.model) = (cache, model);
                        None
                    }
                    // They shared pages.
                    Err(error) => Some((error, model.pages() > self.layout.pages())),
                }
            }
            Operation::Read(at) => {
                let (sequence, of_model) = *at.get(&self.live);
                self.compare(client, sequence, of_model)?;
                None
            }
        };
        if let Some((error, expected)) = refused
            && (!expected || self.cache.free_pages() != before)
        {
            return Err(format!("{operation:?} was refused: {error}"));
        }
        let (free, used) = (self.cache.free_pages(), self.model.pages());
        if free + used != self.layout.pages() {
            return Err(format!("{free} pages free where the model holds {used}, after {operation:?}"));
        }
        Ok(())
    }

    /// Appends the same tokens to several sequences. Returns a refusal, and whether one was to be expected.
    fn append(
        &mut self,
        client: &Client,
        sequences: &[prop::sample::Index],
        tokens: usize,
        seed: u64,
    ) -> Result<Option<(bifocal::Error, bool)>, String> {
        let mut chosen: Vec<usize> = sequences.iter().map(|at| at.index(self.live.len())).collect();
        chosen.sort_unstable();
        chosen.dedup();
        let case = &self.case;
        let drawn: Vec<Tokens> =
            (0..chosen.len() as u64).map(|b| Tokens::draw(case, tokens, seed ^ (b << 40))).collect();
        let rows =
            |of: fn(&Tokens) -> &Array<f32, 3>| upload_rows(client, case.element, drawn.iter().map(of));
        let (key, value) = (run(rows(|tokens| &tokens.key))?, run(rows(|tokens| &tokens.value))?);
        let ids: Vec<SequenceId> = chosen.iter().map(|&at| self.live[at].0).collect();
        let appended = self.cache.append(client, &ids, key.view(), value.view());
        let capacity = self.layout.tokens_kept();
        let too_long = chosen.iter().any(|&at| self.model.length(self.live[at].1) + tokens > capacity);
        let mut after = self.model.clone();
        if !too_long {
            for (&at, tokens) in chosen.iter().zip(&drawn) {
                after.append(self.live[at].1, &tokens.key, &tokens.value);
            }
        }
        let full = after.pages() > self.layout.pages();
        Ok(match appended {
            Ok(()) if too_long || full => return Err("an append that there is no room for".into()),
            Ok(()) => {
                self.model = after;
                None
            }
            Err(error) => Some((error, too_long || full)),
        })
    }

    fn compare(&self, client: &Client, sequence: SequenceId, of_model: usize) -> Result<(), String> {
        let length = run(self.cache.length(sequence))?;
        if length != self.model.length(of_model) {
            return Err(format!("{length} tokens, expected {}", self.model.length(of_model)));
        }
        if length == 0 {
            return Ok(());
        }
        let (key, value) = run(self.cache.gather(client, sequence))?;
        let [expected_key, expected_value] = self.model.contents(of_model);
        for (name, found, expected) in [("key", key, expected_key), ("value", value, expected_value)] {
            if run(found.to_f32(client))? != expected.as_slice() {
                return Err(format!("a {name} of {sequence:?} is not what was appended"));
            }
        }
        Ok(())
    }
}

/// A sequence of the model with the tokens of another, and pages of its own.
fn copy_of(model: &mut KvModel<f32>, sequence: usize) -> usize {
    let copy = model.start();
    let [key, value] = model.contents(sequence);
    let [_, heads, tokens, dim] = key.shape();
    let value_dim = value.shape()[3];
    let (key, value) = (key.reshape([heads, tokens, dim]), value.reshape([heads, tokens, value_dim]));
    model.append(copy, &key, &value);
    copy
}

pub(super) fn caches_equal_their_model(device: &Device, effort: Effort) -> Result<(), String> {
    let client = &device.client;
    let page_size = prop_oneof![Just(None), select(vec![1, 3, 16]).prop_map(Some)];
    refute(effort, (cases(&device.profile), page_size, operations()), |(case, page_size, operations)| {
        let (sequences, capacity) = (5, 90);
        let layout = run(match page_size {
            // Fewer pages than all sequences could fill.
            Some(page_size) => Layout::paged(sequences, capacity, page_size, 200usize.div_ceil(page_size)),
            None => Layout::contiguous(sequences, capacity),
        })?;
        let shape = shape_of(&case);
        let model = KvModel::new([case.kv_heads, case.head_dim, case.value_dim], layout.page_size());
        let cache = run(KvCache::new(client, shape, layout))?;
        let mut soak = Soak { cache, model, live: Vec::new(), case: case.clone(), layout };
        for (number, operation) in operations.iter().enumerate() {
            soak.apply(client, operation, case.seed ^ number as u64)?;
        }
        for &(sequence, of_model) in &soak.live {
            soak.compare(client, sequence, of_model)?;
        }
        soak.cache.clear();
        match soak.cache.free_pages() == layout.pages() && soak.cache.free_sequences() == sequences {
            true => Ok(()),
            false => Err("a cache that was cleared still holds pages".into()),
        }
    })
}
