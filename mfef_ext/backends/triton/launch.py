"""Launches with little host time: everything but the pointers is settled once per problem.

``kernel[grid](...)`` looks at every argument anew to find out which compiled code is meant, which
takes longer than a small map takes on the GPU. It returns that code, though, and
``code[grid](*arguments)`` launches it as it is, with the hooks of profilers and on the current
stream. This is what Triton's own tutorials do (02-fused-softmax), and all that is relied on.

What code is meant depends on types, on integers that are 1 or multiples of 16, and on addresses
that are multiples of 16. So a :class:`Launch` is made by functions that are cached by dtypes,
shapes, strides, device and :func:`aligned`; it holds numbers, and no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from ...ops import fakes

# What is said of a tile: constants of kernels, in words.
TILE = {
    "IMAGES": "images",
    "PIXELS": "pixels",
    "MAX_CHANNELS": "channels at most",
    "BLOCK_C": "channels",
    "BLOCK_P": "pixels",
}
REGISTERS = 255  # of a thread: as many as NVIDIA's instructions can name
ALL_REGISTERS = 65536  # of a multiprocessor, on all architectures


def aligned(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    """Whether all tensors have the dtype and begin at multiples of 16 bytes, as torch allocates."""
    addresses = 0
    for t in tensors:
        if t is not None:
            if t.dtype != dtype:
                return False
            addresses |= t.data_ptr()
    return addresses % 16 == 0


Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


class Strides(NamedTuple):
    """Of a map, as kernels take them."""

    n: int
    c: int
    h: int
    w: int


def contiguous(*shape: int) -> Layout:
    """``t.new_empty_strided(*contiguous(...))`` takes two thirds of the time of ``new_empty``, if
    the strides are at hand."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return shape, tuple(reversed(strides))


def meta_like(layout: Layout) -> Tensor:
    """A tensor with that shape and these strides, but without memory."""
    return torch.empty_strided(*layout, device="meta")


def map_like(layout: Layout, channels: int) -> Layout:
    t = fakes.map_like(meta_like(layout), channels)
    return t.shape, t.stride()


class Launch:
    """A kernel with its grid and all arguments but the tensors, which come first.

    Args:
        kernel: a ``triton.jit`` function whose arguments are tensors, numbers, constants.
        programs: size of the grid; 0 launches nothing.
        numbers: the arguments after the tensors; a NamedTuple of numbers is one of them.
        constants: at least all compile-time arguments, which are the last ones, by name.
        warps, stages: of the kernel.
        reuse: whether to remember the compiled code. False if tensors may be at odd addresses.
        registers: the most that a thread may have. With None ptxas decides, so that more blocks
            fit; it makes a few kernels spill for it: see docs/gpu.md.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: Sequence[Any],
        constants: Mapping[str, Any],
        warps: int,
        stages: int,
        reuse: bool,
        registers: int | None = None,
    ) -> None:
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.constants = {n: constants[n] for n in kernel.arg_names if n in constants}
        self.rest = (*numbers, *self.constants.values())
        # Named, since 3.10 contracts a multiplication and an addition only where it is asked to.
        self.options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        if registers is not None and torch.version.hip is None:
            self.options["maxnreg"] = registers
        # Elsewhere the code depends on the sizes of the storages, too.
        self.reuse = reuse and torch.version.hip is None
        self._run: Any = None

    def __call__(self, *tensors: Any) -> None:
        """Launches on the current device and stream; a tuple of tensors is one argument."""
        if self._run is not None:
            self._run(*tensors, *self.rest)
        elif self.grid[0] > 0:
            self._bind(tensors)

    def _bind(self, tensors: tuple) -> None:
        """Launches the way that finds the compiled code, and remembers it."""
        code = self.kernel[self.grid](*tensors, *self.rest, **self.options)
        # Interpreted kernels have none.
        if self.reuse and isinstance(code, CompiledKernel):
            self._run = code[self.grid]

    def look_up(self) -> None:
        """Becomes what would run now, where that is a choice: see tuning.py."""

    def choices(self) -> str:
        """For people: of what launches this is one, and why; "" if there is no other."""
        return ""

    def __str__(self) -> str:
        """For people: name, grid, tile, warps."""
        name = self.kernel.__name__.strip("_").removesuffix("_kernel")
        tile = " x ".join(
            f"{self.constants[size]} {what}"
            for size, what in TILE.items()
            if self.constants.get(size, 1) > 1
        )
        of = f" of {tile}" if tile else ""
        return f"{name}: {self.grid[0]} program(s){of}, {self.options['num_warps']} warps"
