//! A variant of one's own: a router that sends every n-th token far, a far branch that sharpens its softmax, and the two in
//! a language model. The book's page "Add your own variant" walks through it.

use std::sync::Arc;

use bifocal::{
    AttentionOperator, Decision, DeviceProfile, Full, Gradients, Inputs, Partial, Problem, Reach, Refusal,
    Result, RouteGeometry, Router, Routes, Routine, Rows, Saved, TensorView, Window, Windowed,
    cubecl::client::Client,
};
use bifocal_burn::{AttentionOptions, Branch, Routing, route, selected_attention};
use bifocal_lm::{CustomAttention, register};
use burn::tensor::Tensor;

/// Every `stride`-th token looks far, in all heads.
#[derive(Clone, Copy, Debug)]
pub struct EveryNth {
    /// At least 1.
    pub stride: usize,
}

impl Router for EveryNth {
    fn heads(&self) -> usize {
        1 // token-wise; the number of kv heads or query heads would be head-wise
    }

    fn reaches(&self) -> usize {
        2 // near and far
    }

    fn route(&self, client: &Client, hidden: TensorView<'_, 3>) -> Result<Decision> {
        let [batch, tokens, _] = hidden.shape();
        let geometry = RouteGeometry::new(batch, self.heads(), tokens, self.reaches())?;
        let sequence: Vec<u8> =
            (0..tokens).map(|token| u8::from(token.is_multiple_of(self.stride))).collect();
        let routes = Routes::from_host(client, geometry, &sequence.repeat(batch))?;

        // Per batch and router head: near, far, and invalid routes.
        let far = sequence.iter().filter(|&&route| route == 1).count() as u32;
        let counts = [tokens as u32 - far, far, 0].repeat(batch);
        let counts: Vec<u8> = counts.iter().flat_map(|count| count.to_ne_bytes()).collect();
        Ok(Decision { scores: None, routes, counts: client.create_from_slice(&counts) })
    }
}

/// Full attention whose scores are multiplied by `factor`, on top of the problem's scale.
#[derive(Clone, Copy, Debug)]
pub struct Sharpened {
    /// Above 1 it sharpens, below it blurs.
    pub factor: f32,
}

impl Sharpened {
    /// The same problem with sharper scores, which is full attention's.
    fn sharper(&self, problem: &Problem) -> Result<Problem> {
        problem.with_scale(problem.scale * self.factor)
    }
}

impl AttentionOperator for Sharpened {
    fn name(&self) -> &'static str {
        "sharpened"
    }

    fn reach(&self) -> Reach {
        Reach::All
    }

    fn supports(&self, routine: Routine, problem: &Problem, profile: &DeviceProfile) -> Result<(), Refusal> {
        Full.supports(routine, problem, profile)
    }

    fn attend(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        rows: Rows<'_>,
        partial: &Partial,
    ) -> Result<Routine> {
        Full.attend(client, &self.sharper(problem)?, inputs, rows, partial)
    }

    fn supports_backward(
        &self,
        routine: Routine,
        problem: &Problem,
        profile: &DeviceProfile,
    ) -> Result<(), Refusal> {
        Full.supports_backward(routine, problem, profile)
    }

    fn backward(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        rows: Rows<'_>,
        saved: &Saved<'_>,
        gradients: &Gradients,
    ) -> Result<Routine> {
        Full.backward(client, &self.sharper(problem)?, inputs, rows, saved, gradients)
    }
}

/// The system: a window, and for every n-th token sharpened attention over everything.
#[derive(Clone, Copy, Debug)]
pub struct Strided {
    /// Keys that a query sees near.
    pub window: Window,
    /// Which tokens look far.
    pub router: EveryNth,
    /// What they see.
    pub far: Sharpened,
}

impl CustomAttention for Strided {
    fn attend(
        &self,
        hidden: Tensor<3>,
        [query, key, value]: [Tensor<4>; 3],
    ) -> Result<(Tensor<4>, Option<Routing>)> {
        let routing = route(&self.router, hidden)?;
        let branches: [Branch; 2] = [Windowed::new(self.window).into(), self.far.into()];
        let options = AttentionOptions::default();
        let out = selected_attention(query, key, value, &routing, &branches, &options)?;
        Ok((out, Some(routing)))
    }
}

/// Makes `AttentionKind::Custom { name: "strided" }` a window of 8 keys, and twice as sharp attention for every fourth token.
///
/// # Errors
/// When it was called before.
pub fn register_strided() -> bifocal_lm::Result<()> {
    let window = Window::new(8)?;
    register(
        "strided",
        Arc::new(Strided { window, router: EveryNth { stride: 4 }, far: Sharpened { factor: 2.0 } }),
    )
}
