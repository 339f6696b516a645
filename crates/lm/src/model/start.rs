//! Initial weights: the same on every device, and for the same seed the same in every kind of attention that has them.

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Tensor, TensorData},
};

use super::{Decoder, path::Path};
use crate::draws::{Draws, Purpose, hash};

/// Standard deviation of a weight; of what is added to the residual stream it is divided by the root of the number of
/// additions (GPT-2, Radford et al. 2019, section 2.3).
const DEVIATION: f64 = 0.02;

/// Draws every matrix, except for L2A's routers, which start at zero; norms and biases stay as they are.
pub(super) fn draw(decoder: Decoder, seed: u64) -> Decoder {
    let additions = 2.0 * decoder.layers.len() as f64;
    decoder.map(&mut Start { path: Path::default(), seed, additions })
}

struct Start {
    path: Path,
    seed: u64,
    additions: f64,
}

impl ModuleMapper for Start {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.exit(container);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if D != 2 || self.path.ends_with("L2a", "router.weight") {
            return param;
        }
        let name = self.path.name();
        let added = ["o_proj.weight", "down.weight"].iter().any(|end| name.ends_with(end));
        let deviation = if added { DEVIATION / self.additions.sqrt() } else { DEVIATION };
        // A uniform distribution over [-a, a] has the deviation a / sqrt(3).
        let bound = deviation * 3f64.sqrt();
        let mut draws = Draws::new(self.seed, Purpose::Weights, &[hash(&name)]);
        let shape = param.lazy_shape();
        let values: Vec<f32> =
            (0..shape.num_elements()).map(|_| ((2.0 * draws.unit() - 1.0) * bound) as f32).collect();
        let device = param.lazy_device();
        Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), (&device, DType::F32)))
    }
}
