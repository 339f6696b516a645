use bifocal_burn::Routing;

use crate::{KindShare, Result, TokenKind, metrics::FarShares, model::far};

/// Counts who looks far, by layer, head and kind of token.
pub(crate) struct Tally {
    /// Per layer and head: tokens, and those that look far.
    heads: Vec<Vec<[u64; 2]>>,
    /// Per kind of [`TokenKind::ALL`]: tokens, token-heads of all layers, and those of them that look far.
    kinds: [[u64; 3]; TokenKind::ALL.len()],
}

impl Tally {
    pub(crate) fn new(layers: usize) -> Self {
        Self { heads: vec![Vec::new(); layers], kinds: Default::default() }
    }

    /// Adds a pass over windows of `length` tokens, row-major, whose last token is only a target.
    pub(crate) fn add(&mut self, tokens: &[i32], length: usize, routings: &[Option<Routing>]) -> Result<()> {
        let rows: Vec<Vec<usize>> = tokens.chunks(length).map(|row| kinds(&row[..length - 1])).collect();
        rows.iter().flatten().for_each(|&kind| self.kinds[kind][0] += 1);
        for (counts, routing) in self.heads.iter_mut().zip(routings) {
            let Some(routing) = routing else { continue };
            let [_, heads, inputs] = routing.shape();
            counts.resize(heads, [0; 2]);
            for (row, routes) in far(routing)?.chunks(inputs).enumerate() {
                for (&far, &kind) in routes.iter().zip(&rows[row / heads]) {
                    let count = &mut counts[row % heads];
                    count[0] += 1;
                    count[1] += u64::from(far);
                    self.kinds[kind][1] += 1;
                    self.kinds[kind][2] += u64::from(far);
                }
            }
        }
        Ok(())
    }

    /// Shares per layer and head.
    pub(crate) fn far(&self) -> FarShares {
        let share = |&[tokens, far]: &[u64; 2]| far as f64 / tokens as f64;
        let layers = self.heads.iter();
        layers.map(|heads| (!heads.is_empty()).then(|| heads.iter().map(share).collect())).collect()
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
        let mut tally = Tally::new(3);
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
    }

    #[test]
    fn a_model_without_routers_has_no_shares() {
        let mut tally = Tally::new(2);
        tally.add(&[1, 2, 3], 3, &[None, None]).unwrap();
        assert_eq!((tally.far(), tally.kinds()), (vec![None, None], vec![]));
    }
}
