"""``mfef eval``: a run is put together again from a checkpoint, and scored on its test images."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from ..distill.method import METHODS
from . import UsageError
from .checkpoint import CheckpointError, load
from .config import TrainConfig
from .display import scores
from .loop import accuracy
from .processes import join
from .run import Run, load_student_for, prepare


def restore(path: Path, which: str, device: str | None = None) -> Run:
    """The run in the folder ``path`` as its checkpoint ``which`` (last, previous or best) holds it,
    in eval mode, on ``device`` or where it was trained.

    Raises CheckpointError if that is not intact, UsageError if what the run was made of (a device,
    a teacher) is not here.
    """
    file = path / f"{which}.ckpt"
    state = load(file)
    if not state["metrics"]:
        raise UsageError(f"{file} is from before the end of the first epoch; train the run first")
    if state["step"]:
        raise UsageError(
            f"{file} is from the middle of epoch {state['epoch'] + 1}; end the run with --resume "
            "auto, or use --checkpoint best"
        )
    saved = state["config"] | {"resume": None, "download": False}
    if device is not None:  # which chooses its own backend
        saved |= {"device": device, "backend": None}
    options = {f.name: saved[f.name] for f in fields(TrainConfig) if f.name in saved}
    for f in fields(TrainConfig):
        if "Path" in str(f.type) and options.get(f.name) is not None:
            options[f.name] = Path(options[f.name])
    config = TrainConfig(**options)
    if config.method not in METHODS:
        raise UsageError(
            f"{path} was trained with method {config.method!r}, which is registered by a file of "
            "its own; run that file in place of mfef"
        )
    torch.set_num_threads(config.thread_count)
    run = prepare(config, join(config.device), path)
    try:
        run.distiller.load_state_dict(state["distiller"])
        if run.average is not None:
            run.average.load_state_dict(state["average"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{file} does not fit the networks that this version builds; "
            f"use mfef_ext {saved['versions']['mfef_ext']}, which wrote it"
        ) from error
    run.distiller.eval()
    run.rows, run.best_epoch = state["metrics"], state["best_epoch"]
    return run


def evaluate(
    path: Path, checkpoint: str = "last", student: Path | None = None, device: str | None = None
) -> str:
    """A table of test accuracies by role, as they are now and as they were recorded.

    ``student``: a .safetensors file that is scored instead, on the same images.
    """
    run = restore(path, checkpoint, device)
    test = run.dataset.test
    if student is None:
        what, recorded = path / f"{checkpoint}.ckpt", scores(run.rows[-1], "test")
        found = accuracy(run, test)
    else:
        network, about = load_student_for(run.dataset, student, "--student")
        what, recorded = student, {"student": about["test_accuracy"]}
        with torch.no_grad():
            answers = torch.cat([network.to(x.device)(x).argmax(1) for x in test.x.split(512)])
        found = {"student": 100 * int((answers == test.y).sum()) / len(test)}
    lines = [f"{what}: % of {len(test)} test images of {run.dataset.name} recognised"]
    lines.append(f"{'':12}{'now':>8}{'recorded':>10}")
    lines += [f"{role:12}{found[role]:8.2f}{recorded[role]:10.2f}" for role in found]
    if found != recorded:
        lines.append("Not as recorded: another device, number of threads or version computes here.")
    return "\n".join(lines)
