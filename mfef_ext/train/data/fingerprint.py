"""What a run says about its data set, so that it is never taken for another one."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch

from .augmentation import Augmentation
from .dataset import Dataset, Images, Normalisation

SPLITS = {"train": "training", "validation": "validation", "test": "test"}
# Where images are decoded by other libraries, statistics differ by less, and those of other images
# by more.
_SAME_NUMBER = 1e-4


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """What ``dataset`` is, in JSON's types, independent of machine and path.

    ``dataset``: its name. ``classes``, ``input_shape`` (C, H, W); ``mean``, ``std`` and ``scale``
    of the normalisation. ``images`` and ``sha256``: by split, their number, and the hash of pixels
    and labels in their order. Hashing takes about a second per GB of pixels.
    """
    splits: dict[str, Images] = {name: getattr(dataset, name) for name in SPLITS}
    normalisation = dataset.normalisation
    return {
        "dataset": dataset.name,
        "classes": list(dataset.classes),
        "input_shape": list(dataset.shape),
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
        "scale": normalisation.scale,
        "images": {name: len(images) for name, images in splits.items()},
        "sha256": {name: digest(images) for name, images in splits.items()},
    }


def without_images(fingerprint: dict[str, Any]) -> Dataset:
    """The data set of a fingerprint, with its classes, shape and normalisation and no image."""
    numbers = tuple(fingerprint["mean"]), tuple(fingerprint["std"])
    images = Images(
        torch.empty(0, *fingerprint["input_shape"]),
        torch.empty(0, dtype=torch.int64),
        Normalisation(*numbers, fingerprint["scale"]),
    )
    classes = tuple(fingerprint["classes"])
    return Dataset(fingerprint["dataset"], classes, images, images, images, Augmentation(0))


def digest(images: Images) -> str:
    """The SHA-256 of pixels and labels."""
    whole = hashlib.sha256(images.pixels.cpu().contiguous().numpy().data)
    whole.update(images.y.cpu().numpy().data)
    return whole.hexdigest()


def difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """What is different ``here`` from the fingerprint ``there``, the first in a few words, such as
    "class 0 is dog here and cat there"; None if nothing is.

    What one of them does not say is not compared: a student's file says nothing about images.
    """

    def both(name: str) -> bool:
        return name in there and name in here

    if both("dataset") and there["dataset"] != here["dataset"]:
        return f"the data set is {here['dataset']} here and {there['dataset']} there"
    if both("classes") and list(there["classes"]) != list(here["classes"]):
        return _other_classes(list(there["classes"]), list(here["classes"]))
    if both("input_shape") and list(there["input_shape"]) != list(here["input_shape"]):
        return f"images are {_by(here['input_shape'])} here and {_by(there['input_shape'])} there"
    for name, word in SPLITS.items():
        if both("images") and there["images"][name] != here["images"][name]:
            count = here["images"][name], there["images"][name]
            return f"there are {count[0]} {word} images here and {count[1]} there"
    for name, word in SPLITS.items():
        if both("sha256") and there["sha256"][name] != here["sha256"][name]:
            return f"the {word} images, their labels or their order are others here than there"
    for name in ("scale", "mean", "std"):
        if both(name) and not _same_numbers(there[name], here[name]):
            return (
                f"images are normalised with {name}={_rounded(here[name])} here and "
                f"{_rounded(there[name])} there"
            )
    return None


def _other_classes(there: list[str], here: list[str]) -> str:
    added, gone = (sorted(set(a) - set(b)) for a, b in ((here, there), (there, here)))
    if sorted(there) == sorted(here):
        i = next(i for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
        return f"classes are in another order: number {i} is {here[i]} here and {there[i]} there"
    only = [f"{_some(names)} only {where}" for names, where in ((added, "here"), (gone, "there"))]
    said = [text for text, names in zip(only, (added, gone), strict=True) if names]
    return f"classes differ: {' and '.join(said)}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more + (" is" if len(names) == 1 else " are")


def _by(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _numbers(value: Any) -> list[float]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _same_numbers(there: Any, here: Any) -> bool:
    a, b = _numbers(there), _numbers(here)
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=_SAME_NUMBER, abs_tol=_SAME_NUMBER)
        for x, y in zip(a, b, strict=True)
    )


def _rounded(value: Any) -> str:
    return " ".join(f"{v:.6g}" for v in _numbers(value))
