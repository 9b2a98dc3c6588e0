"""``mfef eval``: a run is put together again from a checkpoint, and scored on its test images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..distill.method import METHODS
from . import UsageError, data
from .checkpoint import CheckpointError, load, load_student
from .display import scores
from .loop import accuracy
from .models import StudentSpec
from .presets import saved
from .processes import join
from .run import Run, build, changes, compare_data, load_data, load_student_for


def restore(path: Path, which: str, device: str | None = None, data_dir: Path | None = None) -> Run:
    """The run in the folder ``path`` as its checkpoint ``which`` (last, previous or best) holds it,
    in eval mode, on ``device`` or where it was trained, with its data from ``data_dir`` or where
    they were.

    Raises CheckpointError if the checkpoint is not intact, DataError if the data are missing or
    others than it was trained on, UsageError if what else the run was made of is not here.
    """
    run, known = rebuild(path, which, device, data_dir)
    add_data(run, known, path / f"{which}.ckpt")
    return run


def rebuild(
    path: Path, which: str, device: str | None, data_dir: Path | None
) -> tuple[Run, dict[str, Any] | None]:
    """As :func:`restore`, but with no images, and the fingerprint of those that the run was trained
    on, as far as the checkpoint has one."""
    file = path / f"{which}.ckpt"
    state = load(file)
    if not state["metrics"]:
        raise UsageError(f"{file} is from before the end of the first epoch; train the run first")
    if state["step"]:
        raise UsageError(
            f"{file} is from the middle of epoch {state['epoch'] + 1}; end the run with --resume "
            "auto, or use --checkpoint best"
        )
    config = saved(file, state)
    if device is not None:  # which chooses its own backend
        config = replace(config, device=device, backend=None)
    if data_dir is not None:
        config = replace(config, data_dir=data_dir)
    if config.method not in METHODS:
        raise UsageError(
            f"{path} was trained with method {config.method!r}, which is registered by a file of "
            "its own; run that file in place of mfef"
        )
    config.check()
    torch.set_num_threads(config.thread_count)
    known = state.get("data")
    # Before there were fingerprints, only the data could say how many classes there are.
    dataset = data.without_images(known) if known else load_data(config)
    processes = join(config.device)
    teacher = about = None
    if config.teacher is not None and (about := state.get("teacher")):
        built = about["build"]
        teacher = StudentSpec(**{**built, "strides": tuple(built["strides"])}).build()
    elif config.teacher is not None:
        teacher, about = load_student(config.teacher)
    fingerprint = data.fingerprint(dataset) if known is None else known
    run = build(config, processes, path, dataset, fingerprint, teacher, about)
    try:
        run.distiller.load_state_dict(state["distiller"])
        if run.average is not None:
            run.average.load_state_dict(state["average"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        changed = changes(state["config"], run.resolved)
        raise CheckpointError(
            f"{file} does not fit the networks that its options describe here "
            f"({' '.join(str(error).split())[:200]}); "
            + (f"undo what has changed: {changed}" if changed else "use another checkpoint")
        ) from error
    run.distiller.eval()
    if config.compile:
        run.distiller.compile_students()
    run.rows, run.best_epoch = state["metrics"], state["best_epoch"]
    run.changed = changes(state["config"], run.resolved)
    return run, known


def add_data(run: Run, known: dict[str, Any] | None, file: Path) -> None:
    """Loads the run's images and compares them with the fingerprint of those that it was trained
    on, which the checkpoint ``file`` holds."""
    dataset = load_data(run.config, of_a_run=True)
    run.complaints += compare_data(known, data.fingerprint(dataset), run.config, file)
    run.dataset = dataset.to(run.processes.device)


def evaluate(
    path: Path,
    checkpoint: str = "last",
    student: Path | None = None,
    device: str | None = None,
    data_dir: Path | None = None,
) -> str:
    """A table of test accuracies by role, as they are now and as they were recorded.

    ``student``: a .safetensors file that is scored instead, on the same images.
    """
    run = restore(path, checkpoint, device, data_dir)
    test = run.dataset.test
    if student is None:
        what, recorded = path / f"{checkpoint}.ckpt", scores(run.rows[-1], "test")
        found = accuracy(run, test)
    else:
        network, about = load_student_for(run.fingerprint, student, "--student")
        what, recorded = student, {"student": about["test_accuracy"]}
        with torch.no_grad():
            answers = torch.cat([network.to(x.device)(x).argmax(1) for x in test.x.split(512)])
        found = {"student": 100 * int((answers == test.y).sum()) / len(test)}
    lines = [f"{what}: % of {len(test)} test images of {run.dataset.name} recognised"]
    lines.append(f"{'':12}{'now':>8}{'recorded':>10}")
    lines += [f"{role:12}{found[role]:8.2f}{recorded[role]:10.2f}" for role in found]
    if found != recorded:
        why = run.changed or "nothing that a checkpoint notes has changed"
        lines.append(f"Not as recorded: {why}.")
    return "\n".join([*run.complaints, *lines])
