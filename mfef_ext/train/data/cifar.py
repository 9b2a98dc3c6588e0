"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), through torchvision."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import library
from .archive import Archive, expect_md5
from .augmentation import Augmentation
from .dataset import (
    Dataset,
    Images,
    Normalisation,
    Source,
    check_labels,
    expect_level,
)

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
# What the papers do: a random crop of the image with 4 zeros on every side, mirrored or not.
CROP_AND_FLIP = Augmentation(shift=4, flip=True, border="constant")


@dataclass(frozen=True)
class _Kind:
    loader: str  # in torchvision.datasets; file names and hashes are its
    per_class: dict[str, int]
    normalisation: Normalisation


KINDS = {
    "cifar10": _Kind(
        "CIFAR10",
        {"train": 5000, "test": 1000},
        Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 255),
    ),
    "cifar100": _Kind(
        "CIFAR100",
        {"train": 500, "test": 100},
        Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 255),
    ),
}


def read(name: str, source: Source) -> Dataset | None:
    """``name`` ("cifar10", "cifar100") as its authors ship it for Python, unpacked."""
    kind = KINDS[name]
    loader = getattr(library("torchvision").datasets, kind.loader)
    archive = Archive(loader.filename, loader.tgz_md5, loader.url, PAGE)
    meta = (loader.meta["filename"], loader.meta["md5"])
    published = dict([*loader.train_list, *loader.test_list, meta])

    def holds(folder: Path) -> bool:
        return any(os.path.isfile(folder / loader.base_folder / file) for file in published)

    expect_level(source, holds, f"{loader.base_folder}/{meta[0]}")
    if source.problems:
        return None
    folder = source.folder / loader.base_folder
    files = {folder / file: md5 for file, md5 in published.items()}
    check = library("torchvision").datasets.utils.check_integrity
    if source.download and not all(check(path, md5) for path, md5 in files.items()):
        archive.obtain(source, source.folder)
    if source.collect or not all(path.is_file() for path in files):
        archive.check(source)
    remedy = archive.remedy(source)
    for path, md5 in files.items():
        if path.is_file():
            expect_md5(source, path, md5, remedy)
        else:
            source.problem(f"{path} is missing; {remedy}")
    if source.problems:
        return None
    parts, classes = {}, ()
    for split, per_class in kind.per_class.items():
        where = f"the {split} part of {folder}"
        try:
            loaded: Any = loader(source.folder, train=split == "train")
            classes = tuple(loaded.classes)
            x = torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous()
            y = torch.tensor(loaded.targets, dtype=torch.int64)
        except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError) as error:
            source.problem(f"{where} is not in the format of {PAGE} ({error}); {remedy}")
            return None
        if x.dtype != torch.uint8 or len(x) != len(y):
            source.problem(f"{where} holds {len(x)} images and {len(y)} labels; {remedy}")
            return None
        check_labels(source, where, y, classes, per_class, remedy)
        parts[split] = Images(x, y, kind.normalisation)
    train = parts["train"]
    return Dataset(name, classes, train, train.part(slice(0, 0)), parts["test"], CROP_AND_FLIP)
