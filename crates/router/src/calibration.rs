use bifocal_core::{Error, Result, device::Decision};
use cubecl::client::Client;

use crate::FixedRouter;

/// How often router heads look far, counted over decisions on some text, to be frozen into one label per head (static
/// labelling, which QAdA, arXiv 2502.09647, is compared with; DuoAttention, arXiv 2410.10819, learns such labels).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Calibration {
    /// Tokens that looked far, per router head.
    far: Vec<u64>,
    /// Tokens per router head.
    tokens: u64,
}

impl Calibration {
    /// Adds a decision. Waits for the device.
    ///
    /// # Errors
    /// As [`Decision::counts`]; [`Error::Option`] when the decision has other router heads than those before it.
    pub fn add(&mut self, client: &Client, decision: &Decision) -> Result<()> {
        let geometry = decision.routes.geometry();
        let counts = decision.counts(client)?;
        if self.tokens == 0 {
            self.far = vec![0; geometry.heads];
        }
        if self.far.len() != geometry.heads {
            let expected = format!("{}, as before", self.far.len());
            return Err(Error::option("router heads of a calibration", geometry.heads, expected));
        }
        for (row, counts) in counts.iter().enumerate() {
            self.far[row % geometry.heads] += u64::from(counts[geometry.reaches - 1]);
        }
        self.tokens += (geometry.batch * geometry.tokens) as u64;
        Ok(())
    }

    /// The share of tokens that looked far, per router head.
    pub fn far_shares(&self) -> Vec<f64> {
        self.far.iter().map(|&far| far as f64 / self.tokens as f64).collect()
    }

    /// A router of two reaches in which a head looks far always iff more than `share` of its tokens did.
    ///
    /// # Errors
    /// [`Error::Option`] unless the share is in 0..=1; [`Error::EmptyDimension`] before anything was added.
    pub fn freeze(&self, share: f64) -> Result<FixedRouter> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::option("the share of a calibration", share, "0 to 1"));
        }
        FixedRouter::new(self.far_shares().into_iter().map(|far| u8::from(far > share)).collect(), 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_majorities() {
        let calibration = Calibration { far: vec![1, 2, 3], tokens: 4 };
        assert_eq!(calibration.far_shares(), [0.25, 0.5, 0.75]);
        assert_eq!(calibration.freeze(0.5), FixedRouter::new(vec![0, 0, 1], 2));
        assert_eq!(calibration.freeze(0.25), FixedRouter::new(vec![0, 1, 1], 2));
        assert!(calibration.freeze(f64::NAN).is_err());
        assert!(Calibration::default().freeze(0.5).is_err());
    }
}
