//! What `bifocal bench` can time.

use clap::ValueEnum;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum CaseName {
    /// The window, every row.
    Windowed,
    /// Full attention, every row.
    Full,
    /// The linear gate of every head: scores, routes and counts.
    Router,
    /// The dispatch plan of head-wise routes.
    Plan,
    /// AHA by head-wise routes, its plan included.
    Aha,
    /// AHA as it trains: every row by both branches; with --backward the gradient of every gate as well.
    AhaExact,
    /// L2A's global branch by token-wise routes, its plan included.
    L2a,
    /// QAdA's decision: moments of keys, and what they say of every row.
    Moments,
    /// QAdA, decision, plan and merge included, with sinks, and with the threshold that sends the share of token-heads far.
    Qada,
    /// RATTENTION: the window, linear attention beyond it, and the sum of their norms.
    Rattention,
}

pub(super) const CASES: [CaseName; 10] = [
    CaseName::Windowed,
    CaseName::Full,
    CaseName::Router,
    CaseName::Plan,
    CaseName::Aha,
    CaseName::AhaExact,
    CaseName::L2a,
    CaseName::Moments,
    CaseName::Qada,
    CaseName::Rattention,
];

impl CaseName {
    pub(super) fn name(self) -> &'static str {
        match self {
            CaseName::Windowed => "windowed",
            CaseName::Full => "full",
            CaseName::Router => "router",
            CaseName::Plan => "plan",
            CaseName::Aha => "aha",
            CaseName::AhaExact => "aha-exact",
            CaseName::L2a => "l2a",
            CaseName::Moments => "moments",
            CaseName::Qada => "qada",
            CaseName::Rattention => "rattention",
        }
    }

    /// Whether moments of keys decide something.
    pub(super) fn knows_moments(self) -> bool {
        matches!(self, CaseName::Moments | CaseName::Qada)
    }

    /// Whether it is attention, which has gradients.
    pub(super) fn attends(self) -> bool {
        !matches!(self, CaseName::Router | CaseName::Plan | CaseName::Moments)
    }
}
