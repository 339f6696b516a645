#!/usr/bin/env python3
"""Times flash-linear-attention's simple linear attention on an NVIDIA GPU.

The numbers to hold `bifocal bench --device cuda --element bf16 --cases linear,rattention` against, measured as torch_cuda.py
does it; `linear` plus FlexAttention's window (`torch_cuda.py --cases flex_window`) is what RATTENTION would take from these
two. Needs PyTorch with CUDA and flash-linear-attention (`pip install flash-linear-attention==0.6.0`, or `fla-core` alone). Where
it is missing, the case is listed as not measured with the reason.

  fla_linear    causal sums of feature maps of twice the head dim, not normalised (compare with `linear`)

Queries and keys are given as features already, [softmax(x); softmax(-x)], and keys and values once per query head: its
kernels have neither, and neither is timed. It sums up to the query's own key, ours up to the key that left the window, which is as much work.
"""

import argparse
import json
import statistics
import sys

import torch

from torch_cuda import ROTATION_BYTES, differentiated, measure, memory_of

CASES = ["fla_linear"]


def features(x):
    return torch.cat([torch.softmax(x.float(), -1), torch.softmax(-x.float(), -1)], -1).to(torch.bfloat16)


def call(query, key, value):
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(query, key, value, scale=1.0, normalize=False)[0]


def error_of(out, query, key, value):
    """Largest difference to the formula in float64 beside the largest output, for the last queries of the first head."""
    rows, length = min(64, query.shape[1]), query.shape[1]
    q, k, v = query[0, -rows:, 0].double(), key[0, :, 0].double(), value[0, :, 0].double()
    seen = torch.arange(length, device=q.device)[None, :] <= torch.arange(length - rows, length, device=q.device)[:, None]
    exact = ((q @ k.T) * seen) @ v
    return ((exact - out[0, -rows:, 0].double()).abs().max() / exact.abs().max()).item()


def arguments():
    def numbers(text):
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="as many as query heads unless given")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--lengths", type=numbers, default=[8192, 32768])
    parser.add_argument("--backward", action="store_true", help="time forward and backward pass together")
    parser.add_argument("--runs", type=int, default=21, help="timed runs per case; the median is reported")
    parser.add_argument("--json", metavar="FILE", help="write the JSON there instead of to standard output")
    args = parser.parse_args()
    if args.kv_heads is None:
        args.kv_heads = args.heads
    return args


def main():
    args = arguments()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device, or a PyTorch without CUDA")
    torch.manual_seed(0)
    name = "fla_linear-backward" if args.backward else "fla_linear"
    timings, left_out = [], []
    for length in args.lengths:
        try:
            with torch.inference_mode(not args.backward):
                timings.append({"case": name, "length": length, **time_at(args, length)})
        # A missing library, kernel or compiler shows as one of many types, and must not end the other lengths.
        except Exception as reason:
            left_out.append({"case": name, "length": length, "reason": str(reason).strip().splitlines()[:1]})
            print(f"{name} {length}: cannot run: {reason}", file=sys.stderr)
            continue
        print(f"{name} {length}: {timings[-1]['median_ms']:.3f} ms", file=sys.stderr)
    report = {
        "device": "cuda",
        "name": torch.cuda.get_device_name(),
        "library": f"flash-linear-attention, torch {torch.__version__}",
        "element": "bf16",
        "batch": args.batch,
        "heads": args.heads,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "window": 0,
        "far_share": None,
        "runs": args.runs,
        "timings": timings,
        "left_out": left_out,
    }
    with open(args.json, "w") if args.json else sys.stdout as file:
        json.dump(report, file, indent=2)
        file.write("\n")


def time_at(args, length):
    size = 2 * args.batch * length * args.heads * 5 * args.head_dim
    turns = max(1, min(16, -(-ROTATION_BYTES // size)))

    def draw(heads):
        x = torch.empty((args.batch, length, heads, args.head_dim), device="cuda", dtype=torch.bfloat16)
        return x.uniform_(-1.7, 1.7).repeat_interleave(args.heads // heads, 2)

    def inputs():
        drawn = features(draw(args.heads)), features(draw(args.kv_heads)), draw(args.kv_heads)
        return [x.requires_grad_(args.backward) for x in drawn]

    sets = [inputs() for _ in range(turns)]
    run = differentiated(call, torch.randn_like(sets[0][2])) if args.backward else call
    first, times = measure(run, sets, args.runs)
    memory = memory_of(run, sets[0])
    error = error_of(run(*sets[0]), *[x.detach() for x in sets[0]])
    # bf16 keeps eight bits; more than this is another function, not another rounding.
    if not error < 0.05:
        sys.exit(f"fla_linear at {length} is off by {error}: it computes something else")
    return {
        "first_call_ms": first,
        "median_ms": statistics.median_low(times),
        "fastest_ms": min(times),
        "memory_bytes": memory,
    }


if __name__ == "__main__":
    main()
