"""The images: whole data sets in memory, fixed splits, seeded shuffling and augmentation.

A file per kind of data set; each has a reader that turns a :class:`Source` into a
:class:`Dataset`, and says what is wrong with files that are missing, damaged or something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from .. import UsageError
from . import bundled, cifar, cinic, folder
from .augmentation import Augmentation
from .batches import training_batches
from .dataset import (
    SPLIT_SEED,
    Dataset,
    Images,
    Normalisation,
    Source,
    draw_per_class,
    stratified_split,
)
from .fingerprint import SPLITS, difference, digest, fingerprint, without_images

__all__ = [
    "DATASETS",
    "WITH_FILES",
    "Augmentation",
    "Dataset",
    "Images",
    "Normalisation",
    "Source",
    "difference",
    "fingerprint",
    "load",
    "stratified_split",
    "training_batches",
    "verify",
    "without_images",
]

# Readers by name. None is returned only where problems were collected.
DATASETS: dict[str, Callable[[Source], Dataset | None]] = {
    "digits": bundled.digits,
    "cifar10": partial(cifar.read, "cifar10"),
    "cifar100": partial(cifar.read, "cifar100"),
    "cinic10": cinic.read,
    "folder": folder.read,
    "fake": partial(bundled.drawn, "fake", 16, 256),
    # The size of CIFAR's images, to time a step.
    "fake32": partial(bundled.drawn, "fake32", 32, 640),
}
WITH_FILES = ("cifar10", "cifar100", "cinic10", "folder")


def _read(name: str, source: Source) -> Dataset | None:
    try:
        return DATASETS[name](source)
    except OSError as error:
        source.problem(
            f"{error.filename or source.folder} cannot be read ({error.strerror}); "
            "check the disk and the permissions"
        )
        return None


def load(
    name: str,
    validation: float,
    data_dir: Path | None = None,
    *,
    image_size: int | None = None,
    download: bool = False,
    labels_per_class: int | None = None,
    seed: int = 0,
) -> Dataset:
    """The data set ``name`` with the share ``validation`` of its training images held out, and of
    the rest ``labels_per_class`` images of every class, drawn by ``seed``, or all.

    A data set with validation images of its own keeps these, unless ``validation`` is 0. Raises
    DataError if a file is missing or damaged, UsageError if the share leaves a class without a
    validation image or a class has too few images.
    """
    source = Source(data_dir or Path(), download, image_size or 32)
    dataset = _read(name, source)
    assert dataset is not None  # a problem would have been raised
    dataset = _hold_out(dataset, validation)
    if passed_over := sum(map(len, source.passed_over.values())):
        remark = (
            f"passed over {passed_over} files or folders that are no part of the data set; "
            f"mfef data verify --dataset {name} --data-dir {source.folder} says which and why"
        )
        dataset = replace(dataset, remarks=(*dataset.remarks, remark))
    if labels_per_class is None:
        return dataset
    try:
        y = dataset.train.y.numpy()
        drawn = draw_per_class(y, len(dataset.classes), labels_per_class, seed)
    except ValueError as error:
        raise UsageError(
            f"--labels-per-class={labels_per_class} is too many for {name}, where, the validation "
            f"images taken out, {error}; use a smaller number"
        ) from error
    return replace(dataset, train=dataset.train.part(drawn))


def _hold_out(dataset: Dataset, validation: float) -> Dataset:
    if dataset.own_validation:
        kept = len(dataset.validation) if validation else 0
        return replace(dataset, validation=dataset.validation.part(slice(0, kept)))
    if validation == 0:
        return dataset
    y = dataset.train.y.numpy()
    rest, held = stratified_split(y, validation, SPLIT_SEED)
    if len(np.unique(y[held])) < len(dataset.classes):
        raise UsageError(
            f"--validation={validation} leaves a class of {dataset.name} without a validation "
            "image; use a larger share, or 0 for none"
        )
    train = dataset.train
    return replace(dataset, train=train.part(rest), validation=train.part(held))


def verify(name: str, data_dir: Path, every: bool = False) -> tuple[list[str], list[str]]:
    """Reads the whole data set; what was found, and every problem, a sentence each. Of several
    files that are remarked on for one reason the first three are named, or ``every`` one."""
    source = Source(data_dir, collect=True, every=every)
    dataset = _read(name, source)
    for what, paths in source.passed_over.items():
        source.fact(f"passed over, {what}: {source.some(paths)}")
    if dataset is not None:
        source.fact(f"{len(dataset.classes)} classes: {', '.join(dataset.classes)}")
        for split in SPLITS:
            images: Images = getattr(dataset, split)
            if not len(images):
                continue
            counts = np.bincount(images.y.numpy(), minlength=len(dataset.classes))
            source.fact(
                f"{split}: {len(images)} images of {'x'.join(map(str, dataset.shape))}, "
                f"{counts.min()} to {counts.max()} per class, "
                f"SHA-256 of pixels and labels {digest(images)}"
            )
    return source.facts, source.problems
