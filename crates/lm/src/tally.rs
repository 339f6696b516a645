use bifocal_burn::Routing;

use crate::{AttentionKind, KindShare, ModelConfig, Result, TokenKind, metrics::FarShares, model::routes};

/// Counts who looks where, by layer, head and kind of token, and how many keys are seen.
pub(crate) struct Tally {
    layers: Vec<Layer>,
    /// Per kind of [`TokenKind::ALL`]: tokens, token-heads of all layers, and those of them that look far.
    kinds: [[u64; 3]; TokenKind::ALL.len()],
}

struct Layer {
    attention: AttentionKind,
    /// Per head: tokens, and those that look far.
    heads: Vec<[u64; 2]>,
    /// Token-heads by route.
    routes: Vec<u64>,
    /// Token-heads, and keys that they see; `None` once a route does not say.
    keys: Option<[u64; 2]>,
}

impl Tally {
    pub(crate) fn new(model: &ModelConfig) -> Self {
        let layer = |index| Layer {
            attention: model.attention_of(index).clone(),
            heads: Vec::new(),
            routes: Vec::new(),
            keys: Some([0; 2]),
        };
        Self { layers: (0..model.layers).map(layer).collect(), kinds: Default::default() }
    }

    /// Adds a pass over windows of `length` tokens, row-major, whose last token is only a target.
    pub(crate) fn add(&mut self, tokens: &[i32], length: usize, routings: &[Option<Routing>]) -> Result<()> {
        let rows: Vec<Vec<usize>> = tokens.chunks(length).map(|row| kinds(&row[..length - 1])).collect();
        rows.iter().flatten().for_each(|&kind| self.kinds[kind][0] += 1);
        for (layer, routing) in self.layers.iter_mut().zip(routings) {
            let Some(routing) = routing else {
                rows.iter().for_each(|row| layer.see(&vec![0; row.len()]));
                continue;
            };
            let [_, heads, inputs] = routing.shape();
            layer.heads.resize(heads, [0; 2]);
            layer.routes.resize(routing.reaches(), 0);
            for (row, routes) in routes(routing)?.chunks(inputs).enumerate() {
                layer.see(routes);
                for (&route, &kind) in routes.iter().zip(&rows[row / heads]) {
                    let route = usize::from(route);
                    let far = u64::from(route + 1 == routing.reaches());
                    let head = &mut layer.heads[row % heads];
                    layer.routes[route] += 1;
                    head[0] += 1;
                    head[1] += far;
                    self.kinds[kind][1] += 1;
                    self.kinds[kind][2] += far;
                }
            }
        }
        Ok(())
    }

    /// Shares per layer and head.
    pub(crate) fn far(&self) -> FarShares {
        let share = |&[tokens, far]: &[u64; 2]| far as f64 / tokens as f64;
        let layers = self.layers.iter().map(|layer| &layer.heads);
        layers.map(|heads| (!heads.is_empty()).then(|| heads.iter().map(share).collect())).collect()
    }

    /// Shares per layer and route.
    pub(crate) fn routes(&self) -> Vec<Option<Vec<f64>>> {
        let shares = |routes: &Vec<u64>| {
            let all: u64 = routes.iter().sum();
            (all > 0).then(|| routes.iter().map(|&rows| rows as f64 / all as f64).collect())
        };
        self.layers.iter().map(|layer| shares(&layer.routes)).collect()
    }

    /// Keys that a query sees: the mean over layers of the mean over their heads and tokens.
    pub(crate) fn keys(&self) -> Option<f64> {
        let mean = |layer: &Layer| layer.keys.map(|[rows, keys]| keys as f64 / rows as f64);
        let layers: Option<Vec<f64>> = self.layers.iter().map(mean).collect();
        layers.map(|means| means.iter().sum::<f64>() / means.len() as f64)
    }

    /// Shares per kind of token, of kinds that were seen; none without routers.
    pub(crate) fn kinds(&self) -> Vec<KindShare> {
        let kinds = TokenKind::ALL.into_iter().zip(self.kinds);
        let seen = kinds.filter(|(_, [_, token_heads, _])| *token_heads > 0);
        let share = |(kind, [tokens, token_heads, far]): (TokenKind, [u64; 3])| KindShare {
            kind,
            tokens,
            far: far as f64 / token_heads as f64,
        };
        seen.map(share).collect()
    }
}

impl Layer {
    /// Counts the keys of one sequence's queries, from its first token on.
    fn see(&mut self, routes: &[u8]) {
        for (position, &route) in routes.iter().enumerate() {
            let keys = self.attention.keys(route, position);
            self.keys = self.keys.zip(keys).map(|([rows, sum], keys)| [rows + 1, sum + keys as u64]);
        }
    }
}

/// The place of each token's kind in [`TokenKind::ALL`].
fn kinds(tokens: &[i32]) -> Vec<usize> {
    let place = |&token: &i32| TokenKind::ALL.iter().position(|&kind| kind == TokenKind::of(token));
    // Every token has a kind.
    tokens.iter().filter_map(place).collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, Int, Tensor, TensorData};

    use super::*;

    fn routing(routes: [i32; 8], shape: [usize; 3]) -> Routing {
        let data = TensorData::new(routes.to_vec(), shape);
        Routing::from_routes(Tensor::<3, Int>::from_data(data, (&Device::flex(), DType::I32)), 2).unwrap()
    }

    #[test]
    fn heads_and_kinds_are_counted_alike() {
        let mut model = ModelConfig { layers: 3, ..ModelConfig::default() };
        model.attention =
            vec![AttentionKind::Aha { window: 1 }, AttentionKind::Full, AttentionKind::Window { window: 1 }];
        let mut tally = Tally::new(&model);
        // Two windows of two tokens and a target each.
        let tokens: Vec<i32> = "a1b2 c".bytes().map(i32::from).collect();
        let by_head = routing([1, 0, 0, 0, 1, 1, 0, 1], [2, 2, 2]);
        tally.add(&tokens, 3, &[Some(by_head), None, None]).unwrap();
        assert_eq!(tally.far(), [Some(vec![0.75, 0.25]), None, None]);
        let share = |kind, tokens, far| KindShare { kind, tokens, far };
        let expected = [
            share(TokenKind::Letter, 1, 0.5),
            share(TokenKind::Digit, 2, 0.25),
            share(TokenKind::Space, 1, 1.0),
        ];
        assert_eq!(tally.kinds(), expected);
        assert_eq!(tally.routes(), [Some(vec![0.5, 0.5]), None, None]);
        // Two of the far ones are not the first of their window, and see two keys.
        assert_eq!(tally.keys(), Some((10.0 / 8.0 + 1.5 + 1.0) / 3.0));
    }

    #[test]
    fn a_model_without_routers_has_no_shares() {
        let mut model =
            ModelConfig { layers: 2, attention: vec![AttentionKind::Full], ..ModelConfig::default() };
        let mut tally = Tally::new(&model);
        tally.add(&[1, 2, 3], 3, &[None, None]).unwrap();
        assert_eq!((tally.far(), tally.kinds(), tally.keys()), (vec![None, None], vec![], Some(1.5)));
        model.attention = vec![AttentionKind::Full, AttentionKind::Custom { name: "unknown".into() }];
        let mut tally = Tally::new(&model);
        tally.add(&[1, 2, 3], 3, &[None, None]).unwrap();
        assert_eq!(tally.keys(), None, "a layer from outside does not say");
    }
}
