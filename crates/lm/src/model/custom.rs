//! The door for attention from outside this crate.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use bifocal_burn::{Projections, Routing};
use burn::{module::Module, nn::RotaryEncoding, tensor::Tensor};

use crate::{Error, Result};

/// What becomes of a layer's queries, keys and values: all that a layer of [`AttentionKind::Custom`] leaves open. Its
/// projections, positions and weights are those of full attention.
///
/// [`AttentionKind::Custom`]: crate::AttentionKind::Custom
pub trait CustomAttention: fmt::Debug + Send + Sync {
    /// Attends: the outputs `[B, H, T, D]` of query `[B, H, T, D]` and key and value `[B, Hk, T, D]`, and what was decided, if
    /// anything was, for metrics. The hidden states `[B, T, M]` are what a router reads.
    ///
    /// # Errors
    /// The attention's own.
    fn attend(
        &self,
        hidden: Tensor<3>,
        qkv: [Tensor<4>; 3],
    ) -> bifocal_burn::Result<(Tensor<4>, Option<Routing>)>;
}

/// By name, for models that are made or loaded in this process: settings are text, and cannot hold code.
static REGISTERED: Mutex<BTreeMap<String, Arc<dyn CustomAttention>>> = Mutex::new(BTreeMap::new());

/// Makes `attention` what layers of [`AttentionKind::Custom`](crate::AttentionKind::Custom) of that name do, in this process.
///
/// # Errors
/// [`Error::Setting`] when the name is taken.
pub fn register(name: &str, attention: Arc<dyn CustomAttention>) -> Result<()> {
    let mut registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    if registered.contains_key(name) {
        return Err(Error::setting("custom attention", name, "a name that is not taken"));
    }
    registered.insert(name.to_string(), attention);
    Ok(())
}

/// The attention of that name.
pub(super) fn registered(name: &str) -> Result<Arc<dyn CustomAttention>> {
    let registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    registered.get(name).cloned().ok_or_else(|| {
        let names: Vec<&str> = registered.keys().map(String::as_str).collect();
        Error::setting("model.attention", name, format!("a name that is registered: {}", names.join(", ")))
    })
}

/// A layer whose attention comes from outside.
#[derive(Module, Debug)]
pub struct CustomLayer {
    /// Query, key, value and output projections.
    pub projections: Projections,
    /// Positions of queries and keys.
    pub rope: Option<RotaryEncoding>,
    #[module(skip)]
    pub(super) attention: Arc<dyn CustomAttention>,
}

impl CustomLayer {
    /// Attends within hidden states `[B, T, M]`.
    ///
    /// # Errors
    /// As [`Projections::check`] and [`CustomAttention::attend`].
    pub fn forward(&self, hidden: Tensor<3>) -> Result<(Tensor<3>, Option<Routing>)> {
        let rope = self.rope.as_ref();
        self.projections.check(0, &hidden, rope)?;
        let qkv = self.projections.project(hidden.clone(), rope);
        let (out, routing) = self.attention.attend(hidden, qkv)?;
        Ok((self.projections.output(out), routing))
    }
}
