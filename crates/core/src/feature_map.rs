use core::fmt;

/// What linear attention makes of a query or a key before the two meet: `phi` in `phi(q) . phi(k)`, over the head dim.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FeatureMap {
    /// `[softmax(x); softmax(-x)]` (RATTENTION, arXiv 2506.15545; written out in its code).
    #[default]
    SoftmaxPair,
    /// `[max(x, 0); max(-x, 0)]` (the same code's alternative).
    ReluPair,
    /// `x` (a control in the paper's ablation).
    Identity,
}

impl FeatureMap {
    /// Every feature map.
    pub const ALL: [FeatureMap; 3] = [FeatureMap::SoftmaxPair, FeatureMap::ReluPair, FeatureMap::Identity];

    /// How often the head dim comes up in the features: 2 for maps that look at `x` and at `-x`.
    pub const fn halves(self) -> usize {
        match self {
            FeatureMap::SoftmaxPair | FeatureMap::ReluPair => 2,
            FeatureMap::Identity => 1,
        }
    }

    /// Features of a vector of `head_dim` numbers.
    pub const fn features(self, head_dim: usize) -> usize {
        self.halves().saturating_mul(head_dim)
    }
}

impl fmt::Display for FeatureMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            FeatureMap::SoftmaxPair => "softmax",
            FeatureMap::ReluPair => "relu",
            FeatureMap::Identity => "identity",
        })
    }
}
