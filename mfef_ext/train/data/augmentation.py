"""Augmentation of whole batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
