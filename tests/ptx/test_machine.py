"""The machine computes what PTX says, and finds each fault that is planted here."""

import numpy as np
import pytest
import torch

from .machine import Module, Range

# %rd1 and %rd2: the arguments. %r1: the thread; %rd3: four times it.
START = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry k(.param .u64 p0, .param .u64 p1)
{
  .reg .pred %p<9>;
  .reg .b32 %r<40>;
  .reg .f32 %f<40>;
  .reg .b64 %rd<20>;
  ld.param.u64 %rd1, [p0];
  ld.param.u64 %rd2, [p1];
  cvta.to.global.u64 %rd1, %rd1;
  cvta.to.global.u64 %rd2, %rd2;
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 4;
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  mov.u32 %r2, dynamic;
  shl.b32 %r3, %r1, 2;
  add.s32 %r4, %r2, %r3;
"""


def run(body, source, result, grid=1, block=32, shared=0, backwards=False):
    module = Module(f"{START}{body}\n  ret;\n}}\n")
    arguments, memory = zip(*[(a.ctypes.data, Range.of(a)) for a in (source, result)], strict=True)
    return module.launch("k", (grid, 1, 1), (block, 1, 1), arguments, memory, shared, backwards)


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("add.s32 %r6, %r5, 7;", lambda x: x + 7),
        ("mul.hi.s32 %r6, %r5, -3;", lambda x: x * -3 >> 32),
        ("mad.lo.s32 %r6, %r5, %r5, 1;", lambda x: x * x + 1),
        ("shr.s32 %r6, %r5, 3;", lambda x: x >> 3),
        ("div.s32 %r6, %r5, 7;", lambda x: np.trunc(x / 7)),
        ("rem.s32 %r6, %r5, 7;", lambda x: np.fmod(x, 7)),
        ("bfe.s32 %r6, %r5, 2, 5;", lambda x: ((x >> 2 & 31) ^ 16) - 16),
        ("lop3.b32 %r6, %r5, 12, 10, 0xe8;", lambda x: (x & 12) | (x & 10) | (12 & 10)),
        ("shfl.sync.bfly.b32 %r6, %r5, 4, 31, -1;", lambda x: x[np.arange(32) ^ 4]),
        ("shfl.sync.down.b32 %r6, %r5, 1, 31, -1;", lambda x: x[[*range(1, 32), 31]]),
        ("setp.lt.s32 %p1, %r5, 0; selp.b32 %r6, 1, 2, %p1;", lambda x: np.where(x < 0, 1, 2)),
        ("cvt.rn.f32.s32 %f1, %r5; cvt.rzi.s32.f32 %r6, %f1;", lambda x: x),
        (
            "setp.lt.s32 %p1, %r5, 0; @%p1 bra L; mov.b32 %r6, 5; bra.uni E;"
            " L: neg.s32 %r6, %r5; E:",
            lambda x: np.where(x < 0, -x, 5),
        ),
    ],
)
def test_integers(instruction, expected):
    x = np.arange(-800, 800, 50, dtype=np.int32)
    y = np.zeros_like(x)
    found = run(f"ld.global.b32 %r5, [%rd4]; {instruction} st.global.b32 [%rd5], %r6;", x, y)
    assert not found.reports
    np.testing.assert_array_equal(y, expected(x.astype(np.int64)).astype(np.int32))


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_of_halves(name, dtype):
    x = torch.randn(32)
    y = torch.zeros(32)
    body = f".reg .b16 %h<2>; ld.global.f32 %f1, [%rd4]; cvt.rn.{name}.f32 %h1, %f1;"
    body += f" cvt.f32.{name} %f2, %h1; st.global.f32 [%rd5], %f2;"
    assert not run(body, x.numpy(), y.numpy()).reports
    assert torch.equal(y, x.to(dtype).float())


@pytest.mark.parametrize(
    "kind, k", [("tf32", 4), ("tf32", 8), ("bf16", 8), ("bf16", 16), ("f16", 16)]
)
def test_mma(kind, k):
    """Lane 4 r + q holds rows r and r + 8 of A, column r of B, columns 2 q and 2 q + 1 of C."""
    generator = np.random.default_rng(0)
    a, b = generator.integers(-8, 8, (16, k)), generator.integers(-8, 8, (k, 8))
    per = 1 if kind == "tf32" else 2
    lanes = np.arange(32)
    row, quarter = lanes // 4, lanes % 4
    registers = []
    for slots, take in ((2, lambda n, c: a[row + n % 2 * 8, c]), (1, lambda n, c: b[c, row])):
        for n in range(slots * k // (4 * per)):
            columns = [((n // slots * 4 + quarter) * per + part) for part in range(per)]
            values = np.stack([take(n, c) for c in columns], 1).astype(np.float32)
            if kind == "tf32":
                registers.append(np.ascontiguousarray(values).view(np.uint32)[:, 0])
            else:
                halves = torch.from_numpy(values).to(
                    torch.bfloat16 if kind == "bf16" else torch.float16
                )
                registers.append(halves.view(torch.int32).numpy().view(np.uint32)[:, 0])
    source = np.ascontiguousarray(np.stack(registers))
    of_a = 2 * k // (4 * per)
    names = [f"%r{10 + n}" for n in range(len(registers))]
    body = "".join(f"ld.global.b32 {name}, [%rd4+{128 * n}];\n" for n, name in enumerate(names))
    c = "{%f1, %f2, %f3, %f4}"
    body += "".join(f"mov.f32 %f{n}, 0f3F800000;\n" for n in range(1, 5))
    body += f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {c}, "
    body += f"{{{', '.join(names[:of_a])}}}, {{{', '.join(names[of_a:])}}}, {c};\n"
    body += "".join(f"st.global.f32 [%rd5+{128 * n}], %f{n + 1};\n" for n in range(4))
    result = np.zeros((4, 32), np.float32)
    assert not run(body, source, result).reports
    expected = a @ b + 1
    for n in range(4):
        np.testing.assert_array_equal(result[n], expected[row + n // 2 * 8, 2 * quarter + n % 2])


@pytest.mark.parametrize(
    "rounding, expected", [("rn", 1.0), ("rm", 1.0 - 2.0**-24), ("rz", 1.0 - 2.0**-24)]
)
def test_rounding_of_fma(rounding, expected):
    y = np.zeros(32, np.float32)
    body = "mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0fB0000000;"  # 1 and -2**-31
    body += f" fma.{rounding}.f32 %f3, %f1, %f1, %f2; st.global.f32 [%rd5], %f3;"
    assert not run(body, np.zeros(1), y).reports
    assert (y == np.float32(expected)).all()


STORE = "st.shared.b32 [%r4], %r1; "
LOAD = "xor.b32 %r5, %r3, 4; add.s32 %r5, %r2, %r5; ld.shared.b32 %r6, [%r5]; "
FAR = "xor.b32 %r5, %r3, 128; add.s32 %r5, %r2, %r5; ld.shared.b32 %r6, [%r5]; "
COPY = "cp.async.ca.shared.global [%r4], [%rd4], 4; cp.async.commit_group; "
WRITE = "st.global.b32 [%rd5], %r6;"


@pytest.mark.parametrize(
    "body, report",
    [
        ("ld.global.b32 %r6, [%rd4+256];", "global access outside of the tensors"),
        ("ld.global.b32 %r6, [%rd4+2];", "misaligned global access"),
        ("st.shared.b32 [%r4+256], %r1;", "access outside of shared memory"),
        ("ld.shared.b32 %r6, [%r4];", "uninitialised shared memory read"),
        (STORE + LOAD, "race in shared memory"),
        (STORE + "bar.warp.sync -1; " + FAR, "race in shared memory"),
        (COPY + "ld.shared.b32 %r6, [%r4];", "before the wait for its copy"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0;", "barrier that not all threads reach"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0;", "barrier that not all threads reach"),
        (
            "setp.lt.u32 %p1, %r1, 5; @%p1 shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1;",
            "warp instruction under a partial mask",
        ),
    ],
)
def test_planted_faults(body, report):
    memory = np.zeros(64, np.int32)
    found = run(body, memory, np.zeros(64, np.int32), block=64, shared=256).reports
    assert any(report in line for line in found), found


def test_race_between_blocks():
    memory = np.zeros(32, np.int32)
    found = run("st.global.b32 [%rd5], %r1;", memory, np.zeros(32, np.int32), grid=2).reports
    assert any("race in global memory between blocks" in line for line in found)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        STORE + "bar.warp.sync -1; " + LOAD + WRITE,
        STORE + "bar.sync 0; " + FAR + "bar.sync 0; " + STORE + WRITE,
        COPY + "cp.async.wait_group 0; bar.sync 0; " + FAR + WRITE,
    ],
)
def test_clean_kernels(body, backwards):
    memory, result = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    assert not run(body, memory, result, block=64, shared=256, backwards=backwards).reports
    lanes = np.arange(64)
    np.testing.assert_array_equal(result, lanes ^ (1 if LOAD in body else 32))


def test_unknown_instructions_are_named():
    with pytest.raises(ValueError, match="unknown instruction tex"):
        run("tex.2d.v4.f32.f32 %f1, %f2;", np.zeros(1), np.zeros(1))
