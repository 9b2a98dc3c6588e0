"""Which kernels run for a problem, for people: the launches themselves, not launched."""

from __future__ import annotations

import torch

from ...problem import Problem
from . import attention, conv
from .launch import Launch, Layout


def launches(problem: Problem, channels_last: bool) -> dict[str, tuple[Launch, ...]]:
    """The launches of each direction in their order, for dense tensors and all gradients.

    Of a convolution, a block or an attention; biases in the attention, none in the convolution.
    """
    n, h, w, device, dtype = (
        problem.batch, problem.height, problem.width, problem.device, problem.dtype,
    )  # fmt: skip

    def map_of(channels: int) -> Layout:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        t = torch.empty((n, channels, h, w), device="meta", memory_format=layout)
        return t.shape, t.stride()

    x, y = map_of(problem.channels), map_of(problem.out_channels)
    forward: list[Launch] = []
    backward: list[Launch] = []
    tiles, deterministic = 0, torch.are_deterministic_algorithms_enabled()
    if problem.branches:
        has_statistics = problem.hidden > 0
        weights = conv.Weights(
            [
                torch.empty(
                    (b.out_channels, b.in_channels // b.groups, b.kernel_size, b.kernel_size),
                    device="meta",
                )
                for b in problem.branches
            ],
            [b.groups for b in problem.branches],
            problem.split,
        )
        common = device, dtype, weights.branches()
        mode = conv.products_of(dtype, problem.tf32), deterministic, False
        convolution = conv._convolution(x, x, *common, False, False, has_statistics, *mode)
        data = conv._convolution(y, x, *common, True, False, False, *mode)
        forward.append(convolution.launch)
        backward += [data.launch, *conv._weight_gradient(y[1], x, *common, *mode).launches]
        tiles = convolution.statistics[0][-1] if has_statistics else 0
    if problem.hidden:
        k = problem.spatial_kernel_size
        key = attention._Key(problem.hidden, True, True, k, (2 * k * k, k * k, k, 1))
        options = device, dtype, key
        forward += attention._forward_call(y, *options, tiles, True, deterministic, False).launches
        call = attention._backward_call(y[1], y, *options, True, True, deterministic, False)
        backward = [*call.launches, *backward]
    for launch in (*forward, *backward):
        launch.look_up()
    return {"forward": tuple(forward), "backward": tuple(backward)}


def convolutions(problem: Problem) -> str:
    """How each branch is convolved in the forward."""
    found = []
    for b in problem.branches:
        width = min(b.in_channels, b.out_channels) // b.groups
        found.append(
            f"k={b.kernel_size} {'tl.dot' if width >= conv.MIN_DOT_CHANNELS else 'direct taps'}"
        )
    return ", ".join(found)
