use bifocal_core::{
    Element, FeatureMap, Problem, Result, Window,
    device::{Rows, Tensor, TensorView},
};
use bifocal_dispatch::Plan;
use bifocal_linear::{NormSum, norm_sum};
use cubecl::client::Client;

use crate::{
    Rattention, RattentionGradients, RattentionInputs, RattentionOutput, gate_gradient, select::one_each,
};

/// AHA over a linear far branch, after the second question that arXiv 2512.22562 leaves open: a row is a window, and where
/// its gate is open also linear attention to every key that has left it.
///
/// ```text
/// o = RMS(a_window) + g RMS(a_linear)
/// ```
///
/// The branches and their norms are [`Rattention`]'s: gates that are all open are RATTENTION, gates that are all closed its
/// window alone. Rows whose gate is closed cost the portable routine nothing but the state, which is one for all; on tensor
/// cores they are computed and left out.
///
/// A [`RattentionDecoder`](crate::decode::RattentionDecoder) of [`open`](Self::open) decodes, given routes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AhaLinear {
    open: Rattention,
}

impl AhaLinear {
    /// AHA with this window and RATTENTION's feature map beyond it.
    pub const fn new(window: Window) -> Self {
        Self { open: Rattention::new(window) }
    }

    /// Takes another feature map.
    pub const fn with_feature_map(self, map: FeatureMap) -> Self {
        Self { open: self.open.with_feature_map(map) }
    }

    /// What a row is whose gate is open.
    pub const fn open(&self) -> &Rattention {
        &self.open
    }

    /// Writes `out` `[B, H, Tq, Dv]`, `f32` or of the problem's element type, by a [`plan`](crate::plan) of two reaches. Of
    /// the far branch's outputs, rows whose gate is closed are zero. Rows without a valid route become NaN.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) for a plan of other than two reaches; as [`Rattention::attend`].
    pub fn attend(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &RattentionInputs<'_>,
        plan: &Plan,
        out: &Tensor<4>,
    ) -> Result<RattentionOutput> {
        self.open.attend(client, problem, &routed(inputs, plan)?, out)
    }

    /// The gradients of what [`attend`](Self::attend) read, as [`Rattention::backward`]: those of the far branch through the
    /// rows whose gate was open. Routes are discrete; their scores have [`gate_gradient`](Self::gate_gradient).
    ///
    /// # Errors
    /// As [`attend`](Self::attend) and [`Rattention::backward`].
    pub fn backward(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &RattentionInputs<'_>,
        plan: &Plan,
        forward: &RattentionOutput,
        d_out: TensorView<'_, 4>,
        d_state: Option<&Tensor<4>>,
    ) -> Result<RattentionGradients> {
        self.open.backward(client, problem, &routed(inputs, plan)?, forward, d_out, d_state)
    }

    /// The straight-through gradient of the gate's scores, `f32 [B, R, 1, Tq]`: `<do, RMS(a_linear)>` (see
    /// [`gate_gradient`]). For this the far branch computes every row.
    ///
    /// # Errors
    /// As [`Rattention::attend`] and [`gate_gradient`].
    pub fn gate_gradient(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &RattentionInputs<'_>,
        router_heads: usize,
        d_out: TensorView<'_, 4>,
    ) -> Result<Tensor<4>> {
        let far = Tensor::empty(client, problem.out_shape(), Element::F32);
        let every = inputs.far.with_rows(Rows::All);
        self.open.far().attend(client, problem, &every, &far)?;
        // Without a scale the near branch says nothing.
        let silence = Tensor::filled(client, [problem.heads, problem.value_dim], Element::F32, 0.0)?;
        let normed = Tensor::empty(client, problem.out_shape(), Element::F32);
        let norms = NormSum {
            near: far.view(),
            far: far.view(),
            near_scale: silence.view(),
            far_scale: inputs.far_scale,
            epsilon: self.open.epsilon(),
        };
        norm_sum(client, problem, &norms, &normed)?;
        gate_gradient(client, problem, router_heads, None, normed.view(), d_out)
    }
}

/// The far branch on the rows of the last reach alone.
fn routed<'a>(inputs: &RattentionInputs<'a>, plan: &'a Plan) -> Result<RattentionInputs<'a>> {
    one_each(plan.reaches(), 2)?;
    Ok(RattentionInputs { far: inputs.far.with_rows(plan.far_rows()?), ..*inputs })
}
