use core::ops::Range;

use bifocal_core::{
    Element, Error, Result,
    device::{
        Tensor, TensorView,
        launch::{elements, grid, words},
    },
};
use cubecl::{client::Client, server::Handle};

mod kernels;

use self::kernels::{
    SCATTER_TILE, ShapeLaunch, join_kernel, mean_kernel, prefix_kernel, scatter_kernel, take_kernel,
    variance_kernel,
};
use crate::launch::strides;

/// How much of the keys' covariance is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Covariance {
    /// All of it: D x D numbers per kv head, and as many products per query.
    Full,
    /// The variance of each channel, as if channels were independent: D numbers, and D products per query.
    Diagonal,
    /// All of it along a few directions and the variance of each channel beside: see [`Moments::low_rank`], which alone makes
    /// such moments. (rank + 1) D numbers, and as many products per query.
    LowRank {
        /// How many directions.
        rank: usize,
    },
}

impl Covariance {
    /// Rows of D numbers.
    pub(crate) const fn rows(self, head_dim: usize) -> usize {
        match self {
            Self::Full => head_dim,
            Self::Diagonal => 1,
            Self::LowRank { rank } => rank + 1,
        }
    }

    /// Checks that it is a sum over keys.
    ///
    /// # Errors
    /// [`Error::Option`] for a low rank.
    pub(crate) fn check_sums(self) -> Result<()> {
        match self {
            Self::Full | Self::Diagonal => Ok(()),
            Self::LowRank { rank } => {
                let expected = "full or diagonal: a low rank is fitted to moments that are known";
                Err(Error::option("the covariance of summed moments", format!("of rank {rank}"), expected))
            }
        }
    }
}

/// Keys that a sum of moments takes in one go: short enough that f32 adds them up without loss to speak of.
const CHUNK: usize = 256;

/// What is remembered of a set of keys, per sequence and kv head, in device memory: how many there are, their mean, and
/// the sum of products of their differences from it. QAdA (arXiv 2502.09647) predicts from it how much softmax mass the
/// keys hold.
///
/// Count, sum and sum of outer products say the same; differences from the mean are what f32 can add up where the mean is
/// large against the deviation. Sets without a common key [`merge`](Self::merge) (Chan, Golub and LeVeque,
/// "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
#[derive(Clone, Debug)]
pub struct Moments {
    pub(crate) keys: usize,
    pub(crate) covariance: Covariance,
    /// `[B, Hk, D]`.
    pub(crate) mean: Tensor<3>,
    /// `[B, Hk, D or 1, D]`. Of a low rank the first row is the variances that are left, times the number of keys; the squares
    /// of a query's products with the others add to what these give.
    pub(crate) scatter: Tensor<4>,
}

/// [`Moments`] on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct HostMoments {
    /// How many keys there are per sequence and kv head.
    pub keys: usize,
    /// `[B, Hk, D]`, row-major.
    pub mean: Vec<f32>,
    /// `[B, Hk, D, D]` of the full covariance, `[B, Hk, D]` of its diagonal: divided by the number of keys.
    pub covariance: Vec<f32>,
}

impl Moments {
    /// Of the keys at positions `range` of `[B, Hk, Tk, D]`.
    ///
    /// # Errors
    /// [`Error::Option`] for a range that is empty or ends beyond the keys, and for a low rank; [`Error::TooLarge`]; as
    /// [`TensorView::check`].
    pub fn of(
        client: &Client,
        key: TensorView<'_, 4>,
        range: Range<usize>,
        covariance: Covariance,
    ) -> Result<Self> {
        let shape = key.shape();
        key.check("key", client, shape, key.element())?;
        let [batch, kv_heads, key_len, head_dim] = shape;
        if range.is_empty() || range.end > key_len {
            let expected = format!("at least one of the {key_len} keys");
            return Err(Error::option("the keys of moments", format!("{range:?}"), expected));
        }
        let prefix = Prefix::new(client, key, range.clone(), CHUNK, covariance)?;
        let rows = covariance.rows(head_dim);
        let moments = Self {
            keys: range.len(),
            covariance,
            mean: Tensor::empty(client, [batch, kv_heads, head_dim], Element::F32),
            scatter: Tensor::empty(client, [batch, kv_heads, rows, head_dim], Element::F32),
        };
        let last = [
            (&prefix.means, moments.mean.handle(), head_dim),
            (&prefix.scatters, moments.scatter.handle(), rows * head_dim),
        ];
        for (from, to, length) in last {
            let (cubes, units) = grid(client, batch * kv_heads * length);
            // SAFETY: each unit checks its number; a prefix has as many slots as it says.
            unsafe {
                take_kernel::launch_unchecked(
                    client,
                    cubes,
                    units,
                    elements(from.view()),
                    words(to),
                    (batch * kv_heads) as u32,
                    prefix.slots as u32,
                    length as u32,
                );
            }
        }
        Ok(moments)
    }

    /// Copies moments from the host, such as those that a calibration left: `keys` keys per sequence and kv head, for
    /// `[batch, kv heads, head dim]`. A batch of 1 serves any batch.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`]; [`Error::Shape`] when the numbers are not as many as the shape says; [`Error::Option`] for
    /// numbers that are not finite and for negative variances.
    pub fn from_host(client: &Client, moments: &HostMoments, shape: [usize; 3]) -> Result<Self> {
        let [batch, kv_heads, head_dim] = shape;
        let HostMoments { keys, mean, covariance: numbers } = moments;
        let dimensions =
            [("batch", batch), ("kv heads", kv_heads), ("head dim", head_dim), ("keys of moments", *keys)];
        for (dimension, size) in dimensions {
            if size == 0 {
                return Err(Error::EmptyDimension { dimension });
            }
        }
        let lists = batch.saturating_mul(kv_heads);
        if mean.len() != lists.saturating_mul(head_dim) {
            return Err(Error::shape("the mean key", format!("{shape:?}"), &[mean.len()]));
        }
        let covariance = match numbers.len() {
            n if n == mean.len() * head_dim => Covariance::Full,
            n if n == mean.len() => Covariance::Diagonal,
            n => {
                let expected = format!("[{batch}, {kv_heads}, {head_dim}, {head_dim}] or {shape:?}");
                return Err(Error::shape("the covariance of keys", expected, &[n]));
            }
        };
        let rows = covariance.rows(head_dim);
        if let Some(found) = mean.iter().chain(numbers).find(|number| !number.is_finite()) {
            return Err(Error::option("a moment of keys", found, "a finite number"));
        }
        let on_diagonal = |at: &usize| rows == 1 || at / head_dim % head_dim == at % head_dim;
        if let Some(at) = (0..numbers.len()).filter(on_diagonal).find(|&at| numbers[at] < 0.0) {
            return Err(Error::option("a variance of keys", numbers[at], "at least 0"));
        }
        let scatter: Vec<f32> = numbers.iter().map(|&number| number * *keys as f32).collect();
        Ok(Self {
            keys: *keys,
            covariance,
            mean: Tensor::from_f32(client, shape, Element::F32, mean)?,
            scatter: Tensor::from_f32(client, [batch, kv_heads, rows, head_dim], Element::F32, &scatter)?,
        })
    }

    /// Reads the moments back. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Option`] for a low rank, whose moments came from the host; [`Error::Runtime`].
    pub fn to_host(&self, client: &Client) -> Result<HostMoments> {
        self.covariance.check_sums()?;
        let scatter = self.scatter.to_f32(client)?;
        Ok(HostMoments {
            keys: self.keys,
            mean: self.mean.to_f32(client)?,
            covariance: scatter.into_iter().map(|sum| sum / self.keys as f32).collect(),
        })
    }

    /// The moments of both sets of keys together.
    ///
    /// # Errors
    /// [`Error::Shape`] unless both are of the same sequences, kv heads and head dim and remember as much of the covariance;
    /// [`Error::Option`] for a low rank; [`Error::DeviceMismatch`].
    pub fn merge(&self, client: &Client, other: &Self) -> Result<Self> {
        self.covariance.check_sums()?;
        other.covariance.check_sums()?;
        for moments in [self, other] {
            let (mean, scatter) = (moments.mean.view(), moments.scatter.view());
            mean.check("the mean key", client, self.mean.shape(), Element::F32)?;
            scatter.check("the scatter of keys", client, self.scatter.shape(), Element::F32)?;
        }
        let merged = Self {
            keys: self.keys + other.keys,
            covariance: self.covariance,
            mean: Tensor::empty(client, self.mean.shape(), Element::F32),
            scatter: Tensor::empty(client, self.scatter.shape(), Element::F32),
        };
        let [batch, kv_heads, rows, head_dim] = self.scatter.shape();
        let (cubes, units) = grid(client, batch * kv_heads * rows * head_dim);
        // SAFETY: all shapes were checked; each unit checks its number.
        unsafe {
            join_kernel::launch_unchecked(
                client,
                cubes,
                units,
                elements(self.mean.view()),
                elements(self.scatter.view()),
                elements(other.mean.view()),
                elements(other.scatter.view()),
                elements(merged.mean.view()),
                elements(merged.scatter.view()),
                (batch * kv_heads) as u32,
                rows as u32,
                head_dim as u32,
                self.keys as f32,
                other.keys as f32,
            );
        }
        Ok(merged)
    }

    /// These moments and those of `keys` keys before them, whose mean and scatter are given as these are.
    pub(crate) fn after(&self, client: &Client, keys: usize, [mean, scatter]: [&Handle; 2]) -> Result<Self> {
        let (of_mean, of_scatter) = (self.mean.view(), self.scatter.view());
        let before = Self {
            keys,
            covariance: self.covariance,
            mean: Tensor::new(mean.clone(), Element::F32, of_mean.shape(), of_mean.strides()),
            scatter: Tensor::new(scatter.clone(), Element::F32, of_scatter.shape(), of_scatter.strides()),
        };
        before.merge(client, self)
    }

    /// How many keys there are per sequence and kv head.
    pub fn keys(&self) -> usize {
        self.keys
    }

    /// How much of their covariance is remembered.
    pub fn covariance(&self) -> Covariance {
        self.covariance
    }
}

/// The moments of the first keys of a range, after every chunk of them.
pub(crate) struct Prefix {
    /// `[B * Hk, slots * D]`: the mean of the first `slot` chunks. Slot 0, of no chunk, has the first key: what differences are
    /// taken from until there is a mean.
    pub(crate) means: Tensor<2>,
    /// `[B * Hk, slots * rows * D]`. Slot 0 is not written.
    pub(crate) scatters: Tensor<2>,
    /// One more than chunks.
    pub(crate) slots: usize,
}

impl Prefix {
    /// Of `range` of checked keys `[B, Hk, Tk, D]`. Its first key is there even where the range is empty.
    pub(crate) fn new(
        client: &Client,
        key: TensorView<'_, 4>,
        range: Range<usize>,
        chunk: usize,
        covariance: Covariance,
    ) -> Result<Self> {
        covariance.check_sums()?;
        let [batch, kv_heads, _, head_dim] = key.shape();
        if !Element::FLOATS.contains(&key.element()) {
            return Err(Error::Element { tensor: "key", expected: Element::F32, found: key.element() });
        }
        let lists = batch * kv_heads;
        let chunks = range.len().div_ceil(chunk);
        let slots = chunks + 1;
        let rows = covariance.rows(head_dim);
        let (size, limit) = ((lists * slots * rows) as u128 * head_dim as u128, u128::from(u32::MAX));
        if size > limit {
            return Err(Error::TooLarge { what: "moments of keys", size, limit });
        }
        let room = |length: usize| Tensor::empty(client, [lists, slots * length], Element::F32);
        let (chunk_means, means, scatters) = (room(head_dim), room(head_dim), room(rows * head_dim));
        let shape = || {
            ShapeLaunch::new(
                lists as u32,
                kv_heads as u32,
                head_dim as u32,
                slots as u32,
                range.start as u32,
                range.end as u32,
                chunk as u32,
            )
        };
        let element = key.element().into();
        // SAFETY: keys were checked, and the range lies among them; each unit checks its number.
        unsafe {
            let (cubes, units) = grid(client, lists * slots * head_dim);
            mean_kernel::launch_unchecked(
                client,
                cubes,
                units,
                elements(key),
                elements(chunk_means.view()),
                strides(key),
                shape(),
                element,
            );
            match covariance {
                _ if chunks == 0 => {}
                Covariance::Full => {
                    let side = head_dim.div_ceil(SCATTER_TILE);
                    let (cubes, units) = grid(client, lists * chunks * (side * (side + 1) / 2));
                    scatter_kernel::launch_unchecked(
                        client,
                        cubes,
                        units,
                        elements(key),
                        elements(chunk_means.view()),
                        elements(scatters.view()),
                        strides(key),
                        shape(),
                        element,
                    );
                }
                // A low rank was refused above.
                Covariance::Diagonal | Covariance::LowRank { .. } => {
                    let (cubes, units) = grid(client, lists * chunks * head_dim);
                    variance_kernel::launch_unchecked(
                        client,
                        cubes,
                        units,
                        elements(key),
                        elements(chunk_means.view()),
                        elements(scatters.view()),
                        strides(key),
                        shape(),
                        element,
                    );
                }
            }
            let (cubes, units) = grid(client, lists * rows * head_dim);
            prefix_kernel::launch_unchecked(
                client,
                cubes,
                units,
                elements(chunk_means.view()),
                elements(means.view()),
                elements(scatters.view()),
                shape(),
                rows as u32,
            );
        }
        Ok(Self { means, scatters, slots })
    }
}
