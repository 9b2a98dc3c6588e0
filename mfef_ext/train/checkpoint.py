"""Files that are either whole or not there: checkpoints, and each student alone.

A checkpoint is one file: a line ``mfef-checkpoint 1 <SHA-256 of the rest>``, then what
``torch.save`` writes. torch.load and safetensors both read a file with a flipped byte without a
word, so loading checks the hash first, and never unpickles anything but tensors and plain values.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from .models import StudentSpec

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
BESIDE = ".writing"  # the suffix of what is not whole yet
_MAGIC = b"mfef-checkpoint 1 "


class CheckpointError(Exception):
    """A file is missing, damaged or something else; the message is one sentence."""


def write_whole(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Writes beside, flushes to the disk, renames: a reader sees the old file or the new one.

    The old one becomes ``previous``, if that is given. OSError if the disk is full, say; what was
    written beside is then gone again.
    """
    beside = path.with_name(path.name + BESIDE)
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    # The rename itself is on the disk only once the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Writes ``state`` (tensors, containers, numbers and strings) as one checked file; what was at
    ``path`` before becomes ``previous``, if that is given."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    content = _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload
    write_whole(path, content, previous)


def load(path: Path) -> dict[str, Any]:
    """The state that :func:`save` wrote, on the CPU; CheckpointError if the file is not intact."""
    head, _, payload = _read(path).partition(b"\n")
    if not head.startswith(_MAGIC):
        raise CheckpointError(f"{path} is no mfef checkpoint; give a .ckpt file of a run folder")
    if hashlib.sha256(payload).hexdigest().encode() != head[len(_MAGIC) :]:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 differs from the one written; "
            "use another checkpoint of the run, or train again"
        )
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception of its own
        raise CheckpointError(
            f"{path} was not written by mfef train ({type(error).__name__}); "
            "use a checkpoint of a run folder"
        ) from error


def newest(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest intact checkpoint of a run folder, its state, and what is wrong with newer ones.

    None if no run was begun there; CheckpointError if none of its checkpoints is intact.
    """
    complaints: list[str] = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if path.exists():
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


def save_student(path: Path, student: nn.Module, spec: StudentSpec, about: dict[str, Any]) -> None:
    """``path`` (.safetensors) with the student's weights and nothing else, and beside it a .json:
    how to build the network, the weights' SHA-256, and ``about``."""
    weights = {name: t.detach().cpu().contiguous() for name, t in student.state_dict().items()}
    content = save_safetensors(weights)
    write_whole(path, content)
    described = {"build": asdict(spec), "sha256": hashlib.sha256(content).hexdigest()} | about
    write_whole(path.with_suffix(".json"), (json.dumps(described, indent=2) + "\n").encode())


def load_student(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The student in ``path`` (.safetensors), in eval mode, and what its .json says about it.

    Raises CheckpointError if either file is missing or damaged, UsageError if the network is of a
    library that is not there.
    """
    path = Path(path)
    content = _read(path)
    try:
        described = json.loads(_read(path.with_suffix(".json")))
        build, expected = described["build"], described["sha256"]
        student = StudentSpec(**{**build, "strides": tuple(build["strides"])}).build()
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path.with_suffix('.json')} does not describe a student ({error}); "
            "copy it again from the run folder"
        ) from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {path.with_suffix('.json').name}; "
            "copy both again from the run folder"
        )
    try:
        student.load_state_dict(load_safetensors(content))
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{path} does not fit the network that {path.with_suffix('.json').name} describes; "
            "copy both again from the run folder"
        ) from error
    return student.eval(), described


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); give a file of a run folder"
        ) from error
