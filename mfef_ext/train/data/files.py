"""Image files: which there are below a folder, and what is in them, as one tensor of bytes."""

from __future__ import annotations

import os
import stat
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .dataset import Source

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# What file managers, network drives and archives leave behind, beside names that begin with a dot.
_LEFT_BEHIND = {"@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found"}
# Formats that Pillow knows but reads through another program, or not at all.
_NOT_READ = {"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "WMF"}
# What turns a picture upright, by the value of EXIF's Orientation.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def is_left_behind(source: Source, path: Path) -> bool:
    """Whether the name is one that no data set means; such a path is noted as passed over."""
    if not path.name.startswith(".") and path.name not in _LEFT_BEHIND:
        return False
    source.pass_over("names that begin with a dot or belong to the system", path)
    return True


def class_folders(source: Source, where: Path) -> dict[str, Path]:
    """The folders in ``where`` by the names of their classes, sorted; all else is noted as passed
    over. A name has no character that cannot be shown or written, wherever the folder comes from.
    """
    folders: dict[str, Path] = {}
    for path in sorted(where.iterdir(), key=sort_key):
        if is_left_behind(source, path):
            continue
        if not path.is_dir():
            source.pass_over("files beside the folders of classes", path)
            continue
        name = "".join(map(_shown, unicodedata.normalize("NFC", path.name)))
        if name in folders:
            source.problem(f"{path} and {folders[name]} have one name; rename one of them")
        folders[name] = path
    return dict(sorted(folders.items()))


def _shown(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # Python's sign for a byte that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    control = unicodedata.category(character) in ("Cc", "Cs")  # tabs, ends of lines
    return character.encode("unicode_escape").decode() if control else character


def labels(files: Sequence[Sequence[Path]]) -> Tensor:
    """(N,) int64: the label of each file where class by class gives its files."""
    return torch.arange(len(files)).repeat_interleave(torch.tensor([len(f) for f in files]))


def sort_key(path: Path) -> tuple[str, ...]:
    """Sorts paths alike wherever they come from: some file systems take letters apart."""
    return tuple(unicodedata.normalize("NFC", part) for part in path.parts)


def find_images(source: Source, folders: Sequence[Path]) -> list[list[Path]]:
    """The image files below each of the ``folders``, sorted by name, every real file once.

    What has an image's suffix counts, and whatever else Pillow opens; links are followed, but of
    several ways to a file one without links is taken. All else is noted as passed over.
    """
    found: list[tuple[bool, int, Path, object]] = []
    for i, folder in enumerate(folders):
        for linked, path, identity in _walk(source, folder):
            if _is_image(path):
                found.append((linked, i, path, identity))
            else:
                source.pass_over("no images that Pillow opens", path)
    found.sort(key=lambda entry: (entry[0], entry[1], sort_key(entry[2])))
    files: list[list[Path]] = [[] for _ in folders]
    seen = set()
    for _, i, path, identity in found:
        if identity in seen:
            source.pass_over("other names of files that are there already", path)
        else:
            files[i].append(path)
        seen.add(identity)
    return [sorted(paths, key=sort_key) for paths in files]


def _walk(source: Source, folder: Path) -> Iterator[tuple[bool, Path, object]]:
    """All files below ``folder``: whether a link led there, the path, and which file it is."""
    # A link to a folder around this one would show its neighbours' images here.
    around = {*folder.absolute().parents, *folder.resolve().parents}
    entered = {_identity(f, f.stat()) for f in around}
    # Links wait until all else is done: a folder in its own place comes first.
    waiting: dict[bool, list[Path]] = {False: [], True: []}
    waiting[folder.is_symlink()].append(folder)
    while any(waiting.values()):
        linked = not waiting[False]
        here = waiting[linked].pop()
        try:
            identity = _identity(here, here.stat())
            if identity in entered:
                source.pass_over("links to folders that were entered already", here)
                continue
            entered.add(identity)
            entries = list(os.scandir(here))
        except OSError as error:
            source.problem(f"{here} cannot be read ({error.strerror}); allow it, or remove it")
            continue
        for entry in entries:
            path, through_link = here / entry.name, linked or entry.is_symlink()
            if is_left_behind(source, path):
                continue
            try:
                status = entry.stat()
            except OSError:
                if _has_suffix(path):  # an image that is not there: reading it says so
                    yield through_link, path, path
                else:
                    source.pass_over("links to nothing", path)
                continue
            if stat.S_ISREG(status.st_mode):
                yield through_link, path, _identity(path, status)
            elif stat.S_ISDIR(status.st_mode):
                waiting[through_link].append(path)
            else:
                source.pass_over("neither files nor folders", path)


def _identity(path: Path, status: os.stat_result) -> object:
    # Some network drives number nothing.
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


@cache
def _formats() -> tuple[dict[str, str], tuple[str, ...]]:
    """The format by suffix, and the formats that are known by their first bytes."""
    from PIL import Image

    by_suffix = {
        suffix: name
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _NOT_READ
    }
    signed = tuple(n for n, (_, accept) in Image.OPEN.items() if accept and n not in _NOT_READ)
    return by_suffix, signed


def _open(path: Path) -> Picture:
    """The picture, with nothing decoded. A format that has no signature is tried for its own
    suffix alone: it takes other files for its own."""
    from PIL import Image

    by_suffix, signed = _formats()
    own = by_suffix.get(path.suffix.lower())
    return Image.open(path, formats=(*signed, *([own] if own else [])))


def _has_suffix(path: Path) -> bool:
    """Whether the name ends as an image's does."""
    return path.suffix.lower() in _formats()[0]


def _is_image(path: Path) -> bool:
    from PIL import UnidentifiedImageError

    if _has_suffix(path):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _open(path).close()
    except UnidentifiedImageError:
        return False
    except Exception:  # it is one, and reading it says what is wrong with it
        return True
    return True


def read_images(
    source: Source, paths: Sequence[Path], side: int, remedy: str, *, resize: bool = False
) -> Tensor:
    """(N, 3, side, side) uint8. Each image must have that size; ``resize`` cuts it to a square
    around its middle and resizes that. Every unreadable file is a problem, with ``remedy``.

    Of several frames the first is read, upright as EXIF says, over white where it is transparent;
    16 bits are scaled to 8.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    pixels = np.zeros((len(paths), side, side, 3), np.uint8)
    sizes, several = set(), []
    console = Console(stderr=True)
    shown = track(
        paths, "reading images", console=console, transient=True, disable=not console.is_terminal
    )
    with warnings.catch_warnings():
        # Pillow warns of metadata, which nobody looks at here, and of bombs.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, path in enumerate(shown):
            try:
                with _open(path) as file:
                    image = _upright(_rgb(file), file)
                    several += [path] * getattr(file, "is_animated", False)
                size = image.size
                if resize:
                    image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
            except Exception as error:  # decoders have many kinds
                said = " ".join(str(error).split()) or type(error).__name__
                if isinstance(error, UnidentifiedImageError):  # which says the path once more
                    said = "in no format that Pillow knows"
                source.problem(f"{path} cannot be read as an image ({said}); {remedy}")
                continue
            sizes.add(size)
            if image.size != (side, side):
                found = "x".join(map(str, size))
                source.problem(f"{path} has {found} pixels, expected {side}x{side}; {remedy}")
                continue
            pixels[i] = np.asarray(image)
    if sizes:
        smallest, largest = ("x".join(map(str, f(sizes))) for f in (min, max))
        where = paths[0].parent.parent
        source.fact(f"{len(paths)} image files of {smallest} to {largest} pixels in {where}")
    if several:
        source.fact(f"the first frame alone is read of images with several: {source.some(several)}")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _rgb(file: Picture) -> Picture:
    """The picture in RGB; ValueError for numbers of which nobody says what is white."""
    from PIL import Image

    file.load()
    if file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
        # Pillow leaves TIFF's 12 bits as they are, and here also those of which 0 is white.
        tags = getattr(file, "tag_v2", {})
        white = 2 ** tags.get(258, (16,))[0] - 1
        scaled = (np.asarray(file).astype(np.int64) * 255 + white // 2) // white
        if tags.get(262) == 0:
            scaled = 255 - scaled
        return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")
    if file.mode in ("I", "F"):
        kind = "floating-point numbers" if file.mode == "F" else "integers of 32 bits or signed"
        raise ValueError(f"it holds {kind}, and nobody says which are black and white")
    if not file.has_transparency_data:
        return file.convert("RGB")
    image = file.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _upright(image: Picture, file: Picture) -> Picture:
    """The picture turned as the EXIF of its file says, where that can be read."""
    from PIL.Image import Transpose

    try:  # TIFF's decoder has turned it already, and taken the tag away
        value = file.getexif().get(_ORIENTATION)
        turn = _UPRIGHT.get(value) if isinstance(value, int) else None
    except Exception:  # damaged in one of many ways: the pixels are none the worse
        turn = None
    return image.transpose(Transpose[turn]) if turn else image


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
