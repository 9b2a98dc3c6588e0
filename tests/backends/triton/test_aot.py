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


# As compile_for does, and as a launch does.
SHORT_CUTS = """
import subprocess
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mfef_ext.backends.triton import aot

compiled = []
compile = triton.compile

def keep(*arguments, **options):
    compiled.append(compile(*arguments, **options))
    return compiled[-1]

def instructions(code):
    cubin = Path("code.cubin")
    cubin.write_bytes(code.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split("/* 0x")[0] for line in text.splitlines() if "/*" in line]
    assert len(lines) > 100
    return lines

one = next(o for o in aot.collect() if (o.name, o.configuration.get("PRECISION")) == WANTED)
architectures = (100,)
triton.compile = keep
aot.compile_for(one, architectures)
triton.compile = compile
source = ASTSource(one.kernel, one.signature, one.constants, one.attributes)
for short, a in zip(compiled, architectures, strict=True):
    usual = compile(source, target=GPUTarget("cuda", a, 32), options=dict(one.options))
    assert ".loc" in usual.asm["ptx"] and ".loc" not in short.asm["ptx"]
    assert instructions(usual) == instructions(short), a
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [("weight_partials", "tf32")])
def test_short_cuts_of_the_compilation_change_no_instruction(kernel, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", f"WANTED = {kernel}\n{SHORT_CUTS}"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert ran.returncode == 0, ran.stderr


# In a process of its own, since kernels that are interpreted are not specialised.
COVERED = """
import itertools
from mfef_ext.backends.triton import aot, attention, conv, kd

found = aot.collect()


def constants(kernel, *names):
    ones = [{**one.options, **one.configuration} for one in found if one.name == kernel]
    return {tuple(one.get(name, False) for name in names) for one in ones}


def same(listed, wanted):
    assert listed == wanted, (listed, wanted)


def tiles_of(tiles):
    return [(t.channels, pixels, t.warps) for pixels, several in tiles.values() for t in several]


kernels = {
    (file.__name__.rpartition(".")[2], kernel.__name__.removeprefix("_"))
    for file in (attention, conv, kd)
    for kernel in vars(file).values()
    if isinstance(kernel, aot.triton.JITFunction) and kernel.do_not_specialize
}
same({(one.file, one.name) for one in found}, kernels)
whole = {"ieee": "ieee", "half": "ieee", "tf32": "tf32"}
options = ("num_warps", "num_stages", "PRECISION")
names = ("IMAGES", "PIXELS", "SRC_FLAT", "MOST", *options)
tiles = {(images * pixels, *rest) for images, pixels, *rest in constants("convolve", *names)}
for c in conv.CONVOLUTION.values():
    for flat, tile in itertools.product((True, False), c.tiles):
        precision = whole[c.name.split(",")[0]]
        key = (c.pixels, flat, tile.channels, tile.warps, c.stages, precision)
        assert key in tiles, key
for c in conv.WEIGHT_GRADIENT.values():
    for flat, tile in itertools.product((True, False), c.tiles):
        key = (flat, tile.warps, c.stages, whole[c.name])
        assert key in constants("weight_partials", "X_FLAT", *options), key
tile = ("BLOCK_C", "BLOCK_P", "num_warps")
for kernel in (k for f, k in kernels if f == "attention" and k.startswith("image_")):
    wanted = {(*t, way) for t in tiles_of(attention.IMAGE_TILES) for way in (1, False)}
    same(constants(kernel, *tile, "y_c"), wanted)
for kernel in ("statistics", "pool", "output", "pool_backward", "spatial_backward",
               "input_gradient"):
    same(constants(kernel + "_kernel", *tile), set(tiles_of(attention.PIXEL_TILES)))
mlps = {(*t, way) for t in attention.MLP_TILES.values() for way in (True, False)}
same(constants("gate_kernel", "BLOCK_H", "BLOCK_M", "BACKWARD"), mlps)
for kernel in ("forward_kernel", "backward_kernel"):
    same(constants(kernel, "IMAGES", "CLASSES", "WHOLE"),
         {(c.images, c.classes, c.whole) for c in kd.CONFIGURATIONS})
"""


@pytest.mark.slow
def test_every_kernel_is_compiled_in_every_configuration():
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
    assert str(one) == "C=1, not S, 2 warps, 1 stage"
    other_weights = specialisation({(1,): 1, (2,): ((5, 6),), (3,): False})
    assert one.kind == other_weights.kind
    for constants in ({(2,): ((3, 4),), (3,): False}, {(1,): 1, (2,): None, (3,): False}):
        assert specialisation(constants).kind != one.kind


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
    rows = [(one, [aot.Usage(40, 0, 1024), aot.Usage(255, 16, 100 * 1024)])]
    spills, shared = aot.complaints(rows, (80, 90))
    what = "some_kernel (a case; C=8, not S, 2 warps, 1 stage) on sm_90"
    assert spills == f"{what} spills 16 bytes per thread."
    assert shared == f"{what} takes 102400 bytes of shared memory."
    assert aot.table(rows, (80, 90)).splitlines()[-1] == (
        "| some_kernel | a case | C=8, not S, 2 warps, 1 stage | 40 / 255 | 0 / 16 "
        "| 1024 / 102400 |"
    )
    assert aot.complaints([(one, [aot.Usage(40, 0, 99 * 1024)])], (80,)) == []
    options = {"num_warps": 16, "num_stages": 1}
    wide = aot.Specialisation("a case", KERNEL, {}, {(1,): 8, (3,): False}, {}, options)
    assert aot.complaints([(wide, [aot.Usage(128, 0, 0)])], (80,)) == []
    (registers,) = aot.complaints([(wide, [aot.Usage(129, 0, 0)])], (80,))
    assert registers.endswith("needs more registers than there are.")
