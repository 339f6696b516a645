//! Instructions that tensor-core routines share, as functions: arithmetic, addresses, copies, stores. Everything that
//! is PTX text lives in such modules, so that a later CubeCL with a frontend of its own for these can take its place.
//! Addresses of shared memory are 32 bits wide.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use crate::Operand;

/// 2^x, to about two units in the last place; subnormal results are zero.
#[cube]
pub fn exp2_fast(x: f32) -> f32 {
    let y: f32;
    gpu_asm!(
        "ex2.approx.ftz.f32 {y}, {x};",
        y = out(_) y, x = in(_) f32::reinterpret(x), options(pure, nomem)
    );
    y
}

/// Two numbers rounded to the operand type and packed, `low` in the low half.
#[cube]
pub fn pack(low: f32, high: f32, #[comptime] operand: Operand) -> u32 {
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
pub fn shared_address(slice: &[u32]) -> u32 {
    generic_to_shared::<u32>(slice.as_ptr())
}

/// The address of global memory.
#[cube]
pub fn global_address<E: CubePrimitive>(pointer: *const E) -> u64 {
    let address: u64;
    gpu_asm!("cvta.to.global.u64 {a}, {p};", a = out(_) address, p = in(_) pointer);
    address
}

/// Starts a copy of 16 bytes from global to shared memory.
#[cube]
pub fn copy_16(destination: u32, source: u64) {
    gpu_asm!(
        "cp.async.cg.shared.global [{d}], [{s}], 16;",
        d = in(_) destination, s = in(_) source
    );
}

/// Starts a copy of 16 bytes from global to shared memory, of which the first `bytes` are read and the others zero.
#[cube]
pub fn copy_16_or_zeros(destination: u32, source: u64, bytes: u32) {
    gpu_asm!(
        "cp.async.cg.shared.global [{d}], [{s}], 16, {n};",
        d = in(_) destination, s = in(_) source, n = in(_) bytes
    );
}

/// Makes a group of this thread's copies since the last.
#[cube]
pub fn copies_commit() {
    gpu_asm!("cp.async.commit_group;");
}

/// Waits for this thread's groups of copies, but for the `pending` newest.
#[cube]
pub fn copies_wait(#[comptime] pending: u32) {
    gpu_asm!("cp.async.wait_group {n};", n = const pending);
}

/// Waits for all of this thread's copies.
#[cube]
pub fn copies_wait_all() {
    gpu_asm!("cp.async.wait_all;");
}

/// Loads 16 bytes from global memory, which nobody writes.
#[cube]
pub fn load_16(source: u64) -> Vector<u32, Const<4>> {
    let four: Vector<u32, Const<4>>;
    gpu_asm!("ld.global.nc.L1::no_allocate.v4.b32 {x}, [{at}];", x = out(_) four, at = in(_) source);
    four
}

/// Four 8 x 8 matrices of shared memory: each thread names a row of one.
#[cube]
pub fn load_matrices(row: u32) -> Vector<u32, Const<4>> {
    let four: Vector<u32, Const<4>>;
    gpu_asm!("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {x}, [{at}];", x = out(_) four, at = in(_) row);
    four
}

/// [`load_matrices()`], each transposed.
#[cube]
pub fn load_transposed(row: u32) -> Vector<u32, Const<4>> {
    let four: Vector<u32, Const<4>>;
    gpu_asm!("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {x}, [{at}];", x = out(_) four, at = in(_) row);
    four
}

/// `sums + A B`: 16 rows, a depth of 16, 8 columns.
#[cube]
pub fn product(
    sums: Vector<f32, Const<4>>,
    a0: u32,
    a1: u32,
    a2: u32,
    a3: u32,
    b0: u32,
    b1: u32,
    #[comptime] element: &'static str,
) -> Vector<f32, Const<4>> {
    let added: Vector<f32, Const<4>>;
    gpu_asm!(
        "mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32 {d}, {{{a0}, {a1}, {a2}, {a3}}}, {{{b0}, {b1}}}, {c};",
        d = out(_) added, a0 = in(_) u32::reinterpret(a0), a1 = in(_) u32::reinterpret(a1),
        a2 = in(_) u32::reinterpret(a2), a3 = in(_) u32::reinterpret(a3), b0 = in(_) u32::reinterpret(b0),
        b1 = in(_) u32::reinterpret(b1), c = in(_) Vector::<f32, Const<4>>::reinterpret(sums), t = const element
    );
    added
}

/// [`product()`] of what [`load_matrices()`] or [`load_transposed()`] gave: of `b` its first eight columns or its last.
#[cube]
pub fn product_of(
    sums: Vector<f32, Const<4>>,
    a: Vector<u32, Const<4>>,
    b: Vector<u32, Const<4>>,
    #[comptime] half: usize,
    #[comptime] element: &'static str,
) -> Vector<f32, Const<4>> {
    product(
        sums,
        a.extract(0usize),
        a.extract(1usize),
        a.extract(2usize),
        a.extract(3usize),
        b.extract(comptime![2 * half]),
        b.extract(comptime![2 * half + 1]),
        element,
    )
}

/// Whether one of a word's two numbers is not finite.
#[cube]
pub fn is_odd(word: u32, #[comptime] operand: Operand) -> bool {
    let low = comptime![operand.exponent_bits()];
    let high = comptime![operand.exponent_bits() << 16];
    word & low == low || word & high == high
}

/// Both numbers of a word, the low one first.
#[cube]
pub fn unpack(word: u32, #[comptime] operand: Operand) -> Vector<f32, Const<2>> {
    let pair: Vector<f32, Const<2>>;
    let text = comptime![match operand {
        Operand::F16 => {
            "{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        }
        // A bf16 is the upper half of an f32.
        Operand::Bf16 => {
            "{ .reg .b32 low, high; shl.b32 low, %2, 16; and.b32 high, %2, -65536; \
             mov.b32 %0, low; mov.b32 %1, high; }"
        }
    }];
    gpu_asm!(
        "{text} // {x} {w}\n",
        x = out(_) pair, w = in(_) u32::reinterpret(word), text = const text, options(pure, nomem)
    );
    pair
}

/// The low halves of two words, or their high ones, the first word's below.
#[cube]
pub fn interleave(first: u32, second: u32, #[comptime] high: bool) -> u32 {
    let bytes = comptime![if high { 0x7632u32 } else { 0x5410u32 }];
    let both: u32;
    gpu_asm!(
        "prmt.b32 {x}, {a}, {b}, {s};",
        x = out(_) both, a = in(_) u32::reinterpret(first), b = in(_) u32::reinterpret(second),
        s = const bytes, options(pure, nomem)
    );
    both
}

/// Stores 16 bytes to global memory.
#[cube]
pub fn store_16(destination: u64, a: u32, b: u32, c: u32, d: u32) {
    gpu_asm!(
        "st.global.v4.b32 [{at}], {{{a}, {b}, {c}, {d}}};",
        at = in(_) destination, a = in(_) u32::reinterpret(a), b = in(_) u32::reinterpret(b),
        c = in(_) u32::reinterpret(c), d = in(_) u32::reinterpret(d)
    );
}

/// Loads two numbers from global memory.
#[cube]
pub fn load_pair(source: u64) -> Vector<f32, Const<2>> {
    let pair: Vector<f32, Const<2>>;
    gpu_asm!("ld.global.v2.f32 {p}, [{at}];", p = out(_) pair, at = in(_) source);
    pair
}

/// Loads four numbers from global memory.
#[cube]
pub fn load_quad(source: u64) -> Vector<f32, Const<4>> {
    let quad: Vector<f32, Const<4>>;
    gpu_asm!(
        "ld.global.v4.f32 {{%0, %1, %2, %3}}, [{at}]; // {q}\n",
        q = out(_) quad, at = in(_) source
    );
    quad
}

/// Stores four numbers to global memory.
#[cube]
pub fn store_quad(destination: u64, a: f32, b: f32, c: f32, d: f32) {
    gpu_asm!(
        "st.global.v4.f32 [{at}], {{{a}, {b}, {c}, {d}}};",
        at = in(_) destination, a = in(_) f32::reinterpret(a), b = in(_) f32::reinterpret(b),
        c = in(_) f32::reinterpret(c), d = in(_) f32::reinterpret(d)
    );
}

/// Stores two numbers to global memory.
#[cube]
pub fn store_pair(destination: u64, a: f32, b: f32) {
    gpu_asm!(
        "st.global.v2.f32 [{at}], {{{a}, {b}}};",
        at = in(_) destination, a = in(_) f32::reinterpret(a), b = in(_) f32::reinterpret(b)
    );
}

/// Loads two numbers from shared memory.
#[cube]
pub fn load_shared_pair(source: u32) -> Vector<f32, Const<2>> {
    let pair: Vector<f32, Const<2>>;
    gpu_asm!("ld.shared.v2.f32 {p}, [{at}];", p = out(_) pair, at = in(_) source);
    pair
}

/// Loads four numbers from shared memory.
#[cube]
pub fn load_shared_four(source: u32) -> Vector<f32, Const<4>> {
    let four: Vector<f32, Const<4>>;
    gpu_asm!("ld.shared.v4.f32 {x}, [{at}];", x = out(_) four, at = in(_) source);
    four
}

/// Stores four numbers to shared memory.
#[cube]
pub fn store_shared_four(destination: u32, four: Vector<f32, Const<4>>) {
    gpu_asm!(
        "st.shared.v4.f32 [{at}], {x};",
        at = in(_) destination, x = in(_) Vector::<f32, Const<4>>::reinterpret(four)
    );
}

/// Loads a word from shared memory.
#[cube]
pub fn load_shared_word(source: u32) -> u32 {
    let word: u32;
    gpu_asm!("ld.shared.b32 {x}, [{at}];", x = out(_) word, at = in(_) source);
    word
}

/// Loads four words from shared memory.
#[cube]
pub fn load_shared_words(source: u32) -> Vector<u32, Const<4>> {
    let four: Vector<u32, Const<4>>;
    gpu_asm!("ld.shared.v4.b32 {x}, [{at}];", x = out(_) four, at = in(_) source);
    four
}

/// Stores a word to shared memory.
#[cube]
pub fn store_shared_word(destination: u32, word: u32) {
    gpu_asm!("st.shared.b32 [{at}], {x};", at = in(_) destination, x = in(_) u32::reinterpret(word));
}

/// Stores four words to shared memory.
#[cube]
pub fn store_shared_words(destination: u32, a: u32, b: u32, c: u32, d: u32) {
    gpu_asm!(
        "st.shared.v4.b32 [{at}], {{{a}, {b}, {c}, {d}}};",
        at = in(_) destination, a = in(_) u32::reinterpret(a), b = in(_) u32::reinterpret(b),
        c = in(_) u32::reinterpret(c), d = in(_) u32::reinterpret(d)
    );
}

/// Stores 8 bytes to global memory.
#[cube]
pub fn store_8(destination: u64, a: u32, b: u32) {
    gpu_asm!(
        "st.global.v2.b32 [{at}], {{{a}, {b}}};",
        at = in(_) destination, a = in(_) u32::reinterpret(a), b = in(_) u32::reinterpret(b)
    );
}

/// Waits at the named barrier for `threads` threads.
#[cube]
pub fn turn_wait(name: u32, #[comptime] threads: usize) {
    gpu_asm!("bar.sync {n}, {threads};", n = in(_) name, threads = const threads);
}

/// Arrives at the named barrier without waiting.
#[cube]
pub fn turn_give(name: u32, #[comptime] threads: usize) {
    gpu_asm!("bar.arrive {n}, {threads};", n = in(_) name, threads = const threads);
}

/// The unit's number, asked for anew. What is computed from it inside of a loop stays there: compilers take what does
/// not change out of loops, and then it takes registers from those that hold sums.
#[cube]
pub fn unit_again() -> u32 {
    let unit: u32;
    gpu_asm!("mov.u32 {x}, %tid.x;", x = out(_) unit);
    unit
}
