"""The torch.library side of the native operators: fakes, autograd, autocast.

The schemas are in csrc/ops.cpp, the kernels behind them. Fakes repeat what the kernels allocate;
autograd formulas only pass tensors on; autocast converts to the autocast dtype, float64 excepted.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from . import _C as _C  # registers the operators' schemas and CPU kernels
from . import problem

# The CUDA library needs a torch with CUDA; in another one it could not be loaded.
_cuda_library = Path(__file__).with_name("_C_cuda.so")
CUDA_LOADED = torch.version.cuda is not None and _cuda_library.exists()
if CUDA_LOADED:
    torch.ops.load_library(str(_cuda_library))

_lib = torch.library.Library("mfef", "IMPL")


def _map_like(x: Tensor, channels: int) -> Tensor:
    """(N, channels, H, W) in the layout of x: contiguous or channels_last, else contiguous."""
    n, _, h, w = x.shape
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return x.new_empty((n, channels, h, w)).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty((0,))


def _saved(x: Tensor, channels: int, save: bool) -> tuple[Tensor, ...]:
    n, h, w = (x.shape[0] if save else 0), x.shape[2], x.shape[3]
    real = _compute_dtype(x)
    return (
        x.new_empty((n, channels), dtype=real),
        x.new_empty((n, channels), dtype=real),
        x.new_empty((n, channels), dtype=torch.int32),
        x.new_empty((n, channels), dtype=real),
        x.new_empty((n, h, w), dtype=real),
        x.new_empty((n, h, w), dtype=torch.int32),
    )


def _like(t: Tensor | None, x: Tensor, need: bool) -> Tensor:
    return torch.empty_like(t) if need and t is not None else _nothing(x)


def _same_device(x: Tensor, *others: Tensor) -> None:
    for t in others:
        if t.device != x.device:
            raise ValueError(
                f"a tensor of shape {tuple(t.shape)} is on {t.device}, x on {x.device}"
            )


# --- fakes ------------------------------------------------------------------------------------


# The fakes refuse what the kernels refuse: a call with one meta tensor among CPU tensors ends here.


@torch.library.register_fake("mfef::multi_scale_conv2d")
def _(x, weights, groups, split, bias):
    problem.describe_multi_scale_conv2d(x, weights, groups, split, bias)
    return _map_like(x, sum(w.shape[0] for w in weights))


@torch.library.register_fake("mfef::multi_scale_conv2d_backward")
def _(grad, x, weights, groups, split, bias, need_x, need_parameters):
    problem.describe_multi_scale_conv2d(x, weights, groups, split, bias)
    _same_device(x, grad)
    return (
        _map_like(x, x.shape[1]) if need_x else _nothing(x),
        [torch.empty_like(w) for w in weights] if need_parameters else [],
        _like(bias, x, need_parameters),
    )


@torch.library.register_fake("mfef::dual_attention")
def _(y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight, save):
    problem.describe_dual_attention(y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight)
    return (_map_like(y, y.shape[1]), *_saved(y, y.shape[1], save))


def _attention_grads(x, parameters, need):
    return tuple(_like(p, x, need) for p in parameters)


@torch.library.register_fake("mfef::dual_attention_backward")
def _(grad, y, w1, b1, w2, b2, ws, mean, max, max_index, c, s, c_index, need_x, need_parameters):
    problem.describe_dual_attention(y, w1, b1, w2, b2, ws)
    _same_device(y, grad, mean, max, max_index, c, s, c_index)
    grad_y = _map_like(y, y.shape[1]) if need_x else _nothing(y)
    return (grad_y, *_attention_grads(y, (w1, b1, w2, b2, ws), need_parameters))


@torch.library.register_fake("mfef::mfef_block")
def _(x, conv_weights, groups, split, w1, b1, w2, b2, ws, save):
    problem.describe_mfef_block(x, conv_weights, groups, w1, b1, w2, b2, ws, split)
    channels = sum(w.shape[0] for w in conv_weights)
    y = _map_like(x, channels) if save else _nothing(x)
    return (_map_like(x, channels), y, *_saved(x, channels, save))


@torch.library.register_fake("mfef::mfef_block_backward")
def _(
    grad, x, conv_weights, groups, split, w1, b1, w2, b2, ws,
    y, mean, max, max_index, c, s, c_index, need_x, need_parameters,
):  # fmt: skip
    problem.describe_mfef_block(x, conv_weights, groups, w1, b1, w2, b2, ws, split)
    _same_device(x, grad, y, mean, max, max_index, c, s, c_index)
    return (
        _map_like(x, x.shape[1]) if need_x else _nothing(x),
        [torch.empty_like(w) for w in conv_weights] if need_parameters else [],
        *_attention_grads(x, (w1, b1, w2, b2, ws), need_parameters),
    )


# --- autograd ---------------------------------------------------------------------------------


def _any(needs) -> bool:
    """Whether any input, also one inside a list, needs a gradient."""
    return any(_any(n) if isinstance(n, (list, tuple)) else bool(n) for n in needs)


def _or_none(grad: Tensor, parameter: Tensor | None, need: bool) -> Tensor | None:
    return grad if need and parameter is not None else None


def _check_saved(saved: Tensor, op: str, n: int) -> None:
    if saved.shape[0] != n:
        raise RuntimeError(
            f"torch.ops.mfef.{op} was called with save=False but its backward was asked for; "
            f"pass save=True, or use mfef_ext.functional.{op}, which does"
        )


def _setup_conv(ctx, inputs, output):
    x, weights, ctx.groups, ctx.split, bias = inputs
    ctx.branches = len(weights)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, *weights, *([bias] if bias is not None else []))


def _backward_conv(ctx, grad):
    x, *rest = ctx.saved_tensors
    weights, bias = rest[: ctx.branches], rest[ctx.branches] if ctx.has_bias else None
    need_x, need_parameters = ctx.needs_input_grad[0], _any(ctx.needs_input_grad[1:])
    grad_x, grad_weights, grad_bias = torch.ops.mfef.multi_scale_conv2d_backward(
        grad, x, weights, ctx.groups, ctx.split, bias, need_x, need_parameters
    )
    return (
        grad_x if need_x else None,
        grad_weights if need_parameters else [None] * ctx.branches,
        None,
        None,
        _or_none(grad_bias, bias, need_parameters),
    )


torch.library.register_autograd(
    "mfef::multi_scale_conv2d", _backward_conv, setup_context=_setup_conv
)


def _setup_attention(ctx, inputs, output):
    *tensors, _ = inputs
    out, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.batch = out.shape[0]
    ctx.absent = [i for i, t in enumerate(tensors) if t is None]
    ctx.save_for_backward(*(t for t in tensors if t is not None), *saved)


def _restore(tensors, absent: list[int]) -> list:
    """Puts the parameters that were None back into their places."""
    tensors = list(tensors)
    for i in absent:
        tensors.insert(i, None)
    return tensors


def _backward_attention(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    y, *rest = _restore(ctx.saved_tensors, ctx.absent)
    parameters, saved = rest[:5], rest[5:]
    _check_saved(saved[0], "dual_attention", ctx.batch)
    need_x, need_parameters = ctx.needs_input_grad[0], _any(ctx.needs_input_grad[1:])
    grad_y, *grads = torch.ops.mfef.dual_attention_backward(
        grad, y, *parameters, *saved, need_x, need_parameters
    )
    return (
        grad_y if need_x else None,
        *(_or_none(g, p, need_parameters) for g, p in zip(grads, parameters, strict=True)),
        None,
    )


torch.library.register_autograd(
    "mfef::dual_attention", _backward_attention, setup_context=_setup_attention
)


def _setup_block(ctx, inputs, output):
    x, weights, ctx.groups, ctx.split, *parameters, _ = inputs
    out, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.batch = out.shape[0]
    ctx.branches = len(weights)
    ctx.absent = [i for i, t in enumerate(parameters) if t is None]
    present = (t for t in parameters if t is not None)
    ctx.save_for_backward(x, *weights, *saved, *present)


def _backward_block(ctx, grad, *_):
    if grad is None:
        return (None, [None] * ctx.branches, *(None,) * 8)
    x, *rest = ctx.saved_tensors
    weights, saved = rest[: ctx.branches], rest[ctx.branches : ctx.branches + 7]
    parameters = _restore(rest[ctx.branches + 7 :], ctx.absent)
    _check_saved(saved[1], "mfef_block", ctx.batch)
    need_x, need_parameters = ctx.needs_input_grad[0], _any(ctx.needs_input_grad[1:])
    grad_x, grad_weights, *grads = torch.ops.mfef.mfef_block_backward(
        grad, x, weights, ctx.groups, ctx.split, *parameters, *saved, need_x, need_parameters
    )
    return (
        grad_x if need_x else None,
        grad_weights if need_parameters else [None] * ctx.branches,
        None,
        None,
        *(_or_none(g, p, need_parameters) for g, p in zip(grads, parameters, strict=True)),
        None,
    )


torch.library.register_autograd("mfef::mfef_block", _backward_block, setup_context=_setup_block)


def _refuse_double_backward(op: str) -> None:
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{op} cannot be differentiated twice by its native kernels; "
            'use backend="reference" (or mfef_ext.use_backend("reference")), which can'
        )

    torch.library.register_autograd(f"mfef::{op}_backward", backward)


for _op in ("multi_scale_conv2d", "dual_attention", "mfef_block"):
    _refuse_double_backward(_op)


# --- autocast ---------------------------------------------------------------------------------


def _cast(value, dtype: torch.dtype):
    if isinstance(value, Tensor):
        castable = value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if castable else value
    if isinstance(value, (list, tuple)):
        return [_cast(v, dtype) for v in value]
    return value


def _register_autocast(op: str) -> None:
    overload = getattr(torch.ops.mfef, op).default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def run(*args, _device=device_type, _key=key):
            with torch._C._ExcludeDispatchKeyGuard(
                torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
            ):
                return overload(*(_cast(a, torch.get_autocast_dtype(_device)) for a in args))

        _lib.impl(op, run, key)


for _op in ("multi_scale_conv2d", "dual_attention", "mfef_block"):
    _register_autocast(_op)


# --- what the backends call -------------------------------------------------------------------


def _save_needed(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def multi_scale_conv2d(x, weights, groups, split=True, bias=None) -> Tensor:
    """mfef_ext.functional.multi_scale_conv2d without checks."""
    return torch.ops.mfef.multi_scale_conv2d(x, list(weights), list(groups), split, bias)


def dual_attention(y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight) -> Tensor:
    """mfef_ext.functional.dual_attention without checks."""
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight)
    save = _save_needed(y, *parameters)
    return torch.ops.mfef.dual_attention(y, *parameters, save)[0]


def mfef_block(
    x, conv_weights, groups, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight, *, split
) -> Tensor:
    """mfef_ext.functional.mfef_block without checks."""
    weights = list(conv_weights)
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight)
    save = _save_needed(x, *weights, *parameters)
    return torch.ops.mfef.mfef_block(x, weights, list(groups), split, *parameters, save)[0]
