"""The CUDA C++ backend (csrc/cuda): the block in one launch where an image fits on the chip, in a
few where it does not."""

from __future__ import annotations

import torch

from .. import _C, ops
from ..problem import Problem
from . import Backend, Condition

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)  # the oldest that is compiled for
MOST_BRANCHES = 16  # kMaxBranches in csrc/cuda/block.h


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a thread block may have on a CUDA device."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def plan(problem: Problem, limit: int | None = None) -> dict[str, object]:
    """How the kernels would run a problem, with ``limit`` bytes of shared memory per thread block.

    ``limit`` is the device's if not given. Keys: fits; reason (why not, else ""); where it fits
    plan ("small-map" or "large-map"), threads (per thread block; large maps: of the convolution),
    weight_gradient_tiles, weight_gradient_slices (of the batch), weight_gradient_shared_bytes,
    weights_in_backward (whether the backward's launch sums their gradient, with no tiles then), and
    for ``forward_`` and ``backward_``: launches (the kernels of a whole call), shared_bytes (per
    thread block; large maps: of the convolution), scratch_bytes (of a forward that saves, and of a
    backward with all gradients but a convolution's bias). Small maps: images (per thread block),
    blocks, row (floats of a map's row in shared memory), ``forward_``, ``backward_`` stages. Large
    maps: tile and piece (rows and columns of the convolution's and of the attention's share of a
    map), tiles and pieces (per image), ``forward_``, ``backward_`` units (of channels) and
    tensor_core_rounds (of every branch there: source channels of a group and rows of taps that are
    in shared memory at a time, and in how many buffers), weight_gradient_buffers (the same of its
    pieces, on tensor cores; else 0).
    Of both, for ``forward_``, ``backward_`` and ``weight_gradient_``: tensor_core_branches (those
    that tensor cores compute).
    """
    limit = shared_limit(problem.device) if limit is None else limit
    return _C.cuda_plan(**problem.sizes(), tf32=problem.tf32, shared_limit=limit)


def _fits(problem: Problem) -> bool:
    # torch.compile can trace neither the planner nor sizes that are symbols; then the operator,
    # which plans for itself, refuses what does not fit.
    return torch.compiler.is_compiling() or bool(plan(problem)["fits"])


def _absent() -> str:
    if not ops.CUDA_LOADED:
        return f"its library is not loaded ({_C.build_info()['cuda']})"
    return "" if torch.cuda.is_available() else "this torch finds no CUDA device"


BACKEND = Backend(
    "cuda",
    (
        Condition(
            lambda p: p.device.type == "cuda",
            lambda p: f"its tensors must be on a CUDA device, not on {p.device}",
        ),
        Condition(
            lambda p: ops.CUDA_LOADED,
            lambda p: f"its library is not loaded ({_C.build_info()['cuda']})",
        ),
        Condition(
            lambda p: torch.cuda.get_device_capability(p.device) >= LEAST_CAPABILITY,
            lambda p: (
                f"{p.device} has compute capability "
                f"{torch.cuda.get_device_capability(p.device)}, below 8.0"
            ),
        ),
        Condition(
            lambda p: p.dtype in DTYPES,
            lambda p: f"dtype {p.dtype} is not one of float32, bfloat16, float16",
        ),
        Condition(
            lambda p: len(p.branches) <= MOST_BRANCHES,
            lambda p: f"{len(p.branches)} branches are more than {MOST_BRANCHES}",
        ),
        Condition(_fits, lambda p: str(plan(p)["reason"])),
    ),
    ops.NATIVE,
    verified=False,
    absent=_absent,
)
