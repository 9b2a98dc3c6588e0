"""Compiles the kernels for NVIDIA GPUs, on any machine, and says what their code takes.

    python -m mfef_ext.backends.triton.aot            every tile and arithmetic that shapes choose
    python -m mfef_ext.backends.triton.aot --smoke    every kernel once

No GPU is needed. The operators themselves run, on meta tensors, under a driver that launches
nothing: so Triton derives types, constants and divisibility from the arguments that a real launch
would have.

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
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import interpreted
from .launch import ALL_REGISTERS

ARCHITECTURES = (80, 90, 100)
# What one block may have on compute capability 8.6, 8.9 and 12.0; 8.0 has 163 KiB, 9.0 and 10.0
# have 227.
SHARED_MEMORY = 99 * 1024
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")  # all that launches set
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


# --- what is launched ---------------------------------------------------------------------------


class Case(NamedTuple):
    """One forward of an operator, and its backward.

    shape: (N, C, side) of the map, (S, N, classes) of the logits. channels_last: the weights, too.
    """

    operator: str
    dtype: str
    shape: tuple[int, int, int]
    channels_last: bool = False
    split: bool = True

    def __str__(self) -> str:
        words = [self.operator, self.dtype, "x".join(map(str, self.shape))]
        words += ["channels_last"] * self.channels_last + ["split=False"] * (not self.split)
        return " ".join(words)

    def run(self) -> None:
        from . import kd, ops  # whether kernels are interpreted is settled when they are imported

        def no_device(module: Any) -> Any:
            return mock.patch.object(module, "device_of", lambda x: nullcontext())

        with no_device(kd), no_device(ops):
            if self.operator == "kd_loss":
                losses, *shape = self.shape
                students, targets = ([self._empty(*shape)] * losses for _ in range(2))
                loss = kd._kd_loss(students, targets, 3.0, False)
                kd._kd_loss_backward(loss, students, targets, 3.0, True, True)
            else:
                self._run_layer(ops._IMPLEMENTATIONS)

    def _empty(self, *shape: int) -> Tensor:
        layout = torch.contiguous_format
        if self.channels_last and len(shape) == 4:
            layout = torch.channels_last
        return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta", memory_format=layout)

    def _run_layer(self, operators: Mapping[str, Any]) -> None:
        n, channels, side = self.shape
        hidden = max(channels // 16, 1)
        mlp = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
        attention = [self._empty(*shape) for shape in (*mlp, (1, 2, 7, 7))]
        x = self._empty(n, channels, side, side)
        each, groups = channels // 4, (1, 4, 8, 16)
        inputs = each if self.split else channels
        weights = [
            self._empty(each, inputs // g, k, k) for g, k in zip(groups, (3, 5, 7, 9), strict=True)
        ]
        parameters: list[Any] = []
        if self.operator != "dual_attention":
            parameters = [weights, groups, self.split]
        parameters += [None] if self.operator == "multi_scale_conv2d" else attention
        save = [True] if self.operator != "multi_scale_conv2d" else []
        tf32 = [self.dtype == "tf32"] if self.operator != "dual_attention" else []
        result = operators[self.operator](x, *parameters, *save, *tf32)
        out, *saved = result if save else (result,)
        backward = operators[f"{self.operator}_backward"]
        backward(out, x, *parameters, *saved, True, True, *tf32)


# Per tile of the attention one case, and per arithmetic of the convolution both sizes of maps in
# both layouts. The widest come first: their branches take tl.dot by taps, by taps and channels
# together, and direct taps.
CASES = (
    Case("mfef_block", "bfloat16", (32, 256, 14)),
    Case("mfef_block", "float16", (32, 64, 56)),
    Case("dual_attention", "bfloat16", (32, 64, 56)),
    Case("kd_loss", "float32", (3, 128, 10)),
    # The smoke test needs no more.
    Case("mfef_block", "tf32", (128, 256, 8), True),
    Case("mfef_block", "float32", (128, 128, 8)),
    Case("mfef_block", "float16", (128, 128, 8), True),
    Case("mfef_block", "tf32", (128, 512, 2)),
    Case("mfef_block", "bfloat16", (32, 128, 56), True),
    Case("mfef_block", "tf32", (128, 128, 32)),
    Case("mfef_block", "float32", (32, 64, 56), True),
    Case("multi_scale_conv2d", "bfloat16", (32, 256, 14), split=False),
    Case("multi_scale_conv2d", "tf32", (128, 128, 8), split=False),
    Case("multi_scale_conv2d", "float32", (128, 256, 8), True, split=False),
    Case("dual_attention", "float16", (128, 256, 4), True),
    Case("dual_attention", "float16", (32, 512, 28), True),
    Case("kd_loss", "bfloat16", (3, 128, 100)),
    Case("kd_loss", "float16", (3, 128, 1000)),
)
SMOKE = CASES[:4]


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
    def configuration(self) -> dict[str, Any]:
        """Constants of the kernel that are numbers or words: the others describe the weights."""
        named = {self.kernel.arg_names[at[0]]: v for at, v in self.constants.items() if not at[1:]}
        return {n: v for n, v in named.items() if v is not None and not isinstance(v, tuple)}

    @property
    def kind(self) -> tuple:
        """What is compiled once, for weights of whatever number and shapes."""
        alike = ("TOTAL", "TILES")
        configuration = {k: v for k, v in self.configuration.items() if k not in alike}
        return self.name, *sorted(configuration.items()), *self.options.values()


# What Triton asks of a driver until it has compiled. Specialisation is alike on all GPUs.
_DRIVER = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", ARCHITECTURES[0], 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
)


def launches(cases: Iterable[Case] = CASES) -> Iterator[Specialisation]:
    """What the cases launch, in order, the same as often as it is launched."""
    for case in cases:
        found: list[Specialisation] = []

        def keep(*, fn: Any, compile: dict[str, Any], case=case, found=found, **_: Any) -> bool:
            options = json.loads(compile["specialization_data"])["options"]
            found.append(
                Specialisation(
                    str(case),
                    fn.jit_function,
                    compile["signature"],
                    compile["constants"],
                    compile["configs"][0],
                    {name: options[name] for name in OPTIONS},
                )
            )
            return True  # in place of compiling

        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(_DRIVER)
        try:
            with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", keep):
                case.run()
        finally:
            triton.runtime.driver.set_active(before)
        yield from found


# --- what the code takes ------------------------------------------------------------------------


class Usage(NamedTuple):
    """Registers and spilled bytes of a thread, shared memory of a block in bytes."""

    registers: int
    spilled: int
    shared: int


def compile_for(one: Specialisation, architecture: int) -> Any:
    source = ASTSource(one.kernel, one.signature, one.constants, one.attributes)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=dict(one.options))


def usage_of(compiled: Any) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"cuobjdump could not read a kernel's code: {run.stderr.strip()}")
    return Usage(*parse_usage(run.stdout), compiled.metadata.shared)


def parse_usage(text: str) -> tuple[int, int]:
    """(registers, bytes of local memory) of the one kernel in cuobjdump's output.

    Our kernels have no arrays of their own, so whatever lies in local memory was spilled there.
    """
    found = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if len(found) != 1:
        raise RuntimeError(f"cuobjdump names {len(found)} kernels in place of one:\n{text}")
    registers, stack, local = map(int, found[0])
    return registers, stack + local


def complaints(one: Specialisation, architecture: int, usage: Usage) -> list[str]:
    """A sentence for each limit of a multiprocessor that the kernel exceeds."""
    what = f"{one.name} ({one.case}; {one.configuration}) on sm_{architecture}"
    found = []
    if usage.spilled:
        found.append(f"{what} spills {usage.spilled} bytes per thread.")
    if usage.registers * 32 * one.options["num_warps"] > ALL_REGISTERS:
        found.append(f"{what} needs more registers than there are.")
    if usage.shared > SHARED_MEMORY:
        found.append(f"{what} takes {usage.shared} bytes of shared memory.")
    return found


_WORK: list[tuple[Specialisation, int]] = []  # inherited by fork: kernels cannot be pickled


def _usage(index: int) -> Usage:
    return usage_of(compile_for(*_WORK[index]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mfef_ext.backends.triton.aot",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES, metavar="N")
    parser.add_argument("--smoke", action="store_true", help="every kernel once")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help="processes")
    options = parser.parse_args(arguments)
    if interpreted():
        print("TRITON_INTERPRET=1 leaves nothing to compile; unset it.", file=sys.stderr)
        return 2
    found: dict[Any, Specialisation] = {}
    for one in launches(SMOKE if options.smoke else CASES):
        found.setdefault(one.name if options.smoke else one.kind, one)
    _WORK[:] = [(one, architecture) for one in found.values() for architecture in options.arch]
    wrong = []
    # Processes, since Python's part of the compiler leaves no room for threads.
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        usages = pool.imap(_usage, range(len(_WORK)))
        for (one, architecture), usage in zip(_WORK, usages, strict=True):
            print(f"{one.name} ({one.case}) on sm_{architecture}: {usage}", flush=True)
            wrong += complaints(one, architecture, usage)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
