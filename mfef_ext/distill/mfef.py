"""``mfef``: multi-scale feature extraction and fusion for online distillation (Zou 2022)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import kd_losses
from ..modules import FeatureFusion, MFEFBlock
from .method import Method, StudentShape, label_losses, register
from .ramp import ramp_up


@register("mfef")
class MFEF(Method):
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
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            if shape.height == shape.width == 1:
                warnings.warn(
                    f"the last map of student {i} is 1x1, where spatial attention and kernels "
                    "above 1x1 do nothing; tap an earlier layer or use smaller strides",
                    stacklevel=2,
                )
        # "auto" is 1, 4, 8, 16 wherever these divide, and serves every other width too.
        self.blocks = nn.ModuleList(
            MFEFBlock(shape.channels, groups="auto", backend=backend) for shape in shapes
        )
        width = shapes[0].channels
        self.fusion = FeatureFusion([shape.channels for shape in shapes], width)
        self.classifier = nn.Linear(width, num_classes)
        self.temperature = temperature
        self.ramp_epochs = ramp_epochs
        self.detach_features = detach_features

    def forward(
        self,
        logits: Sequence[Tensor],
        maps: Sequence[Tensor],
        labels: Tensor | None,
        epoch: float,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.detach_features:
            maps = [x.detach() for x in maps]
        features = [block(x) for block, x in zip(self.blocks, maps, strict=True)]
        fused = self.classifier(self.fusion(features).mean((2, 3)))
        if labels is None:
            return {"fused": fused}, {}
        ensemble = torch.stack(list(logits)).mean(0)
        weight = self.kd_weight(epoch)
        terms = label_losses(logits, labels)
        terms["ce/fused"] = F.cross_entropy(fused.float(), labels)
        students, targets = [*logits, fused], [*(fused for _ in logits), ensemble]
        *of_students, of_fused = kd_losses(students, targets, self.temperature)
        for i, loss in enumerate(of_students):
            terms[f"kd/student{i}"] = weight * loss
        terms["kd/fused"] = weight * of_fused
        return {"fused": fused}, terms

    def kd_weight(self, epoch: float) -> float:
        return ramp_up(epoch, self.ramp_epochs)

    def spatial_gates(self, maps: Sequence[Tensor]) -> list[Tensor]:
        blocks = cast("list[MFEFBlock]", list(self.blocks))
        return [block.gates(x)[1] for block, x in zip(blocks, maps, strict=True)]
