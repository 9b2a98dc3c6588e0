"""The operators of the Triton backend: namespace mfef_triton, same schemas as the native ones.

They are opaque to torch.compile: what a compiler could fuse into them is little, and the schemas,
fakes and autograd formulas of the native operators serve them unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...ops.fakes import nothing, saved_by_attention
from . import LIBRARY, attention, conv, device_of
from .launch import Layout, aligned


def _multi_scale_conv2d(x, weights, groups, split, bias, allow_tf32=False) -> Tensor:
    with device_of(x):
        return conv.forward(x, conv.Weights(weights, groups, split), bias, allow_tf32, False)[0]


def _conv_gradients(
    grad: Tensor, x: Tensor, weights: conv.Weights,
    need_x: bool, need_parameters: bool, allow_tf32: bool = False,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    arguments = grad, x, weights, allow_tf32
    grad_x = conv.data_gradient(*arguments) if need_x else nothing(x)
    return grad_x, conv.weight_gradient(*arguments) if need_parameters else []


def _multi_scale_conv2d_backward(
    grad, x, weights, groups, split, bias, need_x, need_parameters, *tf32
):
    with device_of(x):
        weights = conv.Weights(weights, groups, split)
        gradients = _conv_gradients(grad, x, weights, need_x, need_parameters, *tf32)
        has_bias = need_parameters and bias is not None
        return (*gradients, conv.bias_gradient(grad) if has_bias else nothing(x))


def _dual_attention(y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight, save):
    parameters = attention.Parameters(fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight)
    with device_of(y):
        return attention.forward(y, parameters, None, save)


def _take(kind: Any, arguments: Sequence) -> tuple[Any, Sequence]:
    """A NamedTuple of the first arguments, and the others: as the schemas have them."""
    count = len(kind._fields)
    return kind(*arguments[:count]), arguments[count:]


def _dual_attention_backward(grad, y, *rest):
    parameters, others = _take(attention.Parameters, rest)
    saved, needs = _take(attention.Saved, others)
    with device_of(y):
        return attention.backward(grad, y, parameters, saved, *needs)


class _BlockCall(NamedTuple):
    """The convolution with its statistics, and the attention that takes them."""

    convolution: conv._Convolution
    attention: attention._Call


@lru_cache(maxsize=1024)
def _block_call(
    x: Layout,
    device: torch.device,
    dtype: torch.dtype,
    branches: conv.Branches,
    parameters: attention._Key,
    save: bool,
    products: str,
    deterministic: bool,
    reuse: tuple[bool, bool],
) -> _BlockCall:
    """Both calls of the block's forward at once: to look one up takes microseconds.

    reuse: of each.
    """
    convolution = conv._convolution(
        x, x, device, dtype, branches, False, False, True, products, deterministic, reuse[0]
    )
    *_, tiles = convolution.statistics[0]
    return _BlockCall(
        convolution,
        attention._forward_call(
            convolution.result, device, dtype, parameters, tiles, save, deterministic, reuse[1]
        ),
    )


def _mfef_block(
    x, conv_weights, groups, split, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight,
    save, allow_tf32=False,
):  # fmt: skip
    parameters = attention.Parameters(fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight)
    weights, dtype = conv.Weights(conv_weights, groups, split), x.dtype
    with device_of(x):
        call = _block_call(
            (x.shape, x.stride()), x.device, dtype, weights.branches(),
            attention.key_of(parameters), save, conv.products_of(dtype, allow_tf32),
            torch.are_deterministic_algorithms_enabled(),
            (aligned(dtype, x, *conv_weights), aligned(dtype, *parameters)),
        )  # fmt: skip
        y, statistics = conv.run(call.convolution, x, weights, None, True)
        out, *saved = attention.run(call.attention, y, parameters, statistics, save)
        return (out, y, *saved) if save else (out,)


def _mfef_block_backward(grad, x, conv_weights, groups, split, *rest):
    parameters, (y, *others) = _take(attention.Parameters, rest)
    saved, (need_x, need_parameters, *tf32) = _take(attention.Saved, others)
    with device_of(x):
        grad_y, *grads = attention.backward(
            grad, y, parameters, saved, need_x or need_parameters, need_parameters
        )
        weights = conv.Weights(conv_weights, groups, split)
        gradients = _conv_gradients(grad_y, x, weights, need_x, need_parameters, *tf32)
        return (*gradients, *grads)


_IMPLEMENTATIONS: dict[str, Callable] = {
    "multi_scale_conv2d": _multi_scale_conv2d,
    "multi_scale_conv2d_backward": _multi_scale_conv2d_backward,
    "dual_attention": _dual_attention,
    "dual_attention_backward": _dual_attention_backward,
    "mfef_block": _mfef_block,
    "mfef_block_backward": _mfef_block_backward,
}


def _dual_attention_by_schema(y, *rest):
    out, *saved = _dual_attention(y, *rest)
    return (out, *(saved or saved_by_attention(y, y.shape[1], False)))


def _mfef_block_by_schema(x, *rest):
    out, *saved = _mfef_block(x, *rest)
    return (out, *(saved or (nothing(x), *saved_by_attention(x, out.shape[1], False))))


# The dispatcher wants as many results as the schemas have; who calls directly takes the first.
_BY_SCHEMA = {
    "dual_attention": _dual_attention_by_schema,
    "mfef_block": _mfef_block_by_schema,
}
for _name, _implementation in (_IMPLEMENTATIONS | _BY_SCHEMA).items():
    for _key in ("CUDA", "CPU"):
        LIBRARY.impl(_name, _implementation, _key)

OPERATORS = ops.register("mfef_triton", _IMPLEMENTATIONS)
