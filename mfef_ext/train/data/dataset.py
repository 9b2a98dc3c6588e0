"""Labelled images in memory, split three ways, and what every reader of them needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import DataError
from .augmentation import Augmentation

# The splits are part of the data set, not of the experiment: every seed is scored on the same
# test images, so that runs can be compared.
SPLIT_SEED = 1797
MAX_LOOKED_AT = 10_000  # files and folders of a level, in search of a data set


@dataclass(frozen=True)
class Normalisation:
    """``(pixels / scale - mean) / std``, with one number per channel, or one for all."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) of any kind of number -> float32."""
        mean, std = (
            torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        return (pixels.float() / self.scale - mean) / std


@dataclass(frozen=True)
class Images:
    """Labelled images. pixels: (N, C, H, W) uint8 or float32, as read; y: (N,) int64."""

    pixels: Tensor
    y: Tensor
    normalisation: Normalisation

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: slice | list[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Some images, normalised, and their labels."""
        return self.normalisation(self.pixels[index]), self.y[index]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, normalised, ``size`` at a time."""
        return (self[i : i + size] for i in range(0, len(self), size))

    @property
    def x(self) -> Tensor:
        """All images at once, normalised: four times the memory where pixels are bytes."""
        return self.normalisation(self.pixels)

    def part(self, index: np.ndarray | slice) -> Images:
        """Some of the images as read."""
        return replace(self, pixels=self.pixels[index], y=self.y[index])

    def to(self, device: torch.device) -> Images:
        """The same images on ``device``."""
        return replace(self, pixels=self.pixels.to(device), y=self.y.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set split three ways, normalised all alike; ``validation`` may be empty.

    ``own_validation``: the split was made by the data set's authors. ``remarks``: what a reader of
    the files has to say to who trains on them, a sentence each.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    validation: Images
    test: Images
    augmentation: Augmentation
    own_validation: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        c, h, w = self.train.pixels.shape[1:]
        return c, h, w

    @property
    def normalisation(self) -> Normalisation:
        """What turns the pixels into what the networks see."""
        return self.train.normalisation

    def to(self, device: torch.device) -> Dataset:
        """The same data set on ``device``."""
        parts = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **parts)


@dataclass
class Source:
    """Where a reader looks, and what it says about what it finds.

    A reader calls :meth:`fact` for what is worth telling and :meth:`problem` for what is wrong: the
    first problem ends a training run, while ``mfef data verify`` (``collect``) wants them all.
    ``every``: whether it names every file that is remarked on.
    """

    folder: Path
    download: bool = False
    image_size: int = 32
    collect: bool = False
    every: bool = False
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    passed_over: dict[str, list[Path]] = field(default_factory=dict)

    def fact(self, text: str) -> None:
        """Notes what was found."""
        self.facts.append(text)

    def pass_over(self, what: str, path: Path) -> None:
        """Notes a file or folder that is no part of the data set; ``what`` it is, in the plural."""
        self.passed_over.setdefault(what, []).append(path)

    def some(self, paths: Sequence[Path]) -> str:
        """The number of files, and the names of three, or all of them, a line each."""
        if self.every:
            return "\n  ".join([str(len(paths)), *map(str, paths)])
        names = ", ".join(map(str, paths[:3]))
        return f"{len(paths)}, {names}{', ... (--all names all)' * (len(paths) > 3)}"

    def problem(self, text: str) -> None:
        """Notes what is wrong, in one sentence; raises DataError unless problems are collected."""
        if not self.collect:
            raise DataError(text)
        self.problems.append(text)


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out), each sorted; every class gives ``share`` of its images, rounded."""
    rng = np.random.default_rng(seed)
    held = [
        rng.permutation(np.flatnonzero(labels == c))[: round(share * int((labels == c).sum()))]
        for c in np.unique(labels)
    ]
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out


def draw_per_class(labels: np.ndarray, classes: int, count: int, seed: int) -> np.ndarray:
    """Sorted indices of ``count`` images of each of the ``classes``; ValueError if one has fewer.
    What a seed draws of few is part of what it draws of more."""
    rng = np.random.default_rng((SPLIT_SEED, seed))
    drawn = [rng.permutation(np.flatnonzero(labels == c))[:count] for c in range(classes)]
    fewest = min(map(len, drawn))
    if fewest < count:
        raise ValueError(f"{fewest} images are all that a class has")
    return np.sort(np.concatenate(drawn))


def is_folder(path: Path) -> bool:
    """Whether the path leads to a folder that may be looked into."""
    return os.path.isdir(path) and os.access(path, os.R_OK | os.X_OK)


def expect_level(source: Source, holds: Callable[[Path], bool], expected: str) -> None:
    """A problem if ``source.folder`` is a file, or does not hold what is ``expected``, as ``holds``
    tells, but a folder around it or in it does."""
    is_file = os.path.isfile(source.folder)
    if holds(source.folder) or not (is_file or is_folder(source.folder)):
        return
    found = next(filter(holds, _folders_near(source.folder)), None)
    if found is None and not is_file:
        return  # whoever reads it says what is missing
    names = [path.name for path in _entries(source.folder)]
    holding = ", ".join(names[:3]) + ", ..." * (len(names) > 3) or "nothing"
    source.problem(
        f"--data-dir={source.folder} {'is a file' if is_file else f'holds {holding}'}; expected is "
        f"a folder with {expected}: {'name one' if found is None else f'use --data-dir {found}'}"
    )


def _folders_near(folder: Path) -> Iterator[Path]:
    """The two folders around, then three levels of those inside, no more of each than can be looked
    at in a moment."""
    yield from folder.resolve().parents[:2]
    level = [folder]
    for _ in range(3):
        inside = chain.from_iterable(map(_entries, level))
        level = [path for path in islice(inside, MAX_LOOKED_AT) if is_folder(path)]
        yield from level


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing where one cannot look."""
    with suppress(OSError):
        return sorted(folder.iterdir())
    return []


def check_labels(
    source: Source,
    where: str,
    y: Tensor,
    classes: Sequence[str],
    per_class: int | None,
    remedy: str,
) -> None:
    """A problem for labels out of range, and for each class without its number of images: exactly
    ``per_class``, or any but none."""
    outside = y[(y < 0) | (y >= len(classes))]
    if len(outside):
        source.problem(
            f"{where} has the label {int(outside[0])}, expected 0 to {len(classes) - 1}; {remedy}"
        )
        return
    for name, count in zip(
        classes, torch.bincount(y, minlength=len(classes)).tolist(), strict=True
    ):
        if count != per_class if per_class is not None else count == 0:
            expected = "at least one" if per_class is None else per_class
            source.problem(f"{where} has {count} images of {name}, expected {expected}; {remedy}")
