"""The torch.library side of the operators.

Their schemas are in csrc, with the native kernels. For a namespace with these operators
:func:`register` adds the rest: derivatives (autograd.py), fakes (fakes.py), vmap and autocast
(transforms.py), FLOPs (flops.py). "mfef" is the native namespace; a backend with kernels in Python
defines the same operators in one of its own. Private names of PyTorch are in dispatch.py alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .. import _C as _C  # defines the operators, with their CPU kernels
from .. import reference
from . import autograd, dispatch, flops, transforms

# The CUDA library needs a torch with CUDA; in another one it could not be loaded.
_cuda_library = Path(_C.__file__).with_name("_C_cuda.so")
CUDA_LOADED = torch.version.cuda is not None and _cuda_library.exists()
if CUDA_LOADED:
    torch.ops.load_library(str(_cuda_library))

OPERATORS = ("multi_scale_conv2d", "dual_attention", "mfef_block")  # with a backward each

_libraries: list[torch.library.Library] = []  # what is registered goes with its library


def define(namespace: str) -> torch.library.Library:
    """Defines the operators in a namespace; their kernels are to be registered with the result."""
    lib = torch.library.Library(namespace, "FRAGMENT")
    for op in OPERATORS:
        for name in (op, f"{op}_backward"):
            lib.define(dispatch.schema(getattr(torch.ops.mfef, name).default))
    flops.register(namespace)
    return lib


def register(namespace: str, kernels: Mapping[str, Callable] | None = None) -> dict[str, Callable]:
    """Registers all but kernels for a namespace, in which the operators are defined.

    ``kernels`` are the implementations by the operators' names, if they are written in Python.
    Returns the functions of :mod:`mfef_ext.functional`, without checks, that call them.
    """
    from .fakes import FAKES  # whose checks, in problem.py, import dispatch.py

    lib = torch.library.Library(namespace, "IMPL")
    _libraries.append(lib)
    conv = autograd.MultiScaleConv2d(namespace, kernels)
    attention = autograd.DualAttention(namespace, kernels)
    block = autograd.MfefBlock(namespace, kernels)
    for operator in (conv, attention, block):
        operator.register_autograd(lib)
        transforms.register_vmap(lib, operator)
        transforms.register_autocast(lib, operator)
        for name in (operator.name, f"{operator.name}_backward"):
            torch.library.register_fake(f"{namespace}::{name}", FAKES[name])

    def multi_scale_conv2d(x, weights, groups, split=True, bias=None) -> Tensor:
        return conv((x, *weights, bias), (tuple(groups), split, dispatch.allow_tf32()))

    def dual_attention(y, *parameters) -> Tensor:
        return attention((y, *parameters))

    def mfef_block(x, conv_weights, groups, *attention, split=True) -> Tensor:
        options = tuple(groups), split, dispatch.allow_tf32()
        return block((x, *conv_weights, *attention), options)

    functions: tuple[Callable, ...] = (multi_scale_conv2d, dual_attention, mfef_block)
    if not dispatch.OWN_AUTOGRAD:
        functions = tuple([_or_specification(function) for function in functions])
    return dict(zip(OPERATORS, functions, strict=True))


def _or_specification(function: Callable) -> Callable:
    """``function``, or its specification where the dispatcher would not derive a call."""
    specification = getattr(reference, function.__name__)

    def call(*args, **options):
        needed = dispatch.needs_specification(autograd.tensors_in(args))
        return (specification if needed else function)(*args, **options)

    return call


@cache
def native() -> dict[str, Callable]:
    """The functions that call the native kernels."""
    flops.register("mfef")
    return register("mfef")
