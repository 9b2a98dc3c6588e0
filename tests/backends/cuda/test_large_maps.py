"""The kernels for maps that stay in memory, tile by tile, against the float64 reference.

What holds for both plans (layouts, strides, ties, empty batches, ...) is in test_small_maps.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfef_ext import functional, reference
from mfef_ext.backends import cuda
from tests.accuracy import (
    ATTENTION,
    Errors,
    check_block,
    eager_errors,
    largest,
    make_case,
    run_block,
)
from tests.backends.cuda.test_plan import problem
from tests.backends.cuda.test_small_maps import EACH, HALVES
from tests.backends.cuda.tf32 import on_tf32_operands, rounded
from tests.backends.triton.test_attention import draw_case, expected
from tests.backends.triton.test_attention import eager_errors as eager_errors_of_attention
from tests.drawing import DRAWN, blocks
from tests.ptx.cuda import ALIGNED, H200, NEAREST

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
EXAMPLES = settings(DRAWN, max_examples=8)


# One tile and several, whole and partial spans, whole groups and runs of one.
BLOCKS = blocks([1, 2, 3], 24, st.integers(1, 24), st.integers(17, 40), reductions=[4])


@EXAMPLES
@given(arguments=BLOCKS, layout=st.sampled_from(LAYOUTS))
def test_random_blocks(device, arguments, layout):
    check_block(torch.float32, layout, backend="cuda", device=device, **arguments)


# ImageNet's maps; 33 channels, which no pair divides; several stages of sources; branches that add
# to the same channels; kernels of any size; several tiles above one another; sources of which a
# chain does not fit.
SHAPES = [
    ((1, 64, 56, 56), {}),
    ((1, 128, 28, 28), {}),
    ((1, 256, 14, 14), {}),
    ((2, 512, 7, 7), {}),
    ((1, 132, 9, 20), {}),
    ((1, 300, 3, 17), {"kernel_sizes": (3,), "groups": (1,)}),
    ((2, 24, 10, 18), {"groups": (1, 1, 1, 1), "split": False}),
    ((2, 8, 9, 21), {"kernel_sizes": (21, 3), "spatial_kernel_size": 15}),
    ((1, 4, 130, 17), {"kernel_sizes": (3, 9)}),
    ((1, 80, 20, 18), {"kernel_sizes": (1,), "groups": (1,)}),
]


def plan_of(shape, split=True, **options):
    mode = "split" if split else "pyramid"
    return cuda.plan(problem(shape[0], *shape[1:], mode=mode, **options), H200)


def is_large(shape, **options) -> bool:
    """Whether the planner takes the large-map kernels."""
    return plan_of(shape, **options)["plan"] == "large-map"


@pytest.mark.parametrize(
    ("shape", "branches"),
    [((32, 64, 56), [0]), ((32, 128, 28), [0, 1]), ((32, 512, 7), [0, 1, 2, 3])],
    ids=str,
)
def test_tf32_has_the_branches_of_16_bits(tf32, shape, branches):
    plan = plan_of(shape)
    for name in ("forward", "backward", "weight_gradient"):
        assert plan[f"{name}_tensor_core_branches"] == branches
        assert 0 < plan[f"{name}_shared_bytes"] <= 74 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_over_branches_is_on_tensor_cores_or_it_is_not(dtype):
    """The gradient of x in pyramid mode, by one launch: groups of whole slots, and few zeros."""
    for shape, groups, suits in [
        ((32, 256, 28), (1, 4, 8, 16), True),
        ((32, 128, 28), (1, 4, 8, 16), True),  # two sources of a chunk of 8 in the last branch
        ((32, 64, 56), (1, 4, 8, 16), False),  # 4 channels per group in the last
        ((32, 76, 28), (1, 1, 1, 1), True),
        ((32, 80, 28), (1, 1, 4, 1), False),  # 20: two slots and a half
    ]:
        plan = plan_of(shape, split=False, dtype=dtype, groups=groups)
        suits = suits and dtype != torch.float32
        assert plan["backward_tensor_core_branches"] == ([0, 1, 2, 3] if suits else [])
        launches = plan["backward_launches"]
        assert ("LargeMatrixConvolution" in launches, "LargeConvolution" in launches) == (
            suits,
            not suits,
        )
        assert 0 < plan["backward_shared_bytes"] <= 74 * 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_imagenets_last_map_on_tensor_cores(device, dtype):
    """Every branch of 512 channels at 7 x 7, in one launch each way; the data gradient too."""
    shape, sizes, groups = (1, 512, 7, 7), (3, 5, 7, 9), (1, 4, 8, 16)
    plan = cuda.plan(problem(1, 512, 7, dtype=dtype), H200)
    assert plan["plan"] == "large-map"
    for direction in ("forward", "backward"):
        assert plan[f"{direction}_tensor_core_branches"] == [0, 1, 2, 3]
    errors = Errors(dtype)
    for seed in range(3):
        case = make_case(shape, dtype=dtype, seed=seed, kernel_sizes=sizes, groups=groups)
        gradient = torch.randn(shape, dtype=torch.float64).to(dtype)

        def run(
            f, d, where="cpu", layout=torch.contiguous_format, case=case, gradient=gradient, **kw
        ):
            at = case.cast(d, where)
            out = f(at.x.contiguous(memory_format=layout), at.weights, at.groups, **kw)
            (grad,) = torch.autograd.grad(out, [at.x], gradient.to(where, d))
            return [t.detach().cpu() for t in (out, grad)]

        wanted = run(reference.multi_scale_conv2d, torch.float64)
        got = run(functional.multi_scale_conv2d, dtype, device, LAYOUTS[seed % 2], backend="cuda")
        eager = [run(reference.multi_scale_conv2d, dtype, layout=one) for one in LAYOUTS]
        largest_errors = [
            max(largest(e.double() - w) for e in column)
            for *column, w in zip(*eager, wanted, strict=True)
        ]
        errors.add(["out", "x"], got, wanted, largest_errors)
    errors.check()


@pytest.mark.parametrize("adding", [NEAREST, ALIGNED])
@pytest.mark.parametrize(
    ("shape", "options", "branches"),
    [
        # Several rounds in two buffers, several groups, more channels than a unit has; channels
        # that fill no chunk of 8; taps a few rows at a time; a narrow branch beside a wide one; a
        # sum over branches.
        ((1, 512, 7, 7), {}, [0, 1, 2, 3]),
        ((1, 60, 10, 18), {"kernel_sizes": (3, 5), "groups": (1, 3)}, [0, 1]),
        ((1, 200, 8, 17), {"kernel_sizes": (5, 9), "groups": (1, 10)}, [0, 1]),
        ((2, 48, 11, 20), {"kernel_sizes": (7, 3), "groups": (2, 12)}, [0]),
        ((1, 32, 9, 20), {"kernel_sizes": (5, 3), "groups": (1, 2), "split": False}, [0, 1]),
    ],
    ids=str,
)
def test_tf32_on_tensor_cores(device, request, tf32, adding, shape, options, branches):
    """What float64 makes of operands rounded to TF32, as near as float32 comes to it, also where
    tensor cores cut their sums as an A100 does; the data gradient too."""
    if device == "cpu":
        request.getfixturevalue("machine").set(adding=adding)
    elif adding != NEAREST:
        pytest.skip("a GPU adds as it does")
    plan = plan_of(shape, **options)
    assert plan["plan"] == "large-map"
    for direction in ("forward", "backward"):
        assert plan[f"{direction}_tensor_core_branches"] == branches
    errors = Errors(torch.float32)
    for seed in range(3):
        case = make_case(shape, dtype=torch.float32, seed=seed, **options)
        # In pyramid mode, where all see the same channels, these are all branches.
        assert case.split or branches == list(range(len(case.weights)))
        low = on_tf32_operands(case, branches)

        def run(f, of, d, where="cpu", layout=torch.contiguous_format, **kw):
            at = of.cast(d, where)
            out = f(at.x.contiguous(memory_format=layout), at.weights, at.groups, at.split, **kw)
            (grad,) = torch.autograd.grad(out, [at.x], at.grad)
            return [t.detach().cpu() for t in (out, grad)]

        wanted = run(reference.multi_scale_conv2d, low, torch.float64)
        got = run(functional.multi_scale_conv2d, case, torch.float32, device, LAYOUTS[seed % 2],
                  backend="cuda")  # fmt: skip
        eager = [run(reference.multi_scale_conv2d, low, torch.float32, layout=one)
                 for one in LAYOUTS]  # fmt: skip
        largest_errors = [
            max(largest(e.double() - w) for e in column)
            for *column, w in zip(*eager, wanted, strict=True)
        ]
        errors.add(["out", "x"], got, wanted, largest_errors)
    errors.check()


@st.composite
def convolutions(draw):
    """(shape, [(k, groups, in and out channels per group)], split) of a convolution that tensor
    cores compute in part: any number of channels, kernels without taps that meet the map."""
    split = draw(st.booleans())
    count = draw(st.integers(1, 3))
    per_group = st.sampled_from([1, 2, 4, 8, 9, 12, 16, 24, 40])
    branches = []
    channels = draw(st.sampled_from([24, 48, 72]))
    for _ in range(count):
        groups = draw(st.sampled_from([1, 2, 3, 4]))
        ins = draw(per_group) if split else channels // groups
        branches.append((draw(st.sampled_from([3, 5, 7, 9, 15])), groups, ins, draw(per_group)))
    if split:
        channels = sum(groups * ins for _, groups, ins, _ in branches)
    shape = (draw(st.integers(1, 2)), channels, draw(st.integers(1, 20)), draw(st.integers(17, 40)))
    return shape, branches, split


@EXAMPLES
@given(
    drawn=convolutions(),
    dtype=st.sampled_from(DTYPES),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_random_convolutions_on_tensor_cores(device, tf32, drawn, dtype, layouts, seed):
    """Result and all gradients; of operands that TF32 leaves as they are, so that it is no matter
    which branches tensor cores compute."""
    shape, branches, split = drawn
    groups = [g for _, g, _, _ in branches]
    torch.manual_seed(seed)

    def operand(*size):
        return rounded(torch.randn(size)).to(dtype)

    x = operand(*shape)
    weights = [operand(g * outs, ins, k, k) for k, g, ins, outs in branches]
    grad = operand(shape[0], sum(w.shape[0] for w in weights), *shape[2:])

    def run(f, d, where="cpu", layouts=(LAYOUTS[0],) * 3, **kw):
        def laid_out(t, layout):
            return t.to(where, d).contiguous(memory_format=layout)

        leaves = [laid_out(x, layouts[0]), *(laid_out(w, layouts[1]) for w in weights)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = f(leaves[0], leaves[1:], groups, split, **kw)
        grads = torch.autograd.grad(out, leaves, laid_out(grad, layouts[2]))
        return [t.detach().cpu() for t in (out, *grads)]

    wanted = run(reference.multi_scale_conv2d, torch.float64)
    got = run(functional.multi_scale_conv2d, dtype, device, layouts, backend="cuda")
    eager = [run(reference.multi_scale_conv2d, dtype, layouts=(one,) * 3) for one in LAYOUTS]
    largest_errors = [
        max(largest(e.double() - w) for e in column)
        for *column, w in zip(*eager, wanted, strict=True)
    ]
    errors = Errors(dtype)
    errors.add(["out", "x", *(f"weights[{i}]" for i in range(len(weights)))], got, wanted,
               largest_errors)  # fmt: skip
    errors.check()


KINDS = [*DTYPES[1:], "tf32"]  # on tensor cores


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
@pytest.mark.parametrize("split", [True, False])
def test_layouts_give_the_same_bits_on_tensor_cores(device, kind, split):
    """channels_last maps and weights are copied, contiguous ones gathered, also from a slice at an
    odd channel; and source channels of weights that are neighbours for the data gradient."""
    case = make_case((2, 48, 11, 20), dtype=kind, kernel_sizes=(3, 5), groups=(1, 3), split=split)
    low = case.cast(kind, device)
    x, weights = low.x.detach(), [w.detach() for w in low.weights]
    wide = torch.randn(2, 50, 11, 20, dtype=kind).to(device)
    wide[:, 1:49] = x
    last = [w.contiguous(memory_format=LAYOUTS[1]) for w in weights]
    outer = [w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for w in weights]
    assert all(w.stride(0) == 1 for w in outer)
    found = []
    for layout in (
        [x, *weights],
        [x.contiguous(memory_format=LAYOUTS[1]), *last],
        [wide.contiguous(memory_format=LAYOUTS[1])[:, 1:49], *outer],
    ):
        leaves = [t.detach().requires_grad_() for t in layout]
        out = functional.multi_scale_conv2d(
            leaves[0], leaves[1:], low.groups, low.split, backend="cuda"
        )
        found.append([out, *torch.autograd.grad(out, leaves, torch.cos(out.detach()))])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("shape", "buffers"), [((1, 512, 7, 7), [2, 2, 2, 2]), ((1, 64, 56, 56), [1])], ids=str
)
def test_rounds_in_two_buffers_and_in_one(machine, kind, layout, shape, buffers):
    """A round is copied while the one before is multiplied, where there are several: what is not
    yet waited for is what was there before, and what is overwritten too early another round's."""
    plan = plan_of(shape, dtype=kind)
    for direction in ("forward", "backward"):
        rounds = plan[f"{direction}_tensor_core_rounds"]
        if kind != torch.float32:
            assert [b for _, _, b in rounds] == buffers
        else:
            assert 2 in [b for _, _, b in rounds]
    case = make_case(shape, dtype=kind, kernel_sizes=(3, 5, 7, 9), groups=(1, 4, 8, 16))
    low = case.cast(kind)
    x = low.x.detach().contiguous(memory_format=layout).requires_grad_()

    def run():
        out = functional.multi_scale_conv2d(x, low.weights, low.groups, backend="cuda")
        return [out, *torch.autograd.grad(out, [x], low.grad.to(kind))]

    ascending = run()
    machine.set(backwards=True)
    for a, b in zip(ascending, run(), strict=True):
        assert torch.equal(a, b) and not a.isnan().any()


@pytest.mark.parametrize(("shape", "options"), SHAPES, ids=str)
def test_shapes_that_users_have(device, shape, options):
    assert is_large(shape, **options)
    check_block(torch.float32, LAYOUTS[shape[1] % 3 == 1], "cuda", device, shape=shape, **options)


@pytest.mark.parametrize(("dtype", "layout"), EACH, ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 24, 11, 20), {}),
        ((2, 40, 33, 17), {"groups": (1, 2)}),
        ((1, 16, 8, 40), {"split": False}),
        # In 16 bits on tensor cores: groups that fill no chunk of 8 channels; several stages of
        # sources, and taps a few rows at a time; more destination channels than a unit has;
        # branches of both kinds that add to the same channels.
        ((1, 66, 10, 18), {"groups": (1, 1)}),
        ((1, 200, 8, 17), {"kernel_sizes": (5, 9), "groups": (1, 10)}),
        ((1, 160, 5, 18), {"kernel_sizes": (3,), "groups": (1,)}),
        ((1, 24, 9, 34), {"kernel_sizes": (3, 5), "groups": (2, 12), "split": False}),
        # The sum over branches on tensor cores too: one round and several, groups of one slot and
        # fewer than 8 sources; several units, of which the last is smaller.
        ((1, 32, 9, 20), {"kernel_sizes": (3, 5), "groups": (1, 4), "split": False}),
        ((1, 76, 6, 18), {"kernel_sizes": (5, 3), "groups": (1, 1), "split": False}),
    ],
    ids=str,
)
def test_multi_scale_conv2d(device, dtype, layout, shape, options):
    """The convolution alone, with its bias: result and all gradients, in every dtype."""
    options = {"kernel_sizes": (3, 7), **options}
    errors = Errors(dtype)
    for seed in range(3):
        case = make_case(shape, dtype=dtype, seed=seed, **options)
        out_channels = sum(w.shape[0] for w in case.weights)
        bias = torch.randn(out_channels, dtype=torch.float64).to(dtype).double()
        gradient = torch.randn(shape[0], out_channels, *shape[2:], dtype=torch.float64)
        gradient = gradient.to(dtype)

        def run(f, d, where="cpu", layout=torch.contiguous_format, case=case, bias=bias,
                gradient=gradient, **kw):  # fmt: skip
            at = case.cast(d, where)
            b = bias.to(where, d).requires_grad_()
            x = at.x.contiguous(memory_format=layout)
            out = f(x, at.weights, at.groups, at.split, b, **kw)
            grads = torch.autograd.grad(out, [at.x, *at.weights, b], gradient.to(where, d))
            return [t.detach().cpu() for t in (out, *grads)]

        wanted = run(reference.multi_scale_conv2d, torch.float64)
        got = run(functional.multi_scale_conv2d, dtype, device, layout, backend="cuda")
        eager = [run(reference.multi_scale_conv2d, dtype, layout=one) for one in LAYOUTS]
        names = ["out", "x", *(f"weights[{i}]" for i in range(len(case.weights))), "bias"]
        largest_errors = [
            max(largest(e.double() - w) for e in column)
            for *column, w in zip(*eager, wanted, strict=True)
        ]
        errors.add(names, got, wanted, largest_errors)
    errors.check()


@pytest.mark.parametrize(("dtype", "layout"), EACH, ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 20, 9, 18), {}),
        ((1, 150, 6, 33), {"hidden": 9, "biases": False}),
        ((2, 3, 40, 17), {"k": 11}),
    ],
    ids=str,
)
def test_dual_attention(device, dtype, layout, shape, options):
    """The attention alone, in every dtype: what it reads is exact, so no maximum is another's."""
    errors = Errors(dtype)
    for seed in range(3):
        case = draw_case(shape, dtype=dtype, seed=seed, **options)
        wanted = expected(case)
        eager = eager_errors_of_attention(case.to(dtype), wanted)
        low = case.to(dtype, device).laid_out(layout)
        leaves = [t.requires_grad_() for t in (low.y, *low.parameters) if t is not None]
        out = functional.dual_attention(low.y, *low.parameters, backend="cuda")
        got = [t.detach().cpu() for t in (out, *torch.autograd.grad(out, leaves, low.grad))]
        names = ["out", "y"]
        names += [n for n, p in zip(ATTENTION, case.parameters, strict=True) if p is not None]
        errors.add(names, got, wanted, eager)
    errors.check()


@pytest.mark.parametrize(("dtype", "layout"), HALVES, ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 12, 20), (1, 132, 9, 17)], ids=str)
def test_the_block_in_half_precision(device, dtype, layout, shape):
    """Between its halves y is rounded, which decides near ties. The reference decides them as we
    do: it goes on from our y, whose own error test_multi_scale_conv2d bounds."""
    errors = Errors(dtype)
    for seed in range(3):
        case = make_case(shape, dtype=dtype, seed=seed)
        low, exact = case.cast(dtype, device), case.cast(torch.float64)

        def convolve(at, **kw):
            return functional.multi_scale_conv2d(at.x, at.weights, at.groups, **kw)

        def from_our_y(x, weights, groups, *attention, split, low=low):
            y = reference.multi_scale_conv2d(x, weights, groups, split)
            ours = convolve(low, backend="cuda").detach().cpu().double()
            return reference.dual_attention(y + (ours - y).detach(), *attention)

        eager = eager_errors(case, dtype, run_block(exact, reference.mfef_block))
        wanted = run_block(exact, from_our_y)
        got = run_block(low, functional.mfef_block, layout, backend="cuda")
        names = ["out", "x", *(f"weights[{i}]" for i in range(len(case.weights))), *ATTENTION]
        errors.add(names, [g.cpu() for g in got], wanted, eager)
    errors.check()
