"""Which of a few launches runs: timed once per class of problems, on the GPU that is there.

A plan may offer a short list of launches that take the same tensors: tiles with more or fewer
channels, more or fewer warps. The first is what shapes alone would choose. The first call of a
class times them all, on its own tensors, and the fastest is kept for as long as the process lives.
A class is a kernel with its arithmetic, weights and layout, on a device, for maps and batches of
about one size (rounded up to powers of two), so that no last batch of an epoch is timed anew.

Where :func:`pinned` names a reason nothing is timed and the first is taken, for good if the class
is met there for the first time. In deterministic mode it is always the first: the choice, and with
it the order of some sums, may differ from process to process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
import triton
from triton.runtime.errors import OutOfResources

from .launch import ALL_REGISTERS, REGISTERS, Launch

SWITCH = "MFEF_TRITON_AUTOTUNE"
SAMPLES = 5  # of a candidate; their median counts
CALLS = 10  # launches of a sample, at most: the host is slower than a kernel of small maps
SAMPLE = 1.0  # milliseconds per sample, about, unless one launch takes longer
MARGIN = 0.97  # of the first's time: a smaller gain may be chance


class Tile(NamedTuple):
    """What the launches of a list differ in."""

    channels: int
    warps: int
    # Whether a thread may have all registers that there are for it: ptxas, left to itself, makes
    # threads spill so that more blocks fit.
    bounded: bool = False

    @property
    def registers(self) -> int | None:
        return min(REGISTERS, ALL_REGISTERS // (32 * self.warps)) if self.bounded else None


class Choice(NamedTuple):
    which: int
    reason: str


_choices: dict[Hashable, Choice] = {}  # by class
_lock = threading.Lock()  # a choice is made once


def powers_of_two(*sizes: int) -> tuple[int, ...]:
    """Sizes rounded up to powers of two."""
    return tuple([triton.next_power_of_2(size) for size in sizes])


def pinned(device: torch.device) -> str | None:
    """Why launches on the device are not timed now; None if they are."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic mode"
    if device.type != "cuda":
        return f"tensors on {device.type} are not timed"
    if torch.cuda.is_current_stream_capturing():
        return "first met while a CUDA graph was captured"
    return None


def state() -> str:
    """For people: whether launches are timed on a GPU here, and for how many classes they were."""
    why = pinned(torch.device("cuda")) if torch.cuda.is_available() else "no GPU"
    if why is not None:
        return f"off, the first of each list runs ({why})"
    return f"on, {len(_choices)} class(es) of problems met so far; {SWITCH}=0 turns it off"


def milliseconds(launch: Launch, tensors: tuple) -> float:
    """The median time of a launch on the current stream; infinite if the GPU cannot hold it."""

    def sample(calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            launch(*tensors)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    try:
        launch(*tensors)  # compiles
    except OutOfResources:
        return float("inf")
    calls = min(max(int(SAMPLE / max(sample(1), SAMPLE / CALLS)), 1), CALLS)
    return median([sample(calls) for _ in range(SAMPLES)])


class Tuned(Launch):
    """The launch of a list that is the fastest for a class of problems.

    Args:
        candidates: by what is said of them; the first is taken where nothing is timed. They may be
            launched again and again with the same tensors, which get the same values from each.
        problem: the class, but for the kernel, the candidates and the device.
        device: of the tensors.
        deterministic: whether it is always the first.
    """

    def __init__(
        self,
        candidates: Mapping[str, Launch],
        problem: Hashable,
        device: torch.device,
        deterministic: bool,
    ) -> None:
        self.names, self.candidates = tuple(candidates), tuple(candidates.values())
        kernel = self.candidates[0].kernel.__name__
        self.problem, self.device = (kernel, self.names, device, problem), device
        self.choice: Choice | None
        self._take(Choice(0, "deterministic mode") if deterministic else None)

    def _take(self, choice: Choice | None) -> None:
        """Becomes the candidate of the choice, with the code that it remembers."""
        # At once, since other threads may be about to launch.
        self.__dict__.update(vars(self.candidates[choice.which if choice else 0]), choice=choice)

    def look_up(self) -> None:
        """Takes what the class has chosen, if it has."""
        if self.choice is None:
            self._take(_choices.get(self.problem))

    def _bind(self, tensors: tuple) -> None:
        if self.choice is None:
            with _lock:
                if self.problem not in _choices:
                    _choices[self.problem] = self._choose(tensors)
                self.look_up()
            self(*tensors)
        else:
            super()._bind(tensors)

    def _choose(self, tensors: tuple) -> Choice:
        why = pinned(self.device)
        if why is not None:
            return Choice(0, why)
        times = [milliseconds(launch, tensors) for launch in self.candidates]
        best = times.index(min(times))
        if times[best] > MARGIN * times[0]:
            best = 0
        said = ", ".join(f"{1000 * t:.1f}" for t in times)
        return Choice(best, f"{said} microseconds at its first call")

    def choices(self) -> str:
        why = pinned(self.device) or "the first call will time them"
        chosen, why = self.choice or (0, why)
        names = [f"{n} (chosen)" if i == chosen else n for i, n in enumerate(self.names)]
        return f"of {', '.join(names)}: {why}"


def fastest_tile(
    tiles: Sequence[Tile],
    launch: Callable[[Tile], Launch],
    problem: tuple,
    device: torch.device,
    deterministic: bool,
) -> Launch:
    """``launch`` of the tile that is the fastest for a class: see :class:`Tuned`."""
    if len(tiles) == 1:
        return launch(tiles[0])
    several = len({tile.channels for tile in tiles}) > 1
    candidates = {
        f"{tile.channels} channels, " * several + f"{tile.warps} warps": launch(tile)
        for tile in tiles
    }
    return Tuned(candidates, problem, device, deterministic)
