"""The one way in which files are written: whole or not at all, and never through a link."""

from __future__ import annotations

import errno
import io
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

BESIDE = ".writing"  # the suffix of what is not whole yet


def write_whole(path: Path, content: bytes, previous: Path | None = None) -> os.stat_result:
    """Writes beside, flushes to the disk, renames: a reader sees the old file or the new one.

    The old one becomes ``previous``, if that is given. Returns the new file's status. OSError if
    the disk is full, say; what was written beside is then gone again.
    """
    # A name of its own: another process may be writing the same file, or have been killed at it.
    beside = path.with_name(f".{secrets.token_hex(8)}{BESIDE}")
    try:
        with open(beside, "xb", opener=_opener) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            status = os.fstat(file.fileno())
        if previous is not None and os.path.lexists(path):
            os.replace(path, previous)
        os.replace(beside, path)
    except (OSError, KeyboardInterrupt):
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return status


def append(path: Path, text: str) -> None:
    """Adds a line or more at the end of a file, which is made if there is none."""
    with open(path, "a", newline="", opener=_opener) as file:
        file.write(text)


def save_figure(figure: Any, path: Path) -> None:
    """A matplotlib figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_whole(path, content.getvalue())


def remove_stale(folder: Path) -> None:
    """Removes what processes that were killed have left beside the files in ``folder``."""
    for stale in folder.glob("*" + BESIDE):
        with suppress(OSError):  # a folder of that name is nobody's of ours
            stale.unlink()


def sync_folder(path: Path) -> None:
    """A rename is on the disk only once the folder is."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not know it of folders
            raise
    finally:
        os.close(folder)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
