"""Data sets that need no files: scikit-learn's digits, and drawn images for trials and timings."""

from __future__ import annotations

import numpy as np
import torch

from .augmentation import Augmentation
from .dataset import SPLIT_SEED, Dataset, Images, Normalisation, Source, stratified_split


def digits(source: Source) -> Dataset:
    """1,797 handwritten digits, 8x8 grey, values 0 to 16 (UCI, bundled with scikit-learn).

    Every fifth image of a class is test. Nothing is mirrored: a mirrored digit is another one.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = bunch.images.astype(np.float32)[:, None], bunch.target.astype(np.int64)
    train, test = stratified_split(y, 0.2, SPLIT_SEED)
    classes = tuple(str(c) for c in range(10))
    return _normalised("digits", classes, x[train], y[train], x[test], y[test])


def drawn(name: str, side: int, train: int, source: Source) -> Dataset:
    """``train`` + 128 drawn colour images: one fixed pattern per class under noise."""
    rng = np.random.default_rng(SPLIT_SEED)
    y = np.arange(train + 128, dtype=np.int64) % 10
    patterns = rng.standard_normal((10, 3, side, side))
    x = (patterns[y] + rng.standard_normal((len(y), 3, side, side))).astype(np.float32)
    classes = tuple(f"class {c}" for c in range(10))
    return _normalised(name, classes, x[:train], y[:train], x[train:], y[train:])


def _normalised(
    name: str,
    classes: tuple[str, ...],
    x: np.ndarray,
    y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
) -> Dataset:
    normalisation = Normalisation((float(x.mean()),), (float(x.std()),))
    train, test = (
        Images(torch.from_numpy(pixels), torch.from_numpy(labels), normalisation)
        for pixels, labels in ((x, y), (test_x, test_y))
    )
    return Dataset(name, classes, train, train.part(slice(0, 0)), test, Augmentation(shift=1))
