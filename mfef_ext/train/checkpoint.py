"""Checkpoints, and each student alone, as files that are checked when they are read.

A checkpoint is one file: a line ``mfef-checkpoint 1 <SHA-256 of the rest>``, then what
``torch.save`` writes. torch.load and safetensors both read a file with a flipped byte without a
word, so loading checks the hash first, and never unpickles anything but tensors and plain values.
A student is two files, each of which holds a hash of the other.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from ..names import shown
from . import CheckpointError as CheckpointError
from .models import StudentSpec, is_known
from .paths import fault
from .structure import check_checkpoint, check_student, check_weights
from .writing import write_whole

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
_MAGIC = b"mfef-checkpoint 1 "
_DESCRIPTION = "description_sha256"  # in a student's .safetensors: the hash of what its .json says
_LARGEST_DESCRIPTION = 2**26

# The files that this process wrote, or has read and found whole, as they were then.
_intact: dict[str, tuple[int, ...]] = {}


def save(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Writes ``state`` (tensors, containers, numbers and strings) as one checked file.

    What was at ``path`` before becomes ``previous``, if that is given, but only a file that this
    process wrote or loaded: a damaged one would take the place of one that is whole. So whenever
    the process is killed, one of the two is whole, if one was before.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    content = _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload
    status = write_whole(path, content, previous if _is_intact(path) else None)
    _intact[os.path.abspath(path)] = _identity(status)


def load(path: Path) -> dict[str, Any]:
    """The state that :func:`save` wrote, on the CPU; CheckpointError if the file is not intact, or
    is not that of a run."""
    _intact.pop(os.path.abspath(path), None)
    content, status = _read(path, begins=_MAGIC)
    head, _, payload = content.partition(b"\n")
    if hashlib.sha256(payload).hexdigest().encode() != head[len(_MAGIC) :]:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 differs from the one written; "
            "use another checkpoint of the run, or train again"
        )
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception of its own
        raise CheckpointError(
            f"{path} was not written by mfef train ({type(error).__name__}); "
            "use a checkpoint of a run folder"
        ) from error
    try:
        check_checkpoint(state)
    except ValueError as error:
        raise CheckpointError(
            f"{path} was not written by mfef train ({error}); "
            "use another checkpoint of the run, or train again"
        ) from error
    _intact[os.path.abspath(path)] = _identity(status)
    return state


Found = tuple[Path, dict[str, Any], list[str]]


def newest(folder: Path) -> Found | None:
    """The newest intact checkpoint of a run folder, its state, and what is wrong with newer ones.

    None if no run was begun there; CheckpointError if none of its checkpoints is intact.
    """
    complaints: list[str] = []
    for name in (LAST, PREVIOUS, BEST):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise CheckpointError(
                f"{folder / name} is a folder, and the next checkpoint would take its place; move "
                "it away"
            )
    for name in (LAST, PREVIOUS):
        path = folder / name
        if os.path.lexists(path):
            try:
                return path, load(path), complaints
            except CheckpointError as error:
                complaints.append(str(error))
    if complaints:
        raise CheckpointError(complaints[0])
    if (folder / "config.json").exists():  # which is written after the first checkpoint
        raise CheckpointError(
            f"{folder} holds a run without {LAST} and {PREVIOUS}, so there is nothing to go on "
            "from; put one of them back, or begin again with a new --out"
        )
    return None


def at(path: Path) -> Found:
    """The checkpoint ``path``, or the newest intact one of a run folder of that name, as
    :func:`newest`; CheckpointError if there is none."""
    if not path.is_dir():
        return path, load(path), []
    found = newest(path)
    if found is None:
        raise CheckpointError(f"{path} holds no {LAST}; name a run folder, or a .ckpt file in one")
    return found


def save_student(path: Path, student: nn.Module, spec: StudentSpec, about: dict[str, Any]) -> None:
    """``path`` (.safetensors) with the student's weights and nothing else, and beside it a .json:
    how to build the network, the weights' SHA-256, and ``about``."""
    weights = {name: t.detach().cpu().contiguous() for name, t in student.state_dict().items()}
    described = {"build": asdict(spec)} | about
    content = save_safetensors(weights, {_DESCRIPTION: _hash_of_description(described)})
    write_whole(path, content)
    described |= {"sha256": hashlib.sha256(content).hexdigest()}
    write_whole(path.with_suffix(".json"), (json.dumps(described, indent=2) + "\n").encode())


def load_student(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The student in ``path`` (.safetensors), in eval mode, and what its .json says about it.

    Raises CheckpointError if either file is missing or damaged, UsageError if the network is of a
    library that is not there. Warns where the file is of version 0.1.0, which wrote no hash of what
    the .json says.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    again = "copy both again from the run folder"
    content, _ = _read(path)
    text, _ = _read(beside, largest=_LARGEST_DESCRIPTION)
    try:
        described = json.loads(text)
        check_student(described)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{beside} does not describe a student ({error}); {again}") from error
    if hashlib.sha256(content).hexdigest() != described["sha256"]:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {beside.name}; {again}"
        )
    expected = _metadata(content).get(_DESCRIPTION)
    if expected is None:
        warnings.warn(
            f"{beside} cannot be checked, as version 0.1.0 wrote no hash of it; "
            "make a file that can be checked: mfef export RUN",
            stacklevel=2,
        )
    elif expected != _hash_of_description(described):
        raise CheckpointError(
            f"{beside} is damaged: its content is not that which {path.name} belongs to; {again}"
        )
    build = described["build"]
    if not is_known(build["model"]):
        raise CheckpointError(f"{beside} names a network that there is not; {again}")
    try:
        student = StudentSpec(**{**build, "strides": tuple(build["strides"])}).build()
        weights = load_safetensors(content)
        check_weights("it", weights)
        student.load_state_dict(weights)
    except Exception as error:  # of any library, at a size that it does not know
        raise CheckpointError(
            f"{path} does not fit the network that {beside.name} describes "
            f"({' '.join(str(error).split())[:200]}); {again}"
        ) from error
    return student.eval(), described


def _hash_of_description(described: dict[str, Any]) -> str:
    """The SHA-256 of all that a student's .json says, but the weights' own."""
    said = {name: value for name, value in described.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _metadata(safetensors: bytes) -> dict[str, Any]:
    """The texts in the head of a file of safetensors; {} if there are none."""
    size = int.from_bytes(safetensors[:8], "little")
    try:
        return dict(json.loads(safetensors[8 : 8 + size]).get("__metadata__", {}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_intact(path: Path) -> bool:
    """Whether ``path`` is still the file that this process wrote or loaded."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return _intact.get(os.path.abspath(path)) == _identity(status)


def _read(path: Path, largest: int = 2**63, begins: bytes = b"") -> tuple[bytes, os.stat_result]:
    """The content and status of a regular file of a run folder; CheckpointError for others."""
    remedy = "give a file of a run folder"
    if why := fault(path):
        raise CheckpointError(f"{shown(str(path))} cannot be read: {why}; {remedy}")
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is no regular file; {remedy}")
            if status.st_size > largest:
                raise CheckpointError(f"{path} has {status.st_size} bytes, too many; {remedy}")
            head = file.read(len(begins))
            if head != begins:
                raise CheckpointError(
                    f"{path} is no mfef checkpoint; give a .ckpt file of a run folder"
                )
            return head + file.read(), status
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except MemoryError as error:
        raise CheckpointError(
            f"{path} has {status.st_size} bytes, more than there is memory for; {remedy}"
        ) from error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for who writes into it
