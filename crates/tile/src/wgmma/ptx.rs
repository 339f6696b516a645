//! Hopper's asynchronous machinery as functions: shared-memory addresses, mbarriers, bulk tensor loads, warpgroup
//! products. Everything that is PTX text lives here, so that a later CubeCL with a frontend of its own for these can
//! take its place. Sources: the PTX ISA, sections "mbarrier", "cp.async.bulk.tensor" and "Asynchronous Warpgroup Level
//! Matrix Instructions".
//!
//! Addresses are 32-bit addresses in shared memory. A warpgroup's product runs while its threads go on: what
//! [`scores_begin`] and [`values_begin`] return may be used only after it has passed through [`scores_end`] or
//! [`values_end`], which wait.

use cubecl::prelude::*;
use cubecl_core::{intrinsic, ir::prelude::*};
use cubecl_cpp::{cuda::ptx::tensor_map_address, shared::signature::IncludeOp};

pub(crate) use crate::tensor_core::ptx::{turn_give, turn_wait};
use crate::tensor_core::{PANEL, SWIZZLE, Shape};

/// The high half of every matrix descriptor: 128-byte swizzle, groups of eight rows 1,024 bytes apart.
const DESCRIPTOR_HIGH: u32 = (1 << 30) | units(1024) as u32;

fn registers(from: usize, count: usize) -> String {
    let names: Vec<String> = (from..from + count).map(|i| format!("%{i}")).collect();
    format!("{{{}}}", names.join(", "))
}

/// In the units of a matrix descriptor.
const fn units(bytes: usize) -> usize {
    bytes / 16
}

impl Shape {
    /// S = Q K^T for 64 rows: both operands in shared memory, head dim contiguous.
    fn scores(self) -> String {
        let Self { operand, rows, keys, dim } = self;
        let accumulators = keys / 2;
        let (query, key) = (accumulators, accumulators + 1);
        let mut text = String::from(
            "{ .reg .pred first, more; .reg .b32 x, y, high; .reg .b64 a, b; setp.ne.b32 first, 0, 0; \
             setp.ne.b32 more, 1, 0; ",
        );
        text += &format!("mov.b32 high, {DESCRIPTOR_HIGH}; wgmma.fence.sync.aligned; ");
        for step in 0..dim / 16 {
            let (panel, within) = (step * 16 / PANEL, units(step * 16 % PANEL * 2));
            let a = panel * units(rows * SWIZZLE) + within;
            let b = panel * units(keys * SWIZZLE) + within;
            let accumulate = if step == 0 { "first" } else { "more" };
            text += &format!(
                "add.u32 x, %{query}, {a}; mov.b64 a, {{x, high}}; add.u32 y, %{key}, {b}; mov.b64 b, {{y, high}}; \
                 wgmma.mma_async.sync.aligned.m64n{keys}k16.f32.{t}.{t} {d}, a, b, {accumulate}, 1, 1, 0, 0; ",
                t = operand.name(),
                d = registers(0, accumulators),
            );
        }
        text + "wgmma.commit_group.sync.aligned; }"
    }

    /// O += P V for 64 rows: P in registers, V in shared memory with the head dim contiguous, so transposed.
    fn values(self) -> String {
        let Self { operand, keys, .. } = self;
        let columns = self.columns();
        let (accumulators, weights) = (columns / 2, keys / 4);
        let value = 2 * accumulators + weights;
        let mut text = format!(
            "{{ .reg .pred more; .reg .b32 y, high; .reg .b64 b; setp.ne.b32 more, 1, 0; \
             mov.b32 high, {DESCRIPTOR_HIGH}; ",
        );
        for i in 0..accumulators {
            text += &format!("mov.f32 %{i}, %{}; ", i + accumulators);
        }
        text += "wgmma.fence.sync.aligned; ";
        for step in 0..keys / 16 {
            text += &format!(
                "add.u32 y, %{value}, {b}; mov.b64 b, {{y, high}}; \
                 wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{t}.{t} {d}, {a}, b, more, 1, 1, 1; ",
                b = step * units(16 * SWIZZLE),
                t = operand.name(),
                d = registers(0, accumulators),
                a = registers(2 * accumulators + step * 4, 4),
            );
        }
        text + "wgmma.commit_group.sync.aligned; }"
    }
}

/// Waits until at most `pending` products are in flight, and hands `count` accumulators over.
fn wait(pending: usize, count: usize) -> String {
    let mut text = format!("{{ wgmma.wait_group.sync.aligned {pending}; ");
    for i in 0..count {
        text += &format!("mov.f32 %{i}, %{}; ", i + count);
    }
    text + "}"
}

/// Begins S = Q K^T for the 64 rows that `query` describes against the `keys` that `key` describes.
#[cube]
pub(crate) fn scores_begin<NS: Size>(query: u32, key: u32, #[comptime] shape: Shape) -> Vector<f32, NS> {
    let body = comptime![shape.scores()];
    let scores: Vector<f32, NS>;
    gpu_asm!(
        "{body} // {s} {q} {k}\n",
        s = out(_) scores, q = in(_) query, k = in(_) key, body = const body
    );
    scores
}

/// Waits for scores while `pending` later products are in flight.
#[cube]
pub(crate) fn scores_end<NS: Size>(
    scores: Vector<f32, NS>,
    #[comptime] pending: usize,
    #[comptime] shape: Shape,
) -> Vector<f32, NS> {
    let body = comptime![wait(pending, shape.keys / 2)];
    let done: Vector<f32, NS>;
    gpu_asm!(
        "{body} // {d} {s}\n",
        d = out(_) done, s = in(_) Vector::<f32, NS>::reinterpret(scores), body = const body
    );
    done
}

/// Begins O += P V.
#[cube]
pub(crate) fn values_begin<NO: Size, NP: Size>(
    out: Vector<f32, NO>,
    weights: Vector<u32, NP>,
    value: u32,
    #[comptime] shape: Shape,
) -> Vector<f32, NO> {
    let body = comptime![shape.values()];
    let sum: Vector<f32, NO>;
    gpu_asm!(
        "{body} // {d} {o} {p} {v}\n",
        d = out(_) sum, o = in(_) Vector::<f32, NO>::reinterpret(out),
        p = in(_) Vector::<u32, NP>::reinterpret(weights), v = in(_) value, body = const body
    );
    sum
}

/// Waits for every product in flight. Takes the weights too, so that their registers stay theirs until then.
#[cube]
pub(crate) fn values_end<NO: Size, NP: Size>(
    out: Vector<f32, NO>,
    weights: Vector<u32, NP>,
    #[comptime] shape: Shape,
) -> Vector<f32, NO> {
    let body = comptime![wait(0, shape.columns() / 2)];
    let done: Vector<f32, NO>;
    gpu_asm!(
        "{body} // {d} {o} {p}\n",
        d = out(_) done, o = in(_) Vector::<f32, NO>::reinterpret(out),
        p = in(_) Vector::<u32, NP>::reinterpret(weights), body = const body
    );
    done
}

/// Keeps the wait for a product below the arithmetic that `after` comes from. The assembler takes a wait for work to be
/// started as early as it can, and moves it up before what it was to overlap with; it moves nothing over a sleep, which
/// no thread ever sleeps: `after` is a sum of weights.
#[cube]
pub(crate) fn wait_after(after: f32) {
    gpu_asm!(
        "{{ .reg .pred awake; setp.geu.f32 awake, {x}, 0f00000000; @awake bra over; nanosleep.u32 1; over: }}",
        x = in(_) f32::reinterpret(after)
    );
}

/// The low half of the matrix descriptor of a tile at `address` in the 128-byte swizzle, whose panels are `panel` bytes
/// apart. Steps through the tile are added to it; the high half is [`DESCRIPTOR_HIGH`].
#[cube]
pub(crate) fn descriptor(address: u32, #[comptime] panel: usize) -> u32 {
    comptime![(units(panel) as u32) << 16] | (address >> 4u32)
}

/// A number that is the same in every thread of a warp, in a register of the warp: what follows from it, loops and
/// descriptors, is computed once for all threads, and stands where products take it from.
#[cube]
pub(crate) fn uniform(x: u32) -> u32 {
    let y: u32;
    gpu_asm!("redux.sync.or.b32 {y}, {x}, 0xffffffff;", y = out(_) y, x = in(_) u32::reinterpret(x));
    y
}

/// Says in the launch bounds that one cube of the kernel runs on a multiprocessor at a time. Without a number there the
/// assembler does not know how many registers a thread begins with, and ignores [`more_registers`] and
/// [`fewer_registers`] (ptxas, C7508). CubeCL writes the number of threads alone, so the macro that it writes them with is
/// given the other: a header's line is the one place for it.
#[cube]
pub(crate) fn one_cube_per_multiprocessor() {
    intrinsic!(|scope| {
        let header = "cuda_fp16.h>\n#undef __launch_bounds__\n\
                      #define __launch_bounds__(threads) __attribute__((launch_bounds(threads, 1)))\n//";
        let context = scope.ctx_mut();
        let include = IncludeOp::new(context, header.to_string());
        let module = scope.state().module.get_body(context, 0);
        include.get_operation().insert_at_front(module, context);
    });
}

/// Takes registers that [`fewer_registers`] has freed: `count` per thread from here on. For a whole warpgroup.
#[cube]
pub(crate) fn more_registers(#[comptime] count: u32) {
    gpu_asm!("setmaxnreg.inc.sync.aligned.u32 {n};", n = const count);
}

/// Frees registers: `count` per thread from here on. For a whole warpgroup.
#[cube]
pub(crate) fn fewer_registers(#[comptime] count: u32) {
    gpu_asm!("setmaxnreg.dec.sync.aligned.u32 {n};", n = const count);
}

/// Readies an mbarrier for `count` arrivals per phase.
#[cube]
pub(crate) fn barrier_init(barrier: u32, count: u32) {
    gpu_asm!("mbarrier.init.shared::cta.b64 [{b}], {n};", b = in(_) barrier, n = in(_) count);
}

/// Makes initialised mbarriers visible to the copy engine; a `sync_cube` follows.
#[cube]
pub(crate) fn barriers_ready() {
    gpu_asm!("fence.mbarrier_init.release.cluster;");
    gpu_asm!("fence.proxy.async.shared::cta;");
}

/// One arrival.
#[cube]
pub(crate) fn arrive(barrier: u32) {
    gpu_asm!("mbarrier.arrive.shared::cta.b64 _, [{b}];", b = in(_) barrier);
}

/// One arrival that also announces `bytes` to come by bulk copy.
#[cube]
pub(crate) fn arrive_expecting(barrier: u32, bytes: u32) {
    gpu_asm!(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{b}], {n};",
        b = in(_) barrier, n = in(_) bytes
    );
}

/// Waits until the phase of that parity is over.
#[cube]
pub(crate) fn wait_parity(barrier: u32, parity: u32) {
    gpu_asm!(
        "{{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [{b}], {p}; @done bra over; \
         bra again; over: }}",
        b = in(_) barrier, p = in(_) parity
    );
}

/// Starts the copy of a box of a `[batch, head, token, dim]` tensor into shared memory; rows and columns beyond the
/// tensor are filled with zeros. Arrives at `barrier` by its bytes.
#[cube]
pub(crate) fn load_box<E: Numeric>(
    map: &TensorMap<E, Tiled>,
    destination: u32,
    barrier: u32,
    batch: u32,
    head: u32,
    token: u32,
    #[comptime] dim: u32,
) {
    let map = tensor_map_address(map);
    gpu_asm!(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [{d}], \
         [{m}, {{{dim}, {token}, {head}, {batch}}}], [{bar}];",
        d = in(_) destination, m = in(_) map, dim = const dim, token = in(_) token, head = in(_) head,
        batch = in(_) batch, bar = in(_) barrier
    );
}

/// [`load_box`] of whole rows: the tensor is read as `[batch, head, panel, token, column]`, a box has every panel.
#[cube]
pub(crate) fn load_panels<E: Numeric>(
    map: &TensorMap<E, Tiled>,
    destination: u32,
    barrier: u32,
    batch: u32,
    head: u32,
    token: u32,
) {
    let map = tensor_map_address(map);
    gpu_asm!(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [{d}], \
         [{m}, {{0, {token}, 0, {head}, {batch}}}], [{bar}];",
        d = in(_) destination, m = in(_) map, token = in(_) token, head = in(_) head,
        batch = in(_) batch, bar = in(_) barrier
    );
}

/// Waits for this thread's copies and lets the tensor cores see them.
#[cube]
pub(crate) fn copies_end() {
    gpu_asm!("cp.async.wait_all;");
    gpu_asm!("fence.proxy.async.shared::cta;");
}

/// Lets the tensor cores see this thread's copies that it has waited for.
#[cube]
pub(crate) fn copies_seen() {
    gpu_asm!("fence.proxy.async.shared::cta;");
}

/// Orders this thread's memory accesses before and after, for the whole device.
#[cube]
pub(crate) fn fence_device() {
    gpu_asm!("fence.acq_rel.gpu;");
}

/// Waits until the word at an address of global memory is `value`. What the thread that [`release`]d it had written, or
/// had met at a barrier, is seen by this thread then, and by those that meet it at a barrier.
#[cube]
pub(crate) fn wait_for(address: u64, value: u32) {
    gpu_asm!(
        "{{ .reg .pred done; .reg .b32 x; again: ld.acquire.gpu.global.u32 x, [{a}]; setp.eq.u32 done, x, {v}; \
         @done bra over; bra again; over: }}",
        a = in(_) address, v = in(_) u32::reinterpret(value)
    );
}

/// Writes a word of global memory for [`wait_for`].
#[cube]
pub(crate) fn release(address: u64, value: u32) {
    gpu_asm!(
        "st.release.gpu.global.u32 [{a}], {v};",
        a = in(_) address, v = in(_) u32::reinterpret(value)
    );
}
