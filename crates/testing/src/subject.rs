//! The suite for operators from elsewhere.

use bifocal::{AttentionOperator, Inputs, Partial, Reach, Rows};
use bifocal_reference::{self as reference, Array, Options, attention_where};
use num_traits::Float;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    Device, Effort,
    case::{Case, backward_cases, cases, routings},
    compare::{Expected, Read, run},
    gradients::{differentiate, draw_d_out},
    inputs::{Data, HostRoutes, OnDevice},
    refute,
};

/// An attention operator of one's own, and what it computes as a plain loop: what [`check_operator`] holds against each other.
pub trait Subject {
    /// The operator.
    fn operator(&self) -> &dyn AttentionOperator;

    /// What it gives for query `[B, H, Tq, D]`, key `[B, Hk, Tk, D]` and value `[B, Hk, Tk, Dv]`, in the rows for which
    /// `computed(batch, head, token)` is true; all others are `out = 0`, `lse = -inf`. Unless it is written here, attention
    /// over the operator's reach by [`options`](Self::options).
    fn oracle<F: Float>(
        &self,
        q: &Array<F, 4>,
        k: &Array<F, 4>,
        v: &Array<F, 4>,
        options: Options<F>,
        computed: impl Fn(usize, usize, usize) -> bool,
    ) -> reference::Partial<F> {
        let reach: Reach = self.operator().reach();
        attention_where(q, k, v, &self.options(options), |b, h, t| computed(b, h, t).then_some(reach))
    }

    /// What the operator does to scores where the problem asks for `options`; nothing more unless it says so.
    fn options<F: Float>(&self, options: Options<F>) -> Options<F> {
        options
    }
}

/// Tries to refute that an operator keeps the contract of [`AttentionOperator`]: it gives its oracle's outputs and
/// log-sum-exps, for all rows and for routed ones, of which it leaves the others alone; a NaN reaches exactly the rows that
/// see it; layouts do not matter; two runs agree bit for bit; and gradients, where it has any, are its oracle's differences.
/// Problems that it refuses are passed over.
///
/// # Errors
/// The claim, the smallest case found that refutes it, and how.
pub fn check_operator(subject: &impl Subject, device: &Device, effort: Effort) -> Result<(), String> {
    rows_equal_the_oracle(subject, device, effort).map_err(|error| format!("rows: {error}"))?;
    a_nan_stays_where_it_is_seen(subject, device, effort).map_err(|error| format!("NaN: {error}"))?;
    layouts_and_runs_agree(subject, device, effort).map_err(|error| format!("layouts: {error}"))?;
    gradients_are_differences(subject, device, effort).map_err(|error| format!("gradients: {error}"))
}

fn runs(subject: &impl Subject, device: &Device, case: &Case) -> bool {
    subject.operator().choose(&case.problem(), &device.profile).is_ok()
}

fn expected(
    subject: &impl Subject,
    case: &Case,
    data: &Data,
    computed: impl Fn(usize, usize, usize) -> bool,
) -> Expected {
    let (options, [q, k, v]) = data.arrays::<f64>(|weight| weight);
    let exact = subject.oracle(&q, &k, &v, options, &computed);
    let (options, [q, k, v]) = data.arrays::<f32>(case.round_weight());
    let plain = subject.oracle(&q, &k, &v, options, &computed);
    Expected::of(case, &data.value, exact, &plain)
}

fn attend(subject: &impl Subject, device: &Device, case: &Case, on: &OnDevice) -> Result<Read, String> {
    let (client, problem) = (&device.client, case.problem());
    let partial = run(Partial::poisoned(client, &problem, case.out_element()))?;
    run(subject.operator().attend(client, &problem, &on.inputs(), Rows::All, &partial))?;
    run(Read::new(client, &partial))
}

fn rows_equal_the_oracle(subject: &impl Subject, device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, (cases(&device.profile), routings()), |(case, routing)| {
        if !runs(subject, device, &case) {
            return Ok(());
        }
        let (client, problem) = (&device.client, case.problem());
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        expected(subject, &case, &data, |_, _, _| true).accepts(&attend(subject, device, &case, &on)?)?;

        // Rows of zeros and -inf are what the oracle says of those that are not computed.
        let routes = HostRoutes::new(&case, &routing, 2);
        let plan = run(routes.upload(client).and_then(|routes| bifocal::plan(client, &problem, &routes)))?;
        let partial = run(Partial::identity(client, &problem, case.out_element()))?;
        let rows = run(plan.far_rows())?;
        run(subject.operator().attend(client, &problem, &on.inputs(), rows, &partial))?;
        let is_far = |b, h, t| routes.at(case.heads(), b, h, t) == 1;
        expected(subject, &case, &data, is_far).accepts(&run(Read::new(client, &partial))?)
    })
}

fn a_nan_stays_where_it_is_seen(
    subject: &impl Subject,
    device: &Device,
    effort: Effort,
) -> Result<(), String> {
    let strategy = (cases(&device.profile), any::<prop::sample::Index>(), any::<bool>());
    refute(effort, strategy, |(case, at, in_key)| {
        if !runs(subject, device, &case) {
            return Ok(());
        }
        let mut data = Data::new(&case);
        data.spoil(at.index(case.key_len), in_key);
        let on = run(data.upload(&device.client))?;
        expected(subject, &case, &data, |_, _, _| true).accepts(&attend(subject, device, &case, &on)?)
    })
}

fn layouts_and_runs_agree(subject: &impl Subject, device: &Device, effort: Effort) -> Result<(), String> {
    refute(effort, cases(&device.profile), |case| {
        if !runs(subject, device, &case) {
            return Ok(());
        }
        let data = Data::new(&case);
        let on = run(data.upload(&device.client))?;
        let (once, again) = (attend(subject, device, &case, &on)?, attend(subject, device, &case, &on)?);
        if !once.same_bits(&again) {
            return Err("two runs differ".into());
        }
        let swapped = run(data.upload_token_major(&device.client, false))?;
        expected(subject, &case, &data, |_, _, _| true).accepts(&attend(subject, device, &case, &swapped)?)
    })
}

fn gradients_are_differences(subject: &impl Subject, device: &Device, effort: Effort) -> Result<(), String> {
    let effort = Effort { cases: effort.cases.div_ceil(4), ..effort };
    refute(effort, backward_cases(&device.profile), |case| {
        // Of smooth functions of numbers of about one.
        let case = Case { magnitude: 1.0, sink_logits: false, ..case };
        let operator = subject.operator();
        let (client, problem) = (&device.client, case.problem());
        if !runs(subject, device, &case) || operator.choose_backward(&problem, &device.profile).is_err() {
            return Ok(());
        }
        let data = Data::new(&case);
        let on = run(data.upload(client))?;
        let d_out = draw_d_out(&case);
        let d_out_there =
            run(bifocal::Tensor::from_f32(client, problem.out_shape(), case.out_element(), &d_out))?;
        let inputs: Inputs<'_> = on.inputs();
        let found = differentiate(
            device,
            &case,
            d_out_there.view(),
            |partial| operator.attend(client, &problem, &inputs, Rows::All, partial).map(|_| ()),
            |saved, gradients| {
                operator.backward(client, &problem, &inputs, Rows::All, saved, gradients).map(|_| ())
            },
        )?;

        let (options, arrays) = data.arrays::<f64>(|weight| weight);
        let mut rng = SmallRng::seed_from_u64(case.seed ^ 0xd1ff);
        for (name, which) in [("query", 0), ("key", 1), ("value", 2)] {
            let length = arrays[which].as_slice().len();
            let direction: Vec<f64> = (0..length).map(|_| rng.random_range(-1.0..1.0)).collect();
            let loss = |step: f64| {
                let mut moved = arrays.clone();
                let values = arrays[which].as_slice().iter().zip(&direction).map(|(x, d)| x + step * d);
                moved[which] = Array::new(arrays[which].shape(), values.collect());
                let [q, k, v] = &moved;
                let out = subject.oracle(q, k, v, options.clone(), |_, _, _| true).out;
                out.as_slice().iter().zip(&d_out).map(|(x, &d)| x * f64::from(d)).sum::<f64>()
            };
            let step = 1e-5;
            let difference = (loss(step) - loss(-step)) / (2.0 * step);
            let products = found.0[which].iter().zip(&direction).map(|(&g, d)| f64::from(g) * d);
            let (slope, size) = products.fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
            // Roundings of as many numbers, which do not all go the same way.
            let tolerance = 1e-3 * (1.0 + f64::sqrt(size)) + 16.0 * case.element.epsilon() * f64::sqrt(size);
            if (slope - difference).abs() > tolerance {
                return Err(format!(
                    "along a direction of the {name} the slope is {slope}, differences say {difference} (tolerance \
                     {tolerance:.2e})"
                ));
            }
        }
        Ok(())
    })
}
