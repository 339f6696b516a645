use bifocal::{
    Decision, Error, LinearChoice, LinearGate, Result, RouteGeometry, Router, Routes, TensorView,
    cubecl::client::Client,
};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::{
    GateOptions,
    place::{Origin, Place},
};

/// What a router decided for every token and router head: scores, routes, and how often each route was taken. Lives
/// on the device of the hidden states; attention uses it there, and nothing is read back unless asked for.
///
/// Route 0 is the nearest reach, the last is full attention.
#[derive(Clone, Debug)]
pub struct Routing {
    decision: Decision,
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
        let place = Place::of("Routing::from_routes", &[Origin::on("routes", &routes.device().inner())])?;
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
        Ok(Self { decision: Decision { scores: None, routes: decided, counts }, place })
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
    /// # Errors
    /// [`Error::Runtime`] when they have to be read (Flex) and the runtime failed.
    pub fn scores(&self) -> Result<Option<Tensor<4>>> {
        self.decision.scores.clone().map(|scores| self.place.export(scores)).transpose()
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

    /// The device that holds the routes.
    pub fn device(&self) -> &Device {
        self.place.device()
    }

    pub(crate) fn decision(&self) -> &Decision {
        &self.decision
    }
}

/// A linear gate per router head: `r = sigmoid((x W + b) / temperature)`, far iff `r` passes the threshold (AHA, arXiv
/// 2512.22562, section 3; L2A, arXiv 2603.17484).
///
/// Hidden states `[B, T, M]`, weight `[M, R]` (the layout of Burn's `Linear`), bias `[R]`; R is 1, Hk or H of the
/// attention that the routing is for.
///
/// # Errors
/// [`Error::NoBackward`] for tensors with autodiff; [`Error::DeviceMismatch`]; [`Error::Shape`];
/// [`Error::Option`] for devices without Bifocal kernels, element types other than f32, f16 and bf16, and
/// thresholds or temperatures that make no sense; [`Error::Refused`] when the device cannot count routes.
pub fn linear_gate(
    hidden: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    options: GateOptions,
) -> Result<Routing> {
    let parameters = Parameters { hidden, weight, bias };
    parameters.route("linear_gate", |client, hidden, weight, bias| {
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
/// Hidden states `[B, T, M]`, weight `[M, R * reaches]`, bias `[R * reaches]`.
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
    parameters.route("linear_choice", |client, hidden, weight, bias| {
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
    fn route(
        self,
        operation: &'static str,
        route: impl FnOnce(
            &Client,
            TensorView<'_, 3>,
            bifocal::Tensor<2>,
            Option<bifocal::Tensor<1>>,
        ) -> Result<Decision>,
    ) -> Result<Routing> {
        let Self { hidden, weight, bias } = self;
        let mut origins = vec![
            Origin::of("the hidden states", &hidden),
            Origin::of("the router's weight", &weight).of_any_dtype(),
        ];
        let bias_origin = |bias| Origin::of("the router's bias", bias).of_any_dtype();
        origins.extend(bias.as_ref().map(bias_origin));
        let place = Place::of(operation, &origins)?;
        let hidden = place.import("the hidden states", hidden)?;
        let weight = place.import("the router's weight", weight)?;
        // Biases are few, and the kernel reads them in f32.
        let bias = bias.map(|bias| place.import("the router's bias", bias.cast(DType::F32)));
        let decision = route(place.client(), hidden.view(), weight, bias.transpose()?)?;
        Ok(Routing { decision, place })
    }
}
