"""Measures the fused block against eager PyTorch and torch.compile.

    python benchmarks/bench_fusion.py                      everything, within five minutes
    python benchmarks/bench_fusion.py --quick              one shape per suite, about 40 seconds
    python benchmarks/bench_fusion.py --table results.json the tables of an earlier run, in Markdown

A case is timed only after its numbers were checked: outputs and all gradients against float64,
with an error of at most twice that of eager PyTorch in the same dtype plus one unit in the last
place of the largest magnitude. Wrong numbers give the exit status 1, wrong options 2.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
import suites
import timing
import torch
from suites import BOTH, DIRECTIONS, DTYPES, LAYOUTS, SHAPES, Case, Layout, Operands
from torch import Tensor

from mfef_ext import backends, functional, problem, reference

DEFAULT_SECONDS, QUICK_SECONDS = 290, 40
# On a GPU the launch overhead is a large part of an eager step, so the modes that remove it are
# baselines too. On the CPU they do nothing.
CUDA_COMPILE_MODES = ("reduce-overhead", "max-autotune")
GRACE = 5  # seconds that a compilation may take past the deadline before it is given up
# Float64 on the CPU manages a few GFLOP/s here: the check takes as many images as fit in this
# many operations of the forward pass.
CHECK_OPS = 4e8
# A largest error of few images is a draw of luck: fewer than these are drawn several times.
CHECK_IMAGES = 8
# In a tensor of fewer elements than these one cancellation decides, and eager may have been lucky
# in it: where one draw fails, the median of so many draws is what counts.
FEW, FEW_DRAWS = 32, 12
# The same block seen in a mirror is the same sums in another order: eager's error is the largest of
# these, in both layouts.
MIRRORS = ((), (2,), (3,), (2, 3))

Step = Callable[[], tuple[Tensor, dict[str, Tensor]]]


class Budget:
    """The time this run may take."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def left(self) -> float:
        return self.deadline - time.monotonic()


# --- who takes part ---------------------------------------------------------------------------


def candidate_function(backend: str) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        return functional.mfef_block(*arguments, backend=backend)

    return run


def candidates(case: Case, operands: Operands, forced: str | None) -> dict[str, str]:
    """Backend -> "" if it can run the case, else the reason why not. The reference takes part
    only when it is asked for by name: it is the eager baseline."""
    x = operands.x
    split = True
    described = (*operands.arguments, split)
    asked = problem.describe_mfef_block(*described)
    if forced is not None:
        names = [forced]
    else:
        names = [b.name for b in backends.order(x.device.type) if b.name != "reference"]
    return {name: backends.by_name(name).supports(asked)[1] for name in names}


def compile_baselines(device: str) -> list[tuple[str, Layout, str | None]]:
    """(name, layout, mode) of every torch.compile baseline of a device."""
    modes = (None, *CUDA_COMPILE_MODES) if device == "cuda" else (None,)
    return [
        (f"compile {mode + ' ' if mode else ''}{layout}", layout, mode)
        for mode in modes
        for layout in LAYOUTS
    ]


# --- correctness ------------------------------------------------------------------------------


def unit_in_last_place(magnitude: float, dtype: torch.dtype) -> float:
    """The spacing of ``dtype`` at a magnitude."""
    if magnitude == 0 or not math.isfinite(magnitude):
        return 0.0
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(magnitude))


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite for NaN, infinity or another shape."""
    if actual.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    error = (actual.double() - expected).abs().max().item()
    return error if math.isfinite(error) else math.inf


def images_without_ties(exact: Operands) -> Tensor:
    """Which images have no maximum that rounding to float32 could move to another element.

    The gradient of a maximum goes to one element. Where the two largest are closer than float32
    resolves, either is a right answer and the gradients differ by all of it.
    """
    with torch.no_grad():
        y = reference.multi_scale_conv2d(*exact.arguments[:3])
        _, z, _ = reference.attention_gates(y, *exact.attention)
        clear = torch.ones(y.shape[0], dtype=torch.bool, device=y.device)
        for values, dim in ((y.flatten(2), 2), (z.flatten(2), 1)):
            if values.shape[dim] < 2:
                continue
            first, second = values.topk(2, dim=dim).values.unbind(dim)
            scale = 32 * torch.finfo(torch.float32).eps * values.abs().amax(dim)
            clear &= (first - second > scale).flatten(1).all(1)
    return clear


def check_images(case: Case) -> Tensor:
    """The images that are compared with float64: spread over the batch, first and last included."""
    per_image = suites.count_work(case).naive_ops / case.batch / (3 if case.backward else 1)
    count = max(1, min(case.batch, int(CHECK_OPS / per_image)))
    return torch.linspace(0, case.batch - 1, count).round().long().unique()


@dataclass
class Draw:
    """Errors of one draw of a case, in units in the last place of a tensor's largest magnitude."""

    eager: dict[str, float]  # by tensor; the largest over layouts and mirrors
    errors: dict[tuple[Layout, str], float]
    unit: dict[str, float]
    few: set[str]  # the tensors that are judged by the median


def draw_errors(case: Case, backend: str, images: Tensor, seed: int) -> Draw:
    """Runs a backend and eager PyTorch once, in both layouts. Raises WrongError for what no error
    can measure."""
    dtype, device = DTYPES[case.dtype], images.device.type
    operands = suites.make_operands(case, device, seed=seed)
    exact = operands.to(torch.float64, images=images)
    used = torch.zeros(case.batch, dtype=torch.bool, device=device)
    used[images] = images_without_ties(exact) if dtype == torch.float32 else True
    with torch.no_grad():
        operands.grad_out[~used] = 0
        exact.grad_out[~used[images]] = 0
    expected = results(reference.mfef_block, exact, case.backward)
    unit = {
        name: unit_in_last_place(value.abs().max().item(), dtype) or torch.finfo(dtype).tiny
        for name, value in expected.items()
    }
    few = {name for name, value in expected.items() if int(value.count_nonzero()) < FEW}
    draw = Draw({}, {}, unit, few)
    for layout in LAYOUTS:
        chosen = operands.to(layout=layout, images=images)
        for mirror in MIRRORS:
            eager = results(reference.mfef_block, chosen.mirrored(mirror), case.backward)
            for name, value in expected.items():
                turned = eager[name].flip(mirror) if value.dim() == 4 else eager[name]
                error = largest_error(turned, value) / unit[name]
                draw.eager[name] = max(draw.eager.get(name, 0.0), error)
        try:
            given = operands.to(layout=layout)
            actual = results(candidate_function(backend), given, case.backward)
        except Exception as raised:
            raise WrongError(f"{layout}: {short(raised)}") from raised
        for name, value in actual.items():
            if value.dtype != dtype:
                raise WrongError(f"{layout}: {name} has dtype {value.dtype}")
            if name in ("output", "gradient of x") and value.shape[0] == case.batch:
                others = torch.ones(case.batch, dtype=torch.bool, device=device)
                others[images] = False
                if not value[others].isfinite().all():
                    raise WrongError(f"{layout}: {name} is not finite everywhere")
                value = value[images]
            draw.errors[layout, name] = largest_error(value, expected[name]) / unit[name]
    return draw


def check(case: Case, backend: str, device: str) -> dict[str, Any]:
    """Compares a backend with float64: ``{"status": "right" or "WRONG", "reason": ...}``.

    The whole batch runs, so that the plan which is timed is the plan which is checked. Float64
    takes some images of it, and the output's gradient is zero on all others, so the gradients of
    the parameters are theirs alone.
    """
    images = check_images(case).to(device)
    planned = math.ceil(CHECK_IMAGES / len(images))
    try:
        draws = [draw_errors(case, backend, images, seed) for seed in range(planned)]
        verdict = judge(draws)
        if verdict.few_alone:
            draws += [draw_errors(case, backend, images, s) for s in range(planned, FEW_DRAWS)]
            verdict = judge(draws)
    except WrongError as error:
        return {"status": "WRONG", "reason": str(error)}
    if verdict.reason:
        return {"status": "WRONG", "reason": verdict.reason}
    return {
        "status": "right",
        "reason": "",
        "images": len(images),
        "of": case.batch,
        "draws": len(draws),
        "error_of_allowed": verdict.worst,
    }


@dataclass
class Verdict:
    worst: float  # the largest error, of the allowed one
    reason: str  # what is wrong, "" for nothing
    few_alone: bool  # nothing but tensors of few elements is wrong


def judge(draws: list[Draw]) -> Verdict:
    """The rule of this file, over the draws: the largest errors count, on both sides; of tensors of
    few elements, the median draw."""
    worst, reasons, few_alone = 0.0, [], True
    for key in draws[0].errors:
        layout, name = key
        few = any(name in draw.few for draw in draws)
        pairs = [(draw.errors[key], 2 * draw.eager[name] + 1) for draw in draws]
        if few:
            share = statistics.median(error / allowed for error, allowed in pairs)
        else:
            share = max(e for e, _ in pairs) / max(a for _, a in pairs)
        worst = max(worst, share)
        if not share <= 1:
            few_alone = few_alone and few
            unit = max(draw.unit[name] for draw in draws)
            reasons.append(
                f"{layout}: {name} is off by {max(e for e, _ in pairs) * unit:.3g}, "
                f"{share:.3g} times what is allowed"
            )
    return Verdict(worst, reasons[0] if reasons else "", few_alone and bool(reasons))


class WrongError(Exception):
    """Why a candidate is wrong, where no comparison of numbers says it."""


def results(function: Callable[..., Tensor], operands: Operands, backward: bool) -> dict:
    """Output and gradients by name."""
    out, grads = suites.make_step(function, operands, backward)()
    return {"output": out.detach()} | {f"gradient of {k}": v for k, v in grads.items()}


def short(error: BaseException) -> str:
    """An exception in one line, without the folders that its message may name."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    line = " ".join(
        word if os.sep not in word else word.rstrip(os.sep).rsplit(os.sep, 1)[-1]
        for word in lines[0].split()
    )
    return f"{type(error).__name__}: {line[:160]}"


# --- torch.compile ----------------------------------------------------------------------------


def configure_compiler(threads: int) -> None:
    """Settings that every process compiling for this run shares."""
    import torch._inductor.config as inductor

    torch._logging.set_logs(all=logging.ERROR)
    # Generated C++ has the number of threads written into it, and the compiler's cache of older
    # versions does not know of it (pytorch issue 167463); a set value is part of the cache's key.
    inductor.cpp.threads = threads


def compiled_step(case: Case, operands: Operands, mode: str | None) -> Step:
    """A step through torch.compile. Nothing is compiled before its first call."""
    function = torch.compile(reference.mfef_block, dynamic=False, mode=mode)
    before = torch.compiler.cudagraph_mark_step_begin if mode in CUDA_COMPILE_MODES else None
    return suites.make_step(function, operands, case.backward, before)


def compile_ahead(job: tuple[Case, Layout, str, int, float]) -> tuple[Case, Layout, str]:
    """Compiles one baseline in a worker process, so that the compiler's cache on disk has it.

    Returns "" when it did, "budget" when the deadline (time.time()) was past, else the failure.
    """
    case, layout, device, threads, deadline = job
    if time.time() > deadline:
        return case, layout, "budget"
    try:
        torch.set_num_threads(threads)
        configure_compiler(threads)
        torch._dynamo.reset()
        compiled_step(case, suites.make_operands(case, device, layout), None)()
    except Exception as error:
        return case, layout, f"failed: {short(error)}"
    return case, layout, ""


def compile_all(
    cases: list[Case], device: str, threads: int, seconds: float
) -> dict[tuple[Case, Layout], str]:
    """Compiles every baseline, in processes side by side, until the seconds are used up.

    Nothing is timed meanwhile. Loading a compiled function later takes a fifth of a second, and
    a second run of the benchmark finds all of them. The paper's cases come first, then float32,
    then forward+backward. Returns what :func:`compile_ahead` said for each.
    """
    ordered = sorted(
        cases, key=lambda c: (c.suite != "paper", c.dtype != "float32", c.direction != BOTH)
    )
    deadline = time.time() + seconds
    jobs = [(c, layout, device, threads, deadline) for c in ordered for layout in LAYOUTS]
    outcome: dict[tuple[Case, Layout], str] = {(c, layout): "budget" for c, layout, *_ in jobs}
    workers = min(len(jobs), len(os.sched_getaffinity(0)), 8)
    with one_compile_thread(), multiprocessing.get_context("spawn").Pool(workers) as pool:
        done = pool.imap_unordered(compile_ahead, jobs)
        for _ in jobs:
            try:
                # What is still being compiled a little after the deadline is given up.
                case, layout, said = done.next(timeout=max(0.0, deadline + GRACE - time.time()))
            except multiprocessing.TimeoutError:
                break
            outcome[case, layout] = said
        else:
            # Workers that end by themselves release their semaphores; those that are ended do not.
            pool.close()
            pool.join()
    return outcome


@contextmanager
def one_compile_thread() -> Iterator[None]:
    """The processes are the parallelism: each compiles with one thread."""
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# --- one case ---------------------------------------------------------------------------------


def run_case(
    case: Case,
    options: argparse.Namespace,
    budget: Budget,
    cases_left: int,
    compiled: dict[tuple[Case, Layout], str],
) -> dict[str, Any]:
    """Checks, times and describes one case as a row of results.json."""
    device = options.device
    row: dict[str, Any] = asdict(case) | asdict(suites.count_work(case))
    row |= {"shape": case.shape, "status": "timed", "reason": "", "checks": {}, "contestants": {}}
    if budget.left() <= 0:
        return row | {"status": "not run", "reason": "the time budget was used up (see --seconds)"}

    by_layout = {layout: suites.make_operands(case, device, layout) for layout in LAYOUTS}
    entries = row["contestants"]
    steps: dict[str, Step] = {}

    for backend, why_not in candidates(case, by_layout["contiguous"], options.backend).items():
        if why_not:
            entries[backend] = {"kind": "candidate", "status": "not run", "reason": why_not}
            continue
        verdict = check(case, backend, device)
        row["checks"][backend] = verdict
        if verdict["status"] == "WRONG":
            entries[backend] = {"kind": "candidate"} | verdict
            row |= {"status": "WRONG", "reason": f"{backend}: {verdict['reason']}"}
            continue
        for layout in LAYOUTS:
            name = f"{backend} {layout}"
            entries[name] = {"kind": "candidate", "backend": backend, "layout": layout}
            steps[name] = suites.make_step(
                candidate_function(backend), by_layout[layout], case.backward
            )
    if row["status"] == "WRONG" and not steps:
        return row
    if not steps:
        row["reason"] = "no candidate: " + "; ".join(e["reason"] for e in entries.values())

    for layout in LAYOUTS:
        entries[f"eager {layout}"] = {"kind": "baseline", "layout": layout}
        steps[f"eager {layout}"] = suites.make_step(
            reference.mfef_block, by_layout[layout], case.backward
        )
    torch._dynamo.reset()
    for name, layout, mode in compile_baselines(device):
        entries[name] = {"kind": "baseline", "layout": layout}
        why_not = compile_reason(case, layout, mode, options, budget, cases_left, compiled)
        if not why_not:
            step = compiled_step(case, by_layout[layout], mode)
            try:
                step()
                steps[name] = step
                continue
            except Exception as error:
                why_not = f"failed: {short(error)}"
        failed = why_not.startswith("failed: ")
        entries[name] |= {
            "status": "failed" if failed else "not run",
            "reason": why_not.removeprefix("failed: "),
        }

    share = budget.left() / cases_left
    # Half of a case's share goes to the rounds: warm-up and checks take the rest.
    series = timing.interleave(steps, device, share / 2, min_rounds=5 if share > 1 else 3)
    for name, values in series.items():
        entries[name] |= {"status": "timed", "rounds": len(values)} | asdict(
            timing.summarise(values)
        )
    row |= compare(series, entries)
    if case.backward:
        row["saved"] = saved(case, by_layout["contiguous"], entries)
    return row


def compile_reason(
    case: Case,
    layout: Layout,
    mode: str | None,
    options: argparse.Namespace,
    budget: Budget,
    cases_left: int,
    compiled: dict[tuple[Case, Layout], str],
) -> str:
    """Why a compile baseline does not run, or ""."""
    if options.no_compile:
        return "left out by --no-compile"
    if mode is None:
        said = compiled.get((case, layout), "budget")
        return "compiling it did not fit the time budget" if said == "budget" else said
    # These measure kernels while they compile, so they cannot be compiled side by side.
    if case.suite != "paper":
        return "compile modes are run for the suite paper only"
    if budget.left() < 3 * cases_left:
        return "compiling it did not fit the time budget"
    return ""


def compare(series: dict[str, list[float]], entries: dict[str, Any]) -> dict[str, Any]:
    """Ratios baseline / candidate, round by round.

    The fastest baseline is the one with the smallest ratio: in a noisy run that need not be the
    one with the smallest median time, and it is never the kinder choice.
    """
    baselines = [n for n in series if entries[n]["kind"] == "baseline"]
    found: dict[str, Any] = {}
    for name in series:
        if entries[name]["kind"] == "candidate":
            against = {b: asdict(timing.ratios(series[b], series[name])) for b in baselines}
            fastest = min(baselines, key=lambda b: against[b]["median"])
            found[name] = against | {"fastest": against[fastest] | {"baseline": fastest}}
    every = all(e.get("status") == "timed" for e in entries.values() if e["kind"] == "baseline")
    return {"all_baselines_ran": every, "ratios": found}


def add_achieved(row: dict[str, Any], figures: dict[str, Any]) -> None:
    """Adds to every timed contestant its fractions of the machine's own figures; None where the
    machine's figure is missing."""
    peak = figures["fma_peak"][row["dtype"]]["per_second"]
    copy = figures["copy_bandwidth"]["per_second"]
    for entry in row["contestants"].values():
        if entry["status"] == "timed":
            seconds = entry["median"]
            entry["naive_of_peak"] = row["naive_ops"] / seconds / peak if peak else None
            entry["real_of_peak"] = row["real_ops"] / seconds / peak if peak else None
            entry["bytes_of_copy"] = row["bytes_floor"] / seconds / copy


def saved(case: Case, operands: Operands, entries: dict[str, Any]) -> dict[str, Any]:
    """Bytes kept for backward by eager PyTorch and by each candidate, contiguous."""
    functions: dict[str, Callable[..., Tensor]] = {"eager": reference.mfef_block}
    for entry in entries.values():
        if entry["kind"] == "candidate" and entry["status"] == "timed":
            functions[entry["backend"]] = candidate_function(entry["backend"])
    return {
        name: timing.saved_bytes(
            suites.make_step(function, operands, backward=True),
            operands.x,
            list(operands.parameters.values()),
        )
        for name, function in functions.items()
    }


# --- the run ----------------------------------------------------------------------------------


def machine_figures(device: str, dtypes: list[str], quick: bool) -> dict[str, Any]:
    """FMA peak and copy bandwidth, measured now."""
    # The CPU's peak is that of float32 for every dtype: bfloat16 is accumulated in float32.
    peaks = {
        dtype: timing.fma_peak(device, DTYPES[dtype])
        for dtype in (dtypes if device == "cuda" else dtypes[:1])
    }
    bandwidth = timing.copy_bandwidth(device, quick)
    return {
        "fma_peak": {dtype: peaks.get(dtype, peaks[dtypes[0]]) for dtype in dtypes},
        "copy_bandwidth": bandwidth,
    }


def larger_figures(begin: dict[str, Any], end: dict[str, Any]) -> dict[str, Any]:
    """The larger of the figures at the beginning and at the end of the run.

    The neighbours' load moves them, and what a candidate is held against is what the machine can
    do when it is let. Both readings stay in the file.
    """

    def larger(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        readings = [a["per_second"], b["per_second"]]
        known = [r for r in readings if r is not None]
        return a | {"per_second": max(known, default=None), "readings": readings}

    return {
        "fma_peak": {d: larger(begin["fma_peak"][d], end["fma_peak"][d]) for d in end["fma_peak"]},
        "copy_bandwidth": larger(begin["copy_bandwidth"], end["copy_bandwidth"]),
    }


def selected(options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for."""
    cases = suites.select(
        tuple(options.suite), tuple(options.dtype), tuple(options.direction), options.quick
    )
    return [case for case in cases if options.shape is None or case.shape in options.shape]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that results.json holds."""
    budget = Budget(options.seconds)
    device = options.device
    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    configure_compiler(threads)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # the baselines get cuDNN's best algorithm
    cases = selected(options)
    environment = report.environment(device)
    figures = machine_figures(device, options.dtype, options.quick)
    print(report.heading(environment, figures), flush=True)

    compiled: dict[tuple[Case, Layout], str] = {}
    if not options.no_compile:
        # Half of the time at most is kept for checks and rounds; the compiler gets the rest.
        reserve = min(0.5 * options.seconds, 3 * len(cases))
        print("compiling the torch.compile baselines ...", flush=True)
        compiled = compile_all(cases, device, threads, budget.left() - reserve)
    rows = []
    since = timing.processor_seconds()
    # float32 of every suite first: what the budget cannot hold is then bfloat16.
    for i, case in enumerate(sorted(cases, key=lambda c: c.dtype != "float32")):
        rows.append(run_case(case, options, budget, len(cases) - i, compiled))
        print(report.progress_line(rows[-1]), flush=True)
    figures = larger_figures(figures, machine_figures(device, options.dtype, options.quick))
    environment["share_of_others"] = timing.share_of_others(since)
    for row in rows:
        add_achieved(row, figures)
    return report.assemble(environment, figures, vars(options), rows)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--suite", nargs="+", choices=SHAPES, default=list(SHAPES))
    p.add_argument("--shape", nargs="+", metavar="NxCxHxW", help="only these, as 128x64x8x8")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    p.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument(
        "--backend",
        choices=backends.BACKEND_NAMES,
        help="the candidate; default: every backend of the device but the reference",
    )
    p.add_argument("--quick", action="store_true", help="one shape per suite, about 40 seconds")
    p.add_argument(
        "--seconds",
        type=float,
        help=f"what the whole run may take; default {DEFAULT_SECONDS}, {QUICK_SECONDS} with --quick"
        "\nmore of it lets more torch.compile baselines be compiled; they are kept on disk",
    )
    p.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    p.add_argument(
        "--convolution",
        choices=("direct", "fft"),
        help="force this convolution of the CPU kernels wherever they have it, to judge it",
    )
    p.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    p.add_argument("--out", type=Path, help="folder; default: benchmarks/out/<device>-<number>")
    p.add_argument(
        "--table",
        type=Path,
        metavar="RESULTS.JSON",
        help="measure nothing: print the Markdown tables of an earlier run",
    )
    return p


def check_options(options: argparse.Namespace) -> str:
    """Fills in the defaults that depend on the machine. What is wrong, or ""."""
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch sees no CUDA device here; use --device cpu"
    if options.threads is not None and not 1 <= options.threads <= 1024:
        return f"--threads {options.threads} must be from 1 to 1024"
    if not selected(options):
        options.shape, asked = None, options.shape
        there = ", ".join(dict.fromkeys(case.shape for case in selected(options)))
        return f"--shape {' '.join(asked)} is no case of what is selected; there are {there}"
    if options.seconds is None:
        options.seconds = QUICK_SECONDS if options.quick else DEFAULT_SECONDS
    elif not 1 <= options.seconds < math.inf:
        return f"--seconds {options.seconds} must be at least 1"
    if options.backend is not None:
        first = selected(options)[0]
        operands = suites.make_operands(first, options.device)
        why_not = candidates(first, operands, options.backend)[options.backend]
        if why_not:
            return f"--backend {options.backend} cannot run here: {why_not}"
    if options.out is None:
        root = Path(__file__).parent / "out"
        number = 1
        while (root / f"{options.device}-{number}").exists():
            number += 1
        options.out = root / f"{options.device}-{number}"
    if options.out == Path():
        return "--out is empty; name a folder"
    for name in ("results.json", "results.csv", "plot.png"):
        if (options.out / name).exists():
            return f"--out {options.out} holds {name} of another run; name another folder"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--out {options.out} cannot be made: {error.strerror}"
    if not os.access(options.out, os.W_OK):
        return f"--out {options.out} cannot be written to"
    return ""


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.table is not None:
        try:
            print(report.markdown(report.read_json(options.table)))
        except (OSError, ValueError) as error:
            print(f"bench_fusion: --table {options.table}: {error}", file=sys.stderr)
            return 2
        return 0
    problem_with_options = check_options(options)
    if problem_with_options:
        print(f"bench_fusion: {problem_with_options}", file=sys.stderr)
        return 2
    if options.convolution:
        importlib.import_module("mfef_ext._C").force_cpu_convolution(options.convolution)
    try:
        result = run(options)
    except KeyboardInterrupt:
        print("bench_fusion: interrupted; nothing was written", file=sys.stderr)
        return 130
    written = report.write(result, options.out)  # first: standard output may be closed by now
    print(report.text(result))
    print(written)
    return 1 if any(row["status"] == "WRONG" for row in result["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
