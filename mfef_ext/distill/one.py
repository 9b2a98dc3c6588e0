"""``one``: the students' gated ensemble teaches each of them (Lan 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional import kd_losses
from ..problem import check_number, check_temperature
from .method import (
    Batch,
    Method,
    StudentShape,
    at_least_two,
    cross_entropy,
    label_losses,
    register,
    weighted_sum,
)
from .ramp import ramp_up


@register("one")
class GatedEnsemble(Method):
    """``z_e = sum_i g_i z_i`` with gates g = softmax over the students, learned with the rest::

        L = sum_i CE(z_i) + CE(z_e) + w(t) sum_i kd(z_i <- z_e)

    Lan 2018, equations 1 to 6. Their gate sees the layers that all branches share; students
    here share none, so it sees the pooled last maps of all.

    Args:
        temperature: T of the kd terms.
        ramp_epochs: length of the ramp-up w(t), in epochs; 80 goes with the papers' 300.
    """

    def __init__(
        self,
        shapes: Sequence[StudentShape],
        num_classes: int,
        *,
        temperature: float = 3.0,
        ramp_epochs: float = 80.0,
    ) -> None:
        super().__init__()
        at_least_two(shapes, "one", "the gate chooses among them")
        width = sum(shape.channels for shape in shapes)
        self.gate = nn.Sequential(
            nn.Linear(width, len(shapes)), nn.BatchNorm1d(len(shapes)), nn.ReLU()
        )
        self.temperature = check_temperature(temperature)
        self.ramp_epochs = check_number("ramp_epochs", ramp_epochs)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        pooled = torch.cat([x.mean((2, 3)) for x in batch.maps], dim=1)
        gates = torch.softmax(self.gate(pooled), dim=1)
        gated = weighted_sum(gates.T, torch.stack(list(batch.logits)))
        if batch.labels is None:
            return {"gated": gated}, {}
        weight = self.kd_weight(batch.epoch)
        terms = label_losses(batch.logits, batch.labels)
        terms["ce/gated"] = cross_entropy(gated, batch.labels)
        targets = [gated] * len(batch.logits)
        for i, loss in enumerate(kd_losses(batch.logits, targets, self.temperature)):
            terms[f"kd/student{i}"] = weight * loss
        return {"gated": gated}, terms

    def kd_weight(self, epoch: float) -> float:
        return ramp_up(epoch, self.ramp_epochs)
