"""The checks of arguments, all in this file.

``describe_*`` turns the arguments of an operator into a :class:`Problem`, or raises an error that
says which argument is wrong, its value and what to use instead. A backend that is asked whether it
can run a call sees the problem and nothing else.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import gcd, inf, prod
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .names import shown
from .ops.dispatch import PLAIN, allow_tf32, constant_when_compiled, is_any_autocast_enabled

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


MAX_KERNEL_SIZE = 4095  # the native kernels address no larger one


@dataclass(frozen=True)
class Branch:
    """One branch of the multi-scale convolution: a grouped convolution with a square kernel."""

    in_channels: int
    out_channels: int
    kernel_size: int
    groups: int


@dataclass(frozen=True)
class Problem:
    """Sizes, dtype and device of one call. Channels are those that enter the operator."""

    op: str
    batch: int
    channels: int
    height: int
    width: int
    dtype: torch.dtype
    device: torch.device
    branches: tuple[Branch, ...] = ()
    split: bool = True
    hidden: int = 0
    spatial_kernel_size: int = 0
    tf32: bool = False  # float32 that convolutions on a GPU may round to TF32: see allow_tf32

    @property
    def out_channels(self) -> int:
        return sum(b.out_channels for b in self.branches) if self.branches else self.channels

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def sizes(self) -> dict[str, Any]:
        """The argument of the native planners."""
        return {
            "batch": self.batch,
            "channels": self.channels,
            "height": self.height,
            "width": self.width,
            "branches": [
                (b.in_channels, b.out_channels, b.groups, b.kernel_size) for b in self.branches
            ],
            "split": self.split,
            "hidden": self.hidden,
            "spatial_k": self.spatial_kernel_size,
            "dtype": self.dtype_name,
        }


def _kind(value: object) -> str:
    return type(value).__name__


def _check_tensor(name: str, value: object, like: Tensor | None = None) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_kind(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} has dtype {value.dtype}; use one of float32, bfloat16, float16, float64 "
            f"(for example {name}.float())"
        )
    check_dense(name, value)
    if like is not None:
        if value.device != like.device:
            raise ValueError(
                f"{name} is on {value.device} but x is on {like.device}; "
                f"move them to one device with .to({str(like.device)!r})"
            )
        # Autocast brings everything to one dtype, float64 excepted.
        casts = _autocast_enabled(like.device.type) and torch.float64 not in (
            value.dtype,
            like.dtype,
        )
        if value.dtype != like.dtype and not casts:
            raise TypeError(
                f"{name} has dtype {value.dtype} but x has {like.dtype}; "
                "convert one of them, or run under torch.autocast (which leaves float64 alone)"
            )
    return value


def check_dense(name: str, value: Tensor) -> None:
    """TypeError for a tensor whose layout is not strided, such as a sparse one."""
    if value.layout != torch.strided:
        raise TypeError(f"{name}: layout {value.layout} is not dense; give what .to_dense() makes")


@constant_when_compiled
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)  # Dynamo of torch 2.10 cannot trace it


def _autocast_enabled(device_type: str) -> bool:
    # Some devices (meta) have no autocast, and asking them is an error.
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if _autocast_enabled(device_type) else None


def _check_input(name: str, x: object) -> Tensor:
    x = _check_tensor(name, x)
    if x.dim() != 4:
        raise ValueError(
            f"{name} must be 4-D (N, C, H, W), got {x.dim()}-D with shape {tuple(x.shape)}"
            + ("; add a batch dimension with .unsqueeze(0)" if x.dim() == 3 else "")
        )
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: C, H and W must be at least 1 (only N may be 0)"
        )
    return x


def signature(
    tensors: tuple[Tensor | None, ...],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    split: bool,
) -> object:
    """All that ``describe_*`` reads: calls with equal signatures have equal problems.

    ``tensors`` are the input and the other tensors outside of ``weights``, None for one that is not
    given. The signature holds no tensors and is hashable if the groups are. It is None for
    arguments of wrong types, and for subclasses of tensors, whose sizes need not be integers.
    """
    if not isinstance(weights, (list, tuple)) or not isinstance(groups, (list, tuple)):
        return None
    if not isinstance(split, bool):
        return None
    x, everything, kinds = tensors[0], (*tensors, *weights), tuple(map(type, groups))
    # A tensor among the groups may hold another number at the next call.
    if x is None or not PLAIN.issuperset(map(type, everything)) or not PLAIN.isdisjoint(kinds):
        return None
    return (
        tuple([t if t is None else (t.shape, t.dtype, t.device) for t in everything]),
        x.layout,
        tuple(groups),
        kinds,  # 1 == 1.0 == True, and only the first is accepted
        split,
        _autocast_dtype(x) if is_any_autocast_enabled() else None,  # mostly it is not
        allow_tf32(),
    )


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {shape} ({meaning})")


def check_int(name: str, value: object) -> int:
    """An integer of any kind, NumPy's too, as an int; TypeError for booleans and all else."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TypeError(f"{name} must be an int, got {_kind(value)} {shown(value)}")


def check_bool(name: str, value: object) -> bool:
    """True or False; TypeError for anything else, such as "no" or 1."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_kind(value)} {shown(value)}")
    return value


def _number(name: str, value: Any) -> float:
    """A real number of any kind as a float: see :func:`check_number`."""
    if isinstance(value, Tensor):
        check_dense(name, value)
        if value.requires_grad:
            raise TypeError(
                f"{name} requires a gradient, but it is a constant that gets none; "
                f"give {name}.item()"
            )
        if value.device.type != "cpu":
            raise TypeError(
                f"{name} is a tensor on {value.device}, which every call would have to wait for; "
                f"give a number, {name}.item(), read once"
            )
    if hasattr(value, "item") and prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        raise TypeError(f"{name} must be a number, got {_kind(value)} {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        return inf


def check_number(
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = sys.float_info.max,
    must_be: str = "0 or more, and finite",
) -> float:
    """A number from ``low`` to ``high`` as a float; TypeError or ValueError for others.

    NumPy's numbers, fractions, and tensors and arrays with one element are numbers; booleans, text,
    and tensors that are sparse, require a gradient or lie on a GPU are not. ``must_be`` is what an
    error says about the range.
    """
    # torch.compile may have a symbol for these, and can trace little more than comparisons of it.
    number = value if type(value) in (float, int) else _number(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name}={shown(number)} must be {must_be}")
    return float(number)


def check_temperature(value: Any) -> float:
    """A temperature as a float; TypeError or ValueError."""
    usual = "from 1e-6 to 1e6; 3.0 is usual for distillation"
    return check_number("temperature", value, 1e-6, 1e6, usual)


def check_kernel_size(name: str, k: object) -> int:
    """A positive odd integer, or an error that says so."""
    k = check_int(name, k)
    if k < 1 or k % 2 == 0:
        raise ValueError(
            f"{name}={shown(k)} must be odd and positive, so that H and W are kept; "
            f"use {min(max(k, 0) + 1, MAX_KERNEL_SIZE)}"
        )
    if k > MAX_KERNEL_SIZE:
        raise ValueError(f"{name}={shown(k)} is too large; use at most {MAX_KERNEL_SIZE}")
    return k


def check_groups(name: str, groups: object, in_channels: int, out_channels: int) -> int:
    """A positive integer that divides both channel counts, or an error listing those that do."""
    groups = check_int(name, groups)
    if groups < 1 or in_channels % groups or out_channels % groups:
        common = gcd(in_channels, out_channels)
        good = ", ".join(str(g) for g in range(1, min(common, 4096) + 1) if common % g == 0)
        raise ValueError(
            f"{name}={shown(groups)} must divide Cin={in_channels} and Cout={out_channels}; "
            f'use groups="auto" or one of {good}'
        )
    return groups


def _describe_branches(
    x: Tensor, weights: Sequence[Tensor], groups: Sequence[int], split: bool
) -> tuple[Branch, ...]:
    if not isinstance(weights, (list, tuple, torch.nn.ParameterList)):
        raise TypeError(f"weights must be a list or tuple of tensors, got {_kind(weights)}")
    if not isinstance(groups, (list, tuple)):
        raise TypeError(f"groups must be a list or tuple of ints, got {_kind(groups)}")
    if not isinstance(split, bool):
        raise TypeError(
            f"split must be True or False, got {_kind(split)}; a bias is given by name, bias=..."
        )
    if len(weights) == 0:
        raise ValueError("weights is empty: at least one branch is needed")
    if len(weights) != len(groups):
        raise ValueError(
            f"weights has {len(weights)} branches but groups has {len(groups)} entries: "
            "give one number of groups per branch"
        )
    branches = []
    for i, (weight, g) in enumerate(zip(weights, groups, strict=True)):
        name = f"weights[{i}]"
        weight = _check_tensor(name, weight, like=x)
        if weight.dim() != 4:
            raise ValueError(
                f"{name} must be 4-D (Cout, Cin / groups, k, k), got shape {tuple(weight.shape)}"
            )
        if weight.shape[2] != weight.shape[3]:
            raise ValueError(
                f"{name} has a kernel of {weight.shape[2]} x {weight.shape[3]}: "
                "only square kernels are supported"
            )
        check_kernel_size(f"the kernel size of {name}", int(weight.shape[2]))
        if weight.shape[0] == 0 or weight.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}: no channels")
        g = check_int(f"groups[{i}]", g)
        if g < 1:
            raise ValueError(f"groups[{i}]={shown(g)} must be a positive int")
        in_channels = weight.shape[1] * g if split else x.shape[1]
        check_groups(f"groups[{i}]", g, int(in_channels), int(weight.shape[0]))
        if not split and weight.shape[1] * g != in_channels:
            raise ValueError(
                f"{name} has {weight.shape[1]} input channels per group and groups[{i}]={g}, "
                f"together {weight.shape[1] * g}, but x has C={x.shape[1]} channels and "
                "split=False shows all of them to every branch"
            )
        branches.append(Branch(int(in_channels), int(weight.shape[0]), int(weight.shape[2]), g))
    if split:
        total = sum(b.in_channels for b in branches)
        if total != x.shape[1]:
            raise ValueError(
                f"x has C={x.shape[1]} channels but the branches take "
                f"{' + '.join(str(b.in_channels) for b in branches)} = {total}; "
                "with split=True they must add up to C"
            )
    return tuple(branches)


def _describe_attention(
    like: Tensor,
    channels: int,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    spatial_weight: Tensor,
) -> tuple[int, int]:
    """Checks the attention's parameters; returns the hidden width and the kernel size."""
    fc1_weight = _check_tensor("fc1_weight", fc1_weight, like)
    if fc1_weight.dim() != 2 or fc1_weight.shape[0] < 1:
        raise ValueError(
            f"fc1_weight must be 2-D (hidden, C) with hidden >= 1, got {tuple(fc1_weight.shape)}"
        )
    hidden = int(fc1_weight.shape[0])
    _check_shape("fc1_weight", fc1_weight, (hidden, channels), f"(hidden, C) with C={channels}")
    _check_tensor("fc2_weight", fc2_weight, like)
    _check_shape("fc2_weight", fc2_weight, (channels, hidden), f"(C, hidden) with C={channels}")
    if fc1_bias is not None:
        _check_tensor("fc1_bias", fc1_bias, like)
        _check_shape("fc1_bias", fc1_bias, (hidden,), "(hidden,)")
    if fc2_bias is not None:
        _check_tensor("fc2_bias", fc2_bias, like)
        _check_shape("fc2_bias", fc2_bias, (channels,), "(C,)")
    spatial_weight = _check_tensor("spatial_weight", spatial_weight, like)
    if spatial_weight.dim() != 4 or tuple(spatial_weight.shape[:2]) != (1, 2):
        raise ValueError(
            f"spatial_weight must have shape (1, 2, k, k), got {tuple(spatial_weight.shape)}"
        )
    k = int(spatial_weight.shape[2])
    _check_shape("spatial_weight", spatial_weight, (1, 2, k, k), "a square kernel")
    check_kernel_size("the kernel size of spatial_weight", k)
    return hidden, k


def _effective_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the kernel will see: autocast converts everything but float64."""
    autocast = _autocast_dtype(x)
    return x.dtype if autocast is None or x.dtype == torch.float64 else autocast


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and allow_tf32()


def describe_multi_scale_conv2d(
    x: Tensor, weights: Sequence[Tensor], groups: Sequence[int], split: bool, bias: Tensor | None
) -> Problem:
    """The problem of one multi-scale convolution. Raises TypeError or ValueError."""
    x = _check_input("x", x)
    branches = _describe_branches(x, weights, groups, split)
    if bias is not None:
        _check_tensor("bias", bias, x)
        total = sum(b.out_channels for b in branches)
        _check_shape("bias", bias, (total,), "one entry per output channel")
    n, c, h, w = x.shape
    dtype = _effective_dtype(x)
    return Problem(
        "multi_scale_conv2d", n, c, h, w, dtype, x.device, branches, split, tf32=_tf32(dtype)
    )


def describe_dual_attention(
    y: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    spatial_weight: Tensor,
) -> Problem:
    """The problem of one channel + spatial attention. Raises TypeError or ValueError."""
    y = _check_input("y", y)
    n, c, h, w = y.shape
    hidden, k = _describe_attention(
        y, c, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight
    )
    return Problem(
        "dual_attention",
        n,
        c,
        h,
        w,
        _effective_dtype(y),
        y.device,
        hidden=hidden,
        spatial_kernel_size=k,
    )


def describe_mfef_block(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    groups: Sequence[int],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    spatial_weight: Tensor,
    split: bool,
) -> Problem:
    """The problem of one whole block. Raises TypeError or ValueError."""
    x = _check_input("x", x)
    branches = _describe_branches(x, conv_weights, groups, split)
    channels = sum(b.out_channels for b in branches)
    hidden, k = _describe_attention(
        x, channels, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight
    )
    n, c, h, w = x.shape
    dtype = _effective_dtype(x)
    return Problem(
        "mfef_block", n, c, h, w, dtype, x.device, branches, split, hidden, k, _tf32(dtype)
    )


def describe_kd_loss(student: Tensor, target: Tensor) -> Problem:
    """The problem of one distillation loss. Raises TypeError or ValueError."""
    student = _check_tensor("student", student)
    target = _check_tensor("target", target)
    if student.dim() != 2 or student.shape[1] < 1:
        raise ValueError(f"student must be 2-D (N, classes), got shape {tuple(student.shape)}")
    if target.shape != student.shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)} but student has {tuple(student.shape)}: "
            "both are logits of the same images and classes"
        )
    if target.device != student.device:
        raise ValueError(
            f"target is on {target.device} but student is on {student.device}; "
            f"move it with .to({str(student.device)!r})"
        )
    n, classes = student.shape
    return Problem("kd_loss", n, classes, 1, 1, student.dtype, student.device)
