"""The convolution alone, as shares of the processor's multiply-add rate, on one thread and on all.

    python benchmarks/bench_conv.py

Forward, data gradient and weight gradient of ``torch.ops.mfef.multi_scale_conv2d`` in float32,
interleaved with register-only chains of multiply-adds (``mfef_ext._C.fma_chain``), so that a
neighbour's load slows both. The naive count takes every tap of every pixel, also those that meet
no pixel and are skipped; a share may therefore exceed 100 %. Medians over the rounds of ratios
within a round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from timing import operations_per_second, seconds_per_call

from mfef_ext import _C, MFEFBlock

SHAPES = ((128, 64, 8), (128, 128, 8), (128, 256, 8), (32, 128, 28), (32, 256, 14), (32, 512, 7))
ROUNDS = 25
CHAIN = 1_000_000  # iterations: some milliseconds, beside which the start of a thread is short
REST = 5e-3  # seconds until torch's threads no longer wait for work in a loop


def measure(n: int, channels: int, side: int, threads: int) -> tuple[list[float], list[float]]:
    """Median seconds and median fractions of the peak of the three directions."""
    torch.set_num_threads(threads)
    layer = MFEFBlock(channels).conv
    weights, groups = [w.detach() for w in layer.weights], list(layer.groups)
    x, grad = torch.randn(n, channels, side, side), torch.randn(n, channels, side, side)
    forward = torch.ops.mfef.multi_scale_conv2d
    backward = torch.ops.mfef.multi_scale_conv2d_backward
    steps: list[Callable[[], object]] = [
        lambda: forward(x, weights, groups, True, None),
        lambda: backward(grad, x, weights, groups, True, None, True, False),
        lambda: backward(grad, x, weights, groups, True, None, False, True),
    ]
    naive = 2.0 * n * side * side * sum(w.numel() for w in weights)
    calls = [max(1, round(1e-2 / seconds_per_call(step, 2, "cpu"))) for step in steps]
    times: list[list[float]] = [[] for _ in steps]
    fractions: list[list[float]] = [[] for _ in steps]
    for _ in range(ROUNDS):
        time.sleep(REST)
        rate = operations_per_second(_C.fma_chain, CHAIN, threads)
        for i, step in enumerate(steps):
            step()  # wakes the threads, fills the caches
            once = seconds_per_call(step, calls[i], "cpu")
            times[i].append(once)
            fractions[i].append(naive / once / rate)
    return [median(t) for t in times], [median(f) for f in fractions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.parse_args()
    # glibc maps blocks anew on every call until it has seen one of their size freed; the faults of
    # fresh pages would be measured with the convolution.
    torch.zeros(7 * 2**20)
    every = torch.get_num_threads()
    print(f"ISA {_C.cpu_isa()}, {every} threads; ms and share of the FMA rate by the naive count")
    print("| shape | threads | forward | data gradient | weight gradient |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for n, channels, side in SHAPES:
        alone: list[float] = []
        for threads in sorted({1, every}):
            times, fractions = measure(n, channels, side, threads)
            alone = alone or times
            cells = [f"{t * 1e3:.2f} ms, {f:.0%}" for t, f in zip(times, fractions, strict=True)]
            if threads > 1:
                cells = [f"{c}, {a / t:.2f}x" for c, a, t in zip(cells, alone, times, strict=True)]
            print(f"| {n}x{channels}x{side}x{side} | {threads} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
