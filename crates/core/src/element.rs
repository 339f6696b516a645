use core::fmt;

/// The element type of a tensor in device memory.
///
/// Every kernel accumulates in `f32`, whatever the element type of its inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Element {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: eight bits of exponent, seven of fraction.
    Bf16,
    /// Unsigned byte: routes.
    U8,
}

impl Element {
    /// The float types that attention inputs may have.
    pub const FLOATS: [Element; 3] = [Element::F32, Element::F16, Element::Bf16];

    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
            Element::U8 => 1,
        }
    }

    /// The distance from 1 to the next larger number; 0 for integers.
    ///
    /// Error bounds of tests and checks are stated in multiples of it.
    pub fn epsilon(self) -> f64 {
        match self {
            Element::F32 => f64::from(f32::EPSILON),
            Element::F16 => 2f64.powi(-10),
            Element::Bf16 => 2f64.powi(-7),
            Element::U8 => 0.0,
        }
    }
}

#[cfg(feature = "device")]
impl From<Element> for cubecl::ir::ElemType {
    fn from(element: Element) -> Self {
        use cubecl::ir::{ElemType, FloatKind, UIntKind};

        match element {
            Element::F32 => ElemType::Float(FloatKind::F32),
            Element::F16 => ElemType::Float(FloatKind::F16),
            Element::Bf16 => ElemType::Float(FloatKind::BF16),
            Element::U8 => ElemType::UInt(UIntKind::U8),
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Element::F32 => "f32",
            Element::F16 => "f16",
            Element::Bf16 => "bf16",
            Element::U8 => "u8",
        })
    }
}
