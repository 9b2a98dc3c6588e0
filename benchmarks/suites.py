"""What is measured: the cases, the tensors of a case, and how much work a case is.

A case is one shape, dtype and direction. Its operation counts and its floor of bytes are counted
here from the shapes alone, for every implementation alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mfef_ext import MFEFBlock

Layout = Literal["contiguous", "channels_last"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)

# (N, C, side of the map, groups)
Shape = tuple[int, int, int, Any]
DEFAULT_GROUPS = (1, 4, 8, 16)
DENSE = (1, 1, 1, 1)
SHAPES: dict[str, tuple[Shape, ...]] = {
    "paper": (
        (128, 64, 8, DEFAULT_GROUPS),
        (128, 128, 8, DEFAULT_GROUPS),
        (128, 256, 8, DEFAULT_GROUPS),
        (128, 132, 8, "auto"),
        (128, 512, 2, DEFAULT_GROUPS),
    ),
    "imagenet": (
        (32, 64, 56, DEFAULT_GROUPS),
        (32, 128, 28, DEFAULT_GROUPS),
        (32, 256, 14, DEFAULT_GROUPS),
        (32, 512, 7, DEFAULT_GROUPS),
    ),
    "edge": (
        (1, 64, 8, DEFAULT_GROUPS),
        (1, 256, 14, DEFAULT_GROUPS),
        (1, 64, 56, DEFAULT_GROUPS),
    ),
    # 132 channels are left out here: 33 channels per branch have no common divisor with 4, 8 or
    # 16, so the auto groups of "paper" are the dense ones already.
    "dense": (
        (128, 64, 8, DENSE),
        (128, 128, 8, DENSE),
        (128, 256, 8, DENSE),
        (128, 512, 2, DENSE),
    ),
}
# --quick keeps one shape per suite, the fastest one for eager PyTorch: its position above.
QUICK = {"paper": 0, "imagenet": 3, "edge": 0, "dense": 0}


@dataclass(frozen=True)
class Case:
    """One shape, dtype and direction of a suite; maps are square, ``side`` by ``side``."""

    suite: str
    batch: int
    channels: int
    side: int
    groups: tuple[int, ...]
    dtype: str
    direction: str

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.channels}x{self.side}x{self.side}"

    @property
    def name(self) -> str:
        return f"{self.suite} {self.shape} {self.dtype} {self.direction}"

    @property
    def backward(self) -> bool:
        return self.direction == BOTH


def select(
    suites: tuple[str, ...] = tuple(SHAPES),
    dtypes: tuple[str, ...] = tuple(DTYPES),
    directions: tuple[str, ...] = DIRECTIONS,
    quick: bool = False,
) -> list[Case]:
    """The cases of the suites, suite by suite; shapes innermost, as the tables show them."""
    cases = []
    for suite in suites:
        shapes = (SHAPES[suite][QUICK[suite]],) if quick else SHAPES[suite]
        for dtype in dtypes:
            for direction in directions:
                for batch, channels, side, groups in shapes:
                    # The layer resolves "auto"; the meta device allocates nothing.
                    resolved = MFEFBlock(channels, groups=groups, device="meta").conv.groups
                    cases.append(Case(suite, batch, channels, side, resolved, dtype, direction))
    return cases


@dataclass
class Operands:
    """The tensors of one case in one layout: the block's arguments and the output's gradient."""

    x: Tensor
    conv_weights: list[Tensor]
    groups: tuple[int, ...]
    attention: tuple[Tensor, ...]
    grad_out: Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.x, self.conv_weights, self.groups, *self.attention)

    @property
    def parameters(self) -> dict[str, Tensor]:
        names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "spatial_weight")
        convolutions = {f"conv_weights[{i}]": w for i, w in enumerate(self.conv_weights)}
        return convolutions | dict(zip(names, self.attention, strict=True))

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken of: x and every parameter."""
        return {"x": self.x} | self.parameters

    def to(
        self,
        dtype: torch.dtype | None = None,
        layout: Layout | None = None,
        images: Tensor | None = None,
    ) -> Operands:
        """A copy of the same values in another dtype or layout, or of some of the images only."""

        def copy(t: Tensor, batched: bool = False) -> Tensor:
            t = t.detach()
            t = t[images] if batched and images is not None else t
            keep = torch.preserve_format if layout is None else MEMORY_FORMATS[layout]
            return t.to(
                dtype or t.dtype,
                copy=True,
                memory_format=keep if t.dim() == 4 else torch.preserve_format,
            )

        return Operands(
            copy(self.x, batched=True).requires_grad_(),
            [copy(w).requires_grad_() for w in self.conv_weights],
            self.groups,
            tuple(copy(p).requires_grad_() for p in self.attention),
            copy(self.grad_out, batched=True),
        )

    def mirrored(self, dims: tuple[int, ...]) -> Operands:
        """The same block seen in a mirror, as leaves: its maps and kernels are flipped."""

        def flipped(t: Tensor) -> Tensor:
            t = t.detach()
            return (t.flip(dims) if dims and t.dim() == 4 else t).requires_grad_()

        return Operands(
            flipped(self.x),
            [flipped(w) for w in self.conv_weights],
            self.groups,
            tuple(flipped(p) for p in self.attention),
            flipped(self.grad_out).detach(),
        )


def make_operands(
    case: Case, device: str, layout: Layout = "contiguous", seed: int = 0
) -> Operands:
    """Tensors for a case: a layer's own initial weights, normal x and output gradient.

    In channels_last the 4-D weights are channels_last too, as ``model.to(memory_format=...)``
    makes them: eager convolutions are faster so.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Drawn on the CPU, so that every device gets the same numbers.
        block = MFEFBlock(case.channels, groups=case.groups)
        shape = (case.batch, case.channels, case.side, case.side)
        x, grad_out = torch.randn(shape), torch.randn(shape)
    a = block.attention
    attention = (a.fc1_weight, a.fc1_bias, a.fc2_weight, a.fc2_bias, a.spatial_weight)
    dtype = DTYPES[case.dtype]
    drawn = Operands(
        x.to(device),
        [w.detach().to(device) for w in block.conv.weights],
        case.groups,
        tuple(p.detach().to(device) for p in attention if p is not None),
        grad_out.to(device),
    )
    return drawn.to(dtype, layout)


def make_step(
    function: Callable[..., Tensor],
    operands: Operands,
    backward: bool,
    before: Callable[[], None] | None = None,
) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
    """One call as it is timed and as it is checked: returns the output and the gradients.

    Forward runs without autograd, as in inference. Backward asks for the gradients of x and of
    all parameters, as in the middle of a network, without adding them to ``.grad``.
    """
    leaves = operands.leaves
    names, tensors = list(leaves), list(leaves.values())

    def forward_step() -> tuple[Tensor, dict[str, Tensor]]:
        if before is not None:
            before()
        with torch.no_grad():
            return function(*operands.arguments), {}

    def both_step() -> tuple[Tensor, dict[str, Tensor]]:
        if before is not None:
            before()
        out = function(*operands.arguments)
        grads = torch.autograd.grad(out, tensors, operands.grad_out)
        return out, dict(zip(names, grads, strict=True))

    return both_step if backward else forward_step


@dataclass(frozen=True)
class Work:
    """Work of one call of a case.

    naive_ops: floating-point operations (a product and a sum are two) of the convolutions, the
        spatial gate's convolution and the MLP, every tap counted, also those on zero padding.
    real_ops: the same with the taps inside the map only. Element-wise work is in neither.
    bytes_floor: each tensor that must pass through memory, once. Forward reads x, writes out.
        Backward adds what the block saves and reads (docs/cpu.md): y is written, then x,
        y and the output's gradient are read and x's gradient is written. Parameters are read once
        per direction, their gradients written once.
    """

    naive_ops: int
    real_ops: int
    bytes_floor: int


def taps_inside(side: int, kernel_size: int) -> int:
    """Pairs (output pixel, tap) of a square map whose tap is inside the map, padding k // 2.

    A tap at distance d in one dimension is inside for ``side - |d|`` positions.
    """
    reach = kernel_size // 2
    return sum(max(side - abs(d), 0) for d in range(-reach, reach + 1)) ** 2


def count_work(case: Case) -> Work:
    """The :class:`Work` of one call. Backward is twice the forward's operations: the data
    gradient and the weight gradient have as many products as the forward each."""
    block = MFEFBlock(case.channels, groups=case.groups, device="meta")
    weights = [*block.conv.weights, block.attention.spatial_weight]
    pixels = case.side**2
    naive = real = 0
    for weight in weights:
        out_channels, in_channels, k, _ = weight.shape
        naive += out_channels * in_channels * k * k * pixels
        real += out_channels * in_channels * taps_inside(case.side, k)
    # The MLP sees the mean and the maximum: two vectors per image, two matrices.
    mlp = 2 * (block.attention.fc1_weight.numel() + block.attention.fc2_weight.numel())
    passes = 3 if case.backward else 1
    operations = 2 * case.batch * passes
    parameters = sum(p.numel() for p in block.parameters())
    map_elements = case.batch * case.channels * pixels
    elements = 2 * map_elements + parameters
    if case.backward:
        elements += 5 * map_elements + 2 * parameters
    return Work(
        operations * (naive + mlp),
        operations * (real + mlp),
        elements * DTYPES[case.dtype].itemsize,
    )
