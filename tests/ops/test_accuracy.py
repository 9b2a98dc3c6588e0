"""Forward and all gradients against the float64 reference, by the rule of tests/accuracy.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfef_ext import functional, reference
from tests.accuracy import (
    BlockCase,
    check_block,
    factor,
    largest,
    make_case,
    specification,
    unit_in_the_last_place,
)
from tests.drawing import DRAWN, blocks

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
EXAMPLES = settings(DRAWN, max_examples=8)


# Every branch of the planner and of the tiles.
BLOCKS = blocks([1, 2, 3, 16, 17], 20, st.integers(1, 12), st.integers(1, 18))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EXAMPLES
@given(arguments=BLOCKS, layout=st.sampled_from(LAYOUTS))
def test_random_blocks(engines, dtype, arguments, layout):
    check_block(dtype, layout, under=engines, **arguments)


# Shapes that users have: the paper's, DenseNets', a group of images and one more, wide groups.
SHAPES = [
    ((17, 64, 8, 8), {}),
    ((16, 132, 8, 8), {}),
    ((16, 64, 2, 2), {}),
    ((2, 32, 28, 28), {}),
    ((3, 32, 14, 14), {}),
    ((2, 64, 7, 7), {}),
    ((4, 96, 8, 8), {"groups": (1, 1, 1, 1)}),
    ((4, 64, 8, 8), {"split": False}),
    ((1, 16, 40, 33), {"kernel_sizes": (3, 9)}),
    ((2, 8, 9, 9), {"kernel_sizes": (21, 3), "spatial_kernel_size": 15}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "options"), SHAPES, ids=lambda v: str(v))
def test_shapes_that_users_have(engines, dtype, shape, options):
    check_block(dtype, under=engines, shape=shape, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multi_scale_conv2d_with_bias(engine, dtype):
    """The bias, which the block does not have: output and gradient, by the same rule."""
    low = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(low).eps
    ours, eager = [0.0, 0.0], [0.0, 0.0]
    for seed in range(5):
        case = make_case((5, 24, 6, 7), dtype=low, seed=seed)
        bias = torch.randn(24, dtype=torch.float64).to(low).double()

        def run(f, d, case=case, bias=bias, **kw):
            b = bias.to(d).requires_grad_()
            at = case.cast(d)
            out = f(at.x, at.weights, at.groups, True, b, **kw)
            (grad,) = torch.autograd.grad(out, b, at.grad)
            return out.detach().double(), grad.double()

        with specification(dtype):
            wanted = run(reference.multi_scale_conv2d, torch.float64)
        got = run(functional.multi_scale_conv2d, dtype, backend="cpu")
        plain = run(reference.multi_scale_conv2d, low)
        for i in range(2):
            ulp = unit_in_the_last_place(wanted[i], dtype)
            ours[i] = max(ours[i], largest(got[i] - wanted[i]) / ulp)
            eager[i] = max(eager[i], scale * largest(plain[i] - wanted[i]) / ulp)
    for o, e in zip(ours, eager, strict=True):
        assert o <= factor(dtype) * e + 1


def test_dual_attention_alone_is_the_blocks_second_half(engine):
    """The two halves share the block's inner code: the same numbers, to the last bit."""
    case = make_case((17, 32, 8, 8), dtype=torch.float32).cast(torch.float32)
    y = functional.multi_scale_conv2d(case.x, case.weights, case.groups, backend="cpu")
    halves = functional.dual_attention(y, *case.attention, backend="cpu")
    block = functional.mfef_block(case.x, case.weights, case.groups, *case.attention, backend="cpu")
    assert torch.equal(halves, block)
    one = torch.autograd.grad(halves, case.leaves(), case.grad)
    other = torch.autograd.grad(block, case.leaves(), case.grad)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def strided(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides."""
    if how == "slice":
        big = t.new_full([s + 2 for s in t.shape], float("nan"))
        big[tuple(slice(1, s + 1) for s in t.shape)] = t
        return big[tuple(slice(1, s + 1) for s in t.shape)]
    if how == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "every second":
        big = t.new_full([*t.shape[:3], 2 * t.shape[3]], float("nan"))
        big[..., ::2] = t
        return big[..., ::2]
    if how == "channels_last slice":
        big = t.new_full([t.shape[0], t.shape[1] + 3, *t.shape[2:]], float("nan"))
        big = big.contiguous(memory_format=torch.channels_last)
        big[:, 1 : t.shape[1] + 1] = t
        return big[:, 1 : t.shape[1] + 1]
    raise AssertionError(how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["slice", "transposed", "every second", "channels_last slice"])
def test_any_strides_give_the_same_bits(engine, dtype, how):
    """Inputs, weights and incoming gradients that are views of larger tensors full of NaN."""
    case = make_case((18, 20, 5, 6), dtype=dtype).cast(dtype)

    def run(x, weights, grad):
        x = x.detach().requires_grad_()
        weights = [w.detach().requires_grad_() for w in weights]
        out = functional.mfef_block(x, weights, case.groups, *case.attention, backend="cpu")
        return [out, *torch.autograd.grad(out, [x, *weights], grad)]

    plain = run(case.x, case.weights, case.grad)
    odd = run(
        strided(case.x, how), [strided(w, "slice") for w in case.weights], strided(case.grad, how)
    )
    for a, b in zip(plain, odd, strict=True):
        assert torch.equal(a, b)


def test_layouts_are_kept_and_agree(engine):
    case = make_case((18, 20, 5, 6), dtype=torch.float32).cast(torch.float32)
    results = []
    for layout in LAYOUTS:
        x = case.x.detach().contiguous(memory_format=layout).requires_grad_()
        out = functional.mfef_block(x, case.weights, case.groups, *case.attention, backend="cpu")
        (grad,) = torch.autograd.grad(out, x, case.grad)
        assert out.is_contiguous(memory_format=layout)
        assert grad.is_contiguous(memory_format=layout)
        results.append((out, grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_layout_is_converted_by_a_copy(layout):
    case = make_case((2, 8, 5, 6), kernel_sizes=(3, 5), dtype=torch.float32).cast(torch.float32)
    x = case.x.detach().contiguous(memory_format=layout).requires_grad_()
    grad = case.grad.contiguous(memory_format=layout)
    with torch.autograd.profiler.profile() as profile:
        out = functional.mfef_block(x, case.weights, case.groups, *case.attention, backend="cpu")
        torch.autograd.grad(out, [x, *case.weights], grad)
    names = {event.name for event in profile.function_events}
    assert any("mfef::mfef_block_backward" in name for name in names)
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"}


def test_expanded_gradient(engine):
    """sum().backward() sends a gradient with strides of 0."""
    case = make_case((3, 8, 4, 4), kernel_sizes=(3, 5), dtype=torch.float32)
    low = case.cast(torch.float32)
    functional.mfef_block(
        low.x, low.weights, low.groups, *low.attention, backend="cpu"
    ).sum().backward()
    ones = BlockCase(
        case.x, case.weights, case.groups, case.attention, True, torch.ones_like(case.x)
    ).cast(torch.float32)
    out = functional.mfef_block(ones.x, ones.weights, ones.groups, *ones.attention, backend="cpu")
    out.backward(ones.grad)
    assert torch.equal(low.x.grad, ones.x.grad)


def test_gradients_have_the_strides_of_the_weights(engine):
    """DistributedDataParallel's buckets are views with the parameters' strides."""
    case = make_case((3, 8, 4, 4), kernel_sizes=(3, 5), dtype=torch.float32).cast(torch.float32)
    weights = [
        w.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        for w in case.weights
    ]
    out = functional.mfef_block(case.x, weights, case.groups, *case.attention, backend="cpu")
    for w, g in zip(weights, torch.autograd.grad(out, weights, case.grad), strict=True):
        assert g.stride() == w.stride()


@pytest.mark.parametrize("wanted", ["x", "weights", "attention", "fc2_weight"])
def test_gradients_for_some_inputs_only(engine, wanted):
    case = make_case((5, 12, 5, 5), kernel_sizes=(3, 5), dtype=torch.float32).cast(torch.float32)
    full = run_all = functional.mfef_block(
        case.x, case.weights, case.groups, *case.attention, backend="cpu"
    )
    chosen = {
        "x": [case.x],
        "weights": case.weights,
        "attention": case.attention,
        "fc2_weight": [case.attention[2]],
    }[wanted]
    expected = torch.autograd.grad(full, chosen, case.grad)
    kept = {id(t) for t in chosen}
    for leaf in case.leaves():
        leaf.requires_grad_(id(leaf) in kept)
    out = functional.mfef_block(case.x, case.weights, case.groups, *case.attention, backend="cpu")
    assert torch.equal(out, run_all)
    for a, b in zip(torch.autograd.grad(out, chosen, case.grad), expected, strict=True):
        assert torch.equal(a, b)
