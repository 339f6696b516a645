use bifocal_core::{
    Element, Error, Problem, Result, Window,
    device::{AttentionOperator, Decision, Inputs, Partial, Rows, Tensor},
};
use bifocal_dispatch::mix_routed;
use bifocal_full::Full;
use bifocal_windowed::Windowed;
use cubecl::client::Client;

/// A soft gate over shared keys and values, as LoGo's (arXiv 2608.29539): `o = (1 - g) a_window + g a_full`, where `g` is the
/// gate's score, and 0 where that is below its threshold. Below it nothing of the far branch is computed.
///
/// LoGo's own transforms of queries, keys and values for its global branch, and its norm of each branch's outputs, belong to
/// the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logo {
    near: Windowed,
}

impl Logo {
    /// A soft gate beside this window.
    pub const fn new(window: Window) -> Self {
        Self { near: Windowed::new(window) }
    }

    /// Attends by the decision of a gate that scores, such as a [`LinearGate`](crate::LinearGate) with
    /// [`Threshold::AtLeast`](crate::Threshold::AtLeast): scores mix where routes are far. A mix of two softmaxes has no
    /// log-sum-exp; the partial's is the near branch's.
    ///
    /// # Errors
    /// [`Error::Option`] for a decision without scores; [`Error::Shape`] for other than one score per token-head; as
    /// [`AttentionOperator::attend`], [`plan`](crate::plan) and [`mix_routed`].
    pub fn attend(
        &self,
        client: &Client,
        problem: &Problem,
        inputs: &Inputs<'_>,
        decision: &Decision,
    ) -> Result<Partial> {
        let Some(scores) = &decision.scores else {
            return Err(Error::option("scores", "absent", "a gate that scores"));
        };
        let [batch, router_heads, choices, tokens] = scores.shape();
        if choices != 1 {
            let expected = format!("[{batch}, {router_heads}, 1, {tokens}]");
            return Err(Error::shape("the scores", expected, &scores.shape()));
        }
        scores.view().check_contiguous("the scores")?;
        let strides = [router_heads * tokens, tokens, 1];
        let weights =
            Tensor::new(scores.handle().clone(), scores.element(), [batch, router_heads, tokens], strides);

        let routes = &decision.routes;
        let plan = crate::plan(client, problem, routes)?;
        let near = Partial::empty(client, problem, problem.element);
        let far = Partial::empty(client, problem, Element::F32);
        self.near.attend(client, problem, inputs, Rows::All, &near)?;
        Full.attend(client, problem, inputs, plan.far_rows()?, &far)?;
        let reach = routes.geometry().reaches - 1;
        mix_routed(client, problem, weights.view(), routes, reach, &near, &far)?;
        Ok(near)
    }
}
