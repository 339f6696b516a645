use bifocal_core::{
    Element, Error, Problem, Result,
    device::{Inputs, Rows, TensorView},
};
use cubecl::client::Client;

use crate::State;

/// What linear attention reads. In RATTENTION queries and keys are those **before** rotary positions and norms
/// (arXiv 2506.15545; its code).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct LinearInputs<'a> {
    /// Query, key and value; no sink logits. Packed sequences are computed one after the other, with a state each.
    pub attention: Inputs<'a>,
    /// Which rows are computed; all unless set. States are those of all keys either way.
    pub rows: Rows<'a>,
    /// The state before the first key; zeros unless given.
    pub state: Option<&'a State>,
    /// `[B, Hk, Tk, 1]`, `f32`; one decay per head is a broadcast: before key `j` is added the state shrinks by `exp` of
    /// this, which is not above 0 (GLA's recurrence, arXiv 2312.06635, section 4.1, with one gate for all features). Decays are constants: they
    /// get no gradient. None in RATTENTION.
    pub log_decay: Option<TensorView<'a, 4>>,
}

impl<'a> LinearInputs<'a> {
    /// Query, key and value, from an empty state and without decay.
    pub fn new(query: TensorView<'a, 4>, key: TensorView<'a, 4>, value: TensorView<'a, 4>) -> Self {
        Self { attention: Inputs::new(query, key, value), rows: Rows::All, state: None, log_decay: None }
    }

    /// Computes these rows, and their gradients, alone.
    pub fn with_rows(self, rows: Rows<'a>) -> Self {
        Self { rows, ..self }
    }

    /// Starts from a state.
    pub fn with_state(self, state: &'a State) -> Self {
        Self { state: Some(state), ..self }
    }

    /// Lets the state decay.
    pub fn with_log_decay(self, log_decay: TensorView<'a, 4>) -> Self {
        Self { log_decay: Some(log_decay), ..self }
    }

    /// Checks all that the kernels rely on.
    ///
    /// # Errors
    /// As [`Inputs::check`]; [`Error::Option`] for sink logits, which belong to a softmax; [`Error::Shape`] for a plan of
    /// another problem.
    pub(crate) fn check(&self, client: &Client, problem: &Problem, state_shape: [usize; 4]) -> Result<()> {
        self.attention.check(client, problem)?;
        if self.attention.sink_logits.is_some() {
            return Err(Error::option(
                "sink logits of linear attention",
                "given",
                "none: they join a softmax",
            ));
        }
        if let Rows::Routed(routed) = self.rows {
            let shape = [problem.batch, problem.kv_heads, problem.packed_rows()];
            if routed.shape != shape {
                return Err(Error::shape("the dispatch plan", format!("{shape:?}"), &routed.shape));
            }
        }
        if let Some(state) = self.state {
            state.check(client, state_shape)?;
        }
        if let Some(log_decay) = self.log_decay {
            let shape = [problem.batch, problem.kv_heads, problem.key_len, 1];
            log_decay.check("the decays", client, shape, Element::F32)?;
        }
        Ok(())
    }
}

/// The key that has just left the window, for a step of decoding.
#[derive(Clone, Copy, Debug)]
pub struct LeavingKey<'a> {
    /// `[B, Hk, 1, D]`, before rotary positions and norms.
    pub key: TensorView<'a, 4>,
    /// `[B, Hk, 1, Dv]`.
    pub value: TensorView<'a, 4>,
    /// `[B, Hk, 1, 1]`, `f32`: as [`LinearInputs::log_decay`].
    pub log_decay: Option<TensorView<'a, 4>>,
}

impl LeavingKey<'_> {
    pub(crate) fn check(&self, client: &Client, problem: &Problem) -> Result<()> {
        let Problem { batch, kv_heads, head_dim, value_dim, element, .. } = *problem;
        self.key.check("the key that leaves", client, [batch, kv_heads, 1, head_dim], element)?;
        self.value.check("the value that leaves", client, [batch, kv_heads, 1, value_dim], element)?;
        match self.log_decay {
            Some(log_decay) => log_decay.check("the decay", client, [batch, kv_heads, 1, 1], Element::F32),
            None => Ok(()),
        }
    }
}
