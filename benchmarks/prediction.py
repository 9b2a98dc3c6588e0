"""What the Triton kernels have to move and to compute, and how long an H200 should take for it.

    python benchmarks/prediction.py              the table in docs/kernels.md
    python benchmarks/prediction.py --launches   every launch of every case

Counted, not measured: the block's operators run on meta tensors, and of each launch the tensors
that it is given are counted once. That is what goes through memory if whatever a kernel reads again
comes from its caches. Scratch is counted whole, though kernels touch parts of it. Operations are
those of the convolutions, for the taps that are executed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from unittest import mock

import suites
from torch import Tensor

from mfef_ext.backends.triton import BACKEND, aot
from mfef_ext.backends.triton.launch import Launch

# Assumed of an H200. Memory: 4.8 TB/s by its data sheet, of which copies reach about five sixths.
COPY = 4.0e12
# From the end of one kernel to the first memory access of the next, the host being ahead.
LAUNCH = 2e-6
# Operations per second by how products are computed. Tensor cores: a quarter of the peak (990 in
# bfloat16, 495 in TF32), since tiles are small and come from L1. Ordinary units: half of 60 for
# tl.dot. Direct taps: every product is a load of 32 lanes per clock and multiprocessor.
RATES = {"half": 250e12, "tf32": 124e12, "ieee": 30e12, "direct": 16e12}

UNSEEN = "" if BACKEND.verified else ", not yet run on hardware"

# The arguments that a kernel writes; the others are read. The MLP's gate is in the scratch.
WRITTEN = {
    "convolve": {"dst", "statistics"},
    "weight_partials": {"partial"},
    "weight_sums": {"grads"},
    "image_forward": {"out", "mean", "max", "max_index", "spatial_gate", "channel_index", "work"},
    "gate": {"mean", "max", "max_index", "work"},
    "pool": {"channel_index", "work"},
    "output": {"out", "spatial_gate"},
    "image_backward": {"grad_y", "work"},
    "gate_backward": {"work"},
    "pool_backward": {"work", "finished"},
    "spatial_backward": {"work", "finished"},
    "input_gradient": {"grad_y"},
    "parameter_gradient": {
        "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "spatial_weight",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """One launch. dot, direct: operations by tl.dot and by direct taps."""

    kernel: str
    read: int
    written: int
    dot: int
    direct: int
    products: str

    @property
    def seconds(self) -> float:
        """Predicted: memory and arithmetic overlap, a launch does not."""
        compute = self.dot / RATES[self.products] + self.direct / RATES["direct"]
        return LAUNCH + max((self.read + self.written) / COPY, compute)


def _count(launch: Launch, tensors: tuple, products: str) -> Counted:
    kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    if kernel == "gate" and launch.constants["BACKWARD"]:
        kernel = "gate_backward"
    sizes: dict[str, int] = {"read": 0, "written": 0}
    seen: set[int] = set()
    # The scratch stands in for what is not saved, and counts by its own name.
    named = sorted(
        zip(launch.kernel.arg_names, tensors, strict=False),
        key=lambda one: (one[0] != "work", one[0] not in WRITTEN[kernel]),
    )
    for name, given in named:
        way = "written" if name in WRITTEN[kernel] else "read"
        for t in given if isinstance(given, tuple) else (given,):
            if isinstance(t, Tensor) and id(t) not in seen:
                seen.add(id(t))
                sizes[way] += t.numel() * t.itemsize
    dot = direct = 0
    if kernel in ("convolve", "weight_partials"):
        maps = tensors[0]
        for side, sources, destinations, groups, _, _, wide, *_ in launch.constants["BRANCHES"]:
            own = 2 * side * side * sources * destinations * groups
            own *= maps.shape[0] * maps.shape[2] * maps.shape[3]
            dot, direct = (dot + own, direct) if wide else (dot, direct + own)
    return Counted(kernel, **sizes, dot=dot, direct=direct, products=products)


def count(case: suites.Case, tf32: bool = False) -> list[Counted]:
    """The launches of one call of a case, contiguous, in their order."""
    products = "half" if case.dtype != "float32" else "tf32" if tf32 else "ieee"
    found: list[Counted] = []

    def keep(launch: Launch, *tensors: object) -> None:
        found.append(_count(launch, tensors, products))

    shape = (case.batch, case.channels, case.side)
    dtype = "tf32" if tf32 else case.dtype
    one = aot.Case("mfef_block", dtype, shape, groups=case.groups, backward=case.backward)
    with mock.patch.object(Launch, "__call__", keep):
        one.run()
    return found


def summary(cases: Iterable[suites.Case]) -> Iterator[str]:
    yield (
        "| case | launches | read MB | written MB | floor MB | of the floor | naive GFLOP | "
        f"predicted microseconds{UNSEEN} |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for case in cases:
        launches, work = count(case), suites.count_work(case)
        read, written = sum(c.read for c in launches), sum(c.written for c in launches)
        cells = [
            case.name,
            str(len(launches)),
            f"{read / 1e6:.3g}",
            f"{written / 1e6:.3g}",
            f"{work.bytes_floor / 1e6:.3g}",
            f"{(read + written) / work.bytes_floor:.2f}x",
            f"{work.naive_ops / 1e9:.3g}",
            f"{1e6 * sum(c.seconds for c in launches):.3g}",
        ]
        yield "| " + " | ".join(cells) + " |"


def every_launch(cases: Iterable[suites.Case]) -> Iterator[str]:
    yield (
        "| case | kernel | read MB | written MB | tl.dot GFLOP | direct GFLOP | "
        f"predicted microseconds{UNSEEN} |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|"
    for case in cases:
        for c in count(case):
            numbers = (c.read / 1e6, c.written / 1e6, c.dot / 1e9, c.direct / 1e9, 1e6 * c.seconds)
            yield " | ".join([f"| {case.name}", c.kernel, *(f"{n:.3g}" for n in numbers)]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--launches", action="store_true", help="every launch of every case")
    parser.add_argument("--suites", nargs="+", default=["paper", "imagenet"], choices=suites.SHAPES)
    options = parser.parse_args()
    cases = suites.select(tuple(options.suites))
    print("\n".join((every_launch if options.launches else summary)(cases)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
