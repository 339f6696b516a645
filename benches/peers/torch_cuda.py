#!/usr/bin/env python3
"""Times PyTorch's attention on an NVIDIA GPU: dense causal SDPA (flash and cuDNN) and FlexAttention.

The numbers to hold `bifocal bench --device cuda --element bf16` against: the same shapes, device events around each
call, inputs that rotate through more memory than the caches hold, and field names alike. Needs PyTorch with CUDA;
prints one JSON object, which `bifocal compare` joins with Bifocal's own. A case that this machine or this PyTorch cannot
run is listed with its reason.

  sdpa_flash    causal, every key up to the query's own (compare with `full`)
  sdpa_cudnn    the same by cuDNN
  flex_window   FlexAttention, compiled, with a block mask of the window (compare with `windowed`)
  flex_full     FlexAttention, compiled, causal
  flex_aha      FlexAttention, compiled, with a block mask of AHA's random routes (compare with `aha`)

With --backward each is timed together with the gradients of query, key and value, as `sdpa_flash-backward` and so on
(compare with `bifocal bench --backward`). The memory of a call is the most that it held beside its inputs.
"""

import argparse
import json
import math
import statistics
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

CASES = ["sdpa_flash", "sdpa_cudnn", "flex_window", "flex_full", "flex_aha"]

# Bytes of inputs to rotate through at least.
ROTATION_BYTES = 256 << 20
# How long a timed run is to take, if 32 calls do.
SAMPLE_MS = 4


def useful_pairs(length, window, heads, far):
    """Pairs of a query and a key that are visible in `heads` heads: the last `window` keys, the query's own included,
    and every one before it where `far`, a boolean [heads, length] or None, says so."""
    near = min(length, window)
    pairs = heads * (near * (near + 1) // 2 + (length - near) * window)
    if far is not None:
        beyond = (torch.arange(1, length + 1, device=far.device) - window).clamp(min=0)
        pairs += int((far * beyond).sum())
    return pairs


def dense(backend):
    """A call of dense causal attention that is held to one backend, so that no other takes its place."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return sdpa(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return call


def flex(length, window, heads, far):
    """A call of compiled FlexAttention. The block mask is built once, outside of what is timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(batch, head, query, key):
        return (key <= query) & (key > query - window)

    def routed(batch, head, query, key):
        return (key <= query) & ((key > query - window) | far[head, query])

    # After a few masks the compiler would give up and run the operations one by one.
    torch._dynamo.reset()
    shape = {"Q_LEN": length, "KV_LEN": length, "device": "cuda"}
    if far is None:
        mask = create_block_mask(near, B=None, H=None, **shape)
    else:
        # Compiled, so that no mask of heads x length x length is made on the way.
        mask = torch.compile(create_block_mask)(routed, B=None, H=heads, **shape)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def prepare(case, length, window, heads, far):
    if case == "sdpa_flash":
        return dense("FLASH_ATTENTION")
    if case == "sdpa_cudnn":
        return dense("CUDNN_ATTENTION")
    return flex(length, window, heads, far)


def differentiated(call, d_out):
    """The call, and the gradients of its inputs."""

    def both(q, k, v):
        out = call(q, k, v)
        torch.autograd.grad(out, (q, k, v), d_out)
        return out.detach()

    return both


def measure(call, sets, runs):
    """Milliseconds of the first call and of each timed run, by device events.

    Short calls are timed several at once, as a model makes them: alone, the host's part would show.
    """

    def once(run, calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for turn in range(calls):
            call(*sets[(run * calls + turn) % len(sets)])
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    first = once(0, 1)
    # Clocks rise and allocators settle.
    warm = [once(run, 1) for run in range(10)]
    calls = max(1, min(32, math.ceil(SAMPLE_MS / min(warm))))
    return first, [once(run, calls) for run in range(runs)]


def memory_of(call, inputs):
    """The most bytes that a call held at once, beside what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def error_of(out, q, k, v, window, far):
    """Largest difference to the formula in float64, for the last queries of the first head."""
    rows = min(64, q.shape[2])
    length = q.shape[2]
    q, k, v = q[0, 0, -rows:].double(), k[0, 0].double(), v[0, 0].double()
    i = torch.arange(length - rows, length, device=q.device)[:, None]
    j = torch.arange(length, device=q.device)[None, :]
    beyond = j <= i - window
    if far is not None:
        beyond &= ~far[0, -rows:, None]
    scores = (q @ k.T) * q.shape[1] ** -0.5
    scores = scores.masked_fill((j > i) | beyond, float("-inf"))
    return (torch.softmax(scores, -1) @ v - out[0, 0, -rows:].double()).abs().max().item()


def arguments():
    def numbers(text):
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="as many as query heads unless given")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--lengths", type=numbers, default=[8192, 32768])
    parser.add_argument("--window", type=int, default=256, help="keys, the query's own included")
    parser.add_argument("--far-share", type=float, default=0.067, help="share of token-heads that look far (flex_aha)")
    parser.add_argument("--cases", type=lambda text: text.split(","), default=CASES, help=",".join(CASES))
    parser.add_argument("--backward", action="store_true", help="time forward and backward pass together")
    parser.add_argument("--runs", type=int, default=21, help="timed runs per case; the median is reported")
    parser.add_argument("--json", metavar="FILE", help="write the JSON there instead of to standard output")
    args = parser.parse_args()
    unknown = [case for case in args.cases if case not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]}, expected some of {','.join(CASES)}")
    if args.kv_heads is None:
        args.kv_heads = args.heads
    return args


def main():
    args = arguments()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device, or a PyTorch without CUDA")
    with torch.inference_mode(not args.backward):
        run(args)


def run(args):
    torch.manual_seed(0)
    timings, left_out = [], []
    for length in args.lengths:
        query = (args.batch, args.heads, length, args.head_dim)
        key = (args.batch, args.kv_heads, length, args.head_dim)
        size = 2 * args.batch * (args.heads + 2 * args.kv_heads) * length * args.head_dim
        # Outputs and, in f32, log-sum-exps are written besides.
        useful_bytes = size + args.batch * args.heads * length * (2 * args.head_dim + 4)
        if args.backward:
            # Once more all of that, the outputs' gradients, and those of the inputs.
            useful_bytes += useful_bytes + 2 * args.batch * args.heads * length * args.head_dim + size
        turns = max(1, min(16, -(-ROTATION_BYTES // size)))

        def draw(shape):
            drawn = torch.empty(shape, device="cuda", dtype=torch.bfloat16).uniform_(-1.7, 1.7)
            return drawn.requires_grad_(args.backward)

        sets = [[draw(query), draw(key), draw(key)] for _ in range(turns)]
        for case in args.cases:
            window = args.window if case in ("flex_window", "flex_aha") else length
            far = None
            if case == "flex_aha":
                far = torch.rand((args.heads, length), device="cuda") < args.far_share
            try:
                call = prepare(case, length, window, args.heads, far)
                if args.backward:
                    call = differentiated(call, draw(query).detach())
                first, times = measure(call, sets, args.runs)
                memory = memory_of(call, sets[0])
                error = error_of(call(*sets[0]), *[part.detach() for part in sets[0]], window, far)
            # A missing backend, kernel or compiler shows as one of many types, and must not end the other cases.
            except Exception as reason:
                left_out.append({"case": case, "length": length, "reason": str(reason).strip().splitlines()[:1]})
                print(f"{case} {length}: cannot run: {reason}", file=sys.stderr)
                continue
            # bf16 keeps eight bits; more than this is another function, not another rounding.
            if not error < 0.05:
                sys.exit(f"{case} at {length} is off by {error}: it computes something else")
            flop = 4.0 * args.head_dim * useful_pairs(length, window, args.heads, far) * args.batch
            if args.backward:
                flop *= 3.5
            median = statistics.median_low(times)
            timings.append(
                {
                    "case": f"{case}-backward" if args.backward else case,
                    "length": length,
                    "first_call_ms": first,
                    "median_ms": median,
                    "fastest_ms": min(times),
                    "far_share": None if far is None else far.float().mean().item(),
                    "useful_flop": flop,
                    "useful_gflops": flop / median / 1e6,
                    "useful_bytes": useful_bytes,
                    "memory_bytes": memory,
                }
            )
            print(f"{case} {length}: {median:.3f} ms, {flop / median / 1e6:.0f} GFLOP/s", file=sys.stderr)
    report = {
        "device": "cuda",
        "name": torch.cuda.get_device_name(),
        "library": f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}",
        "element": "bf16",
        "batch": args.batch,
        "heads": args.heads,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "window": args.window,
        "far_share": args.far_share,
        "runs": args.runs,
        "timings": timings,
        "left_out": left_out,
    }
    with open(args.json, "w") if args.json else sys.stdout as file:
        json.dump(report, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    main()
