"""How it is measured: interleaved rounds, percentiles, ratios, the machine's own figures."""

from __future__ import annotations

import importlib
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

# A sample of a fast call repeats it for about this long: the clock's and the threads' wake-up
# costs are then small, and both sides of a ratio see the same caches.
SAMPLE_SECONDS = 2e-3
MAX_CALLS = 50
# A step that takes this long has warmed everything up in one call.
WARM_ENOUGH = 0.1
# Others are warm when so many samples in a row were not faster than the fastest before them.
SETTLED = 3


@dataclass(frozen=True)
class Summary:
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def summarise(values: Sequence[float]) -> Summary:
    return Summary(median(values), percentile(values, 20), percentile(values, 80))


def ratios(slow: Sequence[float], fast: Sequence[float]) -> Summary:
    """Summary of ``slow / fast``, taken round by round: a neighbour's load that slows a whole
    round cancels."""
    return summarise([a / b for a, b in zip(slow, fast, strict=True)])


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def seconds_per_call(step: Callable[[], Any], calls: int, device: str) -> float:
    """Mean time of ``calls`` calls in a row; on a GPU between two events on its stream."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def warm_up(step: Callable[[], Any], device: str) -> int:
    """Calls a step until its times settle; returns how many calls make a sample."""
    fastest = seconds_per_call(step, 1, device)
    if fastest >= WARM_ENOUGH:
        return 1
    since = 0
    while since < SETTLED:
        calls = max(1, min(MAX_CALLS, round(SAMPLE_SECONDS / max(fastest, 1e-9))))
        seconds = seconds_per_call(step, calls, device)
        since = 0 if seconds < fastest else since + 1
        fastest = min(fastest, seconds)
    return calls


def interleave(
    steps: dict[str, Callable[[], Any]],
    device: str,
    budget: float,
    min_rounds: int = 5,
    max_rounds: int = 40,
) -> dict[str, list[float]]:
    """Seconds per call of every step in every round, one round after another.

    All steps run in every round, each time starting with another one, so that none is always
    measured right after the same neighbour. Warm-up first. As many rounds as the budget (seconds)
    allows, between the two bounds.
    """
    calls = {name: warm_up(step, device) for name, step in steps.items()}
    names = list(steps)
    series: dict[str, list[float]] = {name: [] for name in names}
    start = time.monotonic()
    for r in range(max_rounds):
        # Whole rounds only, and none that would end after the budget.
        spent = time.monotonic() - start
        if r >= min_rounds and spent + spent / r > budget:
            break
        first = r % len(names)
        for name in names[first:] + names[:first]:
            series[name].append(seconds_per_call(steps[name], calls[name], device))
    return series


def saved_bytes(step: Callable[[], Any], x: Tensor, parameters: Sequence[Tensor]) -> dict[str, int]:
    """Bytes of the storages that a forward pass keeps for its backward pass.

    ``step`` runs forward and backward. A storage counts once, however many tensors view it.
    Returns ``{"saved": without x and without parameters, "input": x, where it is kept}``.
    """
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    own = kept.pop(x.untyped_storage().data_ptr(), 0)
    return {"saved": sum(kept.values()), "input": own}


def fma_peak(device: str, dtype: torch.dtype, seconds: float = 0.1) -> dict[str, Any]:
    """Floating-point operations ``per_second`` and ``how``; None when they cannot be measured.

    On the CPU: register-only chains of fused multiply-adds of the widest ISA, one Python thread
    per torch thread. On a GPU: the best large matrix product in ``dtype``.
    """
    if device == "cuda":
        a = torch.randn(8192, 8192, device=device).to(dtype)
        best = min(seconds_per_call(lambda: a @ a, 3, device) for _ in range(5))
        return {"per_second": 2 * 8192**3 / best, "how": f"torch.matmul, 8192 x 8192, {dtype}"}
    try:
        fma_chain = importlib.import_module("mfef_ext._C").fma_chain
    except (ImportError, AttributeError):
        how = "not available: this build has no mfef_ext._C.fma_chain"
        return {"per_second": None, "how": how}
    threads = torch.get_num_threads()
    iterations = 10_000
    while True:
        start = time.perf_counter()
        fma_chain(iterations)
        once = time.perf_counter() - start
        if once > seconds / 4:
            break
        iterations *= 4
    iterations = max(1, int(iterations * seconds / once))
    best = max(operations_per_second(fma_chain, iterations, threads) for _ in range(5))
    how = f"mfef_ext._C.fma_chain, float32, on {threads} Python thread(s), best of 5"
    return {"per_second": best, "how": how}


def operations_per_second(chain: Callable[[int], int], iterations: int, threads: int) -> float:
    """Of ``chain(iterations)``, which returns the operations done, on that many threads at once."""
    done: list[int] = []
    workers = [
        threading.Thread(target=lambda: done.append(chain(iterations))) for _ in range(threads)
    ]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - start)


def last_level_cache() -> int:
    """Bytes of the CPU's L3, 256 MiB when the system does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1)
    except (OSError, ValueError):
        return 256 * 2**20


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processor_seconds() -> tuple[float, float, float] | None:
    """Seconds so far of all cores: busy, in all, and those of this process; None off Linux."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; the guests' are in the first two.
    ticks = [int(field) for field in line.split()[1:9]]
    second = os.sysconf("SC_CLK_TCK")
    idle = ticks[3] + ticks[4]
    own = time.process_time()
    return (sum(ticks) - idle) / second, sum(ticks) / second, own


def share_of_others(since: tuple[float, float, float] | None) -> float | None:
    """The share of the cores' time that other processes (and other guests of the host, where it
    tells) took since :func:`processor_seconds`."""
    now = processor_seconds()
    if since is None or now is None or now[1] <= since[1]:
        return None
    busy, every, own = (b - a for a, b in zip(since, now, strict=True))
    return max(0.0, busy - own) / every


def copy_bandwidth(device: str, quick: bool = False) -> dict[str, Any]:
    """Bytes ``per_second``, read and written by a copy of a tensor larger than the caches, and
    ``how`` it was measured."""
    if device == "cuda":
        size = 2**30
    else:
        # Four times the L3, unless that would take more than an eighth of the memory.
        size = max(2**28, min(4 * last_level_cache(), memory_bytes() // 8))
        if quick:
            size = min(size, 2**28)
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    times = [
        seconds_per_call(lambda: target.copy_(source), 1, device) for _ in range(3 if quick else 7)
    ]
    how = f"torch copy of {size // 2**20} MiB, median of {len(times)}, reads and writes counted"
    return {"per_second": 2 * size / median(times), "how": how}
