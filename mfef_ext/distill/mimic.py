"""``mimic``: regression to the logits of a frozen teacher (Bucilua 2006, Ba & Caruana 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from torch import Tensor, nn

from ..problem import check_number
from .method import Batch, StudentShape, label_losses, register, weighted, wide
from .teacher import TaughtByTeacher


@register("mimic")
class LogitRegression(TaughtByTeacher):
    """``L = sum_i CE(z_i) + a mean (z_i - z_teacher)^2``, mean over batch and classes.

    Ba & Caruana 2014, equation 1, beside the labels' loss. Classes that both mask with -inf do not
    count.

    Args:
        teacher: the trained network.
        alpha: a, the weight of the regression.
    """

    def __init__(
        self,
        shapes: Sequence[StudentShape],
        num_classes: int,
        *,
        teacher: nn.Module | None = None,
        alpha: float = 0.9,
    ) -> None:
        super().__init__("mimic", teacher)
        self.alpha = check_number("alpha", alpha)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if batch.labels is None:
            return {}, {}
        terms = label_losses(batch.logits, batch.labels)
        for i, (z, target) in enumerate(zip(batch.logits, self.taught(batch), strict=True)):
            masked = (z == -inf) & (target == -inf)
            errors = (wide(z) - wide(target)).masked_fill(masked, 0).square()
            mean = errors.sum() / (~masked).sum().clamp(min=1)
            terms[f"mse/student{i}"] = weighted(self.alpha, mean)
        return {}, terms

    def kd_weight(self, epoch: float) -> float:
        return self.alpha
