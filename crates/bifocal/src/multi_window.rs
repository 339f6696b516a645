use bifocal_core::{Error, Result, Window, device::AttentionOperator};
use bifocal_full::Full;
use bifocal_windowed::Windowed;

use crate::select::selecting;

/// AHA with several windows to choose from: reach k is the k-th window, the last reach full attention. (The
/// question that arXiv 2512.22562 leaves open.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MultiWindow {
    branches: Vec<Windowed>,
}

impl MultiWindow {
    /// One reach per window, nearest first, and full attention after them.
    ///
    /// # Errors
    /// [`Error::Option`] without windows or unless each is longer than the one before.
    pub fn new(windows: &[Window]) -> Result<Self> {
        if windows.is_empty() || !windows.is_sorted_by(|a, b| a < b) {
            let found: Vec<u32> = windows.iter().map(|window| window.keys()).collect();
            return Err(Error::option("windows", format!("{found:?}"), "at least one, ascending"));
        }
        Ok(Self { branches: windows.iter().copied().map(Windowed::new).collect() })
    }

    /// How many reaches a router has to choose from: the windows and full attention.
    pub fn reaches(&self) -> usize {
        self.branches.len() + 1
    }

    /// The branches by reach: the windows, then full attention.
    pub fn branches(&self) -> Vec<&dyn AttentionOperator> {
        let windows = self.branches.iter().map(|window| window as &dyn AttentionOperator);
        windows.chain([&Full as _]).collect()
    }
}

selecting!(MultiWindow);
