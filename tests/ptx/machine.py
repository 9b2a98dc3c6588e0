"""Kernels of compiled PTX, executed and watched: tests/ptx/machine, built and loaded.

test_machine.py executes every form of instruction that it knows; others are errors. cuda.py runs
the kernels of csrc/cuda, whose tests are in tests/backends/cuda.
"""

import ctypes
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

# Warp instructions by class, then the rest of machine/count.h.
CLASSES = (
    "float",
    "integer",
    "convert",
    "tensor",
    "global",
    "shared",
    "parameter",
    "control",
    "other",
)
COUNTS = (*CLASSES, "lanes", "barriers", "sectors", "unique", "shared_passes", "shared_replays")
ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((Path(__file__).parent / "machine").iterdir())


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """A folder for what is compiled, in which one of the processes of a run compiles at a time."""
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def produce(command: list[str], path: Path) -> None:
    """Runs a compiler for a file that is not there yet; half a file never has its name."""
    if path.exists():
        return
    unfinished = path.with_name(f"unfinished-{path.name}")
    run = subprocess.run(
        [*command, "-o", str(unfinished)], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    unfinished.rename(path)


def build() -> Path:
    """The machine's library, compiled anew where a source has changed."""
    command = [
        *(
            os.environ.get("CXX", "c++"),
            "-std=c++20",
            "-O3",
            "-march=native",
            "-ffp-contract=off",
            "-frounding-math",
        ),
        *("-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
        *(str(path) for path in SOURCES if path.suffix == ".cpp"),
    ]
    content = b"".join(path.read_bytes() for path in SOURCES) + " ".join(command).encode()
    # -march=native: what the processor has, "flags" or, of an Arm, "Features".
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    content += b"".join(
        sorted({line for line in lines if line.startswith((b"flags", b"Features"))})
    )
    with locked("ptx_machine") as folder:
        path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.so"
        produce(command, path)
    return path


@cache
def library() -> ctypes.CDLL:
    """The machine, for Python."""
    loaded = ctypes.CDLL(str(build()))
    loaded.ptx_parse.restype = ctypes.c_void_p
    loaded.ptx_parse.argtypes = [ctypes.c_char_p]
    loaded.ptx_free.argtypes = [ctypes.c_void_p]
    loaded.ptx_answer.restype = ctypes.c_char_p
    loaded.ptx_memory.restype = ctypes.c_void_p
    loaded.ptx_memory_free.argtypes = [ctypes.c_void_p]
    loaded.ptx_memory_add.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
    loaded.ptx_memory_add.argtypes += [ctypes.c_bool]
    loaded.ptx_params.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    loaded.ptx_launch.restype = ctypes.c_int64
    loaded.ptx_launch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    loaded.ptx_launch.argtypes += [ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_bool]
    loaded.ptx_set_counting.argtypes = [ctypes.c_bool]
    loaded.ptx_counts.argtypes = [ctypes.c_void_p]
    return loaded


@dataclass
class Range:
    """Memory that a kernel may use; ``fresh``: that nobody has written yet."""

    address: int
    end: int
    fresh: bool = False

    @staticmethod
    def of(array: np.ndarray, fresh: bool = False) -> "Range":
        return Range(array.ctypes.data, array.ctypes.data + array.nbytes, fresh)


@dataclass
class Run:
    """What a launch did: the instructions that its warps executed, and what was found."""

    instructions: int
    reports: list[str]
    counts: dict[str, int]


class Module:
    """The kernels of a text of PTX."""

    def __init__(self, text: str):
        self._handle = library().ptx_parse(text.encode())
        if not self._handle:
            raise ValueError(library().ptx_answer().decode())

    def __del__(self):
        if self._handle:
            library().ptx_free(self._handle)

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[np.generic | int],
        memory: Sequence[Range],
        shared: int = 0,
        backwards: bool = False,
    ) -> Run:
        """Run a kernel. ``arguments``: its parameters, of the sizes that they have there, addresses
        as integers. ``memory``: what it may use. ``backwards``: the last block and the last warp
        come first."""
        engine = library()
        count = engine.ptx_params(self._handle, name.encode(), None)
        if count < 0:
            raise ValueError(engine.ptx_answer().decode())
        places = np.zeros((max(count, 1), 2), np.int64)
        engine.ptx_params(self._handle, name.encode(), places.ctypes.data)
        params = bytearray(int(places[-1].sum()))
        if count != len(arguments):
            raise ValueError(f"{name} has {count} parameters, not {len(arguments)}")
        for (offset, size), argument in zip(places, arguments, strict=False):
            value = argument if isinstance(argument, np.generic) else np.uint64(argument)
            assert value.nbytes == size, f"{size} bytes for {value!r}"
            params[offset : offset + size] = value.tobytes()
        allowed = engine.ptx_memory()
        try:
            for range_ in memory:
                engine.ptx_memory_add(allowed, range_.address, range_.end, range_.fresh)
            dims = np.array([*grid, *block], np.uint32)
            engine.ptx_set_counting(True)
            count = engine.ptx_launch(
                *(self._handle, name.encode(), dims.ctypes.data, shared, bytes(params)),
                *(allowed, backwards),
            )
        finally:
            engine.ptx_set_counting(False)
            engine.ptx_memory_free(allowed)
        answer = engine.ptx_answer().decode()
        if count < 0:
            raise ValueError(answer)
        counts = np.zeros(len(COUNTS), np.int64)
        engine.ptx_counts(counts.ctypes.data)
        named = dict(zip(COUNTS, counts.tolist(), strict=True))
        return Run(count, answer.splitlines(), named)
