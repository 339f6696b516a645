use bifocal_core::Reach;

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
            _ => return None,
        })
    }
}
