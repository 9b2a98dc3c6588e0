"""The run folder: made once, never one that already holds something, written row by row."""

from __future__ import annotations

import csv
import json
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from . import UsageError
from .checkpoint import write_whole

# All that a run leaves that is killed before its first checkpoint is whole.
BEGINNINGS = {".writable", "last.ckpt.writing"}


def create(out: Path | None, name: str) -> Path:
    """A new, writable, empty folder: ``out``, or the first free ``runs/<name>-NNN``.

    Raises UsageError if ``out`` is a file or holds anything, or if nothing can be written.
    """
    path = Path("runs") if out is None else out
    try:
        if out is None:
            for number in count(1):
                path = Path("runs") / f"{name}-{number:03d}"
                try:
                    path.mkdir(parents=True)
                    break
                except FileExistsError:
                    if not path.parent.is_dir():
                        raise
        else:
            path.mkdir(parents=True, exist_ok=True)
            if any(file.name not in BEGINNINGS for file in path.iterdir()):
                seeds = sorted(file.name[4:] for file in path.glob("seed[0-9]*"))
                again = f"; to go on with its runs: --seeds {' '.join(seeds)} --resume auto"
                raise UsageError(
                    f"--out={out} is not empty and nothing is ever overwritten; "
                    "name a new folder, or leave --out away for a numbered one under runs/"
                    + (again if seeds else "")
                )
        # A folder can exist and still refuse files: find out before hours of training.
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"--out={path} cannot be written ({error.strerror}); name a folder that can"
        ) from error
    return path


def remove_if_empty(path: Path) -> None:
    """Takes back a folder that was made for runs of which none has begun."""
    with suppress(OSError):
        path.rmdir()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, indented, that is whole or not there."""
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A .jsonl or .csv file of exactly these rows, in place of whatever it held."""
    path.unlink(missing_ok=True)
    for row in rows:
        append_row(path, row)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """One more line of a .jsonl or .csv file; the first row of a CSV brings its header."""
    with open(path, "a", newline="") as file:
        if path.suffix == ".jsonl":
            file.write(json.dumps(row) + "\n")
        else:
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
