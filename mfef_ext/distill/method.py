"""What a distillation method is, and the table of those that exist.

A method is one file: a subclass of :class:`Method` under ``@register("name")``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class StudentShape:
    """The last map of one student, seen by a probe: (N, channels, height, width)."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Batch:
    """What the students made of one batch.

    images: what each student was shown, (N, C, H, W); one and the same tensor unless the method has
    ``views``. logits: (N, num_classes) per student; -inf masks a class. maps: the last maps,
    (N, C_i, H_i, W_i). labels: class numbers (N,) int64, or class probabilities (N, num_classes) of
    a floating dtype, or None where only logits are wanted. epoch: epochs trained so far, fractions
    included.
    """

    images: Sequence[Tensor]
    logits: Sequence[Tensor]
    maps: Sequence[Tensor]
    labels: Tensor | None
    epoch: float


class Method(nn.Module):
    """What a method adds to the students: layers that only training needs, and loss terms.

    A subclass's constructor takes ``(shapes, num_classes, *, options)``, where ``shapes`` holds one
    :class:`StudentShape` per student; its keyword-only options are those a user may set.
    """

    views = False
    """Whether each student is to see the images in an augmentation of its own."""
    held_out = False
    """Whether :meth:`calibrate` is to be called after every epoch."""
    leaves_unused = False
    """Whether some losses leave some parameters out."""

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(further logits by role, weighted loss terms by name); no terms without labels."""
        raise NotImplementedError

    def calibrate(self, logits: Sequence[Tensor], labels: Tensor) -> None:
        """Looks at the students' logits (M, num_classes) for images that are not trained on."""

    def kd_weight(self, epoch: float) -> float:
        """The weight of the distillation terms after ``epoch`` epochs, for logs; 0 if none."""
        return 0.0

    def spatial_gates(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One spatial gate (N, H_i, W_i) in [0, 1] per student, or [] for methods without any."""
        return []

    def fused_features(self, maps: Sequence[Tensor]) -> Tensor | None:
        """What the fused classifier looks at, (N, width), or None for methods without one."""
        return None


METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: makes a method known as ``name``; ValueError if the name is taken."""

    def add(cls: type[Method]) -> type[Method]:
        if name in METHODS:
            raise ValueError(f"method {name!r} is already {METHODS[name].__name__}; rename one")
        METHODS[name] = cls
        return cls

    return add


def at_least_two(shapes: Sequence[StudentShape], method: str, why: str) -> None:
    """ValueError unless there are students who can learn from one another."""
    if len(shapes) < 2:
        raise ValueError(f"method={method!r} needs at least two students: {why}; got {len(shapes)}")


def wide(z: Tensor) -> Tensor:
    """In float32 at least."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Image by image, (N,), in float32 at least.

    labels: class numbers (N,), or class probabilities (N, classes), of which 0 adds nothing where
    the class is masked with -inf.
    """
    log_p = F.log_softmax(wide(logits), dim=1)
    if not labels.is_floating_point():
        # By default -100 would be no label, without a word; here it is as wrong as -1.
        return F.nll_loss(log_p, labels, reduction="none", ignore_index=-(2**31))
    return -(labels.to(log_p.dtype) * log_p.masked_fill(labels == 0, 0)).sum(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The batch mean of :func:`cross_entropies`, 0 for an empty batch."""
    return cross_entropies(logits, labels).sum() / max(len(logits), 1)


def label_losses(logits: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """``ce/student<i>``: the :func:`cross_entropy` of each student."""
    return {f"ce/student{i}": cross_entropy(z, labels) for i, z in enumerate(logits)}


def weighted(weight: float, loss: Tensor) -> Tensor:
    """``weight * loss``, of which a weight of 0 leaves nothing, not even of an infinite loss."""
    return weight * loss if weight else torch.zeros_like(loss)


def weighted_sum(weights: Tensor, logits: Tensor) -> Tensor:
    """``sum_i w_i z_i`` (N, classes) of logits (students, N, classes), with weights (students, N)
    or (students, 1).

    What a student of any weight but 0 masks with -inf is masked in the sum, and moves no weight.
    """
    masked, w = logits == -inf, weights[..., None]
    total = (w * logits.masked_fill(masked, 0)).sum(0)
    return total.masked_fill((masked & (w != 0)).any(0), -inf)
