"""``kdcl``: the students' logits, combined into one better teacher (Guo 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import kd_losses
from ..names import shown
from ..problem import check_number, check_temperature
from .method import (
    Batch,
    Method,
    StudentShape,
    at_least_two,
    cross_entropies,
    label_losses,
    register,
    weighted,
    weighted_sum,
    wide,
)

Variant = Literal["naive", "linear", "minlogit", "general"]


@register("kdcl")
class CollaborativeLearning(Method):
    """``L = sum_i (1 - a) CE(z_i) + a kd(z_i <- z_t)``; each student sees its own augmentation.

    Guo 2020, section 3. The teacher's logits z_t by ``variant``:

    - naive: those of the student with the lowest cross-entropy, image by image;
    - linear: ``sum_i w_i z_i`` with the weights on the simplex that minimise its cross-entropy,
      image by image;
    - minlogit: class by class the least ``z_i - z_i[label]`` of all students, which takes class
      numbers, not probabilities;
    - general: ``sum_i w_i z_i``, w from the inverse correlation of the students' errors on held-out
      images, renewed after every epoch; equal weights before the first.

    The variants are written from memory of the paper's formulas, not from its code.

    Args:
        variant: see above.
        temperature: T of the kd terms; theirs is 2.
        alpha: a, the share of the distillation terms, 0 to 1.
    """

    views = True

    def __init__(
        self,
        shapes: Sequence[StudentShape],
        num_classes: int,
        *,
        variant: Variant = "linear",
        temperature: float = 2.0,
        alpha: float = 0.5,
    ) -> None:
        super().__init__()
        at_least_two(shapes, "kdcl", "their logits are combined")
        if variant not in get_args(Variant):
            raise ValueError(f"variant={shown(variant)} is unknown; use one of {get_args(Variant)}")
        self.variant = variant
        self.temperature = check_temperature(temperature)
        self.alpha = check_number("alpha", alpha, 0, 1, "from 0 to 1; 0.5 is usual")
        self.held_out = variant == "general"
        self.weights: Tensor
        self.register_buffer("weights", torch.full((len(shapes),), 1 / len(shapes)))

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if batch.labels is None:
            return {}, {}
        target = self.target(wide(torch.stack([z.detach() for z in batch.logits])), batch.labels)
        labels = label_losses(batch.logits, batch.labels)
        terms = {name: weighted(1 - self.alpha, loss) for name, loss in labels.items()}
        targets = [target] * len(batch.logits)
        for i, loss in enumerate(kd_losses(batch.logits, targets, self.temperature)):
            terms[f"kd/student{i}"] = weighted(self.alpha, loss)
        return {}, terms

    def target(self, logits: Tensor, labels: Tensor) -> Tensor:
        """z_t (N, num_classes) out of the students' (students, N, num_classes)."""
        if self.variant == "general":
            return weighted_sum(self.weights.to(logits.device)[:, None], logits)
        if self.variant == "minlogit":
            if labels.is_floating_point():
                raise ValueError(
                    "variant='minlogit' compares with the logit of an image's one class, and "
                    f"labels are class probabilities {tuple(labels.shape)}; give class numbers, or "
                    "use another variant"
                )
            own = labels.expand(len(logits), -1)[..., None]
            return (logits - logits.gather(2, own)).amin(0)
        if self.variant == "linear":
            return weighted_sum(simplex_weights(logits, labels), logits)
        losses = torch.stack([cross_entropies(z, labels) for z in logits])
        return logits[losses.argmin(0), torch.arange(len(labels), device=logits.device)]

    def calibrate(self, logits: Sequence[Tensor], labels: Tensor) -> None:
        """The weights that minimise the squared error of the combined probabilities, if errors are
        as correlated as on these images: ``w = C^-1 1 / (1' C^-1 1)``."""
        if not labels.is_floating_point():
            labels = F.one_hot(labels, logits[0].shape[1])
        errors = torch.stack([(z.double().softmax(1) - labels.double()).flatten() for z in logits])
        odd = (~errors.isfinite()).any(1).nonzero()
        if len(odd):
            raise ValueError(
                f"student {int(odd[0])} gives logits without a softmax, NaN or infinite, for "
                "held-out images, so students cannot be weighed by their errors; lower the "
                "learning rate"
            )
        correlation = errors @ errors.T / max(len(labels), 1)
        # Students that agree to rounding make it singular; the least-norm solution shares evenly.
        solved = torch.linalg.pinv(correlation, hermitian=True).sum(1)
        if bool(solved.sum() > 0):
            self.weights.copy_(solved / solved.sum())

    def kd_weight(self, epoch: float) -> float:
        return self.alpha


def simplex_weights(
    logits: Tensor, labels: Tensor, *, sweeps: int = 4, halvings: int = 20
) -> Tensor:
    """Weights (students, N) under which ``sum_i w_i z_i`` has the least cross-entropy, image by
    image; none is negative and they add up to 1.

    The problem is convex. Pair by pair, weight moves from one student to the other until the
    derivative vanishes or one has none left; for two students one pair is all there is.
    logits: (students, N, classes); what one student masks with -inf is left out. labels: (N,) or
    (N, classes).
    """
    students, n, _ = logits.shape
    weights = logits.new_full((students, n), 1 / students)
    masked = (logits == -inf).any(0)
    logits = logits.masked_fill(masked, 0)
    if not labels.is_floating_point():
        labels = F.one_hot(labels, logits.shape[2])
    pairs = [(i, j) for i in range(students) for j in range(i + 1, students)]
    for _ in range(sweeps if len(pairs) > 1 else 1):
        for i, j in pairs:
            direction = logits[j] - logits[i]
            base = weighted_sum(weights, logits)
            low, high = -weights[j], weights[i]
            for _ in range(halvings):
                middle = (low + high) / 2
                z = (base + middle[:, None] * direction).masked_fill(masked, -inf)
                slope = ((z.softmax(1) - labels) * direction).sum(1)
                more = slope < 0
                low, high = torch.where(more, middle, low), torch.where(more, high, middle)
            moved = (low + high) / 2
            weights[i] -= moved
            weights[j] += moved
    return weights
