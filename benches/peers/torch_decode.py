#!/usr/bin/env python3
"""Times PyTorch's attention in decode steps on an NVIDIA GPU: one query per sequence over keys that are there already.

The numbers to hold `bifocal bench decode --device cuda --element bf16` against: the same shapes, device events, caches that
rotate through more memory than the device's caches hold, and field names alike. Needs PyTorch with CUDA; prints one JSON
object, which `bifocal compare` joins with Bifocal's own. A case that this machine or this PyTorch cannot run is listed with
its reason.

  sdpa_flash    every key, by flash (compare with `full`, and with `aha` for what gates save)
  sdpa_cudnn    the same by cuDNN

With grouped kv heads each backend is asked in two ways, by `enable_gqa` and with the heads of a group as the queries of one
head, which needs no copy of keys and no mask as each sees every key. Both are timed as calls and as a CUDA graph of calls,
which leaves the host out. What is reported is the fastest, as a peer would choose, and `routine` says which it was.
"""

import argparse
import json
import statistics
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from torch_cuda import ROTATION_BYTES, measure

BACKENDS = {"sdpa_flash": "FLASH_ATTENTION", "sdpa_cudnn": "CUDNN_ATTENTION"}
# Calls that a CUDA graph has: enough that its launch does not show.
GRAPH_CALLS = 32


def grouped(q, k, v):
    """The call that leaves grouping to the backend."""
    return sdpa(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def packed(q, k, v):
    """The heads of a group as the queries of their kv head."""
    batch, heads, _, dim = q.shape
    kv_heads = k.shape[1]
    return sdpa(q.view(batch, kv_heads, heads // kv_heads, dim), k, v).reshape(q.shape)


def measure_graph(call, sets, runs):
    """Milliseconds of each run, per call, of a CUDA graph with calls over sets in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept until the end, so that no two calls write to the same memory.
        kept = [call(*sets[turn % len(sets)]) for turn in range(GRAPH_CALLS)]

    def once():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / GRAPH_CALLS

    for _ in range(3):
        once()
    times = [once() for _ in range(runs)]
    del kept
    return times


def error_of(out, q, k, v, window=None):
    """Largest difference to the formula in float64, for the first and the last head; of the first sequence."""
    group = q.shape[1] // k.shape[1]
    errors = []
    for head in (0, q.shape[1] - 1):
        query = q[0, head].double()
        key, value = (part[0, head // group].double() for part in (k, v))
        if window is not None:
            key, value = key[-window:], value[-window:]
        weights = torch.softmax((query @ key.T) * q.shape[-1] ** -0.5, -1)
        errors.append((weights @ value - out[0, head].double()).abs().max().item())
    return max(errors)


def fastest(ways, sets, runs, expected):
    """First call and run times of the fastest of several ways to the same outputs, its name, and why others did not run.

    `ways` maps names to calls; `expected(name, out, set)` is the error of an output.
    """
    found, left_out = None, []

    def take(name, timed):
        nonlocal found
        # A missing backend, kernel or compiler shows as one of many types, and must not end the other ways.
        try:
            first, times = timed()
        except Exception as reason:
            left_out.append(f"{name}: {(str(reason).strip().splitlines() or [type(reason).__name__])[0]}")
            return False
        if found is None or statistics.median_low(times) < statistics.median_low(found[2]):
            found = (name, found[1] if found else first, times)
        return True

    for name, call in ways.items():
        if take(name, lambda: measure(call, sets, runs)):
            error = expected(call(*sets[0]), sets[0])
            # bf16 keeps eight bits; more than this is another function, not another rounding.
            if not error < 0.05:
                sys.exit(f"{name} is off by {error}: it computes something else")
            take(f"{name}, graph", lambda: (None, measure_graph(call, sets, runs)))
    return found, left_out


def timing(case, length, found, useful_bytes):
    name, first, times = found
    median = statistics.median_low(times)
    print(f"{case} {length}: {median:.4f} ms by {name}, {useful_bytes / median / 1e6:.0f} GB/s", file=sys.stderr)
    return {
        "case": case,
        "length": length,
        "routine": name,
        "first_call_ms": first,
        "median_ms": median,
        "fastest_ms": min(times),
        "useful_flop": None,
        "useful_gflops": None,
        "useful_bytes": useful_bytes,
    }


def bytes_of(args, keys):
    """Keys and values read once per kv head, queries and outputs."""
    return 4 * args.head_dim * args.batch * (args.kv_heads * keys + args.heads)


def turns_of(args, length):
    """How many caches to rotate through."""
    return max(1, min(16, -(-ROTATION_BYTES // (4 * args.batch * args.kv_heads * length * args.head_dim))))


def draw(*shape):
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).uniform_(-1.7, 1.7)


def arguments(about, cases):
    def numbers(text):
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="as many as query heads unless given")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--lengths", type=numbers, default=[32768], help="tokens in the cache of each sequence")
    parser.add_argument("--window", type=int, default=128, help="keys, the query's own included")
    parser.add_argument("--cases", type=lambda text: text.split(","), default=cases, help=",".join(cases))
    parser.add_argument("--runs", type=int, default=21, help="timed runs per case; the median is reported")
    parser.add_argument("--json", metavar="FILE", help="write the JSON there instead of to standard output")
    args = parser.parse_args()
    unknown = [case for case in args.cases if case not in cases]
    if unknown:
        parser.error(f"unknown case {unknown[0]}, expected some of {','.join(cases)}")
    if args.kv_heads is None:
        args.kv_heads = args.heads
    return args


def write(args, library, timings, left_out, **more):
    for case in left_out:
        print(f"{case['case']} {case['length']}: not measured: {case['reason']}", file=sys.stderr)
    report = {
        "device": "cuda",
        "name": torch.cuda.get_device_name(),
        "library": library,
        "element": "bf16",
        "batch": args.batch,
        "heads": args.heads,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "window": args.window,
        "queries": 1,
        "runs": args.runs,
        **more,
        "timings": timings,
        "left_out": left_out,
    }
    with open(args.json, "w") if args.json else sys.stdout as file:
        json.dump(report, file, indent=2)
        file.write("\n")


@torch.inference_mode()
def main():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    args = arguments(__doc__, list(BACKENDS))
    if not torch.cuda.is_available():
        sys.exit("no CUDA device, or a PyTorch without CUDA")
    torch.manual_seed(0)
    ways = {"enable_gqa": grouped, "packed": packed} if args.heads != args.kv_heads else {"plain": grouped}
    timings, left_out = [], []
    for length in args.lengths:
        cache = (args.batch, args.kv_heads, length, args.head_dim)
        query = (args.batch, args.heads, 1, args.head_dim)
        sets = [[draw(*query), draw(*cache), draw(*cache)] for _ in range(turns_of(args, length))]
        for case in args.cases:
            # Held to one backend, so that no other takes its place; around everything, so that it is not timed.
            with sdpa_kernel(getattr(SDPBackend, BACKENDS[case])):
                found, reasons = fastest(ways, sets, args.runs, lambda out, inputs: error_of(out, *inputs))
            if found is None:
                left_out.append({"case": case, "length": length, "reason": "; ".join(reasons)})
            else:
                timings.append(timing(case, length, found, bytes_of(args, length)))
    library = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    write(args, library, timings, left_out)


if __name__ == "__main__":
    main()
