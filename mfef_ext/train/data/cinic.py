"""CINIC-10 (Darlow 2018): folders of PNGs as its authors ship them."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from .archive import Archive
from .cifar import CROP_AND_FLIP
from .dataset import (
    Dataset,
    Images,
    Normalisation,
    Source,
    check_labels,
    expect_level,
    is_folder,
)
from .files import class_folders, find_images, labels, pixel_statistics, read_images

ARCHIVE = Archive(
    "CINIC-10.tar.gz",
    "6ee4d0c996905fe93221de577967a372",
    "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
    "https://github.com/BayesWatch/cinic-10",
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = ("train", "valid", "test")
PER_CLASS = 9000  # in each of train, valid and test
NORMALISATION = Normalisation(
    (0.47889522, 0.47227842, 0.43047404), (0.24205776, 0.23828046, 0.25874835), 255
)
# Far more than a third of the images can differ from all, far less than other images would.
_STATISTICS_WITHIN = 0.01


def _is_here(folder: Path) -> bool:
    return any(all(is_folder(f / split) for split in SPLITS) for f in (folder, folder / "CINIC-10"))


def read(source: Source) -> Dataset | None:
    """CINIC-10 in ``source.folder``, or in a folder CINIC-10 there.

    Its own validation images are the validation split.
    """
    expect_level(source, _is_here, ", ".join(SPLITS))
    if source.problems:
        return None
    below = source.folder / "CINIC-10"
    if source.download and not any((f / "train").is_dir() for f in (source.folder, below)):
        ARCHIVE.obtain(source, below)
    folder = below if below.is_dir() else source.folder
    if source.collect or not (folder / "train").is_dir():
        ARCHIVE.check(source)
    remedy = ARCHIVE.remedy(source)
    parts = []
    for split in SPLITS:
        where = folder / split
        if not where.is_dir():
            source.problem(f"{where} is missing; {remedy}")
            continue
        extra = sorted(set(class_folders(source, where)) - set(CLASSES))
        if extra:
            source.problem(f"{where / extra[0]} is no class of CINIC-10; {remedy}")
        files = find_images(source, [where / name for name in CLASSES])
        y = labels(files)
        check_labels(source, str(where), y, CLASSES, PER_CLASS, remedy)
        x = read_images(source, [*chain.from_iterable(files)], 32, remedy)
        parts.append(Images(x, y, NORMALISATION))
    if source.problems:
        return None
    train, validation, test = parts
    found = pixel_statistics(train.pixels)
    for what, measured, published in (
        ("mean", found[0], NORMALISATION.mean),
        ("standard deviation", found[1], NORMALISATION.std),
    ):
        shown = " ".join(f"{v:.5f}" for v in measured)
        text = f"{folder / 'train'}: {what} of the pixels {shown}"
        if max(abs(a - b) for a, b in zip(measured, published, strict=True)) > _STATISTICS_WITHIN:
            source.problem(f"{text}, expected {published}: these are other images; {remedy}")
            return None
        source.fact(text)
    return Dataset("cinic10", CLASSES, train, validation, test, CROP_AND_FLIP, own_validation=True)
