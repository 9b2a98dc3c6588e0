"""``dml``: deep mutual learning, every student from every other (Zhang 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional import kd_losses
from ..problem import check_temperature
from .method import Batch, Method, StudentShape, at_least_two, label_losses, register


@register("dml")
class MutualLearning(Method):
    """``L = sum_i CE(z_i) + 1 / (m - 1) sum_{i != j} kd(z_i <- z_j)`` for m students.

    Zhang 2018, equation 7, with all students updated in one step. Their T is 1.
    """

    def __init__(
        self, shapes: Sequence[StudentShape], num_classes: int, *, temperature: float = 1.0
    ) -> None:
        super().__init__()
        at_least_two(shapes, "dml", "they teach one another")
        self.temperature = check_temperature(temperature)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if batch.labels is None:
            return {}, {}
        terms = label_losses(batch.logits, batch.labels)
        peers = len(batch.logits) - 1
        pairs = [(i, j) for i in range(peers + 1) for j in range(peers + 1) if i != j]
        students, targets = ([batch.logits[pair[side]] for pair in pairs] for side in (0, 1))
        lessons = kd_losses(students, targets, self.temperature)
        for i in range(peers + 1):
            of_student = lessons[i * peers : (i + 1) * peers]
            terms[f"kd/student{i}"] = torch.stack(of_student).mean()
        return {}, terms
