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

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use cubecl::{
    client::{Client, Graph},
    server::ServerError,
};

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

/// Records what `call` launches, to be launched again by [`Graph::replay`]: the same kernels on the same buffers, with
/// whatever is in these then. On NVIDIA GPUs that is one launch, on WebGPU the launches without their preparation.
///
/// `call` runs twice: first as ever, which compiles its kernels and finds their memory, then to be recorded, which computes
/// nothing. What it returns the second time comes with the graph. It may take device memory, but neither upload nor
/// wait for the device. Other threads wait until it is recorded.
///
/// A replay checks nothing. Until it is done, everything that `call` read or wrote has to live, and what is written and read
/// between replays has to be so from the thread that recorded.
///
/// # Errors
/// [`Error::Runtime`] where the runtime has no graphs (the CPU's), and when `call` does what cannot be recorded; those of
/// `call`.
pub fn capture<T: Send + 'static>(
    client: &Client,
    call: impl Fn() -> Result<T> + Send,
) -> Result<(Graph, T)> {
    let failed = |error: ServerError| Error::Runtime(error.to_string());
    let recorded = client.exclusive(move || -> Result<(Graph, T)> {
        client.graph_prepare().map_err(failed)?;
        let called = catch_unwind(AssertUnwindSafe(|| {
            call()?;
            client.start_capture().map_err(failed)?;
            call()
        }));
        // Whatever went wrong, nothing is recorded from here on.
        let graph = client.stop_capture().map_err(failed);
        let made = called.unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok((graph?, made))
    });
    recorded.map_err(failed)?
}
