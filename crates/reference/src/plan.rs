use crate::{Array, array::indices, combine::router_head};

/// The bit that marks a packed row whose route is invalid.
pub const INVALID_ROW: u32 = 1 << 31;

/// A dispatch plan: which rows each reach computes.
///
/// The rows of all G = H / Hk query heads of a kv head are packed into one numbering,
/// `token * G + head in group`, so that they share the loads of keys and values and ascend by token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// `lists[reach][batch * Hk + kv head]`: packed rows, ascending. A row without a valid route is in the
    /// list of the last reach, at its ascending place, with [`INVALID_ROW`] set.
    pub lists: Vec<Vec<Vec<u32>>>,
}

/// The plan of routes `[B, R, T]`, R dividing `heads` (router head `r` serves the heads `h` with
/// `h * R / H == r`), over `reaches` branches. A route of `reaches` or more is invalid.
///
/// # Panics
/// When there is no reach, heads do not divide, or packed rows need more than 31 bits.
pub fn lists(routes: &Array<u8, 3>, reaches: usize, heads: usize, kv_heads: usize) -> Plan {
    let [batch, _, tokens] = routes.shape();
    assert!(reaches > 0, "at least one reach");
    let group = group(routes, heads, kv_heads);
    let mut lists = vec![vec![Vec::new(); batch * kv_heads]; reaches];
    for [b, kv_head, t, g] in indices([batch, kv_heads, tokens, group]) {
        let (reach, row) = place(routes, reaches, heads, [b, kv_head * group + g, t], (t * group + g) as u32);
        lists[reach][b * kv_heads + kv_head].push(row);
    }
    Plan { lists }
}

impl Plan {
    /// Checks a plan, such as one that a device built, against the routes that it is for: a list for each
    /// reach and each kv head of each sequence, all strictly ascending under the mark, each row in exactly
    /// the list that its route names, marked iff the route is invalid, and nothing else.
    ///
    /// # Errors
    /// What is wrong first, in words.
    ///
    /// # Panics
    /// As [`lists`].
    pub fn check(
        &self,
        routes: &Array<u8, 3>,
        reaches: usize,
        heads: usize,
        kv_heads: usize,
    ) -> Result<(), String> {
        let [batch, _, tokens] = routes.shape();
        let group = group(routes, heads, kv_heads);
        if self.lists.len() != reaches {
            return Err(format!("{} reaches, expected {reaches}", self.lists.len()));
        }
        for (reach, lists) in self.lists.iter().enumerate() {
            if lists.len() != batch * kv_heads {
                return Err(format!(
                    "reach {reach} has {} lists, expected {}",
                    lists.len(),
                    batch * kv_heads
                ));
            }
        }
        for [b, kv_head] in indices([batch, kv_heads]) {
            let here = format!("batch {b}, kv head {kv_head}");
            let mut count = 0;
            for (reach, lists) in self.lists.iter().enumerate() {
                let list = &lists[b * kv_heads + kv_head];
                for pair in list.windows(2) {
                    if pair[0] & !INVALID_ROW >= pair[1] & !INVALID_ROW {
                        return Err(format!("{here}, reach {reach}: {:#x} before {:#x}", pair[0], pair[1]));
                    }
                }
                for &found in list {
                    let row = (found & !INVALID_ROW) as usize;
                    if row >= tokens * group {
                        return Err(format!("{here}, reach {reach}: row {row} of {}", tokens * group));
                    }
                    let token_head = [b, kv_head * group + row % group, row / group];
                    let expected = place(routes, reaches, heads, token_head, row as u32);
                    if (reach, found) != expected {
                        let (to, row) = expected;
                        return Err(format!(
                            "{here}: {found:#x} in reach {reach}, expected {row:#x} in {to}"
                        ));
                    }
                }
                count += list.len();
            }
            // Rows are distinct within a list and each is where its route says: a full count is every row
            // once.
            if count != tokens * group {
                return Err(format!("{here}: {count} rows, expected {}", tokens * group));
            }
        }
        Ok(())
    }
}

/// The reach that computes a (batch, head, token), and the packed row with its mark.
fn place(
    routes: &Array<u8, 3>,
    reaches: usize,
    heads: usize,
    [b, h, t]: [usize; 3],
    row: u32,
) -> (usize, u32) {
    let route = usize::from(routes[[b, router_head(h, routes.shape()[1], heads), t]]);
    if route < reaches { (route, row) } else { (reaches - 1, row | INVALID_ROW) }
}

/// Query heads per kv head, once everything divides and rows fit.
fn group(routes: &Array<u8, 3>, heads: usize, kv_heads: usize) -> usize {
    let [_, router_heads, tokens] = routes.shape();
    assert!(heads.is_multiple_of(kv_heads), "{heads} query heads cannot share {kv_heads} kv heads");
    assert!(
        heads.is_multiple_of(router_heads),
        "{router_heads} router heads cannot serve {heads} query heads"
    );
    let group = heads / kv_heads;
    assert!(tokens * group <= i32::MAX as usize, "packed rows are numbered in 31 bits");
    group
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{INVALID_ROUTE, samples::noisy_routes};

    /// Three tokens, two kv heads of two query heads each, routed per head; one route is invalid.
    fn example() -> (Array<u8, 3>, Plan) {
        let by_head = [[0, 1, 0], [1, 1, 0], [0, 0, INVALID_ROUTE], [0, 1, 0]];
        let routes = Array::new([1, 4, 3], by_head.concat());
        let near = vec![vec![0, 4, 5], vec![0, 1, 2, 5]];
        let far = vec![vec![1, 2, 3], vec![3, 4 | INVALID_ROW]];
        (routes, Plan { lists: vec![near, far] })
    }

    #[test]
    fn a_plan_by_hand() {
        let (routes, plan) = example();
        assert_eq!(lists(&routes, 2, 4, 2), plan);
        assert_eq!(plan.check(&routes, 2, 4, 2), Ok(()));
    }

    #[test]
    fn an_invalid_row_keeps_its_ascending_place() {
        let routes = Array::new([1, 1, 3], vec![1, 2, 1]);
        assert_eq!(lists(&routes, 2, 1, 1).lists[1], [[0, 1 | INVALID_ROW, 2]]);
    }

    #[test]
    fn what_is_wrong_is_found() {
        let (routes, plan) = example();
        let wrong = |change: fn(&mut Plan)| {
            let mut plan = plan.clone();
            change(&mut plan);
            plan.check(&routes, 2, 4, 2).unwrap_err()
        };
        assert_eq!(wrong(|p| p.lists[0][0].swap(1, 2)), "batch 0, kv head 0, reach 0: 0x5 before 0x4");
        assert_eq!(wrong(|p| p.lists[0][0].insert(0, 0)), "batch 0, kv head 0, reach 0: 0x0 before 0x0");
        assert_eq!(wrong(|p| p.lists[0][0].truncate(1)), "batch 0, kv head 0: 4 rows, expected 6");
        assert_eq!(wrong(|p| p.lists[0][0].push(6)), "batch 0, kv head 0, reach 0: row 6 of 6");
        assert_eq!(
            wrong(|p| p.lists[1][1][1] = 4),
            "batch 0, kv head 1: 0x4 in reach 1, expected 0x80000004 in 1"
        );
        assert_eq!(
            wrong(|p| p.lists[1][0].insert(0, 0)),
            "batch 0, kv head 0: 0x0 in reach 1, expected 0x0 in 0"
        );
        assert_eq!(wrong(|p| p.lists.truncate(1)), "1 reaches, expected 2");
        assert_eq!(wrong(|p| p.lists[1].truncate(1)), "reach 1 has 1 lists, expected 2");
    }

    proptest! {
        #[test]
        fn plans_hold_their_invariants(
            (batch, kv_heads, group, tokens) in (1_usize..3, 1_usize..4, 1_usize..4, 1_usize..20),
            reaches in 1_usize..5,
            seed in any::<u64>(),
        ) {
            let heads = kv_heads * group;
            for router_heads in [1, kv_heads, heads] {
                let routes = noisy_routes([batch, router_heads, tokens], reaches, true, seed);
                let plan = lists(&routes, reaches, heads, kv_heads);
                prop_assert_eq!(plan.check(&routes, reaches, heads, kv_heads), Ok(()));
                let rows: usize = plan.lists.iter().flatten().map(Vec::len).sum();
                prop_assert_eq!(rows, batch * heads * tokens);
                let marked = |row: &&u32| **row & INVALID_ROW != 0;
                let invalid = |route: &&u8| usize::from(**route) >= reaches;
                prop_assert_eq!(
                    plan.lists.iter().flatten().flatten().filter(marked).count(),
                    routes.as_slice().iter().filter(invalid).count() * (heads / router_heads)
                );
            }
        }
    }
}
