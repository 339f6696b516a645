use core::{fmt, num::NonZeroU32};

use crate::{Error, Result};

/// A sliding window of `n` keys **including the query's own**: key `j` is visible to the query at position
/// `i` iff `i - n < j <= i`.
///
/// Libraries and papers count differently; take the constructor named after where the number comes from
/// and the off-by-one is settled once. A window of at least the sequence length is causal full attention.
///
/// ```
/// use bifocal_core::Window;
///
/// assert_eq!(Window::new(128)?, Window::from_flash_left(127)?);
/// assert_eq!(Window::rattention(512)?.keys(), 513);
/// assert!(Window::new(0).is_err());
/// # Ok::<(), bifocal_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Window(NonZeroU32);

impl Window {
    /// A window of `n` keys, the query's own included.
    ///
    /// # Errors
    /// [`Error::EmptyWindow`] for `n = 0`: a query that sees nothing is not a window. [`Error::Option`] when
    /// `n` is beyond the 2^31 - 1 positions that a problem can have.
    pub fn new(n: usize) -> Result<Self> {
        if n == 0 {
            return Err(Error::EmptyWindow);
        }
        match u32::try_from(n) {
            Ok(n) if n <= i32::MAX as u32 => Ok(Self(NonZeroU32::new(n).ok_or(Error::EmptyWindow)?)),
            _ => Err(Error::option("window", n, "at most 2147483647 keys")),
        }
    }

    /// AHA's `w` counts the query's own key (arXiv 2512.22562): `Window(w)`.
    ///
    /// # Errors
    /// As [`Window::new`].
    pub fn aha(w: usize) -> Result<Self> {
        Self::new(w)
    }

    /// L2A's `sliding_window` counts the query's own key (arXiv 2603.17484; its code passes
    /// `sliding_window - 1` to flash-attn): 4095 is `Window(4095)`.
    ///
    /// # Errors
    /// As [`Window::new`].
    pub fn l2a(sliding_window: usize) -> Result<Self> {
        Self::new(sliding_window)
    }

    /// RATTENTION's `w` counts the keys **before** the query (arXiv 2506.15545): `Window(w + 1)`.
    ///
    /// # Errors
    /// As [`Window::new`]; never [`Error::EmptyWindow`].
    pub fn rattention(w: usize) -> Result<Self> {
        Self::new(w.saturating_add(1))
    }

    /// The `left` of flash-attn's `window_size = (left, 0)` and FlashInfer's `window_left`, which count the keys
    /// before the query: `Window(left + 1)`.
    ///
    /// # Errors
    /// As [`Window::new`]; never [`Error::EmptyWindow`].
    pub fn from_flash_left(left: usize) -> Result<Self> {
        Self::new(left.saturating_add(1))
    }

    /// The `w` of a FlexAttention mask `q_idx - kv_idx <= w`: `Window(w + 1)`.
    ///
    /// # Errors
    /// As [`Window::new`]; never [`Error::EmptyWindow`].
    pub fn from_flex_distance(w: usize) -> Result<Self> {
        Self::new(w.saturating_add(1))
    }

    /// How many keys a query sees at most, its own included.
    pub const fn keys(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Window({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_constructor_settles_its_own_off_by_one() {
        let keys = |window: Result<Window>| window.unwrap().keys();
        assert_eq!(keys(Window::aha(128)), 128);
        assert_eq!(keys(Window::l2a(4095)), 4095);
        assert_eq!(keys(Window::rattention(512)), 513);
        assert_eq!(keys(Window::from_flash_left(0)), 1);
        assert_eq!(keys(Window::from_flex_distance(127)), 128);
    }

    #[test]
    fn zero_and_absurd_windows_are_refused() {
        assert_eq!(Window::new(0), Err(Error::EmptyWindow));
        assert!(Window::new(usize::MAX).is_err());
        assert!(Window::rattention(usize::MAX).is_err());
    }
}
