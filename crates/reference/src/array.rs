use core::ops::{Index, IndexMut};

use num_traits::Float;

/// A dense row-major array of `N` dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Array<F, const N: usize> {
    shape: [usize; N],
    data: Vec<F>,
}

impl<F, const N: usize> Array<F, N> {
    /// The array of this shape that holds `data`, last dimension fastest.
    ///
    /// # Panics
    /// When the shape does not have as many elements as `data`.
    pub fn new(shape: [usize; N], data: Vec<F>) -> Self {
        let expected: usize = shape.iter().product();
        assert_eq!(data.len(), expected, "an array of shape {shape:?} has {expected} elements");
        Self { shape, data }
    }

    /// The array whose element at each index is `element(index)`.
    pub fn from_fn(shape: [usize; N], element: impl FnMut([usize; N]) -> F) -> Self {
        Self::new(shape, indices(shape).map(element).collect())
    }

    /// The array whose elements are all `value`.
    pub fn filled(shape: [usize; N], value: F) -> Self
    where
        F: Clone,
    {
        Self::new(shape, vec![value; shape.iter().product()])
    }

    /// The array's shape.
    pub const fn shape(&self) -> [usize; N] {
        self.shape
    }

    /// All elements, last dimension fastest.
    pub fn as_slice(&self) -> &[F] {
        &self.data
    }

    /// All elements, last dimension fastest, and the array is gone.
    pub fn into_vec(self) -> Vec<F> {
        self.data
    }

    /// The array of `f(element)`, such as f32 inputs in f64: `array.map(f64::from)`.
    pub fn map<G>(&self, f: impl FnMut(F) -> G) -> Array<G, N>
    where
        F: Clone,
    {
        Array::new(self.shape, self.data.iter().cloned().map(f).collect())
    }

    /// The same elements in the same order under another shape.
    ///
    /// # Panics
    /// When the shapes differ in their number of elements.
    pub fn reshape<const L: usize>(self, shape: [usize; L]) -> Array<F, L> {
        Array::new(shape, self.data)
    }

    /// All elements whose index starts with `prefix`, a contiguous run: `k.row([b, h, j])` is one key.
    ///
    /// # Panics
    /// When the prefix is longer than the shape or out of range.
    pub fn row<const L: usize>(&self, prefix: [usize; L]) -> &[F] {
        let (start, len) = self.run(&prefix);
        &self.data[start..start + len]
    }

    /// [`row`](Self::row), to be written to.
    ///
    /// # Panics
    /// As [`row`](Self::row).
    pub fn row_mut<const L: usize>(&mut self, prefix: [usize; L]) -> &mut [F] {
        let (start, len) = self.run(&prefix);
        &mut self.data[start..start + len]
    }

    /// Start and length of the elements under an index prefix.
    fn run(&self, prefix: &[usize]) -> (usize, usize) {
        let shape = &self.shape;
        let in_range = prefix.len() <= N && prefix.iter().zip(shape).all(|(index, size)| index < size);
        assert!(in_range, "index {prefix:?} is out of range for shape {shape:?}");
        let len = shape[prefix.len()..].iter().product::<usize>();
        let start = prefix.iter().zip(shape).fold(0, |flat, (index, size)| flat * size + index);
        (start * len, len)
    }
}

impl<F, const N: usize> Index<[usize; N]> for Array<F, N> {
    type Output = F;

    fn index(&self, index: [usize; N]) -> &F {
        &self.row(index)[0]
    }
}

impl<F, const N: usize> IndexMut<[usize; N]> for Array<F, N> {
    fn index_mut(&mut self, index: [usize; N]) -> &mut F {
        &mut self.row_mut(index)[0]
    }
}

/// Every index of a shape, last dimension fastest.
pub(crate) fn indices<const N: usize>(shape: [usize; N]) -> impl Iterator<Item = [usize; N]> {
    (0..shape.iter().product()).map(move |flat: usize| {
        let mut index = [0; N];
        let mut rest = flat;
        for dimension in (0..N).rev() {
            index[dimension] = rest % shape[dimension];
            rest /= shape[dimension];
        }
        index
    })
}

/// A literal in the precision of the computation.
pub(crate) fn number<F: Float>(value: f64) -> F {
    F::from(value).expect("every float type holds a rounded f64")
}

/// The sum, from left to right.
pub(crate) fn sum<F: Float>(values: impl IntoIterator<Item = F>) -> F {
    values.into_iter().fold(F::zero(), |total, value| total + value)
}

/// The inner product.
pub(crate) fn dot<F: Float>(a: &[F], b: &[F]) -> F {
    sum(a.iter().zip(b).map(|(&a, &b)| a * b))
}

/// Adds `factor` times a row to another.
pub(crate) fn add_scaled<F: Float>(to: &mut [F], factor: F, row: &[F]) {
    for (to, &value) in to.iter_mut().zip(row) {
        *to = *to + factor * value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_dimension_is_the_fastest() {
        let array = Array::from_fn([2, 3, 4], |[a, b, c]| 100 * a + 10 * b + c);
        assert_eq!(&array.as_slice()[..6], &[0, 1, 2, 3, 10, 11]);
        assert_eq!(array[[1, 2, 3]], 123);
        assert_eq!(array.row([1, 0]), &[100, 101, 102, 103]);
        assert_eq!(array.row([1]).len(), 12);
        assert_eq!(array.reshape([4, 6])[[3, 5]], 123);
    }

    #[test]
    fn writing_reaches_one_element() {
        let mut array = Array::filled([2, 2], 0.0_f32);
        array[[1, 0]] = 2.0;
        assert_eq!(array.map(f64::from).into_vec(), [0.0, 0.0, 2.0, 0.0]);
    }

    #[test]
    #[should_panic(expected = "index [0, 3] is out of range for shape [2, 3]")]
    fn an_index_out_of_range_is_named() {
        let _ = Array::filled([2, 3], 0)[[0, 3]];
    }
}
