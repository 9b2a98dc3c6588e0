"""What the built libraries ask of torch, and what the per-ISA objects share with each other."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type letter, demangled name) of every symbol that nm lists."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed (binutils has it)")
    run = subprocess.run(
        [nm, "-C", *options, str(path)], capture_output=True, text=True, check=True
    )
    found = (re.fullmatch(r"[0-9a-f]* +(\w) (.*)", line) for line in run.stdout.splitlines())
    return [(match[1], match[2]) for match in found if match]


def library(pattern: str) -> Path:
    """The installed library; skips if this build has none."""
    spec = importlib.util.find_spec("mfef_ext")
    assert spec and spec.submodule_search_locations
    found = [p for f in spec.submodule_search_locations for p in sorted(Path(f).glob(pattern))]
    if not found:
        pytest.skip(f"mfef_ext was built without {pattern}")
    return found[0]


@pytest.mark.parametrize("pattern", ["_C.*.so", "_C_cuda.so"])
def test_stable_abi_only(pattern: str) -> None:
    """No C++ symbol of ATen or c10, wanted or offered: the promise of one build for every torch."""
    found = symbols(library(pattern), "-D")
    assert any(name.startswith(("aoti_torch_", "torch_")) for _, name in found)
    assert [name for _, name in found if re.search(r"\b(at|c10)::", name)] == []


@pytest.mark.parametrize("pattern", ["_C.*.so", "_C_cuda.so"])
def test_no_folder_of_the_build_machine(pattern: str) -> None:
    """Neither a run path nor a name of a source file says where it was built."""
    content = library(pattern).read_bytes()
    assert str(ROOT).encode() not in content
    assert b"/site-packages/torch/" not in content


def kernel_objects() -> list[Path]:
    return sorted(ROOT.glob("build/cmake-*/CMakeFiles/kernels_*.dir/**/*.o"))


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_isa_objects_share_nothing(isa: str) -> None:
    """An inline function compiled for AVX-512 must not become the one that everybody calls.

    The linker keeps one copy of each weak symbol, from whichever object it meets first: one that
    is not in the ISA's own namespace could bring AVX-512 code to a machine without it.
    """
    objects = [path for path in kernel_objects() if f"_{isa}.dir" in str(path)]
    if not objects:
        pytest.skip(f"the build folder has no kernel objects for {isa}")
    for path in objects:
        # V also has DW.ref.*, a pointer to the exception handling routine: data, and all alike.
        weak = [
            name
            for letter, name in symbols(path, "--defined-only")
            if letter in "WVu" and not name.startswith("DW.ref.")
        ]
        assert [name for name in weak if f"::{isa}::" not in name] == []
