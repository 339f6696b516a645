//! Devices, samples and comparisons that the tests of this crate share.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// Every device that Bifocal serves here and that computes without a GPU.
pub(crate) fn devices() -> Vec<Device> {
    [Device::flex(), Device::cpu()].into_iter().chain(wgpu()).collect()
}

/// The wgpu device, when `BIFOCAL_TEST_DEVICES` names it.
#[cfg(feature = "wgpu")]
pub(crate) fn wgpu() -> Option<Device> {
    let named = std::env::var("BIFOCAL_TEST_DEVICES").unwrap_or_default();
    if named.split(',').any(|name| name.trim() == "wgpu") {
        return Some(Device::wgpu(Default::default()));
    }
    println!("skipped on wgpu: BIFOCAL_TEST_DEVICES does not name it");
    None
}

/// The build leaves wgpu out.
#[cfg(not(feature = "wgpu"))]
pub(crate) fn wgpu() -> Option<Device> {
    println!("skipped on wgpu: the build leaves it out");
    None
}

/// Host values in [-1, 1), the same for every device.
pub(crate) fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A tensor of [`values`].
pub(crate) fn noise<const RANK: usize>(shape: [usize; RANK], seed: u64, device: &Device) -> Tensor<RANK> {
    noise_of(shape, seed, device, DType::F32)
}

/// A tensor of [`values`], rounded to `dtype`.
pub(crate) fn noise_of<const RANK: usize>(
    shape: [usize; RANK],
    seed: u64,
    device: &Device,
    dtype: DType,
) -> Tensor<RANK> {
    let data = TensorData::new(values(shape.iter().product(), seed), shape);
    Tensor::from_data(data, (device, dtype))
}

/// Query `[B, H, T, D]`, key and value `[B, Hk, T, D]`, contiguous.
pub(crate) fn qkv(heads: [usize; 2], tokens: [usize; 2], dim: usize, device: &Device) -> [Tensor<4>; 3] {
    let [query_len, key_len] = tokens;
    let query = noise([2, heads[0], query_len, dim], 1, device).mul_scalar(2.0);
    let key = noise([2, heads[1], key_len, dim], 2, device).mul_scalar(2.0);
    [query, key, noise([2, heads[1], key_len, dim], 3, device)]
}

/// Routes `[B, R, T]` below `reaches`, mixed.
pub(crate) fn mixed_routes(shape: [usize; 3], reaches: usize, seed: u64, device: &Device) -> Tensor<3, Int> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let count = shape.iter().product();
    let routes: Vec<i32> = (0..count).map(|_| rng.random_range(0..reaches as i32)).collect();
    Tensor::from_data(TensorData::new(routes, shape), (device, DType::I32))
}

/// The values of a float tensor, row-major.
pub(crate) fn host<const RANK: usize>(tensor: Tensor<RANK>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Fails unless shapes agree and values do within `tolerance` of the largest expected one.
#[track_caller]
pub(crate) fn assert_close<const RANK: usize>(found: Tensor<RANK>, expected: Tensor<RANK>, tolerance: f32) {
    assert_eq!(found.dims(), expected.dims());
    let device = found.device();
    let (found, expected) = (host(found), host(expected));
    let scale = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
    assert!(scale > 0.0, "nothing to compare with");
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let error = (found - expected).abs();
        assert!(
            error <= tolerance * scale, // False for NaN.
            "{device:?}: {found} at {at}, expected {expected}"
        );
    }
}
