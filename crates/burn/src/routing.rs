use bifocal::{
    Decision, Error, LinearChoice, LinearGate, Result, RouteGeometry, Router, Routes, TensorView,
    cubecl::client::Client,
};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::{
    GateOptions,
    autodiff::Differentiable,
    place::{Origin, Place},
};

/// What a router decided for every token and router head: scores, routes, and how often each route was taken. Lives
/// on the device of the hidden states; attention uses it there, and nothing is read back unless asked for.
///
/// Route 0 is the nearest reach, the last is full attention.
#[derive(Clone, Debug)]
pub struct Routing {
    decision: Decision,
    /// The scores as autodiff knows them, where it does.
    scores: Option<Tensor<4>>,
    place: Place,
}

impl Routing {
    /// Takes routes `[B, R, T]` that some other router chose: numbers below `reaches`, 0 the nearest. Reads them
    /// back to check them, so it waits for the device.
    ///
    /// # Errors
    /// [`Error::RouteOutOfRange`] naming the first route that is; [`Error::Option`] for a device without Bifocal
    /// kernels or reaches beyond 255; [`Error::EmptyDimension`]; [`Error::Runtime`].
    pub fn from_routes(routes: Tensor<3, Int>, reaches: usize) -> Result<Self> {
        let [batch, heads, tokens] = routes.dims();
        let geometry = RouteGeometry::new(batch, heads, tokens, reaches)?;
        // Routes are integers, which no gradient goes through: autodiff on their device means nothing.
        let place = Place::of(&[Origin::on("routes", &routes.device().inner())])?;
        let data = routes.try_into_data().map_err(|error| Error::Runtime(format!("{error:?}")))?;
        // What no byte holds is out of range too.
        let routes: Vec<u8> = data.iter::<i64>().map(|k| u8::try_from(k).unwrap_or(u8::MAX)).collect();
        let client = place.client();
        let decided = Routes::from_host(client, geometry, &routes)?;
        let mut counts = vec![0u32; batch * heads * (reaches + 1)];
        for (row, routes) in counts.chunks_mut(reaches + 1).zip(routes.chunks(tokens)) {
            routes.iter().for_each(|&route| row[usize::from(route)] += 1);
        }
        let counts: Vec<u8> = counts.into_iter().flat_map(u32::to_ne_bytes).collect();
        let counts = client.create_from_slice(&counts);
        Ok(Self { decision: Decision { scores: None, routes: decided, counts }, scores: None, place })
    }

    /// What a router decided there that learns nothing.
    pub(crate) fn decided(place: Place, decision: Decision) -> Self {
        Self { decision, scores: None, place }
    }

    /// `[B, R, T]`: sequences, router heads, tokens.
    pub fn shape(&self) -> [usize; 3] {
        let RouteGeometry { batch, heads, tokens, .. } = self.decision.routes.geometry();
        [batch, heads, tokens]
    }

    /// How many reaches a route can name: 2 for a gate.
    pub fn reaches(&self) -> usize {
        self.decision.routes.geometry().reaches
    }

    /// The router's real numbers, `[B, R, K, T]` in f32: K = 1 for a gate (its sigmoid), one per reach for a choice
    /// (its softmax). `None` for routes from elsewhere.
    ///
    /// With autodiff, their gradient goes to the router's hidden states, weight and bias. Attention adds its own to it,
    /// and so does any loss on the scores, such as the [penalties](crate::mean_penalty).
    ///
    /// # Errors
    /// [`Error::Runtime`] when they have to be read (Flex) and the runtime failed.
    pub fn scores(&self) -> Result<Option<Tensor<4>>> {
        match &self.scores {
            Some(scores) => Ok(Some(scores.clone())),
            None => self.decision.scores.clone().map(|scores| self.place.export(scores)).transpose(),
        }
    }

    /// Reads the routes back: `[B, R, T]`, row-major; [`INVALID_ROUTE`](bifocal::INVALID_ROUTE) where the score was
    /// NaN. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Runtime`].
    pub fn to_host(&self) -> Result<Vec<u8>> {
        self.decision.routes.to_host(self.place.client())
    }

    /// The routes `[B, R, T]` as a Burn tensor of 32-bit integers, such as [`composed`](crate::composed) takes.
    /// Goes through the host and waits for the device.
    ///
    /// # Errors
    /// [`Error::Runtime`].
    pub fn routes(&self) -> Result<Tensor<3, Int>> {
        let routes: Vec<i32> = self.to_host()?.into_iter().map(i32::from).collect();
        let data = TensorData::new(routes, self.shape());
        Ok(Tensor::from_data(data, (self.place.device(), DType::I32)))
    }

    /// The share of tokens on full attention, per batch and router head (`[B, R]`, row-major). Waits for the device.
    ///
    /// # Errors
    /// [`Error::InvalidScores`] when a score was NaN; [`Error::Runtime`].
    pub fn far_share(&self) -> Result<Vec<f64>> {
        self.decision.far_share(self.place.client())
    }

    /// The device that holds the routes, without autodiff.
    pub fn device(&self) -> &Device {
        self.place.device()
    }

    /// The scores, where a parameter learns from them.
    pub(crate) fn tracked_scores(&self) -> Option<Tensor<4>> {
        self.scores.clone().filter(|scores| scores.is_tracked())
    }

    pub(crate) fn decision(&self) -> &Decision {
        &self.decision
    }
}

/// What any router decides of hidden states `[B, T, M]`, such as one of your own. Its scores, if it has any, have no
/// gradient: a router that learns is [`linear_gate`] or [`linear_choice`].
///
/// # Errors
/// [`Error::Option`] for devices without Bifocal kernels and element types other than f32, f16 and bf16; the router's own.
pub fn route(router: &dyn Router, hidden: Tensor<3>) -> Result<Routing> {
    let place = Place::of(&[Origin::of("the hidden states", &hidden)])?;
    let hidden = place.import("the hidden states", hidden)?;
    let decision = router.route(place.client(), hidden.view())?;
    Ok(Routing::decided(place, decision))
}

/// A linear gate per router head: `r = sigmoid((x W + b) / temperature)`, far iff `r` passes the threshold (AHA, arXiv
/// 2512.22562, section 3; L2A, arXiv 2603.17484).
///
/// Hidden states `[B, T, M]`, weight `[M, R]` (the layout of Burn's `Linear`), bias `[R]`; R is 1, Hk or H of the
/// attention that the routing is for.
///
/// With autodiff, hidden states, weight and bias get the gradients of [`Routing::scores`], computed in f32.
///
/// # Errors
/// [`Error::DeviceMismatch`]; [`Error::Shape`];
/// [`Error::Option`] for devices without Bifocal kernels, element types other than f32, f16 and bf16, several strategies
/// of gradient checkpointing, and thresholds or temperatures that make no sense; [`Error::Refused`] when the device
/// cannot count routes.
pub fn linear_gate(
    hidden: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    options: GateOptions,
) -> Result<Routing> {
    let parameters = Parameters { hidden, weight, bias };
    parameters.route(options.temperature, |client, hidden, weight, bias| {
        let gate = LinearGate::aha(weight)
            .with_threshold(options.threshold)?
            .with_temperature(options.temperature)?;
        let gate = match bias {
            Some(bias) => gate.with_bias(bias),
            None => gate,
        };
        gate.route(client, hidden)
    })
}

/// A linear choice among `reaches`: `p = softmax(x W + b)` per router head, the route is the largest, the nearest of
/// equals. Column `r * reaches + k` scores reach `k` for router head `r`.
///
/// Hidden states `[B, T, M]`, weight `[M, R * reaches]`, bias `[R * reaches]`. Gradients as in [`linear_gate`].
///
/// # Errors
/// As [`linear_gate`]; [`Error::Option`] for fewer than 2 or more than 32 reaches.
pub fn linear_choice(
    hidden: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    reaches: usize,
) -> Result<Routing> {
    let parameters = Parameters { hidden, weight, bias };
    parameters.route(1.0, |client, hidden, weight, bias| {
        let choice = LinearChoice::new(weight, reaches)?;
        let choice = match bias {
            Some(bias) => choice.with_bias(bias),
            None => choice,
        };
        choice.route(client, hidden)
    })
}

/// What a linear router reads.
struct Parameters {
    hidden: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
}

impl Parameters {
    /// Logits are divided by the temperature.
    fn route(
        self,
        temperature: f32,
        route: impl FnOnce(
            &Client,
            TensorView<'_, 3>,
            bifocal::Tensor<2>,
            Option<bifocal::Tensor<1>>,
        ) -> Result<Decision>,
    ) -> Result<Routing> {
        let Self { hidden, weight, bias } = self;
        // Biases are few, and the kernel reads them in f32.
        let bias = bias.map(|bias| bias.cast(DType::F32));
        let mut origins = vec![
            Origin::of("the hidden states", &hidden),
            Origin::of("the router's weight", &weight).of_any_dtype(),
        ];
        let bias_origin = |bias| Origin::of("the router's bias", bias).of_any_dtype();
        origins.extend(bias.as_ref().map(bias_origin));
        let place = Place::of(&origins)?;
        let hidden_there = place.import("the hidden states", hidden.clone())?;
        let weight_there = place.import("the router's weight", weight.clone())?;
        let bias_there = bias.clone().map(|bias| place.import("the router's bias", bias)).transpose()?;
        let decision = route(place.client(), hidden_there.view(), weight_there, bias_there)?;

        let scores = decision.scores.clone().filter(|_| place.has_autodiff());
        let scores = scores.map(|scores| -> Result<Tensor<4>> {
            let scores = place.export(scores)?;
            let step = LinearRouter { scores: scores.clone(), temperature };
            let (hidden, weight) = (hidden.unsqueeze::<4>(), weight.unsqueeze::<4>());
            match bias {
                Some(bias) => place.record([hidden, weight, bias.unsqueeze::<4>()], scores, step),
                None => place.record([hidden, weight], scores, step),
            }
        });
        Ok(Routing { decision, scores: scores.transpose()?, place })
    }
}

/// A linear router in the autodiff graph: scores out of hidden states `[1, B, T, M]`, a weight `[1, 1, M, C]` and, where
/// there is one, a bias `[1, 1, 1, C]`, with C = R K columns.
#[derive(Clone, Debug)]
struct LinearRouter {
    /// `[B, R, K, T]`: a sigmoid where K = 1, otherwise a softmax over K.
    scores: Tensor<4>,
    temperature: f32,
}

impl Differentiable for LinearRouter {
    fn backward(self, inputs: Vec<Tensor<4>>, d_scores: Tensor<4>) -> Result<Vec<Tensor<4>>> {
        let Self { scores, temperature } = self;
        let [batch, router_heads, choices, tokens] = scores.dims();
        let d_logits = match choices {
            1 => d_scores * scores.clone() * scores.neg().add_scalar(1.0),
            _ => {
                let mean = (d_scores.clone() * scores.clone()).sum_dim(2);
                (d_scores - mean) * scores
            }
        };
        let d_logits = d_logits.div_scalar(temperature);
        let (rows, columns) = (batch * tokens, router_heads * choices);
        let d_logits = d_logits.permute([0, 3, 1, 2]).reshape([rows, columns]);

        let [hidden, weight] = [&inputs[0], &inputs[1]];
        let ([.., model_dim], hidden_type, weight_type) = (hidden.dims(), hidden.dtype(), weight.dtype());
        let flat = |tensor: &Tensor<4>, rows: usize, columns: usize| {
            tensor.clone().reshape([rows, columns]).cast(DType::F32)
        };
        let d_hidden = d_logits.clone().matmul(flat(weight, model_dim, columns).transpose());
        let d_weight = flat(hidden, rows, model_dim).transpose().matmul(d_logits.clone());
        let mut gradients = vec![
            d_hidden.cast(hidden_type).reshape([1, batch, tokens, model_dim]),
            d_weight.cast(weight_type).unsqueeze(),
        ];
        if inputs.len() == 3 {
            gradients.push(d_logits.sum_dim(0).unsqueeze());
        }
        Ok(gradients)
    }
}
