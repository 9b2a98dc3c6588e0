"""The images: whole data sets in memory, fixed splits, seeded shuffling and augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import UsageError

# The splits are part of the data set, not of the experiment: every seed is scored on the same
# test images, so that runs can be compared.
_SPLIT_SEED = 1797


@dataclass(frozen=True)
class Images:
    """Labelled images. x: (N, C, H, W) float32, normalised; y: (N,) int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> Images:
        """The same images on ``device``."""
        return Images(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set split three ways. Pixel values were (value - mean) / std with these constants;
    ``shift`` is the most pixels by which augmentation moves a training image either way."""

    name: str
    classes: tuple[str, ...]
    train: Images
    validation: Images
    test: Images
    mean: float
    std: float
    shift: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        c, h, w = self.train.x.shape[1:]
        return c, h, w

    def to(self, device: torch.device) -> Dataset:
        """The same data set on ``device``."""
        parts = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **parts)


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out), each sorted; every class gives ``share`` of its images, rounded."""
    rng = np.random.default_rng(seed)
    held = [
        rng.permutation(np.flatnonzero(labels == c))[: round(share * int((labels == c).sum()))]
        for c in np.unique(labels)
    ]
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out


def _digits() -> Dataset:
    """1,797 handwritten digits, 8x8 grey, values 0 to 16 (UCI, bundled with scikit-learn).

    Every fifth image of a class is test. Nothing is mirrored: a mirrored digit is another one.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = bunch.images.astype(np.float32)[:, None], bunch.target.astype(np.int64)
    train, test = stratified_split(y, 0.2, _SPLIT_SEED)
    classes = tuple(str(c) for c in range(10))
    return _normalised("digits", classes, x[train], y[train], x[test], y[test], shift=1)


def _drawn(name: str, side: int, train: int) -> Dataset:
    """``train`` + 128 drawn colour images: one fixed pattern per class under noise."""
    rng = np.random.default_rng(_SPLIT_SEED)
    y = np.arange(train + 128, dtype=np.int64) % 10
    patterns = rng.standard_normal((10, 3, side, side))
    x = (patterns[y] + rng.standard_normal((len(y), 3, side, side))).astype(np.float32)
    classes = tuple(f"class {c}" for c in range(10))
    return _normalised(name, classes, x[:train], y[:train], x[train:], y[train:], shift=1)


def _normalised(
    name: str,
    classes: tuple[str, ...],
    x: np.ndarray,
    y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    shift: int,
) -> Dataset:
    mean, std = float(x.mean()), float(x.std())
    train = Images(torch.from_numpy((x - mean) / std), torch.from_numpy(y))
    test = Images(torch.from_numpy((test_x - mean) / std), torch.from_numpy(test_y))
    nothing = Images(train.x[:0], train.y[:0])
    return Dataset(name, classes, train, nothing, test, mean, std, shift)


DATASETS: dict[str, Callable[[], Dataset]] = {
    "digits": _digits,
    "fake": lambda: _drawn("fake", 16, 256),
    # The size of CIFAR's images, to time a step.
    "fake32": lambda: _drawn("fake32", 32, 640),
}


def load(name: str, validation: float) -> Dataset:
    """The data set ``name`` with the share ``validation`` of its training images held out.

    Raises UsageError if that leaves a class without a validation image.
    """
    dataset = DATASETS[name]()
    if validation == 0:
        return dataset
    y = dataset.train.y.numpy()
    kept, held = stratified_split(y, validation, _SPLIT_SEED)
    if len(np.unique(y[held])) < len(dataset.classes):
        raise UsageError(
            f"--validation={validation} leaves a class of {name} without a validation image; "
            "use a larger share, or 0 for none"
        )
    x, labels = dataset.train.x, dataset.train.y
    return replace(
        dataset, train=Images(x[kept], labels[kept]), validation=Images(x[held], labels[held])
    )


def training_batches(
    dataset: Dataset, batch_size: int, seed: int, epoch: int, views: int = 1
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """(images, labels): every training image once, shuffled, as a function of (seed, epoch) alone.

    The images come in ``views`` versions, each shifted in its own way. The last batch is smaller
    where the sizes ask for it: no image is left out.
    """
    # torch's CPU generator heeds 32 bits of its seed: hash both numbers into these.
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1)
    draw = torch.Generator().manual_seed(int(mixed[0]))
    for index in torch.randperm(len(dataset.train), generator=draw).split(batch_size):
        x = dataset.train.x[index.to(dataset.train.x.device)]
        yield (
            [shifted(x, dataset.shift, draw) for _ in range(views)],
            dataset.train.y[index.to(dataset.train.y.device)],
        )


def shifted(x: Tensor, most: int, draw: torch.Generator) -> Tensor:
    """Each image moved by up to ``most`` whole pixels each way; the border value fills the gap.

    x: (N, C, H, W), any device. ``draw`` is a CPU generator.
    """
    n, _, h, w = x.shape
    dy, dx = torch.randint(0, 2 * most + 1, (2, n), generator=draw).to(x.device)
    padded = F.pad(x, (most,) * 4, mode="replicate")
    rows = (dy[:, None] + torch.arange(h, device=x.device))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(w, device=x.device))[:, None, None, :]
    images = torch.arange(n, device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return padded[images, channels, rows, columns]
