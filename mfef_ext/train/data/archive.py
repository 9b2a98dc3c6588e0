"""Archives that data sets are published as: fetched only when asked, checked before unpacking."""

from __future__ import annotations

from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from .. import library
from .dataset import Source


@dataclass(frozen=True)
class Archive:
    """A published file; ``page`` is where its authors describe it."""

    name: str
    md5: str
    url: str
    page: str

    def remedy(self, source: Source) -> str:
        """What to do about files that are missing or damaged."""
        path = source.folder / self.name
        if path.is_file():
            return f"unpack {path}, or let --download do it (official page: {self.page})"
        return f"get {self.url} (official page: {self.page}), or use --download"

    def obtain(self, source: Source, into: Path) -> None:
        """Downloads the archive with a progress bar unless it is there, checks and unpacks it."""
        utils = library("torchvision").datasets.utils
        path = source.folder / self.name
        try:
            utils.download_url(self.url, source.folder, self.name, self.md5)
            utils.extract_archive(path, into)
        except (OSError, RuntimeError, HTTPException, EOFError) as error:
            source.problem(
                f"{path} could not be had from {self.url} with MD5 {self.md5} ({error}); "
                f"see {self.page}"
            )

    def check(self, source: Source) -> None:
        """A fact if the archive is there and whole, a problem if it is not whole."""
        path = source.folder / self.name
        if not path.is_file():
            return
        expect_md5(source, path, self.md5, f"delete it and get it again: {self.url} ({self.page})")


def expect_md5(source: Source, path: Path, md5: str, remedy: str) -> None:
    """A fact if the file has this MD5, else a problem."""
    found, size = library("torchvision").datasets.utils.calculate_md5(path), path.stat().st_size
    if found == md5:
        source.fact(f"{path}: {size} bytes, MD5 {md5} as published")
    else:
        source.problem(
            f"{path} ({size} bytes) is damaged or cut short: its MD5 is {found}, "
            f"expected {md5}; {remedy}"
        )
