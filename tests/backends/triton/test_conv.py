"""The convolution in Triton against the specification in float64; tests/accuracy.py has the rule.

Interpreted on CPU tensors where there is no GPU; on a GPU where there is one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mfef_ext import ops, reference
from mfef_ext.problem import allow_tf32
from tests.accuracy import (
    MIRRORS,
    Eager,
    Errors,
    errors_of,
    factor,
    largest,
    unit_in_the_last_place,
)
from tests.drawing import DRAWN

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
EXAMPLES = settings(DRAWN, max_examples=3)


@pytest.fixture
def conv():
    """The module; imported late, when it is settled whether Triton interprets."""
    return importlib.import_module("mfef_ext.backends.triton.conv")


# (dtype, PyTorch's TF32 switch, which also decides between the tiles for float32, layout)
MODES = {
    "float32, tf32": (torch.float32, True, torch.contiguous_format),
    "float32, ieee": (torch.float32, False, torch.channels_last),
    "bfloat16": (torch.bfloat16, True, torch.channels_last),
    "float16": (torch.float16, True, torch.contiguous_format),
}


@pytest.fixture
def small_is_large(conv, monkeypatch):
    """Tiles of large maps for 12 x 11 pixels, which are two of them: the interpreter is slow."""

    def forget() -> None:
        for calls in (conv._plan_convolution, conv._convolution):
            calls.cache_clear()

    monkeypatch.setattr(conv, "LARGE_MAP", 100)
    forget()
    yield
    forget()


@pytest.fixture(params=MODES)
def mode(request):
    """(dtype, layout) with the switch set."""
    dtype, tf32, layout = MODES[request.param]
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    yield dtype, layout
    torch.backends.cudnn.allow_tf32 = before


@dataclass
class Case:
    """Arguments of one convolution and of its gradients."""

    x: Tensor
    weights: list[Tensor]
    groups: list[int]
    split: bool
    bias: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype, device: str | None = None) -> Case:
        """The same values, and strides, in another dtype."""

        def cast(t: Tensor) -> Tensor:
            return t.to(device or t.device, dtype)

        weights = [cast(w) for w in self.weights]
        x, bias, grad = cast(self.x), cast(self.bias), cast(self.grad)
        return Case(x, weights, self.groups, self.split, bias, grad)


# (kernel size, input channels per group, output channels per group, groups)
Branches = list[tuple[int, int, int, int]]


def make_case(n: int, h: int, w: int, branches: Branches, split=True, seed=0) -> Case:
    torch.manual_seed(seed)
    inputs = [i * g for _, i, _, g in branches]
    outputs = sum(o * g for _, _, o, g in branches)
    assert split or len(set(inputs)) == 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return Case(
        normal(n, sum(inputs) if split else inputs[0], h, w),
        [normal(o * g, i, k, k) / (i * k * k) ** 0.5 for k, i, o, g in branches],
        [g for *_, g in branches],
        split,
        normal(outputs),
        normal(n, outputs, h, w),
    )


def expected(case: Case) -> list[Tensor]:
    """[y, gradients of x, of the bias, of the weights] by the specification."""
    leaves = [t.detach().requires_grad_() for t in (case.x, case.bias, *case.weights)]
    x, bias, *weights = leaves
    y = reference.multi_scale_conv2d(x, weights, case.groups, case.split, bias)
    return [y.detach(), *torch.autograd.grad(y, leaves, case.grad)]


def computed(conv, case: Case) -> list[Tensor]:
    """The same by the kernels."""
    tf32 = allow_tf32()
    branches = conv.Weights(case.weights, case.groups, case.split)
    y, _ = conv.forward(case.x, branches, case.bias, tf32, False)
    arguments = case.grad, case.x, branches, tf32
    weights = conv.weight_gradient(*arguments)
    return [y, conv.data_gradient(*arguments), conv.bias_gradient(case.grad), *weights]


def eager_runs(case: Case) -> Iterator[list[Tensor]]:
    """Results of eager PyTorch by orders of the same operation."""
    x, grad = case.x, case.grad
    yield expected(case)
    for layout in LAYOUTS:
        a, b = (t.flip(0).contiguous(memory_format=layout) for t in (x, grad))
        back = Case(a, case.weights, case.groups, case.split, case.bias, b)
        y, grad_x, *rest = expected(back)
        yield [y.flip(0), grad_x.flip(0), *rest]
    for dims in MIRRORS:
        weights = [w.flip(dims) for w in case.weights]
        mirrored = Case(x.flip(dims), weights, case.groups, case.split, case.bias, grad.flip(dims))
        y, grad_x, grad_bias, *grads = expected(mirrored)
        yield [y.flip(dims), grad_x.flip(dims), grad_bias, *(g.flip(dims) for g in grads)]


def check(conv, device: str, dtype: torch.dtype, layout, *arguments, **options) -> None:
    """The rule, for the result and all gradients; one draw, because interpreting takes long."""
    case = make_case(*arguments, **options).to(dtype, device)
    wanted = expected(case.to(torch.float64))
    eager = Eager(errors_of(run, wanted) for run in eager_runs(case))
    as_given = replace(
        case,
        x=case.x.contiguous(memory_format=layout),
        grad=case.grad.contiguous(memory_format=layout),
    )
    names = ["y", "x", "bias", *(f"weights[{i}]" for i in range(len(case.weights)))]
    errors = Errors(dtype)
    errors.add(names, computed(conv, as_given), wanted, eager)
    errors.check()


@st.composite
def problems(draw):
    """Kernels up to larger than the map, groups of every width, and widths that fill no block."""
    split = draw(st.booleans())
    count = draw(st.integers(1, 3))
    sizes = [draw(st.sampled_from([1, 3, 5, 9])) for _ in range(count)]
    if split:
        widths = st.sampled_from([1, 2, 3, 8, 11])
        branches = [
            (k, draw(widths), draw(widths), draw(st.sampled_from([1, 2, 3]))) for k in sizes
        ]
    else:
        channels = draw(st.sampled_from([4, 6, 16]))
        divisors = [g for g in (1, 2, 3, 4, 6, 8) if channels % g == 0]
        branches = []
        for k in sizes:
            g = draw(st.sampled_from(divisors))
            branches.append((k, channels // g, draw(st.integers(1, 9)), g))
    n, h, w = draw(st.sampled_from([1, 2, 5])), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return n, h, w, branches, split, draw(st.integers(0, 100))


@EXAMPLES
@given(problem=problems())
def test_random_problems(conv, device, mode, problem):
    *arguments, split, seed = problem
    check(conv, device, *mode, *arguments, split=split, seed=seed)


PROBLEMS = {
    "like the paper's": ((2, 3, 4, [(3, 8, 8, 1), (1, 4, 4, 2), (3, 2, 2, 2), (5, 1, 1, 4)]), {}),
    "depths of 16 and 32": ((2, 2, 3, [(3, 32, 8, 1), (3, 16, 8, 2)]), {}),
    "33 channels": ((1, 2, 2, [(3, 33, 11, 1), (1, 11, 33, 3)]), {}),
    "more outputs than a tile": ((1, 2, 3, [(3, 8, 72, 1), (1, 72, 8, 2)]), {}),
    "maps of 2 x 2": ((17, 2, 2, [(3, 8, 8, 2), (9, 2, 4, 4)]), {}),
    "one pixel": ((5, 1, 1, [(3, 16, 8, 1), (5, 1, 1, 4)]), {}),
    "large map": ((1, 12, 11, [(1, 8, 8, 1), (3, 1, 1, 1)]), {}),
    "pyramid": ((2, 3, 3, [(3, 16, 9, 1), (1, 8, 8, 2), (3, 4, 2, 4)]), {"split": False}),
    "pyramid, wide groups": ((1, 2, 3, [(3, 32, 8, 2), (1, 64, 8, 1)]), {"split": False}),
    "pyramid, odd": ((1, 2, 3, [(1, 33, 2, 1), (3, 11, 9, 3)]), {"split": False}),
    "pyramid, large map": ((1, 12, 11, [(1, 4, 2, 1), (3, 1, 1, 4)]), {"split": False}),
}


# The two kinds of tiles; all modes are in test_random_problems.
@pytest.mark.parametrize("mode", ["float32, ieee", "bfloat16"], indirect=True)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_of_each_kind(conv, device, mode, problem, request):
    if "large map" in problem:
        request.getfixturevalue("small_is_large")
    arguments, options = PROBLEMS[problem]
    check(conv, device, *mode, *arguments, **options)


@pytest.mark.parametrize("mode", ["float32, tf32", "bfloat16"], indirect=True)
def test_the_last_tile_of_each_list(conv, device, mode, monkeypatch):
    """With other channels than the first, of which deterministic mode would have it."""
    lists = {key: one._replace(tiles=one.tiles[::-1]) for key, one in conv.CONVOLUTION.items()}
    most = [{one.tiles[0].channels, one.tiles[-1].channels} for one in lists.values()]
    assert most.count({32, 64}) == 2
    monkeypatch.setattr(conv, "CONVOLUTION", lists)
    for calls in (conv._plan_convolution, conv._convolution):
        calls.cache_clear()
    check(conv, device, *mode, 2, 2, 3, [(3, 8, 72, 1), (1, 72, 8, 2)])
    for calls in (conv._plan_convolution, conv._convolution):
        calls.cache_clear()


def small(dtype: torch.dtype, device: str, n: int = 3, split: bool = True) -> Case:
    branches = [(3, 9, 8, 1), (3, 2, 1, 4)] if split else [(3, 16, 8, 1), (3, 4, 2, 4)]
    return make_case(n, 3, 4, branches, split).to(dtype, device)


def same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(a, b), i


def strided(t: Tensor, how: str) -> Tensor:
    """The same values with other strides, in a larger tensor of NaN."""
    if how == "slice":
        big = t.new_full([s + 2 for s in t.shape], float("nan"))
        view = big[tuple(slice(1, s + 1) for s in t.shape)]
    elif how == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    elif how == "every second":
        view = t.new_full([*t.shape[:3], 2 * t.shape[3]], float("nan"))[..., ::2]
    else:
        big = t.new_full([t.shape[0], t.shape[1] + 3, *t.shape[2:]], float("nan"))
        big = big.contiguous(memory_format=torch.channels_last)
        view = big[:, 1 : t.shape[1] + 1]
    return view.copy_(t)


@pytest.mark.parametrize(
    ("dtype", "split"), [(torch.float32, True), (torch.bfloat16, False)], ids=["split", "pyramid"]
)
def test_any_strides_give_the_same_bits(conv, device, dtype, split):
    case = small(dtype, device, split=split)
    plain = computed(conv, case)
    for how in ("slice", "transposed", "every second", "channels_last slice"):
        weights = [strided(w, "slice") for w in case.weights]
        x, grad = strided(case.x, how), strided(case.grad, how)
        bias = torch.stack([case.bias, case.bias], 1)[:, 0]
        other = computed(conv, Case(x, weights, case.groups, split, bias, grad))
        # The bias's gradient is PyTorch's sum, whose order depends on the strides.
        same_bits(plain[:2] + plain[3:], other[:2] + other[3:])


@pytest.mark.parametrize("split", [True, False], ids=["split", "pyramid"])
def test_wide_offsets_give_the_same_bits(conv, device, split, monkeypatch):
    """What maps of more than 2^31 elements per image are computed with."""
    case = small(torch.float32, device, split=split)
    plain = computed(conv, case)
    monkeypatch.setattr(conv, "_index", lambda *arguments: conv.tl.int64)
    for calls in (conv._convolution, conv._weight_gradient):
        calls.cache_clear()
    same_bits(plain, computed(conv, case))
    for calls in (conv._convolution, conv._weight_gradient):
        assert calls.cache_info().misses > 0
        calls.cache_clear()


def contiguous_weights(conv, branches=((3, 64, 1), (7, 8, 8), (9, 4, 16))):
    """What plans depend on of them; a branch: (k, channels of a group, groups)."""
    weights = tuple(
        ((width * g, width, k, k), (width * k * k, k * k, k, 1)) for k, width, g in branches
    )
    return conv.Branches(weights, tuple(g for _, _, g in branches), True)


def test_offsets_are_as_wide_as_they_have_to_be(conv):
    branches = contiguous_weights(conv)
    plan = conv._plan_convolution(branches, False, 8, 8, "half", 64)
    small_map, large_map = (((0, 2, 8, 8), (0, s, 8, 1)) for s in (64, 2**31))
    assert conv._index(plan, small_map, small_map) == conv.tl.int32
    assert conv._index(plan, small_map, large_map) == conv.tl.int64


def test_expanded_gradient(conv, device):
    case = small(torch.float32, device)
    one = case.grad.new_ones(())
    case.grad = one.expand_as(case.grad)
    expanded = computed(conv, case)
    case.grad = case.grad.contiguous()
    same_bits(expanded, computed(conv, case))


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 1, 3, 5), (2, 4, 1, 1), (0, 4, 3, 5)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_are_those_of_the_fakes(conv, device, shape, layout):
    x = torch.randn(shape, device=device).contiguous(memory_format=layout)
    for channels in (1, 3):
        weight = torch.randn(channels, shape[1], 3, 3, device=device)
        weights = conv.Weights([weight], [1], True)
        y, _ = conv.forward(x, weights, None, False, False)
        assert y.stride() == ops.fakes.map_like(x, channels).stride()
        grad_x = conv.data_gradient(y, x, weights, False)
        assert grad_x.stride() == ops.fakes.map_like(x, shape[1]).stride()


def test_gradients_have_the_strides_of_the_weights(conv, device):
    case = small(torch.float32, device)
    plain = computed(conv, case)
    case.weights = [w.contiguous(memory_format=torch.channels_last) for w in case.weights]
    other = computed(conv, case)
    same_bits(plain, other)
    assert [g.stride() for g in other[3:]] == [w.stride() for w in case.weights]


@pytest.mark.parametrize("split", [True, False], ids=["split", "pyramid"])
def test_an_empty_batch(conv, device, split):
    case = small(torch.float32, device, n=0, split=split)
    y, grad_x, grad_bias, *grads = computed(conv, case)
    assert y.shape == case.grad.shape and grad_x.shape == case.x.shape
    assert not any(g.any() for g in (grad_bias, *grads))
    weights = conv.Weights(case.weights, case.groups, split)
    _, per_tile = conv.forward(case.x, weights, None, allow_tf32(), True)
    assert per_tile.shape == (0, 3, case.grad.shape[1], 1)


# Up to 16 maps of 2 x 2 share a tile, and an image of 6 x 6 has one for itself.
@pytest.mark.parametrize(
    ("dtype", "n", "side"),
    [(torch.float32, 18, 2), (torch.bfloat16, 18, 2), (torch.float16, 3, 6)],
    ids=str,
)
def test_an_image_does_not_depend_on_its_batch(conv, device, sums_in_order, dtype, n, side):
    """Same bits whatever the batch, and twice the same for the weights, whose sum it enters."""
    case = make_case(n, side, side, [(3, 9, 8, 1), (3, 1, 1, 4)]).to(dtype, device)
    y, grad_x, *others = computed(conv, case)
    same_bits(others, computed(conv, case)[2:])
    for part in (slice(0, 1), slice(1, n)):
        part_of = Case(**vars(case))
        part_of.x, part_of.grad = case.x[part], case.grad[part]
        same_bits([y[part], grad_x[part]], computed(conv, part_of)[:2])


def pooled(per_tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, maximum and its index over the tiles; of equal maxima the first tile's."""
    sums, maxima, bits = per_tile.unbind(1)
    indices = bits.view(torch.int32)
    largest_of, tile = maxima.max(2)
    return sums.sum(2), largest_of, indices.gather(2, tile.unsqueeze(2)).squeeze(2)


@pytest.mark.parametrize("shape", [(2, 9, 8), (5, 2, 3), (3, 1, 1), (1, 12, 11)], ids=str)
def test_statistics(conv, device, mode, shape, request):
    """Of the map before it is rounded: in float32 they are those of the map itself."""
    if shape[1] == 12:
        request.getfixturevalue("small_is_large")
    dtype, layout = mode
    case = make_case(*shape, [(3, 8, 9, 1), (3, 2, 2, 3)]).to(dtype, device)
    x = case.x.contiguous(memory_format=layout)
    weights = conv.Weights(case.weights, case.groups, True)
    y, per_tile = conv.forward(x, weights, case.bias, allow_tf32(), True)
    plain, nothing = conv.forward(x, weights, case.bias, allow_tf32(), False)
    assert nothing is None and torch.equal(y, plain)
    assert per_tile.dtype == torch.float32
    total, maximum, index = pooled(per_tile)
    flat = y.float().flatten(2)
    # Triton's interpreter does not round to bfloat16 but cuts, so this is not torch's rounding.
    ulp = unit_in_the_last_place(flat, dtype)
    assert largest(maximum - flat.max(2).values) <= (0 if dtype == torch.float32 else ulp)
    assert torch.equal(flat.gather(2, index.long().unsqueeze(2)).squeeze(2), flat.max(2).values)
    if dtype == torch.float32:
        assert torch.equal(index.long(), flat.max(2).indices)
    # Rounding moves every pixel by half a unit in the last place at most.
    exact = expected(case.to(torch.float64))[0].flatten(2).sum(2)
    eager = largest(flat.sum(2).double() - exact)
    ulp = unit_in_the_last_place(exact, dtype)
    assert largest(total.double() - exact) <= factor(dtype) * eager + ulp


def test_statistics_of_ties_and_of_nan(conv, device):
    """The first pixel of equal ones; NaN is larger than all, and the first of them counts."""
    x = torch.zeros(4, 2, 9, 10, device=device)
    x[0, :, 3, 4] = x[0, :, 3, 7] = x[0, :, 8, 9] = 2.0
    x[1, :, 5, 5] = x[1, :, 7, 1] = float("nan")
    x[1, :, 0, 0] = float("inf")
    x[2] = -float("inf")
    weights = [torch.ones(1, 1, 1, 1, device=device), torch.ones(1, 1, 1, 1, device=device)]
    branches = conv.Weights(weights, [1, 1], True)
    y, per_tile = conv.forward(x, branches, None, allow_tf32(), True)
    same_bits([torch.nan_to_num(y)], [torch.nan_to_num(x)])
    _, maximum, index = pooled(per_tile)
    assert index.tolist() == [[34, 34], [55, 55], [0, 0], [0, 0]]
    inf = float("inf")
    assert torch.equal(maximum[0], x.new_tensor([2.0, 2.0])) and maximum[1].isnan().all()
    assert maximum[2].tolist() == [-inf, -inf] and maximum[3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("width", [2, 8, 16])
def test_nan_stays_in_its_group(conv, device, width):
    """A tile may span groups, or be padded: what is beside a group must not reach it."""
    case = make_case(2, 4, 4, [(3, width, width, 3)]).to(torch.float32, device)
    wanted = computed(conv, case)
    case.x[1, width : 2 * width] = float("nan")
    case.grad[1, width : 2 * width] = float("nan")
    y, grad_x, *_, grad = computed(conv, case)
    for t, w in ((y, wanted[0]), (grad_x, wanted[1])):
        assert t[1, width : 2 * width].isnan().all()
        t[1, width : 2 * width] = w[1, width : 2 * width]
        assert torch.equal(t, w)
    middle = slice(width, 2 * width)
    assert grad[middle].isnan().all()
    grad[middle] = wanted[3][middle]
    assert torch.equal(grad, wanted[3])


def test_large_sums_of_float16_do_not_overflow(conv, device):
    """Products beyond 65504 whose sum is small: accumulated in float32."""
    x = torch.full((1, 16, 3, 3), 200.0, dtype=torch.float16, device=device)
    weight = torch.full((8, 16, 1, 1), 200.0, dtype=torch.float16, device=device)
    weight[:, ::2] = -200.0
    y, per_tile = conv.forward(x, conv.Weights([weight], [1], True), None, allow_tf32(), True)
    assert not y.any() and not per_tile[:, 0].any()


def test_plans_do_not_depend_on_the_batch_or_on_large_maps(conv):
    """One compilation serves every batch, and every map that is larger than kernels and tiles."""
    branches = contiguous_weights(conv)
    sides = [conv._plan_convolution(branches, False, s, s, "half", 64) for s in (9, 14)]
    assert sides[0]._replace(maps=0) == sides[1]._replace(maps=0)


def test_slices_cover_the_images(conv):
    branches = contiguous_weights(conv)
    strides = tuple(stride for _, stride in branches.weights)
    plan = conv._plan_gradient(branches, strides, 8, 8, "half")
    for blocks in (0, 1, 3, 4, 17, 128, 5000):
        slices, per_slice = conv._slices(plan, blocks)
        assert (slices - 1) * per_slice < max(blocks, 1) and slices * per_slice >= blocks
        assert slices >= (blocks > 0)
