"""What the methods with a frozen teacher share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..names import shown
from .method import Batch, Method


class TaughtByTeacher(Method):
    """A method whose students learn from one network that learns no more.

    Args:
        method: the method's name, for messages.
        teacher: maps the students' images to logits (N, num_classes). It is put into eval mode for
            good, and gets no gradients.
    """

    teacher: nn.Module

    def __init__(self, method: str, teacher: nn.Module | None) -> None:
        super().__init__()
        if not isinstance(teacher, nn.Module):
            raise TypeError(
                f"method={method!r} needs a trained network: teacher={shown(teacher)} is no "
                "nn.Module; from the command line, --teacher RUN/student0.safetensors"
            )
        self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TaughtByTeacher:
        super().train(mode)
        self.teacher.eval()
        return self

    def taught(self, batch: Batch) -> list[Tensor]:
        """The teacher's logits for what each student sees; computed once for images seen by all."""
        known: dict[int, Tensor] = {}
        for x, z in zip(batch.images, batch.logits, strict=True):
            if id(x) in known:
                continue
            with torch.no_grad():
                known[id(x)] = answer = self.teacher(x)
            if not isinstance(answer, Tensor) or answer.shape != z.shape:
                isa = isinstance(answer, Tensor)
                raise ValueError(
                    f"teacher gives {tuple(answer.shape) if isa else type(answer).__name__} where "
                    f"the students give {tuple(z.shape)}; it must give logits of the same classes"
                )
        return [known[id(x)] for x in batch.images]
