"""What a distillation method is, and the table of those that exist.

A method is one file: a subclass of :class:`Method` under ``@register("name")``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    ``views``. logits: (N, num_classes) per student. maps: the last maps, (N, C_i, H_i, W_i).
    labels: (N,) int64, or None where only logits are wanted. epoch: epochs trained so far,
    fractions included.
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


def check_share(alpha: float, usual: float) -> None:
    """ValueError unless ``alpha`` can be the distillation terms' share of the loss."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be from 0 to 1; {usual} is usual")


def label_losses(logits: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """``ce/student<i>``: cross-entropy of each student, in float32 at least, batch mean."""
    return {f"ce/student{i}": F.cross_entropy(z.float(), labels) for i, z in enumerate(logits)}
