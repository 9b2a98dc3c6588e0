"""``ffl``: feature fusion learning, the method that MFEF builds on (Kim 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor, nn

from ..functional import kd_losses
from ..modules import FeatureFusion
from ..problem import check_bool, check_number, check_temperature
from .method import Batch, Method, StudentShape, cross_entropy, label_losses, register
from .ramp import ramp_up


class FusedHead(nn.Module):
    """Fuses maps into one and classifies it: maps (N, C_i, H_i, W_i) -> logits (N, num_classes)."""

    def __init__(self, shapes: Sequence[StudentShape], num_classes: int) -> None:
        super().__init__()
        width = shapes[0].channels
        self.fusion = FeatureFusion([shape.channels for shape in shapes], width)
        self.classifier = nn.Linear(width, num_classes)

    def embed(self, maps: Sequence[Tensor]) -> Tensor:
        """The fused map, pooled: (N, width)."""
        return self.fusion(maps).mean((2, 3))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.embed(maps))


@register("ffl")
class FeatureFusionLearning(Method):
    """The students' last maps are fused; the fused classifier and the students teach each other.

    With maps X_i, ``U = FeatureFusion(X_i)``, ``z_f = Linear(GAP(U))``, ``z_e = mean_i z_i``::

        L = sum_i CE(z_i) + CE(z_f) + w(t) [sum_i kd(z_i <- z_f) + kd(z_f <- z_e)]

    Kim 2021, equations 3 to 7, with the ramp-up for both directions. What z_e masks with -inf is
    masked in z_f.

    Args:
        temperature: T of the kd terms.
        ramp_epochs: length of the ramp-up w(t), in epochs; 80 goes with the papers' 300.
        detach_features: keeps the fused loss from reaching the students through their maps.
    """

    def __init__(
        self,
        shapes: Sequence[StudentShape],
        num_classes: int,
        *,
        temperature: float = 3.0,
        ramp_epochs: float = 80.0,
        detach_features: bool = False,
    ) -> None:
        super().__init__()
        self.head: nn.Module = FusedHead(shapes, num_classes)
        self.temperature = check_temperature(temperature)
        self.ramp_epochs = check_number("ramp_epochs", ramp_epochs)
        self.detach_features = check_bool("detach_features", detach_features)

    def features(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """What is fused, one map per student."""
        return [x.detach() if self.detach_features else x for x in maps]

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ensemble = torch.stack(list(batch.logits)).mean(0)
        fused = self.head(self.features(batch.maps)).masked_fill(ensemble == -inf, -inf)
        if batch.labels is None:
            return {"fused": fused}, {}
        weight = self.kd_weight(batch.epoch)
        terms = label_losses(batch.logits, batch.labels)
        terms["ce/fused"] = cross_entropy(fused, batch.labels)
        students, targets = [*batch.logits, fused], [*(fused for _ in batch.logits), ensemble]
        *of_students, of_fused = kd_losses(students, targets, self.temperature)
        for i, loss in enumerate(of_students):
            terms[f"kd/student{i}"] = weight * loss
        terms["kd/fused"] = weight * of_fused
        return {"fused": fused}, terms

    def fused_features(self, maps: Sequence[Tensor]) -> Tensor | None:
        # Without fusion (an ablation of mfef) there is nothing that all students share.
        return self.head.embed(self.features(maps)) if isinstance(self.head, FusedHead) else None

    def kd_weight(self, epoch: float) -> float:
        return ramp_up(epoch, self.ramp_epochs)
