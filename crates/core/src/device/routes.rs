use cubecl::{client::Client, server::Handle};

use crate::{Error, Problem, Result};

/// The route of a token whose score is NaN. It names no reach; the outputs of such rows are NaN.
pub const INVALID_ROUTE: u8 = u8::MAX;

/// The shape of routes: `[batch, router heads, tokens]`, and how many reaches there are to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RouteGeometry {
    /// Sequences.
    pub batch: usize,
    /// Router heads (R): 1 (token-wise), the kv heads, or the query heads.
    pub heads: usize,
    /// Tokens per sequence.
    pub tokens: usize,
    /// How many reaches a route can name: 2 for a gate.
    pub reaches: usize,
}

impl RouteGeometry {
    /// Checks that every dimension is at least 1 and that a byte can name the reaches.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`], [`Error::Option`], and [`Error::TooLarge`] for more than 2^32 - 1 routes.
    pub fn new(batch: usize, heads: usize, tokens: usize, reaches: usize) -> Result<Self> {
        for (dimension, size) in [("batch", batch), ("router heads", heads), ("tokens", tokens)] {
            if size == 0 {
                return Err(Error::EmptyDimension { dimension });
            }
        }
        if !(1..=usize::from(INVALID_ROUTE)).contains(&reaches) {
            return Err(Error::option("reaches", reaches, "1 to 255"));
        }
        // Kernels number routes in 32 bits.
        let limit = u128::from(u32::MAX);
        let rows = (batch as u128).saturating_mul(heads as u128);
        let size = rows.saturating_mul((tokens as u128).next_multiple_of(4));
        if size > limit {
            return Err(Error::TooLarge { what: "routes", size, limit });
        }
        Ok(Self { batch, heads, tokens, reaches })
    }

    /// The geometry itself, checked again: its fields are public.
    fn validated(self) -> Result<Self> {
        Self::new(self.batch, self.heads, self.tokens, self.reaches)
    }

    /// Routes per sequence and head, rounded up to whole words of four: the pitch of a row in memory.
    pub const fn pitch(&self) -> usize {
        self.tokens.next_multiple_of(4)
    }

    /// Bytes of routes in device memory.
    pub const fn bytes(&self) -> usize {
        self.batch * self.heads * self.pitch()
    }

    /// Token-heads: how many routes there are.
    pub const fn len(&self) -> usize {
        self.batch * self.heads * self.tokens
    }

    /// Never: every dimension is at least 1.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checks that these routes can route `problem`: the same batch and tokens, and 1, Hk or H router heads.
    ///
    /// # Errors
    /// [`Error::Shape`]; as [`Problem::check`].
    pub fn check(&self, problem: &Problem) -> Result<()> {
        problem.check()?;
        let heads = [1, problem.kv_heads, problem.heads];
        if self.batch != problem.batch || self.tokens != problem.query_len || !heads.contains(&self.heads) {
            let (batch, tokens) = (problem.batch, problem.query_len);
            let expected = format!("[{batch}, 1 or {} or {}, {tokens}]", problem.kv_heads, problem.heads);
            return Err(Error::shape("routes", expected, &[self.batch, self.heads, self.tokens]));
        }
        Ok(())
    }
}

/// The discrete choices of a router in device memory: one byte per token-head, `[B, R, T]`, where 0 is the
/// nearest reach and the last is full attention. Rows of tokens are padded to a multiple of four bytes, because
/// not every runtime can address single bytes.
#[derive(Clone, Debug)]
pub struct Routes {
    handle: Handle,
    geometry: RouteGeometry,
}

impl Routes {
    /// Copies routes from the host: `[B, R, T]`, row-major.
    ///
    /// # Errors
    /// As [`RouteGeometry::new`]; [`Error::Shape`] when their number is wrong, [`Error::RouteOutOfRange`] naming the first one that is.
    pub fn from_host(client: &Client, geometry: RouteGeometry, routes: &[u8]) -> Result<Self> {
        let geometry = geometry.validated()?;
        if routes.len() != geometry.len() {
            let expected = format!("{} routes", geometry.len());
            return Err(Error::shape("the host routes", expected, &[routes.len()]));
        }
        if let Some(at) = routes.iter().position(|&route| usize::from(route) >= geometry.reaches) {
            let row = at / geometry.tokens;
            return Err(Error::RouteOutOfRange {
                found: routes[at],
                reaches: geometry.reaches,
                batch: row / geometry.heads,
                head: row % geometry.heads,
                token: at % geometry.tokens,
            });
        }
        let mut padded = vec![INVALID_ROUTE; geometry.bytes()];
        for (row, tokens) in padded.chunks_mut(geometry.pitch()).zip(routes.chunks(geometry.tokens)) {
            row[..tokens.len()].copy_from_slice(tokens);
        }
        Ok(Self { handle: client.create_from_slice(&padded), geometry })
    }

    /// Wraps routes that are on the device already, rows padded to [`RouteGeometry::pitch`] bytes.
    ///
    /// Nothing is read back: a route that names no reach is treated like a NaN score, its outputs are NaN.
    ///
    /// # Errors
    /// As [`RouteGeometry::new`]; [`Error::Buffer`] when the buffer is too small, [`Error::DeviceMismatch`] when it is another device's.
    pub fn from_device(client: &Client, geometry: RouteGeometry, handle: Handle) -> Result<Self> {
        let geometry = geometry.validated()?;
        let routes = Self { handle, geometry };
        routes.check_device(client)?;
        let (expected, found) = (geometry.bytes() as u64, routes.handle.size_in_used());
        if found < expected {
            return Err(Error::Buffer { tensor: "routes", expected, found });
        }
        Ok(routes)
    }

    /// Reads the routes back: `[B, R, T]`, row-major, without padding. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Runtime`].
    pub fn to_host(&self, client: &Client) -> Result<Vec<u8>> {
        let bytes =
            client.read_one(self.handle.clone()).map_err(|error| Error::Runtime(error.to_string()))?;
        let RouteGeometry { tokens, .. } = self.geometry;
        let rows = bytes[..self.geometry.bytes()].chunks(self.geometry.pitch());
        Ok(rows.flat_map(|row| row[..tokens].iter().copied()).collect())
    }

    /// Checks that the routes are in the memory of the client's device.
    ///
    /// # Errors
    /// [`Error::DeviceMismatch`].
    pub fn check_device(&self, client: &Client) -> Result<()> {
        if self.handle.service != client.service_id() {
            return Err(Error::DeviceMismatch {
                tensor: "routes",
                expected: format!("{:?}", client.service_id()),
                found: format!("{:?}", self.handle.service),
            });
        }
        Ok(())
    }

    /// The buffer.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The shape.
    pub fn geometry(&self) -> RouteGeometry {
        self.geometry
    }
}
