"""Triton kernels compiled ahead of time: how it is asked for, what is read out of it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

aot = pytest.importorskip("mfef_ext.backends.triton.aot", exc_type=ModuleNotFoundError)

ROOT = Path(__file__).resolve().parents[3]


def run_aot(*arguments, **environment):
    """The module in a process in which Triton compiles: this one interprets."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "mfef_ext.backends.triton.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


@pytest.mark.slow
def test_kernels_of_kd_loss():
    """No kernel spills or takes too much shared memory. The other files take minutes:
    `python -m mfef_ext.backends.triton.aot` compiles them all."""
    ran = run_aot("--only", "kd")
    assert ran.returncode == 0, ran.stderr


def test_interpreted_kernels_are_not_compiled():
    ran = run_aot(TRITON_INTERPRET="1")
    assert ran.returncode == 2 and "unset it" in ran.stderr


@pytest.mark.parametrize("part", [("--arch", "90"), ("--only", "kd")])
def test_part_of_the_table_is_not_written(part):
    ran = run_aot("--write", *part)
    assert ran.returncode == 2 and "leave out" in ran.stderr


KERNEL = SimpleNamespace(__name__="kernel", arg_names=["x", "sizes", "step", "BLOCK"])


def specialisation(types, constants):
    return aot.Specialisation("some kernel", KERNEL, types, constants, 4, 3)


@pytest.mark.parametrize(
    ("types", "constants", "named"),
    [
        ({"x": "*fp32", "sizes": ("i32",)}, {"BLOCK": 8}, "step"),
        ({"x": "*fp32", "sizes": ("i32",), "step": "i32"}, {"BLOCK": 8, "WIDTH": 1}, "WIDTH"),
        ({"x": "*fp32", "sizes": ("i32",), "step": "i32"}, {"BLOCK": 8, "step": 1}, "step"),
    ],
)
def test_every_argument_is_given_once(types, constants, named):
    with pytest.raises(ValueError, match=f"some kernel: .* look at {named}"):
        aot.source(specialisation(types, constants))


def test_constants_may_stand_among_the_types():
    types = {"x": "*fp32", "sizes": ("i32", "i32:16"), "step": "i64", "BLOCK": "constexpr"}
    found = aot.source(specialisation(types, {"BLOCK": 8}))
    assert found.signature == types | {"sizes": ("i32", "i32")}
    assert found.constants == {(3,): 8}
    assert sorted(found.attrs) == [(0,), (1, 1)]


def test_dtype_is_that_of_the_maps():
    for pointer, dtype in (("*fp32", "float32"), ("*bf16", "bfloat16"), ("*fp16", "float16")):
        types = {"statistics": "*fp32", "maps": ("i32", (pointer, "*i32"))}
        assert specialisation(types, {}).dtype == dtype
    assert specialisation({"n": "i32"}, {}).dtype == ""


def test_paths_of_arguments():
    types = {"x": "*fp32", "sizes": ("i32", ("i32:16",)), "step": "i64"}
    assert list(aot.leaves(types)) == [
        ((0,), "*fp32"),
        ((1, 0), "i32"),
        ((1, 1, 0), "i32:16"),
        ((2,), "i64"),
    ]


USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function forward_kernel:
  REG:40 STACK:{stack} SHARED:0 LOCAL:{local} CONSTANT[0]:608 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_usage_is_read():
    assert aot.parse_usage(USAGE.format(stack=0, local=0)) == (40, 0)
    assert aot.parse_usage(USAGE.format(stack=16, local=0)) == (40, 16)
    assert aot.parse_usage(USAGE.format(stack=8, local=4)) == (40, 12)
    with pytest.raises(RuntimeError, match="names 0 kernels"):
        aot.parse_usage("")


def test_spills_and_shared_memory_are_complained_about():
    one = specialisation({"x": "*bf16"}, {"BLOCK": 8, "SPLIT": False})
    rows = [(one, [aot.Usage(40, 0, 1024), aot.Usage(255, 16, 100 * 1024)])]
    spills, shared = aot.complaints(rows, (80, 90))
    what = "some kernel (bfloat16; BLOCK=8, not SPLIT, 4 warps, 3 stages) on sm_90"
    assert spills == f"{what} spills 16 bytes per thread."
    assert shared == f"{what} takes 102400 bytes of shared memory."
    assert aot.table(rows, (80, 90)).splitlines()[-1] == (
        "| some kernel | bfloat16 | BLOCK=8, not SPLIT, 4 warps, 3 stages | 40 / 255 | 0 / 16 "
        "| 1024 / 102400 |"
    )
    assert aot.complaints([(one, [aot.Usage(40, 0, 99 * 1024)])], (80,)) == []
