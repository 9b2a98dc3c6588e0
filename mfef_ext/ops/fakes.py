"""Fakes: what the operators return, as empty tensors.

They repeat what the kernels allocate, and refuse what those refuse: a call with one meta tensor
among CPU tensors ends here. The dispatcher leaves out arguments at the end that have their default
value, such as ``allow_tf32``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import problem


def map_like(x: Tensor, channels: int) -> Tensor:
    """(N, channels, H, W) in the layout of x: contiguous or channels_last, else contiguous."""
    n, _, h, w = x.shape
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return x.new_empty((n, channels, h, w)).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def nothing(x: Tensor) -> Tensor:
    """What stands for a result that was not asked for."""
    return x.new_empty((0,))


def saved_by_attention(x: Tensor, channels: int, save: bool) -> tuple[Tensor, ...]:
    """mean, max, max_index, spatial_gate and channel_index, without images unless saved."""
    n, h, w = (x.shape[0] if save else 0), x.shape[2], x.shape[3]
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((n, channels), dtype=real),
        x.new_empty((n, channels), dtype=real),
        x.new_empty((n, channels), dtype=torch.int32),
        x.new_empty((n, h, w), dtype=real),
        x.new_empty((n, h, w), dtype=torch.int32),
    )


def _grads(x: Tensor, parameters: tuple[Tensor | None, ...], need: bool) -> list[Tensor]:
    return [torch.empty_like(p) if need and p is not None else nothing(x) for p in parameters]


def _check_device(x: Tensor, *others: Tensor) -> None:
    for t in others:
        if t.device != x.device:
            raise ValueError(
                f"a tensor of shape {tuple(t.shape)} is on {t.device}, x on {x.device}"
            )


def _multi_scale_conv2d(x, weights, groups, split, bias, allow_tf32=False):
    problem.describe_multi_scale_conv2d(x, weights, groups, split, bias)
    return map_like(x, sum(w.shape[0] for w in weights))


def _multi_scale_conv2d_backward(
    grad, x, weights, groups, split, bias, need_x, need_parameters, allow_tf32=False
):
    problem.describe_multi_scale_conv2d(x, weights, groups, split, bias)
    _check_device(x, grad)
    return (
        map_like(x, x.shape[1]) if need_x else nothing(x),
        [torch.empty_like(w) for w in weights] if need_parameters else [],
        *_grads(x, (bias,), need_parameters),
    )


def _dual_attention(y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight, save):
    problem.describe_dual_attention(y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight)
    return (map_like(y, y.shape[1]), *saved_by_attention(y, y.shape[1], save))


def _dual_attention_backward(
    grad, y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight,
    mean, max, max_index, spatial_gate, channel_index, need_x, need_parameters,
):  # fmt: skip
    attention = fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight
    problem.describe_dual_attention(y, *attention)
    _check_device(y, grad, mean, max, max_index, spatial_gate, channel_index)
    grad_y = map_like(y, y.shape[1]) if need_x else nothing(y)
    return (grad_y, *_grads(y, attention, need_parameters))


def _mfef_block(
    x, conv_weights, groups, split, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight,
    save, allow_tf32=False,
):  # fmt: skip
    attention = fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight
    problem.describe_mfef_block(x, conv_weights, groups, *attention, split)
    channels = sum(w.shape[0] for w in conv_weights)
    y = map_like(x, channels) if save else nothing(x)
    return (map_like(x, channels), y, *saved_by_attention(x, channels, save))


def _mfef_block_backward(
    grad, x, conv_weights, groups, split, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    spatial_weight, y, mean, max, max_index, spatial_gate, channel_index, need_x, need_parameters,
    allow_tf32=False,
):  # fmt: skip
    attention = fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight
    problem.describe_mfef_block(x, conv_weights, groups, *attention, split)
    _check_device(x, grad, y, mean, max, max_index, spatial_gate, channel_index)
    return (
        map_like(x, x.shape[1]) if need_x else nothing(x),
        [torch.empty_like(w) for w in conv_weights] if need_parameters else [],
        *_grads(x, attention, need_parameters),
    )


FAKES: dict[str, Callable] = {
    "multi_scale_conv2d": _multi_scale_conv2d,
    "multi_scale_conv2d_backward": _multi_scale_conv2d_backward,
    "dual_attention": _dual_attention,
    "dual_attention_backward": _dual_attention_backward,
    "mfef_block": _mfef_block,
    "mfef_block_backward": _mfef_block_backward,
}
