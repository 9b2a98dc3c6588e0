"""The one check of every path that is given: whether anything can have it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ..names import shown
from . import UsageError

DEEPEST = 256  # folders inside one another: pathlib makes them by recursion


def fault(path: str | Path) -> str:
    """Why nothing can have this path, in a few words; "" if something can."""
    try:
        os.lstat(path)
    except ValueError:  # NUL, or half a character
        return "it holds a character that no path can"
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return "a name in it, or all of it, is longer than the system takes"
    if len(Path(path).parts) > DEEPEST:
        return f"it has more than {DEEPEST} folders inside one another"
    return ""


def check_path(option: str, path: str | Path) -> None:
    """UsageError if nothing can have the path that ``option`` gives."""
    if why := fault(path):
        text = shown(str(path))[1:-1]
        raise UsageError(f"{option}={text} is no path of a file or folder: {why}; name another")
