"""The backends, and the choice among them.

A backend answers whether it can run a problem: yes, or no with the reason. :func:`choose` takes the
first one in the order of the device that says yes; a forced backend that says no raises with its
reason. :data:`BACKEND_NAMES` are the names to force one by: as ``backend=`` of a call or a layer,
with :func:`use_backend`, or in the environment variable MFEF_BACKEND.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

from ..problem import Problem

# The backends, each in the module of its name: what runs anything, then the faster the later. Only
# this line lists them.
BACKEND_NAMES = ("reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class Condition:
    """A test of a problem, and the sentence that says why a problem that fails it is refused."""

    holds: Callable[[Problem], bool]
    otherwise: Callable[[Problem], str]


@dataclass(frozen=True)
class Backend:
    """A named set of operators with the conditions under which they can run.

    name: that of its module.
    conditions: what it asks of a problem, in order.
    operators: what runs each operator, by name, with the arguments of :mod:`mfef_ext.functional`.
    device_type: of the tensors for which the automatic choice asks it; "" for all.
    verified: whether the operators have run on the hardware that they are for. The automatic choice
        asks backends of which that cannot be said last.
    absent: says why it can run nothing at all on this machine, "" where it can.
    """

    name: str
    conditions: tuple[Condition, ...]
    operators: Mapping[str, Callable]
    device_type: str = ""
    verified: bool = True
    absent: Callable[[], str] = lambda: ""

    def supports(self, problem: Problem) -> tuple[bool, str]:
        """(True, "") or (False, the first reason why not)."""
        for condition in self.conditions:
            if not condition.holds(problem):
                return False, condition.otherwise(problem)
        if problem.op not in self.operators:
            return False, f"it has no kernel for {problem.op}"
        return True, ""


def check_backend_name(name: str, what: str = "", remedy: str = "None") -> str:
    """``name`` if it is a backend's, else ValueError listing those that are.

    ``what`` and ``remedy`` word the error: who named it, and how to choose automatically.
    """
    if name not in BACKEND_NAMES:
        raise ValueError(
            f"{what or f'backend={name!r}'} is unknown; "
            f"use one of {', '.join(map(repr, BACKEND_NAMES))}, or {remedy} to choose automatically"
        )
    return name


# Process-wide, not per thread: torch.compile can read (and guard on) a module's global, and a
# data-parallel process wants one answer for all of its threads.
_forced: str | None = os.environ.get("MFEF_BACKEND") or None


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces one backend for every call in the ``with`` block, in the whole process.

    ``None`` restores the automatic choice. Blocks must end in the reverse order of their beginning,
    so two threads must not force different backends at the same time. An explicit ``backend=`` of a
    call or layer wins.
    Raises ValueError for an unknown name.
    """
    global _forced
    if name is not None:
        check_backend_name(name)
    previous = _forced
    _forced = name
    try:
        yield
    finally:
        _forced = previous


def order(device_type: str) -> tuple[Backend, ...]:
    """The backends in their order for tensors on ``device_type``: the fastest first."""
    return _orders.get(device_type, _orders[""])


def by_name(name: str) -> Backend:
    """The backend of that name."""
    return BACKENDS[check_backend_name(name)]


def forced_name(backend: str | None = None) -> str | None:
    """The backend that is forced for a call that asks for ``backend``, or None."""
    return backend if backend is not None else _forced


def choose(problem: Problem, backend: str | None = None) -> Backend:
    """The backend that runs ``problem``.

    ``backend`` (or :func:`use_backend`, or the environment variable MFEF_BACKEND) forces one;
    RuntimeError with the reason if it cannot run the problem.
    """
    forced = backend if backend is not None else _forced
    if forced is not None:
        by_call = backend is not None
        what = f"backend={forced!r}" if by_call else f"{forced!r} (use_backend or MFEF_BACKEND)"
        remedy = "use backend=None" if by_call else "end the with block or unset the variable"
        chosen = by_name(check_backend_name(forced, what, remedy))
        ok, reason = chosen.supports(problem)
        if not ok:
            raise RuntimeError(
                f"{what} cannot run {problem.op}: {reason}; {remedy} to choose automatically"
            )
        return chosen
    candidates = order(problem.device.type)
    for verified in (True, False):
        for candidate in candidates:
            if candidate.verified == verified and candidate.supports(problem)[0]:
                return candidate
    raise AssertionError("the reference backend supports everything")


def register(backend: Backend) -> None:
    """Adds a backend, or replaces the one of its name."""
    BACKENDS[backend.name] = backend
    for device_type in {b.device_type for b in BACKENDS.values()}:
        _orders[device_type] = tuple(
            b for b in reversed(BACKENDS.values()) if b.device_type in ("", device_type)
        )


BACKENDS: dict[str, Backend] = {}
_orders: dict[str, tuple[Backend, ...]] = {}  # by type of device, "" being any other
for _name in BACKEND_NAMES:  # last, since they take what is above from here
    register(import_module(f".{_name}", __name__).BACKEND)
