"""Augmentation of whole batches, and the order in which an epoch shows the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .dataset import Dataset


@dataclass(frozen=True)
class Augmentation:
    """Each image moves by up to ``shift`` whole pixels each way, and with ``flip`` half of them are
    mirrored. ``border`` fills the gap: "replicate", or "constant" for zeros, which is a random crop
    of a padded image; images are normalised before, so zero is the data set's mean."""

    shift: int
    flip: bool = False
    border: str = "replicate"

    def draw(self, n: int, draw: torch.Generator) -> Tensor:
        """Moves (down, right) and mirrorings of n images, (3, n) int64, from a CPU generator."""
        moves = torch.randint(0, 2 * self.shift + 1, (2, n), generator=draw)
        mirrored = (
            torch.randint(0, 2, (1, n), generator=draw) if self.flip else moves.new_zeros(1, n)
        )
        return torch.cat([moves, mirrored])

    def __call__(self, x: Tensor, drawn: Tensor) -> Tensor:
        """x: (N, C, H, W), normalised, any device; drawn: what :meth:`draw` gave for N images."""
        n, c, h, w = x.shape
        dy, dx, mirrored = drawn.to(x.device)
        padded = F.pad(x, (self.shift,) * 4, mode=self.border)
        across = torch.arange(w, device=x.device).expand(n, w)
        across = torch.where(mirrored[:, None].bool(), across.flip(1), across)
        rows = (dy[:, None] + torch.arange(h, device=x.device))[:, None, :, None]
        columns = (dx[:, None] + across)[:, None, None, :]
        images = torch.arange(n, device=x.device)[:, None, None, None]
        channels = torch.arange(c, device=x.device)[None, :, None, None]
        return padded[images, channels, rows, columns]


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
