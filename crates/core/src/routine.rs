use core::fmt;

use crate::Element;

/// One way to run an operator. Later routines (tensor cores) join the list; callers that match on it need a
/// wildcard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Routine {
    /// Plain vector arithmetic: no planes, no shared memory, no synchronisation. Runs on every runtime.
    Portable,
}

impl Routine {
    /// Every routine, fastest first.
    pub const ALL: [Routine; 1] = [Routine::Portable];
}

impl fmt::Display for Routine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Routine::Portable => "portable",
        })
    }
}

/// Why a routine cannot run a problem on a device. Answered on the host, without a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Refusal {
    /// The device cannot compute with this element type.
    Element {
        /// What the problem asks for.
        element: Element,
        /// What the device has.
        device: Vec<Element>,
    },
    /// No kernel for this head dim.
    HeadDim {
        /// `head_dim` or `value_dim` of the problem.
        head_dim: usize,
        /// What the routine takes, in words.
        supported: &'static str,
    },
    /// The operator has no kernel of this routine.
    NotImplemented,
    /// The device lacks integer atomics, which counting routes needs.
    Atomics,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Element { element, device } => {
                let device: Vec<String> = device.iter().map(ToString::to_string).collect();
                write!(f, "the device has no {element} arithmetic (it has {})", device.join(", "))
            }
            Refusal::HeadDim { head_dim, supported } => {
                write!(f, "head dim {head_dim} is not supported (expected {supported})")
            }
            Refusal::NotImplemented => f.write_str("the operator has no such kernel"),
            Refusal::Atomics => f.write_str("the device has no u32 atomic addition"),
        }
    }
}

/// The refusals of all routines of an operator: what [`Error::Refused`](crate::Error::Refused) carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusals(pub Vec<(Routine, Refusal)>);

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (routine, refusal)) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{routine}: {refusal}")?;
        }
        Ok(())
    }
}
