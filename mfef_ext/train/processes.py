"""Several processes that train one set of weights, started by ``torchrun``; or just this one."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..names import a
from ..ops.dispatch import BatchNorm
from . import UsageError

T = TypeVar("T")
TIMEOUT = 600.0  # seconds


class SaidElsewhere(Exception):
    """Why an error is raised here that another process has met, and says."""


@dataclass(frozen=True)
class Processes:
    """This process is the ``rank``-th of ``ranks`` and computes on ``device``.

    ``group``: who exchanges tensors on a GPU. All else goes by way of the CPU, so that processes
    whose devices or options are at odds can still say so.
    """

    rank: int
    ranks: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    def first(self, act: Callable[[], T]) -> T:
        """What ``act`` returns or raises in process 0, the only one that calls it, in all."""
        if self.ranks == 1:
            return act()
        answer: list[object] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = act()
            except Exception as error:
                answer[1] = error
        _wait(lambda: dist.broadcast_object_list(answer, 0))
        if isinstance(answer[1], Exception):
            raise answer[1] from (SaidElsewhere() if self.rank else answer[1].__cause__)
        return answer[0]  # type: ignore[return-value]

    def together(self, act: Callable[[], T]) -> T:
        """What ``act``, which all processes call, returns here, once all are done with it; what it
        raises in one of them, of several the first, is raised in all."""
        if self.ranks == 1:
            return act()
        answer: list[T] = []
        try:
            answer.append(act())
        except Exception as error:
            errors = self._gather(error)
            if not any(errors[: self.rank]):
                raise
        else:
            errors = self._gather(None)
        for elsewhere in errors:
            if elsewhere is not None:
                raise elsewhere from SaidElsewhere()
        return answer[0]

    def in_turn(self, act: Callable[[], T]) -> T:
        """As :meth:`together`, with process 0 done before the others begin."""
        mine: list[T] = []
        self.first(lambda: mine.append(act()))
        return self.together(lambda: mine[0] if mine else act())

    def agree(self, facts: dict[str, object]) -> None:
        """UsageError in all processes, with the first of the ``facts`` that are not the same in all
        of them, by its name, and who has which."""
        if self.ranks == 1:
            return
        everyone: list[dict[str, str]] = self._gather({k: str(v) for k, v in facts.items()})
        for name in dict.fromkeys(name for theirs in everyone for name in theirs):
            ranks: dict[str, list[str]] = {}
            for rank, theirs in enumerate(everyone):
                ranks.setdefault(theirs.get(name, "unknown"), []).append(str(rank))
            if len(ranks) > 1:
                said = " and ".join(
                    f"{value[:200]} in rank{'s' * (len(who) > 1)} {', '.join(who[:8])}"
                    + (f" and {len(who) - 8} more" if len(who) > 8 else "")
                    for value, who in list(ranks.items())[:4]
                )
                raise UsageError(
                    f"the processes do not agree in {name}: {said}; start all with the same "
                    "options, data and code"
                ) from (SaidElsewhere() if self.rank else None)

    def _gather(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.ranks
        _wait(lambda: dist.all_gather_object(everyone, mine))
        return everyone

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' ``values``, which it replaces."""
        if self.ranks > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def share(self, module: nn.Module, *, synchronise: bool, unused: bool) -> nn.Module:
        """``module`` with gradients that are means over the processes.

        ``synchronise``: batch normalisation sees the images of all processes. ``unused``: some
        parameters have no part in some losses. Raises UsageError for a batch normalisation that
        cannot be synchronised.
        """
        if self.ranks == 1:
            return module
        if synchronise:
            self.together(lambda: synchronise_batch_norm(module, self))
        return DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=unused,
            process_group=self.group,
        )

    def on(self, device: str) -> Processes:
        """These processes, of which this one computes on ``device``.

        Raises UsageError if ``device`` cannot be used, or is one GPU for several processes.
        """
        if self.ranks > 1 and device.startswith("cuda:"):
            raise UsageError(
                f"--device={device} is one GPU for {self.ranks} processes; use --device cuda, of "
                "which each takes its own"
            )
        if self.ranks > 1 and device == "cuda":
            device = f"cuda:{_number('LOCAL_RANK', 0)}"
        there = self.together(lambda: _usable(device))
        if self.ranks == 1 or there.type == "cpu":
            return replace(self, device=there)
        torch.cuda.set_device(there)
        if not _gpu_groups:
            group = dist.new_group(backend="nccl", timeout=_limit[0])
            _gpu_groups.append(cast(dist.ProcessGroup, group))  # all processes are in it
        return replace(self, device=there, group=_gpu_groups[0])


_gpu_groups: list[dist.ProcessGroup] = []
_limit: list[timedelta] = []
_waiting: list[Thread] = []


def _wait(act: Callable[[], object], seconds: float = math.inf) -> None:
    """Calls ``act``, which waits for other processes and, being C++, would not heed a signal.
    RuntimeError after so many seconds."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=call, daemon=True)
    _waiting.append(thread)
    thread.start()
    ends = time.monotonic() + seconds
    while thread.is_alive():
        if time.monotonic() > ends:
            raise RuntimeError("somebody is there, but says nothing")
        thread.join(1.0)
    _waiting.remove(thread)
    if errors:
        raise errors[0]


def is_waiting() -> bool:
    """Whether a wait for other processes was given up and goes on in another thread."""
    return any(thread.is_alive() for thread in _waiting)


def _usable(device: str) -> torch.device:
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device={device} cannot be used ({str(error).splitlines()[0]}); use --device cpu"
        ) from error


def _number(variable: str, default: int) -> int:
    """A whole number out of the environment; UsageError if it is something else."""
    text = os.environ.get(variable, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(
            f"{variable}={text[:50]} in the environment is no number of processes; start them with "
            "torchrun, which sets it, or unset it"
        )
    return int(text)


def of_environment() -> Processes:
    """What the environment says of this process and its number; UsageError if that cannot be."""
    ranks, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    _number("LOCAL_RANK", 0)
    if rank >= ranks:
        raise UsageError(
            f"RANK={rank} must be below WORLD_SIZE={ranks}, as the first is 0; start the processes "
            "with torchrun, which sets both, or unset them"
        )
    return Processes(rank, ranks, torch.device("cpu"))


def meet(timeout: float = TIMEOUT) -> Processes:
    """Meets the other processes that ``torchrun`` started, if it did.

    No wait for them will take more than ``timeout`` seconds. Raises UsageError if they do not meet.
    """
    processes = of_environment()
    if processes.ranks == 1 or dist.is_initialized():
        return processes
    _limit[:] = [timedelta(seconds=timeout)]
    try:
        _wait(
            lambda: dist.init_process_group(
                "gloo", rank=processes.rank, world_size=processes.ranks, timeout=_limit[0]
            ),
            timeout + 1,  # PyTorch's own limit is not for one who listens and never answers
        )
    except (RuntimeError, ValueError) as error:  # a variable is missing, or nobody is there
        where = ":".join(os.environ.get(f"MASTER_{part}", "?") for part in ("ADDR", "PORT"))
        raise UsageError(
            f"WORLD_SIZE={processes.ranks} processes do not meet at {where} within {timeout:g} "
            f"seconds, says RANK={processes.rank} ({_short(error)}); start all of them with "
            "torchrun, on a free port, or unset WORLD_SIZE; --timeout sets the limit"
        ) from error
    return processes


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def join(device: str, timeout: float = TIMEOUT) -> Processes:
    """Meets the other processes, and says where this one computes; see :func:`meet` and
    :meth:`Processes.on`, also for what they raise."""
    return meet(timeout).on(device)


def is_loss_of_another(error: RuntimeError) -> bool:
    """Whether a collective failed with ``error`` because another process is no longer there."""
    # Gloo has no exception of its own, but says where in its sources it was.
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def leave() -> None:
    """Parts from the other processes, if there are any."""
    if dist.is_available() and dist.is_initialized() and not is_waiting():
        dist.destroy_process_group()
        _gpu_groups.clear()


class Total(torch.autograd.Function):
    """The sum over all processes; the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, dx: Tensor) -> Tensor:
        dx = dx.clone()
        dist.all_reduce(dx)
        return dx


class SynchronisedBatchNorm(BatchNorm):
    """Batch normalisation over the images of all processes, on the CPU, where
    ``nn.SyncBatchNorm`` does not go."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # the class that it was has none that it needs here

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        wide = x.float()
        count = x.new_full((1,), x.numel() // x.shape[1], dtype=torch.float32)
        total, count = Total.apply(torch.cat([wide.sum(axes), count])).split([x.shape[1], 1])
        shape = (1, -1) + (1,) * (x.dim() - 2)
        mean = total / count
        centred = wide - mean.view(shape)
        variance = Total.apply(centred.square().sum(axes)) / count
        if self.num_batches_tracked is not None:  # so running statistics are kept
            self.num_batches_tracked += 1
            cumulative = 1 / float(self.num_batches_tracked)
            part = cumulative if self.momentum is None else self.momentum
            unbiased = variance * count / (count - 1)
            for kept, seen in ((self.running_mean, mean), (self.running_var, unbiased)):
                assert kept is not None
                kept.lerp_(seen.detach(), part)
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def synchronise_batch_norm(module: nn.Module, processes: Processes) -> None:
    """Makes every batch normalisation in ``module`` one over all processes, under its old name."""
    for name, part in module.named_modules():
        if not isinstance(part, BatchNorm):
            continue
        if type(part) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise UsageError(
                f"{name} is {a(type(part).__name__)}, which cannot be synchronised between "
                "processes; use other --students, or --no-sync-batch-norm"
            )
    if processes.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module, processes.group)
        return
    for part in module.modules():
        if isinstance(part, BatchNorm):
            # In place of a new module: hooks, names and who else holds it stay as they are.
            part.__class__ = SynchronisedBatchNorm
