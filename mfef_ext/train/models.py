"""The students: small CIFAR-style residual networks, built by name.

A student's file holds its weights alone; :class:`StudentSpec` is the small JSON beside it that
says how to build the network they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Blocks per stage; the depth is 6 * blocks + 2 (He 2016, section 4.2).
BLOCKS = {"resnet8": 1, "resnet14": 2, "resnet20": 3, "resnet32": 5, "resnet56": 9}
STUDENTS = tuple(BLOCKS)

# The layer whose output is the last map before global pooling.
LAST_MAP = "stage3"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around an identity shortcut (He 2016).

    Where the shape changes, the shortcut subsamples and pads with zero channels ("option A", the
    one He 2016 uses for CIFAR): no parameters. (N, Cin, H, W) -> (N, Cout, H/stride, W/stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.added_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.added_channels:
            before = self.added_channels // 2
            x = nn.functional.pad(x, (0, 0, 0, 0, before, self.added_channels - before))
        return torch.relu(x + y)


class ResNet(nn.Module):
    """He 2016's residual network for small images: three stages of 16, 32 and 64 channels.

    x: (N, in_channels, H, W) -> logits (N, num_classes). ``stage3`` gives the last map,
    (N, 64, H', W') with H' = H divided by the product of ``strides``.
    """

    def __init__(
        self, blocks: int, in_channels: int, num_classes: int, strides: Sequence[int] = (1, 2, 2)
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)

        def stage(cin: int, cout: int, stride: int) -> nn.Sequential:
            first = BasicBlock(cin, cout, stride)
            return nn.Sequential(first, *(BasicBlock(cout, cout, 1) for _ in range(blocks - 1)))

        self.stage1 = stage(16, 16, strides[0])
        self.stage2 = stage(16, 32, strides[1])
        self.stage3 = stage(32, 64, strides[2])
        self.classifier = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.classifier(x.mean((2, 3)))


@dataclass(frozen=True)
class StudentSpec:
    """What it takes to build a student again: all of it plain JSON."""

    model: str
    in_channels: int
    num_classes: int
    strides: tuple[int, int, int]

    def build(self) -> nn.Module:
        """The network with fresh weights, drawn from torch's global generator."""
        return ResNet(BLOCKS[self.model], self.in_channels, self.num_classes, self.strides)


def strides_for(image_size: int) -> tuple[int, int, int]:
    """The strides of the three stages for square images of ``image_size`` pixels.

    Spatial attention and kernels up to 9x9 are void on a 1x1 or 2x2 map, so a stage halves the map
    only while it stays at 8x8 or more: 32 -> (1, 2, 2) as in He 2016, 16 -> (1, 1, 2), and the 8x8
    digits are kept at 8x8. Enlarging them to 32x32 gives the same last map at 2.3 times the work.
    """
    if image_size >= 32:
        return (1, 2, 2)
    return (1, 1, 2) if image_size >= 16 else (1, 1, 1)
