"""``ce``: the students side by side, each with its cross-entropy alone. The baseline."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .method import Batch, Method, StudentShape, label_losses, register


@register("ce")
class CrossEntropy(Method):
    """``L = sum_i CE(z_i)``: independent students, no layers of its own."""

    def __init__(self, shapes: Sequence[StudentShape], num_classes: int) -> None:
        super().__init__()

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {}, {} if batch.labels is None else label_losses(batch.logits, batch.labels)
