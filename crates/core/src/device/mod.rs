//! Tensors in device memory, and the traits that operators and routers implement over them.

mod gradients;
pub mod launch;
mod operator;
mod partial;
mod router;
mod routes;
mod sequences;
mod summary;
mod tensor;

pub use gradients::{Before, Gradients, Saved};
pub use operator::{AttentionOperator, Inputs, RoutedRows, Rows};
pub use partial::Partial;
pub use router::{Decision, Router};
pub use routes::{INVALID_ROUTE, RouteGeometry, Routes};
pub use sequences::Sequences;
pub use summary::{SPAN, Summaries, Summary};
pub use tensor::{Tensor, TensorView};

use cubecl::client::Client;

use crate::{Error, Result};

/// Opens the device named `cpu`, `wgpu` or `cuda` (its first one) and returns its client.
///
/// # Errors
/// [`Error::DeviceUnavailable`] when the name is unknown, the build leaves the runtime out, or the machine has
/// no such device.
pub fn open(name: &str) -> Result<Client> {
    use cubecl::{Device, device::WgpuDeviceKind};

    let unavailable = |reason: String| Error::DeviceUnavailable { device: name.to_string(), reason };
    // Enumerating devices loads the vendor's libraries, and some bindings panic where those are absent.
    let opened = std::panic::catch_unwind(|| {
        let device = match name {
            "cpu" => Device::cpu(),
            "wgpu" => Device::wgpu(WgpuDeviceKind::default()),
            "cuda" => Device::cuda(0),
            _ => return Err("expected cpu, wgpu or cuda".to_string()),
        };
        device.map(|device| device.client()).map_err(|reason| reason.to_string())
    });
    match opened {
        Ok(client) => client.map_err(unavailable),
        Err(_) => Err(unavailable("its driver could not be loaded".to_string())),
    }
}

/// Waits until everything queued on the device is done.
///
/// # Errors
/// [`Error::Runtime`] when a kernel failed to compile or to run.
pub fn synchronise(client: &Client) -> Result<()> {
    client.flush().map_err(|error| Error::Runtime(error.to_string()))?;
    cubecl::future::block_on(client.sync()).map_err(|error| Error::Runtime(error.to_string()))
}
