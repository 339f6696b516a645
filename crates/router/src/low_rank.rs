//! A low rank of a covariance: computed once, on the host, from moments that a calibration left.

use bifocal_core::{Element, Error, Result, device::Tensor};
use cubecl::client::Client;

use crate::{Covariance, HostMoments, Moments};

/// How far products of rows of a [`Basis`] may be from 0 and 1.
const ORTHONORMAL: f64 = 1e-4;

/// Per sequence and kv head, a few orthonormal directions that a covariance is looked at along.
#[derive(Clone, Debug, PartialEq)]
pub struct Basis {
    /// `[B, Hk, rank, D]`.
    rows: Vec<f64>,
    shape: [usize; 4],
}

impl Basis {
    /// These directions, `[B, Hk, rank, D]`, row-major.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`] and [`Error::Shape`]; [`Error::Option`] for more directions than D and for rows that are not
    /// orthonormal to 1e-4.
    pub fn new(rows: &[f32], shape: [usize; 4]) -> Result<Self> {
        let [batch, kv_heads, rank, head_dim] = shape;
        check_rank(rank, head_dim)?;
        let length = shape.iter().fold(1usize, |product, &size| product.saturating_mul(size));
        if rows.len() != length || rows.is_empty() {
            return Err(Error::shape("the directions of a low rank", format!("{shape:?}"), &[rows.len()]));
        }
        let basis = Self { rows: rows.iter().map(|&x| f64::from(x)).collect(), shape };
        for list in 0..batch * kv_heads {
            let directions = basis.of(list);
            for (i, a) in directions.chunks(head_dim).enumerate() {
                for (j, b) in directions.chunks(head_dim).enumerate().take(i + 1) {
                    let (product, expected) = (dot(a, b), f64::from(u8::from(i == j)));
                    // False for NaN.
                    let near = (product - expected).abs() <= ORTHONORMAL;
                    if !near {
                        let expected = format!("{expected}: directions are orthonormal");
                        return Err(Error::option("a product of directions", product, expected));
                    }
                }
            }
        }
        Ok(basis)
    }

    /// The `rank` directions in which moments of `[batch, kv heads, head dim]` differ most: the eigenvectors of the largest
    /// eigenvalues of each covariance. No others leave a smaller rest, by its Frobenius norm (Eckart and Young, "The
    /// approximation of one matrix by another of lower rank", 1936). Moments of queries give the directions that queries
    /// look along.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`] and [`Error::Option`] for a rank of 0 or above D; [`Error::Shape`] for moments of other shapes
    /// and without a full covariance; [`Error::Option`] for numbers that are not finite.
    pub fn principal(moments: &HostMoments, shape: [usize; 3], rank: usize) -> Result<Self> {
        let [batch, kv_heads, head_dim] = shape;
        check_rank(rank, head_dim)?;
        let mut rows = Vec::with_capacity(batch * kv_heads * rank * head_dim);
        for covariance in full(moments, shape)? {
            let (_, vectors) = eigen(covariance, head_dim);
            rows.extend_from_slice(&vectors[..rank * head_dim]);
        }
        Ok(Self { rows, shape: [batch, kv_heads, rank, head_dim] })
    }

    /// How many directions there are.
    pub fn rank(&self) -> usize {
        self.shape[2]
    }

    /// The directions, `[B, Hk, rank, D]`, row-major, as [`new`](Self::new) takes them.
    pub fn to_f32(&self) -> Vec<f32> {
        self.rows.iter().map(|&x| x as f32).collect()
    }

    /// The directions of a sequence's kv head, one after the other.
    fn of(&self, list: usize) -> &[f64] {
        let [.., rank, head_dim] = self.shape;
        &self.rows[list * rank * head_dim..][..rank * head_dim]
    }
}

impl Moments {
    /// Full moments by a low rank: along the directions U of `basis` their covariance as it is, and of what is left the
    /// variance of each channel,
    ///
    /// ```text
    /// Sigma ~= P Sigma P + diag(Sigma - P Sigma P)          P = U^T U
    /// ```
    ///
    /// which is exact for as many directions as channels. A query's predicted mass is off by at most
    /// `scale^2 / 2 |q|^2` times the Frobenius norm of what is left beside the diagonal, and costs (rank + 1) D products in
    /// place of D x D. A low rank does not merge and does not stream: it is fitted to keys that are known.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the moments have a full covariance of the basis's shape; as [`from_host`](Self::from_host).
    pub fn low_rank(client: &Client, moments: &HostMoments, basis: &Basis) -> Result<Self> {
        let [batch, kv_heads, rank, head_dim] = basis.shape;
        let shape = [batch, kv_heads, head_dim];
        let covariances = full(moments, shape)?;
        // Checks the rest.
        let checked = Self::from_host(client, moments, shape)?;
        let keys = moments.keys as f64;
        let mut scatter: Vec<f32> = Vec::with_capacity(batch * kv_heads * (rank + 1) * head_dim);
        for (list, covariance) in covariances.into_iter().enumerate() {
            let directions = basis.of(list);
            let factor = factor(&covariance, directions, head_dim);
            let rest = (0..head_dim).map(|d| {
                let along: f64 = factor.chunks(head_dim).map(|row| row[d] * row[d]).sum();
                (covariance[d * head_dim + d] - along) * keys
            });
            scatter.extend(rest.map(|x| x as f32));
            scatter.extend(factor.iter().map(|x| (x * keys.sqrt()) as f32));
        }
        let scatter =
            Tensor::from_f32(client, [batch, kv_heads, rank + 1, head_dim], Element::F32, &scatter)?;
        Ok(Self { covariance: Covariance::LowRank { rank }, scatter, ..checked })
    }
}

fn check_rank(rank: usize, head_dim: usize) -> Result<()> {
    if rank == 0 {
        return Err(Error::EmptyDimension { dimension: "the directions of a low rank" });
    }
    if rank > head_dim {
        return Err(Error::option("the directions of a low rank", rank, format!("at most {head_dim}")));
    }
    Ok(())
}

/// The full covariances of moments of `[batch, kv heads, head dim]`.
fn full(moments: &HostMoments, [batch, kv_heads, head_dim]: [usize; 3]) -> Result<Vec<Vec<f64>>> {
    let numbers = head_dim.saturating_mul(head_dim);
    let found = moments.covariance.len();
    if found == 0 || found != (batch.saturating_mul(kv_heads)).saturating_mul(numbers) {
        let expected = format!("[{batch}, {kv_heads}, {head_dim}, {head_dim}], all of it");
        return Err(Error::shape("the covariance of keys", expected, &[found]));
    }
    if let Some(found) = moments.covariance.iter().find(|number| !number.is_finite()) {
        return Err(Error::option("a moment of keys", found, "a finite number"));
    }
    let wide = |list: &[f32]| list.iter().map(|&x| f64::from(x)).collect();
    Ok(moments.covariance.chunks(numbers).map(wide).collect())
}

/// Rows F with `F^T F = P Sigma P`: as many as directions.
fn factor(covariance: &[f64], directions: &[f64], dim: usize) -> Vec<f64> {
    let rank = directions.len() / dim;
    let turned: Vec<f64> =
        directions.chunks(dim).flat_map(|u| covariance.chunks(dim).map(move |row| dot(u, row))).collect();
    let projected =
        turned.chunks(dim).flat_map(|row| directions.chunks(dim).map(move |u| dot(row, u))).collect();
    let (values, vectors) = eigen(projected, rank);
    let mut factor = vec![0.0; rank * dim];
    for ((into, vector), value) in factor.chunks_mut(dim).zip(vectors.chunks(rank)).zip(values) {
        // Rounding may leave a little less than nothing.
        let deviation = value.max(0.0).sqrt();
        for (u, weight) in directions.chunks(dim).zip(vector) {
            into.iter_mut().zip(u).for_each(|(x, u)| *x += deviation * weight * u);
        }
    }
    factor
}

/// The eigenvalues of a symmetric matrix, largest first, and its eigenvectors, one per row: Jacobi's method, turning every
/// pair of channels in its turn (Golub and Van Loan, "Matrix Computations", section 8.5).
fn eigen(mut matrix: Vec<f64>, dim: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors: Vec<f64> = (0..dim * dim).map(|at| f64::from(u8::from(at % (dim + 1) == 0))).collect();
    let size: f64 = matrix.iter().map(|x| x * x).sum();
    // It converges quadratically: this many rounds are never needed.
    for _ in 0..64 {
        let beside: f64 =
            (0..dim * dim).filter(|at| at % (dim + 1) != 0).map(|at| matrix[at] * matrix[at]).sum();
        if beside <= 1e-28 * size {
            break;
        }
        for p in 0..dim {
            for q in p + 1..dim {
                let between = matrix[p * dim + q];
                if between == 0.0 {
                    continue;
                }
                let theta = (matrix[q * dim + q] - matrix[p * dim + p]) / (2.0 * between);
                let tangent = theta.signum() / (theta.abs() + theta.hypot(1.0));
                let cosine = 1.0 / tangent.hypot(1.0);
                let sine = tangent * cosine;
                for k in 0..dim {
                    turn(&mut matrix, [k * dim + p, k * dim + q], cosine, sine);
                }
                for k in 0..dim {
                    turn(&mut matrix, [p * dim + k, q * dim + k], cosine, sine);
                    turn(&mut vectors, [p * dim + k, q * dim + k], cosine, sine);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..dim).collect();
    order.sort_by(|&a, &b| matrix[b * dim + b].total_cmp(&matrix[a * dim + a]));
    let values = order.iter().map(|&at| matrix[at * dim + at]).collect();
    (values, order.iter().flat_map(|&at| vectors[at * dim..][..dim].to_vec()).collect())
}

fn turn(numbers: &mut [f64], [a, b]: [usize; 2], cosine: f64, sine: f64) {
    let (x, y) = (numbers[a], numbers[b]);
    numbers[a] = cosine * x - sine * y;
    numbers[b] = sine * x + cosine * y;
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A covariance of full rank but for one direction, with two equal eigenvalues.
    fn covariance() -> Vec<f64> {
        let spread = [3.0, 2.0, 2.0, 0.0];
        // Reflecting (1, 1, 1, 1) keeps lengths.
        let reflect = |i: usize, j: usize| f64::from(u8::from(i == j)) - 0.5;
        (0..16).map(|at| (0..4).map(|k| reflect(at / 4, k) * spread[k] * reflect(at % 4, k)).sum()).collect()
    }

    #[test]
    fn eigenvectors_put_a_matrix_together() {
        let (values, vectors) = eigen(covariance(), 4);
        for (found, expected) in values.iter().zip([3.0, 2.0, 2.0, 0.0]) {
            assert!((found - expected).abs() < 1e-12, "{found}, expected {expected}");
        }
        for i in 0..4 {
            for j in 0..4 {
                let product = dot(&vectors[i * 4..][..4], &vectors[j * 4..][..4]);
                assert!((product - f64::from(u8::from(i == j))).abs() < 1e-12);
                let again: f64 = (0..4).map(|k| values[k] * vectors[k * 4 + i] * vectors[k * 4 + j]).sum();
                assert!((again - covariance()[i * 4 + j]).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn bases_that_are_none() {
        let shape = |rank| [1, 1, rank, 2];
        assert!(Basis::new(&[0.6, 0.8, -0.8, 0.6], shape(2)).is_ok());
        let refused = |rows: &[f32], rank| Basis::new(rows, shape(rank)).unwrap_err();
        assert!(matches!(refused(&[], 0), Error::EmptyDimension { .. }));
        assert!(matches!(
            refused(&[1.0; 6], 3),
            Error::Option { option: "the directions of a low rank", .. }
        ));
        assert!(matches!(refused(&[1.0; 3], 2), Error::Shape { .. }));
        for rows in [[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.9], [f32::NAN, 0.0, 0.0, 1.0]] {
            assert!(matches!(refused(&rows, 2), Error::Option { option: "a product of directions", .. }));
        }
        let diagonal = HostMoments { keys: 1, mean: vec![0.0; 2], covariance: vec![1.0; 2] };
        assert!(matches!(Basis::principal(&diagonal, [1, 1, 2], 1), Err(Error::Shape { .. })));
        let full = HostMoments { covariance: vec![1.0, 0.0, 0.0, f32::NAN], ..diagonal };
        assert!(matches!(Basis::principal(&full, [1, 1, 2], 1), Err(Error::Option { .. })));
        assert!(matches!(Basis::principal(&full, [1, 1, 2], 3), Err(Error::Option { .. })));
    }
}
