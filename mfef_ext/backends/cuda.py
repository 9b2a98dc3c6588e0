"""The CUDA C++ backend (csrc/cuda): the block in one launch where an image fits on the chip, in a
few where it does not."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from functools import cache, lru_cache

import torch

from .. import _C, ops
from ..ops.dispatch import constant_when_compiled
from ..problem import Branch, Problem
from . import Backend, Condition

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # the oldest that is compiled for
# Of Jetson boards, whose machine code is their own: that of another minor version does not run.
JETSON = ((8, 7), (10, 1))


@cache
def library() -> Mapping[str, str]:
    """What _C_cuda says of itself: architectures, nvcc, runtime, and the driver that it finds."""
    return dict(line.split("=", 1) for line in torch.ops.mfef.cuda_build_info().splitlines())


def _version(text: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _serves(architecture: str, capability: tuple[int, int]) -> tuple[bool, bool]:
    """Whether a GPU runs the machine code that was compiled for an architecture, and whether its
    driver can compile the PTX. ``architecture`` is an entry of CMAKE_CUDA_ARCHITECTURES."""
    found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if found is None:
        return False, False
    built = int(found[1]), int(found[2])
    if built == capability:
        usable = compilable = True
    elif found[3] == "a":  # for one GPU alone, its PTX too
        usable = compilable = False
    else:
        older = built <= capability
        usable = older and built[0] == capability[0] and capability not in JETSON
        compilable = usable if found[3] == "f" else older  # "f": for one family
    return usable and found[4] != "-virtual", compilable and found[4] != "-real"


@lru_cache
def _runs_on(
    capability: tuple[int, int], architectures: str, nvcc: str, runtime: str, driver: str
) -> str:
    """Why what was built cannot run on such a GPU with such a driver; "" if it can. The others are
    as :func:`library` tells them."""
    wanted = ".".join(map(str, capability))
    with_nvcc, with_runtime, there = _version(nvcc), _version(runtime), _version(driver)
    if with_nvcc is None or with_runtime is None or there is None:
        return f"its CUDA runtime finds no driver ({driver})"
    # Any driver of its major version takes a runtime (CUDA's minor version compatibility).
    if there[0] < with_runtime[0]:
        return (
            f"it was built with CUDA {runtime} and the driver is of CUDA {driver}; update the "
            f"driver to one of CUDA {with_runtime[0]}.0 or later, or build with CUDA {there[0]}"
        )
    served = [_serves(entry, capability) for entry in architectures.split()]
    if any(machine_code for machine_code, _ in served):
        return ""
    if not any(ptx for _, ptx in served):
        return (
            f"it was built for the architectures {architectures}, of which compute capability "
            f'{wanted} runs none; build it with TORCH_CUDA_ARCH_LIST="{wanted}"'
        )
    # PTX is of the version of the nvcc that wrote it, and minor versions do not excuse that.
    if there < with_nvcc:
        return (
            f"for compute capability {wanted} it has only PTX of nvcc {nvcc}, and the driver is of "
            f'CUDA {driver}; update the driver, or build with TORCH_CUDA_ARCH_LIST="{wanted}"'
        )
    return ""


@constant_when_compiled
def _unserved(device: torch.device) -> str:
    """Why the library cannot run on a device whatever the problem; "" if it can."""
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"{device} has compute capability {capability}, below 8.0"
    built = library()
    keys = ("architectures", "nvcc", "runtime", "driver")
    return _runs_on(capability, *[built[key] for key in keys])


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
    return _C.cuda_plan(problem.sizes(), tf32=problem.tf32, shared_limit=limit)


@lru_cache(maxsize=1024)
def _refusal(problem: Problem, limit: int) -> str:
    """Why the kernels cannot run a problem; "" if they can."""
    found = plan(problem, limit)
    return "" if found["fits"] else str(found["reason"])


# While a call is traced, the size of a batch may be a symbol that stands for all of them. What
# fits alone and among very many fits in any number: only whether the weights' gradient is summed
# in the backward depends on it, and how many tiny images share a thread block, at most.
BATCHES = (1, 2**30)


@constant_when_compiled
def _refusal_when_traced(
    op: str,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    branches: tuple[tuple[int, int, int, int], ...],
    split: bool,
    hidden: int,
    spatial_kernel_size: int,
    tf32: bool,
) -> str:
    """:func:`_refusal` for any batch, of arguments that torch.compile passes on as constants."""
    described = tuple(Branch(*branch) for branch in branches)
    reasons = (
        _refusal(
            Problem(
                op, batch, *size, dtype, device, described, split, hidden, spatial_kernel_size, tf32
            ),
            shared_limit(device),
        )
        for batch in BATCHES
    )
    return next(filter(None, reasons), "")


def _why_not(p: Problem) -> str:
    # Tracers other than torch.compile have symbols or tensors for sizes.
    numbers = type(p.batch) is type(p.channels) is type(p.height) is type(p.width) is int
    if numbers and not torch.compiler.is_compiling():
        return _refusal(p, shared_limit(p.device))
    # `index` has whoever traces do it anew for maps and channels of another size.
    index = operator.index
    return _refusal_when_traced(
        p.op,
        (index(p.channels), index(p.height), index(p.width)),
        p.dtype,
        p.device,
        tuple(
            [
                (index(b.in_channels), index(b.out_channels), b.kernel_size, b.groups)
                for b in p.branches
            ]
        ),
        p.split,
        index(p.hidden),
        p.spatial_kernel_size,
        p.tf32,
    )


def _absent() -> str:
    if not ops.CUDA_LOADED:
        return f"its library is not loaded ({_C.build_info()['cuda']})"
    if not torch.cuda.is_available():
        return "this torch finds no CUDA device"
    reasons = [_unserved(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return "" if "" in reasons else reasons[0]


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
            lambda p: not _unserved(p.device),
            lambda p: _unserved(p.device),
        ),
        Condition(
            lambda p: p.dtype in DTYPES,
            lambda p: f"dtype {p.dtype} is not one of float32, bfloat16, float16",
        ),
        Condition(
            lambda p: len(p.branches) <= _C.CUDA_MAX_BRANCHES,
            lambda p: f"{len(p.branches)} branches are more than {_C.CUDA_MAX_BRANCHES}",
        ),
        Condition(lambda p: not _why_not(p), _why_not),
    ),
    ops.native(),
    device_type="cuda",
    verified=False,
    absent=_absent,
)
