//! The shape of a model's attention, as commands take it.

use bifocal::{Element, Problem, Result, Routine};
use clap::{Args, ValueEnum};

#[derive(Args)]
pub(crate) struct Shape {
    /// Element type of query, key and value.
    #[arg(long, default_value = "f32")]
    element: ElementName,
    /// Sequences.
    #[arg(long, default_value_t = 1)]
    pub(crate) batch: usize,
    /// Query heads.
    #[arg(long, default_value_t = 8)]
    pub(crate) heads: usize,
    /// Key and value heads; as many as query heads unless given.
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Length of a query, a key and a value.
    #[arg(long, default_value_t = 64)]
    pub(crate) head_dim: usize,
    /// Sequence lengths.
    #[arg(long, value_delimiter = ',', default_value = "8192")]
    pub(crate) lengths: Vec<usize>,
    /// Length of a hidden state, which the router reads.
    #[arg(long, default_value_t = 1024)]
    pub(crate) model_dim: usize,
    /// Softcap on the attention scores; none unless given.
    #[arg(long)]
    pub(crate) softcap: Option<f32>,
    /// The routine to run by (wgmma, mma, portable); the fastest that can unless given.
    #[arg(long)]
    routine: Option<Routine>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ElementName {
    F32,
    F16,
    Bf16,
}

impl Shape {
    pub(crate) fn element(&self) -> Element {
        match self.element {
            ElementName::F32 => Element::F32,
            ElementName::F16 => Element::F16,
            ElementName::Bf16 => Element::Bf16,
        }
    }

    pub(crate) fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    /// `[B, H, T, D]`.
    pub(crate) fn query(&self, length: usize) -> [usize; 4] {
        [self.batch, self.heads, length, self.head_dim]
    }

    /// `[B, Hk, T, D]`: the shape of keys, and of values.
    pub(crate) fn key(&self, length: usize) -> [usize; 4] {
        [self.batch, self.kv_heads(), length, self.head_dim]
    }

    /// `[B, T, M]`.
    pub(crate) fn hidden(&self, length: usize) -> [usize; 3] {
        [self.batch, length, self.model_dim]
    }

    /// The problem of one length, with the softcap and the routine asked for.
    pub(crate) fn problem(&self, length: usize) -> Result<Problem> {
        let problem = Problem::new(self.query(length), self.key(length), self.element())?;
        let problem = self.routine.map_or(problem, |routine| problem.with_routine(routine));
        self.softcap.map_or(Ok(problem), |cap| problem.with_softcap(cap))
    }
}
