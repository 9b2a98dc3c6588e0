"""The training loop: one module, one forward, one backward, one optimiser."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..distill import OnlineDistiller
from ..distill.distiller import method_options
from ..version import __version__
from . import InterruptedByUser, NotFiniteError, StoppedError, UsageError, checkpoint, data, folder
from .config import TrainConfig
from .display import Display
from .models import StudentSpec, build_students
from .timing import HeadClock


@dataclass
class Run:
    """A run, from before its first step to its end: what checkpoints and reports are made from."""

    config: TrainConfig
    path: Path
    dataset: data.Dataset
    specs: list[StudentSpec]
    distiller: OnlineDistiller
    optimizer: torch.optim.Optimizer
    rows: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    # Within an epoch that was stopped: the steps done, and the sums of the loss terms so far.
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    # What was wrong with checkpoints newer than the one that was resumed.
    complaints: list[str] = field(default_factory=list)

    @property
    def resolved(self) -> dict[str, Any]:
        """The configuration with everything left open filled in, as plain values."""
        method = self.distiller.method
        chosen = {
            name: getattr(method, name)
            for name in method_options(self.config.method)
            if isinstance(getattr(method, name, None), int | float | str)
        }
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.config).items()}
        return plain | {
            **chosen,
            "tap": [spec.tap for spec in self.specs],
            "threads": torch.get_num_threads(),
            "out": str(self.path),
            "versions": {"mfef_ext": __version__, "torch": str(torch.__version__)},
        }

    def about(self, student: int) -> dict[str, Any]:
        """What someone who has only the student's weights needs to know, as plain values."""
        return {
            "dataset": self.dataset.name,
            "classes": self.dataset.classes,
            "input_shape": self.dataset.shape,
            **asdict(self.dataset.normalisation),
            "epoch": len(self.rows),
            "test_accuracy": self.rows[-1][f"test/student{student}"],
        }

    def save(self, name: str, previous: str | None = None) -> None:
        """Writes the present state as the checkpoint ``name``; the one before becomes
        ``previous``, if that is given."""
        state = {
            "epoch": len(self.rows),
            "step": self.step,
            "sums": self.sums,
            "best_epoch": self.best_epoch,
            "metrics": self.rows,
            "timings": self.timings,
            "config": self.resolved,
            "distiller": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        checkpoint.save(self.path / name, state, self.path / previous if previous else None)

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Becomes what :meth:`save` wrote into ``path``, files of metrics included.

        Raises UsageError if that was a run with other options.
        """
        there, here = state["config"], self.resolved
        for name in (name for name in here if name not in NOT_OF_THE_RESULT):
            # What was saved has been through JSON's types: tuples are lists.
            if name not in there or _plain(there[name]) != _plain(here[name]):
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{flag}={here[name]} is not what the run in {self.path} was begun with "
                    f"({there.get(name)}); resume it with the same options, or name a new --out"
                )
        try:
            self.distiller.load_state_dict(state["distiller"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            if torch.cuda.is_available() and state["random_cuda"]:
                torch.cuda.set_rng_state_all(state["random_cuda"])
            self.rows, self.timings = state["metrics"], state["timings"]
            self.best_epoch, self.step, self.sums = (
                state[k] for k in ("best_epoch", "step", "sums")
            )
        except (KeyError, RuntimeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{path} does not fit the run that its options describe "
                f"({str(error).splitlines()[0]}); begin again with a new --out"
            ) from error
        # A run that was killed may have recorded an epoch that no checkpoint holds.
        for suffix in (".jsonl", ".csv"):
            folder.write_rows(self.path / f"metrics{suffix}", self.rows)
        folder.write_rows(self.path / "timings.jsonl", self.timings)


# Options that two runs may differ in and still compute the same.
NOT_OF_THE_RESULT = {
    *("out", "resume", "threads", "versions", "device", "teacher", "tensorboard"),
    *("data_dir", "download"),
}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def prepare(config: TrainConfig, path: Path | None = None) -> Run:
    """Data and students on the device, weights drawn from the seed, and a new run folder, unless
    ``path`` is one that exists.

    Raises UsageError, before anything is written, if an option, the device or the backend does
    not work out.
    """
    config.check()
    try:
        device = torch.empty(1, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device={config.device} cannot be used ({reason}); use --device cpu"
        ) from error
    dataset = data.load(
        config.dataset,
        config.validation,
        config.data_dir,
        image_size=config.image_size,
        download=config.download,
    ).to(device)
    if config.batch_size > len(dataset.train):
        raise UsageError(
            f"--batch-size={config.batch_size} is more than the {len(dataset.train)} training "
            f"images of {config.dataset}; use {len(dataset.train)} or fewer"
        )
    torch.manual_seed(config.seed)
    classes = len(dataset.classes)
    options = config.method_options()
    if config.teacher is not None:
        options["teacher"], about = load_student_for(dataset, config.teacher, "--teacher")
        if "teacher_tap" in method_options(config.method):
            options["teacher_tap"] = about["build"]["tap"]
    students, specs = build_students(config.students, dataset.shape, classes, config.tap)
    try:
        distiller = OnlineDistiller(
            students,
            config.method,
            num_classes=classes,
            tap=[spec.tap for spec in specs],
            input_shape=dataset.shape,
            **options,
        ).to(device)
    except ValueError as error:  # too few students, an unknown variant
        raise UsageError(str(error)) from error
    if distiller.method.held_out and not len(dataset.validation):
        raise UsageError(
            f"--method {config.method} --variant {config.variant} weighs the students on held-out "
            "images; give --validation a share of the training images, such as 0.1"
        )
    try:
        with torch.no_grad():
            distiller.eval()(*dataset.test[:2])
    except (RuntimeError, ValueError) as error:
        forced = os.environ.get("MFEF_BACKEND")
        if not (config.backend or forced):
            raise
        asked = f"--backend={config.backend}" if config.backend else f"MFEF_BACKEND={forced}"
        raise UsageError(f"{asked} does not work here: {error}") from error
    optimizer = torch.optim.SGD(
        distiller.parameter_groups(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )
    found = checkpoint.newest(config.out) if config.resume and config.out else None
    if found is not None:
        path = found[0].parent
    elif path is None:
        path = folder.create(config.out, f"{config.method}-{config.dataset}")
    run = Run(config, path, dataset, specs, distiller, optimizer)
    if found is not None:
        file, state, run.complaints = found
        run.restore(file, state)
    return run


def load_student_for(
    dataset: data.Dataset, path: Path, flag: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network in ``path`` and what its .json says; UsageError unless it was trained for
    the images and classes of ``dataset``. ``flag``: the option that named it."""
    network, about = checkpoint.load_student(path)
    for what, learnt, here in (
        ("classes", about["classes"], dataset.classes),
        ("images of shape", about["input_shape"], dataset.shape),
    ):
        if list(learnt) != list(here):
            raise UsageError(
                f"{flag}={path} was trained for {what} {tuple(learnt)}, but {dataset.name} has "
                f"{tuple(here)}; train it on this data set"
            )
    return network, about


def train(config: TrainConfig, display: Display) -> Run:
    """Trains as configured and leaves metrics, checkpoints and students in a new run folder.

    Raises UsageError before anything is written, a StoppedError later; the folder then holds the
    checkpoint of the last whole epoch.
    """
    run = prepare(config)
    for complaint in run.complaints:
        display.say(f"{complaint}. Going on from the one before it.")
    if run.rows or run.step:
        display.say(f"{run.path}: going on after epoch {len(run.rows)}, step {run.step}")
    else:
        folder.write_json(run.path / "config.json", run.resolved)
        run.save(checkpoint.LAST)  # so that there is one from the first step on
    if config.tensorboard:
        display.record(run.path / "tensorboard", len(run.rows) + 1)
    clock = HeadClock(run.distiller.method, run.dataset.train.y.device)
    with _stop_requests() as requests:
        try:
            for epoch in range(len(run.rows), config.epochs):
                _one_epoch(run, epoch, clock, display, requests)
        except StoppedError as error:
            error.folder = run.path
            raise
    for i, (student, spec) in enumerate(zip(run.distiller.students, run.specs, strict=True)):
        checkpoint.save_student(run.path / f"student{i}.safetensors", student, spec, run.about(i))
    return run


def _one_epoch(
    run: Run, epoch: int, clock: HeadClock, display: Display, requests: list[str]
) -> None:
    """Trains, scores, records and saves one epoch; 0 is the first."""
    started, clock.seconds = clock.now(), 0.0
    losses = _steps(run, epoch, clock, display, requests)
    seconds = clock.now() - started
    _check_finite_state(run.distiller, epoch)
    row = {
        "epoch": epoch + 1,
        "lr": run.config.lr_at(epoch),
        "kd_weight": run.distiller.method.kd_weight(epoch + 1),
        "loss": sum(losses.values()),
        **losses,
    }
    for split in ("validation", "test"):
        images = getattr(run.dataset, split)
        if len(images):
            scores = accuracy(run.distiller, images)
            row |= {f"{split}/{role}": value for role, value in scores.items()}
    if run.distiller.method.held_out:
        _calibrate(run.distiller, run.dataset.validation)
    rate = len(run.dataset.train) / seconds
    timing = {"epoch": epoch + 1, "train_seconds": seconds, "method_seconds": clock.seconds}
    run.rows.append(row)
    run.timings.append(timing | {"images_per_second": rate})
    # Of equals the later one: it has seen more, at a smaller learning rate.
    key = "validation/students" if len(run.dataset.validation) else "test/students"
    is_best = row[key] == max(earlier[key] for earlier in run.rows)
    if is_best:
        run.best_epoch = epoch + 1
    folder.append_row(run.path / "metrics.jsonl", row)
    folder.append_row(run.path / "metrics.csv", row)
    folder.append_row(run.path / "timings.jsonl", run.timings[-1])
    if is_best:  # first: a run killed in between does this epoch again
        run.save(checkpoint.BEST)
    run.save(checkpoint.LAST, checkpoint.PREVIOUS)
    display.epoch(row, rate)


def _steps(
    run: Run, epoch: int, clock: HeadClock, display: Display, requests: list[str]
) -> dict[str, float]:
    """One pass over the training images; the mean of each loss term over them, by name."""
    config, images = run.config, len(run.dataset.train)
    for group in run.optimizer.param_groups:
        group["lr"] = config.lr_at(epoch)
    run.distiller.train()
    steps = math.ceil(images / config.batch_size)
    done, sums = run.step, run.sums
    views = len(run.distiller.students) if run.distiller.method.views else 1
    batches = data.training_batches(run.dataset, config.batch_size, config.seed, epoch, views)
    for step, (x, y) in enumerate(batches):
        if step < done:
            continue
        out = run.distiller(x if views > 1 else x[0], y, epoch + step / steps)
        values = torch.stack([term.detach() for term in out.losses.values()]).tolist()
        for name, value in zip(out.losses, values, strict=True):
            if not math.isfinite(value):
                raise NotFiniteError(
                    f"epoch {epoch + 1}, step {step + 1}: the loss term {name} is {value}"
                )
            sums[name] = sums.get(name, 0.0) + value * len(y) / images
        run.optimizer.zero_grad()
        clock.backward_starts()
        out.loss.backward()
        run.optimizer.step()
        display.step(epoch + 1, step + 1, steps, sum(values))
        if requests:
            _check_finite_state(run.distiller, epoch)
            run.step = step + 1
            run.save(checkpoint.LAST, checkpoint.PREVIOUS)
            raise InterruptedByUser(
                f"{requests[0]} in epoch {epoch + 1}, after step {step + 1} of {steps}"
            )
    run.step, run.sums = 0, {}
    return sums


def _check_finite_state(distiller: nn.Module, epoch: int) -> None:
    """The last step's update has met no loss yet: look before it replaces a good checkpoint."""
    for name, tensor in distiller.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NotFiniteError(f"epoch {epoch + 1}, after the last step: {name} is not finite")


@torch.no_grad()
def _calibrate(distiller: OnlineDistiller, images: data.Images) -> None:
    """Shows the method what the students make of images that are not trained on."""
    distiller.eval()
    logits = [distiller(x).logits for x, _ in images.batches(512)]
    roles = [f"student{i}" for i in range(len(distiller.students))]
    distiller.method.calibrate([torch.cat([z[r] for z in logits]) for r in roles], images.y)


def accuracy(distiller: OnlineDistiller, images: data.Images) -> dict[str, float]:
    """Right answers in percent by role: ``student<i>``, ``students`` (the mean of these),
    ``ensemble``, and what the method adds, such as ``fused``."""
    distiller.eval()
    right: dict[str, float] = {}
    with torch.no_grad():
        for x, y in images.batches(512):
            for role, logits in distiller(x).logits.items():
                right[role] = right.get(role, 0) + int((logits.argmax(1) == y).sum())
    students = {f"student{i}": right[f"student{i}"] for i in range(len(distiller.students))}
    mean = {"students": sum(students.values()) / len(students)}
    return {role: 100 * n / len(images) for role, n in (students | mean | right).items()}


@contextmanager
def _stop_requests() -> Iterator[list[str]]:
    """Collects the first SIGINT or SIGTERM, to be heeded between steps; a second one kills."""
    requests: list[str] = []

    def request(number: int, frame: FrameType | None) -> None:
        requests.append(signal.Signals(number).name)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {
        number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
