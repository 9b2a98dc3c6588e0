"""The order in which an epoch shows the images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .dataset import Dataset


def training_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    epoch: int,
    views: int = 1,
    *,
    first_step: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """(images, labels): every training image once, shuffled and augmented.

    A batch is a function of (seed, epoch, step, rank) alone, on any device: everything is drawn for
    the whole batch, whose ``rank``-th of ``ranks`` parts is given, so that several processes see
    together what one would. ``first_step`` leaves out the steps before it and changes no other. The
    images come in ``views`` versions, each augmented in its own way. The last batch is smaller
    where the sizes ask for it: no image is left out.
    """
    # torch's CPU generator heeds 32 bits of its seed: hash both numbers into these.
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1)
    draw = torch.Generator().manual_seed(int(mixed[0]))
    shuffled = torch.randperm(len(dataset.train), generator=draw).split(batch_size)
    for step, index in enumerate(shuffled):
        drawn = [dataset.augmentation.draw(len(index), draw) for _ in range(views)]
        if step < first_step:
            continue
        x, y = dataset.train[index.tensor_split(ranks)[rank].to(dataset.train.y.device)]
        mine = [d.tensor_split(ranks, dim=1)[rank] for d in drawn]
        yield [dataset.augmentation(x, d) for d in mine], y
