use bifocal_core::{FeatureMap, Reach, Window};
use num_traits::Float;

use super::{Projections, split_heads};
use crate::{Array, LinearOptions, linear_attention, norm_sum};

/// RATTENTION (arXiv 2506.15545): softmax attention over a window, and linear attention to every key that has left it, from
/// the same projections, each normed per head, added.
#[derive(Clone, Debug, PartialEq)]
pub struct RattentionLayer<F> {
    /// Shared by both branches. Norms and rotary positions of queries and keys are the near branch's alone.
    pub projections: Projections<F>,
    /// The near branch's keys; the paper's w is [`Window::rattention`]`(w)`.
    pub window: Window,
    /// The far branch's feature map.
    pub map: FeatureMap,
    /// `[H, Dv]`: the scale of the near branch's norm.
    pub near_scale: Array<F, 2>,
    /// `[H, Dv]`: the scale of the far branch's norm.
    pub far_scale: Array<F, 2>,
    /// Added to the mean squares; 1e-8 in the paper's code.
    pub epsilon: F,
}

impl<F: Float> RattentionLayer<F> {
    /// `W_O [RMS(a_near) + RMS(a_far)]` for hidden states `[B, T, M]`.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn forward(&self, hidden: &Array<F, 3>) -> Array<F, 3> {
        let [near, far] = self.branches(hidden);
        let scales = [&self.near_scale, &self.far_scale];
        self.projections.output(&norm_sum([&near, &far], scales, self.epsilon))
    }

    /// The outputs `[B, H, T, Dv]` of the near and of the far branch.
    pub(super) fn branches(&self, hidden: &Array<F, 3>) -> [Array<F, 4>; 2] {
        let projections = &self.projections;
        let near = projections.attend(hidden, &[Reach::Window(self.window)]).remove(0).out;
        let query = split_heads(hidden, &projections.wq, projections.heads);
        let key = split_heads(hidden, &projections.wk, projections.kv_heads);
        let value = split_heads(hidden, &projections.wv, projections.kv_heads);
        let options = LinearOptions { map: self.map, ..LinearOptions::new(self.window) };
        [near, linear_attention(&query, &key, &value, &options).out]
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;

    use super::*;
    use crate::{
        layers::tests::{TOKENS, hidden, projections, window},
        rms_norm,
    };

    fn layer(window: Window) -> RattentionLayer<f64> {
        RattentionLayer {
            projections: projections(1),
            window,
            map: FeatureMap::SoftmaxPair,
            near_scale: Array::filled([4, 3], 2.0),
            far_scale: Array::filled([4, 3], 3.0),
            epsilon: 1e-8,
        }
    }

    #[test]
    fn a_long_window_leaves_normed_full_attention() {
        let layer = layer(Window::rattention(TOKENS).unwrap());
        let full = layer.projections.attend(&hidden(), &[Reach::All]).remove(0).out;
        let expected = layer.projections.output(&rms_norm(&full, &[2.0; 3], 1e-8));
        assert_abs_diff_eq!(layer.forward(&hidden()).as_slice(), expected.as_slice(), epsilon = 1e-12);
    }

    #[test]
    fn positions_do_not_reach_the_far_branch() {
        // Other frequencies change nothing but the near branch, which a scale of zero silences.
        let layer = RattentionLayer { near_scale: Array::filled([4, 3], 0.0), ..layer(window()) };
        let mut other = layer.clone();
        other.projections.rope_theta = Some(10.0);
        other.projections.qk_norm = None;
        assert_eq!(layer.forward(&hidden()), other.forward(&hidden()));
        let zeros = Array::filled(hidden().shape(), 0.0);
        assert_ne!(layer.forward(&hidden()), zeros, "the far branch says something");
    }
}
