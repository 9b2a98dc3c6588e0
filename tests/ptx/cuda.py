"""csrc/cuda as nvcc compiles it, on CPU tensors: PTX for the machine, host code for runtime.cpp."""

import ctypes
import hashlib
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mfef_ext import ops
from tests.ptx import machine

ROOT = machine.ROOT
# Bytes of shared memory that a thread block may have, the fewest with compute capability 8.6.
H200, A100, SMALLEST = 227 * 1024, 163 * 1024, 99 * 1024
NEAREST, ALIGNED, TRUNCATED = range(3)  # how tensor cores add products, as in warp.cpp
SOURCES = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), Path(__file__).with_name("products.cu")]
HEADERS = sorted(p for d in ("csrc", "csrc/cuda", "csrc/common") for p in (ROOT / d).glob("*.*h"))
RUNTIME = Path(__file__).with_name("runtime.cpp")
NAMESPACE = "mfef_ptx"


def nvcc() -> str | None:
    """The compiler that setup.py would take."""
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.path.join(folder, "bin") for folder in folders if folder]
    places += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def build(architecture: str = "80") -> Path:
    """The library, whose changed sources are compiled anew; a minute or two from nothing."""
    engine = str(machine.build())
    torch_dir, compiler = Path(torch.__file__).parent, nvcc()
    assert compiler is not None
    includes = [f"-I{ROOT / 'csrc'}", *("-isystem", str(torch_dir / "include"))]
    includes += ["-isystem", str(torch_dir / "include/torch/csrc/api/include")]
    code = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
    defines = ["USE_CUDA", "TORCH_TARGET_VERSION=0x020a000000000000", "NDEBUG"]
    defines += [f'MFEF_CUDA_ARCHS="{architecture}"', f"MFEF_CUDA_NAMESPACE={NAMESPACE}"]
    command = [compiler, "-std=c++20", "-O3", "-lineinfo", "--no-compress", code, *includes]
    command += [f"-D{define}" for define in defines]
    command += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-c"]
    shared = b"".join(path.read_bytes() for path in HEADERS) + torch.__version__.encode()

    def compiled(source: Path) -> str:
        content = source.read_bytes() + shared + " ".join(command).encode()
        path = folder / f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.o"
        machine.produce([*command, str(source)], path)
        return str(path)

    with machine.locked("ptx_cuda") as folder:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compiled, [*SOURCES, RUNTIME]))
        content = " ".join([*objects, engine]).encode()
        library = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.so"
        link = [os.environ.get("CXX", "c++"), "-shared", *objects, engine]
        link += ["-Wl,-Bsymbolic", f"-L{torch_dir / 'lib'}", "-Wl,--no-as-needed"]
        link += ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
        machine.produce(link, library)
    return library


@dataclass
class Launch:
    """What the machine executed of a launch."""

    instructions: int
    blocks: int
    threads: int
    shared: int
    counts: dict[str, int]
    kernel: str


class Device:
    """The operators of csrc/cuda on the machine, and what it is set to."""

    def __init__(self, library: Path):
        self._definitions = torch.library.Library(NAMESPACE, "FRAGMENT")
        for op in ops.OPERATORS:
            for name in (op, f"{op}_backward"):
                schema = str(getattr(torch.ops.mfef, name).default._schema)
                self._definitions.define(schema.removeprefix("mfef::"))
        # Without RTLD_GLOBAL, so that nothing but this library sees its CUDA runtime.
        flags = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_NOW | os.RTLD_LOCAL)
        try:
            torch.ops.load_library(str(library))
        finally:
            sys.setdlopenflags(flags)
        loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_LOCAL)
        self._settings = loaded.mfef_ptx_settings
        self._settings.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_bool, ctypes.c_int]
        self._settings.argtypes += [ctypes.c_bool, ctypes.c_bool]
        self._scratch = loaded.mfef_ptx_scratch
        self._scratch.restype = ctypes.c_int64
        self._multiply = loaded.mfef_ptx_multiply
        self._multiply.restype = ctypes.c_char_p
        self._multiply.argtypes = [ctypes.c_char_p, ctypes.c_int, *[ctypes.c_void_p] * 3]
        self._multiply.argtypes += [ctypes.c_int]
        self._allow = loaded.mfef_ptx_allow
        self._allow.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self._counting = loaded.mfef_ptx_counting
        self._counting.argtypes = [ctypes.c_bool]
        self._log = loaded.mfef_ptx_log
        self._log.restype = ctypes.c_char_p
        self.operators = ops.register(NAMESPACE)

    def set(
        self,
        shared_limit: int = H200,
        max_blocks: int = 2**31 - 1,
        backwards: bool = False,
        adding: int = NEAREST,
        one_slice: bool = False,
        apart: bool = False,
    ) -> None:
        """Bytes of shared memory of a thread block; blocks of the largest grid; whether the last
        block and the last warp come first; how tensor cores add products; whether weight gradients
        have all of the batch in one slice; whether those of small maps are always a launch of
        their own."""
        self._settings(shared_limit, max_blocks, backwards, adding, one_slice, apart)

    def scratch(self) -> int:
        """Bytes that the calls since the last question had beside their tensors."""
        return self._scratch()

    def launches(self) -> list[Launch]:
        """Those since the last question."""
        lines = self._log().decode().splitlines()
        found = []
        for line in lines:
            *numbers, kernel = line.split("\t")
            values = [int(number) for number in numbers]
            counts = dict(zip(machine.COUNTS, values[4:], strict=True))
            found.append(Launch(*values[:4], counts, kernel))
        return found

    def count(self, sectors: bool) -> None:
        """Whether sectors and bank conflicts are counted, which takes time."""
        self._counting(sectors)

    def multiply(
        self, operand: str, reading: int, a: np.ndarray, b: np.ndarray, c: np.ndarray
    ) -> np.ndarray:
        """C + A B as a warp computes it (csrc/cuda/mma.cuh), of float32 arrays; ``reading`` as in
        products.cu."""
        a, b, c = np.ascontiguousarray(a), np.ascontiguousarray(b), np.array(c, order="C")
        assert all(array.dtype == np.float32 for array in (a, b, c))
        assert a.shape[0] == 16 and b.shape == (a.shape[1], 8) and c.shape == (16, 8)
        for array in (a, b, c):
            self._allow(array.ctypes.data, array.nbytes)
        pointers = [array.ctypes.data for array in (a, b, c)]
        error = self._multiply(operand.encode(), a.shape[1], *pointers, reading)
        assert error is None, error
        return c
