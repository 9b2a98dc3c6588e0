"""The run folder: made once, never one that already holds something, held by one process."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO, StringIO
from itertools import count
from pathlib import Path
from typing import Any

from . import UsageError
from .writing import BESIDE, append, remove_stale, write_whole

LOCK = ".mfef-lock"
# What flock says where a file system does not know it.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Place:
    """Where a run is to be: a folder that no other process can train into while this one does.

    ``out`` is the folder, or None for the first free ``runs/<name>-NNN``. The system gives the lock
    back when the process ends, whatever ends it. ``warning`` says so where there are no locks.
    """

    def __init__(self, out: Path | None, name: str) -> None:
        self.path = Path("runs") if out is None else out
        self.warning: str | None = None
        self._numbered = name if out is None else None
        self._lock: FileIO | None = None

    def hold(self) -> None:
        """Locks the folder, if it is there; UsageError if another process has it."""
        try:
            if self._numbered is None and self.path.is_dir():
                self._hold()
        except OSError as error:
            raise self._not_writable(error) from error

    def check_held(self) -> None:
        """UsageError unless the folder was there, and was locked, at the time of :meth:`hold`."""
        if self._lock is None:
            raise UsageError(
                f"--out={self.path} was made by another process while this one started; wait for "
                "that one, or name another folder"
            )

    def create(self) -> Path:
        """Makes the folder and locks it, or takes one that is empty.

        Raises UsageError if there is a file or the folder holds anything, if nothing can be
        written, or if another process has it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._numbered is not None:
                self.path, self._numbered = _first_free(self.path, self._numbered), None
            # A folder of somebody else's is left as it is, without as much as a lock.
            if self._is_empty() or (self.path / LOCK).exists():
                self._hold()
            if not self._is_empty():
                raise UsageError(self._not_empty())
            remove_stale(self.path)
        except OSError as error:
            raise self._not_writable(error) from error
        return self.path

    def release(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            with suppress(OSError):
                os.unlink(self.path / LOCK)
            self._lock.close()
            self._lock = None

    def _is_empty(self) -> bool:
        """Whether there is nothing but what a run leaves that is killed before its first checkpoint
        is whole."""
        names = (file.name for file in self.path.iterdir())
        return all(name == LOCK or name.endswith(BESIDE) for name in names)

    def _hold(self) -> None:
        while self._lock is None:
            lock = open(self.path / LOCK, "r+b", buffering=0, opener=_open_lock)  # noqa: SIM115
            try:
                if self._lock_it(lock):
                    self._lock = lock
            finally:
                if self._lock is None:
                    lock.close()

    def _lock_it(self, lock: FileIO) -> bool:
        """Locks the open file, and whether it is still the one in the folder: who had it may have
        removed it between its being opened and locked here."""
        if not stat.S_ISREG(os.fstat(lock.fileno()).st_mode):
            raise OSError(errno.EINVAL, f"{LOCK} in it is no regular file")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = lock.read(200).decode(errors="replace")
            raise UsageError(
                f"--out={self.path} is in use by "
                f"{who if who.isprintable() and who else 'another process'}; wait until that has "
                "ended, or name another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.warning = (
                f"{self.path} cannot be locked ({error.strerror}): see to it that no second "
                "process trains into it"
            )
        try:
            same = os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path / LOCK))
        except FileNotFoundError:
            same = False
        if same:
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            lock.truncate()
            lock.write(f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        return same

    def _not_writable(self, error: OSError) -> UsageError:
        return UsageError(
            f"--out={self.path} cannot be written ({error.strerror}); name a folder that can"
        )

    def _not_empty(self) -> str:
        seeds = sorted(file.name[4:] for file in self.path.glob("seed[0-9]*"))
        again = f"; to go on with its runs: --seeds {' '.join(seeds)} --resume auto"
        return (
            f"--out={self.path} is not empty and nothing is ever overwritten; "
            "name a new folder, or leave --out away for a numbered one under runs/"
            + (again if seeds else "")
        )


@contextmanager
def place(out: Path | None, name: str) -> Iterator[Place]:
    """A :class:`Place` whose lock is given back at the end."""
    found = Place(out, name)
    try:
        yield found
    finally:
        found.release()


def _open_lock(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _first_free(runs: Path, name: str) -> Path:
    for number in count(1):
        path = runs / f"{name}-{number:03d}"
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("counting has an end")


def remove_if_empty(path: Path) -> None:
    """Takes back a folder that was made for runs of which none has begun."""
    with suppress(OSError):
        path.rmdir()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, indented, that is whole or not there."""
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A .jsonl or .csv file of exactly these rows, in place of whatever it held."""
    text = "".join(_line(path, row, first=i == 0) for i, row in enumerate(rows))
    write_whole(path, text.encode())


def append_row(path: Path, row: dict[str, Any]) -> None:
    """One more line of a .jsonl or .csv file; the first row of a CSV brings its header."""
    append(path, _line(path, row, first=not path.exists() or path.stat().st_size == 0))


def _line(path: Path, row: dict[str, Any], first: bool) -> str:
    if path.suffix == ".jsonl":
        return json.dumps(row) + "\n"
    text = StringIO()
    writer = csv.DictWriter(text, fieldnames=list(row), lineterminator="\n")
    if first:
        writer.writeheader()
    writer.writerow(row)
    return text.getvalue()
