"""Compiles every kernel in every configuration, on any machine, and says what the code takes.

    python -m mfef_ext.backends.triton.aot                 the table, for sm_80, sm_90 and sm_100
    python -m mfef_ext.backends.triton.aot --only kd       of one file's kernels
    python -m mfef_ext.backends.triton.aot --write         into docs/triton_kernels.md

No GPU is needed. Each file of kernels lists them by a function ``specialisations()``, which yields
(name, kernel, {argument: type}, {argument: constant}, warps, stages). A type is what Triton derives
from an argument at run time: "*bf16", "i32", "fp32", a tuple of these for a tuple, and "i32:16" for
an integer that is a multiple of 16 whenever this configuration is picked. Pointers are taken to be
multiples of 16 bytes, as those of whole tensors are. Together the two dicts name every argument;
the type "constexpr" may stand for a constant, as it does in Triton's signatures.

The exit status is 1 if a kernel spills registers or takes more shared memory than the smallest of
the GPUs has, 2 if nothing could be compiled.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import interpreted

FILES = ("conv", "attention", "kd")
ARCHITECTURES = (80, 90, 100)
# What one block may have on compute capability 8.6, 8.9 and 12.0; 8.0 has 163 KiB, 9.0 and 10.0
# have 227.
SHARED_MEMORY = 99 * 1024
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "triton_kernels.md"

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Specialisation:
    """One kernel as it is compiled for some types and one configuration."""

    name: str
    kernel: Any
    types: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int

    @property
    def dtype(self) -> str:
        """The dtype of the maps: the narrowest that it reads or writes by a pointer."""
        pointers = [t[1:] for _, t in leaves(self.types) if t.startswith("*")]
        found = [name for name in ("fp16", "bf16", "fp32") if name in pointers]
        return DTYPE_NAMES[found[0]] if found else ""

    @property
    def configuration(self) -> str:
        """The constants in words, but for tuples, which would fill a page, and absent arguments."""
        words = []
        for name, value in self.constants.items():
            if isinstance(value, bool):
                words.append(name if value else f"not {name}")
            elif value is not None and not isinstance(value, tuple):
                words.append(f"{name}={value}")
        for number, what in ((self.num_warps, "warp"), (self.num_stages, "stage")):
            words.append(f"{number} {what}" + "s" * (number != 1))
        return ", ".join(words)


@dataclass(frozen=True)
class Usage:
    """What the machine code of a kernel takes: registers and spilled bytes of a thread, shared
    memory of a block in bytes."""

    registers: int
    spilled: int
    shared: int


def leaves(types: Any, path: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """((position, position in a tuple, ...), type) of every argument that is not a tuple."""
    if isinstance(types, str):
        yield path, types
        return
    for i, inner in enumerate(types.values() if isinstance(types, Mapping) else types):
        yield from leaves(inner, (*path, i))


def collect(file: str) -> list[Specialisation]:
    """What one of the files lists, in its order."""
    module = importlib.import_module(f".{file}", __package__)
    found = [Specialisation(*one) for one in module.specialisations()]
    if not found:
        raise ValueError(f"{file}.specialisations() yields nothing to compile")
    return found


def source(one: Specialisation) -> ASTSource:
    """What Triton compiles; ValueError if arguments are missing, superfluous or named twice."""
    names = one.kernel.arg_names
    types = {name: type_ for name, type_ in one.types.items() if type_ != "constexpr"}
    given = [*types, *one.constants]
    if sorted(given) != sorted(names):
        wrong = sorted(set(given) ^ set(names)) or sorted(n for n in names if given.count(n) > 1)
        raise ValueError(
            f"{one.name}: specialisations() must give every argument of the kernel once as a type "
            f"or a constant; look at {', '.join(wrong)}"
        )
    signature = {name: types.get(name, "constexpr") for name in names}
    divisible = [["tt.divisibility", 16]]
    attributes = {
        path: divisible
        for path, type_ in leaves(signature)
        if type_.startswith("*") or type_.endswith(":16")
    }

    def plain(type_: Any) -> Any:
        return (
            type_.removesuffix(":16")
            if isinstance(type_, str)
            else tuple(plain(inner) for inner in type_)
        )

    return ASTSource(
        one.kernel,
        {name: plain(type_) for name, type_ in signature.items()},
        dict(one.constants),
        attributes,
    )


def compile_for(one: Specialisation, architecture: int) -> Usage:
    """Compiles (or finds in Triton's cache) and reads the machine code's resource usage."""
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages}
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source(one), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"cuobjdump could not read the code of {one.name}: {run.stderr.strip()}")
    registers, spilled = parse_usage(run.stdout)
    return Usage(registers, spilled, compiled.metadata.shared)


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


def complaints(rows: Iterable[Row], architectures: Sequence[int]) -> list[str]:
    """A sentence for each kernel that spills or takes too much shared memory."""
    found = []
    for one, usages in rows:
        for architecture, usage in zip(architectures, usages, strict=True):
            what = f"{one.name} ({one.dtype}; {one.configuration}) on sm_{architecture}"
            if usage.spilled:
                found.append(f"{what} spills {usage.spilled} bytes per thread.")
            if usage.shared > SHARED_MEMORY:
                found.append(f"{what} takes {usage.shared} bytes of shared memory.")
    return found


def table(rows: Iterable[Row], architectures: Sequence[int]) -> str:
    """The Markdown table; numbers of the architectures are in their order, one if all are equal."""
    order = ", ".join(f"sm_{a}" for a in architectures)
    lines = [
        f"| kernel | dtype | configuration | registers ({order}) | spilled bytes | shared bytes |",
        "|---|---|---|---:|---:|---:|",
    ]
    for one, usages in rows:
        columns = zip(*((u.registers, u.spilled, u.shared) for u in usages), strict=True)
        cells = [" / ".join(map(str, c if len(set(c)) > 1 else c[:1])) for c in columns]
        lines.append(" | ".join([f"| {one.name}", one.dtype, one.configuration, *cells]) + " |")
    return "\n".join(lines)


def document(sections: Mapping[str, Sequence[Row]], architectures: Sequence[int]) -> str:
    """docs/triton_kernels.md, with a section for each file of kernels."""
    text = f"""# What the Triton kernels take

Written by `python -m mfef_ext.backends.triton.aot --write`. Compiled ahead of
time by Triton {triton.__version__}, without a GPU. Registers and spilled bytes are a thread's,
shared bytes a block's; the smallest of the GPUs has {SHARED_MEMORY} of them.
"""
    for file, rows in sections.items():
        text += f"\n## {file}.py\n\n{table(rows, architectures)}\n"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mfef_ext.backends.triton.aot",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES, metavar="N")
    parser.add_argument("--only", nargs="+", choices=FILES, default=FILES, help="files of kernels")
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCUMENT.name}")
    options = parser.parse_args(arguments)
    if interpreted():
        print("TRITON_INTERPRET=1 leaves nothing to compile; unset it.", file=sys.stderr)
        return 2
    if options.write and (set(options.only) != set(FILES) or tuple(options.arch) != ARCHITECTURES):
        print("--write writes the whole table; leave out --only and --arch.", file=sys.stderr)
        return 2
    if options.write and not DOCUMENT.parent.is_dir():
        print("--write needs a checkout of the repository, which has docs/.", file=sys.stderr)
        return 2
    sections = {
        file: [(one, [compile_for(one, a) for a in options.arch]) for one in collect(file)]
        for file in options.only
    }
    text = document(sections, options.arch)
    if options.write:
        DOCUMENT.write_text(text)
    else:
        print(text, end="")
    found = [c for rows in sections.values() for c in complaints(rows, options.arch)]
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
