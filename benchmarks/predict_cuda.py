"""What the CUDA kernels have to move and to compute, counted from shapes and plans: no GPU is used.

    python benchmarks/predict_cuda.py

Prints tables of the paper and imagenet suites on an H200, as docs/kernels.md has them. Floors are
what no schedule can beat: products that meet a pixel at the peak FMA rate of the busiest
multiprocessor, those of tensor cores (small maps: with the zeros that fill up their matrices), and
bytes at the bandwidth of a copy (large maps: of all launches, as if no cache kept a map for the
next). They say nothing of latency, barriers and loads from shared memory, which only a measurement
will.
"""

from __future__ import annotations

from collections.abc import Iterator
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
# kernels use (mma.sync) is known to reach little more. In TF32 they are half as many.
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
    fma_floor: dict[str, float]  # of the convolutions' direct products
    tensor_floor: dict[str, float]  # of those by tensor cores
    memory_floor: dict[str, float]  # small maps: also what the launches leave for one another
    weights: int  # bytes of weights that the forward reads from L2, all thread blocks together
    resident: int  # thread blocks of the forward that shared memory lets a multiprocessor hold


def matrix_products(out_channels: int, in_channels: int, k: int, groups: int) -> tuple[int, int]:
    """Multiply-adds by tensor cores for an image of 8x8: of the forward, or the gradient of x, and
    of the gradient of the weights. ``in_channels`` are a group's. Rows of taps that meet no row of
    a matrix are left out."""
    out = out_channels // groups
    forward = weights = 0
    for top in range(0, 8, 2):
        for ky in range(k):
            first = top + ky - k // 2  # the row of x under the upper of two rows of pixels
            weights += -1 <= first < 8
            if ky % 2 == 0:
                pair = ky + 1 < k
                forward += (1 + pair) * (-1 - pair <= first < 8)
    forward *= groups * -(-out // 8) * -(-in_channels // 8) * k * 16 * 8 * 8
    weights *= groups * -(-out // 16) * -(-in_channels // 8) * k * 16 * 8 * 16
    return forward, weights


def predict(case: suites.Case, tf32: bool = False) -> Prediction:
    """Both directions of a case's shape and dtype; ``tf32``: PyTorch's switch."""
    dtype = suites.DTYPES[case.dtype]
    block = MFEFBlock(case.channels, groups=case.groups, device="meta", dtype=dtype)
    a = block.attention
    x = torch.empty(case.batch, case.channels, case.side, case.side, device="meta", dtype=dtype)
    problem = describe_mfef_block(
        x, list(block.conv.weights), block.conv.groups, a.fc1_weight, a.fc1_bias, a.fc2_weight,
        a.fc2_bias, a.spatial_weight, True,
    )  # fmt: skip
    plan = cuda.plan(replace(problem, tf32=tf32), SHARED_LIMIT)
    large = plan["plan"] == "large-map"
    images = 1 if large else int(str(plan["images"]))
    blocks = -(-case.batch // images)
    # A small map's multiprocessor has whole images; a large one's pieces are spread evenly.
    busiest = blocks / MULTIPROCESSORS if large else -(-blocks // MULTIPROCESSORS) * images
    element = dtype.itemsize
    fma, tensor, memory = {}, {}, {}
    for direction in suites.DIRECTIONS:
        work = suites.count_work(replace(case, direction=direction))
        both = direction == suites.BOTH
        left_out = products = 0
        for name in ("forward", "backward", "weight_gradient") if both else ("forward",):
            for branch in tensor_core_branches(plan, name):
                out, inputs, k, _ = block.conv.weights[branch].shape
                meeting = out * inputs * suites.taps_inside(case.side, k)
                left_out += meeting
                if large:
                    products += meeting
                else:
                    filled = matrix_products(out, inputs, k, block.conv.groups[branch])
                    products += filled[name == "weight_gradient"]
        direct = work.real_ops / 2 / case.batch - left_out
        fma[direction] = direct * busiest / FMAS / CLOCK * 1e6
        tensor[direction] = products * busiest / TENSOR_FMAS * (1 + tf32) / CLOCK * 1e6
        if large:
            passes = FORWARD_PASSES + BACKWARD_PASSES * both
            moved = (passes * element + 4 * BACKWARD_FLOAT_PASSES * both) * x.numel()
        else:
            # What the backward's launches leave for one another: sums of the weights' gradients,
            # and the gradient of y in float32 where those are a launch of their own.
            moved = work.bytes_floor + 2 * int(str(plan["backward_scratch_bytes"])) * both
        memory[direction] = moved / COPY * 1e6
    taps = sum(w.shape[0] * w.shape[1] * min(w.shape[2], 2 * case.side - 1) ** 2
               for w in block.conv.weights)  # fmt: skip
    readers = case.batch * int(str(plan["tiles"])) if large else blocks
    shared = int(str(plan["forward_shared_bytes"])) + RESERVED
    return Prediction(plan, fma, tensor, memory, element * taps * readers, SHARED // shared)


def tensor_core_branches(plan: dict[str, object], name: str) -> list[int]:
    """Those of the forward, the data gradient ("backward") or the weight gradient."""
    found = plan[f"{name}_tensor_core_branches"]
    assert isinstance(found, list)
    return found


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


def predictions(suite: str) -> Iterator[tuple[suites.Case, str, Prediction]]:
    """Every shape of a suite in every arithmetic, with its name."""
    for case in suites.select((suite,), directions=(suites.FORWARD,)):
        yield case, case.dtype, predict(case)
        if case.dtype == "float32":
            yield case, "TF32", predict(case, tf32=True)


def small_rows() -> list[str]:
    """The table of the maps that fit on the chip, line by line."""
    lines = [
        "| shape | dtype | blocks x threads | shared KiB forward, backward | resident | stages "
        "| launches | MB of weights from L2 | FMA floor, us | tensor-core floor, us "
        "| memory floor, us |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case, arithmetic, found in predictions("paper"):
        plan = found.plan
        lines.append(
            f"| {case.shape} | {arithmetic} | {plan['blocks']} x {plan['threads']} "
            f"| {pair(plan, 'shared_bytes', 1024)} | {found.resident} | {pair(plan, 'stages')} "
            f"| {launches(plan)} | {found.weights / 1e6:.1f} "
            f"| {floors(found.fma_floor)} | {floors(found.tensor_floor)} "
            f"| {floors(found.memory_floor)} |"
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
    for case, arithmetic, found in predictions("imagenet"):
        plan = found.plan
        branches = tensor_core_branches(plan, suites.FORWARD)
        for name in ("backward", "weight_gradient"):
            assert branches == tensor_core_branches(plan, name)
        tile, piece = (str(plan[name]).strip("()").replace(", ", "x") for name in ("tile", "piece"))
        lines.append(
            f"| {case.shape} | {arithmetic} | {tile} | {plan['tiles']} x {pair(plan, 'units')} "
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
