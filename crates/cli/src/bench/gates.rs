//! How the routes of a benchmark are drawn.

use bifocal::RandomRouter;
use clap::ValueEnum;

/// Tokens of a burst of clustered gates.
const BURST: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Gates {
    /// Every token-head on its own.
    Random,
    /// In bursts of 64 tokens.
    Clustered,
    /// Two heads always far, the others seldom, so that the share is kept; L2A's gate, which has one head, is random.
    Skewed,
}

impl Gates {
    pub(super) fn name(self) -> &'static str {
        match self {
            Gates::Random => "random",
            Gates::Clustered => "clustered",
            Gates::Skewed => "skewed",
        }
    }

    /// The gates of `heads` router heads.
    pub(super) fn router(self, heads: usize, far_share: f64, seed: u32) -> bifocal::Result<RandomRouter> {
        match self {
            Gates::Random => RandomRouter::gate(heads, far_share, seed),
            Gates::Clustered => RandomRouter::gate(heads, far_share, seed)?.with_bursts(BURST),
            Gates::Skewed if heads == 1 => RandomRouter::gate(heads, far_share, seed),
            Gates::Skewed => RandomRouter::skewed_gate(heads, far_share, seed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_keep_the_share_whatever_their_shape() {
        for gates in [Gates::Random, Gates::Clustered, Gates::Skewed] {
            let router = gates.router(16, 0.116, 1).unwrap();
            let far = |head| (0..20_000).filter(|&token| router.route_of(head, token) == 1).count();
            let by_head: Vec<usize> = (0..16).map(far).collect();
            let share = by_head.iter().sum::<usize>() as f64 / 320_000.0;
            assert!((share - 0.116).abs() < 0.01, "{}: {share}", gates.name());
            let always = by_head.iter().filter(|&&far| far == 20_000).count();
            assert_eq!(always, if gates == Gates::Skewed { 1 } else { 0 }, "{}", gates.name());
            let flips = (1..20_000).filter(|&t| router.route_of(1, t) != router.route_of(1, t - 1)).count();
            assert_eq!(flips < 20_000 / 64, gates == Gates::Clustered, "{}: {flips} flips", gates.name());
        }
        assert!(Gates::Skewed.router(16, 0.01, 1).is_err());
        assert_eq!(Gates::Skewed.router(1, 0.2, 2), Gates::Random.router(1, 0.2, 2));
    }
}
