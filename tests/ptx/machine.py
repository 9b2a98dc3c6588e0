"""Kernels of compiled PTX, executed and watched: tests/ptx/machine, built and loaded.

The instructions that test_machine.py executes are known to be right, others are not yet; parameters
are pointers, grids have one dimension. The kernels of csrc/cuda do not run here yet: their tests
use tests/backends/cuda/host.cpp.
"""

import ctypes
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((Path(__file__).parent / "machine").iterdir())


@cache
def library() -> ctypes.CDLL:
    """The machine, compiled anew where a source has changed."""
    command = [
        *(
            os.environ.get("CXX", "c++"),
            "-std=c++20",
            "-O2",
            "-ffp-contract=off",
            "-frounding-math",
        ),
        *("-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
        *(str(path) for path in SOURCES if path.suffix == ".cpp"),
    ]
    content = b"".join(path.read_bytes() for path in SOURCES) + " ".join(command).encode()
    folder = ROOT / "build" / "ptx_machine"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.so"
    with open(folder / "lock", "w") as lock:  # one of the processes of a run compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".tmp")
            run = subprocess.run(
                [*command, "-o", str(unfinished)], capture_output=True, text=True, cwd=ROOT
            )
            assert run.returncode == 0, run.stderr
            unfinished.rename(path)
    loaded = ctypes.CDLL(str(path))
    loaded.ptx_parse.restype = ctypes.c_void_p
    loaded.ptx_parse.argtypes = [ctypes.c_char_p]
    loaded.ptx_free.argtypes = [ctypes.c_void_p]
    loaded.ptx_answer.restype = ctypes.c_char_p
    loaded.ptx_launch.restype = ctypes.c_int64
    loaded.ptx_launch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    loaded.ptx_launch.argtypes += [ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64]
    loaded.ptx_launch.argtypes += [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return loaded


@dataclass
class Run:
    """What a launch did: the instructions that its warps executed, and what was found."""

    instructions: int
    reports: list[str]


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
        grid: int,
        block: int,
        arguments: Sequence[np.ndarray],
        shared: int = 0,
        backwards: bool = False,
    ) -> Run:
        """Run a kernel whose parameters are pointers to these arrays. ``backwards``: the last
        block and the last warp come first."""
        params = np.array([array.ctypes.data for array in arguments], np.uint64)
        ranges = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arguments]
        memory = np.array(ranges, np.uint64)
        dims = np.array([grid, 1, 1, block, 1, 1], np.uint32)
        count = library().ptx_launch(
            *(self._handle, name.encode(), dims.ctypes.data, shared, params.tobytes()),
            *(params.nbytes, memory.ctypes.data, len(ranges), backwards),
        )
        answer = library().ptx_answer().decode()
        if count < 0:
            raise ValueError(answer)
        return Run(count, answer.splitlines())
