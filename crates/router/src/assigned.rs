use bifocal_core::{
    Error, Result,
    device::{Decision, INVALID_ROUTE, RouteGeometry, Router, TensorView, launch},
};
use cubecl::{client::Client, prelude::*};

use crate::launch::{outputs, over_quads};

/// Routes every token of a router head the same way: all near, all far, or a static hybrid of heads
/// (DuoAttention, arXiv 2410.10819). The hidden states lend only their shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FixedRouter {
    routes: Vec<u8>,
    reaches: usize,
}

impl FixedRouter {
    /// One route per router head.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`] without heads, [`Error::Option`] for 0 or more than 255 reaches,
    /// [`Error::RouteOutOfRange`] naming the first head whose route names no reach.
    pub fn new(routes: Vec<u8>, reaches: usize) -> Result<Self> {
        RouteGeometry::new(1, routes.len(), 1, reaches)?;
        match routes.iter().position(|&route| usize::from(route) >= reaches) {
            Some(head) => {
                Err(Error::RouteOutOfRange { found: routes[head], reaches, batch: 0, head, token: 0 })
            }
            None => Ok(Self { routes, reaches }),
        }
    }
}

impl Router for FixedRouter {
    fn heads(&self) -> usize {
        self.routes.len()
    }

    fn reaches(&self) -> usize {
        self.reaches
    }

    fn route(&self, client: &Client, hidden: TensorView<'_, 3>) -> Result<Decision> {
        let table: Vec<u32> = self.routes.iter().map(|&route| u32::from(route)).collect();
        assign(client, "fixed router", hidden, self.heads(), self.reaches, &table, None)
    }
}

/// Routes every token-head at random, with a given share of tokens on each reach: the control that a learned
/// router has to beat. The same seed gives the same routes on every device.
#[derive(Clone, Debug, PartialEq)]
pub struct RandomRouter {
    heads: usize,
    /// Upper ends of the reaches' intervals in 0..2^32; the last reach takes the rest.
    cuts: Vec<u32>,
    seed: u32,
}

impl RandomRouter {
    /// `shares[k]` of the tokens go to reach `k`, for each of `heads` router heads.
    ///
    /// # Errors
    /// [`Error::Option`] unless every share is in 0..=1 and they add up to 1; [`Error::EmptyDimension`] without
    /// heads.
    pub fn new(heads: usize, shares: &[f64], seed: u32) -> Result<Self> {
        RouteGeometry::new(1, heads, 1, shares.len())?;
        let sum: f64 = shares.iter().sum();
        if shares.iter().any(|share| !(0.0..=1.0).contains(share)) || (sum - 1.0).abs() > 1e-6 {
            let expected = "shares between 0 and 1 that add up to 1";
            return Err(Error::option("random shares", format!("{shares:?}"), expected));
        }
        let mut end = 0.0;
        let cuts = shares[..shares.len() - 1]
            .iter()
            .map(|share| {
                end += share;
                (end * 2f64.powi(32)).min(f64::from(u32::MAX)) as u32
            })
            .collect();
        Ok(Self { heads, cuts, seed })
    }

    /// A gate that sends `far_share` of the tokens far.
    ///
    /// # Errors
    /// As [`RandomRouter::new`].
    pub fn gate(heads: usize, far_share: f64, seed: u32) -> Result<Self> {
        Self::new(heads, &[1.0 - far_share, far_share], seed)
    }

    /// The route of one token-head, computed on the host: what the device computes too. `row` is
    /// `batch * R + router head`.
    pub fn route_of(&self, row: u32, token: u32) -> u8 {
        let x = scramble_host(token.wrapping_add(scramble_host(row.wrapping_add(scramble_host(self.seed)))));
        self.cuts.iter().filter(|&&cut| x >= cut).count() as u8
    }
}

impl Router for RandomRouter {
    fn heads(&self) -> usize {
        self.heads
    }

    fn reaches(&self) -> usize {
        self.cuts.len() + 1
    }

    fn route(&self, client: &Client, hidden: TensorView<'_, 3>) -> Result<Decision> {
        // A buffer cannot be empty; the one entry of a single reach is never compared.
        let table = if self.cuts.is_empty() { vec![0] } else { self.cuts.clone() };
        let seed = Some(scramble_host(self.seed));
        assign(client, "random router", hidden, self.heads, self.reaches(), &table, seed)
    }
}

/// The finaliser of MurmurHash3: every bit of the input moves every bit of the output.
fn scramble_host(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}

fn assign(
    client: &Client,
    router: &'static str,
    hidden: TensorView<'_, 3>,
    heads: usize,
    reaches: usize,
    table: &[u32],
    seed: Option<u32>,
) -> Result<Decision> {
    let [batch, tokens, _] = hidden.shape();
    let geometry = RouteGeometry::new(batch, heads, tokens, reaches)?;
    let (cubes, units) = over_quads(client, router, geometry)?;
    let (routes, counts) = outputs(client, geometry)?;
    let table = client.create_from_slice(bytemuck::cast_slice(table));
    // SAFETY: each unit checks its number against the quads there are; the table has an entry per head, or per
    // cut.
    unsafe {
        assign_kernel::launch_unchecked(
            client,
            cubes,
            units,
            launch::words(&table),
            launch::words(routes.handle()),
            launch::words(&counts),
            batch as u32,
            heads as u32,
            tokens as u32,
            seed.unwrap_or(0),
            reaches as u32,
            seed.is_some(),
        );
    }
    Ok(Decision { scores: None, routes, counts })
}

#[cube]
fn scramble(x: u32) -> u32 {
    let x = (x ^ (x >> 16u32)) * 0x85eb_ca6bu32;
    let x = (x ^ (x >> 13u32)) * 0xc2b2_ae35u32;
    x ^ (x >> 16u32)
}

/// One unit: four tokens of one router head.
#[cube(launch_unchecked)]
fn assign_kernel(
    table: &[u32],
    routes: &mut [u32],
    counts: &[Atomic<u32>],
    batch: u32,
    heads: u32,
    tokens: u32,
    seed: u32,
    #[comptime] reaches: u32,
    #[comptime] random: bool,
) {
    let quads = tokens.div_ceil(4u32);
    if ABSOLUTE_POS >= (batch * heads * quads) as usize {
        terminate!();
    }
    let row = ABSOLUTE_POS as u32 / quads;
    let first = (ABSOLUTE_POS as u32 % quads) * 4u32;
    let mut word = 0u32;
    #[unroll]
    for lane in 0..4usize {
        let token = first + comptime![lane as u32];
        if token < tokens {
            let mut route = 0u32;
            if comptime![random] {
                let x = scramble(token + scramble(row + seed));
                #[unroll]
                for cut in 0..comptime![reaches as usize - 1] {
                    route += select(x >= table[cut], 1u32, 0u32);
                }
            } else {
                route = table[(row % heads) as usize];
            }
            word |= route << comptime![lane as u32 * 8];
            counts[(row * comptime![reaches + 1] + route) as usize].fetch_add(1u32);
        } else {
            word |= comptime![(INVALID_ROUTE as u32) << (lane as u32 * 8)];
        }
    }
    routes[ABSOLUTE_POS] = word;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_that_make_no_sense_are_refused() {
        assert!(RandomRouter::new(4, &[0.5, 0.6], 0).is_err());
        assert!(RandomRouter::new(4, &[f64::NAN, 1.0], 0).is_err());
        assert!(RandomRouter::new(4, &[], 0).is_err());
        assert!(RandomRouter::gate(0, 0.5, 0).is_err());
        assert!(FixedRouter::new(vec![0, 2], 2).is_err());
        assert!(FixedRouter::new(vec![], 2).is_err());
    }

    #[test]
    fn random_routes_keep_their_share() {
        let router = RandomRouter::gate(1, 0.067, 7).unwrap();
        let far = (0..100_000).filter(|&token| router.route_of(0, token) == 1).count();
        assert!((6_300..7_100).contains(&far), "{far} of 100000 far, expected about 6700");
    }
}
