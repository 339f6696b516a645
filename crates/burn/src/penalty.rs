use bifocal::{Error, MultiWindow, Reach, Result, Window};
use burn::tensor::{DType, Tensor, TensorData};

use crate::Routing;

/// AHA's penalty (arXiv 2512.22562): the mean score of looking far. The last token of each sequence does not count, as
/// it has no label (code of AHNSA, by AHA's authors). The paper's loss has the mean over layers times 3e-4.
///
/// # Errors
/// [`Error::Option`] for routes without scores; [`Error::Shape`] for the scores of a choice, which have
/// [`cost_penalty`]; [`Error::Runtime`].
pub fn mean_penalty(routing: &Routing) -> Result<Tensor<1>> {
    Ok(mean_but_the_last(gate_scores(routing)?))
}

/// L2A's penalty (arXiv 2603.17484, its code): the sum over tokens of the scores' squares, as a mean over sequences and
/// router heads. The paper has one router head, and its loss the mean over layers times a factor that is 0 at first and
/// then rises to 1e-8.
///
/// # Errors
/// As [`mean_penalty`].
pub fn squared_penalty(routing: &Routing) -> Result<Tensor<1>> {
    let scores = gate_scores(routing)?;
    let [batch, router_heads, ..] = scores.dims();
    Ok(scores.powi_scalar(2).sum().div_scalar((batch * router_heads) as f32))
}

/// The penalty on a choice among several windows and full attention: the mean of `sum over k of p_k c_k`, where the
/// cost `c_k` is how many keys the reach shows the token, relative to full attention. Tokens count from the first
/// position, and the last of each sequence does not count, as in [`mean_penalty`].
///
/// # Errors
/// [`Error::Option`] for routes without scores and for windows that do not ascend; [`Error::Shape`] when there is not one
/// score per window and one more; [`Error::Runtime`].
pub fn cost_penalty(routing: &Routing, windows: &[Window]) -> Result<Tensor<1>> {
    MultiWindow::new(windows)?;
    let scores = scores(routing)?;
    let [.., choices, tokens] = scores.dims();
    if choices != windows.len() + 1 {
        let expected = format!("[B, R, {}, T]", windows.len() + 1);
        return Err(Error::shape("the scores", expected, &scores.dims()));
    }
    let mut costs = Vec::with_capacity(choices * tokens);
    for reach in windows.iter().map(|&window| Reach::Window(window)).chain([Reach::All]) {
        let visible = |reach: Reach, position| reach.visible(position, tokens) as f32;
        costs.extend((0..tokens as i64).map(|at| visible(reach, at) / visible(Reach::All, at)));
    }
    let costs = TensorData::new(costs, [1, 1, choices, tokens]);
    let costs = Tensor::<4>::from_data(costs, (routing.device(), DType::F32));
    Ok(mean_but_the_last((scores * costs).sum_dim(2)))
}

/// The scores `[B, R, K, T]` of a router that has any.
fn scores(routing: &Routing) -> Result<Tensor<4>> {
    let missing = || Error::option("the routing", "without scores", "a linear router's");
    routing.scores()?.ok_or_else(missing)
}

/// The scores `[B, R, 1, T]` of a gate.
fn gate_scores(routing: &Routing) -> Result<Tensor<4>> {
    let scores = scores(routing)?;
    match scores.dims() {
        [_, _, 1, _] => Ok(scores),
        dims => Err(Error::shape("the scores", "[B, R, 1, T], a gate's", &dims)),
    }
}

/// The mean of `[B, R, 1, T]` over all but the last token; 0 for sequences of one.
fn mean_but_the_last(scores: Tensor<4>) -> Tensor<1> {
    let [.., tokens] = scores.dims();
    match tokens - 1 {
        0 => Tensor::zeros([1], (&scores.device(), DType::F32)),
        counted => scores.narrow(3, 0, counted).mean(),
    }
}
