"""What the CUDA kernels have to move and to compute, counted from shapes and plans: no GPU is used.

    python benchmarks/predict_cuda.py

Prints tables of the paper and imagenet suites on an H200, as docs/kernels.md has them. Floors are
what no schedule can beat: products that meet a pixel at the peak FMA rate of the busiest
multiprocessor, and bytes at the bandwidth of a copy (large maps: the bytes of all launches, as if
no cache kept a map for the next). They say nothing of latency, barriers and loads from shared
memory, which only a measurement will.
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
# Multiply-adds of tensor cores in 16 bits: half the data sheet's, since the instruction that the
# kernels use (mma.sync) is known to reach little more.
TENSOR_FMAS = 1024
COPY = 4.3e12  # bytes/s read and written, measured on an H200 (decisions.md)
SHARED = 228 * 1024  # of a multiprocessor; a thread block takes RESERVED more than it asks for
RESERVED = 1024
SHARED_LIMIT = SHARED - RESERVED


FORWARD_PASSES = 5  # over a map: x read; y written, read twice; the result written
# The gradient and y read twice, the gradient once more, x read, its gradient written; that of y, in
# float32, written and read twice.
BACKWARD_PASSES, BACKWARD_FLOAT_PASSES = 7, 3


@dataclass(frozen=True)
class Prediction:
    """Counts of one case by direction, times in microseconds. ``plan``: of backends.cuda."""

    plan: dict[str, object]
    fma_floor: dict[str, float]  # of the convolutions, less what is on tensor cores
    tensor_floor: dict[str, float]
    memory_floor: dict[str, float]  # small maps: also what the launches leave for one another
    weights: int  # bytes of weights that the forward reads from L2, all thread blocks together
    resident: int  # thread blocks of the forward that shared memory lets a multiprocessor hold


def predict(case: suites.Case) -> Prediction:
    """Both directions of a case's shape and dtype."""
    dtype = suites.DTYPES[case.dtype]
    block = MFEFBlock(case.channels, groups=case.groups, device="meta", dtype=dtype)
    a = block.attention
    x = torch.empty(case.batch, case.channels, case.side, case.side, device="meta", dtype=dtype)
    problem = describe_mfef_block(
        x, list(block.conv.weights), block.conv.groups, a.fc1_weight, a.fc1_bias, a.fc2_weight,
        a.fc2_bias, a.spatial_weight, True,
    )  # fmt: skip
    plan = cuda.plan(problem, SHARED_LIMIT)
    large = plan["plan"] == "large-map"
    images = 1 if large else int(str(plan["images"]))
    blocks = -(-case.batch // images)
    # A small map's multiprocessor has whole images; a large one's pieces are spread evenly.
    busiest = blocks / MULTIPROCESSORS if large else -(-blocks // MULTIPROCESSORS) * images
    element = dtype.itemsize
    products = [
        w.shape[0] * w.shape[1] * suites.taps_inside(case.side, w.shape[2])
        for w in block.conv.weights
    ]
    fma, tensor, memory = {}, {}, {}
    for direction in suites.DIRECTIONS:
        work = suites.count_work(replace(case, direction=direction))
        both = direction == suites.BOTH
        on_tensor_cores = sum(products[b] for b in tensor_core_branches(plan, suites.FORWARD))
        if both:
            for name in ("backward", "weight_gradient"):
                on_tensor_cores += sum(products[b] for b in tensor_core_branches(plan, name))
        others = work.real_ops / 2 / case.batch - on_tensor_cores
        fma[direction] = others * busiest / FMAS / CLOCK * 1e6
        tensor[direction] = on_tensor_cores * busiest / TENSOR_FMAS / CLOCK * 1e6
        if large:
            passes = FORWARD_PASSES + BACKWARD_PASSES * both
            moved = (passes * element + 4 * BACKWARD_FLOAT_PASSES * both) * x.numel()
        else:
            # The gradient of y goes to the weight gradient in float32.
            moved = work.bytes_floor + 2 * 4 * x.numel() * both
        memory[direction] = moved / COPY * 1e6
    taps = sum(w.shape[0] * w.shape[1] * min(w.shape[2], 2 * case.side - 1) ** 2
               for w in block.conv.weights)  # fmt: skip
    readers = case.batch * int(str(plan["tiles"])) if large else blocks
    shared = int(str(plan["forward_shared_bytes"])) + RESERVED
    return Prediction(plan, fma, tensor, memory, 4 * taps * readers, SHARED // shared)


def tensor_core_branches(plan: dict[str, object], direction: str) -> list[int]:
    """Those of the forward, the data gradient ("backward") or the weight gradient."""
    found = plan.get(f"{direction}_tensor_core_branches", [])
    return found if isinstance(found, list) else []


def pair(plan: dict[str, object], name: str, scale: int = 1) -> str:
    """One number of the plan, forward / backward."""
    values = (int(str(plan[f"{d}_{name}"])) for d in ("forward", "backward"))
    return " / ".join(f"{v / scale:.0f}" for v in values)


def launches(plan: dict[str, object]) -> str:
    """How many, forward / forward and backward."""
    lists = (plan[f"{d}_launches"] for d in ("forward", "backward"))
    forward, backward = (len(one) for one in lists if isinstance(one, list))
    return f"{forward} / {forward + backward}"


def floors(of: dict[str, float]) -> str:
    return " / ".join(f"{of[d]:.1f}" for d in suites.DIRECTIONS)


def small_rows() -> list[str]:
    """The table of the maps that fit on the chip, line by line."""
    lines = [
        "| shape, float32 | blocks x threads | shared KiB forward, backward | resident | stages "
        "| launches | MB of weights from L2 | FMA floor, us | memory floor, us |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in suites.select(("paper",), ("float32",), (suites.FORWARD,)):
        found = predict(case)
        plan = found.plan
        lines.append(
            f"| {case.shape} | {plan['blocks']} x {plan['threads']} "
            f"| {pair(plan, 'shared_bytes', 1024)} | {found.resident} | {pair(plan, 'stages')} "
            f"| {launches(plan)} | {found.weights / 1e6:.1f} "
            f"| {floors(found.fma_floor)} | {floors(found.memory_floor)} |"
        )
    return lines


def large_rows() -> list[str]:
    """The table of the maps that stay in memory, line by line."""
    lines = [
        "| shape | dtype | tile | tiles x units | piece | pieces | shared KiB | resident "
        "| on tensor cores | launches | scratch MB | FMA floor, us | tensor cores, us "
        "| memory, us |",
        "|---|---|---|---:|---|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for case in suites.select(("imagenet",), directions=(suites.FORWARD,)):
        found = predict(case)
        plan = found.plan
        branches = tensor_core_branches(plan, suites.FORWARD)
        for name in ("backward", "weight_gradient"):
            assert branches == tensor_core_branches(plan, name)
        tile, piece = (str(plan[name]).strip("()").replace(", ", "x") for name in ("tile", "piece"))
        lines.append(
            f"| {case.shape} | {case.dtype} | {tile} | {plan['tiles']} x {pair(plan, 'units')} "
            f"| {piece} | {plan['pieces']} | {pair(plan, 'shared_bytes', 1024)} | {found.resident} "
            f"| {', '.join(map(str, branches)) or '-'} "
            f"| {launches(plan)} | {pair(plan, 'scratch_bytes', 10**6)} "
            f"| {floors(found.fma_floor)} | {floors(found.tensor_floor)} "
            f"| {floors(found.memory_floor)} |"
        )
    return lines


def rows() -> list[str]:
    """Both tables."""
    return [*small_rows(), "", *large_rows()]


if __name__ == "__main__":
    print("\n".join(rows()))
