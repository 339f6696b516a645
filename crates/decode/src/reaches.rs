use bifocal_core::{Error, Reach, Result};
use cubecl::{client::Client, prelude::*, server::Handle};

/// More keys than there are: what a rule says that does not limit.
const BEYOND: i32 = 1 << 30;

/// What each route of a decode step shows, nearest first, in device memory: one kernel serves every reach, and a gate that
/// flips changes no kernel.
///
/// A route of `None` sees nothing: its rows are `out = 0`, `lse = -inf`, as those of L2A's global branch where the gate is
/// closed, and cost no byte of the cache.
#[derive(Clone, Debug)]
pub struct Reaches {
    list: Vec<Option<Reach>>,
    /// `i32 [reaches + 1, 4]`: a [`Rule`] each, the last that of rows without a valid route.
    rules: Handle,
}

impl Reaches {
    /// One reach per route.
    ///
    /// # Errors
    /// [`Error::Option`] unless there are 1 to 255.
    pub fn new(client: &Client, list: &[Option<Reach>]) -> Result<Self> {
        if !(1..=255).contains(&list.len()) {
            return Err(Error::option("reaches of a decode step", list.len(), "1 to 255"));
        }
        let rules = list.iter().chain([&None]).map(|reach| reach.map_or(Ok(NOTHING), rule));
        let rules = rules.collect::<Result<Vec<_>>>()?;
        Ok(Self { list: list.to_vec(), rules: client.create_from_slice(bytemuck::cast_slice(&rules)) })
    }

    /// One reach for every row of a step without routes.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn one(client: &Client, reach: Reach) -> Result<Self> {
        Self::new(client, &[Some(reach)])
    }

    /// The reaches by route.
    pub fn list(&self) -> &[Option<Reach>] {
        &self.list
    }

    pub(crate) fn rules(&self) -> &Handle {
        &self.rules
    }
}

/// The numbers of a [`Rule`] that shows nothing.
const NOTHING: [i32; 4] = [BEYOND, 0, 0, 0];

/// The numbers of a reach, in the order of [`Rule`]'s fields.
fn rule(reach: Reach) -> Result<[i32; 4]> {
    let clamp = |n: u32| n.min(BEYOND as u32) as i32;
    Ok(match reach {
        Reach::All => [0, BEYOND, 0, 0],
        Reach::Window(window) => [0, clamp(window.keys()), 0, 0],
        Reach::SinksAndWindow { sinks, window } => [0, clamp(window.keys()), clamp(sinks), 0],
        Reach::Far { sinks, window } => [clamp(window.keys()), BEYOND, 0, clamp(sinks)],
        Reach::NonCausal => [-BEYOND, BEYOND, 0, 0],
        _ => return Err(Error::option("reach", reach, "a reach that decode steps know")),
    })
}

/// Which keys a row sees: those of `skip..=last` that are beyond `low` or below `sinks`. Every reach is such a rule.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Rule {
    pub(crate) last: i32,
    pub(crate) low: i32,
    pub(crate) sinks: i32,
    pub(crate) skip: i32,
}

/// The rule of a route at a position.
#[cube]
pub(crate) fn rule_of(rules: &[i32], route: u32, position: i32) -> Rule {
    let at = route as usize * 4;
    Rule {
        last: position - rules[at],
        low: position - rules[at + 1],
        sinks: rules[at + 2],
        skip: rules[at + 3],
    }
}

/// Whether a route shows nothing, at any position: of all rules that one alone has a window of no key.
#[cube]
pub(crate) fn is_nothing(rules: &[i32], route: u32) -> bool {
    rules[route as usize * 4 + 1] == 0i32
}

#[cube]
impl Rule {
    /// Whether a key is seen.
    pub(crate) fn sees(&self, key: i32) -> bool {
        key <= self.last && key >= self.skip && (key > self.low || key < self.sinks)
    }
}

#[cfg(test)]
mod tests {
    use bifocal_core::Window;

    use super::*;

    #[test]
    fn a_rule_says_what_its_reach_says() {
        for (n, sinks) in [(1, 0), (3, 2), (5, 9), (40, 1), (i32::MAX as usize, 3)] {
            let window = Window::new(n).unwrap();
            let near = Reach::SinksAndWindow { sinks, window };
            let far = Reach::Far { sinks, window };
            for reach in [Reach::All, Reach::NonCausal, Reach::Window(window), near, far] {
                let [near, width, sinks, skip] = rule(reach).unwrap();
                for (position, key) in (-3..20).flat_map(|position| (0..20).map(move |key| (position, key))) {
                    let rule = Rule { last: position - near, low: position - width, sinks, skip };
                    assert_eq!(
                        rule.sees(key),
                        reach.sees(i64::from(position), i64::from(key)),
                        "{reach} at {position}, key {key}"
                    );
                }
            }
        }
    }
}
