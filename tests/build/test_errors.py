"""What a build says when something is missing or wrong: one sentence, no traceback.

The subprocess tests run the real setup.py in a copy of the few files it reads, up to the point
where it stops; nothing here compiles the package.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "mfef_ext/version.py")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree that is enough for setup.py to find out what is missing."""
    tree = tmp_path / "tree"
    for name in COPIED:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    (tree / "README.md").touch()
    return tree


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module: its functions, without calling setup()."""
    spec = importlib.util.spec_from_file_location("mfef_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mfef_setup", module)
    spec.loader.exec_module(module)
    return module


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what steers a build, and with ``changes``."""
    ours = ("MAX_JOBS", "MFEF_CUDA", "MFEF_CPU_ISA", "TORCH_CUDA_ARCH_LIST", "CXX", "CUDAHOSTCXX")
    ours += ("CUDA_HOME", "CUDA_PATH", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in ours} | changes


def complaint(tree: Path, **changes: str) -> str:
    """The sentence with which ``setup.py build_ext`` ends."""
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=tree,
        env=environment(**changes),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    return run.stderr.strip().splitlines()[-1]


def program(path: Path, script: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_nvcc(folder: Path, version: str = "13.0.88", otherwise: str = "exit 1") -> Path:
    """A CUDA folder whose nvcc tells its version and otherwise does as asked."""
    release = version.rpartition(".")[0]
    tells = f"echo 'Cuda compilation tools, release {release}, V{version}'; exit 0"
    program(folder / "bin" / "nvcc", f'[ "$1" = --version ] && {{ {tells}; }}\n{otherwise}')
    return folder


# --- wrong values -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_max_jobs(tree: Path, value: str) -> None:
    assert complaint(tree, MAX_JOBS=value) == (
        f"mfef_ext: MAX_JOBS={value!r} must be a positive number of compiler processes."
    )


def test_cuda_mode(tree: Path) -> None:
    assert complaint(tree, MFEF_CUDA="yes") == (
        "mfef_ext: MFEF_CUDA='yes' must be auto (compile for CUDA if nvcc is found), 0 or 1."
    )


def test_isa_on_x86(driver: ModuleType) -> None:
    with pytest.raises(SystemExit) as error:
        driver.cpu_isas({"MFEF_CPU_ISA": "baseline;sse9"}, "x86_64")
    assert str(error.value) == (
        "mfef_ext: MFEF_CPU_ISA='baseline;sse9' names 'sse9'; "
        "on a x86_64 machine use a list of baseline, avx2, avx512, avx512_bf16."
    )


def test_isa_elsewhere(driver: ModuleType) -> None:
    assert driver.cpu_isas({}, "aarch64") == ["baseline"]
    with pytest.raises(SystemExit) as error:
        driver.cpu_isas({"MFEF_CPU_ISA": "avx2"}, "aarch64")
    assert str(error.value) == (
        "mfef_ext: MFEF_CPU_ISA='avx2' names 'avx2'; on a aarch64 machine use a list of baseline."
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ["baseline", "avx2", "avx512", "avx512_bf16"]),
        ("avx512", ["baseline", "avx512"]),
        ("avx512_bf16", ["baseline", "avx512_bf16"]),
        ("avx2;baseline", ["baseline", "avx2"]),
        ("avx512, avx2", ["baseline", "avx2", "avx512"]),
    ],
)
def test_isa_list(driver: ModuleType, value: str, expected: list[str]) -> None:
    assert driver.cpu_isas({"MFEF_CPU_ISA": value}, "x86_64") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("8.0", ["80-real"]),
        ("8.0;9.0a;10.0+PTX", ["80-real", "90a-real", "100"]),
        ("8.6 12.0f", ["86-real", "120f-real"]),
    ],
)
def test_arch_list(driver: ModuleType, value: str, expected: list[str]) -> None:
    assert driver.cuda_archs({"TORCH_CUDA_ARCH_LIST": value}, (13, 0)) == expected


def test_arch_list_default(driver: ModuleType) -> None:
    assert driver.cuda_archs({}, (13, 0)) == ["80", "90a-real", "100-real"]
    assert driver.cuda_archs({}, (12, 4)) == ["80", "90a-real"]


def test_arch_list_wrong(tree: Path, tmp_path: Path) -> None:
    cuda = fake_nvcc(tmp_path / "cuda")
    assert complaint(tree, CUDA_HOME=str(cuda), TORCH_CUDA_ARCH_LIST="8.0;Hopper") == (
        "mfef_ext: TORCH_CUDA_ARCH_LIST='8.0;Hopper' has the entry 'Hopper'; "
        'write compute capabilities, such as "8.0;9.0a;10.0+PTX".'
    )


# --- what is missing or too old ---------------------------------------------------------------


def test_no_compiler(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert complaint(tree, PATH=str(tmp_path / "empty")) == (
        "mfef_ext: no C++ compiler was found; install g++ 12 or later (on Debian and Ubuntu: "
        "apt-get install g++), or set CXX to a compiler that knows C++20."
    )


def test_no_compiler_through_pip(tree: Path, tmp_path: Path) -> None:
    """pip, too, shows the sentence and no traceback."""
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    run = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path / "dist"), str(tree)],
        env=environment(PATH=str(tmp_path / "empty")),
        capture_output=True,
        text=True,
    )
    output = run.stdout + run.stderr
    assert run.returncode == 1
    assert output.count("mfef_ext: no C++ compiler was found; install g++ 12 or later") == 1
    assert "Traceback" not in output


def test_unknown_compiler(tree: Path) -> None:
    assert complaint(tree, CXX="g++-0 -pipe") == (
        "mfef_ext: CXX='g++-0 -pipe' names no program; install g++ 12 or later (on Debian and "
        "Ubuntu: apt-get install g++), or set CXX to a compiler that knows C++20."
    )


def test_old_compiler(tree: Path, tmp_path: Path) -> None:
    says = "echo \"g++: error: unrecognized command-line option '-std=c++20'\" >&2; exit 1"
    old = program(tmp_path / "g++", says)
    assert complaint(tree, CXX=str(old)) == (
        f"mfef_ext: the C++ compiler {old} cannot compile C++20 (g++: error: unrecognized "
        "command-line option '-std=c++20'); install g++ 12 or clang++ 14, or later, "
        "and set CXX to it."
    )


def test_no_torch(tree: Path, tmp_path: Path) -> None:
    # A module that is None in sys.modules is one that cannot be found.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None\n")
    assert complaint(tree, PYTHONPATH=str(tmp_path / "site")) == (
        "mfef_ext: torch is not installed in the environment that builds; run "
        "`pip install 'torch>=2.10'` first, or build without --no-build-isolation."
    )


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.0"])
def test_old_torch(tree: Path, tmp_path: Path, version: str) -> None:
    package = tmp_path / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    assert complaint(tree, PYTHONPATH=str(tmp_path / "site")) == (
        f"mfef_ext: torch {version} in {package} lacks the stable ABI of torch 2.10; "
        "run `pip install --upgrade 'torch>=2.10'`."
    )


def test_no_pybind11(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    hides = "import sys; sys.modules['pybind11'] = None\n"
    (tmp_path / "site" / "sitecustomize.py").write_text(hides)
    assert complaint(tree, PYTHONPATH=str(tmp_path / "site")) == (
        "mfef_ext: pybind11 is not installed in the environment that builds; run "
        "`pip install 'pybind11>=2.13'` first, or build without --no-build-isolation."
    )


def test_no_ninja(driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit) as error:
        driver.find_program("ninja", {"PATH": str(tmp_path)})
    assert str(error.value) == (
        "mfef_ext: no ninja was found; run `pip install ninja` first, "
        "or build without --no-build-isolation."
    )


def test_old_cmake(driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old cmake on PATH counts as none; a newer one in the other place is taken."""
    old = program(tmp_path / "old" / "cmake", "echo cmake version 3.22.1")
    new = program(tmp_path / "new" / "cmake", "echo cmake version 3.31.0")
    monkeypatch.setattr(driver.sysconfig, "get_path", lambda name: str(old.parent))
    assert driver.find_program("cmake", {"PATH": str(new.parent)}, (3, 25)) == str(new)
    with pytest.raises(SystemExit) as error:
        driver.find_program("cmake", {"PATH": str(old.parent)}, (3, 25))
    assert str(error.value) == (
        "mfef_ext: no cmake 3.25 or later was found; run `pip install cmake` first, "
        "or build without --no-build-isolation."
    )


def test_old_setuptools(tree: Path, tmp_path: Path) -> None:
    package = tmp_path / "site" / "sitecustomize.py"
    package.parent.mkdir()
    package.write_text("import setuptools; setuptools.__version__ = '65.5.0'\n")
    assert complaint(tree, PYTHONPATH=str(package.parent)) == (
        "mfef_ext: setuptools 65.5.0 is older than 77; run `pip install --upgrade setuptools` "
        "first, or build without --no-build-isolation."
    )


# --- nvcc -------------------------------------------------------------------------------------

BROKEN = "echo \"nvcc fatal   : Cannot find compiler 'g++' in PATH\" >&2; exit 1"
BROKEN_REASON = (
    "nvcc 13.0.88 cannot compile a test kernel (nvcc fatal   : Cannot find compiler 'g++' in PATH)"
)


def test_broken_nvcc_is_an_error_when_asked_for(tree: Path, tmp_path: Path) -> None:
    cuda = fake_nvcc(tmp_path / "cuda", otherwise=BROKEN)
    assert complaint(tree, CUDA_HOME=str(cuda), MFEF_CUDA="1") == (
        f"mfef_ext: MFEF_CUDA=1, but {BROKEN_REASON}; repair the CUDA toolkit, set CUDAHOSTCXX to "
        "a C++ compiler that it supports, or set TORCH_CUDA_ARCH_LIST to architectures that it "
        "knows, or set MFEF_CUDA=0."
    )


def test_broken_nvcc_is_left_out_otherwise(
    driver: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda = fake_nvcc(tmp_path / "cuda", otherwise=BROKEN)
    plan = driver.plan_cuda(environment(CUDA_HOME=str(cuda), TORCH_CUDA_ARCH_LIST="8.0"))
    assert plan == driver.Cuda(None, (), f"left out: {BROKEN_REASON}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"mfef_ext: CUDA is left out: {BROKEN_REASON}; to have it, repair")


def test_working_nvcc(driver: ModuleType, tmp_path: Path) -> None:
    cuda = fake_nvcc(tmp_path / "cuda", otherwise="exit 0")
    plan = driver.plan_cuda(environment(CUDA_HOME=str(cuda), TORCH_CUDA_ARCH_LIST="9.0a"))
    assert plan.nvcc == str(cuda / "bin" / "nvcc")
    assert plan.archs == ("90a-real",)
    assert plan.status == "compiled by nvcc 13.0.88 for 90a-real"


@pytest.mark.parametrize(
    ("script", "archs"),
    [
        ("echo 9.0; echo 8.6; echo 9.0", ("86-real", "90a-real")),
        ("echo 7.5; echo 10.0", ("100-real",)),
        ("echo 7.5", ()),
        ("echo No devices were found; exit 6", ()),
        ("exit 0", ()),
    ],
)
def test_the_gpus_that_are_here(
    driver: ModuleType, tmp_path: Path, script: str, archs: tuple[str, ...]
) -> None:
    """They are compiled for; without one CUDA is left out, unless it is asked for."""
    program(tmp_path / "nvidia-smi", script)
    cuda = fake_nvcc(tmp_path / "cuda", otherwise="exit 0")
    here = environment(CUDA_HOME=str(cuda))
    here["PATH"] = f"{tmp_path}{os.pathsep}{here['PATH']}"
    plan = driver.plan_cuda(here)
    assert plan.archs == archs
    if not archs:
        assert plan.nvcc is None
        assert plan.status == "left out: no GPU of compute capability 8.0 or later is here"
        asked = driver.plan_cuda(here | {"MFEF_CUDA": "1"})
        assert asked.archs == ("80", "90a-real", "100-real")


def test_no_nvcc(
    driver: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(driver, "USUAL_CUDA", tmp_path / "usual")
    reason = f"no nvcc is in CUDA_HOME, in CUDA_PATH, on PATH or in {tmp_path / 'usual'}"
    remedy = "install the CUDA toolkit 12.4 or later and set CUDA_HOME to its folder"
    nowhere = environment(PATH=str(tmp_path))
    assert driver.plan_cuda(nowhere) == driver.Cuda(None, (), f"left out: {reason}")
    said = f"mfef_ext: CUDA is left out: {reason}; to have it, {remedy}.\n"
    assert capsys.readouterr().out == said
    with pytest.raises(SystemExit) as error:
        driver.plan_cuda(nowhere | {"MFEF_CUDA": "1"})
    assert str(error.value) == (
        f"mfef_ext: MFEF_CUDA=1, but {reason}; {remedy}, or set MFEF_CUDA=0."
    )


def test_old_nvcc(driver: ModuleType, tmp_path: Path) -> None:
    cuda = fake_nvcc(tmp_path / "cuda", version="11.8.89")
    plan = driver.plan_cuda(environment(CUDA_PATH=str(cuda)))
    assert plan == driver.Cuda(None, (), "left out: nvcc 11.8.89 is older than 12.4")


def test_nvcc_is_not_asked_when_cuda_is_off(driver: ModuleType, tmp_path: Path) -> None:
    cuda = fake_nvcc(tmp_path / "cuda", otherwise="touch asked; exit 1")
    plan = driver.plan_cuda(environment(CUDA_HOME=str(cuda), MFEF_CUDA="0"))
    assert plan == driver.Cuda(None, (), "left out: MFEF_CUDA=0")
