"""The Triton backend: fused kernels for any GPU that Triton compiles for.

Nothing here imports Triton before an operator is called: importing it takes a second, and it need
not be installed. With TRITON_INTERPRET=1 the same kernels run in Triton's interpreter, on CPU
tensors, slowly: that is how they are tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ...ops import OPERATORS as FUSED
from ...ops import define
from ...problem import Problem
from .. import Backend, Condition

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY = define("mfef_triton")  # without kernels until an operator is first asked for
LOSSES = ("kd_loss", "kd_losses")
MIN_CAPABILITY = (8, 0)  # bfloat16 arithmetic and asynchronous copies


def interpreted() -> bool:
    """Whether Triton is asked to interpret kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def installed() -> bool:
    """Whether there is a Triton to import; nothing is imported to find out."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # whoever keeps it from being imported may also refuse to look
        return False


def state() -> str:
    """A sentence for people: which Triton there is, and how its kernels would run here."""
    if not installed():
        return "not installed (pip install triton); everything else works without it"
    try:
        import triton

        from . import tuning
    except Exception as error:
        return f"cannot be imported ({error}); everything else works without it"
    if interpreted():
        how = "TRITON_INTERPRET=1 has its kernels interpreted, on CPU tensors"
    elif torch.cuda.is_available():
        how = "kernels are compiled for a GPU at their first call"
    else:
        how = "no GPU to compile kernels for; TRITON_INTERPRET=1 interprets them on CPU tensors"
    verified = "" if BACKEND.verified else "; not yet run on hardware, so only where it is forced"
    return f"{triton.__version__}, {how}{verified}; autotuning {tuning.state()}"


def _capability(problem: Problem) -> tuple[int, int]:
    """Of an NVIDIA device; that of any other is enough."""
    if problem.device.type != "cuda" or torch.version.cuda is None:
        return MIN_CAPABILITY
    return torch.cuda.get_device_capability(problem.device)


def device_of(x: Tensor) -> AbstractContextManager:
    """For launches: Triton launches on the current device, which need not be that of ``x``."""
    if x.is_cuda:
        # To ask for the current device, which mostly it is, takes less time than to set it.
        here = x.get_device() == torch.cuda.current_device()
        return nullcontext() if here else torch.cuda.device(x.device)
    if not interpreted():
        raise RuntimeError(
            f"torch.ops.mfef_triton was called with tensors on {x.device}; move them to a CUDA "
            "device, or set TRITON_INTERPRET=1 before Triton is imported to interpret the kernels"
        )
    return nullcontext()


class _Operators(Mapping[str, Callable]):
    """What the operators' modules offer, imported when an operator is first asked for.

    By plain statements and without a loop, so that torch.compile can trace them.
    """

    def __getitem__(self, op: str) -> Callable:
        if op == "kd_loss":
            from .kd import kd_loss

            return kd_loss
        if op == "kd_losses":
            from .kd import kd_losses

            return kd_losses
        if op not in FUSED:
            raise KeyError(op)
        from .ops import OPERATORS

        return OPERATORS[op]

    def __contains__(self, op: object) -> bool:
        return op in LOSSES or op in FUSED

    def __iter__(self) -> Iterator[str]:
        return iter((*FUSED, *LOSSES))

    def __len__(self) -> int:
        return len(FUSED) + len(LOSSES)


def _absent() -> str:
    if not installed():
        return "Triton is not installed (pip install triton)"
    if interpreted() or torch.cuda.is_available():
        return ""
    return "there is no GPU; TRITON_INTERPRET=1 interprets its kernels on CPU tensors"


BACKEND = Backend(
    "triton",
    (
        Condition(
            lambda p: p.device.type == ("cpu" if interpreted() else "cuda"),
            lambda p: (
                f"its tensors must be on a CUDA device, not on {p.device}"
                if not interpreted()
                else f"TRITON_INTERPRET=1 runs kernels on CPU tensors only, not on {p.device}"
            ),
        ),
        Condition(
            lambda p: installed(),
            lambda p: "Triton is not installed (pip install triton)",
        ),
        Condition(
            lambda p: p.dtype in DTYPES,
            lambda p: f"dtype {p.dtype} is not one of float32, bfloat16, float16",
        ),
        Condition(
            lambda p: _capability(p) >= MIN_CAPABILITY,
            lambda p: f"{p.device} has compute capability {_capability(p)}, below 8.0",
        ),
        Condition(
            lambda p: p.height * p.width < 2**31,
            lambda p: f"a map of {p.height} x {p.width} has 2^31 pixels or more",
        ),
    ),
    _Operators(),
    device_type="cuda",
    verified=False,
    absent=_absent,
)
