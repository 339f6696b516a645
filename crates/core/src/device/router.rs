use cubecl::{client::Client, server::Handle};

use super::{RouteGeometry, Routes, Tensor, TensorView};
use crate::{Error, Result};

/// What a router decides: scores, routes, and how often each route was taken.
#[derive(Clone, Debug)]
pub struct Decision {
    /// The router's real numbers, `[B, R, K, T]` in `f32`: K = 1 for a gate, K reaches for a choice among
    /// several. `None` for routers that do not score.
    pub scores: Option<Tensor<4>>,
    /// The discrete choices.
    pub routes: Routes,
    /// How many tokens took each route: `u32 [B, R, reaches + 1]`, the last column counts invalid routes.
    pub counts: Handle,
}

impl Decision {
    /// Reads the counts back: per batch and router head, the tokens on each reach. Waits for the device.
    ///
    /// # Errors
    /// [`Error::InvalidScores`] when any score was NaN; [`Error::Runtime`].
    pub fn counts(&self, client: &Client) -> Result<Vec<Vec<u32>>> {
        let RouteGeometry { reaches, .. } = self.routes.geometry();
        let bytes =
            client.read_one(self.counts.clone()).map_err(|error| Error::Runtime(error.to_string()))?;
        let counts: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
        let rows = counts.chunks_exact(reaches + 1);
        let invalid: u32 = rows.clone().map(|row| row[reaches]).sum();
        if invalid > 0 {
            let total = self.routes.geometry().len();
            return Err(Error::InvalidScores { count: invalid as usize, total });
        }
        Ok(rows.map(|row| row[..reaches].to_vec()).collect())
    }

    /// The share of tokens on the last reach (full attention), per batch and router head. Waits for the device.
    ///
    /// # Errors
    /// As [`Decision::counts`].
    pub fn far_share(&self, client: &Client) -> Result<Vec<f64>> {
        let tokens = self.routes.geometry().tokens as f64;
        let counts = self.counts(client)?;
        Ok(counts.iter().map(|row| f64::from(row[row.len() - 1]) / tokens).collect())
    }
}

/// Chooses, for every token and router head, which reach it takes.
pub trait Router {
    /// Router heads (R): 1 (token-wise), the kv heads, or the query heads.
    fn heads(&self) -> usize;

    /// How many reaches there are to choose from.
    fn reaches(&self) -> usize;

    /// Routes the hidden states `[B, T, M]`. Nothing is read back to the host.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Element`], [`Error::DeviceMismatch`] and their like when the hidden states do
    /// not fit the router; [`Error::Refused`] when the device cannot run it.
    fn route(&self, client: &Client, hidden: TensorView<'_, 3>) -> Result<Decision>;
}
