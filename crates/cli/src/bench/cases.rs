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
    /// The same by the portable routine.
    MomentsPortable,
    /// QAdA, decision, plan and merge included, with sinks, and with the threshold that sends the share of token-heads far.
    Qada,
    /// RATTENTION's far branch alone: linear attention beyond the window.
    Linear,
    /// The same by the portable routine.
    LinearPortable,
    /// RATTENTION: the window, linear attention beyond it, and the sum of their norms.
    Rattention,
}

/// What is timed unless cases are given.
pub(super) const CASES: [CaseName; 11] = [
    CaseName::Windowed,
    CaseName::Full,
    CaseName::Router,
    CaseName::Plan,
    CaseName::Aha,
    CaseName::AhaExact,
    CaseName::L2a,
    CaseName::Moments,
    CaseName::Qada,
    CaseName::Linear,
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
            CaseName::MomentsPortable => "moments-portable",
            CaseName::Qada => "qada",
            CaseName::Linear => "linear",
            CaseName::LinearPortable => "linear-portable",
            CaseName::Rattention => "rattention",
        }
    }

    /// Whether moments of keys decide something.
    pub(super) fn knows_moments(self) -> bool {
        matches!(self, CaseName::Moments | CaseName::MomentsPortable | CaseName::Qada)
    }

    /// Whether the far branch of RATTENTION is in it.
    pub(super) fn has_states(self) -> bool {
        matches!(self, CaseName::Linear | CaseName::LinearPortable | CaseName::Rattention)
    }

    /// Whether it is the portable routine's, whatever routine is asked for.
    pub(super) fn is_portable(self) -> bool {
        matches!(self, CaseName::MomentsPortable | CaseName::LinearPortable)
    }

    /// Whether it is attention, which has gradients.
    pub(super) fn attends(self) -> bool {
        !matches!(self, CaseName::Router | CaseName::Plan | CaseName::Moments | CaseName::MomentsPortable)
    }
}
