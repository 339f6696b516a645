use bifocal_core::{Reach, Window};
use num_traits::Float;

use crate::{
    Array, Options, Partial, SigmoidGate, array::sum, attention, linear, linear_choice, mask, rms_norm, rope,
    select, softmax_choice,
};

mod aha_linear;
mod backward;
mod rattention;

pub use aha_linear::{AhaLinearGradients, AhaLinearLayer, aha_linear, aha_linear_backward};
pub use backward::LayerGradients;
pub use rattention::RattentionLayer;

/// The projections around one attention, heads side by side: column `h * D + d` is channel `d` of head `h`.
#[derive(Clone, Debug, PartialEq)]
pub struct Projections<F> {
    /// Query heads H.
    pub heads: usize,
    /// Key and value heads Hk.
    pub kv_heads: usize,
    /// `[M, H * D]`.
    pub wq: Array<F, 2>,
    /// `[M, Hk * D]`.
    pub wk: Array<F, 2>,
    /// `[M, Hk * Dv]`.
    pub wv: Array<F, 2>,
    /// `[H * Dv, M]`.
    pub wo: Array<F, 2>,
    /// Norms of queries and keys before rotary positions.
    pub qk_norm: Option<QkNorm<F>>,
    /// The theta of rotary positions; none for no positions.
    pub rope_theta: Option<F>,
}

/// Root-mean-square norms of each head's query and key (Qwen3, arXiv 2505.09388), weights shared over
/// heads.
#[derive(Clone, Debug, PartialEq)]
pub struct QkNorm<F> {
    /// `[D]`.
    pub query: Vec<F>,
    /// `[D]`.
    pub key: Vec<F>,
    /// Added to the mean square.
    pub epsilon: F,
}

impl<F: Float> Projections<F> {
    /// Query `[B, H, T, D]`, key `[B, Hk, T, D]` and value `[B, Hk, T, Dv]` of hidden states `[B, T, M]`:
    /// projected, normed, rotated. Token `t` has position `t`.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn project(&self, hidden: &Array<F, 3>) -> [Array<F, 4>; 3] {
        let mut q = split_heads(hidden, &self.wq, self.heads);
        let mut k = split_heads(hidden, &self.wk, self.kv_heads);
        let v = split_heads(hidden, &self.wv, self.kv_heads);
        if let Some(norm) = &self.qk_norm {
            q = rms_norm(&q, &norm.query, norm.epsilon);
            k = rms_norm(&k, &norm.key, norm.epsilon);
        }
        if let Some(theta) = self.rope_theta {
            q = rope(&q, theta, 0);
            k = rope(&k, theta, 0);
        }
        [q, k, v]
    }

    /// What each reach gives for hidden states `[B, T, M]`, over the same queries, keys and values.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn attend(&self, hidden: &Array<F, 3>, reaches: &[Reach]) -> Vec<Partial<F>> {
        let [q, k, v] = self.project(hidden);
        let options = Options::new(q.shape()[3]);
        reaches.iter().map(|&reach| attention(&q, &k, &v, reach, &options)).collect()
    }

    /// The output projection `[B, T, M]` of attention outputs `[B, H, T, Dv]`.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn output(&self, out: &Array<F, 4>) -> Array<F, 3> {
        let [batch, heads, tokens, dim] = out.shape();
        let [rows, hidden_dim] = self.wo.shape();
        assert_eq!(rows, heads * dim, "wo has {rows} rows, expected {heads} heads of {dim} channels");
        Array::from_fn([batch, tokens, hidden_dim], |[b, t, m]| {
            sum((0..rows).map(|row| out[[b, row / dim, t, row % dim]] * self.wo[[row, m]]))
        })
    }

    /// Dense attention: one reach for every token and head, `[B, T, M]` to `[B, T, M]`. The layer that routed
    /// layers are compared with.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn dense(&self, hidden: &Array<F, 3>, reach: Reach) -> Array<F, 3> {
        self.output(&self.attend(hidden, &[reach])[0].out)
    }
}

/// `[B, T, M]` times `[M, heads * D]`, as `[B, heads, T, D]`.
fn split_heads<F: Float>(hidden: &Array<F, 3>, weight: &Array<F, 2>, heads: usize) -> Array<F, 4> {
    let [batch, tokens, hidden_dim] = hidden.shape();
    let [rows, columns] = weight.shape();
    assert_eq!(rows, hidden_dim, "weight has {rows} rows, hidden states have {hidden_dim} channels");
    assert!(columns.is_multiple_of(heads), "{columns} columns are not a multiple of {heads} heads");
    let dim = columns / heads;
    Array::from_fn([batch, heads, tokens, dim], |[b, h, t, d]| {
        sum((0..hidden_dim).map(|m| hidden[[b, t, m]] * weight[[m, h * dim + d]]))
    })
}

/// What a routed layer gives; scores have `N` dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerOutput<F, const N: usize> {
    /// `[B, T, M]`.
    pub output: Array<F, 3>,
    /// The router's scores: `[B, R, T]`, of several choices `[B, R, K, T]`.
    pub scores: Array<F, N>,
    /// `[B, R, T]`: 0 is the nearest reach, the last is full.
    pub routes: Array<u8, 3>,
}

/// All-or-Here Attention (AHA, arXiv 2512.22562): per token and head either the window or everything, over
/// shared queries, keys and values. The router reads the tensor that the query projection reads.
#[derive(Clone, Debug, PartialEq)]
pub struct AhaLayer<F> {
    /// Shared by both branches.
    pub projections: Projections<F>,
    /// `[M, R]`; R = H in the paper.
    pub router_weight: Array<F, 2>,
    /// `[R]`; none in the paper's checkpoints.
    pub router_bias: Option<Vec<F>>,
    /// The local branch.
    pub window: Window,
}

impl<F: Float> AhaLayer<F> {
    /// `W_O [g a_full + (1 - g) a_local]` with `g = sigmoid(X W_r) > 0.5`, for hidden states `[B, T, M]`.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn forward(&self, hidden: &Array<F, 3>) -> LayerOutput<F, 3> {
        let logits = linear(hidden, &self.router_weight, self.router_bias.as_deref());
        let (scores, routes) = SigmoidGate::aha().forward(&logits);
        let branches = self.projections.attend(hidden, &[Reach::Window(self.window), Reach::All]);
        let selected = select(&routes, &branches.iter().collect::<Vec<_>>());
        LayerOutput { output: self.projections.output(&selected.out), scores, routes }
    }
}

/// AHA with several windows to choose from, then everything (the generalisation that arXiv 2512.22562 leaves
/// open): K = windows + 1 choices by softmax, and the largest one taken.
#[derive(Clone, Debug, PartialEq)]
pub struct MultiWindowLayer<F> {
    /// Shared by all branches.
    pub projections: Projections<F>,
    /// `[M, R * K]`, column `r * K + k`.
    pub router_weight: Array<F, 2>,
    /// `[R * K]`.
    pub router_bias: Option<Vec<F>>,
    /// From the smallest to the largest; full attention follows as the last choice.
    pub windows: Vec<Window>,
}

impl<F: Float> MultiWindowLayer<F> {
    /// `W_O a_k` with `k = argmax softmax(X W_r)`, for hidden states `[B, T, M]`.
    ///
    /// # Panics
    /// When shapes do not fit, or windows do not grow.
    pub fn forward(&self, hidden: &Array<F, 3>) -> LayerOutput<F, 4> {
        let reaches = self.reaches();
        let logits = linear_choice(hidden, &self.router_weight, self.router_bias.as_deref(), reaches.len());
        let (scores, routes) = softmax_choice(&logits);
        let branches = self.projections.attend(hidden, &reaches);
        let selected = select(&routes, &branches.iter().collect::<Vec<_>>());
        LayerOutput { output: self.projections.output(&selected.out), scores, routes }
    }

    /// The reaches to choose from.
    fn reaches(&self) -> Vec<Reach> {
        assert!(self.windows.is_sorted_by(|a, b| a < b), "windows go from the smallest to the largest");
        self.windows.iter().map(|&window| Reach::Window(window)).chain([Reach::All]).collect()
    }
}

/// Learning To Attend (L2A, arXiv 2603.17484): a local and a gated global attention in series, each with its
/// own projections, norm and residual. The feed-forward block that follows is the model's business.
#[derive(Clone, Debug, PartialEq)]
pub struct L2aLayer<F> {
    /// `[M]`, the norm before the local attention.
    pub local_norm: Vec<F>,
    /// The local attention's own projections.
    pub local: Projections<F>,
    /// `[M]`, the norm before the global attention and its router.
    pub global_norm: Vec<F>,
    /// The global attention's own projections.
    pub global: Projections<F>,
    /// Added to the mean squares of both norms.
    pub epsilon: F,
    /// `[M, R]`; R = 1, a gate per token, in the paper. No bias.
    pub router_weight: Array<F, 2>,
    /// The local attention's window.
    pub window: Window,
}

impl<F: Float> L2aLayer<F> {
    /// For hidden states `x` `[B, T, M]`:
    /// `x1 = x + O_loc SWA(u1)` with `u1 = norm(x)`, then `x2 = x1 + O_glb (g * Attn(u2))` with
    /// `u2 = norm(x1)` and `g = sigmoid(u2 w_r / 0.1) >= 0.5`. The output is `x2`.
    ///
    /// Keys and values of the global attention come from all tokens, also those whose gate is 0.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn forward(&self, hidden: &Array<F, 3>) -> LayerOutput<F, 3> {
        let u1 = rms_norm(hidden, &self.local_norm, self.epsilon);
        let x1 = add(hidden, &self.local.dense(&u1, Reach::Window(self.window)));
        let u2 = rms_norm(&x1, &self.global_norm, self.epsilon);
        let (scores, routes) = SigmoidGate::l2a().forward(&linear(&u2, &self.router_weight, None));
        let full = self.global.attend(&u2, &[Reach::All]).remove(0);
        let gated = mask(&routes, &full);
        LayerOutput { output: add(&x1, &self.global.output(&gated.out)), scores, routes }
    }
}

fn add<F: Float, const N: usize>(a: &Array<F, N>, b: &Array<F, N>) -> Array<F, N> {
    assert_eq!(a.shape(), b.shape(), "a sum needs equal shapes");
    Array::from_fn(a.shape(), |index| a[index] + b[index])
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;
    use rstest::rstest;

    use super::*;
    use crate::{INVALID_ROUTE, array::indices, samples::noise};

    pub(super) const TOKENS: usize = 7;
    pub(super) const HIDDEN: usize = 6;
    const HEADS: usize = 4;

    pub(super) fn hidden() -> Array<f64, 3> {
        noise([2, TOKENS, HIDDEN], 100)
    }

    pub(super) fn window() -> Window {
        Window::aha(2).unwrap()
    }

    /// Four query heads, two kv heads, D = 4, Dv = 3.
    pub(super) fn projections(seed: u64) -> Projections<f64> {
        Projections {
            heads: HEADS,
            kv_heads: 2,
            wq: noise([HIDDEN, HEADS * 4], seed),
            wk: noise([HIDDEN, 2 * 4], seed + 1),
            wv: noise([HIDDEN, 2 * 3], seed + 2),
            wo: noise([HEADS * 3, HIDDEN], seed + 3),
            qk_norm: Some(QkNorm { query: vec![1.5; 4], key: vec![0.5; 4], epsilon: 1e-6 }),
            rope_theta: Some(1e4),
        }
    }

    pub(super) fn aha(router_heads: usize, bias: Option<f64>) -> AhaLayer<f64> {
        AhaLayer {
            projections: projections(1),
            router_weight: noise([HIDDEN, router_heads], 5),
            router_bias: bias.map(|bias| vec![bias; router_heads]),
            window: window(),
        }
    }

    pub(super) fn l2a() -> L2aLayer<f64> {
        L2aLayer {
            local_norm: vec![1.0; HIDDEN],
            local: projections(1),
            global_norm: vec![0.5; HIDDEN],
            global: projections(11),
            epsilon: 1e-6,
            router_weight: noise([HIDDEN, 1], 21),
            window: window(),
        }
    }

    #[test]
    fn heads_lie_side_by_side_in_the_projections() {
        // One token, two heads of one channel; wo adds head 0 once and head 1 ten times.
        let weight = |data: [f64; 2]| Array::new([1, 2], data.to_vec());
        let layer = Projections {
            heads: 2,
            kv_heads: 2,
            wq: weight([1.0, 1.0]),
            wk: weight([1.0, 1.0]),
            wv: weight([2.0, 3.0]),
            wo: Array::new([2, 1], vec![1.0, 10.0]),
            qk_norm: None,
            rope_theta: None,
        };
        assert_eq!(layer.dense(&Array::new([1, 1, 1], vec![1.0]), Reach::All).into_vec(), [32.0]);
    }

    #[rstest]
    #[case(1e3, Reach::All, 1)]
    #[case(-1e3, Reach::Window(window()), 0)]
    fn aha_forced_one_way_is_a_dense_layer(#[case] bias: f64, #[case] reach: Reach, #[case] route: u8) {
        for router_heads in [1, 2, HEADS] {
            let layer = aha(router_heads, Some(bias));
            let forced = layer.forward(&hidden());
            assert_eq!(forced.routes, Array::filled([2, router_heads, TOKENS], route));
            assert_eq!(forced.output, layer.projections.dense(&hidden(), reach));
        }
    }

    #[test]
    fn aha_routes_follow_the_sign_of_the_logit() {
        let layer = aha(HEADS, None);
        let routed = layer.forward(&hidden());
        let logits = linear(&hidden(), &layer.router_weight, None);
        assert_eq!(routed.routes, logits.map(|z| u8::from(z > 0.0)));
        let far = routed.routes.as_slice().iter().filter(|&&route| route == 1).count();
        assert!(0 < far && far < 2 * HEADS * TOKENS, "the sample should go both ways");
        assert_eq!(routed.scores.shape(), [2, HEADS, TOKENS]);
    }

    #[test]
    fn a_nan_token_spoils_itself_and_those_that_see_it() {
        let layer = aha(HEADS, Some(-1e3));
        let spoilt = Array::from_fn([2, TOKENS, HIDDEN], |i| if i[1] == 3 { f64::NAN } else { hidden()[i] });
        let (clean, spoilt) = (layer.forward(&hidden()), layer.forward(&spoilt));
        for [b, t] in indices([2, TOKENS]) {
            let sees = Reach::Window(window()).sees(t as i64, 3);
            let row = spoilt.output.row([b, t]);
            assert!(row.iter().all(|x| x.is_nan() == sees), "token {t}");
            assert!(sees || row == clean.output.row([b, t]));
            assert_eq!(spoilt.routes[[b, 0, t]], if t == 3 { INVALID_ROUTE } else { 0 });
        }
    }

    #[test]
    fn a_choice_of_two_with_one_logit_at_zero_is_aha() {
        let aha = aha(HEADS, None);
        let weight = Array::from_fn([HIDDEN, HEADS * 2], |[m, column]| match column % 2 {
            0 => 0.0,
            _ => aha.router_weight[[m, column / 2]],
        });
        let multi = MultiWindowLayer {
            projections: aha.projections.clone(),
            router_weight: weight,
            router_bias: None,
            windows: vec![window()],
        };
        let (multi, aha) = (multi.forward(&hidden()), aha.forward(&hidden()));
        assert_eq!(multi.routes, aha.routes);
        assert_eq!(multi.output, aha.output);
        for [b, h, t] in indices(aha.scores.shape()) {
            assert_abs_diff_eq!(multi.scores[[b, h, 1, t]], aha.scores[[b, h, t]], epsilon = 1e-12);
        }
    }

    #[rstest]
    #[case(0, Reach::Window(Window::aha(1).unwrap()))]
    #[case(1, Reach::Window(Window::aha(3).unwrap()))]
    #[case(2, Reach::All)]
    fn every_choice_is_its_own_window(#[case] choice: usize, #[case] reach: Reach) {
        // Router heads of K = 3 choices side by side, for one router head per kv head.
        let layer = MultiWindowLayer {
            projections: projections(1),
            router_weight: noise([HIDDEN, 2 * 3], 5),
            router_bias: Some(
                (0..2 * 3).map(|column| if column % 3 == choice { 1e3 } else { 0.0 }).collect(),
            ),
            windows: vec![Window::aha(1).unwrap(), Window::aha(3).unwrap()],
        };
        let forced = layer.forward(&hidden());
        assert_eq!(forced.routes, Array::filled([2, 2, TOKENS], choice as u8));
        assert_eq!(forced.output, layer.projections.dense(&hidden(), reach));
    }

    #[test]
    fn l2a_is_two_residual_sub_layers() {
        let layer = l2a();
        let u1 = rms_norm(&hidden(), &layer.local_norm, layer.epsilon);
        let x1 = add(&hidden(), &layer.local.dense(&u1, Reach::Window(layer.window)));
        let u2 = rms_norm(&x1, &layer.global_norm, layer.epsilon);
        let x2 = add(&x1, &layer.global.dense(&u2, Reach::All));

        let routed = layer.forward(&hidden());
        let mut ways = [0, 0];
        for [b, t] in indices([2, TOKENS]) {
            let route = usize::from(routed.routes[[b, 0, t]]);
            ways[route] += 1;
            // A gated-off token is left as the local sub-layer made it; the others attend over all tokens.
            assert_eq!(routed.output.row([b, t]), [&x1, &x2][route].row([b, t]));
        }
        assert!(ways[0] > 0 && ways[1] > 0, "the sample should go both ways");

        // A router at its zero initialisation attends everywhere.
        let zero = L2aLayer { router_weight: Array::filled([HIDDEN, 1], 0.0), ..layer };
        let attending = zero.forward(&hidden());
        assert_eq!(attending.output, x2);
        assert_eq!(attending.scores, Array::filled([2, 1, TOKENS], 0.5));
    }
}
