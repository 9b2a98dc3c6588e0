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
def test_every_kernel_compiles():
    """For every architecture: no spills, registers and shared memory within the limits."""
    ran = run_aot("--smoke", "--jobs", "1")
    assert ran.returncode == 0, ran.stderr


# In a process of its own, since kernels that are interpreted are not specialised.
COVERED = """
from mfef_ext.backends.triton import aot, attention, conv, kd

kernels = {
    kernel.__name__.removeprefix("_")
    for file in (attention, conv, kd)
    for kernel in vars(file).values()
    if isinstance(kernel, aot.triton.JITFunction) and kernel.do_not_specialize
}
found = list(aot.launches())
assert {one.name for one in aot.launches(aot.SMOKE)} == kernels


def constants(kernel, *names):
    ones = [{**one.options, **one.configuration} for one in found if one.name == kernel]
    return {tuple(one.get(name, False) for name in names) for one in ones}


def same(listed, wanted):
    assert listed == wanted, (listed, wanted)


def tiles_of(tiles):  # the first of each list: the others are compiled where they are timed
    return {(t.choices[0].channels, t.pixels, t.choices[0].warps) for t in tiles.values()}


sizes = ("MAX_CHANNELS", "num_warps", "num_stages", "PRECISION")
for (products, _), c in conv.CONVOLUTION.items():
    precision = "tf32" if products == "tf32" else "ieee"
    key = (c.tiles[0].channels, c.tiles[0].warps, c.stages, precision)
    assert key in constants("convolve", *sizes), key
for products, c in conv.WEIGHT_GRADIENT.items():
    key = (c.tiles[0].warps, c.stages, "tf32" if products == "tf32" else "ieee")
    assert key in constants("weight_partials", *sizes[1:]), key
tile = ("BLOCK_C", "BLOCK_P", "num_warps")
for kernel in kernels:
    if kernel.startswith("image_"):
        same(constants(kernel, *tile), tiles_of(attention.IMAGE_TILES))
for kernel in ("pool", "output", "pool_backward", "spatial_backward", "input_gradient"):
    same(constants(kernel + "_kernel", *tile), tiles_of(attention.PIXEL_TILES))
mlps = {(*t, way) for t in attention.MLP_TILES.values() for way in (True, False)}
same(constants("gate_kernel", "BLOCK_H", "BLOCK_M", "BACKWARD"), mlps)
for kernel in ("forward_kernel", "backward_kernel"):
    same(constants(kernel, "IMAGES", "CLASSES", "WHOLE"),
         {(c.images, c.classes, c.whole) for c in kd.CONFIGURATIONS})
"""


def test_the_smoke_test_has_every_kernel_and_the_cases_every_tile():
    command = [sys.executable, "-W", "ignore", "-c", COVERED]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert ran.returncode == 0, ran.stderr


def test_interpreted_kernels_are_not_compiled():
    ran = run_aot(TRITON_INTERPRET="1")
    assert ran.returncode == 2 and "unset it" in ran.stderr


KERNEL = SimpleNamespace(
    __name__="_some_kernel", __module__="a.conv", arg_names=["x", "C", "B", "S"]
)


def specialisation(constants):
    """Of a kernel (x, C, B, S), with two warps."""
    options = {"num_warps": 2, "num_stages": 1}
    return aot.Specialisation("a case", KERNEL, {}, constants, {}, options)


def test_what_is_compiled_once():
    one = specialisation({(1,): 1, (2,): ((3, 4),), (3,): False})
    assert one.configuration == {"C": 1, "S": False}
    assert one.kind == specialisation({(1,): 1, (2,): ((5, 6),), (3,): False}).kind
    assert one.kind != specialisation({(1,): 2, (2,): ((3, 4),), (3,): False}).kind


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
    one = specialisation({(1,): 8, (3,): False})
    assert aot.complaints(one, 80, aot.Usage(40, 0, 99 * 1024)) == []
    spills, shared = aot.complaints(one, 90, aot.Usage(255, 16, 100 * 1024))
    what = "some_kernel (a case; {'C': 8, 'S': False}) on sm_90"
    assert spills == f"{what} spills 16 bytes per thread."
    assert shared == f"{what} takes 102400 bytes of shared memory."
    options = {"num_warps": 16, "num_stages": 1}
    large = aot.Specialisation("a case", KERNEL, {}, {(1,): 8, (3,): False}, {}, options)
    assert aot.complaints(large, 80, aot.Usage(128, 0, 0)) == []
    (registers,) = aot.complaints(large, 80, aot.Usage(129, 0, 0))
    assert registers.endswith("needs more registers than there are.")
