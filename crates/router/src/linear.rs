// In a kernel `%` is one instruction, and `is_multiple_of` is not there.
#![allow(clippy::manual_is_multiple_of)]

use bifocal_core::{
    DeviceProfile, Element, Error, Result,
    device::{Decision, INVALID_ROUTE, RouteGeometry, Router, Routes, Tensor, TensorView, launch},
};
use cubecl::{client::Client, prelude::*};

use crate::{
    launch::{count_routes, outputs, over_quads},
    project::{self, ProjectionLaunch, project_kernel},
    project_mma, step,
};

/// When a gate opens.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Threshold {
    /// Far iff the score is above the number: AHA's `r > 0.5`.
    Above(f32),
    /// Far iff the score is at least the number: L2A's `p >= 0.5`.
    AtLeast(f32),
}

/// A linear gate: `z = x W + b`, `r = sigmoid(z / temperature)`, far iff `r` passes the threshold.
///
/// AHA (arXiv 2512.22562): one gate per head, temperature 1, `r > 0.5`. L2A (arXiv 2603.17484,
/// section 3): one gate per token, temperature 0.1, `p >= 0.5`. The threshold is compared with the logit, not
/// with the rounded sigmoid, so that the smallest positive logit counts as above 0.5.
#[derive(Clone, Debug)]
pub struct LinearGate {
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    threshold: Threshold,
    temperature: f32,
}

impl LinearGate {
    /// AHA's gate from its weight `[M, R]`, with R the number of router heads.
    pub fn aha(weight: Tensor<2>) -> Self {
        Self { weight, bias: None, threshold: Threshold::Above(0.5), temperature: 1.0 }
    }

    /// L2A's gate from its weight `[M, 1]`.
    pub fn l2a(weight: Tensor<2>) -> Self {
        Self { weight, bias: None, threshold: Threshold::AtLeast(0.5), temperature: 0.1 }
    }

    /// Adds a bias `[R]` (`f32`), such as the 4.0 that AHNSA starts from.
    pub fn with_bias(self, bias: Tensor<1>) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// Sets when the gate opens.
    ///
    /// # Errors
    /// [`Error::Option`] unless the threshold lies strictly between 0 and 1.
    pub fn with_threshold(self, threshold: Threshold) -> Result<Self> {
        let (Threshold::Above(score) | Threshold::AtLeast(score)) = threshold;
        if !(score > 0.0 && score < 1.0) {
            return Err(Error::option("threshold", score, "a score between 0 and 1"));
        }
        Ok(Self { threshold, ..self })
    }

    /// Sets the temperature.
    ///
    /// # Errors
    /// [`Error::Option`] unless it is finite and positive.
    pub fn with_temperature(self, temperature: f32) -> Result<Self> {
        if !(temperature.is_finite() && temperature > 0.0) {
            return Err(Error::option("temperature", temperature, "a finite positive number"));
        }
        Ok(Self { temperature, ..self })
    }
}

impl Router for LinearGate {
    fn heads(&self) -> usize {
        self.weight.shape()[1]
    }

    fn reaches(&self) -> usize {
        2
    }

    fn route(&self, client: &Client, hidden: TensorView<'_, 3>) -> Result<Decision> {
        let (Threshold::Above(score) | Threshold::AtLeast(score)) = self.threshold;
        let choice = Choice::Gate { inclusive: matches!(self.threshold, Threshold::AtLeast(_)) };
        // sigmoid(z / t) > s iff z / t > ln(s / (1 - s)).
        let cut = (score / (1.0 - score)).ln();
        route(client, "linear gate", hidden, &self.weight, self.bias.as_ref(), choice, self.temperature, cut)
    }
}

/// A linear choice among K reaches: `z = x W + b`, `p = softmax(z)` per router head, the route is the argmax (the
/// nearest of equals). Column `r * K + k` of the weight scores reach `k` for router head `r`.
///
/// The several-windows form of AHA (arXiv 2512.22562 leaves it open).
#[derive(Clone, Debug)]
pub struct LinearChoice {
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    reaches: usize,
}

impl LinearChoice {
    /// A choice among `reaches` from a weight `[M, R * reaches]`.
    ///
    /// # Errors
    /// [`Error::Option`] for fewer than 2 or more than 32 reaches; [`Error::Shape`] when the columns are not a
    /// multiple of them.
    pub fn new(weight: Tensor<2>, reaches: usize) -> Result<Self> {
        if !(2..=32).contains(&reaches) {
            return Err(Error::option("reaches", reaches, "2 to 32"));
        }
        if !weight.shape()[1].is_multiple_of(reaches) {
            let expected = format!("[M, a multiple of {reaches}]");
            return Err(Error::shape("the router's weight", expected, &weight.shape()));
        }
        Ok(Self { weight, bias: None, reaches })
    }

    /// Adds a bias `[R * K]` (`f32`).
    pub fn with_bias(self, bias: Tensor<1>) -> Self {
        Self { bias: Some(bias), ..self }
    }
}

impl Router for LinearChoice {
    fn heads(&self) -> usize {
        self.weight.shape()[1] / self.reaches
    }

    fn reaches(&self) -> usize {
        self.reaches
    }

    fn route(&self, client: &Client, hidden: TensorView<'_, 3>) -> Result<Decision> {
        let choice = Choice::Softmax { reaches: self.reaches };
        route(client, "linear choice", hidden, &self.weight, self.bias.as_ref(), choice, 1.0, 0.0)
    }
}

/// How logits become a score and a route: the compile-time part of the router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Choice {
    Gate { inclusive: bool },
    Softmax { reaches: usize },
}

impl Choice {
    pub(crate) const fn logits(self) -> usize {
        match self {
            Choice::Gate { .. } => 1,
            Choice::Softmax { reaches } => reaches,
        }
    }
}

fn route(
    client: &Client,
    router: &'static str,
    hidden: TensorView<'_, 3>,
    weight: &Tensor<2>,
    bias: Option<&Tensor<1>>,
    choice: Choice,
    temperature: f32,
    cut: f32,
) -> Result<Decision> {
    let logits = choice.logits();
    let [batch, tokens, model_dim] = hidden.shape();
    let [_, columns] = weight.shape();
    let heads = columns / logits;
    let geometry = RouteGeometry::new(batch, heads, tokens, logits.max(2))?;
    hidden.check("the hidden states", client, [batch, tokens, model_dim], hidden.element())?;
    weight.view().check("the router's weight", client, [model_dim, columns], weight.element())?;
    for (tensor, element) in
        [("the hidden states", hidden.element()), ("the router's weight", weight.element())]
    {
        if !Element::FLOATS.contains(&element) {
            return Err(Error::Element { tensor, expected: Element::F32, found: element });
        }
    }
    if let Some(bias) = bias {
        bias.view().check("the router's bias", client, [columns], Element::F32)?;
    }
    let profile = DeviceProfile::of(client);
    let (cubes, units) = over_quads(client, &profile, router, geometry)?;
    let scores = Tensor::empty(client, [batch, heads, logits, tokens], Element::F32);
    let bias_words = match bias {
        // SAFETY: it was checked.
        Some(bias) => unsafe { launch::elements(bias.view()) },
        None => launch::words(weight.handle()),
    };
    let projection = ProjectionLaunch::new(
        tokens as u32,
        model_dim as u32,
        columns as u32,
        hidden.strides()[0] as u32,
        hidden.strides()[1] as u32,
        weight.strides()[0] as u32,
    );
    let blueprint = project::Blueprint::new(weight);
    if step::takes(&profile, batch, tokens, blueprint, choice) {
        let routes = Routes::from_device(client, geometry, client.empty(geometry.bytes()))?;
        let counts = client.empty(batch * heads * (geometry.reaches + 1) * 4);
        let (cubes, units) = step::grid(batch, columns, blueprint);
        // SAFETY: spans were checked above; each cube checks its columns.
        unsafe {
            step::step_kernel::launch_unchecked(
                client,
                cubes,
                units,
                launch::elements(hidden),
                launch::elements(weight.view()),
                bias_words,
                launch::elements(scores.view()),
                launch::words(routes.handle()),
                launch::words(&counts),
                projection,
                temperature,
                cut,
                blueprint,
                choice,
                bias.is_some(),
                [hidden.element().into(), weight.element().into()],
                blueprint.width,
            );
        }
        return Ok(Decision { scores: Some(scores), routes, counts });
    }
    let (routes, counts) = outputs(client, geometry)?;
    // On planes the product is a kernel of its own, and the scores' room holds the logits until they become scores.
    let projected = profile.has_planes() && batch <= 65_535;
    if projected {
        project(client, &profile, hidden, weight, &scores, projection, blueprint);
    }
    // SAFETY: spans were checked above; each unit checks its number against the quads there are.
    unsafe {
        linear_kernel::launch_unchecked(
            client,
            cubes,
            units,
            launch::elements(hidden),
            launch::elements(weight.view()),
            bias_words,
            launch::elements(scores.view()),
            launch::words(routes.handle()),
            launch::words(&counts),
            LinearShapeLaunch::new(
                batch as u32,
                heads as u32,
                tokens as u32,
                model_dim as u32,
                hidden.strides()[0] as u32,
                hidden.strides()[1] as u32,
                weight.strides()[0] as u32,
            ),
            temperature,
            cut,
            choice,
            bias.is_some(),
            projected,
            [hidden.element().into(), weight.element().into()],
        );
    }
    Ok(Decision { scores: Some(scores), routes, counts })
}

/// Launches the product of hidden states and weights, on tensor cores where they take it.
fn project(
    client: &Client,
    profile: &DeviceProfile,
    hidden: TensorView<'_, 3>,
    weight: &Tensor<2>,
    logits: &Tensor<4>,
    shape: ProjectionLaunch,
    blueprint: project::Blueprint,
) {
    let [batch, tokens, _] = hidden.shape();
    let [_, columns] = weight.shape();
    if let Some(blueprint) = project_mma::Blueprint::new(profile, hidden, weight) {
        let (cubes, units) = blueprint.grid(batch, tokens, columns);
        // SAFETY: the caller has checked spans; each thread checks its tokens and columns.
        unsafe {
            project_mma::project_kernel::launch_unchecked(
                client,
                cubes,
                units,
                launch::elements(hidden),
                launch::elements(weight.view()),
                launch::elements(logits.view()),
                shape,
                blueprint,
                hidden.element().into(),
            );
        }
        return;
    }
    let (cubes, units) = blueprint.grid(batch, tokens, columns);
    // SAFETY: the caller has checked spans; each plane checks its tokens and columns.
    unsafe {
        project_kernel::launch_unchecked(
            client,
            cubes,
            units,
            launch::elements(hidden),
            launch::elements(weight.view()),
            launch::elements(logits.view()),
            shape,
            blueprint,
            [hidden.element().into(), weight.element().into()],
            blueprint.width,
        );
    }
}

#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct LinearShape {
    batch: u32,
    heads: u32,
    tokens: u32,
    model_dim: u32,
    hidden_batch: u32,
    hidden_token: u32,
    weight_row: u32,
}

/// The routes of four tokens by their logits, which become scores.
#[cube]
pub(crate) fn decide(
    logits: &mut Array<Vector<f32, Const<4>>>,
    cut: f32,
    #[comptime] choice: Choice,
) -> Vector<u32, Const<4>> {
    // Per lane: a route, and whether every logit is a number (x = x holds for numbers alone).
    let mut best = logits[0];
    let mut route = Vector::<u32, Const<4>>::new(0u32);
    let mut valid = best.equal(&best);
    match choice {
        Choice::Gate { inclusive } => {
            let z = logits[0];
            let cut = Vector::<f32, Const<4>>::new(cut);
            let mut far = z.greater_than(&cut);
            if comptime![inclusive] {
                far = z.greater_equal(&cut);
            }
            route = select_many(far, Vector::new(1u32), Vector::new(0u32));
            let one = Vector::<f32, Const<4>>::new(1.0f32);
            logits[0] = one / (one + (-z).exp());
        }
        Choice::Softmax { .. } => {
            for k in 1..comptime![choice.logits()] {
                let z = logits[k];
                let better = z.greater_than(&best);
                valid = valid.vec_and(z.equal(&z));
                best = select_many(better, z, best);
                route = select_many(better, Vector::new(k as u32), route);
            }
            let mut sum = Vector::<f32, Const<4>>::new(0.0f32);
            for k in 0..comptime![choice.logits()] {
                let p = (logits[k] - best).exp();
                logits[k] = p;
                sum += p;
            }
            for k in 0..comptime![choice.logits()] {
                logits[k] /= sum;
            }
        }
    }
    select_many(valid, route, Vector::new(comptime![INVALID_ROUTE as u32]))
}

/// One unit: four tokens (the lanes) of one router head.
#[cube(launch_unchecked)]
fn linear_kernel<E: Float, W: Float>(
    hidden: &[E],
    weight: &[W],
    bias: &[f32],
    scores: &mut [f32],
    routes: &mut [u32],
    counts: &[Atomic<u32>],
    shape: LinearShape,
    temperature: f32,
    cut: f32,
    #[comptime] choice: Choice,
    #[comptime] has_bias: bool,
    #[comptime] projected: bool,
    #[define(E, W)] _elements: [ElemType; 2],
) {
    let quads = shape.tokens.div_ceil(4u32);
    let work = shape.batch * shape.heads * quads;
    let position = min(ABSOLUTE_POS as u32, work - 1u32);
    let mut live = true;
    if comptime![projected] {
        // Planes count together, so their units stay together.
        live = ABSOLUTE_POS < work as usize;
    } else {
        if ABSOLUTE_POS >= work as usize {
            terminate!();
        }
    }
    let row = position / quads;
    let first = (position % quads) * 4u32;
    let batch = row / shape.heads;
    let head = row % shape.heads;
    let count = comptime![choice.logits()];

    let mut offsets = Array::<usize>::new(4usize);
    #[unroll]
    for lane in 0..4usize {
        let token = min(first + comptime![lane as u32], shape.tokens - 1);
        offsets[lane] = (batch * shape.hidden_batch + token * shape.hidden_token) as usize;
    }
    let mut logits = Array::<Vector<f32, Const<4>>>::new(count);
    for k in 0..count {
        let column = head as usize * count + k;
        let mut sum = Vector::<f32, Const<4>>::new(0.0f32);
        if comptime![projected] {
            #[unroll]
            for lane in 0..4usize {
                let token = min(first + comptime![lane as u32], shape.tokens - 1);
                let at = (row as usize * count + k) * shape.tokens as usize + token as usize;
                sum.insert(lane, scores[at]);
            }
        } else {
            for d in 0..shape.model_dim as usize {
                let mut x = Vector::<f32, Const<4>>::new(0.0f32);
                #[unroll]
                for lane in 0..4usize {
                    x.insert(lane, f32::cast_from(hidden[offsets[lane] + d]));
                }
                let w = f32::cast_from(weight[d * shape.weight_row as usize + column]);
                sum = fma(x, Vector::new(w), sum);
            }
        }
        if comptime![has_bias] {
            sum += Vector::new(bias[column]);
        }
        logits[k] = sum / Vector::new(temperature);
    }

    let route = decide(&mut logits, cut, choice);

    let reaches = comptime![choice.logits().max(2) as u32];
    let mut word = 0u32;
    #[unroll]
    for lane in 0..4usize {
        let token = first + comptime![lane as u32];
        if token < shape.tokens {
            word |= route.extract(lane) << comptime![lane as u32 * 8];
            for k in 0..count {
                let at = (row as usize * count + k) * shape.tokens as usize + token as usize;
                if live {
                    scores[at] = logits[k].extract(lane);
                }
            }
        } else {
            word |= comptime![(INVALID_ROUTE as u32) << (lane as u32 * 8)];
        }
    }
    if live {
        routes[position as usize] = word;
    }
    count_routes(counts, route, row, first, shape.tokens, live, reaches, projected);
}
