"""The options of ``mfef train``, checked; their docstrings are the command line's help."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ..backends import BACKEND_NAMES
from ..distill import METHODS
from ..distill.distiller import method_options
from ..names import unknown
from . import UsageError
from .data import DATASETS, WITH_FILES
from .models import check_known as check_student_known
from .paths import check_path
from .processes import TIMEOUT

AUTO = "auto"
LONGEST = 300  # characters of a value in an error
LARGEST = 1e38  # about what float32 holds
# Options that only some methods take.
METHOD_OPTIONS = (
    "temperature",
    "alpha",
    "variant",
    "teacher",
    "boundary_epochs",
    "ramp_epochs",
    "detach_features",
    "multi_scale",
    "channel_attention",
    "spatial_attention",
    "fusion",
)
# In these two processes, or a run and what goes on with it, may differ and still compute the same.
OF_THE_MACHINE = ("threads", "data_dir", "download", "teacher", "tensorboard", "timeout")
MAX_THREADS = 1024  # far more are a segmentation fault in the thread library


@dataclass(frozen=True)
class TrainConfig:
    """Train several students together and leave them, with curves and tables, in a run folder.

    With no options: two small ResNets, MFEF, scikit-learn's handwritten digits, on the CPU.
    --preset okd-cifar or quick and --config FILE.yaml set several options at once: what is given
    here by itself counts more than the file, and the file more than the preset. Under torchrun
    several processes share the work.
    """

    method: str = "mfef"
    """How the students learn: mfef; ce for the same students without distillation; dml, ffl, one,
    okddip, kdcl from one another; kd, mimic, ab from a --teacher."""
    dataset: str = "digits"
    """What they learn: digits (scikit-learn's, 8x8, bundled); cifar10, cifar100, cinic10, or folder
    (any images), all in --data-dir; fake and fake32 (drawn, 16x16 and 32x32, for trials)."""
    data_dir: Path | None = None
    """The folder that holds the data set: cifar-10-batches-py, cifar-100-python, CINIC-10, or for
    folder train/CLASS/*, perhaps val/CLASS/* to choose the best epoch, and perhaps test/CLASS/*,
    else a fifth of train is the test set."""
    download: bool = False
    """Fetch a cifar10, cifar100 or cinic10 that is not in --data-dir, and check its hash."""
    image_size: int | None = None
    """Pixels to a side that the images of folder are cut and resized to; None: 32."""
    students: tuple[str, ...] = ("resnet8", "resnet8")
    """One network per student: resnet8, resnet14, resnet20, resnet32, resnet56, resnet110,
    resnet110-bottleneck, wrn-16-2 (any wrn-DEPTH-WIDTH), wrn20-8-bottleneck, vgg16, densenet40-12,
    densenet40-12-plain, torchvision:NAME, timm:NAME."""
    tap: tuple[str, ...] = ()
    """The layer whose output is the last map before global pooling, one for all students or one
    each; none: found automatically."""
    epochs: int = 15
    """Times that every training image is seen."""
    batch_size: int = 64
    """Images per step, of all processes together."""
    lr: float = 0.1
    """Learning rate at the start."""
    lr_drops: tuple[float, ...] = (0.5, 0.75)
    """Shares of the training after which the learning rate is divided by 10."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 penalty, on all parameters."""
    accumulate: int = 1
    """Parts in which every process computes its share of a batch, one after the other, to save
    memory; batch normalisation sees a part at a time."""
    amp: Literal["bf16", "fp16"] | None = None
    """Mixed precision: the forward pass computes in bfloat16, or in float16 with a scaled loss."""
    compile: bool = False
    """Let torch.compile make the students' passes."""
    ema: float | None = None
    """Decay, such as 0.999, of a moving average of each student's weights, which is scored beside
    it and left as student<i>-ema.safetensors."""
    sync_batch_norm: bool = True
    """With several processes: batch normalisation sees the images of all of them."""
    temperature: float | None = None
    """Temperature T of the distillation terms; None: the method's own, 3 for most."""
    alpha: float | None = None
    """Share (kd, ab, kdcl) or weight (mimic) of the distillation terms; None: the method's own."""
    variant: str | None = None
    """How kdcl combines the students: naive, linear, minlogit or general; None: linear."""
    teacher: Path | None = None
    """The network that kd, mimic and ab learn from: student<i>.safetensors of a run folder."""
    boundary_epochs: float | None = None
    """Epochs in which ab learns activation boundaries; None: a third of all."""
    ramp_epochs: float | None = None
    """Epochs until the distillation terms have their full weight; None: 80 of 300 epochs, in
    proportion."""
    share_stem: bool = False
    """Give all students, which must be of one architecture, the first one's layers before the last
    stage."""
    detach_features: bool = False
    """Keep the fused loss from reaching the students through their feature maps."""
    multi_scale: bool = True
    """Ablation of mfef: without, all kernels of its blocks are 3x3."""
    channel_attention: bool = True
    """Ablation of mfef: without, its blocks have no channel gate."""
    spatial_attention: bool = True
    """Ablation of mfef: without, its blocks have no spatial gate."""
    fusion: bool = True
    """Ablation of mfef: without, each student's features are classified by themselves."""
    validation: float = 0.1
    """Share of the training images held out to choose the best epoch; 0: the test set chooses."""
    labels_per_class: int | None = None
    """Train on so many images of every class alone, drawn by the seed, the same for every method;
    validation and test images stay as they are. None: on all."""
    seed: int = 0
    """The same seed, threads and machine give the same numbers, bit for bit."""
    seeds: tuple[int, ...] = ()
    """Several runs, one with each of these seeds, in folders seed<N>; then their table."""
    backend: str | None = None
    """Backend of the MFEF blocks: reference, cpu, triton or cuda; None chooses."""
    threads: int | None = None
    """CPU threads; None: one less than PyTorch would take, unless OMP_NUM_THREADS says."""
    device: str = "cpu"
    """Where to train: cpu, cuda or cuda:N."""
    tensorboard: bool = False
    """Also write every epoch's metrics for TensorBoard, into the folder tensorboard."""
    out: Path | None = None
    """A new or empty folder for the results; None: the next free runs/METHOD-DATASET-NNN."""
    resume: str | None = None
    """auto: go on with the run in --out from its newest intact checkpoint, or begin it. A run
    folder: go on with that run, with its options. A .ckpt file: go on from it, in its folder if
    nothing newer is there, or in a new --out."""
    timeout: float = TIMEOUT
    """Seconds, at most, that a process waits for the others where several train."""

    def method_options(self) -> dict[str, Any]:
        """What the method is built with, less the teacher: all that is given, or has a length.

        Raises UsageError for an option that the method does not take.
        """
        accepted = method_options(self.method)
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in METHOD_OPTIONS}
        for f in fields(self):
            if f.name in given and f.name not in accepted and given[f.name] != f.default:
                takers = [m for m in sorted(METHODS) if f.name in method_options(m)]
                raise UsageError(
                    f"{typed(f.name, given[f.name])} means nothing to --method {self.method}; it "
                    f"is for {', '.join(takers)}"
                )
        given["ramp_epochs"] = self.ramp_length
        if self.boundary_epochs is None:
            given["boundary_epochs"] = self.epochs / 3
        options = given | {"backend": self.backend, "teacher": None}
        return {k: v for k, v in options.items() if k in accepted and v is not None}

    @property
    def ramp_length(self) -> float:
        """The ramp-up's length in epochs; short runs keep the papers' 80 of 300."""
        return self.epochs * 80 / 300 if self.ramp_epochs is None else self.ramp_epochs

    @property
    def resumes_in_place(self) -> bool:
        """Whether --resume goes on in the folder of the run that it names, which is --out."""
        if self.resume is None or self.resume == AUTO:
            return self.resume is not None
        path = Path(self.resume)
        return path.is_dir() or self.out is None or _is_same(self.out, path.parent)

    def lr_at(self, epoch: int) -> float:
        """The learning rate of the epoch (0 is the first)."""
        return self.lr * 0.1 ** sum(epoch >= drop * self.epochs for drop in self.lr_drops)

    @property
    def thread_count(self) -> int:
        """The CPU threads to use. Left open, one core stays free: threads that wait for one another
        after every small layer stall when another process wants a core (two on two cores went from
        800 to 30 images per second so; one thread alone makes 560)."""
        if self.threads is not None:
            return self.threads
        spare = 0 if "OMP_NUM_THREADS" in os.environ else 1
        return max(torch.get_num_threads() - spare, 1)

    def check(self) -> None:
        """Raises UsageError on the first option that makes no sense: one sentence, a remedy."""
        for name, known in (
            ("method", sorted(METHODS)),
            ("dataset", list(DATASETS)),
            ("backend", list(BACKEND_NAMES)),
        ):
            value = getattr(self, name)
            if value not in known and not (name == "backend" and value is None):
                raise UsageError(unknown(typed(name, value), value, known))
        for student in self.students:
            check_student_known(student)
        if not self.students:
            raise UsageError(
                f"--students= must name at least one network; the default is {_default('students')}"
            )
        if len(self.tap) not in (0, 1, len(self.students)):
            raise UsageError(
                f"{typed('tap', self.tap)} names {len(self.tap)} layers for "
                f"{len(self.students)} students; name one for all, one each, or none"
            )
        for name in ("data_dir", "teacher", "out", "resume"):
            if (path := getattr(self, name)) is not None:
                check_path(f"--{name.replace('_', '-')}", path)
        self._check_data()
        for name, (holds, rule) in _LIMITS.items():
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and not holds(value):
                    raise UsageError(
                        f"{typed(name, value)} {rule}; the default is {_default(name)}"
                    )
        if self.compile and self.share_stem:
            raise UsageError("--compile and --share-stem do not go together; leave one of them out")
        if self.seeds and self.seed != TrainConfig.seed:
            seeds = " ".join(map(str, self.seeds))
            raise UsageError(
                f"--seed={self.seed} means nothing beside --seeds={seeds}, wherever these were "
                f"given; use --seeds {self.seed}, or leave --seed out"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise UsageError(
                f"{typed('seeds', self.seeds)} names a seed twice, which would count twice; leave "
                "one out"
            )
        self.method_options()
        if "teacher" in method_options(self.method) and self.teacher is None:
            raise UsageError(
                f"--method {self.method} needs a --teacher: student<i>.safetensors of a run folder"
            )
        self._check_resume()

    def _check_resume(self) -> None:
        """Raises UsageError where --resume and --out do not agree."""
        if self.resume is None:
            return
        if self.resume == AUTO:
            if self.out is None:
                raise UsageError("--resume auto needs --out, the folder of the run to go on with")
        elif self.seeds:
            raise UsageError(
                f"{typed('resume', self.resume)} is one run; with --seeds use --resume auto"
            )
        elif Path(self.resume).is_dir() and self.out and not _is_same(self.out, Path(self.resume)):
            raise UsageError(
                f"--out={self.out} is not the folder that {typed('resume', self.resume)} goes on "
                "in; leave --out away, or give --resume a .ckpt file of it for a run that branches "
                "off"
            )

    def _check_data(self) -> None:
        """Raises UsageError where --dataset and the options that say where it is do not agree."""
        if self.dataset in WITH_FILES and self.data_dir is None:
            raise UsageError(
                f"--dataset {self.dataset} needs --data-dir: the folder that holds it"
                + ("" if self.dataset == "folder" else ", or that --download shall put it into")
            )
        published = tuple(name for name in WITH_FILES if name != "folder")
        for flag, given, takers in (
            ("--data-dir", self.data_dir, WITH_FILES),
            ("--download", self.download, published),
            ("--image-size", self.image_size, ("folder",)),
        ):
            if given and self.dataset not in takers:
                raise UsageError(
                    f"{flag} means nothing to --dataset {self.dataset}; it is for "
                    f"{', '.join(takers)}"
                )


def _is_same(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


# What an option's value, or each of its values, must be, unless it is None.
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image_size": (lambda v: 8 <= v <= 1024, "must be from 8 to 1024"),
    "epochs": (lambda v: 1 <= v <= 10**6, "must be from 1 to 1000000"),
    "batch_size": (lambda v: v >= 1, "must be at least 1"),
    "accumulate": (lambda v: v >= 1, "must be at least 1"),
    "ema": (lambda v: 0 <= v < 1, "must be in [0, 1), or None"),
    "threads": (lambda v: 1 <= v <= MAX_THREADS, f"must be from 1 to {MAX_THREADS}"),
    "device": (
        lambda v: re.fullmatch(r"cpu|cuda(:\d{1,3})?", v) is not None,
        "must be cpu, cuda or cuda:N",
    ),
    "seed": (lambda v: 0 <= v < 2**31, "must be from 0 to 2147483647"),
    "seeds": (lambda v: 0 <= v < 2**31, "must be from 0 to 2147483647"),
    "lr": (lambda v: 0 < v <= LARGEST, "must be positive and at most 1e38"),
    "lr_drops": (lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
    # Nesterov momentum is undefined at 0.
    "momentum": (lambda v: 0 < v < 1, "must be above 0 and below 1"),
    "weight_decay": (lambda v: 0 <= v <= LARGEST, "must be 0 or more and at most 1e38"),
    "temperature": (lambda v: 1e-3 <= v <= 1000, "must be positive, from 0.001 to 1000"),
    "alpha": (lambda v: 0 <= v <= LARGEST, "must be 0 or more"),
    "boundary_epochs": (lambda v: 0 <= v < math.inf, "must be 0 or more, or None"),
    "ramp_epochs": (lambda v: 0 <= v < math.inf, "must be 0 or more, or None"),
    "timeout": (lambda v: 1 <= v <= 1e6, "must be from 1 to 1000000"),
    "validation": (lambda v: 0 <= v < 0.9, "must be in [0, 0.9)"),
    "labels_per_class": (lambda v: v >= 1, "must be at least 1, or None"),
}


def typed(name: str, value: object) -> str:
    """The option ``name`` with ``value``, as it is given on the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    text = " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return f"--{flag}={text if len(text) <= LONGEST else text[:LONGEST] + '...'}"


def _default(name: str) -> str:
    default = getattr(TrainConfig, name)
    return (" ".join(map(str, default)) or "none") if isinstance(default, tuple) else str(default)
