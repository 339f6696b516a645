use bifocal_core::{
    Element, FeatureMap, Problem, Result, Window,
    device::{AttentionOperator, Before, Gradients, Inputs, Partial, Rows, Saved, Tensor, TensorView},
};
use bifocal_linear::{
    LeavingKey, LinearAttention, LinearInputs, NormSum, NormSumGradients, State, norm_sum, norm_sum_backward,
};
use bifocal_windowed::Windowed;
use cubecl::client::Client;

/// RATTENTION (arXiv 2506.15545): softmax attention over a window, linear attention to every key that has left it, and the
/// sum of the two after a norm of each. There is no router, and what is far takes a state of constant size.
///
/// Projections belong to the model (see `RattentionAttention` in `bifocal-burn`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rattention {
    near: Windowed,
    far: LinearAttention,
    epsilon: f32,
}

/// What both branches read. Query, key and value have the same shapes in both; the paper rotates (and norms) queries and keys
/// for the near branch alone, and both have the same values.
#[derive(Clone, Copy, Debug)]
pub struct RattentionInputs<'a> {
    /// The near branch's.
    pub near: Inputs<'a>,
    /// The far branch's.
    pub far: LinearInputs<'a>,
    /// `[H, Dv]`, `f32`: the scale of the near branch's norm.
    pub near_scale: TensorView<'a, 2>,
    /// `[H, Dv]`, `f32`: the scale of the far branch's norm.
    pub far_scale: TensorView<'a, 2>,
}

/// What a forward pass leaves for the backward pass, and for the tokens that come later.
#[derive(Clone, Debug)]
pub struct RattentionOutput {
    /// The near branch, in the problem's element type.
    pub near: Partial,
    /// The far branch's outputs `[B, H, Tq, Dv]`, `f32`.
    pub far: Tensor<4>,
    /// The state that the last query met.
    pub state: State,
}

/// What [`Rattention::step`] reads.
#[derive(Clone, Copy, Debug)]
pub struct RattentionStep<'a> {
    /// The new token's query `[B, H, 1, D]`, and the keys and values of the window with the token's own.
    pub near: Inputs<'a>,
    /// `[B, H, 1, D]`: the same query as the far branch reads it.
    pub far_query: TensorView<'a, 4>,
    /// The key that the new token pushed out of the window, if the window was full.
    pub left: Option<LeavingKey<'a>>,
    /// As in [`RattentionInputs`].
    pub near_scale: TensorView<'a, 2>,
    /// As in [`RattentionInputs`].
    pub far_scale: TensorView<'a, 2>,
}

/// Gradients of [`RattentionInputs`], `f32`.
#[derive(Clone, Debug)]
pub struct RattentionGradients {
    /// Of the near branch's query and key, and of the values, through both branches.
    pub near: Gradients,
    /// Of the far branch's query.
    pub far_query: Tensor<4>,
    /// Of the far branch's key.
    pub far_key: Tensor<4>,
    /// `[H, Dv]`.
    pub near_scale: Tensor<2>,
    /// `[H, Dv]`.
    pub far_scale: Tensor<2>,
    /// Of the state that came in, if one did.
    pub state: Option<Tensor<4>>,
}

impl Rattention {
    /// RATTENTION with this window (the paper's w is [`Window::rattention`]`(w)`), its softmax feature map, and norms with
    /// the epsilon of its code, 1e-8.
    pub const fn new(window: Window) -> Self {
        Self { near: Windowed::new(window), far: LinearAttention::beyond(window), epsilon: 1e-8 }
    }

    /// Takes another feature map.
    pub const fn with_feature_map(self, map: FeatureMap) -> Self {
        Self { far: self.far.with_feature_map(map), ..self }
    }

    /// The near branch.
    pub const fn near(&self) -> Windowed {
        self.near
    }

    /// The far branch.
    pub const fn far(&self) -> LinearAttention {
        self.far
    }

    /// The epsilon of both norms.
    pub const fn epsilon(&self) -> f32 {
        self.epsilon
    }

    /// Writes `out` `[B, H, Tq, Dv]`, `f32` or of the problem's element type.
    ///
    /// # Errors
    /// As [`AttentionOperator::attend`], [`LinearAttention::attend`] and [`norm_sum`].
    pub fn attend(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &RattentionInputs<'_>,
        out: &Tensor<4>,
    ) -> Result<RattentionOutput> {
        let near = Partial::empty(client, problem, problem.element);
        self.near.attend(client, problem, &inputs.near, Rows::All, &near)?;
        let far = match inputs.far.rows {
            Rows::All => Tensor::empty(client, problem.out_shape(), Element::F32),
            // Rows that the far branch does not compute are their near branch alone.
            Rows::Routed(_) => Tensor::zeros(client, problem.out_shape())?,
        };
        let state = self.far.attend(client, problem, &inputs.far, &far)?;
        let scales = [inputs.near_scale, inputs.far_scale];
        norm_sum(client, problem, &self.norms(&near.out, &far, scales), out)?;
        Ok(RattentionOutput { near, far, state })
    }

    /// One step of decoding, `problem.query_len` of 1: brings `state` up to date in place and writes `out` `[B, H, 1, Dv]`.
    ///
    /// # Errors
    /// As [`AttentionOperator::attend`], [`LinearAttention::step`] and [`norm_sum`].
    pub fn step(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &RattentionStep<'_>,
        state: &State,
        out: &Tensor<4>,
    ) -> Result<()> {
        let near = Partial::empty(client, problem, problem.element);
        self.near.attend(client, problem, &inputs.near, Rows::All, &near)?;
        let far = Tensor::empty(client, problem.out_shape(), Element::F32);
        self.far.step(client, problem, inputs.far_query, inputs.left, state, &far)?;
        let scales = [inputs.near_scale, inputs.far_scale];
        norm_sum(client, problem, &self.norms(&near.out, &far, scales), out)
    }

    /// The gradients of what [`attend`](Self::attend) read, from that of its output and, if its state went on to somewhere,
    /// that of the state. Two runs agree bit for bit.
    ///
    /// # Errors
    /// As [`AttentionOperator::backward`], [`LinearAttention::backward`] and [`norm_sum_backward`].
    pub fn backward(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &RattentionInputs<'_>,
        forward: &RattentionOutput,
        d_out: TensorView<'_, 4>,
        d_state: Option<&Tensor<4>>,
    ) -> Result<RattentionGradients> {
        let scales = [inputs.near_scale, inputs.far_scale];
        let norms = self.norms(&forward.near.out, &forward.far, scales);
        let NormSumGradients { near: d_near, far: d_far, near_scale, far_scale } =
            norm_sum_backward(client, problem, &norms, d_out)?;
        let near = Gradients::unset(client, problem, inputs.near.sink_logits.is_some())?;
        let delta = bifocal_dispatch::dot_rows(client, problem, forward.near.out.view(), d_near.view())?;
        let saved = Saved { partial: &forward.near, d_out: d_near.view(), delta: delta.view() };
        self.near.backward(client, problem, &inputs.near, Rows::All, &saved, &near)?;
        // Both branches add to one gradient of the values.
        let far = Gradients {
            query: Tensor::zeros(client, near.query.shape())?,
            key: Tensor::zeros(client, near.key.shape())?,
            value: near.value.clone(),
            sink_logits: None,
            query_before: Before::Sums,
            key_before: Before::Sums,
        };
        let state = self.far.backward(client, problem, &inputs.far, d_far.view(), d_state, &far)?;
        let near = near.after_all_rows();
        Ok(RattentionGradients { near, far_query: far.query, far_key: far.key, near_scale, far_scale, state })
    }

    pub(crate) fn norms<'a>(
        &self,
        near: &'a Tensor<4>,
        far: &'a Tensor<4>,
        [near_scale, far_scale]: [TensorView<'a, 2>; 2],
    ) -> NormSum<'a> {
        NormSum { near: near.view(), far: far.view(), near_scale, far_scale, epsilon: self.epsilon }
    }
}
