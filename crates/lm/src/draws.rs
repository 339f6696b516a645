//! Random numbers that are the same on every device, in every version and wherever a run is resumed: each use has a
//! sequence of its own, found from the seed and from what it is for, so there is no state to save.

/// What a sequence is for. Two purposes never share one.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    /// Initial weights; the part is the parameter's path, hashed.
    Weights,
    /// The order of documents.
    Documents,
    /// Windows of text; the part is the step.
    Windows,
    /// The seeds of passes; the parts are the step and the pass in it.
    Passes,
    /// A pass's coins for attending densely; the part is the layer.
    Leaks,
    /// A pass's random gates; the part is the layer.
    Gates,
    /// The tokens of a generated text; the part is the place in it.
    Tokens,
}

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
#[derive(Clone, Debug)]
pub(crate) struct Draws(u64);

impl Draws {
    pub(crate) fn new(seed: u64, purpose: Purpose, parts: &[u64]) -> Self {
        let start = Self(seed ^ ((purpose as u64 + 1) << 56));
        parts.iter().fold(start, |mut draws, &part| Self(draws.bits() ^ part))
    }

    /// 64 random bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is at least 1.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.bits()) * bound as u128) >> 64) as usize
    }

    /// A number in [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// FNV-1a: a name as a number.
pub(crate) fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_splitmix64() {
        // The first outputs for the state 1234567, from the paper's reference implementation.
        let mut draws = Draws(1_234_567);
        assert_eq!(draws.bits(), 6_457_827_717_110_365_317);
        assert_eq!(draws.bits(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn purposes_and_parts_have_sequences_of_their_own() {
        let first = |seed, purpose, parts: &[u64]| Draws::new(seed, purpose, parts).bits();
        let sequences = [
            first(1, Purpose::Windows, &[1]),
            first(1, Purpose::Windows, &[2]),
            first(2, Purpose::Windows, &[1]),
            first(1, Purpose::Leaks, &[1]),
            first(1, Purpose::Windows, &[1, 0]),
            first(1, Purpose::Weights, &[hash("norm.gamma")]),
        ];
        for (at, one) in sequences.iter().enumerate() {
            assert!(!sequences[at + 1..].contains(one), "{at}");
        }
        assert_eq!(first(1, Purpose::Windows, &[1]), first(1, Purpose::Windows, &[1]));
    }

    #[test]
    fn numbers_stay_in_their_range_and_fill_it() {
        let mut draws = Draws::new(7, Purpose::Windows, &[]);
        let mut seen = [0; 5];
        for _ in 0..5000 {
            seen[draws.below(5)] += 1;
            assert!((0.0..1.0).contains(&draws.unit()));
        }
        assert!(seen.iter().all(|&count| (900..1100).contains(&count)), "{seen:?}");
        assert_eq!(Draws::new(7, Purpose::Windows, &[]).below(1), 0);
    }
}
