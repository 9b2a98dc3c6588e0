"""``ab``: first the teacher's activation boundaries, then its soft targets (Heo 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..problem import check_number
from .kd import SoftTargets
from .method import Batch, StudentShape, register, wide
from .tap import forward_with_map, probe


@register("ab")
class ActivationBoundaries(SoftTargets):
    """Phase 1, ``boundary_epochs`` long: each student's last map, through a 1x1 convolution and
    batch norm (s_i), is to lie on the same side of 0 as the teacher's, t, by a margin of 1::

        L = sum_i mean [t > 0] relu(1 - s_i)^2 + [t <= 0] relu(1 + s_i)^2

    Phase 2: as ``kd``. Heo 2019, equations 3 and 4. The teacher's map may be taken after its ReLU,
    which keeps the signs apart as well; a smaller or larger map of a student is pooled to its size.

    Args:
        teacher: the trained network.
        teacher_tap: the name of its layer whose output is its last map.
        boundary_epochs: length of phase 1, in epochs.
        temperature, alpha: of phase 2, as in ``kd``.
    """

    leaves_unused = True

    def __init__(
        self,
        shapes: Sequence[StudentShape],
        num_classes: int,
        *,
        input_shape: tuple[int, int, int],
        teacher: nn.Module | None = None,
        teacher_tap: str = "layer4",
        boundary_epochs: float = 10.0,
        temperature: float = 3.0,
        alpha: float = 0.9,
    ) -> None:
        super().__init__(shapes, num_classes, teacher=teacher, temperature=temperature, alpha=alpha)
        goal = probe(self.teacher, teacher_tap, input_shape, num_classes, "teacher")
        self.connectors = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(shape.channels, goal.channels, 1, bias=False),
                nn.BatchNorm2d(goal.channels),
            )
            for shape in shapes
        )
        self.teacher_tap = teacher_tap
        self.boundary_epochs = check_number("boundary_epochs", boundary_epochs)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if batch.labels is None:
            return {}, {}
        students = range(len(batch.logits))
        # The terms of the other phase are there as zeros, so that every epoch records the same.
        none = batch.logits[0].new_zeros(())
        if batch.epoch >= self.boundary_epochs:
            return {}, super().forward(batch)[1] | {f"ab/student{i}": none for i in students}
        terms = {f"{kind}/student{i}": none for kind in ("ce", "kd") for i in students}
        for i, (x, last_map) in enumerate(zip(batch.images, batch.maps, strict=True)):
            with torch.no_grad():
                active = forward_with_map(self.teacher, self.teacher_tap, x)[1] > 0
            height, width = active.shape[2:]
            s = wide(self.connectors[i](F.adaptive_avg_pool2d(last_map, (height, width))))
            beyond = F.relu(1 - torch.where(active, s, -s)).square()
            terms[f"ab/student{i}"] = beyond.sum() / max(beyond.numel(), 1)
        return {}, terms

    def kd_weight(self, epoch: float) -> float:
        return self.alpha if epoch >= self.boundary_epochs else 0.0
