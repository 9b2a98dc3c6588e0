"""The operators of the Triton backend: namespace mfef_triton, same schemas as the native ones.

They are opaque to torch.compile: what a compiler could fuse into them is little, and the schemas,
fakes and autograd formulas of the native operators serve them unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...ops.fakes import nothing, saved_by_attention
from . import LIBRARY, attention, conv, device_of
from .launch import usual


def _multi_scale_conv2d(x, weights, groups, split, bias, allow_tf32=False) -> Tensor:
    with device_of(x):
        return conv.forward(x, weights, groups, split, bias, allow_tf32, False)[0]


def _conv_gradients(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    split: bool,
    allow_tf32: bool,
    need_x: bool,
    need_parameters: bool,
) -> tuple[Tensor, list[Tensor]]:
    arguments = grad, x, weights, groups, split, allow_tf32
    grad_x = conv.data_gradient(*arguments) if need_x else nothing(x)
    grads = conv.weight_gradient(*arguments) if need_parameters else []
    return grad_x, grads


def _multi_scale_conv2d_backward(
    grad, x, weights, groups, split, bias, need_x, need_parameters, allow_tf32=False
):
    with device_of(x):
        gradients = _conv_gradients(
            grad, x, weights, groups, split, allow_tf32, need_x, need_parameters
        )
        has_bias = need_parameters and bias is not None
        return (*gradients, conv.bias_gradient(grad) if has_bias else nothing(x))


def _dual_attention(y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight, save):
    parameters = fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight
    with device_of(y):
        return attention.forward(y, *parameters, None, save)


def _dual_attention_backward(grad, y, *rest):
    with device_of(y):
        return attention.backward(grad, y, *rest)


class _BlockCall(NamedTuple):
    """The convolution with its statistics, and the attention that takes them."""

    convolution: conv._Convolution
    attention: attention._Call


@lru_cache(maxsize=1024)
def _block_call(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    weights: conv._Weights,
    groups: tuple[int, ...],
    split: bool,
    parameters: attention._Parameters,
    save: bool,
    products: str,
    deterministic: bool,
    reuse: tuple[bool, bool],
) -> _BlockCall:
    """Both calls of the block's forward at once: to look one up takes microseconds.

    reuse: of each.
    """
    convolution = conv._convolution(
        shape, strides, shape, strides, device, dtype, weights, groups, split, False, False, True,
        products, deterministic, reuse[0],
    )  # fmt: skip
    *_, tiles = convolution.statistics[0]
    return _BlockCall(
        convolution,
        attention._forward_call(
            *convolution.result, device, dtype, parameters, tiles, save, deterministic, reuse[1]
        ),
    )


def _mfef_block(x, conv_weights, groups, split, w1, b1, w2, b2, ws, save, allow_tf32=False):
    parameters, dtype = (w1, b1, w2, b2, ws), x.dtype
    with device_of(x):
        call = _block_call(
            x.shape, x.stride(), x.device, dtype, conv._key(conv_weights), tuple(groups), split,
            attention._key(*parameters), save, conv._arithmetic(dtype, allow_tf32),
            torch.are_deterministic_algorithms_enabled(),
            (usual(dtype, x, *conv_weights), usual(dtype, *parameters)),
        )  # fmt: skip
        y, statistics = conv.run(call.convolution, x, conv_weights, None, True)
        out, *saved = attention.run(call.attention, y, *parameters, statistics, save)
        return (out, y, *saved) if save else (out,)


def _mfef_block_backward(
    grad, x, conv_weights, groups, split, w1, b1, w2, b2, ws,
    y, mean, max, max_index, spatial_gate, channel_index, need_x, need_parameters, allow_tf32=False,
):  # fmt: skip
    with device_of(x):
        grad_y, *grads = attention.backward(
            grad, y, w1, b1, w2, b2, ws, mean, max, max_index, spatial_gate, channel_index,
            need_x or need_parameters, need_parameters,
        )  # fmt: skip
        gradients = _conv_gradients(
            grad_y, x, conv_weights, groups, split, allow_tf32, need_x, need_parameters
        )
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
