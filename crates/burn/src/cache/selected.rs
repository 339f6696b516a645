use bifocal::{
    Error, Far, Full, Reach, Result, Windowed,
    decode::{KvShape, Layout, MAX_QUERIES, Reaches},
};
use burn::tensor::Tensor;

use super::store::{Store, ring};
use crate::{
    AttentionOptions, Branch, Routing,
    attention::{dense, routed},
    place::Place,
};

/// Keys and values of an attention whose rows see the reach that their route names, or the one reach there is.
#[derive(Debug)]
pub(super) struct Selected {
    pub(super) store: Store,
    reaches: Reaches,
    /// What shows the reaches in a forward pass.
    branches: Vec<Option<Branch>>,
    /// Whether what has left the window is overwritten.
    forgets: bool,
}

impl Selected {
    pub(super) fn new(
        place: &Place,
        shape: KvShape,
        [batch, capacity]: [usize; 2],
        reaches: &[Option<Reach>],
    ) -> Result<Self> {
        // What the last reach leaves out is masked: it has to be there.
        if let [.., None] | [] = reaches {
            let expected = "one at least, and something for the last to see";
            return Err(Error::option("reaches of a cache", list(reaches), expected));
        }
        let branches = reaches.iter().map(|reach| reach.map(branch).transpose()).collect::<Result<_>>()?;
        let ring = match reaches {
            // A step's first query looks back further than its last.
            [Some(Reach::Window(window))] => ring([batch, capacity], *window, MAX_QUERIES - 1)?,
            _ => None,
        };
        let (layout, forgets) = match ring {
            Some(ring) => (ring, true),
            None => (Layout::contiguous(batch, capacity)?, false),
        };
        let store = Store::new(place, shape, layout)?;
        Ok(Self { store, reaches: Reaches::new(place.client(), reaches)?, branches, forgets })
    }

    /// The same tokens in memory of their own.
    pub(super) fn fork(&self, place: &Place) -> Result<Self> {
        let (reaches, branches) = (self.reaches.clone(), self.branches.clone());
        Ok(Self { store: self.store.fork(place)?, reaches, branches, forgets: self.forgets })
    }

    /// Checks that rows are asked to see what this was made for, and are told which of it.
    pub(super) fn check(&self, reaches: &[Option<Reach>], routing: Option<&Routing>) -> Result<()> {
        let made_for = self.reaches.list();
        if made_for != reaches {
            let expected = format!("{}, which the cache was made for", list(made_for));
            return Err(Error::option("reaches of a step", list(reaches), expected));
        }
        let (found, expected) = (routing.map(Routing::reaches), Some(made_for.len()).filter(|&n| n > 1));
        if found != expected {
            let name = |reaches: Option<usize>| match reaches {
                Some(reaches) => format!("one among {reaches} reaches"),
                None => "none".to_string(),
            };
            return Err(Error::option("routing of a step", name(found), name(expected)));
        }
        Ok(())
    }

    /// Appends key and value, and attends.
    pub(super) fn attend(
        &mut self,
        place: &Place,
        qkv: [Tensor<4>; 3],
        routing: Option<&Routing>,
        options: &AttentionOptions,
    ) -> Result<Tensor<4>> {
        let [_, _, tokens, _] = qkv[0].dims();
        let before = self.store.tokens()?;
        if before == 0 {
            self.store.append(place, &qkv[1], &qkv[2])?;
            return self.forward(qkv, routing, options);
        }
        if tokens <= MAX_QUERIES {
            return self.step(place, &qkv, routing, options);
        }
        if self.forgets {
            // A longer chunk would overwrite what its first queries see. There are no routes to cut: a ring has one reach.
            let outs = (0..tokens).step_by(MAX_QUERIES).map(|start| {
                let length = MAX_QUERIES.min(tokens - start);
                let part = qkv.each_ref().map(|tensor| tensor.clone().narrow(2, start, length));
                self.step(place, &part, routing, options)
            });
            return Ok(Tensor::cat(outs.collect::<Result<Vec<_>>>()?, 2));
        }
        let [query, key, value] = qkv;
        self.store.append(place, &key, &value)?;
        let [key, value] = self.store.gather(place)?;
        self.forward([query, key, value], routing, options)
    }

    /// A decode step.
    fn step(
        &mut self,
        place: &Place,
        [query, key, value]: &[Tensor<4>; 3],
        routing: Option<&Routing>,
        options: &AttentionOptions,
    ) -> Result<Tensor<4>> {
        self.store.append(place, key, value)?;
        let query = place.import("query", query.clone())?;
        let routes = routing.map(|routing| &routing.decision().routes);
        let element = query.element();
        let (_, partial) = self.store.step(place, &query, &self.reaches, routes, options, element)?;
        place.export(partial.out)
    }

    /// The operators of the forward pass, over keys and values of all tokens.
    fn forward(
        &self,
        qkv: [Tensor<4>; 3],
        routing: Option<&Routing>,
        options: &AttentionOptions,
    ) -> Result<Tensor<4>> {
        match routing {
            Some(routing) => routed(qkv, routing, self.branches.clone(), options),
            None => {
                let only = self.branches.iter().flatten().next_back();
                dense(qkv, only.expect("the last reach shows something").clone(), options)
            }
        }
    }
}

/// The operator that shows a reach.
fn branch(reach: Reach) -> Result<Branch> {
    Ok(match reach {
        Reach::Window(window) => Windowed::new(window).into(),
        Reach::SinksAndWindow { sinks, window } => Windowed::new(window).with_sinks(sinks).into(),
        Reach::Far { sinks, window } => Far::beyond(window).with_sinks(sinks).into(),
        Reach::All => Full.into(),
        other => {
            return Err(Error::option("reach of a cache", other, "a causal one: tokens come one by one"));
        }
    })
}

/// Reaches in words.
fn list(reaches: &[Option<Reach>]) -> String {
    let name = |reach: &Option<Reach>| reach.map_or("nothing".to_string(), |reach| reach.to_string());
    reaches.iter().map(name).collect::<Vec<_>>().join(", ")
}
