"""The machine computes what PTX says, and finds each fault that is planted here."""

import numpy as np
import pytest
import torch

from .machine import CLASSES, Module, Range

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


def bits(value, width=32):
    """The low bits of integers, as unsigned Python integers."""
    return [int(v) & (1 << width) - 1 for v in np.asarray(value, object)]


WORDS = np.array(
    [
        0,
        1,
        -1,
        2**31 - 1,
        -(2**31),
        5,
        -7,
        0x12345678,
        *np.random.default_rng(0).integers(-(2**31), 2**31, 24),
    ],
    np.int64,
)
OTHER = np.roll(WORDS, 3)
SHIFTS = np.arange(32) * 3 % 41


def looked_up(a, b, c, table):
    """Bit by bit what a table says of the bits of three words."""
    number = [(a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1 for n in range(32)]
    return sum((table >> at & 1) << n for n, at in enumerate(number))


def permuted(a, b, selectors):
    both = (a & 0xFFFFFFFF) | (b & 0xFFFFFFFF) << 32
    result = 0
    for n in range(4):
        selector = selectors >> 4 * n & 15
        byte = both >> 8 * (selector & 7) & 255
        if selector & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * n
    return result


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("sub.s32 {0}, {1}, {2};", lambda a, b: a - b),
        ("mul.lo.s32 {0}, {1}, {2};", lambda a, b: a * b),
        ("mul.hi.s32 {0}, {1}, {2};", lambda a, b: a * b >> 32),
        ("mul.hi.u32 {0}, {1}, {2};", lambda a, b: (a % 2**32) * (b % 2**32) >> 32),
        ("mad.hi.s32 {0}, {1}, {2}, 9;", lambda a, b: (a * b >> 32) + 9),
        ("min.s32 {0}, {1}, {2};", min),
        ("max.s32 {0}, {1}, {2};", max),
        ("min.u32 {0}, {1}, {2};", lambda a, b: min(a % 2**32, b % 2**32)),
        ("max.u32 {0}, {1}, {2};", lambda a, b: max(a % 2**32, b % 2**32)),
        ("abs.s32 {0}, {1};", lambda a, b: abs(a)),
        ("and.b32 {0}, {1}, {2};", lambda a, b: a & b),
        ("or.b32 {0}, {1}, {2};", lambda a, b: a | b),
        ("xor.b32 {0}, {1}, {2};", lambda a, b: a ^ b),
        ("not.b32 {0}, {1};", lambda a, b: ~a),
        ("popc.b32 {0}, {1};", lambda a, b: (a % 2**32).bit_count()),
        ("clz.b32 {0}, {1};", lambda a, b: 32 - (a % 2**32).bit_length()),
        ("bfe.u32 {0}, {1}, 5, 9;", lambda a, b: (a % 2**32) >> 5 & 511),
        ("bfe.s32 {0}, {1}, 28, 9;", lambda a, b: a >> 28),
        ("prmt.b32 {0}, {1}, {2}, 0x3b61;", lambda a, b: permuted(a, b, 0x3B61)),
        ("prmt.b32 {0}, {1}, {2}, 0x5410;", lambda a, b: permuted(a, b, 0x5410)),
        ("lop3.b32 {0}, {1}, {2}, 51, 0x96;", lambda a, b: a ^ b ^ 51),
        ("lop3.b32 {0}, {1}, {2}, 51, 0xca;", lambda a, b: (a & b) | (~a & 51)),
        ("lop3.b32 {0}, {1}, {2}, 51, 0x1b;", lambda a, b: looked_up(a, b, 51, 0x1B)),
        ("div.u32 {0}, {1}, 7;", lambda a, b: (a % 2**32) // 7),
        ("rem.u32 {0}, {1}, 7;", lambda a, b: (a % 2**32) % 7),
        ("selp.b32 {0}, {1}, {2}, %p2;", lambda a, b: a if b > 0 else b),
        (
            "setp.lt.and.s32 %p3|%p4, {1}, {2}, !%p2; selp.b32 {0}, 1, 0, %p3;",
            lambda a, b: a < b <= 0,
        ),
        (
            "setp.lt.and.s32 %p3|%p4, {1}, {2}, !%p2; selp.b32 {0}, 1, 0, %p4;",
            lambda a, b: b <= a and b <= 0,
        ),
        (
            "setp.ge.or.u32 %p3, {1}, {2}, %p2; selp.b32 {0}, 1, 0, %p3;",
            lambda a, b: a % 2**32 >= b % 2**32 or b > 0,
        ),
        ("mov.b64 %rd10, {{{1}, {2}}}; mov.b64 {{_, {0}}}, %rd10;", lambda a, b: b),
        (
            "cvt.s64.s32 %rd10, {1}; shr.s64 %rd10, %rd10, 34; cvt.u32.u64 {0}, %rd10;",
            lambda a, b: a >> 34,
        ),
        (
            "cvt.u64.u32 %rd10, {1}; shl.b64 %rd10, %rd10, 9; shr.u64 %rd10, %rd10, 33;"
            " cvt.u32.u64 {0}, %rd10;",
            lambda a, b: (a % 2**32) >> 24,
        ),
        ("cvt.u64.u32 %rd10, {1}; popc.b64 {0}, %rd10;", lambda a, b: (a % 2**32).bit_count()),
        ("cvt.u64.u32 %rd10, {1}; clz.b64 {0}, %rd10;", lambda a, b: 64 - (a % 2**32).bit_length()),
        (
            "mul.wide.s32 %rd10, {1}, {2}; shr.u64 %rd10, %rd10, 32; cvt.u32.u64 {0}, %rd10;",
            lambda a, b: a * b >> 32,
        ),
        (
            "mul.wide.u32 %rd10, {1}, {2}; shr.u64 %rd10, %rd10, 32; cvt.u32.u64 {0}, %rd10;",
            lambda a, b: (a % 2**32) * (b % 2**32) >> 32,
        ),
        (
            "cvt.s64.s32 %rd10, {2}; mad.wide.s32 %rd10, {1}, {2}, %rd10; cvt.u32.u64 {0}, %rd10;",
            lambda a, b: a * b + b,
        ),
        (
            "mul.wide.s32 %rd10, {1}, {2}; mad.lo.s64 %rd10, %rd10, 5, %rd10;"
            " cvt.u32.u64 {0}, %rd10;",
            lambda a, b: a * b * 6,
        ),
        ("cvt.s32.s16 {0}, {1};", lambda a, b: ((a & 0xFFFF) ^ 0x8000) - 0x8000),
        ("cvt.u32.u8 {0}, {1};", lambda a, b: a & 255),
    ],
)
def test_integers_at_their_limits(instruction, expected):
    y = np.zeros(32, np.int32)
    x = np.stack([WORDS, OTHER]).astype(np.int32)
    load = "ld.global.b32 %r5, [%rd4]; ld.global.b32 %r7, [%rd4+128]; setp.gt.s32 %p2, %r7, 0;"
    body = instruction.format("%r6", "%r5", "%r7")
    assert not run(f"{load} {body} st.global.b32 [%rd5], %r6;", x, y).reports
    wanted = [int(expected(int(a), int(b))) for a, b in zip(WORDS, OTHER, strict=True)]
    assert bits(y) == bits(wanted)


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("shl.b32", lambda a, n: a << n if n < 32 else 0),
        ("shr.u32", lambda a, n: (a % 2**32) >> n if n < 32 else 0),
        ("shr.s32", lambda a, n: a >> min(n, 31)),
    ],
)
def test_shifts_by_more_than_the_width(instruction, expected):
    y, x = np.zeros(32, np.int32), np.stack([WORDS, SHIFTS]).astype(np.int32)
    body = "ld.global.b32 %r5, [%rd4]; ld.global.b32 %r7, [%rd4+128];"
    assert not run(f"{body} {instruction} %r6, %r5, %r7; st.global.b32 [%rd5], %r6;", x, y).reports
    assert bits(y) == bits([expected(int(a), int(n)) for a, n in zip(WORDS, SHIFTS, strict=True)])


NUMBERS = np.array(
    [
        0.0,
        -0.0,
        1.0,
        -1.5,
        np.inf,
        -np.inf,
        np.nan,
        2.5,
        -2.5,
        3e9,
        -3e9,
        1e-40,
        -1e-40,
        0.3,
        *np.random.default_rng(1).standard_normal(18) * 100,
    ],
    np.float32,
)
SECOND = np.roll(NUMBERS, 5)
f64 = np.float64


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("add.f32 {0}, {1}, {2};", lambda a, b: a + b),
        ("sub.rn.f32 {0}, {1}, {2};", lambda a, b: a - b),
        ("mul.f32 {0}, {1}, {2};", lambda a, b: a * b),
        ("div.rn.f32 {0}, {1}, {2};", lambda a, b: a / b),
        ("min.f32 {0}, {1}, {2};", np.fmin),
        ("max.f32 {0}, {1}, {2};", np.fmax),
        ("neg.f32 {0}, {1};", lambda a, b: -a),
        ("abs.f32 {0}, {1};", lambda a, b: np.abs(a)),
        ("sqrt.rn.f32 {0}, {1};", lambda a, b: np.sqrt(a)),
        ("rcp.rn.f32 {0}, {1};", lambda a, b: np.float32(1) / a),
        ("ex2.approx.f32 {0}, {1};", lambda a, b: np.exp2(f64(a))),
        ("fma.rn.f32 {0}, {1}, {2}, {2};", lambda a, b: f64(a) * f64(b) + f64(b)),
        ("mul.ftz.f32 {0}, {1}, 0f3F800000;", lambda a, b: np.where(np.abs(a) < 1e-38, a * 0, a)),
        ("add.sat.f32 {0}, {1}, {2};", lambda a, b: np.nan_to_num(np.clip(a + b, 0, 1), nan=0)),
        (
            "cvt.f64.f32 %d1, {1}; add.f64 %d1, %d1, %d1; cvt.rn.f32.f64 {0}, %d1;",
            lambda a, b: a + a,
        ),
        (
            "setp.ltu.f32 %p1, {1}, {2}; selp.f32 {0}, {1}, {2}, %p1;",
            lambda a, b: np.where(~(a >= b), a, b),
        ),
        (
            "setp.lt.f32 %p1, {1}, {2}; selp.f32 {0}, {1}, {2}, %p1;",
            lambda a, b: np.where(a < b, a, b),
        ),
        (
            "setp.nan.f32 %p1, {1}, {2}; selp.f32 {0}, {1}, {2}, %p1;",
            lambda a, b: np.where(np.isnan(a) | np.isnan(b), a, b),
        ),
        (
            "setp.neu.f32 %p1, {1}, {2}; selp.f32 {0}, {1}, {2}, %p1;",
            lambda a, b: np.where(a != b, a, b),
        ),
        (
            "setp.ne.f32 %p1, {1}, {2}; selp.f32 {0}, {1}, {2}, %p1;",
            lambda a, b: np.where((a != b) & ~np.isnan(a) & ~np.isnan(b), a, b),
        ),
        ("cvt.rni.f32.f32 {0}, {1};", lambda a, b: np.rint(a)),
        ("cvt.rmi.f32.f32 {0}, {1};", lambda a, b: np.floor(a)),
        ("cvt.rpi.f32.f32 {0}, {1};", lambda a, b: np.ceil(a)),
        ("cvt.sat.f32.f32 {0}, {1};", lambda a, b: np.nan_to_num(np.clip(a, 0, 1), nan=0)),
        ("cvt.rna.tf32.f32 %r5, {1}; mov.b32 {0}, %r5;", lambda a, b: nearest_tf32(a)),
    ],
)
def test_floats(instruction, expected):
    y = np.zeros(32, np.float32)
    load = ".reg .f64 %d<4>; ld.global.f32 %f1, [%rd4]; ld.global.f32 %f2, [%rd4+128];"
    body = instruction.format("%f3", "%f1", "%f2")
    source = np.stack([NUMBERS, SECOND])
    assert not run(f"{load} {body} st.global.f32 [%rd5], %f3;", source, y).reports
    with np.errstate(all="ignore"):
        wanted = np.asarray(expected(NUMBERS, SECOND)).astype(np.float32)
    np.testing.assert_array_equal(y, wanted)
    zero = (wanted == 0) & ~np.isin(instruction.split(".")[0], ["min", "max"])
    np.testing.assert_array_equal(np.signbit(y)[zero], np.signbit(wanted)[zero])


def nearest_tf32(a):
    """With 10 bits of mantissa, ties away from zero."""
    step = np.exp2(np.floor(np.log2(np.abs(f64(a)))) - 10)
    rounded = np.sign(a) * np.floor(np.abs(f64(a)) / step + 0.5) * step
    small = np.abs(a) < 2.0**-126  # the bits are rounded, whatever they mean
    word = (np.abs(a).view(np.int32) + 0x1000 & ~0x1FFF).view(np.float32)
    return np.where(np.isfinite(a) & (a != 0), np.where(small, np.copysign(word, a), rounded), a)


@pytest.mark.parametrize("mode, function", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor)])
def test_floats_to_integers_saturate(mode, function):
    y = np.zeros((2, 32), np.int32)
    body = f"ld.global.f32 %f1, [%rd4]; cvt.{mode}.s32.f32 %r5, %f1; cvt.{mode}.u32.f32 %r6, %f1;"
    body += " st.global.b32 [%rd5], %r5; st.global.b32 [%rd5+128], %r6;"
    assert not run(body, NUMBERS, y).reports
    whole = np.nan_to_num(function(f64(NUMBERS)), nan=0)
    assert bits(y[0]) == bits([int(v) for v in np.clip(whole, -(2.0**31), 2**31 - 1)])
    assert bits(y[1]) == bits([int(v) for v in np.clip(whole, 0, 2**32 - 1)])


@pytest.mark.parametrize("name, dtype", [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_pairs_of_halves(name, dtype):
    """Both halves; the operand of cvt that comes first goes to the upper one."""
    torch.manual_seed(0)
    x = torch.randn(3, 32)
    y = torch.zeros(2, 32, dtype=torch.int32)
    body = "".join(f"ld.global.f32 %f{n}, [%rd4+{128 * n}]; " for n in range(3))
    body += f"cvt.rn.{name}.f32 %r5, %f0, %f1; cvt.rn.{name}.f32 %r6, %f2, %f2;"
    body += f" fma.rn.{name} %r7, %r5, %r6, %r5; add.rn.{name} %r8, %r5, %r6;"
    body += " st.global.b32 [%rd5], %r7; st.global.b32 [%rd5+128], %r8;"
    assert not run(body, x.numpy(), y.numpy()).reports
    low = x.to(dtype).double()
    upper, lower = (y.view(dtype).view(2, 32, 2)[..., n] for n in (1, 0))
    for half, part in ((upper, low[0]), (lower, low[1])):
        assert torch.equal(half[0], (part * low[2] + part).to(dtype))
        assert torch.equal(half[1], (part + low[2]).to(dtype))


@pytest.mark.parametrize(
    "load, expected",
    [
        ("u8", lambda b: b[::4].astype(np.int64)),
        ("s8", lambda b: b[::4].view(np.int8).astype(np.int64)),
        ("u16", lambda b: b.view(np.uint16)[::2].astype(np.int64)),
        ("s16", lambda b: b.view(np.int16)[::2].astype(np.int64)),
    ],
)
def test_narrow_loads_fill_their_register(load, expected):
    x = np.random.default_rng(0).integers(0, 256, 128).astype(np.uint8)
    y = np.zeros(32, np.int32)
    assert not run(f"ld.global.{load} %r6, [%rd4]; {WRITE}", x, y).reports
    np.testing.assert_array_equal(y, expected(x))


@pytest.mark.parametrize("count", [2, 4])
def test_vectors(count):
    x = np.arange(32 * count, dtype=np.float32)
    y = np.zeros_like(x)
    names = "{" + ", ".join(f"%f{n}" for n in range(count)) + "}"
    body = (
        f"mul.wide.u32 %rd3, %r1, {4 * count}; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;"
    )
    body += f" ld.global.v{count}.f32 {names}, [%rd4]; st.global.v{count}.f32 [%rd5], {names};"
    assert not run(body, x, y).reports
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "mode, by, c, source",
    [
        ("idx", 3, 0x1F, lambda n: 3),
        ("idx", 3, 0x181F, lambda n: n // 8 * 8 + 3),  # segments of 8 lanes
        ("up", 2, 0x1800, lambda n: n - 2 if n % 8 >= 2 else n),
        ("down", 2, 0x181F, lambda n: n + 2 if n % 8 < 6 else n),
        ("bfly", 5, 0x181F, lambda n: n ^ 5),
    ],
)
def test_shuffles_of_segments(mode, by, c, source):
    """Lanes that would read beyond their segment keep their value, and their predicate is false."""
    y = np.zeros((2, 32), np.int32)
    body = f"mul.lo.s32 %r5, %r1, 10; shfl.sync.{mode}.b32 %r6|%p1, %r5, {by}, {c}, -1;"
    body += " selp.b32 %r7, 1, 0, %p1; st.global.b32 [%rd5], %r6; st.global.b32 [%rd5+128], %r7;"
    assert not run(body, np.zeros(1), y).reports
    lanes = [source(n) for n in range(32)]
    assert y[0].tolist() == [10 * n for n in lanes]
    inside = [n != lane or mode in ("idx", "bfly") for lane, n in enumerate(lanes)]
    assert y[1].tolist() == inside


def test_votes_and_active_lanes():
    y = np.zeros((5, 32), np.int32)
    body = "setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r5, %p1, -1;"
    body += " vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;"
    body += " vote.sync.all.pred %p4, !%p5, -1; mov.b32 %r9, 0; @%p1 activemask.b32 %r9;"
    body += " selp.b32 %r6, 1, 0, %p2; selp.b32 %r7, 1, 0, %p3; st.global.b32 [%rd5], %r5;"
    body += " st.global.b32 [%rd5+128], %r6; st.global.b32 [%rd5+256], %r7;"
    body += " st.global.b32 [%rd5+384], %r9;"
    body = "setp.ne.u32 %p5, %r1, %r1; " + body
    assert not run(body, np.zeros(1), y).reports
    assert (y[0] == 31).all() and (y[1] == 1).all() and (y[2] == 0).all()
    assert y[3].tolist() == [31] * 5 + [0] * 27


def test_loops_of_lanes_that_part():
    """Every lane leaves after its own number of turns; what it carries survives the others'."""
    y = np.zeros(32, np.int32)
    body = "mov.b32 %r5, 0; mov.b32 %r6, 1; L: setp.ge.u32 %p1, %r5, %r1; @%p1 bra E;"
    body += " mul.lo.s32 %r7, %r6, 3; add.s32 %r6, %r7, %r5; add.s32 %r5, %r5, 1; bra L;"
    body += " E: add.s32 %r6, %r6, %r5;"
    assert not run(f"{body} {WRITE}", np.zeros(1), y).reports
    for lane in range(32):
        value = 1
        for turn in range(lane):
            value = value * 3 + turn
        assert bits([y[lane]]) == bits([value + lane])


@pytest.mark.parametrize(
    "instruction, total, olds",
    [
        ("atom.global.add.u32 %r6, [%rd2], 3;", 96, [3 * n for n in range(32)]),
        ("atom.global.max.s32 %r6, [%rd2], %r1;", 31, [0, *range(31)]),
        ("atom.global.exch.b32 %r6, [%rd2], %r1;", 31, [0, *range(31)]),
        ("atom.global.cas.b32 %r6, [%rd2], 0, 7;", 7, [0] + [7] * 31),
        ("atom.global.inc.u32 %r6, [%rd2], 3;", 0, [0, 1, 2, 3] * 8),
        ("red.global.add.s32 [%rd2], -1; mov.b32 %r6, 0;", -32, [0] * 32),
    ],
)
def test_atomics(instruction, total, olds):
    x, y = np.zeros(32, np.int32), np.zeros(1, np.int32)
    assert not run(f"{instruction} st.global.b32 [%rd4], %r6;", x, y).reports
    assert y[0] == total and x.tolist() == olds


# Every block adds its number to its own word; the last to arrive adds the words up.
LAST_BLOCK = """
  mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd6, %r5, 4; add.s64 %rd7, %rd1, %rd6;
  st.global.b32 [%rd7], %r5; {fence}
  atom.global{order}.add.u32 %r6, [%rd2], 1; setp.ne.u32 %p1, %r6, 3; @%p1 bra E; {fence}
  ld.global.b32 %r7, [%rd1]; ld.global.b32 %r8, [%rd1+4]; add.s32 %r7, %r7, %r8;
  ld.global.b32 %r8, [%rd1+8]; add.s32 %r7, %r7, %r8; ld.global.b32 %r8, [%rd1+12];
  add.s32 %r7, %r7, %r8; st.global.b32 [%rd2+4], %r7; E:
"""


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    "fence, order, clean",
    [
        ("", ".acq_rel.gpu", True),
        ("fence.acq_rel.gpu;", ".relaxed.gpu", True),
        ("membar.gl;", "", True),
        ("", ".relaxed.gpu", False),
        ("", ".release.gpu", False),
    ],
)
def test_the_last_block_sees_what_others_released(fence, order, clean, backwards):
    words, counts = np.full(4, -1, np.int32), np.zeros(2, np.int32)
    body = LAST_BLOCK.format(fence=fence, order=order)
    found = run(body, words, counts, grid=4, block=1, backwards=backwards).reports
    assert counts.tolist() == [4, 6]
    assert clean == (not found), found
    assert clean or all("race in global memory" in line for line in found)


@pytest.mark.parametrize("count, trans", [(1, ""), (2, ""), (4, ""), (1, ".trans"), (4, ".trans")])
def test_ldmatrix(count, trans):
    """Lane 4 r + q gets elements 2 q and 2 q + 1 of row r of every matrix, or of column r."""
    x = np.arange(count * 64, dtype=np.uint16)
    y = np.zeros((4, 32), np.uint32)
    names = [f"%r{10 + n}" for n in range(count)]
    # A lane copies a row of a matrix to shared memory, and gives its address.
    body = (
        f"setp.ge.u32 %p1, %r1, {count * 8}; mul.wide.u32 %rd3, %r1, 16; add.s64 %rd4, %rd1, %rd3;"
    )
    body += " shl.b32 %r5, %r1, 4; add.s32 %r5, %r2, %r5; @%p1 bra L;"
    body += " ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd4];"
    body += " st.shared.v4.b32 [%r5], {%r20, %r21, %r22, %r23}; L: bar.sync 0;"
    body += f" ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{', '.join(names)}}}, [%r5];"
    body += "".join(f" st.global.b32 [%rd5+{128 * n}], {name};" for n, name in enumerate(names))
    assert not run(body, x, y, shared=512).reports
    for n in range(count):
        matrix = x[64 * n : 64 * n + 64].reshape(8, 8)
        wanted = np.ascontiguousarray(matrix.T if trans else matrix).view(np.uint32)
        np.testing.assert_array_equal(y[n], wanted.reshape(-1))


def test_copies_fill_up_with_zeros_and_arrive_by_groups():
    """Two groups of every lane; the second has not arrived after a wait for all but one."""
    x, y = np.arange(1, 65, dtype=np.int32), np.zeros((2, 32), np.int32)
    body = "setp.lt.u32 %p1, %r1, 9; selp.b32 %r5, 4, 0, %p1;"
    body += " cp.async.ca.shared.global [%r4], [%rd4], 4, %r5; cp.async.commit_group;"
    body += " cp.async.ca.shared.global [%r4+128], [%rd4+128], 4; cp.async.commit_group;"
    body += " cp.async.wait_group 1; ld.shared.b32 %r6, [%r4]; st.global.b32 [%rd5], %r6;"
    both = body + " cp.async.wait_all; ld.shared.b32 %r6, [%r4+128]; st.global.b32 [%rd5+128], %r6;"
    assert not run(both, x, y, shared=256).reports
    assert y[0].tolist() == [*range(1, 10), *[0] * 23] and y[1].tolist() == [*range(33, 65)]
    early = body + " ld.shared.b32 %r6, [%r4+128]; st.global.b32 [%rd5+128], %r6;"
    found = run(early, x, y, shared=256).reports
    assert found and all("before the wait for its copy" in line for line in found)


def test_memory_that_nobody_has_written():
    """Fresh memory is found when it is read, and not after it was written, by whatever block."""
    module = Module(f"{START} ld.global.b32 %r6, [%rd4]; {WRITE} ret; }}")
    x, y = np.zeros(32, np.int32), np.zeros(32, np.int32)
    arguments = [x.ctypes.data, y.ctypes.data]
    for fresh in (x, y):
        memory = [Range.of(x, fresh is x), Range.of(y, fresh is y)]
        found = module.launch("k", (1, 1, 1), (32, 1, 1), arguments, memory).reports
        assert bool(found) == (fresh is x)
        assert all("uninitialised global memory read" in line for line in found)


def test_shared_addresses_wrap_around():
    """A negative base and an offset that leads back, as nvcc writes them."""
    y = np.zeros(32, np.int32)
    body = "st.shared.b32 [%r4], %r1; sub.s32 %r5, %r4, 256; ld.shared.b32 %r6, [%r5+256];"
    assert not run(f"{body} {WRITE}", np.zeros(1), y, shared=128).reports
    assert y.tolist() == [*range(32)]


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


@pytest.mark.parametrize(
    "body, counts",
    [
        # 32 neighbours of 4 bytes are four sectors; 4 bytes in each of 32 sectors are 32.
        ("ld.global.b32 %r6, [%rd4];", {"global": 1, "sectors": 4, "unique": 128}),
        (
            "mul.wide.u32 %rd6, %r1, 32; add.s64 %rd6, %rd1, %rd6; ld.global.b32 %r6, [%rd6];",
            {"global": 1, "sectors": 32, "unique": 128},
        ),
        ("ld.global.b32 %r6, [%rd1]; ld.global.b32 %r6, [%rd1];", {"sectors": 2, "unique": 4}),
        # Words of shared memory that lie in one bank take turns; a word that all read does not.
        ("st.shared.b32 [%r4], %r1;", {"shared_passes": 1, "shared_replays": 0}),
        (
            "shl.b32 %r5, %r1, 3; add.s32 %r5, %r2, %r5; st.shared.b32 [%r5], %r1;",
            {"shared_passes": 1, "shared_replays": 1},
        ),
        (
            "shl.b32 %r5, %r1, 7; add.s32 %r5, %r2, %r5; st.shared.b32 [%r5], %r1;",
            {"shared_passes": 1, "shared_replays": 31},
        ),
        (
            "shl.b32 %r5, %r1, 4; add.s32 %r5, %r2, %r5;"
            " st.shared.v4.b32 [%r5], {%r1, %r1, %r1, %r1};",
            {"shared_passes": 4, "shared_replays": 0},
        ),
        (
            "st.shared.b32 [%r2], 1; bar.sync 0; ld.shared.b32 %r6, [%r2];",
            {"shared_passes": 2, "shared_replays": 0, "barriers": 1},
        ),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 add.f32 %f1, %f1, %f1;", {"float": 1, "control": 2}),
    ],
)
def test_counts(body, counts):
    source = torch.zeros(256).numpy()  # which begins with a sector
    found = run(body, source, np.zeros(32), shared=4096)
    assert {name: found.counts[name] for name in counts} == counts
    assert found.instructions == sum(found.counts[name] for name in CLASSES)


def test_active_lanes_are_counted():
    body = "setp.lt.u32 %p1, %r1, 5; @%p1 add.f32 %f1, %f1, %f1;"
    few, none = (run(text, np.zeros(1), np.zeros(1)) for text in (body, ""))
    assert few.counts["lanes"] - none.counts["lanes"] == 32 + 5
