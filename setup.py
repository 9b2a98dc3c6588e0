"""Drives CMakeLists.txt: finds the tools, says in one sentence what is missing, builds, copies.

Everything else about the package is in pyproject.toml. Read from the environment:

    MAX_JOBS              compiler processes at a time (default: the cores this process may use)
    MFEF_CPU_ISA          list of baseline, avx2, avx512, avx512_bf16 (default: all; baseline is
                          always built)
    MFEF_CUDA             auto (default): compile _C_cuda if a working nvcc is found, for the GPUs
                          that are here, or for those of TORCH_CUDA_ARCH_LIST; 0: never; 1: for the
                          usual GPUs, an error if that is not possible
    TORCH_CUDA_ARCH_LIST  GPU architectures as PyTorch writes them, such as "8.0;9.0a;10.0+PTX"
    CXX, CUDAHOSTCXX      the C++ compiler, and the one that nvcc calls
    CUDA_HOME, CUDA_PATH  where nvcc is, asked before PATH and /usr/local/cuda
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
USUAL_CUDA = Path("/usr/local/cuda")
OLDEST_SETUPTOOLS = (77, 0)  # the first that reads pyproject.toml's license as an SPDX expression
OLDEST_TORCH = (2, 10)  # the first with the stable ABI that TORCH_TARGET_VERSION asks for
OLDEST_CMAKE = (3, 25)
OLDEST_GPU = (8, 0)  # compute capability
OLDEST_NVCC = (12, 4)  # the first whose C++20 compiles torch's stable headers
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


class BuildError(SystemExit):
    """Ends the build with one sentence.

    A SystemExit and no Exception: setuptools and pip then print the sentence without a traceback.
    """

    def __init__(self, sentence: str):
        super().__init__(f"mfef_ext: {sentence}")


def version_of(text: str) -> tuple[int, int]:
    """(major, minor) of the first version number in ``text``."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


# --- what the environment asks for ------------------------------------------------------------


def max_jobs(environ: Mapping[str, str]) -> int:
    value = environ.get("MAX_JOBS", "").strip()
    if not value:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if not re.fullmatch(r"[1-9]\d*", value):
        raise BuildError(f"MAX_JOBS={value!r} must be a positive number of compiler processes.")
    return int(value)


def cpu_isas(environ: Mapping[str, str], machine: str) -> list[str]:
    """The instruction sets to compile for; baseline always, so that the package loads anywhere."""
    known = ISAS if machine.lower() in ("x86_64", "amd64") else ISAS[:1]
    value = environ.get("MFEF_CPU_ISA", "")
    wanted = [name for name in re.split(r"[\s,;]+", value) if name] or list(known)
    for name in wanted:
        if name not in known:
            raise BuildError(
                f"MFEF_CPU_ISA={value!r} names {name!r}; "
                f"on a {machine} machine use a list of {', '.join(known)}."
            )
    return [name for name in known if name in wanted or name == "baseline"]


def cuda_mode(environ: Mapping[str, str]) -> str:
    value = environ.get("MFEF_CUDA", "").strip() or "auto"
    if value not in ("auto", "0", "1"):
        raise BuildError(
            f"MFEF_CUDA={value!r} must be auto (compile for CUDA if nvcc is found), 0 or 1."
        )
    return value


def cuda_archs(environ: Mapping[str, str], nvcc_version: tuple[int, int]) -> list[str]:
    """CMAKE_CUDA_ARCHITECTURES from TORCH_CUDA_ARCH_LIST.

    Without it, that is with MFEF_CUDA=1, the usual ones: machine code for A100, H100/H200 and (from
    nvcc 12.8) B200; every other GPU from compute capability 8.0 on runs the 8.0 machine code of its
    family or compiles the 8.0 PTX.
    """
    value = environ.get("TORCH_CUDA_ARCH_LIST", "")
    entries = [entry for entry in re.split(r"[\s,;]+", value) if entry]
    if not entries:
        return ["80", "90a-real"] + (["100-real"] if nvcc_version >= (12, 8) else [])
    archs = []
    for entry in entries:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not found:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={value!r} has the entry {entry!r}; "
                'write compute capabilities, such as "8.0;9.0a;10.0+PTX".'
            )
        archs.append(f"{found[1]}{found[2]}{found[3]}" + ("" if found[4] else "-real"))
    return archs


# --- what the machine has ---------------------------------------------------------------------


def gpu_archs(environ: Mapping[str, str]) -> str:
    """TORCH_CUDA_ARCH_LIST for the GPUs of this machine; empty where the kernels have none."""
    smi = shutil.which("nvidia-smi", path=environ.get("PATH", os.defpath))
    if smi is None:
        return ""
    command = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = {version_of(line) for line in run.stdout.splitlines()} if run.returncode == 0 else set()
    usable = sorted(capability for capability in found if capability >= OLDEST_GPU)
    # Hopper's own instructions are in its "a" architecture.
    return ";".join(f"{major}.{minor}{'a' * (major == 9)}" for major, minor in usable)


def find_torch() -> tuple[Path, str]:
    """The folder of the torch package and its version, without importing it (seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "torch is not installed in the environment that builds; run "
            "`pip install 'torch>=2.10'` first, or build without --no-build-isolation."
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    try:
        text = (folder / "version.py").read_text()
    except OSError:
        text = ""
    found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
    version = found[1] if found else "of unknown version"
    headers = (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists()
    if version_of(version) < OLDEST_TORCH or not headers:
        raise BuildError(
            f"torch {version} in {folder} lacks the stable ABI of torch 2.10; "
            "run `pip install --upgrade 'torch>=2.10'`."
        )
    return folder, version


def find_pybind11() -> str:
    if importlib.util.find_spec("pybind11") is None:
        raise BuildError(
            "pybind11 is not installed in the environment that builds; run "
            "`pip install 'pybind11>=2.13'` first, or build without --no-build-isolation."
        )
    import pybind11

    return pybind11.get_cmake_dir()


def find_program(name: str, environ: Mapping[str, str], oldest: tuple[int, int] = (0, 0)) -> str:
    """cmake or ninja: beside this interpreter, else on PATH.

    In this order a virtual environment gives the same tools whether it is activated or not, and
    the CMake folder of one build serves the next.
    """
    for path in (sysconfig.get_path("scripts"), environ.get("PATH", os.defpath)):
        program = shutil.which(name, path=path)
        if program:
            run = subprocess.run([program, "--version"], capture_output=True, text=True)
            if run.returncode == 0 and version_of(run.stdout) >= oldest:
                return program
    wanted = ".".join(map(str, oldest)) + " or later " if any(oldest) else ""
    raise BuildError(
        f"no {name} {wanted}was found; run `pip install {name}` first, "
        "or build without --no-build-isolation."
    )


def first_complaint(output: str) -> str:
    """The line of a compiler's output that says what is wrong, without paths in front."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    complaints = [line for line in lines if re.search(r"\b(fatal|error)\b", line, re.IGNORECASE)]
    line = (complaints or lines or ["it says nothing"])[0]
    return re.sub(r"^\S+:\d+:\d+: ", "", line).rstrip(".")


# C++20, and what csrc/cpu/simd.h needs beyond it (GCC has it from 12 on).
CXX_PROBE = """
#include <concepts>
#include <span>
template <std::integral T> constexpr T twice(T value) { return value + value; }
static_assert(__cplusplus >= 202002L && twice(2) == 4);
typedef float Lanes __attribute__((vector_size(16)));
Lanes swapped(Lanes a) { return __builtin_shufflevector(a, a, 1, 0, 3, 2); }
int main() { return std::span<const int>().empty() ? 0 : 1; }
"""


def find_cxx(environ: Mapping[str, str]) -> str:
    """A C++20 compiler, in the form that CMake reads from CXX."""
    path = environ.get("PATH", os.defpath)
    asked = environ.get("CXX", "").strip()
    if asked:
        cxx = asked if shutil.which(shlex.split(asked)[0], path=path) else None
    else:
        cxx = next(
            filter(None, (shutil.which(n, path=path) for n in ("c++", "g++", "clang++"))), None
        )
    if cxx is None:
        what = f"CXX={asked!r} names no program" if asked else "no C++ compiler was found"
        raise BuildError(
            f"{what}; install g++ 12 or later (on Debian and Ubuntu: apt-get install g++), "
            "or set CXX to a compiler that knows C++20."
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(CXX_PROBE)
        run = subprocess.run(
            [*shlex.split(cxx), "-std=c++20", "-fsyntax-only", str(source)],
            capture_output=True,
            text=True,
            env=dict(environ),
        )
    if run.returncode != 0:
        raise BuildError(
            f"the C++ compiler {cxx} cannot compile C++20 ({first_complaint(run.stderr)}); "
            "install g++ 12 or clang++ 14, or later, and set CXX to it."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise BuildError(
            f"Python.h is not in {sysconfig.get_path('include')}; install the headers of Python "
            f"{platform.python_version()} (on Debian and Ubuntu: apt-get install python3-dev)."
        )
    return cxx


@dataclass(frozen=True)
class Cuda:
    """Whether _C_cuda is compiled. ``status`` goes into the library, for build_info."""

    nvcc: str | None
    archs: tuple[str, ...]
    status: str


CUDA_PROBE = "#include <cuda_runtime.h>\n__global__ void probe(int* x) { *x = 1; }\n"


def nvcc_complaint(nvcc: str, archs: list[str], environ: Mapping[str, str]) -> str | None:
    """None if nvcc compiles a kernel for ``archs`` with the host's compiler, else what it says."""
    codes = []
    for arch in archs:
        number = arch.removesuffix("-real")
        codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
    host = environ.get("CUDAHOSTCXX")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(CUDA_PROBE)
        run = subprocess.run(
            [nvcc, "-std=c++20", *codes, *(["-ccbin", host] if host else []), "-c", str(source)],
            capture_output=True,
            text=True,
            env=dict(environ),
            cwd=folder,
        )
    return None if run.returncode == 0 else first_complaint(run.stderr + run.stdout)


def plan_cuda(environ: Mapping[str, str]) -> Cuda:
    """What MFEF_CUDA and the machine come to.

    Under ``auto`` a missing or broken nvcc, or no GPU to compile for, leaves CUDA out with one
    sentence, which build_info repeats; under ``1`` a missing or broken nvcc is an error. An error
    in our own CUDA sources always is one.
    """
    mode = cuda_mode(environ)
    if mode == "0":
        return Cuda(None, (), "left out: MFEF_CUDA=0")

    def without(reason: str, remedy: str) -> Cuda:
        if mode == "1":
            raise BuildError(f"MFEF_CUDA=1, but {reason}; {remedy}, or set MFEF_CUDA=0.")
        print(f"mfef_ext: CUDA is left out: {reason}; to have it, {remedy}.", flush=True)
        return Cuda(None, (), f"left out: {reason}")

    folders = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    places = [os.path.join(folder, "bin") for folder in folders]
    places += [environ.get("PATH", os.defpath), str(USUAL_CUDA / "bin")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        return without(
            f"no nvcc is in CUDA_HOME, in CUDA_PATH, on PATH or in {USUAL_CUDA}",
            "install the CUDA toolkit 12.4 or later and set CUDA_HOME to its folder",
        )
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release [\d.]+, V([\d.]+)", run.stdout)
    if run.returncode != 0 or not found:
        return without(
            f"nvcc does not tell its version ({first_complaint(run.stderr + run.stdout)})",
            "repair the CUDA toolkit",
        )
    version = found[1]
    if version_of(version) < OLDEST_NVCC:
        return without(
            f"nvcc {version} is older than 12.4", "install the CUDA toolkit 12.4 or later"
        )
    if mode == "auto" and not environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        here = gpu_archs(environ)
        if not here:
            return without(
                "no GPU of compute capability 8.0 or later is here",
                "set MFEF_CUDA=1, or TORCH_CUDA_ARCH_LIST to the GPUs that it is for",
            )
        environ = {**environ, "TORCH_CUDA_ARCH_LIST": here}
    archs = cuda_archs(environ, version_of(version))
    complaint = nvcc_complaint(nvcc, archs, environ)
    if complaint:
        return without(
            f"nvcc {version} cannot compile a test kernel ({complaint})",
            "repair the CUDA toolkit, set CUDAHOSTCXX to a C++ compiler that it supports, "
            "or set TORCH_CUDA_ARCH_LIST to architectures that it knows",
        )
    return Cuda(nvcc, tuple(archs), f"compiled by nvcc {version} for {' '.join(archs)}")


# --- the build --------------------------------------------------------------------------------


class CMakeBuild(build_ext):
    """Builds both libraries in one CMake folder, kept between builds, and copies them."""

    def get_ext_filename(self, fullname: str) -> str:
        # _C_cuda is loaded by torch, not imported by Python: no Python tag in its name.
        if fullname.endswith("_C_cuda"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    extensions: list[Extension]
    without: tuple[Extension, ...] = ()  # what this build leaves out

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.without:
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)

    def build_extensions(self) -> None:
        environ = dict(os.environ)
        # The cheap questions first: nobody should wait for the answer to a typing error.
        jobs = max_jobs(environ)
        isas = cpu_isas(environ, platform.machine())
        cuda_mode(environ)
        torch_folder, torch_version = find_torch()
        pybind11_dir = find_pybind11()
        cmake = find_program("cmake", environ, OLDEST_CMAKE)
        ninja = find_program("ninja", environ)
        environ["CXX"] = find_cxx(environ)
        cuda = plan_cuda(environ)

        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            # CMake takes only headers and the file name's tag from it: the same for every venv.
            "Python_EXECUTABLE": os.path.realpath(sys.executable),
            "pybind11_DIR": pybind11_dir,
            "MFEF_VERSION": self.distribution.get_version(),
            "MFEF_TORCH_DIR": torch_folder,
            "MFEF_TORCH_VERSION": torch_version,
            "MFEF_CPU_ISA": ";".join(isas),
            "MFEF_CUDA": "ON" if cuda.nvcc else "OFF",
            "MFEF_CUDA_STATUS": cuda.status,
        }
        if cuda.nvcc:
            options["CMAKE_CUDA_COMPILER"] = cuda.nvcc
            options["MFEF_CUDA_ARCHS"] = ";".join(cuda.archs)

        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / f"cmake-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        self.configure(cmake, folder, options, environ)
        command = [cmake, "--build", str(folder), "--parallel", str(jobs)]
        if subprocess.run(command, env=environ).returncode != 0:
            raise BuildError(
                "the compilation failed, the messages above say where; if a compiler was killed "
                "for want of memory, set MAX_JOBS=1."
            )

        if not cuda.nvcc:
            self.without = tuple(e for e in self.extensions if e.name.endswith("_C_cuda"))
            self.extensions = [ext for ext in self.extensions if ext not in self.without]
            # One that an earlier build left there would go into the wheel.
            for ext in self.without:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(folder / target.name), str(target))

    def configure(
        self, cmake: str, folder: Path, options: Mapping[str, object], environ: Mapping[str, str]
    ) -> None:
        """Runs CMake; from scratch when a tool has changed, for CMake keeps what it found."""
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        ours = ("MFEF_VERSION", "MFEF_CPU_ISA", "MFEF_CUDA", "MFEF_CUDA_STATUS", "MFEF_CUDA_ARCHS")
        tools = [f"{name}={value}" for name, value in options.items() if name not in ours]
        record = folder / "tools.txt"
        content = "\n".join([cmake, environ["CXX"], environ.get("CUDAHOSTCXX", ""), *tools])
        fresh = not record.exists() or record.read_text() != content
        record.unlink(missing_ok=True)
        command = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *definitions]
        if subprocess.run(command + ["--fresh"] * fresh, env=environ).returncode != 0:
            raise BuildError("CMake could not configure the build, its messages above say why.")
        record.write_text(content)


if __name__ == "__main__":
    if version_of(setuptools.__version__) < OLDEST_SETUPTOOLS:
        raise BuildError(
            f"setuptools {setuptools.__version__} is older than {OLDEST_SETUPTOOLS[0]}; run "
            "`pip install --upgrade setuptools` first, or build without --no-build-isolation."
        )
    setup(
        ext_modules=[
            Extension("mfef_ext._C", []),
            # Optional: there is a wheel without it where there is no nvcc.
            Extension("mfef_ext._C_cuda", [], optional=True),
        ],
        cmdclass={"build_ext": CMakeBuild},
    )
