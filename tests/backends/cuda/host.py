"""The CUDA kernels compiled by the C++ compiler: host.cpp, built and loaded."""

import ctypes
import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
import torch

from mfef_ext import ops

ROOT = Path(__file__).resolve().parents[3]
H200 = 227 * 1024  # bytes of shared memory that a thread block may have
NEAREST, ALIGNED, TRUNCATED = range(3)  # how tensor cores add products, as in host.cpp
SOURCES = [Path(__file__).with_name("host.cpp")]
SOURCES += sorted(p for d in ("cuda", "common") for p in (ROOT / "csrc" / d).iterdir())


def build() -> Path:
    """The library, compiled anew where a source has changed; half a minute."""
    torch_dir = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "c++")
    command = [
        *(compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"),
        # Shared memory is read as float and as uint32_t; nvcc has no rule against that.
        *("-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{ROOT / 'csrc'}",
        *("-isystem", str(torch_dir / "include")),
        *("-isystem", str(torch_dir / "include/torch/csrc/api/include")),
        str(SOURCES[0]),
        *(f"-L{torch_dir / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    content = b"".join(path.read_bytes() for path in SOURCES)
    content += " ".join([*command, torch.__version__]).encode()
    folder = ROOT / "build" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.so"
    with open(folder / "lock", "w") as lock:  # one of the processes of a run compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(".tmp")
            run = subprocess.run(
                [*command, "-o", str(unfinished)], capture_output=True, text=True, cwd=ROOT
            )
            assert run.returncode == 0, run.stderr
            unfinished.rename(library)
    return library


class Host:
    """The kernels on the host: the operators' functions, and how thread blocks are run."""

    def __init__(self, library: Path):
        self._definitions = torch.library.Library("mfef_cuda_host", "FRAGMENT")
        for op in ops.OPERATORS:
            for name in (op, f"{op}_backward"):
                schema = str(getattr(torch.ops.mfef, name).default._schema)
                self._definitions.define(schema.removeprefix("mfef::"))
        torch.ops.load_library(str(library))
        loaded = ctypes.CDLL(str(library))
        self._multiply = loaded.mfef_cuda_host_multiply
        self._multiply.restype = ctypes.c_bool
        self._multiply.argtypes = [ctypes.c_char_p, ctypes.c_int, *[ctypes.c_void_p] * 3]
        self._multiply.argtypes += [ctypes.c_int]
        self._settings = loaded.mfef_cuda_host_settings
        self._settings.argtypes = [ctypes.c_int64, ctypes.c_bool, ctypes.c_int, ctypes.c_bool]
        self._settings.argtypes += [ctypes.c_int64]
        self._scratch = loaded.mfef_cuda_host_scratch
        self._scratch.restype = ctypes.c_int64
        self._scratch.argtypes = []
        self.operators = ops.register("mfef_cuda_host")

    def set(
        self,
        shared_limit: int = H200,
        backwards: bool = False,
        adding: int = NEAREST,
        one_slice: bool = False,
        apart: bool = False,
    ) -> None:
        """Bytes of shared memory of a thread block; whether its threads run in descending order;
        how products are added up; whether weight gradients have all of the batch in one slice;
        whether those of small maps are always a launch of their own."""
        self._settings(shared_limit, backwards, adding, one_slice, 0 if apart else -1)

    def scratch(self) -> int:
        """Bytes that the calls since the last question had beside their tensors."""
        return self._scratch()

    def multiply(self, operand: str, reading: int, a: np.ndarray, b: np.ndarray, c: np.ndarray):
        """C + A B as a warp computes it (csrc/cuda/mma.cuh), of float32 arrays; ``reading`` as
        in host.cpp."""
        a, b, c = np.ascontiguousarray(a), np.ascontiguousarray(b), np.array(c, order="C")
        assert all(array.dtype == np.float32 for array in (a, b, c))
        assert a.shape[0] == 16 and b.shape == (a.shape[1], 8) and c.shape == (16, 8)
        pointers = [array.ctypes.data for array in (a, b, c)]
        assert self._multiply(operand.encode(), a.shape[1], *pointers, reading)
        return c
