"""How much of a training step goes into what the method adds to the students."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import nn

from ..distill.method import Batch


class HeadClock:
    """Adds up the time spent in ``method``: blocks, fusion, classifier and every loss term.

    Forward: from the module's entry to its exit. Backward: autograd runs the newest nodes first and
    all of the method's nodes are newer than the students', so the method's backward lasts from the
    start of ``backward()`` until the node that made some student's logits is about to run; a hook
    on these nodes takes the time. Not counted: the optimiser's update of the method's parameters.

    On CUDA every reading waits for the device, which costs some of the overlap of host and device.
    """

    def __init__(self, method: nn.Module, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._entered = 0.0
        self._backward_started: float | None = None
        method.register_forward_pre_hook(self._enter)
        method.register_forward_hook(self._leave)

    def now(self) -> float:
        """Seconds on a steady clock, after everything queued on the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return perf_counter()

    def backward_starts(self) -> None:
        """To be called right before ``backward()``."""
        self._backward_started = self.now()

    def _enter(self, method: nn.Module, arguments: tuple) -> None:
        batch: Batch = arguments[0]
        if not method.training:
            return
        for z in batch.logits:
            if z.grad_fn is not None:
                z.grad_fn.register_prehook(self._students_begin)
        self._entered = self.now()

    def _leave(self, method: nn.Module, arguments: tuple, result: object) -> None:
        if method.training:
            self.seconds += self.now() - self._entered

    def _students_begin(self, gradients: object) -> None:
        if self._backward_started is not None:
            self.seconds += self.now() - self._backward_started
            self._backward_started = None
