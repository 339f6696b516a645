//! How operations join Burn's autodiff graph.

use core::{fmt::Debug, marker::PhantomData};

use bifocal::{Error, Result};
use burn::{
    backend::{
        Autodiff, Backend, DispatchKindConversion, DispatchTensor,
        autodiff::{
            NodeId,
            checkpoint::{base::Checkpointer, strategy::NoCheckpointing},
            grads::Gradients,
            ops::{Backward, NodeGuard, Ops, OpsKind},
        },
        tensor::FloatTensor,
    },
    tensor::{GradientCheckpointingStrategy, Tensor},
};

/// What an operation keeps for its backward pass, and that pass.
pub(crate) trait Differentiable: Clone + Debug + Send + 'static {
    /// The gradients of the inputs, in their order, shapes and element types. No tensor here has autodiff.
    fn backward(self, inputs: Vec<Tensor<4>>, d_out: Tensor<4>) -> Result<Vec<Tensor<4>>>;
}

/// Makes `output`, which has no autodiff, what `operation` made of `inputs` on the backend B.
///
/// The inputs are checkpointed: under Burn's gradient checkpointing those that are cheap to compute are computed again.
pub(crate) fn record<B, T, const N: usize>(
    inputs: [Tensor<4>; N],
    output: Tensor<4>,
    operation: T,
) -> Result<Tensor<4>>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
    T: Differentiable,
{
    let mut tracked: Vec<FloatTensor<Autodiff<B>>> = Vec::with_capacity(N);
    for input in inputs {
        // Strategies differ in the type that Burn looks for, not in the graph.
        let input =
            input.autodiff().with_gradient_checkpointing_strategy(GradientCheckpointingStrategy::Disabled);
        tracked.push(input.try_into_primitive::<Autodiff<B>>().map_err(runtime)?);
    }
    let output = output.try_into_primitive::<B>().map_err(runtime)?;
    let nodes: [NodeGuard; N] = core::array::from_fn(|at| tracked[at].node());
    let step = Step::<T>(PhantomData);
    let prepared = <Step<T> as Backward<B, N>>::prepare::<NoCheckpointing>(step, nodes);
    let output = match prepared.compute_bound().stateful() {
        OpsKind::Tracked(mut prepared) => {
            let inputs = core::array::from_fn(|at| prepared.checkpoint(&tracked[at]));
            prepared.finish((operation, inputs), output)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(output),
    };
    Ok(Tensor::from_primitive::<Autodiff<B>>(output))
}

/// A node of Burn's graph.
#[derive(Debug)]
struct Step<T>(PhantomData<T>);

impl<B, T, const N: usize> Backward<B, N> for Step<T>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
    T: Differentiable,
{
    type State = (T, [NodeId; N]);

    /// # Panics
    /// When the runtime fails: Burn's backward passes return no errors.
    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (operation, inputs) = ops.state;
        let read = |id: NodeId| checkpointer.retrieve_node_output::<FloatTensor<B>>(id);
        let inputs = inputs.map(read).map(Tensor::<4>::from_primitive::<B>);
        let d_out = Tensor::<4>::from_primitive::<B>(grads.consume::<B>(&ops.node));
        let gradients = operation
            .backward(inputs.to_vec(), d_out)
            .unwrap_or_else(|error| panic!("a backward pass failed: {error}"));
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            // Inputs that are not tracked have no node.
            if let Some(parent) = parent {
                let gradient = gradient.try_into_primitive::<B>();
                grads.register::<B>(parent.id, gradient.expect("gradients live where the inputs do"));
            }
        }
    }
}

fn runtime(error: impl Debug) -> Error {
    Error::Runtime(format!("{error:?}"))
}
