"""Between bfloat16 in memory and float32 in registers: rounding, NaN, and what is too small."""

import pytest
import torch

from mfef_ext import _C, functional
from tests.accuracy import make_case

ISAS = _C.build_info()["cpu_isas_usable"]
# Pixels of an image: of two squares of a transposition, of one, of none, and what is left over.
SHAPES = [(16, 3, 8, 8), (18, 5, 4, 4), (17, 35, 3, 5), (3, 40, 1, 1), (1, 3, 9, 11)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=ISAS)
def isa(request):
    before = _C.cpu_isa()
    _C.force_cpu_isa(request.param)
    yield request.param
    _C.force_cpu_isa(before)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_rounded_to_the_nearest(isa, plan, shape, layout):
    """One tap, one channel per group: each result is one product, rounded once, ties to even."""
    torch.manual_seed(1)
    x = torch.randn(shape).bfloat16().contiguous(memory_format=layout)
    x.as_strided((3,), (1,)).copy_(torch.tensor([float("nan"), float("inf"), -0.0]))
    # Eight bits times eight: often a tie between two bfloat16.
    weight = torch.randn(shape[1], 1, 1, 1).bfloat16()
    got = functional.multi_scale_conv2d(x, [weight], [shape[1]], backend="cpu")
    wanted = (x.double() * weight.double().view(1, -1, 1, 1)).float().bfloat16()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normal_numbers_have_the_same_bits_with_the_instruction(plan, shape, layout):
    """Where nothing is convolved by dot products, avx512_bf16 does what avx512 does, to the bit."""
    if not {"avx512", "avx512_bf16"} <= set(ISAS):
        pytest.skip("this processor has no AVX512-BF16, or the library was built without")
    case = make_case(shape, kernel_sizes=(1,), dtype=torch.bfloat16).cast(torch.bfloat16)
    before = _C.cpu_isa()
    runs = []
    for name in ("avx512", "avx512_bf16"):
        _C.force_cpu_isa(name)
        y = case.x.detach().contiguous(memory_format=layout).requires_grad_()
        out = functional.dual_attention(y, *case.attention, backend="cpu")
        runs.append([out, *torch.autograd.grad(out, y, case.grad)])
    _C.force_cpu_isa(before)
    for a, b in zip(*runs, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_numbers_below_the_normal_ones(isa):
    """The instruction makes them zeros of their sign; the others round them."""
    smallest = 2.0**-126
    x = torch.full((16, 1, 8, 8), smallest).bfloat16()
    x[:, :, ::2] *= -1
    for factor in (1.0, 0.75):
        weight = torch.full((1, 1, 1, 1), factor).bfloat16()
        _C.force_cpu_plan("images")
        got = functional.multi_scale_conv2d(x, [weight], [1], backend="cpu")
        _C.force_cpu_plan("")
        kept = factor == 1.0 or isa != "avx512_bf16"
        wanted = (x.double() * (factor if kept else 0.0)).bfloat16()
        assert torch.equal(got.view(torch.int16), wanted.view(torch.int16))
