"""What the CUDA kernels have to move and to compute, counted from shapes and plans: no GPU is used.

    python benchmarks/predict_cuda.py

Prints a table of the paper and imagenet suites in float32 on an H200, as docs/kernels.md has it.
Floors are what no schedule can beat: products that meet a pixel at the peak FMA rate of the busiest
multiprocessor, and bytes at the bandwidth of a copy. They say nothing of latency, barriers and
loads from shared memory, which only a measurement will.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import suites
import torch

from mfef_ext import MFEFBlock
from mfef_ext.backends import cuda
from mfef_ext.problem import describe_mfef_block

MULTIPROCESSORS = 132
CLOCK = 1.98e9  # Hz, the highest of the data sheet
FMAS = 128  # of a multiprocessor per cycle
COPY = 4.3e12  # bytes/s read and written, measured on an H200 (decisions.md)
SHARED = 228 * 1024  # of a multiprocessor; a thread block takes RESERVED more than it asks for
RESERVED = 1024
SHARED_LIMIT = SHARED - RESERVED


@dataclass(frozen=True)
class Prediction:
    """Counts of one shape; times in microseconds. ``plan`` is that of backends.cuda."""

    plan: dict[str, object]
    fma_floor: dict[str, float]  # by direction, of the convolutions
    memory_floor: dict[str, float]
    weights: int  # bytes of weights that the forward reads from L2, all thread blocks together
    resident: int  # thread blocks of the forward that shared memory lets a multiprocessor hold


def predict(case: suites.Case) -> Prediction | None:
    """Both directions of a case's shape; None where no kernel fits."""
    block = MFEFBlock(case.channels, groups=case.groups, device="meta")
    a = block.attention
    x = torch.empty(case.batch, case.channels, case.side, case.side, device="meta")
    problem = describe_mfef_block(
        x, list(block.conv.weights), block.conv.groups, a.fc1_weight, a.fc1_bias, a.fc2_weight,
        a.fc2_bias, a.spatial_weight, True,
    )  # fmt: skip
    plan = cuda.plan(problem, SHARED_LIMIT)
    if not plan["fits"]:
        return None
    images, blocks = int(str(plan["images"])), int(str(plan["blocks"]))
    busiest = -(-blocks // MULTIPROCESSORS) * images
    fma, memory = {}, {}
    for direction in suites.DIRECTIONS:
        work = suites.count_work(replace(case, direction=direction))
        fma[direction] = work.real_ops / 2 / case.batch * busiest / FMAS / CLOCK * 1e6
        # The gradient of y goes to the weight gradient in float32.
        dy = 2 * 4 * x.numel() if direction == suites.BOTH else 0
        memory[direction] = (work.bytes_floor + dy) / COPY * 1e6
    taps = sum(w.shape[0] * w.shape[1] * min(w.shape[2], 2 * case.side - 1) ** 2
               for w in block.conv.weights)  # fmt: skip
    shared = int(str(plan["forward_shared_bytes"])) + RESERVED
    return Prediction(plan, fma, memory, 4 * taps * blocks, SHARED // shared)


def rows() -> list[str]:
    """The table, line by line."""
    lines = [
        "| shape, float32 | blocks x threads | shared KiB forward, backward | resident | stages "
        "| launches | MB of weights from L2 | FMA floor, us | memory floor, us |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    cases = suites.select(("paper", "imagenet"), ("float32",), (suites.FORWARD,))
    for case in cases:
        found = predict(case)
        if found is None:
            lines.append(f"| {case.shape} | does not fit | | | | | | | |")
            continue
        plan = found.plan

        def pair(name: str, scale: int = 1, plan=plan) -> str:
            values = (int(str(plan[f"{d}_{name}"])) for d in ("forward", "backward"))
            return " / ".join(f"{v / scale:.0f}" for v in values)

        def floors(of: dict[str, float]) -> str:
            return " / ".join(f"{of[d]:.1f}" for d in suites.DIRECTIONS)

        lines.append(
            f"| {case.shape} | {plan['blocks']} x {plan['threads']} | {pair('shared_bytes', 1024)} "
            f"| {found.resident} | {pair('stages')} | 1 / 4 | {found.weights / 1e6:.1f} "
            f"| {floors(found.fma_floor)} | {floors(found.memory_floor)} |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
