//! Data for a case: on the device, and the same rounded numbers for the oracle.

use bifocal::cubecl::client::Client;
use bifocal::{Element, Inputs, Reach, RouteGeometry, Routes, Sequences, Tensor};
use bifocal_reference::{
    Array, Gradients, Options, Partial, attention_backward_where, attention_where,
    ragged_attention_backward_where, ragged_attention_where,
};
use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::case::{Case, Packed, Routing, Spread};

/// Rounds to an element type, as the device does.
pub(crate) fn round(element: Element, x: f32) -> f32 {
    match element {
        Element::F16 => f16::from_f32(x).to_f32(),
        Element::Bf16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Query, key, value and sink logits of a case, as numbers and as tensors.
#[derive(Clone)]
pub(crate) struct Data {
    pub(crate) query: Vec<f32>,
    pub(crate) key: Vec<f32>,
    pub(crate) value: Vec<f32>,
    pub(crate) sinks: Option<Vec<f32>>,
    case: Case,
}

impl Data {
    pub(crate) fn new(case: &Case) -> Self {
        let mut rng = SmallRng::seed_from_u64(case.seed);
        let mut draw = |n: usize, magnitude: f32| -> Vec<f32> {
            (0..n).map(|_| round(case.element, rng.random_range(-1.7f32..1.7) * magnitude)).collect()
        };
        let keys = case.batch * case.kv_heads * case.key_len;
        Self {
            query: draw(case.batch * case.heads() * case.query_len * case.head_dim, case.magnitude),
            key: draw(keys * case.head_dim, 1.0),
            value: draw(keys * case.value_dim, 1.0),
            sinks: case.sink_logits.then(|| draw(case.heads(), 2.0)),
            case: case.clone(),
        }
    }

    /// Makes a token's keys NaN, or its values.
    pub(crate) fn spoil(&mut self, token: usize, in_key: bool) {
        let (values, dim) = match in_key {
            true => (&mut self.key, self.case.head_dim),
            false => (&mut self.value, self.case.value_dim),
        };
        for head in values.chunks_mut(self.case.key_len * dim) {
            head[token * dim..][..dim].fill(f32::NAN);
        }
    }

    /// Gives every sequence the keys and values of the first.
    pub(crate) fn share_first_sequence(&mut self) {
        let case = &self.case;
        for (values, dim) in [(&mut self.key, case.head_dim), (&mut self.value, case.value_dim)] {
            let one = values[..case.kv_heads * case.key_len * dim].to_vec();
            values.chunks_mut(one.len()).for_each(|chunk| chunk.copy_from_slice(&one));
        }
    }

    pub(crate) fn query_shape(&self) -> [usize; 4] {
        let case = &self.case;
        [case.batch, case.heads(), case.query_len, case.head_dim]
    }

    pub(crate) fn key_shape(&self) -> [usize; 4] {
        let case = &self.case;
        [case.batch, case.kv_heads, case.key_len, case.head_dim]
    }

    pub(crate) fn value_shape(&self) -> [usize; 4] {
        let case = &self.case;
        [case.batch, case.kv_heads, case.key_len, case.value_dim]
    }

    pub(crate) fn upload(&self, client: &Client) -> bifocal::Result<OnDevice> {
        let element = self.case.element;
        Ok(OnDevice {
            query: Tensor::from_f32(client, self.query_shape(), element, &self.query)?,
            key: Tensor::from_f32(client, self.key_shape(), element, &self.key)?,
            value: Tensor::from_f32(client, self.value_shape(), element, &self.value)?,
            sinks: match &self.sinks {
                Some(sinks) => Some(Tensor::from_f32(client, [sinks.len()], Element::F32, sinks)?),
                None => None,
            },
            sequences: match &self.case.packed {
                Some(packed) => Some(Sequences::from_host(client, &packed.queries, &packed.keys)?),
                None => None,
            },
        })
    }

    /// [`upload`](Self::upload) with tokens before heads in memory. Where `broadcast`, all sequences share the keys and values
    /// of the first.
    pub(crate) fn upload_token_major(&self, client: &Client, broadcast: bool) -> bifocal::Result<OnDevice> {
        let upload = |values: &[f32], shape: [usize; 4], broadcast: bool| -> bifocal::Result<Tensor<4>> {
            let tensor = upload_token_major(client, self.case.element, values, shape)?;
            let mut strides = tensor.strides();
            if broadcast {
                strides[0] = 0;
            }
            Ok(Tensor::new(tensor.into_handle(), self.case.element, shape, strides))
        };
        Ok(OnDevice {
            query: upload(&self.query, self.query_shape(), false)?,
            key: upload(&self.key, self.key_shape(), broadcast)?,
            value: upload(&self.value, self.value_shape(), broadcast)?,
            ..self.upload(client)?
        })
    }

    /// What is done to scores, in `F`, and query, key and value.
    pub(crate) fn arrays<F: num_traits::Float>(
        &self,
        round_weight: fn(F) -> F,
    ) -> (Options<F>, [Array<F, 4>; 3]) {
        let problem = self.case.problem();
        let options = Options {
            scale: cast(&problem.scale),
            softcap: problem.softcap.as_ref().map(cast),
            sink_logits: self.sinks.as_ref().map(|sinks| sinks.iter().map(cast).collect()),
            round_weight,
        };
        let q = array(self.query_shape(), &self.query);
        let k = array(self.key_shape(), &self.key);
        let v = array(self.value_shape(), &self.value);
        (options, [q, k, v])
    }

    /// The oracle in `F`, with each row's reach given by `reach_of(batch, head, token)`, and what becomes of weights.
    pub(crate) fn oracle<F: num_traits::Float>(
        &self,
        round_weight: fn(F) -> F,
        reach_of: impl Fn(usize, usize, usize) -> Option<Reach>,
    ) -> Partial<F> {
        let (options, [q, k, v]) = self.arrays(round_weight);
        match &self.case.packed {
            Some(Packed { queries, keys }) => {
                ragged_attention_where(&q, &k, &v, (queries, keys), &options, |h, t| reach_of(0, h, t))
            }
            None => attention_where(&q, &k, &v, &options, reach_of),
        }
    }

    /// The oracle's backward pass in `F` of `partial`, which [`oracle`](Self::oracle) gave, and the gradient of its output.
    pub(crate) fn oracle_backward<F: num_traits::Float>(
        &self,
        round_weight: fn(F) -> F,
        partial: &Partial<F>,
        d_out: &[f32],
        reach_of: impl Fn(usize, usize, usize) -> Option<Reach>,
    ) -> Gradients<F> {
        let (options, [q, k, v]) = self.arrays(round_weight);
        let d_out = array(partial.out.shape(), d_out);
        match &self.case.packed {
            Some(Packed { queries, keys }) => {
                let lengths: (&[usize], &[usize]) = (queries, keys);
                ragged_attention_backward_where(&q, &k, &v, lengths, &options, partial, &d_out, |h, t| {
                    reach_of(0, h, t)
                })
            }
            None => attention_backward_where(&q, &k, &v, &options, partial, &d_out, reach_of),
        }
    }
}

fn cast<F: num_traits::Float>(x: &f32) -> F {
    F::from(*x).expect("an f32 fits every float")
}

/// Numbers as the oracle takes them.
pub(crate) fn array<F: num_traits::Float, const N: usize>(shape: [usize; N], values: &[f32]) -> Array<F, N> {
    Array::new(shape, values.iter().map(cast).collect())
}

/// `[B, H, T, D]` laid out in memory as `[B, T, H, D]`, and the strides to read it with.
pub(crate) fn token_major(values: &[f32], [batch, heads, tokens, dim]: [usize; 4]) -> (Vec<f32>, [usize; 4]) {
    let mut moved = Vec::with_capacity(values.len());
    for b in 0..batch {
        for t in 0..tokens {
            for h in 0..heads {
                moved.extend_from_slice(&values[((b * heads + h) * tokens + t) * dim..][..dim]);
            }
        }
    }
    (moved, [tokens * heads * dim, dim, heads * dim, 1])
}

/// A tensor with tokens before heads in memory.
pub(crate) fn upload_token_major(
    client: &Client,
    element: Element,
    values: &[f32],
    shape: [usize; 4],
) -> bifocal::Result<Tensor<4>> {
    let (moved, strides) = token_major(values, shape);
    let tensor = Tensor::from_f32(client, [moved.len()], element, &moved)?;
    Ok(Tensor::new(tensor.into_handle(), element, shape, strides))
}

/// Tensors of a case in device memory.
pub(crate) struct OnDevice {
    pub(crate) query: Tensor<4>,
    pub(crate) key: Tensor<4>,
    pub(crate) value: Tensor<4>,
    pub(crate) sinks: Option<Tensor<1>>,
    pub(crate) sequences: Option<Sequences>,
}

impl OnDevice {
    pub(crate) fn inputs(&self) -> Inputs<'_> {
        let mut inputs = Inputs::new(self.query.view(), self.key.view(), self.value.view());
        if let Some(sinks) = &self.sinks {
            inputs = inputs.with_sink_logits(sinks.view());
        }
        match &self.sequences {
            Some(sequences) => inputs.with_sequences(sequences),
            None => inputs,
        }
    }
}

/// Routes drawn for a case: on the host, and the geometry.
pub(crate) struct HostRoutes {
    pub(crate) geometry: RouteGeometry,
    pub(crate) routes: Vec<u8>,
}

impl HostRoutes {
    pub(crate) fn new(case: &Case, routing: &Routing, reaches: usize) -> Self {
        let heads = routing.heads.count(case);
        let geometry = RouteGeometry::new(case.batch, heads, case.query_len, reaches)
            .expect("drawn shapes are possible");
        let mut rng = SmallRng::seed_from_u64(case.seed ^ 0x5eed);
        let far = (reaches - 1) as u8;
        let mut routes: Vec<u8> = (0..geometry.len())
            .map(|_| match routing.spread {
                Spread::AllNear | Spread::OneFar => 0,
                Spread::AllFar => far,
                // The far share on the last reach, the others evenly on the rest.
                Spread::Share(share) if rng.random_bool(share) => far,
                Spread::Share(_) => rng.random_range(0..reaches.max(2) - 1) as u8,
            })
            .collect();
        if let Spread::OneFar = routing.spread {
            let at = rng.random_range(0..routes.len());
            routes[at] = far;
        }
        Self { geometry, routes }
    }

    pub(crate) fn at(&self, heads: usize, batch: usize, head: usize, token: usize) -> u8 {
        let RouteGeometry { heads: router_heads, tokens, .. } = self.geometry;
        let row = batch * router_heads + head * router_heads / heads;
        self.routes[row * tokens + token]
    }

    pub(crate) fn array(&self) -> Array<u8, 3> {
        let RouteGeometry { batch, heads, tokens, .. } = self.geometry;
        Array::new([batch, heads, tokens], self.routes.clone())
    }

    pub(crate) fn upload(&self, client: &Client) -> bifocal::Result<Routes> {
        Routes::from_host(client, self.geometry, &self.routes)
    }

    /// [`upload`](Self::upload) as a kernel would have written them: routes that name no reach are let through.
    pub(crate) fn upload_unchecked(&self, client: &Client) -> bifocal::Result<Routes> {
        Routes::from_device(client, self.geometry, client.create_from_slice(&self.padded()))
    }

    /// The bytes of the routes in device memory.
    pub(crate) fn padded(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.geometry.bytes()];
        let rows = bytes.chunks_mut(self.geometry.pitch()).zip(self.routes.chunks(self.geometry.tokens));
        for (row, tokens) in rows {
            row[..tokens.len()].copy_from_slice(tokens);
        }
        bytes
    }
}
