use bifocal_core::Reach;
use cubecl::prelude::*;

/// The compile-time part of a [`Reach`]: which ranges of keys a tile visits and which comparison masks a score.
/// The numbers (window, sinks) are run-time scalars.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Visibility {
    /// `j <= i`.
    All,
    /// `i - n < j <= i`.
    Window,
    /// `j <= i` and (`j < sinks` or `j > i - n`).
    SinksAndWindow,
    /// `sinks <= j <= i - n`.
    Far,
    /// Every `j`: as `All`, where every row stands at the last key.
    NonCausal,
}

impl Visibility {
    /// The kind of a reach with its numbers, `(kind, window, sinks)`, clamped to `key_len`: a longer window sees
    /// no more, and clamped numbers keep the kernel's position arithmetic inside an i32.
    pub(crate) fn of(reach: Reach, key_len: usize) -> Option<(Self, i32, i32)> {
        let clamp = |n: u32| n.min(key_len as u32) as i32;
        Some(match reach {
            Reach::All => (Visibility::All, clamp(u32::MAX), 0),
            Reach::Window(window) => (Visibility::Window, clamp(window.keys()), 0),
            Reach::SinksAndWindow { sinks, window } => {
                (Visibility::SinksAndWindow, clamp(window.keys()), clamp(sinks))
            }
            Reach::Far { sinks, window } => (Visibility::Far, clamp(window.keys()), clamp(sinks)),
            Reach::NonCausal => (Visibility::NonCausal, clamp(u32::MAX), 0),
            _ => return None,
        })
    }
}

/// The keys between which a row's reach chooses: the first of its sequence, and its position, the last that it may see.
/// Neither decreases from one token to the next.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Bounds {
    pub(crate) first: i32,
    pub(crate) position: i32,
}

/// The bounds of a query token's rows. `sequences` is read where the batch is ragged, and holds `[3, query_len]`: first
/// key, one past the position, one past the last key of the token's sequence.
#[cube]
pub(crate) fn bounds_of(
    token: u32,
    query_len: u32,
    first_position: i32,
    sequences: &[u32],
    #[comptime] visibility: Visibility,
    #[comptime] ragged: bool,
) -> Bounds {
    let causal = comptime![visibility != Visibility::NonCausal];
    let mut first = 0i32;
    let mut position = token as i32 + first_position;
    if comptime![ragged] {
        let column = if comptime![causal] { 1u32 } else { 2u32 };
        first = sequences[token as usize] as i32;
        position = sequences[(column * query_len + token) as usize] as i32 - 1;
    } else if comptime![!causal] {
        position = query_len as i32 + first_position - 1;
    }
    Bounds { first, position }
}
