use bifocal_core::{
    DeviceProfile, Error, Result,
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
///
/// Draws are independent unless [`with_bursts`](RandomRouter::with_bursts) ties neighbours together; heads are alike
/// unless [`gate_by_head`](RandomRouter::gate_by_head) or [`skewed_gate`](RandomRouter::skewed_gate) sets them apart.
#[derive(Clone, Debug, PartialEq)]
pub struct RandomRouter {
    heads: usize,
    reaches: usize,
    /// Per head, the upper ends of the reaches' intervals in 0..2^32; the last reach takes the rest.
    cuts: Vec<u32>,
    /// Consecutive tokens that share a draw.
    burst: u32,
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
        let cuts = cuts(shares)?.repeat(heads);
        Ok(Self { heads, reaches: shares.len(), cuts, burst: 1, seed })
    }

    /// A gate that sends `far_share` of the tokens far.
    ///
    /// # Errors
    /// As [`RandomRouter::new`].
    pub fn gate(heads: usize, far_share: f64, seed: u32) -> Result<Self> {
        Self::new(heads, &[1.0 - far_share, far_share], seed)
    }

    /// A gate that sends `far_shares[r]` of the tokens of router head `r` far.
    ///
    /// # Errors
    /// As [`RandomRouter::new`].
    pub fn gate_by_head(far_shares: &[f64], seed: u32) -> Result<Self> {
        let heads = far_shares.len();
        RouteGeometry::new(1, heads, 1, 2)?;
        let by_head: Vec<_> = far_shares.iter().map(|far| cuts(&[1.0 - far, *far])).collect::<Result<_>>()?;
        Ok(Self { heads, reaches: 2, cuts: by_head.concat(), burst: 1, seed })
    }

    /// A gate that sends `far_share` of all token-heads far, most of them in two heads that look far always (the first
    /// and the middle one); the others share what is left. A share below 2 / `heads` is too little for two such heads
    /// and leaves one, the first.
    ///
    /// # Errors
    /// As [`RandomRouter::new`]; [`Error::Option`] for a share below 1 / `heads`, which is too little for any.
    pub fn skewed_gate(heads: usize, far_share: f64, seed: u32) -> Result<Self> {
        // Checks the share before it is multiplied.
        Self::gate(heads, far_share, seed)?;
        let budget = far_share * heads as f64;
        if budget < 1.0 {
            let expected = format!("at least 1 / {heads}: one head that looks far always");
            return Err(Error::option("the share of a skewed gate", far_share, expected));
        }
        let always = if budget < 2.0 { vec![0] } else { vec![0, heads / 2] };
        let left = (budget - always.len() as f64) / (heads - always.len()).max(1) as f64;
        let share = |head| if always.contains(&head) { 1.0 } else { left.min(1.0) };
        Self::gate_by_head(&(0..heads).map(share).collect::<Vec<_>>(), seed)
    }

    /// Draws once per `tokens` consecutive tokens of a head, so that routes come in bursts. Shares stay the same.
    ///
    /// # Errors
    /// [`Error::Option`] for bursts of no tokens.
    pub fn with_bursts(self, tokens: u32) -> Result<Self> {
        match tokens {
            0 => Err(Error::option("tokens in a burst", tokens, "at least 1")),
            burst => Ok(Self { burst, ..self }),
        }
    }

    /// The route of one token-head, computed on the host: what the device computes too. `row` is
    /// `batch * R + router head`.
    pub fn route_of(&self, row: u32, token: u32) -> u8 {
        let draw = token / self.burst;
        let x = scramble_host(draw.wrapping_add(scramble_host(row.wrapping_add(scramble_host(self.seed)))));
        let per_head = self.reaches - 1;
        let cuts = &self.cuts[row as usize % self.heads * per_head..][..per_head];
        cuts.iter().filter(|&&cut| x >= cut).count() as u8
    }
}

/// The upper ends of all but the last share's interval in 0..2^32.
fn cuts(shares: &[f64]) -> Result<Vec<u32>> {
    let sum: f64 = shares.iter().sum();
    if shares.iter().any(|share| !(0.0..=1.0).contains(share)) || (sum - 1.0).abs() > 1e-6 {
        let expected = "shares between 0 and 1 that add up to 1";
        return Err(Error::option("random shares", format!("{shares:?}"), expected));
    }
    let mut end = 0.0;
    let cut = |share: &f64| {
        end += share;
        (end * 2f64.powi(32)).min(f64::from(u32::MAX)) as u32
    };
    Ok(shares[..shares.len() - 1].iter().map(cut).collect())
}

impl Router for RandomRouter {
    fn heads(&self) -> usize {
        self.heads
    }

    fn reaches(&self) -> usize {
        self.reaches
    }

    fn route(&self, client: &Client, hidden: TensorView<'_, 3>) -> Result<Decision> {
        // A buffer cannot be empty; the one entry of a single reach is never compared.
        let table = if self.cuts.is_empty() { vec![0] } else { self.cuts.clone() };
        let draw = Some(Draw { seed: scramble_host(self.seed), burst: self.burst });
        assign(client, "random router", hidden, self.heads, self.reaches, &table, draw)
    }
}

/// How the device draws, as it does on the host.
struct Draw {
    /// Scrambled.
    seed: u32,
    burst: u32,
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
    draw: Option<Draw>,
) -> Result<Decision> {
    let [batch, tokens, _] = hidden.shape();
    let geometry = RouteGeometry::new(batch, heads, tokens, reaches)?;
    let (cubes, units) = over_quads(client, &DeviceProfile::of(client), router, geometry)?;
    let (routes, counts) = outputs(client, geometry)?;
    let table = client.create_from_slice(bytemuck::cast_slice(table));
    // SAFETY: each unit checks its number against the quads there are; the table has an entry per head, or per
    // head and cut.
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
            draw.as_ref().map_or(0, |draw| draw.seed),
            draw.as_ref().map_or(1, |draw| draw.burst),
            reaches as u32,
            draw.is_some(),
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
    burst: u32,
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
                let x = scramble(token / burst + scramble(row + seed));
                let first_cut = ((row % heads) * comptime![reaches - 1]) as usize;
                #[unroll]
                for cut in 0..comptime![reaches as usize - 1] {
                    route += select(x >= table[first_cut + cut], 1u32, 0u32);
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
        assert!(RandomRouter::gate_by_head(&[0.5, 1.5], 0).is_err());
        assert!(RandomRouter::gate_by_head(&[], 0).is_err());
        assert!(RandomRouter::skewed_gate(16, 0.06, 0).is_err());
        assert!(RandomRouter::skewed_gate(16, f64::NAN, 0).is_err());
        assert!(RandomRouter::gate(1, 0.5, 0).unwrap().with_bursts(0).is_err());
        assert!(FixedRouter::new(vec![0, 2], 2).is_err());
        assert!(FixedRouter::new(vec![], 2).is_err());
    }

    #[test]
    fn random_routes_keep_their_share() {
        let router = RandomRouter::gate(1, 0.067, 7).unwrap();
        let far = (0..100_000).filter(|&token| router.route_of(0, token) == 1).count();
        assert!((6_300..7_100).contains(&far), "{far} of 100000 far, expected about 6700");
    }

    /// Far tokens of a router head among the first `tokens`.
    fn far(router: &RandomRouter, head: u32, tokens: u32) -> usize {
        (0..tokens).filter(|&token| router.route_of(head, token) == 1).count()
    }

    #[test]
    fn bursts_keep_the_share_and_their_length() {
        let router = RandomRouter::gate(2, 0.067, 7).unwrap().with_bursts(64).unwrap();
        for first in (0..6400).step_by(64) {
            assert!((first..first + 64).all(|token| router.route_of(1, token) == router.route_of(1, first)));
        }
        let share = far(&router, 1, 6_400_000) as f64 / 6.4e6;
        assert!((0.063..0.071).contains(&share), "{share} far, expected about 0.067");
    }

    #[test]
    fn a_skewed_gate_has_two_heads_that_always_look_far() {
        let router = RandomRouter::skewed_gate(32, 0.067, 7).unwrap();
        let by_head: Vec<usize> = (0..32).map(|head| far(&router, head, 10_000)).collect();
        for (head, &far) in by_head.iter().enumerate() {
            assert!(if head % 16 == 0 { far == 10_000 } else { far < 100 }, "head {head}: {far} of 10000");
        }
        let share = by_head.iter().sum::<usize>() as f64 / 320_000.0;
        assert!((share - 0.067).abs() < 0.001, "{share}");
        // 6.7 % of 16 heads are one head and a little.
        let router = RandomRouter::skewed_gate(16, 0.067, 7).unwrap();
        assert_eq!((far(&router, 0, 1000), far(&router, 8, 1000) < 50), (1000, true));
        // Every head, where nothing is left.
        let router = RandomRouter::skewed_gate(2, 1.0, 7).unwrap();
        assert_eq!((far(&router, 0, 1000), far(&router, 1, 1000)), (1000, 1000));
    }
}
