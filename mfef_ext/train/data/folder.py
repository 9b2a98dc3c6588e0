"""Any images in folders: ROOT/train/CLASS/*, ROOT/test/CLASS/* or a share of train, ROOT/val."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

from .. import UsageError
from .augmentation import Augmentation
from .dataset import (
    SPLIT_SEED,
    Dataset,
    Images,
    Normalisation,
    Source,
    check_labels,
    expect_level,
    is_folder,
    stratified_split,
)
from .files import (
    class_folders,
    find_images,
    is_left_behind,
    labels,
    pixel_statistics,
    read_images,
)

TEST_SHARE = 0.2  # of every class, without ROOT/test
VALIDATION = ("val", "valid", "validation")
LAYOUT = (
    "expected are folders ROOT/train/CLASS with images, ROOT/test/CLASS if there is a test set, "
    "ROOT/val/CLASS if there are validation images"
)


def read(source: Source) -> Dataset | None:
    """The images in ``source.folder``, as squares of ``source.image_size`` pixels.

    Normalised by the mean and standard deviation of the training images.
    """
    expect_level(source, _has_classes, "train/CLASS")
    if source.problems:
        return None
    splits = _splits(source)
    if splits is None:
        return None
    classes: list[str] = []
    folders: list[Path] = []
    for where in splits.values():
        here = class_folders(source, where)
        classes = classes or list(here)
        if list(here) != classes or len(classes) < 2:
            odd = sorted(set(here) ^ set(classes))
            what = (
                f"and train differ in the class {odd[0]}" if odd else "has fewer than two classes"
            )
            source.problem(f"{where} {what}; {LAYOUT}")
            return None
        folders += here.values()
    # All at once: no file is to be met in two splits.
    files = find_images(source, folders)
    found = {}
    for i, (split, where) in enumerate(splits.items()):
        by_class = files[i * len(classes) : (i + 1) * len(classes)]
        found[split] = [*chain.from_iterable(by_class)], labels(by_class)
        check_labels(source, str(where), found[split][1], classes, None, LAYOUT)
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
        parts |= {"train": (x[kept], y[kept]), "test": (x[held], y[held])}
    mean, std = pixel_statistics(parts["train"][0])
    # A channel that is the same everywhere has nothing to divide by.
    normalisation = Normalisation(mean, tuple(s or 1.0 for s in std), 255)
    images = {split: Images(*part, normalisation) for split, part in parts.items()}
    return Dataset(
        "folder",
        tuple(classes),
        images["train"],
        images.get("validation", images["train"].part(slice(0, 0))),
        images["test"],
        # The same share of the side as the 4 of 32 pixels of CIFAR's recipe.
        Augmentation(max(source.image_size // 8, 1), flip=True, border="constant"),
        own_validation="validation" in images,
    )


def _has_classes(folder: Path) -> bool:
    """Whether there are classes to train on; a folder train in a folder train is none."""
    train, splits = folder / "train", ("train", "test", *VALIDATION)
    return is_folder(train) and any(e.is_dir() and e.name not in splits for e in os.scandir(train))


def _splits(source: Source) -> dict[str, Path] | None:
    """The folder of each split that there is, training first; None after a problem."""
    if not (source.folder / "train").is_dir():
        missing = source.folder / "train" if source.folder.is_dir() else source.folder
        source.problem(f"{missing} is no folder; {LAYOUT}")
        return None
    held_out = [name for name in VALIDATION if (source.folder / name).is_dir()]
    if len(held_out) > 1:
        source.problem(
            f"{source.folder} has validation images in {' and in '.join(held_out)}; leave one of "
            "these folders"
        )
        return None
    names = {"train": "train", "validation": "".join(held_out), "test": "test"}
    for path in sorted(source.folder.iterdir()):
        if path.name not in names.values() and not is_left_behind(source, path):
            source.pass_over("files and folders beside train, val and test", path)
    splits = {split: source.folder / name for split, name in names.items() if name}
    return {split: where for split, where in splits.items() if where.is_dir()}


def _check_memory(images: int, side: int) -> None:
    """UsageError if the pixels would fill the machine."""
    needed = images * 3 * side**2 / 2**30
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if 2 * needed > there:  # they are copied once
        raise UsageError(
            f"--image-size={side} makes {images} images {needed:.1f} GiB, too much for twice in "
            f"this machine's {there:.1f} GiB of memory; use a smaller --image-size"
        )
