"""Students that share their first layers, as the branches of ONE and OKDDip do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Once:
    """Stands in for a layer's ``forward``: where ``remembers`` is set, the same tensor as last time
    gets the same answer, so that a layer that several students share computes once per batch."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.remembers = False  # a student that is used alone computes, whatever it saw before
        self.seen: tuple[Tensor, Any] | None = None

    def __call__(self, x: Tensor) -> Any:
        if not self.remembers:
            return type(self.layer).forward(self.layer, x)
        if self.seen is None or self.seen[0] is not x:
            self.seen = (x, type(self.layer).forward(self.layer, x))
        return self.seen[1]


@contextmanager
def computing_once(layers: Sequence[Once]) -> Iterator[None]:
    """The layers remember their answers for the length of one forward pass of all students."""
    for layer in layers:
        layer.remembers = True
    try:
        yield
    finally:
        for layer in layers:  # the next batch may come in the same tensor
            layer.remembers, layer.seen = False, None


def share_stem(students: Sequence[nn.Module], taps: Sequence[str]) -> list[Once]:
    """Gives all students the first one's layers, up to the last stage before the map that is
    tapped; returns what :func:`computing_once` takes.

    The last stage is the last part with a convolution up to the tap; where a network consists of
    nothing in front of that part, such as VGG's ``features``, it is looked for inside.

    Raises ValueError unless all students are of one architecture with something to share.
    """
    names = [_stem(student, tap) for student, tap in zip(students, taps, strict=True)]
    shapes = [{k: v.shape for k, v in student.state_dict().items()} for student in students]
    if any(s != shapes[0] for s in shapes) or any(n != names[0] for n in names):
        raise ValueError(
            "share_stem=True needs students of one architecture, so that they can have the same "
            "first layers; leave it out, or make them alike"
        )
    if not names[0]:
        raise ValueError(
            f"share_stem=True finds nothing in front of the last stage of "
            f"{type(students[0]).__name__} that could be shared; leave it out"
        )
    shared = []
    for name in names[0]:
        layer = students[0].get_submodule(name)
        for student in students[1:]:
            student.set_submodule(name, layer)
        layer.forward = Once(layer)
        shared.append(layer.forward)
    return shared


def _stem(network: nn.Module, tap: str) -> list[str]:
    """The names of the layers before the last stage that leads to ``tap``, in their order."""
    prefix, parts = "", dict(network.named_children())
    while parts:
        inside = tap.removeprefix(prefix).split(".")[0]
        before = list(parts)[: list(parts).index(inside) + 1] if inside in parts else list(parts)
        wide = [n for n in before if any(p.dim() > 2 for p in parts[n].parameters())]
        if not wide:
            return []
        front = before[: before.index(wide[-1])]
        if front:
            return [prefix + name for name in front]
        prefix += wide[-1] + "."
        parts = dict(parts[wide[-1]].named_children())
    return []
