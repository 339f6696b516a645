//! Instructions that tensor-core routines share, as functions: arithmetic, addresses, copies, stores. Everything that
//! is PTX text lives in such modules, so that a later CubeCL with a frontend of its own for these can take its place.
//! Addresses of shared memory are 32 bits wide.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use super::Operand;

/// 2^x, to about two units in the last place; subnormal results are zero.
#[cube]
pub(crate) fn exp2_fast(x: f32) -> f32 {
    let y: f32;
    gpu_asm!(
        "ex2.approx.ftz.f32 {y}, {x};",
        y = out(_) y, x = in(_) f32::reinterpret(x), options(pure, nomem)
    );
    y
}

/// Two numbers rounded to the operand type and packed, `low` in the low half.
#[cube]
pub(crate) fn pack(low: f32, high: f32, #[comptime] operand: Operand) -> u32 {
    let kind = comptime![operand.name()];
    let packed: u32;
    gpu_asm!(
        "cvt.rn.{kind}x2.f32 {y}, {high}, {low};",
        y = out(_) packed, high = in(_) f32::reinterpret(high), low = in(_) f32::reinterpret(low),
        kind = const kind, options(pure, nomem)
    );
    packed
}

/// The address of shared memory.
#[cube]
pub(crate) fn shared_address(slice: &[u32]) -> u32 {
    generic_to_shared::<u32>(slice.as_ptr())
}

/// The address of global memory.
#[cube]
pub(crate) fn global_address<E: CubePrimitive>(pointer: *const E) -> u64 {
    let address: u64;
    gpu_asm!("cvta.to.global.u64 {a}, {p};", a = out(_) address, p = in(_) pointer);
    address
}

/// Starts a copy of 16 bytes from global to shared memory.
#[cube]
pub(crate) fn copy_16(destination: u32, source: u64) {
    gpu_asm!(
        "cp.async.cg.shared.global [{d}], [{s}], 16;",
        d = in(_) destination, s = in(_) source
    );
}

/// Starts a copy of 16 bytes from global to shared memory, of which the first `bytes` are read and the others zero.
#[cube]
pub(crate) fn copy_16_or_zeros(destination: u32, source: u64, bytes: u32) {
    gpu_asm!(
        "cp.async.cg.shared.global [{d}], [{s}], 16, {n};",
        d = in(_) destination, s = in(_) source, n = in(_) bytes
    );
}

/// Makes a group of this thread's copies since the last.
#[cube]
pub(crate) fn copies_commit() {
    gpu_asm!("cp.async.commit_group;");
}

/// Waits for this thread's groups of copies, but for the `pending` newest.
#[cube]
pub(crate) fn copies_wait(#[comptime] pending: u32) {
    gpu_asm!("cp.async.wait_group {n};", n = const pending);
}

/// Stores 16 bytes to global memory.
#[cube]
pub(crate) fn store_16(destination: u64, a: u32, b: u32, c: u32, d: u32) {
    gpu_asm!(
        "st.global.v4.b32 [{at}], {{{a}, {b}, {c}, {d}}};",
        at = in(_) destination, a = in(_) u32::reinterpret(a), b = in(_) u32::reinterpret(b),
        c = in(_) u32::reinterpret(c), d = in(_) u32::reinterpret(d)
    );
}

/// Loads two numbers from global memory.
#[cube]
pub(crate) fn load_pair(source: u64) -> Vector<f32, Const<2>> {
    let pair: Vector<f32, Const<2>>;
    gpu_asm!("ld.global.v2.f32 {p}, [{at}];", p = out(_) pair, at = in(_) source);
    pair
}

/// Loads four numbers from global memory.
#[cube]
pub(crate) fn load_quad(source: u64) -> Vector<f32, Const<4>> {
    let quad: Vector<f32, Const<4>>;
    gpu_asm!(
        "ld.global.v4.f32 {{%0, %1, %2, %3}}, [{at}]; // {q}\n",
        q = out(_) quad, at = in(_) source
    );
    quad
}

/// Stores four numbers to global memory.
#[cube]
pub(crate) fn store_quad(destination: u64, a: f32, b: f32, c: f32, d: f32) {
    gpu_asm!(
        "st.global.v4.f32 [{at}], {{{a}, {b}, {c}, {d}}};",
        at = in(_) destination, a = in(_) f32::reinterpret(a), b = in(_) f32::reinterpret(b),
        c = in(_) f32::reinterpret(c), d = in(_) f32::reinterpret(d)
    );
}

/// Stores two numbers to global memory.
#[cube]
pub(crate) fn store_pair(destination: u64, a: f32, b: f32) {
    gpu_asm!(
        "st.global.v2.f32 [{at}], {{{a}, {b}}};",
        at = in(_) destination, a = in(_) f32::reinterpret(a), b = in(_) f32::reinterpret(b)
    );
}

/// Loads two numbers from shared memory.
#[cube]
pub(crate) fn load_shared_pair(source: u32) -> Vector<f32, Const<2>> {
    let pair: Vector<f32, Const<2>>;
    gpu_asm!("ld.shared.v2.f32 {p}, [{at}];", p = out(_) pair, at = in(_) source);
    pair
}

/// Loads four numbers from shared memory.
#[cube]
pub(crate) fn load_shared_four(source: u32) -> Vector<f32, Const<4>> {
    let four: Vector<f32, Const<4>>;
    gpu_asm!("ld.shared.v4.f32 {x}, [{at}];", x = out(_) four, at = in(_) source);
    four
}

/// Stores four numbers to shared memory.
#[cube]
pub(crate) fn store_shared_four(destination: u32, four: Vector<f32, Const<4>>) {
    gpu_asm!(
        "st.shared.v4.f32 [{at}], {x};",
        at = in(_) destination, x = in(_) Vector::<f32, Const<4>>::reinterpret(four)
    );
}

/// Waits at the named barrier for `threads` threads.
#[cube]
pub(crate) fn turn_wait(name: u32, #[comptime] threads: usize) {
    gpu_asm!("bar.sync {n}, {threads};", n = in(_) name, threads = const threads);
}

/// Arrives at the named barrier without waiting.
#[cube]
pub(crate) fn turn_give(name: u32, #[comptime] threads: usize) {
    gpu_asm!("bar.arrive {n}, {threads};", n = in(_) name, threads = const threads);
}

/// The unit's number, asked for anew. What is computed from it inside of a loop stays there: compilers take what does
/// not change out of loops, and then it takes registers from those that hold sums.
#[cube]
pub(crate) fn unit_again() -> u32 {
    let unit: u32;
    gpu_asm!("mov.u32 {x}, %tid.x;", x = out(_) unit);
    unit
}
