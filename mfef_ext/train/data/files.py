"""Image files into one tensor of bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .dataset import Source


def read_images(
    source: Source, paths: Sequence[Path], side: int, remedy: str, *, resize: bool = False
) -> Tensor:
    """(N, 3, side, side) uint8. Each image must have that size; ``resize`` cuts it to a square
    around its middle and resizes that. Every unreadable file is a problem, with ``remedy``."""
    from PIL import Image, ImageOps

    pixels = np.zeros((len(paths), side, side, 3), np.uint8)
    sizes = set()
    console = Console(stderr=True)
    shown = track(
        paths, "reading images", console=console, transient=True, disable=not console.is_terminal
    )
    for i, path in enumerate(shown):
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
            source.problem(f"{path} cannot be read as an image ({error}); {remedy}")
            continue
        except Image.DecompressionBombError as error:
            source.problem(f"{path} is too large ({error}); {remedy}")
            continue
        sizes.add(image.size)
        if resize:
            image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
        elif image.size != (side, side):
            found = "x".join(map(str, image.size))
            source.problem(f"{path} has {found} pixels, expected {side}x{side}; {remedy}")
            continue
        pixels[i] = np.asarray(image)
    if sizes:
        smallest, largest = ("x".join(map(str, f(sizes))) for f in (min, max))
        where = paths[0].parent.parent
        source.fact(f"{len(paths)} image files of {smallest} to {largest} pixels in {where}")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def pixel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (N, C, H, W) bytes, on a scale of 0 to 1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in pixels.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float((share * values).sum())
        means.append(mean)
        stds.append(float((share * (values - mean) ** 2).sum().sqrt()))
    return tuple(means), tuple(stds)
