//! What the cases compute and move at the least, counted from their routes.

use bifocal::{AttentionOperator, Problem, Rattention, Reach};

use super::{
    cases::CaseName,
    operators::{Bench, Set},
};

impl Bench<'_> {
    /// 4 D floating-point operations for every pair of a query and a key that it sees by its route; for its gradients
    /// 10 D more: the score again, and the gradients of weight, query, key and value.
    pub(super) fn useful_flop(&self, case: CaseName) -> Option<f64> {
        let Problem { batch, heads, query_len, key_len, .. } = self.problem;
        let near = Reach::Window(self.window);
        let pairs = |reach: Reach, token: usize| reach.visible(self.problem.position(token), key_len) as f64;
        let sum = |per_row: &dyn Fn(u32, u32) -> f64| -> f64 {
            (0..batch * heads)
                .flat_map(|row| (0..query_len).map(move |token| (row as u32, token as u32)))
                .map(|(row, token)| per_row(row, token))
                .sum()
        };
        let full = || sum(&|_, token| pairs(Reach::All, token as usize));
        let by_route = || {
            sum(&|row, token| {
                let far = self.by_head.route_of(row, token) == 1;
                pairs(if far { Reach::All } else { near }, token as usize)
            })
        };
        let computed = match case {
            CaseName::Router | CaseName::Plan | CaseName::Moments | CaseName::MomentsPortable => return None,
            CaseName::Linear | CaseName::LinearPortable => return Some(self.linear_flop()),
            CaseName::Windowed | CaseName::Rattention => sum(&|_, token| pairs(near, token as usize)),
            CaseName::Full => full(),
            CaseName::Aha => by_route(),
            // What the window sees, full attention sees as well.
            CaseName::AhaExact => full(),
            CaseName::L2a => sum(&|row, token| {
                let far = self.by_token.route_of(row / heads as u32, token) == 1;
                if far { pairs(Reach::All, token as usize) } else { 0.0 }
            }),
            CaseName::Qada => sum(&|row, token| {
                let far = self.decided[row as usize * query_len + token as usize] == 1;
                pairs(if far { Reach::All } else { self.qada.near().reach() }, token as usize)
            }),
        };
        let differentiated = match case {
            _ if !self.options.backward => 0.0,
            CaseName::AhaExact => by_route(),
            _ => computed,
        };
        let per_pair = 2.0 * (self.problem.head_dim + self.problem.value_dim) as f64;
        let flop = per_pair * (computed + 2.5 * differentiated);
        Some(if case == CaseName::Rattention { flop + self.linear_flop() } else { flop })
    }

    /// A multiplication and an addition for every number of the state, for each key that leaves the window, and for each row
    /// that meets one. Going back there are five more: the states once again, their gradients and those of queries by row,
    /// and those of keys and values by key. Feature maps and norms are not counted.
    fn linear_flop(&self) -> f64 {
        let Problem { batch, heads, kv_heads, query_len, key_len, value_dim, .. } = self.problem;
        let far = Rattention::new(self.window).far();
        let state = far.state_shape(&self.problem)[2] * value_dim;
        let meets = |token: &usize| far.reach().visible(self.problem.position(*token), key_len) > 0;
        let rows = batch * heads * (0..query_len).filter(meets).count();
        let keys = batch * kv_heads * key_len.saturating_sub(self.window.keys() as usize);
        let pairs = match self.options.backward {
            false => rows + keys,
            true => rows + keys + (keys + 2 * rows + 2 * keys),
        };
        2.0 * state as f64 * pairs as f64
    }

    /// The share of routes that came out far, where a case has routes.
    pub(super) fn far_share(&self, case: CaseName) -> Option<f64> {
        let (router, heads) = match case {
            CaseName::Plan | CaseName::Aha | CaseName::AhaExact => (&self.by_head, self.problem.heads),
            CaseName::L2a => (&self.by_token, 1),
            CaseName::Moments | CaseName::MomentsPortable | CaseName::Qada => {
                let far = self.decided.iter().filter(|&&route| route == 1).count();
                return Some(far as f64 / self.decided.len() as f64);
            }
            CaseName::Windowed
            | CaseName::Full
            | CaseName::Router
            | CaseName::Linear
            | CaseName::LinearPortable
            | CaseName::Rattention => return None,
        };
        let (rows, tokens) = ((self.problem.batch * heads) as u32, self.problem.query_len as u32);
        let far = (0..rows)
            .flat_map(|row| (0..tokens).map(move |token| (row, token)))
            .filter(|&(row, token)| router.route_of(row, token) == 1)
            .count();
        Some(far as f64 / f64::from(rows) / f64::from(tokens))
    }

    /// Every input read once and every output written once. What only passes between kernels, like a plan inside of
    /// AHA, does not count.
    pub(super) fn useful_bytes(&self, case: CaseName) -> usize {
        let size = |shape: &[usize]| shape.iter().product::<usize>();
        let Problem { batch, heads, query_len, element, .. } = self.problem;
        let Set { query, key, value, hidden, .. } = &self.sets[0];
        let inputs = size(&query.shape()) + size(&key.shape()) + size(&value.shape());
        let out = size(&self.problem.out_shape());
        let mut attention =
            (inputs + out) * element.size() + size(&self.problem.lse_shape()) * size_of::<f32>();
        if self.options.backward {
            // Once more all of that and the outputs' gradients, and the gradients of the inputs in f32.
            attention += attention + out * element.size() + inputs * size_of::<f32>();
        }
        let routes = |heads: usize| batch * heads * query_len;
        match case {
            CaseName::Windowed | CaseName::Full => attention,
            CaseName::Router => {
                let weight = self.options.shape.model_dim * heads;
                let scores = routes(heads) * size_of::<f32>();
                (size(&hidden.shape()) + weight) * element.size() + scores + routes(heads)
            }
            // A row in some list for every route.
            CaseName::Plan => routes(heads) + routes(heads) * size_of::<u32>(),
            CaseName::Aha => attention + routes(heads),
            // A gradient in f32 for every gate.
            CaseName::AhaExact if self.options.backward => attention + 5 * routes(heads),
            CaseName::AhaExact => attention + routes(heads),
            CaseName::L2a => attention + routes(1),
            CaseName::Moments | CaseName::MomentsPortable => {
                let masses = 2 * routes(heads) * size_of::<f32>();
                (size(&query.shape()) + size(&key.shape())) * element.size() + masses + routes(heads)
            }
            CaseName::Qada => attention,
            CaseName::Linear | CaseName::LinearPortable => {
                let far = inputs * element.size() + out * size_of::<f32>();
                let state = size(&Rattention::new(self.window).far().state_shape(&self.problem));
                let backward = inputs * (element.size() + size_of::<f32>()) + out * element.size();
                far + state * size_of::<f32>() + if self.options.backward { backward } else { 0 }
            }
            // Both branches read the same queries and keys here, as without rotary positions.
            CaseName::Rattention => attention,
        }
    }
}
