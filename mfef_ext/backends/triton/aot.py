"""Compiles every kernel in every configuration, on any machine, and says what the code takes.

    python -m mfef_ext.backends.triton.aot                 the table, for sm_80, sm_90 and sm_100
    python -m mfef_ext.backends.triton.aot --only kd       of one file's kernels
    python -m mfef_ext.backends.triton.aot --smoke         of one case of every kernel
    python -m mfef_ext.backends.triton.aot --all           of every launch of the benchmark's cases

No GPU is needed. The operators themselves run, on meta tensors, under a driver that launches
nothing: so Triton derives types, constants and divisibility from the arguments that a real launch
would have. Of the launches of all cases, one is compiled of each :meth:`Specialisation.kind`.

The exit status is 1 if a kernel spills registers or takes more shared memory than the smallest of
the GPUs has, 2 if nothing could be compiled.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import interpreted
from .launch import ALL_REGISTERS, Launch
from .tuning import Tuned

FILES = ("conv", "attention", "kd")
ARCHITECTURES = (80, 90, 100)
# What one block may have on compute capability 8.6, 8.9 and 12.0; 8.0 has 163 KiB, 9.0 and 10.0
# have 227.
SHARED_MEMORY = 99 * 1024

# Of a launch; the others that Triton has are left as they are.
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")

# See Specialisation.kind.
ALIKE = ("COUNT", "TOTAL", "TILES", "SAVE", "weight_c", "weight_h", "weight_w")

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


# --- cases --------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One forward of an operator, and backward.

    shape: (N, C, side) of the map, (S, N, classes) of the logits. channels_last: the weights, too.
    others: not what runs where nothing is tuned, but the other candidates of its launches alone.
    """

    operator: str
    dtype: str
    shape: tuple[int, int, int]
    channels_last: bool = False
    groups: tuple[int, ...] = (1, 4, 8, 16)
    split: bool = True
    backward: bool = True
    others: bool = False

    def __str__(self) -> str:
        if self.operator == "kd_loss":
            return "{} losses of {}x{}, ".format(*self.shape) + self.dtype
        n, channels, side = self.shape
        words = [f"{n}x{channels}x{side}x{side}", self.dtype]
        words += ["channels_last"] * self.channels_last + ["split=False"] * (not self.split)
        words += ["attention alone"] * (self.operator == "dual_attention")
        words += ["inference"] * (not self.backward)
        branches = len(self.groups)
        words += [f"{branches} branch" + "es" * (branches > 1)] * (branches != 4)
        words += ["other choices"] * self.others
        return " ".join(words)

    def run(self) -> None:
        from . import kd, ops  # whether kernels are interpreted is settled when they are imported

        def launch_others(launch: Launch, *tensors: Any) -> None:
            for other in launch.candidates[1:] if isinstance(launch, Tuned) else ():
                other._bind(tensors)

        with ExitStack() as patches:
            for m in (kd, ops):
                no_device = mock.patch.object(m, "device_of", lambda x: nullcontext())
                patches.enter_context(no_device)
            if self.others:
                patches.enter_context(mock.patch.object(Launch, "__call__", launch_others))
            if self.operator == "kd_loss":
                self._run_losses()
            else:
                self._run_maps()

    def _empty(self, *shape: int) -> Tensor:
        layout = torch.contiguous_format
        if self.channels_last and len(shape) == 4:
            layout = torch.channels_last
        return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta", memory_format=layout)

    def _run_losses(self) -> None:
        from . import kd

        losses, *shape = self.shape
        students, targets = ([self._empty(*shape) for _ in range(losses)] for _ in range(2))
        loss = kd._kd_loss(students, targets, 3.0, False)
        kd._kd_loss_backward(loss, students, targets, 3.0, True, True)

    def _run_maps(self) -> None:
        from . import ops

        n, channels, side = self.shape
        hidden = max(channels // 16, 1)
        mlp = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
        attention = [self._empty(*shape) for shape in (*mlp, (1, 2, 7, 7))]
        x = self._empty(n, channels, side, side)
        each = channels // len(self.groups)
        inputs = each if self.split else channels
        weights = [
            self._empty(each, inputs // g, k, k)
            for g, k in zip(self.groups, (3, 5, 7, 9), strict=False)
        ]
        convolution = (weights, self.groups, self.split)
        operators = ops._IMPLEMENTATIONS
        operator = operators[self.operator]
        precision = () if self.operator == "dual_attention" else (self.dtype == "tf32",)
        gradients: tuple
        if self.operator == "multi_scale_conv2d":
            y = operator(x, *convolution, None, *precision)
            gradients = (y, x, *convolution, None)
        elif self.operator == "dual_attention":
            out, *saved = operator(x, *attention, self.backward)
            gradients = (out, x, *attention, *saved)
        else:
            out, *saved = operator(x, *convolution, *attention, self.backward, *precision)
            gradients = (out, x, *convolution, *attention, *saved)
        if self.backward:
            operators[f"{self.operator}_backward"](*gradients, True, True, *precision)


def _blocks(shapes: Iterable[tuple[int, int, int]], *dtypes: str) -> Iterator[Case]:
    for dtype in dtypes:
        for shape in shapes:
            for channels_last in (False, True):
                auto = (1, 1, 1, 1) if shape[1] == 132 else (1, 4, 8, 16)
                yield Case("mfef_block", dtype, shape, channels_last, auto)


# Per tile of the attention one case, and per arithmetic of the convolution both sizes of maps in
# both layouts. The widest come first: their branches take tl.dot by taps, by taps and channels
# together, and direct taps.
FIRST = (
    Case("mfef_block", "bfloat16", (32, 256, 14)),
    Case("mfef_block", "tf32", (128, 256, 8), True),
    Case("mfef_block", "float32", (128, 128, 8)),
    Case("mfef_block", "float16", (128, 128, 8), True),
    Case("mfef_block", "tf32", (128, 512, 2)),
    Case("mfef_block", "float16", (32, 64, 56)),
    Case("mfef_block", "bfloat16", (32, 128, 56), True),
    Case("mfef_block", "tf32", (128, 128, 32)),
    Case("mfef_block", "float32", (32, 64, 56), True),
    Case("mfef_block", "float32", (32, 128, 56), backward=False),
    Case("mfef_block", "tf32", (32, 64, 56), True, backward=False),
    Case("multi_scale_conv2d", "bfloat16", (32, 256, 14), split=False),
    Case("multi_scale_conv2d", "tf32", (128, 128, 8), split=False),
    Case("multi_scale_conv2d", "float32", (128, 256, 8), True, split=False),
    Case("dual_attention", "float16", (128, 256, 4), True),
    Case("dual_attention", "bfloat16", (32, 64, 56)),
    Case("dual_attention", "tf32", (32, 512, 28)),
    Case("dual_attention", "float16", (32, 512, 28), True),
    Case("dual_attention", "float32", (32, 64, 56), True),
    Case("kd_loss", "float32", (3, 128, 10)),
    Case("kd_loss", "bfloat16", (3, 128, 100)),
    Case("kd_loss", "float16", (3, 128, 1000)),
)
# What else tuning.py may take, in both layouts: of a branch for each way of products, on large maps
# without that of taps and channels together.
WIDE, NARROW, TWO, ONE = (1, 8, 16), (1, 4, 16), (1, 16), (1,)
OTHERS = tuple(
    case._replace(others=True)
    for case in (
        Case("mfef_block", "bfloat16", (128, 192, 8), groups=WIDE),
        Case("mfef_block", "tf32", (128, 192, 8), True, groups=WIDE),
        Case("mfef_block", "tf32", (128, 96, 8), groups=NARROW),
        Case("mfef_block", "float16", (128, 96, 8), True, groups=NARROW),
        Case("multi_scale_conv2d", "tf32", (128, 64, 8), groups=ONE),
        Case("multi_scale_conv2d", "float16", (128, 64, 8), True, groups=ONE),
        Case("mfef_block", "bfloat16", (32, 64, 56), groups=TWO),
        Case("mfef_block", "float16", (32, 64, 56), True, groups=TWO),
        Case("mfef_block", "tf32", (32, 64, 56), groups=TWO),
        Case("mfef_block", "tf32", (32, 64, 56), True, groups=TWO),
    )
)
CASES = (*FIRST, *OTHERS)
# Those of the benchmark besides.
PAPER = ((128, 64, 8), (128, 128, 8), (128, 256, 8), (128, 132, 8), (128, 512, 2))
IMAGENET = ((32, 64, 56), (32, 128, 28), (32, 256, 14), (32, 512, 7))
ALL_CASES = (*CASES, *_blocks(PAPER + IMAGENET, "float32", "tf32", "bfloat16"))


# --- what they launch ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Specialisation:
    """A kernel as Triton specialises it for a launch.

    signature: type per argument, a tuple for a tuple. constants and attributes: by the position of
    the argument, and for one in a tuple its position there.
    """

    case: str
    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removeprefix("_")

    @property
    def file(self) -> str:
        return self.kernel.__module__.rpartition(".")[2]

    @property
    def configuration(self) -> dict[str, Any]:
        """Constants that are neither tuples, which would fill a page, nor absent arguments."""
        named = {self.kernel.arg_names[at[0]]: v for at, v in self.constants.items() if not at[1:]}
        return {n: v for n, v in named.items() if v is not None and not isinstance(v, tuple)}

    @property
    def kind(self) -> tuple:
        """What is compiled once: launches of a kind differ only in the number and shapes of the
        weights, in which integers are multiples of 16, in dtypes with the same arithmetic, in
        whether results are stored for the backward, and in how the spatial weight lies."""
        given = {k: v for k, v in self.configuration.items() if k not in ALIKE}
        absent = [at for at, value in self.constants.items() if value is None]
        return self.name, *sorted(given.items()), *absent, *self.options.values()

    def __str__(self) -> str:
        """The configuration in words."""
        words = []
        for name, value in self.configuration.items():
            if isinstance(value, bool):
                words.append(name if value else f"not {name}")
            else:
                words.append(f"{name}={value}")
        for option, what in (("num_warps", "warp"), ("num_stages", "stage")):
            number = self.options[option]
            words.append(f"{number} {what}" + "s" * (number != 1))
        return ", ".join(words)


class _Driver:
    """What Triton asks of a driver until it has compiled. Specialisation is alike on all GPUs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURES[0], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """A list of what Triton was about to compile; nothing is compiled or launched meanwhile."""
    found: list[dict[str, Any]] = []

    def keep(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append({"kernel": fn.jit_function, **compile})
        return True  # in place of compiling

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", keep):
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(_Driver())
        try:
            yield found
        finally:
            triton.runtime.driver.set_active(before)


def launches(cases: Iterable[Case] = CASES) -> Iterator[Specialisation]:
    """What the cases launch, in order, the same as often as it is launched."""
    for case in cases:
        with recorded() as found:
            case.run()
        for one in found:
            options = json.loads(one["specialization_data"])["options"]
            yield Specialisation(
                str(case),
                one["kernel"],
                one["signature"],
                one["constants"],
                one["configs"][0],
                {name: options[name] for name in OPTIONS},
            )


def collect(cases: Iterable[Case] = CASES) -> list[Specialisation]:
    """The first launch of each kind."""
    found: dict[tuple, Specialisation] = {}
    for one in launches(cases):
        found.setdefault(one.kind, one)
    return list(found.values())


# --- what the code takes ------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What the machine code of a kernel takes: registers and spilled bytes of a thread, shared
    memory of a block in bytes."""

    registers: int
    spilled: int
    shared: int


def compile_for(one: Specialisation, architectures: Sequence[int]) -> list[Usage]:
    """Compiles (or finds in Triton's cache) for each architecture, and reads the machine code.

    What Triton's front end makes is the same for all of them, and so made for the first one only;
    and no code says from which line it is, which is an eighth of the work and no instruction.
    tests/backends/triton/test_aot.py compares with code that is made in the usual way.
    """
    source: Any = ASTSource(one.kernel, one.signature, one.constants, one.attributes)
    usages: list[Usage] = []
    with tempfile.TemporaryDirectory() as folder, triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        for architecture in architectures:
            target = GPUTarget("cuda", architecture, 32)
            compiled = triton.compile(source, target=target, options=dict(one.options))
            if not usages:
                source = str(Path(folder, "kernel.ttir"))
                Path(source).write_text(compiled.asm["ttir"])
            cubin = Path(folder, f"{architecture}.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            usages.append(_usage(one, cubin, compiled.metadata.shared))
    return usages


def _usage(one: Specialisation, cubin: Path, shared: int) -> Usage:
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"cuobjdump could not read the code of {one.name}: {run.stderr.strip()}")
    registers, spilled = parse_usage(run.stdout)
    return Usage(registers, spilled, shared)


def parse_usage(text: str) -> tuple[int, int]:
    """(registers, bytes of local memory) of the one kernel in cuobjdump's output.

    Our kernels have no arrays of their own, so whatever lies in local memory was spilled there.
    """
    found = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if len(found) != 1:
        raise RuntimeError(f"cuobjdump names {len(found)} kernels in place of one:\n{text}")
    registers, stack, local = map(int, found[0])
    return registers, stack + local


Row = tuple[Specialisation, list[Usage]]


def _compile(task: tuple[int, tuple[int, ...]]) -> list[Usage]:
    return compile_for(_WORK[task[0]], task[1])


_WORK: list[Specialisation] = []  # what a process that is forked finds: kernels cannot be pickled


def compile_all(
    specialisations: Sequence[Specialisation], architectures: Sequence[int], jobs: int
) -> list[Row]:
    """In so many processes: Python's part of the compiler leaves no room for threads."""
    _WORK[:] = specialisations
    tasks = [(i, tuple(architectures)) for i in range(len(_WORK))]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        return list(zip(specialisations, pool.map(_compile, tasks), strict=True))


def complaints(rows: Iterable[Row], architectures: Sequence[int]) -> list[str]:
    """A sentence for each kernel that spills, or takes more than a multiprocessor has."""
    found = []
    for one, usages in rows:
        for architecture, usage in zip(architectures, usages, strict=True):
            what = f"{one.name} ({one.case}; {one}) on sm_{architecture}"
            if usage.spilled:
                found.append(f"{what} spills {usage.spilled} bytes per thread.")
            if usage.registers * 32 * one.options["num_warps"] > ALL_REGISTERS:
                found.append(f"{what} needs more registers than there are.")
            if usage.shared > SHARED_MEMORY:
                found.append(f"{what} takes {usage.shared} bytes of shared memory.")
    return found


def table(rows: Iterable[Row], architectures: Sequence[int]) -> str:
    """The Markdown table; numbers of the architectures are in their order, one if all are equal."""
    order = ", ".join(f"sm_{a}" for a in architectures)
    lines = [
        f"| kernel | case | configuration | registers ({order}) | spilled bytes | shared bytes |",
        "|---|---|---|---:|---:|---:|",
    ]
    for one, usages in rows:
        columns = zip(*((u.registers, u.spilled, u.shared) for u in usages), strict=True)
        cells = [" / ".join(map(str, c if len(set(c)) > 1 else c[:1])) for c in columns]
        lines.append(" | ".join([f"| {one.name}", one.case, str(one), *cells]) + " |")
    return "\n".join(lines)


def document(rows: Sequence[Row], architectures: Sequence[int]) -> str:
    """The tables, one for each file of kernels."""
    text = f"""Compiled by Triton {triton.__version__}, specialised as the cases launch them.
Registers and spilled bytes are a thread's, shared bytes a block's, of at most {SHARED_MEMORY}.
"""
    for file in FILES:
        of_file = [row for row in rows if row[0].file == file]
        if of_file:
            text += f"\n{file}.py\n\n{table(of_file, architectures)}\n"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mfef_ext.backends.triton.aot",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES, metavar="N")
    parser.add_argument("--only", nargs="+", choices=FILES, default=FILES, help="files of kernels")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--smoke", action="store_true", help="one case of every kernel")
    which.add_argument("--all", action="store_true", help="every launch of the benchmark's cases")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help="processes")
    options = parser.parse_args(arguments)
    if interpreted():
        print("TRITON_INTERPRET=1 leaves nothing to compile; unset it.", file=sys.stderr)
        return 2
    found = list(launches(ALL_CASES)) if options.all else collect()
    if options.smoke:
        found = list({(one.file, one.name): one for one in reversed(found)}.values())
    in_order = [one for file in FILES if file in options.only for one in found if one.file == file]
    rows = compile_all(in_order, options.arch, options.jobs)
    print(document(rows, options.arch), end="")
    for sentence in complaints(rows, options.arch):
        print(sentence, file=sys.stderr)
    return 1 if complaints(rows, options.arch) else 0


if __name__ == "__main__":
    sys.exit(main())
