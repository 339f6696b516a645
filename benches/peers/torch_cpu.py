#!/usr/bin/env python3
"""Times PyTorch's scaled_dot_product_attention on the CPU, over a sliding window.

The numbers to hold `bifocal bench --device cpu --cases windowed` against: the same shape, the same keys visible, the
same count of useful operations, and field names alike. Needs PyTorch (`pip install torch`); prints one JSON object.

Two cases, because PyTorch's CPU attention takes a window only as a mask, and computes what the mask hides:

  sdpa_mask     one call with a boolean mask [T, T] (8192 tokens: 64 MiB)
  sdpa_chunks   one call over chunks of `window` queries, each with the 2 x window keys it can see: the fairer peer
"""

import argparse
import json
import platform
import statistics
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa


def useful_pairs(length, window):
    """Pairs of a query and a key that a causal window of `window` keys, the query's own included, shows."""
    full = min(length, window)
    return full * (full + 1) // 2 + (length - full) * window


def banded(queries, keys, first_query, first_key, window):
    """Boolean mask: query i sees key j iff i - window < j <= i, and keys before the sequence never."""
    i = torch.arange(first_query, first_query + queries)[:, None]
    j = torch.arange(first_key, first_key + keys)[None, :]
    return (j <= i) & (j > i - window) & (j >= 0)


class Masked:
    """One call over the whole sequence."""

    name = "sdpa_mask"

    def __init__(self, length, window):
        self.mask = banded(length, length, 0, 0, window)

    def __call__(self, q, k, v):
        return sdpa(q, k, v, attn_mask=self.mask)


class Chunked:
    """Chunks of `window` queries against their own and the chunk of keys before it, as a batch.

    Copying the keys into overlapping chunks is part of what is timed; padding the sequence to whole chunks is, too.
    """

    name = "sdpa_chunks"

    def __init__(self, length, window):
        self.window, self.chunks = window, -(-length // window)
        first = banded(window, 2 * window, 0, -window, window)
        later = banded(window, 2 * window, window, 0, window)
        # [chunks, 1, window, 2 window]: chunks become the batch, so that heads keep their place.
        self.mask = torch.stack([first] + [later] * (self.chunks - 1))[:, None]

    def overlapping(self, x):
        batch, heads, length, dim = x.shape
        padding = (0, 0, self.window, self.chunks * self.window - length)
        x = torch.nn.functional.pad(x, padding).unfold(2, 2 * self.window, self.window)
        # [B, H, chunks, D, 2 window] -> [B * chunks, H, 2 window, D]
        return x.permute(0, 2, 1, 4, 3).reshape(batch * self.chunks, heads, 2 * self.window, dim)

    def __call__(self, q, k, v):
        batch, heads, length, dim = q.shape
        q = torch.nn.functional.pad(q, (0, 0, 0, self.chunks * self.window - length))
        q = q.reshape(batch, heads, self.chunks, self.window, dim).transpose(1, 2).flatten(0, 1)
        mask = self.mask.repeat(batch, 1, 1, 1)
        out = sdpa(q, self.overlapping(k), self.overlapping(v), attn_mask=mask)
        out = out.unflatten(0, (batch, self.chunks)).transpose(1, 2).flatten(2, 3)
        return out[:, :, :length]


def measure(case, sets, runs):
    """Milliseconds of the first call, and of each timed one."""

    def once(run):
        start = time.perf_counter()
        case(*sets[run % len(sets)])
        return (time.perf_counter() - start) * 1e3

    first = once(0)
    once(1)
    return first, [once(run) for run in range(runs)]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[8192])
    parser.add_argument("--window", type=int, default=256, help="keys, the query's own included")
    parser.add_argument("--runs", type=int, default=9, help="timed runs per case; the median is reported")
    parser.add_argument("--threads", type=int, help="threads of PyTorch; as many as there are cores unless given")
    parser.add_argument("--json", metavar="FILE", help="write the JSON there instead of to standard output")
    return parser.parse_args()


@torch.inference_mode()
def main():
    args = arguments()
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    timings = []
    for length in args.lengths:
        shape = (args.batch, args.heads, length, args.head_dim)
        # More bytes of inputs than the last-level cache holds, as `bifocal bench` does.
        turns = max(2, min(16, -(-(256 << 20) // (3 * 4 * args.batch * args.heads * length * args.head_dim))))
        sets = [[torch.rand(shape) * 3.4 - 1.7 for _ in range(3)] for _ in range(turns)]
        flop = 4.0 * args.head_dim * useful_pairs(length, args.window) * args.batch * args.heads
        cases = [case(length, args.window) for case in (Masked, Chunked)]
        measured = [measure(case, sets, args.runs) for case in cases]
        # Two ways to the same numbers: an error in either mask would show.
        torch.testing.assert_close(cases[0](*sets[0]), cases[1](*sets[0]), rtol=1e-4, atol=1e-4)
        for case, (first, times) in zip(cases, measured):
            median = statistics.median_low(times)
            timings.append(
                {
                    "case": case.name,
                    "length": length,
                    "first_call_ms": first,
                    "median_ms": median,
                    "fastest_ms": min(times),
                    "useful_flop": flop,
                    "useful_gflops": flop / median / 1e6,
                }
            )
            print(f"{case.name} {length}: {median:.2f} ms, {flop / median / 1e6:.1f} GFLOP/s", file=sys.stderr)
    report = {
        "device": "cpu",
        "name": platform.processor() or platform.machine(),
        "library": f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "element": "f32",
        "batch": args.batch,
        "heads": args.heads,
        "kv_heads": args.heads,
        "head_dim": args.head_dim,
        "window": args.window,
        "runs": args.runs,
        "timings": timings,
    }
    with open(args.json, "w") if args.json else sys.stdout as file:
        json.dump(report, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    main()
