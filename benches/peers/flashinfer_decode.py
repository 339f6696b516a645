#!/usr/bin/env python3
"""Times FlashInfer's paged decode on an NVIDIA GPU: one query per sequence over pages of keys that are there already.

The numbers to hold `bifocal bench decode --device cuda --element bf16 --page-size 16` against, measured as torch_decode.py
does it. Needs PyTorch with CUDA and FlashInfer (`pip install flashinfer-python==0.5.3`), which compiles its kernels with nvcc
when they are first called. Where it is missing, or where nvcc is, the cases are listed as not measured with the reason.

  flashinfer          every key (compare with `full`, and with `aha` for what gates save)
  flashinfer_window   the window alone (compare with `window`)

Its plan is made once on the host, as a model makes it for all of its layers, and is not part of a call; `plan_ms` is what it
took. Kernels for CUDA cores and for tensor cores are both timed; reported is the fastest.
"""

import sys
import time

import torch

from torch_decode import arguments, bytes_of, draw, error_of, fastest, timing, turns_of, write

CASES = ["flashinfer", "flashinfer_window"]
# What FlashInfer's documentation gives its wrapper to work in.
WORKSPACE_BYTES = 128 << 20


def prepare(flashinfer, args, length, window, tensor_cores):
    """A call of paged decode with its plan made, the pages' order, and how long the plan took."""
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=tensor_cores
    )
    pages = -(-length // args.page_size)
    # In no order, as a server's pages are after a while.
    order = torch.randperm(args.batch * pages, device="cuda").int()
    starts = torch.arange(args.batch + 1, device="cuda", dtype=torch.int32) * pages
    last = torch.full((args.batch,), length - (pages - 1) * args.page_size, device="cuda", dtype=torch.int32)

    def plan():
        wrapper.plan(
            starts,
            order,
            last,
            args.heads,
            args.kv_heads,
            args.head_dim,
            args.page_size,
            # The query's own key is not counted.
            window_left=-1 if window is None else window - 1,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        torch.cuda.synchronize()

    # The first plan loads or compiles the kernels.
    plan()
    start = time.perf_counter()
    plan()
    took = (time.perf_counter() - start) * 1e3
    return (lambda query, keys, values: wrapper.run(query, (keys, values))), order, took


def unpaged(pool, order, batch, length):
    """The first sequence's keys or values, `[1, kv heads, length, dim]`, from pages `[pages, size, kv heads, dim]`."""
    pages = pool[order[: len(order) // batch].long()]
    return pages.flatten(0, 1)[:length].transpose(0, 1)[None]


@torch.inference_mode()
def main():
    args = arguments(__doc__, CASES)
    args.page_size = 16
    if not torch.cuda.is_available():
        sys.exit("no CUDA device, or a PyTorch without CUDA")
    every = [(case, length) for length in args.lengths for case in args.cases]
    try:
        import flashinfer
    # What is missing may be the wheel, a library that it loads, or a version that it expects.
    except Exception as reason:
        left_out = [{"case": case, "length": length, "reason": f"no FlashInfer: {reason}"} for case, length in every]
        write(args, "flashinfer, not there", [], left_out, page_size=args.page_size)
        return
    torch.manual_seed(0)
    timings, left_out = [], []
    for length in args.lengths:
        pool = (args.batch * -(-length // args.page_size), args.page_size, args.kv_heads, args.head_dim)
        query = (args.batch, args.heads, args.head_dim)
        sets = [[draw(*query), draw(*pool), draw(*pool)] for _ in range(turns_of(args, length))]
        for case in args.cases:
            window = args.window if case == "flashinfer_window" else None
            found, took, reasons = None, None, []
            for tensor_cores in (False, True):
                name = "tensor cores" if tensor_cores else "CUDA cores"
                try:
                    call, order, plan_ms = prepare(flashinfer, args, length, window, tensor_cores)
                # No nvcc, no compiler for it, a shape without a kernel.
                except Exception as reason:
                    reasons.append(f"{name}: {(str(reason).strip().splitlines() or [type(reason).__name__])[0]}")
                    continue

                def expected(out, inputs, order=order):
                    query, keys, values = inputs
                    keys, values = (unpaged(part, order, args.batch, length) for part in (keys, values))
                    return error_of(out[:, :, None], query[:, :, None], keys, values, window)

                way, left = fastest({name: call}, sets, args.runs, expected)
                reasons += left
                if way and (found is None or sorted(way[2])[len(way[2]) // 2] < sorted(found[2])[len(found[2]) // 2]):
                    found, took = way, plan_ms
            if found is None:
                left_out.append({"case": case, "length": length, "reason": "; ".join(reasons)})
                continue
            useful = bytes_of(args, length if window is None else min(window, length))
            timings.append({**timing(case, length, found, useful), "plan_ms": took})
    write(args, f"flashinfer {flashinfer.__version__}", timings, left_out, page_size=args.page_size)


if __name__ == "__main__":
    main()
