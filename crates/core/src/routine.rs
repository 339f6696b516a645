use core::fmt;

use crate::{Element, FeatureMap};

/// One way to run an operator. Later routines join the list; callers that match on it need a wildcard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Routine {
    /// Hopper's warpgroup products, fed by bulk copies. f16 and bf16.
    Wgmma,
    /// Products of a warp on tensor cores, fed by asynchronous copies: NVIDIA GPUs since Ampere. f16 and bf16.
    Mma,
    /// Plain vector arithmetic: no planes, no shared memory, no synchronisation. Runs on every runtime.
    Portable,
}

impl Routine {
    /// Every routine, fastest first.
    pub const ALL: [Routine; 3] = [Routine::Wgmma, Routine::Mma, Routine::Portable];
}

impl core::str::FromStr for Routine {
    type Err = crate::Error;

    /// Reads a routine's name as [`Display`](fmt::Display) writes it.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let names = Self::ALL.map(|routine| routine.to_string()).join(", ");
        let found = Self::ALL.into_iter().find(|routine| routine.to_string() == name);
        found.ok_or_else(|| crate::Error::option("routine", name, format!("one of {names}")))
    }
}

impl fmt::Display for Routine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Routine::Wgmma => "wgmma",
            Routine::Mma => "mma",
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
    /// The routine needs another kind of device.
    Architecture {
        /// Which kind, in words.
        needs: &'static str,
    },
    /// The routine has no kernel for capped scores.
    Softcap,
    /// The routine has no kernel for a state that decays.
    Decay,
    /// The routine has no kernel for this feature map.
    FeatureMap {
        /// The map.
        map: FeatureMap,
    },
    /// The softmax scale is not positive.
    Scale {
        /// The scale.
        scale: String,
    },
    /// The routine cannot read or write memory that is laid out like this.
    Layout {
        /// The tensor.
        tensor: &'static str,
        /// What it has that the routine does not take.
        layout: &'static str,
    },
    /// The problem asks for another routine (see [`Problem::with_routine`](crate::Problem::with_routine)).
    NotAsked,
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
            Refusal::Architecture { needs } => write!(f, "it needs {needs}"),
            Refusal::Softcap => f.write_str("it has no kernel for capped scores"),
            Refusal::Decay => f.write_str("it has no kernel for a state that decays"),
            Refusal::FeatureMap { map } => write!(f, "it has no kernel for the feature map {map}"),
            Refusal::Scale { scale } => write!(f, "softmax scale {scale} is not positive"),
            Refusal::Layout { tensor, layout } => write!(f, "{tensor} has {layout}"),
            Refusal::NotAsked => f.write_str("another routine was asked for"),
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
