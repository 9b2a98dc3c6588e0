"""What SIGTERM does to a command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM; as Ctrl-C it is no Exception, so that nothing takes it for an error of its own."""


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


@contextmanager
def sigterm_raises(*, for_good: bool = False) -> Iterator[None]:
    """Within, the first SIGTERM raises :class:`Terminated`, and another one does nothing, unless
    who called has it ignored. ``for_good``: nor does one afterwards, as the process ends."""
    before = signal.getsignal(signal.SIGTERM)
    in_main = threading.current_thread() is threading.main_thread()
    if before in (signal.SIG_IGN, _terminate) or not in_main:  # other threads cannot set it
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        after = signal.SIG_IGN if for_good else before
        signal.signal(signal.SIGTERM, signal.SIG_DFL if after is None else after)
