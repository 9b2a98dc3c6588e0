"""``mfef``: multi-scale feature extraction and fusion for online distillation (Zou 2022)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..modules import MFEFBlock, MultiScaleConv2d
from ..problem import check_bool
from .ffl import FeatureFusionLearning
from .method import StudentShape, register


@register("mfef")
class MFEF(FeatureFusionLearning):
    """Every student's last map goes through an MFEFBlock; their fusion teaches the students.

    With students' logits z_i and maps X_i, ``F_i = MFEFBlock_i(X_i)``, ``U = FeatureFusion(F_i)``,
    ``z_f = Linear(GAP(U))`` and ``z_e = mean_i z_i``::

        L = sum_i CE(z_i) + CE(z_f) + w(t) [sum_i kd(z_i <- z_f) + kd(z_f <- z_e)]

    Only the paper's abstract is open to us: the formula is this project's reconstruction from
    Kim 2021 (FFL), on which the paper builds.

    Args:
        shapes, num_classes: see :class:`~mfef_ext.distill.method.Method`.
        temperature: T of the kd terms.
        ramp_epochs: length of the ramp-up w(t), in epochs; 80 goes with the papers' 300.
        detach_features: keeps the fused loss from reaching the students through their maps; their
            logits carry its knowledge all the same.
        multi_scale: False makes all kernels 3x3, in as many branches and groups.
        channel_attention, spatial_attention: False leaves that gate out.
        fusion: False classifies each F_i by itself; z_f is the mean of these logits.
        backend: the blocks' backend; None to choose automatically.
    """

    def __init__(
        self,
        shapes: Sequence[StudentShape],
        num_classes: int,
        *,
        temperature: float = 3.0,
        ramp_epochs: float = 80.0,
        detach_features: bool = False,
        multi_scale: bool = True,
        channel_attention: bool = True,
        spatial_attention: bool = True,
        fusion: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            shapes,
            num_classes,
            temperature=temperature,
            ramp_epochs=ramp_epochs,
            detach_features=detach_features,
        )
        for i, shape in enumerate(shapes):
            if shape.height == shape.width == 1:
                warnings.warn(
                    f"the last map of student {i} is 1x1, where spatial attention and kernels "
                    "above 1x1 do nothing; tap an earlier layer, or use larger images or smaller "
                    "strides",
                    stacklevel=2,
                )
        check_bool("multi_scale", multi_scale)
        check_bool("channel_attention", channel_attention)
        check_bool("spatial_attention", spatial_attention)
        if not check_bool("fusion", fusion):
            self.head = SeparateHeads(shapes, num_classes)
        self.blocks = nn.ModuleList()
        for shape in shapes:
            # "auto" is 1, 4, 8, 16 wherever these divide, and serves every other width too.
            groups = MultiScaleConv2d(shape.channels, groups="auto", device="meta").groups
            scales: dict[str, Any] = {"groups": groups, "backend": backend}
            if not multi_scale:
                scales["kernel_sizes"] = (3, 3, 3, 3)
            if channel_attention and spatial_attention:
                self.blocks.append(MFEFBlock(shape.channels, **scales))
                continue
            block = nn.Sequential(MultiScaleConv2d(shape.channels, **scales))
            if channel_attention:
                block.append(ChannelAttention(shape.channels))
            if spatial_attention:
                block.append(SpatialAttention())
            self.blocks.append(block)

    def features(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = super().features(maps)
        return [block(x) for block, x in zip(self.blocks, maps, strict=True)]

    def spatial_gates(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if not all(isinstance(block, MFEFBlock) for block in self.blocks):
            return []
        blocks = cast("list[MFEFBlock]", list(self.blocks))
        return [block.gates(x)[1] for block, x in zip(blocks, maps, strict=True)]


class SeparateHeads(nn.Module):
    """A classifier per map: maps (N, C_i, H_i, W_i) -> the mean of the logits (N, num_classes)."""

    def __init__(self, shapes: Sequence[StudentShape], num_classes: int) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(nn.Linear(s.channels, num_classes) for s in shapes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        pairs = zip(self.classifiers, maps, strict=True)
        return torch.stack([classify(x.mean((2, 3))) for classify, x in pairs]).mean(0)


class ChannelAttention(nn.Module):
    """CBAM's channel gate alone (Woo 2018, equation 2): (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )

    def forward(self, y: Tensor) -> Tensor:
        flat = y.flatten(2)
        gate = torch.sigmoid(self.mlp(flat.mean(2)) + self.mlp(flat.max(2).values))
        return y * gate[:, :, None, None]


class SpatialAttention(nn.Module):
    """CBAM's spatial gate alone (Woo 2018, equation 3): (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        pooled = torch.stack([y.max(1).values, y.mean(1)], dim=1)
        return y * torch.sigmoid(self.conv(pooled))
