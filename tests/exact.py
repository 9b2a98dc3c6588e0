"""The specification with convolutions that do not round: what float64 results are compared with.

How float64 convolutions of PyTorch add depends on the processor, and their error with it: up to 40
units in the last place on one, 3 on another. Here each operand is cut into slices of so few bits
that float64 holds every sum of products of two slices without rounding, in whatever order it is
added; what rounds is the sum over pairs of slices, about once (Ozaki et al., "Error-free
transformations of matrix multiplication", Numerical Algorithms 59, 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

BITS = 60  # below the largest magnitude of an operand; those of a float64 are 53


class ExactConvolutions(TorchFunctionMode):
    """Within this context float64 conv2d, and its gradients, are exact but for one rounding: of the
    largest results, or of all that are at most 2 ** (bits - 60) times smaller than those."""

    def __init__(self, bits: int = BITS) -> None:
        super().__init__()
        self.bits = bits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.conv2d and args[0].dtype == torch.float64:
            return _conv2d(*args, **kwargs, bits=self.bits)
        return func(*args, **kwargs)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int,
    groups: int = 1,
    bits: int,
) -> Tensor:
    y = _Convolution.apply(x, weight, padding, groups, bits)
    return y if bias is None else y + bias[:, None, None]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, padding, groups, bits):
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.groups, ctx.bits = padding, groups, bits

        def product(a, b):
            return torch.conv2d(a, b, padding=padding, groups=groups)

        return _sum_of_products(product, x, weight, weight[0].numel(), bits)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors

        def gradient(grad, x, weight, which):
            return torch.ops.aten.convolution_backward(
                grad,
                x,
                weight,
                bias_sizes=None,
                stride=[1, 1],
                padding=[ctx.padding] * 2,
                dilation=[1, 1],
                transposed=False,
                output_padding=[0, 0],
                groups=ctx.groups,
                output_mask=[which == 0, which == 1, False],
            )[which]

        terms = weight.shape[0] // ctx.groups * weight[0, 0].numel()
        grad_x = _sum_of_products(lambda a, b: gradient(a, x, b, 0), grad, weight, terms, ctx.bits)
        terms = grad.numel() // grad.shape[1]
        grad_weight = _sum_of_products(
            lambda a, b: gradient(a, b, weight, 1), grad, x, terms, ctx.bits
        )
        return grad_x, grad_weight, None, None, None


def _sum_of_products(
    product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, terms: int, wanted: int
) -> Tensor:
    """The bilinear ``product``, whose elements are sums of up to ``terms`` products; all bits of
    the operands but those that lie ``wanted`` or more below the largest product."""
    # A sum of `terms` products of two slices has at most 2 * bits + log2(terms) bits.
    bits = (53 - math.ceil(math.log2(max(terms, 1)))) // 2
    firsts, seconds = _slices(a, bits, wanted), _slices(b, bits, wanted)
    pairs = [(i, j) for i in range(len(firsts)) for j in range(len(seconds))]
    # The smallest first; what lies below the last bit that is asked for is left out.
    pairs = [p for p in sorted(pairs, key=sum, reverse=True) if sum(p) * bits < wanted]
    total = product(firsts[pairs[0][0]], seconds[pairs[0][1]])
    for i, j in pairs[1:]:
        total += product(firsts[i], seconds[j])
    return total


def _slices(t: Tensor, bits: int, wanted: int) -> list[Tensor]:
    """Tensors that add up to ``t``, all elements of each multiples of one power of two."""
    top = float(t.abs().max()) if t.numel() else 0.0
    unit = 2.0 ** (math.frexp(top)[1] - bits)
    parts = []
    for _ in range(math.ceil(wanted / bits)):
        part = (t / unit).round() * unit
        parts.append(part)
        t = t - part
        if not t.any():
            break
        unit *= 2.0**-bits
    return parts
