"""Any images in folders: ROOT/train/CLASS/*, and ROOT/test/CLASS/* or a share of train."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .. import UsageError, library
from .augmentation import Augmentation
from .dataset import (
    SPLIT_SEED,
    Dataset,
    Images,
    Normalisation,
    Source,
    check_labels,
    stratified_split,
)
from .files import pixel_statistics, read_images

TEST_SHARE = 0.2  # of every class, without ROOT/test
LAYOUT = (
    "expected are folders ROOT/train/CLASS with images, and ROOT/test/CLASS if there is a test set"
)


def read(source: Source) -> Dataset | None:
    """The images in ``source.folder``, as squares of ``source.image_size`` pixels.

    Normalised by the mean and standard deviation of the training images.
    """
    torchvision = library("torchvision").datasets.folder
    splits = ["train"] + ["test"] * (source.folder / "test").is_dir()
    classes: list[str] = []
    found: dict[str, tuple[list[Path], torch.Tensor]] = {}
    for split in splits:
        where = source.folder / split
        if not where.is_dir():
            missing = where if source.folder.is_dir() else source.folder
            source.problem(f"{missing} is no folder; {LAYOUT}")
            return None
        here = sorted(p.name for p in where.iterdir() if p.is_dir())
        classes = classes or here
        if here != classes or len(classes) < 2:
            odd = sorted(set(here) ^ set(classes))
            what = (
                f"and train differ in the class {odd[0]}" if odd else "has fewer than two classes"
            )
            source.problem(f"{where} {what}; {LAYOUT}")
            return None
        index = {name: i for i, name in enumerate(classes)}
        samples = torchvision.make_dataset(
            str(where), index, torchvision.IMG_EXTENSIONS, allow_empty=True
        )
        y = torch.tensor([c for _, c in samples], dtype=torch.int64)
        check_labels(source, str(where), y, classes, None, LAYOUT)
        found[split] = [Path(p) for p, _ in samples], y
    _check_memory(sum(len(y) for _, y in found.values()), source.image_size)
    remedy = "replace or remove it"
    parts = {
        split: (read_images(source, paths, source.image_size, remedy, resize=True), y)
        for split, (paths, y) in found.items()
    }
    if source.problems:
        return None
    x, y = parts["train"]
    if "test" not in parts:
        kept, held = stratified_split(y.numpy(), TEST_SHARE, SPLIT_SEED)
        share = f"a fifth of {source.folder / 'train'}, held out as test set,"
        more = f"add images, or make a test set {source.folder / 'test'}"
        check_labels(source, share, y[held], classes, None, more)
        if source.problems:
            return None
        parts = {"train": (x[kept], y[kept]), "test": (x[held], y[held])}
    mean, std = pixel_statistics(parts["train"][0])
    # A channel that is the same everywhere has nothing to divide by.
    normalisation = Normalisation(mean, tuple(s or 1.0 for s in std), 255)
    train, test = (Images(*parts[split], normalisation) for split in ("train", "test"))
    # The same share of the side as the 4 of 32 pixels of CIFAR's recipe.
    augmentation = Augmentation(max(source.image_size // 8, 1), flip=True, border="constant")
    return Dataset("folder", tuple(classes), train, train.part(slice(0, 0)), test, augmentation)


def _check_memory(images: int, side: int) -> None:
    """UsageError if the pixels would fill the machine."""
    needed = images * 3 * side**2 / 2**30
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if 2 * needed > there:  # they are copied once
        raise UsageError(
            f"--image-size={side} makes {images} images {needed:.1f} GiB, too much for twice in "
            f"this machine's {there:.1f} GiB of memory; use a smaller --image-size"
        )
