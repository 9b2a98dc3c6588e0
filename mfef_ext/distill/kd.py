"""``kd``: soft targets of a frozen teacher, classical distillation (Hinton 2015)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..functional import kd_losses
from ..problem import check_number, check_temperature
from .method import Batch, StudentShape, label_losses, register, weighted
from .teacher import TaughtByTeacher


@register("kd")
class SoftTargets(TaughtByTeacher):
    """``L = sum_i (1 - a) CE(z_i) + a kd(z_i <- z_teacher)`` (Hinton 2015, section 2).

    Args:
        teacher: the trained network.
        temperature: T of the kd terms.
        alpha: a, the share of the soft targets, 0 to 1.
    """

    def __init__(
        self,
        shapes: Sequence[StudentShape],
        num_classes: int,
        *,
        teacher: nn.Module | None = None,
        temperature: float = 3.0,
        alpha: float = 0.9,
    ) -> None:
        super().__init__("kd", teacher)
        self.temperature = check_temperature(temperature)
        self.alpha = check_number("alpha", alpha, 0, 1, "from 0 to 1; 0.9 is usual")

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if batch.labels is None:
            return {}, {}
        labels = label_losses(batch.logits, batch.labels)
        terms = {name: weighted(1 - self.alpha, loss) for name, loss in labels.items()}
        for i, loss in enumerate(kd_losses(batch.logits, self.taught(batch), self.temperature)):
            terms[f"kd/student{i}"] = weighted(self.alpha, loss)
        return {}, terms

    def kd_weight(self, epoch: float) -> float:
        return self.alpha
