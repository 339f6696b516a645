//! The properties that every operator, router and plan satisfies, as a library: the tests run it on the CPU
//! runtime and on lavapipe, and `bifocal check` runs it on any device that a person has.
//!
//! Each [`Property`] draws cases with proptest, runs the kernels with every output poisoned by NaN, and compares
//! with the float64 oracle in `bifocal-reference`. The yardstick: a kernel's error against the oracle is at most
//! twice the error of the same oracle computed in `f32`, plus a floor of a few roundings.
//!
//! An operator from elsewhere implements [`Subject`], and [`check_operator`] runs what all operators satisfy on it.

mod attention;
mod backward;
mod case;
mod compare;
mod decode;
mod gradients;
mod inputs;
mod linear;
mod linear_rows;
mod low_rank;
mod mixes;
mod moments;
mod packed;
mod routing;
mod straight_through;
mod subject;
mod tensor_cores;
mod variants;

pub use bifocal_reference as reference;
pub use num_traits::Float;
pub use subject::{Subject, check_operator};

use bifocal::cubecl::client::Client;
use bifocal::{DeviceProfile, Result};
use proptest::{
    strategy::Strategy,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner},
};

/// A device under test.
pub struct Device {
    client: Client,
    profile: DeviceProfile,
}

impl Device {
    /// Opens the device named `cpu`, `wgpu` or `cuda`.
    ///
    /// # Errors
    /// [`bifocal::Error::DeviceUnavailable`].
    pub fn open(name: &str) -> Result<Self> {
        let client = bifocal::open(name)?;
        let profile = DeviceProfile::of(&client);
        Ok(Self { client, profile })
    }

    /// What the device can do.
    pub fn profile(&self) -> &DeviceProfile {
        &self.profile
    }
}

/// How hard to try.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Cases per property; of properties whose cases compile many kernels, a quarter.
    pub cases: u32,
    /// Where the random cases start: the same seed draws the same cases.
    pub seed: u64,
}

/// A statement about kernels that holds for every case one can draw.
pub struct Property {
    /// A short name, in snake case.
    pub name: &'static str,
    /// The statement.
    pub claim: &'static str,
    /// Whether there is something on a device that the statement is about.
    applies: fn(&DeviceProfile) -> bool,
    /// One case in how many of [`Effort::cases`] is drawn: more than one where a case compiles many kernels.
    one_in: u32,
    run: fn(&Device, Effort) -> Result<(), String>,
}

/// What most properties are about is on every device.
fn everywhere(_: &DeviceProfile) -> bool {
    true
}

impl Property {
    /// Whether there is something on the device that the property is about.
    pub fn applies(&self, device: &Device) -> bool {
        (self.applies)(&device.profile)
    }

    /// Tries to refute the property on a device.
    ///
    /// # Errors
    /// The smallest case found that refutes it, and how.
    pub fn check(&self, device: &Device, effort: Effort) -> Result<(), String> {
        let effort = Effort { cases: effort.cases.div_ceil(self.one_in), ..effort };
        let verdict = (self.run)(device, effort);
        // Nothing stays queued, and a kernel that failed after its result was read is not missed.
        bifocal::synchronise(&device.client).map_err(|error| error.to_string())?;
        verdict
    }
}

/// Every property, in the order of the data's way: routers, plans, operators, combinations, systems; then packed
/// sequences, QAdA and mixes; then caches and decode steps; then the way back; then linear attention; last, the instructions
/// that kernels are made of.
pub fn properties() -> impl Iterator<Item = &'static Property> {
    let forward = [routing::PROPERTIES, attention::PROPERTIES, packed::PROPERTIES];
    let systems = [
        moments::PROPERTIES,
        low_rank::PROPERTIES,
        mixes::PROPERTIES,
        variants::PROPERTIES,
        decode::PROPERTIES,
    ];
    let backward = [backward::PROPERTIES, straight_through::PROPERTIES];
    let last = [linear::PROPERTIES, linear_rows::PROPERTIES, tensor_cores::PROPERTIES];
    forward.into_iter().chain(systems).chain(backward).chain(last).flatten()
}

/// The property of that name.
pub fn property(name: &str) -> Option<&'static Property> {
    properties().find(|property| property.name == name)
}

/// Draws cases until one fails or `effort` is spent; a failing case is made as small as possible.
fn refute<S: Strategy>(
    effort: Effort,
    strategy: S,
    holds: impl Fn(S::Value) -> Result<(), String>,
) -> Result<(), String> {
    let config =
        Config { cases: effort.cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() };
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&effort.seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
    runner
        .run(&strategy, |case| holds(case).map_err(TestCaseError::fail))
        .map_err(|failure| failure.to_string())
}
