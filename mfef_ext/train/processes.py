"""Several processes that train one set of weights, started by ``torchrun``; or just this one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from . import UsageError

T = TypeVar("T")


class SaidElsewhere(Exception):
    """Why an error is raised here that another process has met, and says."""


@dataclass(frozen=True)
class Processes:
    """This process is the ``rank``-th of ``ranks`` and computes on ``device``."""

    rank: int
    ranks: int
    device: torch.device

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
        dist.broadcast_object_list(answer, 0)
        if isinstance(answer[1], Exception):
            raise answer[1] from (SaidElsewhere() if self.rank else answer[1].__cause__)
        return answer[0]  # type: ignore[return-value]

    def together(self, act: Callable[[], T]) -> T:
        """What ``act``, which all processes call, returns here, once all are done with it; what it
        raises in one of them, of several the first, is raised in all."""
        if self.ranks == 1:
            return act()
        answer: list[T] = []
        errors: list[Exception | None] = [None] * self.ranks
        try:
            answer.append(act())
        except Exception as error:
            dist.all_gather_object(errors, error)
            if not any(errors[: self.rank]):
                raise
        else:
            dist.all_gather_object(errors, None)
        for elsewhere in errors:
            if elsewhere is not None:
                raise elsewhere from SaidElsewhere()
        return answer[0]

    def in_turn(self, act: Callable[[], T]) -> T:
        """As :meth:`together`, with process 0 done before the others begin."""
        mine: list[T] = []
        self.first(lambda: mine.append(act()))
        return self.together(lambda: mine[0] if mine else act())

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' ``values``, which it replaces."""
        if self.ranks > 1:
            dist.all_reduce(values)
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
            self.together(lambda: synchronise_batch_norm(module, self.device))
        return DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=unused,
        )


def join(device: str) -> Processes:
    """Meets the other processes that ``torchrun`` started, if it did.

    Raises UsageError if ``device`` cannot be used, or is one GPU for several processes, or if these
    do not meet.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if ranks > 1 and device.startswith("cuda:"):
        raise UsageError(
            f"--device={device} is one GPU for {ranks} processes; use --device cuda, of which each "
            "takes its own"
        )
    local = os.environ.get("LOCAL_RANK", "0")
    if ranks > 1 and device == "cuda":
        device = f"cuda:{local}"
    try:
        there = torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        # Where there is no GPU at all, the first process of the machine says so.
        said = local != "0" and not torch.cuda.is_available()
        raise UsageError(
            f"--device={device} cannot be used ({str(error).splitlines()[0]}); use --device cpu"
        ) from (SaidElsewhere() if said else error)
    if ranks > 1 and not dist.is_initialized():
        if there.type == "cuda":
            torch.cuda.set_device(there)
        try:
            dist.init_process_group("nccl" if there.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:  # a variable is missing, or nobody is there
            raise UsageError(
                f"WORLD_SIZE={ranks} processes do not meet ({str(error).splitlines()[0]}); start "
                "them with torchrun, or unset WORLD_SIZE"
            ) from error
    return Processes(rank, ranks, there)


def is_loss_of_another(error: RuntimeError) -> bool:
    """Whether a collective failed with ``error`` because another process is no longer there."""
    # Gloo has no exception of its own, but says where in its sources it was.
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def leave() -> None:
    """Parts from the other processes, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


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


class SynchronisedBatchNorm(_BatchNorm):
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


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Makes every batch normalisation in ``module`` one over all processes, under its old name."""
    for name, part in module.named_modules():
        if not isinstance(part, _BatchNorm):
            continue
        if type(part) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise UsageError(
                f"{name} is a {type(part).__name__}, which cannot be synchronised between "
                "processes; use other --students, or --no-sync-batch-norm"
            )
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            # In place of a new module: hooks, names and who else holds it stay as they are.
            part.__class__ = SynchronisedBatchNorm
