"""The trainer: configuration, data, students, loop, checkpoints and reports, a file each.

Importing this package costs nothing and needs no extras; ``python -m mfef_ext.train`` and
``mfef train`` start it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# What the trainer imports beyond torch and numpy, by the name it is imported under.
_NEEDED = ("matplotlib", "rich", "safetensors", "sklearn", "tyro", "yaml")
# What only some runs import: pictures in files, networks of torchvision, --tensorboard.
_OPTIONAL = ("PIL", "torchvision", "tensorboard")


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one sentence that says what can."""


class DataError(Exception):
    """Data is missing or damaged; the message is one sentence: which file, what was expected and
    where to get it."""


class CheckpointError(Exception):
    """A file is missing, damaged or something else; the message is one sentence."""


class StoppedError(Exception):
    """Training ended early; the message says when and why, ``folder`` holds the last checkpoint."""

    folder: Path | None = None


class NotFiniteError(StoppedError):
    """A loss or a weight became NaN or infinite."""


class InterruptedByUser(StoppedError):
    """SIGINT (Ctrl-C) or SIGTERM, heeded at the end of a step."""


def missing_extras(optional: bool = False) -> list[str]:
    """The packages of the ``train`` extra that cannot be found: those that every run needs, and
    with ``optional`` also those that some runs need."""
    names = (*_NEEDED, *_OPTIONAL) if optional else _NEEDED
    return [name for name in names if find_spec(name) is None]


def library(name: str) -> Any:
    """The optional package ``name``; UsageError with the remedy if it cannot be imported."""
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        raise UsageError(f"{name} cannot be imported ({error}); run: pip install {name}") from error
