use crate::{Element, Error, Result, Routine};

/// One attention problem: the shapes and scalars that every operator and every routine agree on.
///
/// Query is `[batch, heads, query_len, head_dim]`, key `[batch, kv_heads, key_len, head_dim]`, value
/// `[batch, kv_heads, key_len, value_dim]`. Query head `h` reads kv head `h / (heads / kv_heads)`; the ratio is
/// any whole number. Positions are bottom-right aligned: query `t` has position `t + key_len - query_len`, so that
/// the queries are the last positions (as in FlashAttention, FlashInfer and Burn). A query that sees no key, as one
/// with a negative position does under every causal [`Reach`](crate::Reach), has output 0 and log-sum-exp -inf.
///
/// Sequences of different lengths are packed into a batch of 1 (see [`Sequences`](crate::device::Sequences)); then
/// the lengths are those of all sequences together.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Problem {
    /// Sequences.
    pub batch: usize,
    /// Query heads (H).
    pub heads: usize,
    /// Key and value heads (Hk).
    pub kv_heads: usize,
    /// Queries per sequence.
    pub query_len: usize,
    /// Keys per sequence.
    pub key_len: usize,
    /// Length of a query and of a key (D).
    pub head_dim: usize,
    /// Length of a value and of an output row.
    pub value_dim: usize,
    /// Element type of query, key and value.
    pub element: Element,
    /// Factor on the scores; 1/sqrt(head_dim) unless set.
    pub scale: f32,
    /// Scores become `cap * tanh(score / cap)` after scaling (Gemma 2, arXiv 2408.00118, section 2).
    pub softcap: Option<f32>,
    /// The routine to run by; the fastest that can unless set.
    pub routine: Option<Routine>,
}

impl Problem {
    /// The problem of a query and a key of these shapes: `[B, H, Tq, D]` and `[B, Hk, Tk, D]`, with values as
    /// long as keys, scale 1/sqrt(D) and no softcap.
    ///
    /// # Errors
    /// [`Error::Shape`] when batch or head dim differ, [`Error::EmptyDimension`], [`Error::HeadRatio`], and
    /// [`Error::TooLarge`] for more than 2^30 positions or packed rows per kv head.
    pub fn new(query: [usize; 4], key: [usize; 4], element: Element) -> Result<Self> {
        let [batch, heads, query_len, head_dim] = query;
        let [key_batch, kv_heads, key_len, key_dim] = key;
        for (dimension, size) in [
            ("batch", batch),
            ("heads", heads),
            ("query length", query_len),
            ("head dim", head_dim),
            ("kv heads", kv_heads),
            ("key length", key_len),
        ] {
            if size == 0 {
                return Err(Error::EmptyDimension { dimension });
            }
        }
        if key_batch != batch || key_dim != head_dim {
            return Err(Error::shape("key", format!("[{batch}, Hk, Tk, {head_dim}]"), &key));
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(Error::HeadRatio { heads, kv_heads });
        }
        let limit = u128::from(u32::MAX);
        let heads_in_all = (batch as u128).saturating_mul(heads as u128);
        if heads_in_all.saturating_mul(query_len as u128) > limit {
            let size = heads_in_all.saturating_mul(query_len as u128);
            return Err(Error::TooLarge { what: "query rows", size, limit });
        }
        // Rows of a kv head are numbered below the bit that marks a row without a valid route, and differences of
        // two positions have to fit an i32.
        let limit = 1 << 30;
        let rows = query_len as u128 * (heads / kv_heads) as u128;
        for (what, size) in [("packed rows per kv head", rows), ("keys", key_len as u128)] {
            if size > limit {
                return Err(Error::TooLarge { what, size, limit });
            }
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        Ok(Self {
            batch,
            heads,
            kv_heads,
            query_len,
            key_len,
            head_dim,
            value_dim: head_dim,
            element,
            scale,
            softcap: None,
            routine: None,
        })
    }

    /// Sets the length of values and outputs.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`] for 0.
    pub fn with_value_dim(mut self, value_dim: usize) -> Result<Self> {
        if value_dim == 0 {
            return Err(Error::EmptyDimension { dimension: "value dim" });
        }
        self.value_dim = value_dim;
        Ok(self)
    }

    /// Sets the factor on the scores.
    ///
    /// # Errors
    /// [`Error::Option`] when it is not finite.
    pub fn with_scale(mut self, scale: f32) -> Result<Self> {
        if !scale.is_finite() {
            return Err(Error::option("scale", scale, "a finite number"));
        }
        self.scale = scale;
        Ok(self)
    }

    /// Sets the softcap: scores are squashed into (-cap, cap).
    ///
    /// # Errors
    /// [`Error::Option`] unless it is finite and positive.
    pub fn with_softcap(mut self, cap: f32) -> Result<Self> {
        if !(cap.is_finite() && cap > 0.0) {
            return Err(Error::option("softcap", cap, "a finite positive number"));
        }
        self.softcap = Some(cap);
        Ok(self)
    }

    /// Asks for one routine: operators run by it or refuse.
    pub const fn with_routine(mut self, routine: Routine) -> Self {
        self.routine = Some(routine);
        self
    }

    /// Checks the problem again: its fields are public, and kernels rely on all that [`Problem::new`] checks.
    ///
    /// # Errors
    /// As [`Problem::new`] and [`Problem::with_value_dim`].
    pub fn check(&self) -> Result<()> {
        let query = [self.batch, self.heads, self.query_len, self.head_dim];
        let key = [self.batch, self.kv_heads, self.key_len, self.head_dim];
        Self::new(query, key, self.element)?.with_value_dim(self.value_dim).map(|_| ())
    }

    /// Query heads per kv head (G).
    pub const fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Rows of one kv head when its query heads are packed: query length times [`group`](Self::group).
    pub const fn packed_rows(&self) -> usize {
        self.query_len * self.group()
    }

    /// The position of query `token` among the keys; negative where there are more queries than keys.
    pub const fn position(&self, token: usize) -> i64 {
        token as i64 + self.key_len as i64 - self.query_len as i64
    }

    /// `[B, H, Tq, Dv]`.
    pub const fn out_shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.query_len, self.value_dim]
    }

    /// `[B, H, Tq]`.
    pub const fn lse_shape(&self) -> [usize; 3] {
        [self.batch, self.heads, self.query_len]
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case([1, 6, 8, 64], [1, 4, 8, 64], Error::HeadRatio { heads: 6, kv_heads: 4 })]
    #[case([0, 4, 8, 64], [0, 4, 8, 64], Error::EmptyDimension { dimension: "batch" })]
    #[case([1, 4, 0, 64], [1, 4, 8, 64], Error::EmptyDimension { dimension: "query length" })]
    fn impossible_problems_are_named(#[case] q: [usize; 4], #[case] k: [usize; 4], #[case] error: Error) {
        assert_eq!(Problem::new(q, k, Element::F32), Err(error));
    }

    #[test]
    fn a_mismatch_says_what_was_expected_and_found() {
        let error = Problem::new([2, 4, 8, 64], [2, 4, 8, 32], Element::F32).unwrap_err();
        assert_eq!(error.to_string(), "key has shape [2, 4, 8, 32], expected [2, Hk, Tk, 64]");
    }

    #[test]
    fn options_refuse_what_makes_no_sense() {
        let problem = Problem::new([1, 1, 1, 64], [1, 1, 1, 64], Element::F32).unwrap();
        assert!(problem.with_softcap(0.0).is_err());
        assert!(problem.with_softcap(f32::NAN).is_err());
        assert!(problem.with_scale(f32::INFINITY).is_err());
        assert!(problem.with_value_dim(0).is_err());
    }
}
