use core::fmt;

use crate::Window;

/// What a branch may see: which keys are visible to the query at position `i`.
///
/// Every reach but [`NonCausal`](Reach::NonCausal) is causal. Positions are bottom-right aligned (see
/// [`Problem`](crate::Problem)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reach {
    /// The last [`Window::keys`] keys: `i - n < j <= i`.
    Window(Window),
    /// The first `sinks` keys of the sequence and the window (StreamingLLM, arXiv 2309.17453).
    SinksAndWindow {
        /// How many keys at the start of the sequence every query sees.
        sinks: u32,
        /// The sliding window beside them.
        window: Window,
    },
    /// The complement of `SinksAndWindow` within the causal past: `sinks <= j <= i - n`.
    Far {
        /// Keys at the start of the sequence that some other branch sees.
        sinks: u32,
        /// The window that some other branch sees.
        window: Window,
    },
    /// Every key up to the query's own: `j <= i`.
    All,
    /// Every key, whatever the query's position: cross-attention and encoders (`is_causal=False`).
    NonCausal,
}

impl Reach {
    /// Whether the query at `position` sees `key`. Both count from the first key; a query before the first
    /// key (bottom-right alignment with fewer keys than queries) has a negative position, and of the causal reaches
    /// none shows it anything.
    pub fn sees(self, position: i64, key: i64) -> bool {
        let causal = (0..=position).contains(&key);
        match self {
            Reach::Window(window) => causal && key > position - i64::from(window.keys()),
            Reach::SinksAndWindow { sinks, window } => {
                causal && (key < i64::from(sinks) || key > position - i64::from(window.keys()))
            }
            Reach::Far { sinks, window } => {
                causal && key >= i64::from(sinks) && key <= position - i64::from(window.keys())
            }
            Reach::All => causal,
            Reach::NonCausal => key >= 0,
        }
    }

    /// How many of `key_len` keys the query at `position` sees.
    pub fn visible(self, position: i64, key_len: usize) -> usize {
        let causal = (position + 1).clamp(0, key_len as i64);
        let past = |window: Window| (causal - i64::from(window.keys())).max(0);
        let keys = match self {
            Reach::Window(window) => causal - past(window),
            Reach::SinksAndWindow { sinks, window } => {
                causal - past(window) + past(window).min(i64::from(sinks))
            }
            Reach::Far { sinks, window } => (past(window) - i64::from(sinks)).max(0),
            Reach::All => causal,
            Reach::NonCausal => key_len as i64,
        };
        keys as usize
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reach::Window(window) => window.fmt(f),
            Reach::SinksAndWindow { sinks, window } => write!(f, "Sinks({sinks}) + {window}"),
            Reach::Far { sinks: 0, window } => write!(f, "Far beyond {window}"),
            Reach::Far { sinks, window } => write!(f, "Far beyond Sinks({sinks}) + {window}"),
            Reach::All => f.write_str("All"),
            Reach::NonCausal => f.write_str("NonCausal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_agree_with_the_definition_and_far_is_the_complement() {
        let key_len = 17;
        for n in [1, 2, 5, 16, 17, 40] {
            let window = Window::new(n).unwrap();
            for sinks in [0, 1, 3, 20] {
                let near = Reach::SinksAndWindow { sinks, window };
                let far = Reach::Far { sinks, window };
                for position in -2..17 {
                    for reach in [near, far, Reach::Window(window), Reach::All, Reach::NonCausal] {
                        let seen = (0..17).filter(|&key| reach.sees(position, key)).count();
                        assert_eq!(reach.visible(position, key_len), seen, "{reach} at {position}");
                    }
                    for key in 0..17 {
                        let all = Reach::All.sees(position, key);
                        assert_eq!(near.sees(position, key) ^ far.sees(position, key), all);
                    }
                }
            }
        }
    }

    #[test]
    fn window_of_one_sees_itself_only() {
        let reach = Reach::Window(Window::new(1).unwrap());
        assert!(reach.sees(4, 4));
        assert!(!reach.sees(4, 3));
        assert!(!reach.sees(4, 5));
    }
}
