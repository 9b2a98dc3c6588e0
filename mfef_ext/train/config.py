"""The options of ``mfef train``, checked; their docstrings are the command line's help."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch

from ..backends import BACKEND_NAMES
from ..distill import METHODS
from ..distill.distiller import method_options
from . import UsageError
from .data import DATASETS, WITH_FILES
from .models import check_known as check_student_known

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
MOST_THREADS = 1024  # far more are a segmentation fault in the thread library


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
    folder train/CLASS/* and perhaps test/CLASS/*, else a fifth of train is the test set."""
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
    resume: Literal["auto"] | None = None
    """auto: go on with the run in --out from its newest intact checkpoint, or begin it."""

    def method_options(self) -> dict[str, Any]:
        """What the method is built with, less the teacher: all that is given, or has a length.

        Raises UsageError for an option that the method does not take.
        """
        accepted = method_options(self.method)
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in METHOD_OPTIONS}
        for f in fields(self):
            if f.name in given and f.name not in accepted and given[f.name] != f.default:
                takers = [m for m in sorted(METHODS) if f.name in method_options(m)]
                value = given[f.name]
                flag = f"--{'no-' * (value is False)}{f.name.replace('_', '-')}"
                raise UsageError(
                    f"{flag}{'' if isinstance(value, bool) else f'={value}'} means nothing to "
                    f"--method {self.method}; it is for {', '.join(takers)}"
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
        _check_known("--method", self.method, sorted(METHODS))
        _check_known("--dataset", self.dataset, list(DATASETS))
        for student in self.students:
            check_student_known(student)
        if self.backend is not None:
            _check_known("--backend", self.backend, list(BACKEND_NAMES))
        _check(len(self.students) > 0, "--students", "", "must name at least one network")
        if len(self.tap) not in (0, 1, len(self.students)):
            raise UsageError(
                f"--tap={' '.join(self.tap)} names {len(self.tap)} layers for "
                f"{len(self.students)} students; name one for all, one each, or none"
            )
        self._check_data()
        for flag, count in (
            ("--epochs", self.epochs),
            ("--batch-size", self.batch_size),
            ("--accumulate", self.accumulate),
        ):
            _check(count >= 1, flag, count, "must be at least 1")
        _check(
            self.ema is None or 0 <= self.ema < 1, "--ema", self.ema, "must be in [0, 1), or None"
        )
        if self.compile and self.share_stem:
            raise UsageError("--compile and --share-stem do not go together; leave one of them out")
        _check(
            self.threads is None or 1 <= self.threads <= MOST_THREADS,
            "--threads",
            self.threads,
            f"must be from 1 to {MOST_THREADS}",
        )
        _check(self.epochs <= 10**6, "--epochs", self.epochs, "must be at most 1000000")
        _check(
            re.fullmatch(r"cpu|cuda(:\d{1,3})?", self.device) is not None,
            "--device",
            self.device,
            "must be cpu, cuda or cuda:N",
        )
        for flag, seed in (("--seed", self.seed), *(("--seeds", s) for s in self.seeds)):
            _check(0 <= seed < 2**31, flag, seed, "must be from 0 to 2147483647")
        if self.seeds and self.seed != TrainConfig.seed:
            seeds = " ".join(map(str, self.seeds))
            raise UsageError(
                f"--seed={self.seed} means nothing beside --seeds={seeds}, wherever these were "
                f"given; use --seeds {self.seed}, or leave --seed out"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise UsageError(
                f"--seeds={' '.join(map(str, self.seeds))} names a seed twice, which would count "
                "twice; leave one out"
            )
        _check(0 < self.lr <= LARGEST, "--lr", self.lr, "must be positive and at most 1e38")
        self.method_options()
        if "teacher" in method_options(self.method) and self.teacher is None:
            raise UsageError(
                f"--method {self.method} needs a --teacher: student<i>.safetensors of a run folder"
            )
        _check(
            self.alpha is None or 0 <= self.alpha <= LARGEST,
            "--alpha",
            self.alpha,
            "must be 0 or more",
        )
        _check(
            self.boundary_epochs is None or 0 <= self.boundary_epochs < math.inf,
            "--boundary-epochs",
            self.boundary_epochs,
            "must be 0 or more, or None",
        )
        _check(
            self.temperature is None or 1e-3 <= self.temperature <= 1000,
            "--temperature",
            self.temperature,
            "must be positive, from 0.001 to 1000",
        )
        _check(
            0 <= self.weight_decay <= LARGEST,
            "--weight-decay",
            self.weight_decay,
            "must be 0 or more and at most 1e38",
        )
        # Nesterov momentum is undefined at 0.
        _check(0 < self.momentum < 1, "--momentum", self.momentum, "must be above 0 and below 1")
        _check(
            self.ramp_epochs is None or 0 <= self.ramp_epochs < math.inf,
            "--ramp-epochs",
            self.ramp_epochs,
            "must be 0 or more, or None",
        )
        _check(0 <= self.validation < 0.9, "--validation", self.validation, "must be in [0, 0.9)")
        if self.resume and self.out is None:
            raise UsageError("--resume auto needs --out, the folder of the run to go on with")
        _check(
            self.labels_per_class is None or self.labels_per_class >= 1,
            "--labels-per-class",
            self.labels_per_class,
            "must be at least 1, or None",
        )
        for drop in self.lr_drops:
            _check(0 < drop <= 1, "--lr-drops", drop, "must be above 0 and at most 1")

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
        _check(
            self.image_size is None or 8 <= self.image_size <= 1024,
            "--image-size",
            self.image_size,
            "must be from 8 to 1024",
        )


def _check(holds: bool, flag: str, value: object, rule: str) -> None:
    if not holds:
        default = getattr(TrainConfig, flag[2:].replace("-", "_"))
        shown = (" ".join(map(str, default)) or "none") if isinstance(default, tuple) else default
        raise UsageError(f"{flag}={value} {rule}; the default is {shown}")


def _check_known(flag: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise UsageError(unknown(f"{flag}={value}", value, known))


def unknown(what: str, name: str, known: list[str]) -> str:
    """The sentence about ``what``, in which ``name`` is none of those that are known."""
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{what} is unknown; {hint}use one of {', '.join(known)}"
