//! Dispatch plans of arbitrary routes, built on the CPU runtime and held against the oracle; then rows that are
//! scattered by the same routes.
#![no_main]

use std::sync::OnceLock;

use bifocal::{
    Element, HostPlan, Partial, Plan, Problem, RouteGeometry, Routes, Rows, Tensor, cubecl::client::Client,
};
use bifocal_reference::Array;
use libfuzzer_sys::{
    arbitrary::{Result, Unstructured},
    fuzz_target,
};

/// Output elements per row: more than one, so that a row that is written in part shows.
const VALUE_DIM: usize = 3;

/// What no branch writes: a row that still holds it was left out.
const UNTOUCHED: f32 = -1.0;

fuzz_target!(|data: &[u8]| {
    // Too few bytes are no finding.
    let Ok(case) = Case::new(data) else { return };
    case.check_plan();
    case.check_scatter();
});

fn client() -> &'static Client {
    static CLIENT: OnceLock<Client> = OnceLock::new();
    CLIENT.get_or_init(|| bifocal::open("cpu").expect("the CPU runtime is part of this build"))
}

struct Case {
    problem: Problem,
    geometry: RouteGeometry,
    item_rows: u32,
    /// What the device holds: rows padded to the pitch, the padding as arbitrary as the routes.
    padded: Vec<u8>,
    /// The same without the padding, `[B, R, T]`.
    routes: Array<u8, 3>,
}

impl Case {
    fn new(data: &[u8]) -> Result<Self> {
        let mut bytes = Unstructured::new(data);
        let mut up_to = |most: usize| bytes.int_in_range(1..=most);
        let (batch, kv_heads, group, tokens) = (up_to(3)?, up_to(3)?, up_to(4)?, up_to(70)?);
        // Each number of reaches is a kernel of its own, so there are few.
        let (reaches, item_rows) = (up_to(4)?, up_to(9)? as u32);
        let heads = kv_heads * group;
        let router_heads = [1, kv_heads, heads][up_to(3)? - 1];

        let problem = Problem::new([batch, heads, tokens, 4], [batch, kv_heads, tokens, 4], Element::F32)
            .and_then(|problem| problem.with_value_dim(VALUE_DIM))
            .expect("a small problem is possible");
        let geometry = RouteGeometry::new(batch, router_heads, tokens, reaches).expect("no dimension is 0");
        // Short inputs repeat, so that they still mix reaches. One byte in sixteen names none.
        let raw = bytes.take_rest();
        let route = |at: usize| match raw.get(at % raw.len().max(1)) {
            Some(&byte) if byte < 0xf0 => byte % reaches as u8,
            Some(&byte) => byte,
            None => 0,
        };
        let padded: Vec<u8> = (0..geometry.bytes()).map(route).collect();
        let pitch = geometry.pitch();
        let routes = Array::from_fn([batch, router_heads, tokens], |[b, r, t]| {
            padded[(b * router_heads + r) * pitch + t]
        });
        Ok(Self { problem, geometry, item_rows, padded, routes })
    }

    fn on_device(&self) -> Routes {
        let handle = client().create_from_slice(&self.padded);
        Routes::from_device(client(), self.geometry, handle).expect("the buffer has room for every route")
    }

    fn check_plan(&self) {
        let Problem { heads, kv_heads, .. } = self.problem;
        let reaches = self.geometry.reaches;
        let plan = Plan::build(client(), &self.on_device(), &self.problem, self.item_rows)
            .expect("the routes fit the problem");
        let HostPlan { lists, items } = plan.to_host(client()).expect("the plan can be read back");

        let expected = bifocal_reference::lists(&self.routes, reaches, heads, kv_heads);
        assert_eq!(lists, expected.lists, "lists of {:?}", self.geometry);
        let found = bifocal_reference::Plan { lists };
        found.check(&self.routes, reaches, heads, kv_heads).expect("the plan holds its invariants");

        assert_eq!(items.len(), reaches, "reaches with items");
        for (reach, (lists, items)) in found.lists.iter().zip(&items).enumerate() {
            let Ok(Rows::Routed(rows)) = plan.rows(reach) else { panic!("reach {reach} has no routed rows") };
            assert!(items.len() <= rows.max_items, "{} items, room for {}", items.len(), rows.max_items);
            let mut taken: Vec<Vec<u8>> = lists.iter().map(|list| vec![0; list.len()]).collect();
            for &item in items {
                let [list, first, count] = item.map(|number| number as usize);
                assert!((1..=self.item_rows as usize).contains(&count), "reach {reach}: item {item:?}");
                let entries = taken.get_mut(list).and_then(|list| list.get_mut(first..first + count));
                for entry in
                    entries.unwrap_or_else(|| panic!("reach {reach}: item {item:?} is outside its list"))
                {
                    *entry += 1;
                }
            }
            assert!(
                taken.iter().flatten().all(|&times| times == 1),
                "reach {reach}: rows taken {taken:?} times"
            );
        }
        assert!(plan.rows(reaches).is_err(), "a plan of {reaches} reaches gave out one more");
    }

    fn check_scatter(&self) {
        let (client, problem) = (client(), &self.problem);
        let reaches = self.geometry.reaches;
        let routes = self.on_device();
        let filled = |mark: f32| Partial {
            out: Tensor::filled(client, problem.out_shape(), Element::F32, mark).expect("a small tensor"),
            lse: Tensor::filled(client, problem.lse_shape(), Element::F32, mark).expect("a small tensor"),
        };

        // Each branch computed its own number everywhere: what arrives says which branch it came from.
        let into = filled(UNTOUCHED);
        for reach in 0..reaches {
            bifocal::select(client, problem, &routes, reach, &filled(reach as f32), &into)
                .expect("the partials fit the routes");
        }
        self.check_rows("select", &into, |route| (f32::from(route), f32::from(route)));

        let last = reaches - 1;
        let masked = filled(UNTOUCHED);
        bifocal::mask(client, problem, &routes, last, &masked).expect("the partial fits the routes");
        self.check_rows("mask", &masked, |route| {
            if usize::from(route) == last { (UNTOUCHED, UNTOUCHED) } else { (0.0, f32::NEG_INFINITY) }
        });
    }

    /// Checks every row against the output and log-sum-exp that its route stands for. Rows without a valid route
    /// are NaN.
    fn check_rows(&self, operation: &str, partial: &Partial, expected: impl Fn(u8) -> (f32, f32)) {
        let out = partial.out.to_f32(client()).expect("outputs can be read back");
        let lse = partial.lse.to_f32(client()).expect("log-sum-exps can be read back");
        let Problem { heads, query_len, .. } = self.problem;
        for (row, (out, &lse)) in out.chunks_exact(VALUE_DIM).zip(&lse).enumerate() {
            let (b, h, t) = (row / query_len / heads, row / query_len % heads, row % query_len);
            let route = self.routes[[b, h * self.geometry.heads / heads, t]];
            let here = format!("{operation}: batch {b}, head {h}, token {t}, route {route}");
            if usize::from(route) < self.geometry.reaches {
                let (out_expected, lse_expected) = expected(route);
                assert_eq!((out, lse), (&[out_expected; VALUE_DIM][..], lse_expected), "{here}");
            } else {
                assert!(
                    lse.is_nan() && out.iter().all(|x| x.is_nan()),
                    "{here}: {out:?}, {lse}, expected NaN"
                );
            }
        }
    }
}
