"""A run: everything that training works on, made from the options and saved in checkpoints."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..distill import METHODS, OnlineDistiller
from ..distill.distiller import method_options
from ..inspection import build_info
from ..version import __version__
from . import DataError, UsageError, checkpoint, data, run_folder
from .config import AUTO, OF_THE_MACHINE, TrainConfig, typed
from .models import StudentSpec, build_students
from .processes import Processes
from .structure import check_momentum, check_optimizer, check_scaler
from .writing import remove_stale

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """A run, from before its first step to its end: what checkpoints and reports are made from."""

    config: TrainConfig
    path: Path
    processes: Processes
    dataset: data.Dataset
    fingerprint: dict[str, Any]  # of the data set
    specs: list[StudentSpec]
    distiller: OnlineDistiller
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    average: AveragedModel | None
    # How to build the teacher, and the SHA-256 of its weights' file, if there is one.
    teacher: dict[str, Any] | None = None
    place: run_folder.Place | None = None  # which keeps the folder locked
    rows: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    # Within an epoch that was stopped: the steps done, and the sums of the loss terms so far.
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    # What of its conditions is not as the checkpoint says that the run was restored from.
    changed: str = ""
    # What was wrong with checkpoints newer than the one that was resumed, and what of it is not
    # here as it was.
    complaints: list[str] = field(default_factory=list)

    @property
    def averaged(self) -> list[nn.Module]:
        """The students with averaged weights, or []."""
        return list(self.average.module.children()) if self.average is not None else []

    @property
    def students(self) -> dict[str, nn.Module]:
        """Every student by role, ``student<i>``, and its average, ``student<i>-ema``."""
        students = {f"student{i}": s for i, s in enumerate(self.distiller.students)}
        return students | {f"student{i}-ema": s for i, s in enumerate(self.averaged)}

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.processes.rank == 0

    def autocast(self) -> torch.autocast:
        """A context in which the forward pass computes in --amp's precision."""
        amp = self.config.amp
        return torch.autocast(
            self.processes.device.type, AMP[amp] if amp else None, enabled=amp is not None
        )

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
            "processes": self.processes.ranks,
            "out": str(self.path),
            "versions": versions(self.config),
            **_ways_to_compute(),
        }

    def about(self, role: str) -> dict[str, Any]:
        """What someone who has only the student's weights needs to know, as plain values."""
        return {
            **{name: self.fingerprint[name] for name in _OF_STUDENTS},
            "epoch": len(self.rows),
            "test_accuracy": self.rows[-1][f"test/{role}"],
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
            "data": self.fingerprint,
            "teacher": self.teacher,
            "distiller": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else {},
        }
        checkpoint.save(self.path / name, state, self.path / previous if previous else None)

    def save_students(self) -> None:
        """Leaves every student alone in a file of its own, and its average where there is one."""
        for (role, student), spec in zip(self.students.items(), self.specs * 2, strict=False):
            path = self.path / f"{role}.safetensors"
            checkpoint.save_student(path, student, spec, self.about(role))

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Becomes what :meth:`save` wrote into ``path``.

        Raises UsageError if that was a run with other options, DataError if it was one on other
        data, CheckpointError if the state is of no such run.
        """
        there, here = state["config"], self.resolved
        run = f"the run in {path.parent}"
        otherwise = "name a new --out"
        if not self.config.resumes_in_place:  # which --out NEW is already
            otherwise = "leave --resume away for a run of its own"
        begun_with, now = there.get("processes"), here["processes"]
        if begun_with != now:
            raise UsageError(
                f"{run} was begun with {begun_with} processes, not {now}; resume "
                f"it with torchrun --nproc-per-node {begun_with}, or {otherwise}"
            )
        for name in (name for name in here if name not in NOT_OF_THE_RESULT):
            # What was saved has been through JSON's types: tuples are lists.
            if name not in there or _plain(there[name]) != _plain(here[name]):
                raise UsageError(
                    f"{typed(name, here[name])} is not what {run} was begun with "
                    f"({typed(name, there.get(name))}); resume it with the same options, or "
                    f"{otherwise}"
                )
        self.complaints += compare_data(state.get("data"), self.fingerprint, self.config, path)
        taught_by, teacher = state.get("teacher"), self.teacher
        if taught_by and teacher and taught_by["sha256"] != teacher["sha256"]:
            raise UsageError(
                f"--teacher={self.config.teacher} is not the network that {run} was begun with, "
                f"whose SHA-256 is {taught_by['sha256']}; give that one, or {otherwise}"
            )
        self.changed = changes(there, here)
        if self.changed:
            self.complaints.append(
                f"{path} was written under other conditions, so numbers may differ in their last "
                f"digits from here on: {self.changed}"
            )
        try:
            check_optimizer(state["optimizer"], self.optimizer.state_dict())
            check_scaler(state["scaler"])
            steps = math.ceil(len(self.dataset.train) / self.config.batch_size)
            if state["step"] > steps:  # all steps are done when only the epoch's end is missing
                raise ValueError(f"step {state['step']} of {steps}")
            self.distiller.load_state_dict(state["distiller"])
            self.optimizer.load_state_dict(state["optimizer"])
            check_momentum(self.optimizer.state)
            self.scaler.load_state_dict(state["scaler"])
            if self.average:
                self.average.load_state_dict(state["average"])
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise checkpoint.CheckpointError(
                f"{path} does not fit the run that its options describe "
                f"({' '.join(str(error).split())[:200]}); begin again with a new --out"
            ) from error
        self.rows, self.timings = state["metrics"], state["timings"]
        self.best_epoch, self.step, self.sums = (state[k] for k in ("best_epoch", "step", "sums"))

    def begin(self, resumed: Path | None) -> None:
        """Leaves in the folder what there has to be before the first step: a checkpoint, and the
        metrics so far. ``resumed``: the checkpoint that is gone on from."""
        if not self.writes:
            return
        if resumed not in (self.path / checkpoint.LAST, self.path / checkpoint.PREVIOUS):
            self.save(checkpoint.LAST)
            if self.rows and not self.step and self.best_epoch == len(self.rows):
                self.save(checkpoint.BEST)
        if resumed is None:
            return
        # A run that was killed may have left half a file, and an epoch that no checkpoint holds.
        remove_stale(self.path)
        for suffix in (".jsonl", ".csv"):
            run_folder.write_rows(self.path / f"metrics{suffix}", self.rows)
        run_folder.write_rows(self.path / "timings.jsonl", self.timings)


# What a student's file says of its data. All but the name is compared.
_OF_STUDENTS = ("dataset", "classes", "input_shape", "mean", "std", "scale")

# Options that two runs may differ in and still compute the same.
NOT_OF_THE_RESULT = {
    *OF_THE_MACHINE,
    *("out", "resume", "versions", "device", "seeds", "processes"),
    *("instruction_set", "forced_backend"),
}


def compare_data(
    known: dict[str, Any] | None, here: dict[str, Any], config: TrainConfig, path: Path
) -> list[str]:
    """DataError unless the fingerprint ``here`` is the ``known`` one, which the checkpoint ``path``
    holds; a complaint if it holds none."""
    if known is None:
        return [
            f"{path} is of a version that did not note which data a run is trained on: those that "
            "are here are taken for its own"
        ]
    if differs := data.difference(known, here):
        raise DataError(
            f"{path} was trained on other data than {config.data_dir or config.dataset} holds: "
            f"{differs}; name the folder with its own by --data-dir, or train on these into a new "
            "--out"
        )
    return []


def versions(config: TrainConfig) -> dict[str, str]:
    """What else a run's numbers depend on: versions of libraries, the processor's instructions, and
    a method's own file by its hash."""
    packages = ["numpy"]
    packages += ["pillow"] * (config.dataset in ("folder", "cinic10"))
    packages += sorted({name.partition(":")[0] for name in config.students if ":" in name})
    found = {"mfef_ext": __version__, "torch": str(torch.__version__)}
    found |= {name: version(name) for name in packages}
    module = METHODS[config.method].__module__
    source = getattr(sys.modules[module], "__file__", None)
    if source and not module.startswith("mfef_ext."):
        content = Path(source).read_bytes()
        found[Path(source).name] = hashlib.sha256(content).hexdigest()[:12]
    return found


def _ways_to_compute() -> dict[str, Any]:
    info = build_info()
    return {"instruction_set": info["isa_used"], "forced_backend": info["backend_forced"]}


def changes(there: dict[str, Any], here: dict[str, Any]) -> str:
    """In what two configurations differ that changes the last digits, or worse, or ""."""
    others = ("threads", "device", "instruction_set", "forced_backend")
    was, now = (
        config.get("versions", {}) | {name: config[name] for name in others if name in config}
        for config in (there, here)
    )
    differ = [name for name in now if name in was and now[name] != was[name]]
    return ", ".join(f"{name} is {now[name]} here and was {was[name]}" for name in differ)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def prepare(
    config: TrainConfig, processes: Processes, place: run_folder.Place | None = None
) -> Run:
    """Data and students on the device, weights drawn from the seed, and a new run folder, or the
    state of the run that is resumed. ``place``: that folder.

    Raises UsageError, before anything is written, if an option, the device or the backend does
    not work out, or if processes differ.
    """
    config.check()
    place = place or run_folder.Place(config.out, f"{config.method}-{config.dataset}")
    if config.resumes_in_place:
        processes.first(place.hold)
    dataset = processes.in_turn(partial(load_data, config, config.resume is not None))
    fingerprint = data.fingerprint(dataset)
    processes.agree(_facts_of_data(fingerprint))
    make = partial(_make, config, processes, dataset.to(processes.device), fingerprint)
    run, found = processes.together(make)  # nobody writes before all have read
    run.place = place
    file, state, damaged = found or (None, {}, [])
    run.complaints = [f"{newer}. Going on from the one before it." for newer in damaged]
    teacher = run.teacher["sha256"] if run.teacher else None
    since = {name: state.get(name) for name in ("epoch", "step", "metrics")}
    processes.agree({"the --teacher": teacher, "the checkpoint to go on from": since})
    if file is not None:
        processes.together(partial(run.restore, file, state))
    if file is None or not config.resumes_in_place:
        run.path = processes.first(place.create)
    else:
        processes.first(place.check_held)
    processes.together(partial(run.begin, file))
    return run


def _facts_of_data(fingerprint: dict[str, Any]) -> dict[str, object]:
    """What processes have to agree in, by its name, and what is easiest to understand first."""
    words = {"images": "number of images for", "sha256": "pixels or labels for"}
    facts: dict[str, object] = {}
    for name in ("dataset", "classes", "input_shape", "images", "mean", "std", "scale", "sha256"):
        value = fingerprint[name]
        if isinstance(value, dict):
            facts |= {f"the data's {words[name]} {k}": str(v)[:16] for k, v in value.items()}
        else:
            facts[f"the data's {name}"] = value
    return facts


def _to_go_on_from(config: TrainConfig) -> checkpoint.Found | None:
    """The checkpoint that --resume names, its state, and what is wrong with newer ones."""
    if config.resume is None or config.out is None:
        return None
    if config.resume == AUTO:
        return checkpoint.newest(config.out)
    found = checkpoint.at(Path(config.resume))
    if config.resumes_in_place and found[0] == Path(config.resume):
        try:
            latest = checkpoint.newest(config.out)
        except checkpoint.CheckpointError:
            return found  # which is what it was named for
        reached = [(state["epoch"], state["step"]) for _, state, _ in (found, latest or found)]
        if reached[0] < reached[1]:
            raise UsageError(
                f"{config.out} has gone on since {found[0]}, and nothing is ever overwritten; "
                f"name a new --out for a run that branches off, or go on with --resume {config.out}"
            )
    return found


def load_data(config: TrainConfig, of_a_run: bool = False) -> data.Dataset:
    """The data set that the options name, on the CPU; ``of_a_run``: those of a run that exists."""
    try:
        return data.load(
            config.dataset,
            config.validation,
            config.data_dir,
            image_size=config.image_size,
            download=config.download,
            labels_per_class=config.labels_per_class,
            seed=config.seed,
        )
    except DataError as error:
        if not of_a_run or config.data_dir is None or config.data_dir.is_dir():
            raise
        raise DataError(
            f"{error}. If the images of this run have moved, say where they are: --data-dir DIR"
        ) from error


def _make(
    config: TrainConfig,
    processes: Processes,
    dataset: data.Dataset,
    fingerprint: dict[str, Any],
) -> tuple[Run, checkpoint.Found | None]:
    """The run with fresh weights, and the checkpoint to go on from, if there is one."""
    if config.batch_size > len(dataset.train):
        raise UsageError(
            f"--batch-size={config.batch_size} is more than the {len(dataset.train)} training "
            f"images of {config.dataset}; use {len(dataset.train)} or fewer"
        )
    torch.manual_seed(config.seed)
    network = about = None
    if config.teacher is not None:
        network, about = load_student_for(fingerprint, config.teacher, "--teacher")
    path = config.out or Path("runs")
    run = build(config, processes, path, dataset, fingerprint, network, about)
    if run.distiller.method.held_out and not len(dataset.validation):
        raise UsageError(
            f"--method {config.method} --variant {config.variant} weighs the students on held-out "
            "images; give --validation a share of the training images, such as 0.1"
        )
    _check_single_images(config, processes, dataset, run.distiller)
    if config.compile:
        run.distiller.compile_students()
    return run, _to_go_on_from(config)


def build(
    config: TrainConfig,
    processes: Processes,
    path: Path,
    dataset: data.Dataset,
    fingerprint: dict[str, Any],
    teacher: nn.Module | None = None,
    about_teacher: dict[str, Any] | None = None,
) -> Run:
    """A run with fresh weights on the device, for the classes and the shape of ``dataset``, of
    whose images none is looked at. ``about_teacher``: what the .json beside its file says.

    Raises UsageError if the students, the device or the backend do not work out.
    """
    options = config.method_options()
    if teacher is not None and about_teacher is not None:
        options["teacher"] = teacher
        if "teacher_tap" in method_options(config.method):
            options["teacher_tap"] = about_teacher["build"]["tap"]
        about_teacher = {name: about_teacher[name] for name in ("build", "sha256")}
    classes = len(dataset.classes)
    students, specs = build_students(config.students, dataset.shape, classes, config.tap)
    try:
        distiller = OnlineDistiller(
            students,
            config.method,
            num_classes=classes,
            tap=[spec.tap for spec in specs],
            input_shape=dataset.shape,
            share_stem=config.share_stem,
            **options,
        ).to(processes.device)
    except ValueError as error:  # too few students, an unknown variant
        raise UsageError(str(error)) from error
    try:
        images = torch.zeros(2, *dataset.shape, device=processes.device)
        labels = torch.zeros(2, dtype=torch.int64, device=processes.device)
        with torch.no_grad():
            distiller.eval()(images, labels, 0.0)
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
    scaler = GradScaler(processes.device.type, enabled=config.amp == "fp16")
    average = None
    if config.ema is not None:
        average = AveragedModel(
            distiller.students, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True
        ).eval()
    return Run(
        config=config,
        path=path,
        processes=processes,
        dataset=dataset,
        fingerprint=fingerprint,
        specs=specs,
        distiller=distiller,
        optimizer=optimizer,
        scaler=scaler,
        average=average,
        teacher=about_teacher,
    )


def _check_single_images(
    config: TrainConfig, processes: Processes, dataset: data.Dataset, distiller: OnlineDistiller
) -> None:
    """UsageError if a part of a batch will be so small that batch normalisation cannot take it: a
    single image where a map is one pixel, or none."""
    apart = 1 if config.sync_batch_norm else processes.ranks
    sizes = config.batch_size, len(dataset.train) % config.batch_size or config.batch_size
    smallest = min(size // apart // parts(config, size, processes.ranks) for size in sizes)
    if smallest > 1 or (smallest == 1 and _takes_a_single_image(distiller, dataset)):
        return
    raise UsageError(
        f"--batch-size={config.batch_size} with --accumulate={config.accumulate} makes parts "
        f"of {smallest} image(s) out of {len(dataset.train)}, too few for the batch "
        "normalisation of these students; use another --batch-size or a smaller --accumulate"
    )


def _takes_a_single_image(distiller: OnlineDistiller, dataset: data.Dataset) -> bool:
    try:
        with torch.no_grad():
            copy.deepcopy(distiller).train()(*dataset.train[:1])
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return False
    return True


def parts(config: TrainConfig, size: int, ranks: int) -> int:
    """How many parts each of ``ranks`` processes computes its share of ``size`` images in."""
    return max(1, min(config.accumulate, size // ranks))


def load_student_for(
    fingerprint: dict[str, Any], path: Path, flag: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network in ``path`` and what its .json says; UsageError unless it was trained for
    classes and images as those of ``fingerprint``, normalised alike. ``flag``: the option that
    named it."""
    network, about = checkpoint.load_student(path)
    compared = {name: about[name] for name in _OF_STUDENTS[1:] if name in about}
    if differs := data.difference(compared, fingerprint):
        raise UsageError(
            f"{flag}={path} was trained for other images or classes than those of "
            f"{fingerprint['dataset']}: {differs}; train it on this data set"
        )
    return network, about
