"""The training loop: one module, one forward, one backward, one optimiser."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distill import OnlineDistiller
from . import InterruptedByUser, NotFiniteError, StoppedError, checkpoint, data, run_folder
from .config import TrainConfig
from .display import Display
from .processes import Processes
from .run import Run, parts, prepare
from .timing import HeadClock

MIN_SCALE = 1.0  # of float16's loss: what is not finite even so is no overflow


def train(
    config: TrainConfig,
    display: Display,
    processes: Processes,
    place: run_folder.Place | None = None,
) -> Run:
    """Trains as configured and leaves metrics, checkpoints and students in a run folder.

    ``place``: that folder, which stays locked; without, it is locked as long as the run is kept.

    Raises UsageError before anything is written, a StoppedError later; the folder then holds the
    checkpoint of the last whole epoch.
    """
    run = prepare(config, processes, place)
    if run.place is not None and run.place.warning:
        display.say(f"warning: {run.place.warning}")
    for remark in run.dataset.remarks:
        display.say(remark)
    for complaint in run.complaints:
        display.say(complaint)
    if run.rows or run.step:
        display.say(f"{run.path}: going on after epoch {len(run.rows)}, step {run.step}")
    if run.writes and not (run.path / "config.json").exists():
        run_folder.write_json(run.path / "config.json", run.resolved | {"data": run.fingerprint})
    if config.tensorboard and run.writes:
        display.record(run.path / "tensorboard", len(run.rows) + 1)
    module = processes.share(
        run.distiller,
        synchronise=config.sync_batch_norm,
        unused=run.distiller.method.leaves_unused,
    )
    clock = HeadClock(run.distiller.method, processes.device)
    with _stop_requests() as requests:
        training = Training(run, module, clock, display, requests)
        try:
            for epoch in range(len(run.rows), config.epochs):
                training.one_epoch(epoch)
        except StoppedError as error:
            error.folder = run.path
            raise
    # What came after the last step was only collected: other runs may follow this one.
    asked = torch.tensor([bool(requests)], dtype=torch.float64, device=processes.device)
    if processes.sum(asked).item():
        who = _who_stopped(requests)
        late = InterruptedByUser(f"{who} after the last step, of epoch {config.epochs}")
        late.folder = run.path
        raise late
    if run.writes:
        run.save_students()
    return run


@dataclass
class Training:
    """A run in the middle of its training, and what is told of it."""

    run: Run
    module: nn.Module
    """The run's distiller, shared among the processes if there are several."""
    clock: HeadClock
    display: Display
    requests: list[str]
    """The signals that asked to stop."""

    def one_epoch(self, epoch: int) -> None:
        """Trains, scores, records and saves one epoch; 0 is the first."""
        run, clock = self.run, self.clock
        started, clock.seconds = clock.now(), 0.0
        losses = self.steps(epoch)
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
                scores = accuracy(run, images)
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
        if run.writes:
            run_folder.append_row(run.path / "metrics.jsonl", row)
            run_folder.append_row(run.path / "metrics.csv", row)
            run_folder.append_row(run.path / "timings.jsonl", run.timings[-1])
            if is_best:  # first: a run killed in between does this epoch again
                run.save(checkpoint.BEST)
            run.save(checkpoint.LAST, checkpoint.PREVIOUS)
        self.display.epoch(row, rate)

    def steps(self, epoch: int) -> dict[str, float]:
        """One pass over the training images; the mean of each loss term over them, by name."""
        run, requests = self.run, self.requests
        config, processes, images = run.config, run.processes, len(run.dataset.train)
        for group in run.optimizer.param_groups:
            group["lr"] = config.lr_at(epoch)
        run.distiller.train()
        steps = math.ceil(images / config.batch_size)
        sums = run.sums
        views = len(run.distiller.students) if run.distiller.method.views else 1
        batches = data.training_batches(
            run.dataset,
            config.batch_size,
            config.seed,
            epoch,
            views,
            first_step=run.step,
            rank=processes.rank,
            ranks=processes.ranks,
        )
        for step, (x, y) in enumerate(batches, run.step):
            _seed(config.seed, epoch, step, processes.rank)
            where = f"epoch {epoch + 1}, step {step + 1}"
            size = min(config.batch_size, images - step * config.batch_size)
            terms = self.gradients(x, y, size, epoch + step / steps)
            run.scaler.unscale_(run.optimizer)
            gradients = [p.grad for p in run.distiller.parameters() if p.grad is not None]
            broken = ~torch.nn.utils.get_total_norm(gradients).isfinite()
            # One sum says all that the processes must agree on.
            asked = broken.new_tensor(float(bool(requests)), dtype=torch.float64)
            *values, broken, stop = processes.sum(
                torch.stack([*terms.values(), broken.double(), asked])
            ).tolist()
            for name, value in zip(terms, values, strict=True):
                if not math.isfinite(value):
                    raise NotFiniteError(f"{where}: the loss term {name} is {value}")
                sums[name] = sums.get(name, 0.0) + value * size / images
            if broken and not (run.scaler.is_enabled() and run.scaler.get_scale() > MIN_SCALE):
                named = run.distiller.named_parameters()
                name = next((n for n, p in named if _broken(p.grad)), "their norm")
                raise NotFiniteError(f"{where}: the gradient of {name} is not finite")
            run.scaler.step(run.optimizer)
            run.scaler.update()
            if run.average is not None:
                run.average.update_parameters(run.distiller.students)
            self.display.step(epoch + 1, step + 1, steps, sum(values))
            if stop:
                _check_finite_state(run.distiller, epoch)
                run.step = step + 1
                if run.writes:
                    run.save(checkpoint.LAST, checkpoint.PREVIOUS)
                who = _who_stopped(requests)
                raise InterruptedByUser(
                    f"{who} in epoch {epoch + 1}, after step {step + 1} of {steps}"
                )
        run.step, run.sums = 0, {}
        return sums

    def gradients(self, x: list[Tensor], y: Tensor, size: int, epoch: float) -> dict[str, Tensor]:
        """Leaves in ``.grad`` the gradients of the mean loss over a batch of ``size`` images, of
        which this process has x and y; returns its share of each term of that mean, float64."""
        run, module, ranks = self.run, self.module, self.run.processes.ranks
        count = parts(run.config, size, ranks)
        terms: dict[str, Tensor] = {}
        run.optimizer.zero_grad()
        pieces = zip(*(v.tensor_split(count) for v in x), y.tensor_split(count), strict=True)
        for i, (*views, labels) in enumerate(pieces):
            alone = isinstance(module, DistributedDataParallel) and i + 1 < count
            with module.no_sync() if alone else nullcontext():  # type: ignore[operator]
                with run.autocast():
                    out = module(views if len(views) > 1 else views[0], labels, epoch)
                self.clock.backward_starts()
                # Processes' gradients are averaged: weighed so, they are those of the whole mean.
                run.scaler.scale(out.loss * (len(labels) * ranks / size)).backward()
            for name, term in out.losses.items():
                share = term.detach().double() * (len(labels) / size)
                if not len(labels):  # the mean over no images is NaN; its gradients are 0
                    share = torch.zeros_like(share)
                terms[name] = terms[name] + share if name in terms else share
        return terms


def _seed(*numbers: int) -> None:
    """Whatever the networks draw, such as dropout, is a function of ``numbers``: a run that is
    resumed draws the same, with nothing to be saved for it."""
    mixed = np.random.SeedSequence(numbers).generate_state(1)
    torch.manual_seed(int(mixed[0]))


def _broken(gradient: Tensor | None) -> bool:
    return gradient is not None and not bool(gradient.isfinite().all())


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


@torch.no_grad()
def accuracy(run: Run, images: data.Images) -> dict[str, float]:
    """Right answers in percent by role: ``student<i>``, ``students`` (the mean of these),
    ``ensemble``, what the method adds, such as ``fused``, and ``student<i>-ema``.

    Every image counts once, whatever the number of processes."""
    run.distiller.eval()
    mine = images.part(slice(run.processes.rank, None, run.processes.ranks))
    counts: dict[str, Tensor] = {}
    for x, y in mine.batches(512) if len(mine) else [mine[:0]]:
        with run.autocast():
            answers = run.distiller(x).logits
            answers |= {f"student{i}-ema": s(x) for i, s in enumerate(run.averaged)}
        for role, logits in answers.items():
            right = (logits.argmax(1) == y).sum()
            counts[role] = counts[role] + right if role in counts else right
    numbers = run.processes.sum(torch.stack(list(counts.values()))).tolist()
    right = dict(zip(counts, numbers, strict=True))
    students = {f"student{i}": right[f"student{i}"] for i in range(len(run.distiller.students))}
    mean = {"students": sum(students.values()) / len(students)}
    return {role: 100 * n / len(images) for role, n in (students | mean | right).items()}


def _who_stopped(requests: list[str]) -> str:
    return requests[0] if requests else "another process was stopped"


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
