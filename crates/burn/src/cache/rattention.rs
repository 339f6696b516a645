use bifocal::{
    LeavingKey, LinearAttention, LinearInputs, Problem, Reach, Result, State, Window, decode::KvShape,
};
use burn::tensor::Tensor;

use super::{recent::Recent, selected::Selected};
use crate::{AttentionOptions, place::Place, system::room_like};

/// RATTENTION's window, and the state of all that has left it: constant in size, whatever the context.
#[derive(Debug)]
pub(super) struct RattentionCache {
    near: Selected,
    window: Window,
    /// Keys of the window as the far branch reads them, before rotary positions and norms, and their values.
    keys: Recent,
    values: Recent,
    /// What the last query met; none before the first token.
    state: Option<State>,
}

impl RattentionCache {
    pub(super) fn new(place: &Place, shape: KvShape, size: [usize; 2], window: Window) -> Result<Self> {
        let recent = || Recent::new(window.keys() as usize);
        Ok(Self {
            near: Selected::new(place, shape, size, &[Some(Reach::Window(window))])?,
            window,
            keys: recent(),
            values: recent(),
            state: None,
        })
    }

    pub(super) fn tokens(&self) -> Result<usize> {
        self.near.tokens()
    }

    pub(super) fn bytes(&self) -> usize {
        let state = self.state.as_ref().map_or(0, |state| state.shape().iter().product::<usize>() * 4);
        self.near.bytes() + self.keys.bytes() + self.values.bytes() + state
    }

    pub(super) fn check(&self, window: Window) -> Result<()> {
        self.near.check(&[Some(Reach::Window(window))], None)
    }

    /// Appends keys and values, and attends: the near branch by rotated query and key, the far branch by `[query, key]` as
    /// they were before.
    pub(super) fn attend(
        &mut self,
        place: &Place,
        near: [Tensor<4>; 3],
        far: [Tensor<4>; 2],
        options: &AttentionOptions,
    ) -> Result<[Tensor<4>; 2]> {
        let value = near[2].clone();
        let near = self.near.attend(place, near, None, options)?;
        Ok([near, self.linear(place, far, value)?])
    }

    fn linear(&mut self, place: &Place, [query, key]: [Tensor<4>; 2], value: Tensor<4>) -> Result<Tensor<4>> {
        let client = place.client();
        let operator = LinearAttention::beyond(self.window);
        let [_, _, tokens, _] = query.dims();
        let query = place.import("query", query)?;
        let (keys, values) = (self.keys.followed_by(key.clone()), self.values.followed_by(value.clone()));
        let out = match &self.state {
            Some(state) if tokens == 1 => {
                let left = match (self.keys.leaving(), self.values.leaving()) {
                    (Some(key), Some(value)) => Some([
                        place.import("the key that leaves", key)?,
                        place.import("the value that leaves", value)?,
                    ]),
                    _ => None,
                };
                let left = left.as_ref().map(|[key, value]| LeavingKey {
                    key: key.view(),
                    value: value.view(),
                    log_decay: None,
                });
                let [_, _, _, value_dim] = value.dims();
                let problem = Problem::new(query.shape(), key.dims(), query.element())?;
                let problem = problem.with_value_dim(value_dim)?;
                let out = room_like(client, &problem, query.strides());
                operator.step(client, &problem, query.view(), left, state, &out)?;
                out
            }
            state => {
                // The state lacks the keys of the window: they come once more.
                let key = place.import("key", keys.clone())?;
                let value = place.import("value", values.clone())?;
                let mut inputs = LinearInputs::new(query.view(), key.view(), value.view());
                if let Some(state) = state {
                    inputs = inputs.with_state(state);
                }
                let problem = inputs.attention.problem()?;
                let out = room_like(client, &problem, query.strides());
                self.state = Some(operator.attend(client, &problem, &inputs, &out)?);
                out
            }
        };
        self.keys.keep(keys);
        self.values.keep(values);
        place.export(out)
    }
}
