"""Convolutions by FFT: what the other tests, which force them too, do not reach.

Maps of every side that has transforms, widths of a group on either side of those at which the
kernels change their tiles or what is in their lanes, and values that are not finite or nearly so.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfef_ext import _C, functional, reference
from mfef_ext.inspection import cpu_plan
from mfef_ext.problem import Branch, Problem
from tests.accuracy import (
    MIRRORS,
    Eager,
    check_block,
    largest,
    make_case,
    run_block,
    specification,
    unit_in_the_last_place,
)
from tests.drawing import DRAWN

SIDES = (7, 8, 14, 16)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@st.composite
def square_blocks(draw):
    kernel_sizes = draw(st.lists(st.sampled_from([3, 5, 7, 9]), min_size=1, max_size=3))
    return {
        "shape": (
            draw(st.sampled_from([1, 3, 17])),
            draw(st.integers(len(kernel_sizes), 40)),
            *[draw(st.sampled_from(SIDES))] * 2,
        ),
        "kernel_sizes": kernel_sizes,
        "groups": draw(st.sampled_from(["auto", (1,) * len(kernel_sizes)])),
        "split": draw(st.booleans()),
        "spatial_kernel_size": 3,
        "seed": draw(st.integers(0, 100)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(DRAWN, max_examples=12)
@given(
    arguments=square_blocks(),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_random_square_blocks(fft_of_each_isa, dtype, arguments, layout):
    check_block(dtype, layout, under=fft_of_each_isa, **arguments)


# (in, out) of a group: single channels, tiles of one to eight outputs and one to eight bins, just
# below and above the widths at which output channels become lanes, more inputs than one chain has.
WIDTHS = [(1, 1), (2, 1), (3, 5), (5, 3), (9, 7), (11, 13), (17, 12), (10, 33), (60, 6)]


MAPS = [(7, 3), (7, 9), (8, 5), (8, 7), (14, 3), (16, 9)]  # sides and kernel sizes
# Any two of a dtype, a width and a map meet: transforms know nothing of widths, nor tiles of maps.
PAIRS = [
    (DTYPES[(w + m) % 3], *width, *one)
    for w, width in enumerate(WIDTHS)
    for m, one in enumerate(MAPS)
]


@pytest.mark.parametrize(("dtype", "in_group", "out_group", "side", "k"), PAIRS, ids=str)
def test_groups_of_any_width(on_each_isa, dtype, in_group, out_group, side, k):
    """More output than input channels and fewer, in three groups, by the rule of accuracy.py."""
    low = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(low).eps
    ours: dict[str, list[float]] = {}
    draws = []
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(18, 3 * in_group, side, side).to(low)
        weight = torch.randn(3 * out_group, in_group, k, k).to(low)
        bias = torch.randn(3 * out_group).to(low)
        grad = torch.randn(18, 3 * out_group, side, side).to(low)

        def run(f, to, dims=(), x=x, weight=weight, bias=bias, grad=grad, **kw):
            """With the batch reversed or in a mirror: the same operation in another order."""
            mirror = [d for d in dims if d > 0]
            leaves = [x.flip(dims), weight.flip(mirror), bias]
            leaves = [t.to(to).requires_grad_() for t in leaves]
            out = f(leaves[0], [leaves[1]], [3], bias=leaves[2], **kw)
            grad_x, grad_weight = torch.autograd.grad(out, leaves[:2], grad.flip(dims).to(to))
            return [out.detach().flip(dims), grad_x.flip(dims), grad_weight.flip(mirror)]

        with specification(dtype):
            wanted = run(reference.multi_scale_conv2d, torch.float64)
        units = [unit_in_the_last_place(w, dtype) for w in wanted]

        def errors(got, wanted=wanted, units=units):
            return [largest(g.double() - w) / u for g, w, u in zip(got, wanted, units, strict=True)]

        def eager_errors(run=run, errors=errors):
            for dims in ((), (0,), *MIRRORS):
                plain = errors(run(reference.multi_scale_conv2d, low, dims))
                yield [scale * error for error in plain]

        draws.append(Eager(eager_errors()))
        got = on_each_isa(lambda r=run: r(functional.multi_scale_conv2d, dtype, backend="cpu"))
        for isa, tensors in got.items():
            before = ours.get(isa, [0.0] * 3)
            ours[isa] = [max(o, e) for o, e in zip(before, errors(tensors), strict=True)]

    def missed():
        eager = [max(errors) for errors in zip(*(draw.errors for draw in draws), strict=True)]
        return [
            f"{isa}, {name}: {o:.3g} units, eager {e:.3g}"
            for isa, of_isa in ours.items()
            for name, o, e in zip(("out", "x", "weight"), of_isa, eager, strict=True)
            if not o <= 2 * e + 1
        ]

    if missed():
        for draw in draws:
            draw.exhaust()
    assert not missed()


def plan_of(shape, branches) -> dict:
    described = [Branch(i, o, k, g) for i, o, g, k in branches]
    device = torch.device("cpu")
    return cpu_plan(Problem("multi_scale_conv2d", *shape, torch.float32, device, tuple(described)))


def test_ffts_are_what_runs(fft):
    """The paper's block, and the widths of the test above."""
    for direction in ("forward", "backward"):
        for side, sides in {
            7: [8, 9, 10, 12],
            8: [9, 10, 12, 12],
            14: [16, 16, 18, 18],
            16: [18, 18, 20, 20],
        }.items():
            branches = [(16, 16, g, k) for g, k in zip((1, 4, 8, 16), (3, 5, 7, 9), strict=True)]
            plan = plan_of((18, 64, side, side), branches)
            assert plan[f"{direction}_fft_sizes"] == sides


@pytest.mark.parametrize("shape", [(3, 8, 8, 7), (3, 8, 6, 6), (3, 8, 15, 15)])
def test_other_maps_are_convolved_directly(fft, shape):
    branches = [(8, 8, 1, 3)]
    plan = plan_of(shape, branches)
    assert plan["forward_fft_sizes"] == plan["backward_fft_sizes"] == [0]
    _C.force_cpu_convolution("")
    check_block(torch.float32, shape=shape)


@pytest.mark.parametrize("side", SIDES)
def test_threads_and_neighbours(fft, threads, side):
    case = make_case((19, 20, side, side), dtype=torch.float32).cast(torch.float32)
    runs = []
    for count in (1, 2, 3):
        threads(count)
        runs.append(run_block(case, functional.mfef_block, backend="cpu"))
        runs.append(run_block(case, functional.mfef_block, torch.channels_last, backend="cpu"))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)
    for image in (0, 15, 18):
        x = case.x[image : image + 1]
        alone = functional.mfef_block(x, case.weights, case.groups, *case.attention, backend="cpu")
        assert torch.equal(alone[0], runs[0][0][image])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("place", ["x", "weight"])
@pytest.mark.parametrize("side", SIDES)
def test_what_is_not_finite_stays_where_it_is(fft, place, side, value):
    """Forward, in each image for itself, and all gradients are what direct sums give.

    3e38 is finite, and so are many of the direct sums with it; transforms overflow.
    """
    torch.manual_seed(0)
    x = torch.randn(18, 12, side, side)
    weights = [torch.randn(6, 6, 3, 3), torch.randn(6, 3, 7, 7)]
    clean = functional.multi_scale_conv2d(x, weights, [1, 2], backend="cpu")
    if place == "x":
        x[5, 3, 2, 2] = x[5, 9, side - 1, 0] = value
    else:
        weights[0][1, 2, 0, 1] = weights[1][4, 0, 6, 3] = value
    grad = torch.randn_like(x)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, *weights)]
        out = functional.multi_scale_conv2d(leaves[0], leaves[1:], [1, 2], backend="cpu")
        return [out, *torch.autograd.grad(out, leaves, grad)]

    got = run()
    _C.force_cpu_convolution("direct")
    wanted = run()
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isposinf(), b.isposinf()) and torch.equal(a.isneginf(), b.isneginf())
        if i >= 1:
            largest_sum = torch.where(b.isfinite(), b, 0.0).abs().max()
            close = float(16 * torch.finfo(b.dtype).eps * largest_sum)
            torch.testing.assert_close(a, b, rtol=0, atol=close, equal_nan=True)
    if value != 3e38:
        exact, plain = (
            reference.multi_scale_conv2d(x.to(d), [w.to(d) for w in weights], [1, 2])
            for d in (torch.float64, torch.float32)
        )
        finite = got[0].isfinite() & exact.isfinite()
        errors = (largest(out[finite].double() - exact[finite]) for out in (got[0], plain))
        ours, eager = (e / unit_in_the_last_place(exact[finite], torch.float32) for e in errors)
        assert ours <= 2 * eager + 1
    if place == "x":
        others = [i for i in range(18) if i != 5]
        assert torch.equal(got[0][others], clean[others])


@pytest.mark.parametrize("scale", [1.0, 20.0, 1e2, 1e4, 1e15])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("images", "k"), [(18, 3), (3, 3), (18, 9)])
def test_gradient_of_weights_that_outliers_do_not_meet_under(fft, side, images, k, scale):
    """x and dy are large at opposite corners, whose product no tap of the kernel ever sees."""
    ours, eager = 0.0, 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        x, grad = torch.randn(images, 8, side, side), torch.randn(images, 8, side, side)
        x[:, :, 0, 0] *= scale
        grad[:, :, -1, -1] *= scale
        weight = torch.randn(8, 8, k, k)

        def gradient(f, dtype, x=x, grad=grad, weight=weight, **kw):
            leaf = weight.to(dtype).requires_grad_()
            out = f(x.to(dtype), [leaf], [1], **kw)
            return torch.autograd.grad(out, leaf, grad.to(dtype))[0]

        wanted = gradient(reference.multi_scale_conv2d, torch.float64)
        ulp = unit_in_the_last_place(wanted, torch.float32)
        got = gradient(functional.multi_scale_conv2d, torch.float32, backend="cpu")
        plain = gradient(reference.multi_scale_conv2d, torch.float32)
        ours = max(ours, largest(got.double() - wanted) / ulp)
        eager = max(eager, largest(plain.double() - wanted) / ulp)
    assert ours <= 2 * eager + 1, f"{ours:.3g} units, eager {eager:.3g}"


@pytest.mark.parametrize("scale", [1.0, 20.0, 50.0, 1e4, 1e15])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("k", [3, 9])
def test_maps_whose_outliers_meet_no_tap(fft, side, k, scale):
    """The kernel has one tap, in its corner; the products of the large pixels fall off the map."""
    ours, eager = [0.0, 0.0], [0.0, 0.0]
    for seed in range(3):
        torch.manual_seed(seed)
        x, grad = torch.randn(18, 8, side, side), torch.randn(18, 8, side, side)
        x[:, :, -1, -1] *= scale
        grad[:, :, 0, 0] *= scale
        weight = torch.zeros(8, 8, k, k)
        weight[:, :, 0, 0] = torch.randn(8, 8)

        def run(f, dtype, x=x, grad=grad, weight=weight, **kw):
            leaf = x.to(dtype).requires_grad_()
            out = f(leaf, [weight.to(dtype)], [1], **kw)
            return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(dtype))]

        wanted = run(reference.multi_scale_conv2d, torch.float64)
        got = run(functional.multi_scale_conv2d, torch.float32, backend="cpu")
        plain = run(reference.multi_scale_conv2d, torch.float32)
        for i, (w, a, b) in enumerate(zip(wanted, got, plain, strict=True)):
            ulp = unit_in_the_last_place(w, torch.float32)
            ours[i] = max(ours[i], largest(a.double() - w) / ulp)
            eager[i] = max(eager[i], largest(b.double() - w) / ulp)
    for name, o, e in zip(("out", "x"), ours, eager, strict=True):
        assert o <= 2 * e + 1, f"{name}: {o:.3g} units, eager {e:.3g}"


def test_forcing_what_is_not_there_says_what_is():
    with pytest.raises(ValueError, match="'direct', 'fft'"):
        _C.force_cpu_convolution("winograd")


def flat_maps(kind, side):
    """(33, 24, side, side) images in which many pixels and channels have equal sums."""
    torch.manual_seed(3)
    if kind == "constant":
        return torch.randn(33, 24, 1, 1).relu().expand(33, 24, side, side).contiguous()
    x = torch.zeros(33, 24, side, side)
    if kind == "one pixel":
        x[:, :, 2, 3] = torch.randn(33, 24)
    elif kind == "framed":
        x[:, :, 2:-2, 1:-3] = torch.randn(33, 24, side - 4, side - 4).relu()
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["constant", "one pixel", "framed", "empty"])
@pytest.mark.parametrize("side", SIDES)
def test_the_first_of_equals_is_found(fft, dtype, kind, side):
    """Sums that are equal differ by rounding errors once they come out of an FFT: the places of
    the maxima are those of direct sums all the same, over pixels and over channels. Only values
    that differ, by some rounding errors, may be taken for one another."""
    x = flat_maps(kind, side).to(dtype)
    weights = [torch.randn(12, 12, 3, 3).to(dtype), torch.randn(12, 3, 7, 7).to(dtype)]
    attention = [torch.randn(*s).to(dtype) for s in ((2, 24), (2,), (24, 2), (24,), (1, 2, 3, 3))]
    _C.force_cpu_convolution("fft")
    found = torch.ops.mfef.mfef_block(x, weights, [1, 4], True, *attention, True)
    _C.force_cpu_convolution("direct")
    wanted = torch.ops.mfef.mfef_block(x, weights, [1, 4], True, *attention, True)
    y = wanted[1]
    _, z, _ = reference.attention_gates(y, *attention)
    for values, dim, at in ((y.flatten(2), 2, 4), (z, 1, 6)):
        places = [t[at].long().unsqueeze(dim) for t in (wanted, found)]
        first, other = (values.gather(dim, p)[places[0] != places[1]] for p in places)
        close = 100 * torch.finfo(dtype).eps * values.abs().max()
        assert bool((first > other).all()) and bool((first - other <= close).all())
        assert len(first) <= 2
