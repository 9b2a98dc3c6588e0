"""The CPU backend: C++ kernels with images or pixels in the SIMD lanes (csrc/cpu)."""

import torch

from .. import _C, ops, reference
from . import Backend, Condition

DTYPES = (torch.float32, torch.bfloat16, torch.float64)

BACKEND = Backend(
    "cpu",
    (
        Condition(
            lambda p: p.device.type == "cpu",
            lambda p: f"its tensors must be on the CPU, not on {p.device}",
        ),
        Condition(
            lambda p: p.dtype in DTYPES,
            lambda p: f"dtype {p.dtype} is not one of float32, bfloat16, float64",
        ),
        Condition(
            lambda p: p.height * p.width < 2**31,
            lambda p: f"a map of {p.height} x {p.width} has 2^31 pixels or more",
        ),
        Condition(
            lambda p: len(p.branches) <= _C.CPU_MAX_BRANCHES,
            lambda p: f"{len(p.branches)} branches are more than {_C.CPU_MAX_BRANCHES}",
        ),
    ),
    {
        **ops.native(),
        # A few kilobytes of logits: PyTorch's own operators are the CPU kernel.
        "kd_loss": reference.kd_loss,
    },
    device_type="cpu",
)
