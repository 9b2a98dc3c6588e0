"""Which kernels run for a problem, for people: the launches themselves, not launched."""

from __future__ import annotations

import torch

from ...problem import Problem
from . import attention, conv
from .launch import Launch, like


def launches(problem: Problem, channels_last: bool) -> dict[str, tuple[Launch, ...]]:
    """The launches of each direction in their order, for dense tensors and all gradients.

    Of a convolution, a block or an attention; biases in the attention, none in the convolution.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    n, h, w, device, dtype = (
        problem.batch, problem.height, problem.width, problem.device, problem.dtype,
    )  # fmt: skip

    def strides(channels: int) -> tuple[int, ...]:
        shape = (n, channels, h, w)
        return torch.empty(shape, device="meta").contiguous(memory_format=layout).stride()

    x_shape, x_strides = (n, problem.channels, h, w), strides(problem.channels)
    y_shape, y_strides = (n, problem.out_channels, h, w), strides(problem.out_channels)
    forward: list[Launch] = []
    backward: list[Launch] = []
    tiles, deterministic = 0, torch.are_deterministic_algorithms_enabled()
    if problem.branches:
        has_statistics = problem.hidden > 0
        shapes = [
            (b.out_channels, b.in_channels // b.groups, b.kernel_size, b.kernel_size)
            for b in problem.branches
        ]
        weights = conv._key([torch.empty(shape, device="meta") for shape in shapes])
        groups = tuple([b.groups for b in problem.branches])
        mode = conv._arithmetic(dtype, problem.tf32), deterministic
        x, y = (x_shape, x_strides), (y_shape, y_strides)
        convolution = conv._convolution(
            *x, *x, device, dtype, weights, groups, problem.split, False, False, has_statistics,
            *mode, False,
        )  # fmt: skip
        data = conv._convolution(
            *y, *x, device, dtype, weights, groups, problem.split, True, False, False, *mode,
            False,
        )  # fmt: skip
        gradients = conv._weight_gradient(
            y_strides, *x, device, dtype, weights, groups, problem.split, *mode, False
        )
        forward.append(convolution.launch)
        backward += [data.launch, *gradients.launches]
        tiles = convolution.statistics[0][-1] if has_statistics else 0
    if problem.hidden:
        k = problem.spatial_kernel_size
        taps = like((1, 2, k, k), (2 * k * k, k * k, k, 1)).stride()
        parameters = attention._Parameters(problem.hidden, True, True, k, taps)
        common = (device, dtype, parameters)
        forward += attention._forward_call(
            y_shape, y_strides, *common, tiles, True, deterministic, False
        ).launches
        backward = [
            *attention._backward_call(
                y_strides, y_shape, y_strides, *common, True, True, deterministic, False
            ).launches,
            *backward,
        ]
    for launch in (*forward, *backward):
        launch.look_up()
    return {"forward": tuple(forward), "backward": tuple(backward)}


def convolutions(problem: Problem) -> str:
    """How each branch is convolved in the forward."""
    found = []
    for b in problem.branches:
        width = min(b.in_channels, b.out_channels) // b.groups
        found.append(f"k={b.kernel_size} {'tl.dot' if width >= conv.WIDE else 'direct taps'}")
    return ", ".join(found)
