"""The attention in Triton against the specification in float64; tests/accuracy.py has the rule.

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

from mfef_ext import reference
from tests.accuracy import ATTENTION, MIRRORS, Eager, Errors, errors_of
from tests.drawing import DRAWN

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
EXAMPLES = settings(DRAWN, max_examples=4)
# Where a value overflows, a GPU says nothing and the interpreter's numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def attention():
    """The module; imported late, when it is settled whether Triton interprets."""
    return importlib.import_module("mfef_ext.backends.triton.attention")


@pytest.fixture
def force(attention, monkeypatch):
    """Sets the tile, and with it the plan, by its name: maps can then be small, the interpreter
    being slow."""

    def forget() -> None:
        for calls in (attention._forward_call, attention._backward_call):
            calls.cache_clear()

    def to(name: str) -> None:
        name, comma, _ = name.partition(", last")
        image = name in attention.IMAGE_TILES
        tile = (attention.IMAGE_TILES if image else attention.PIXEL_TILES)[name]
        if comma:  # deterministic mode takes the first of the list
            tile = tile._replace(choices=tile.choices[::-1])
        monkeypatch.setattr(attention, "choose", lambda *_: (image, tile))
        forget()

    yield to
    forget()


@pytest.fixture(params=["small", "few channels"])
def plan(request, force):
    """Both plans; (9, 10) pixels are two tiles of the one and three of the other."""
    force(request.param)
    return request.param


@dataclass
class Case:
    """Arguments of one attention and of its gradients; parameters in the order of ATTENTION."""

    y: Tensor
    parameters: list[Tensor | None]
    grad: Tensor

    def to(self, dtype: torch.dtype, device: str | None = None) -> Case:
        """The same values, and strides, in another dtype."""

        def cast(t: Tensor) -> Tensor:
            return t.to(device or t.device, dtype)

        parameters = [None if p is None else cast(p) for p in self.parameters]
        return Case(cast(self.y), parameters, cast(self.grad))

    def laid_out(self, layout) -> Case:
        y, grad = (t.contiguous(memory_format=layout) for t in (self.y, self.grad))
        return Case(y, self.parameters, grad)


def draw_case(shape, hidden=2, k=7, biases=True, dtype=torch.float64, seed=0) -> Case:
    """Random arguments, in float64 but exact in dtype, whose maxima are far from ties."""
    n, c, h, w = shape
    for attempt in range(50):
        torch.manual_seed(1000 * seed + attempt)

        def normal(*sizes: int, scale=1.0) -> Tensor:
            return scale * torch.randn(*sizes, dtype=torch.float64)

        parameters = [
            normal(hidden, c, scale=2 / c**0.5),
            normal(hidden).abs() if biases else None,  # hidden units that are alive
            normal(c, hidden, scale=hidden**-0.5),
            normal(c) if biases else None,
            normal(1, 2, k, k, scale=1 / k),
        ]
        case = Case(normal(n, c, h, w), parameters, normal(n, c, h, w))
        case = case.to(dtype).to(torch.float64)
        if far_from_ties(case):
            return case
    raise AssertionError("no draw without near ties")


def far_from_ties(case: Case, gap: float = 3e-5) -> bool:
    """Whether no maximum (over pixels, over channels, or a ReLU's with 0) is nearly a tie."""
    if case.y.shape[0] == 0:
        return True
    _, z, _ = reference.attention_gates(case.y, *case.parameters)
    flat = case.y.flatten(2)
    hidden = [
        torch.nn.functional.linear(v, case.parameters[0], case.parameters[1])
        for v in (flat.mean(2), flat.max(2).values)
    ]
    ok = all(bool(v.abs().min() > gap) for v in hidden)
    for t, dim in ((flat, 2), (z, 1)):
        if t.shape[dim] > 1:
            top = t.topk(2, dim=dim).values.unbind(dim)
            ok = ok and bool((top[0] - top[1]).min() > gap * t.abs().max())
    return ok


def expected(case: Case) -> list[Tensor]:
    """[out, gradients of y and of the parameters that there are] by the specification."""
    y = case.y.detach().requires_grad_()
    parameters = [None if p is None else p.detach().requires_grad_() for p in case.parameters]
    out = reference.dual_attention(y, *parameters)
    leaves = [y, *(p for p in parameters if p is not None)]
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad)]


def forward(attention, case: Case, given_statistics=None, save=True) -> tuple[Tensor, ...]:
    parameters = attention.Parameters(*case.parameters)
    return attention.forward(case.y, parameters, given_statistics, save)


def backward(attention, case: Case, saved, *needs: bool) -> tuple[Tensor, ...]:
    parameters = attention.Parameters(*case.parameters)
    return attention.backward(case.grad, case.y, parameters, attention.Saved(*saved), *needs)


def computed(attention, case: Case, given_statistics=None) -> list[Tensor]:
    """The same by the kernels."""
    out, *saved = forward(attention, case, given_statistics)
    grad_y, *grads = backward(attention, case, saved, True, True)
    present = [g for g, p in zip(grads, case.parameters, strict=True) if p is not None]
    return [out, grad_y, *present]


def tile_statistics(y: Tensor, pixels: int, places: Tensor | None = None) -> Tensor:
    """What a convolution gives with its output: sum, max and its place per ``pixels`` pixels.

    places: (N, C, T), those that torch names unless given.
    """
    parts = y.float().flatten(2).split(pixels, dim=2)
    tops = [part.max(2) for part in parts]
    if places is None:
        places = torch.stack([top.indices + i * pixels for i, top in enumerate(tops)], 2)
    sums = torch.stack([part.sum(2) for part in parts], 2)
    maxima = torch.stack([top.values for top in tops], 2)
    return torch.stack([sums, maxima, places.int().view(torch.float32)], 1)


def eager_errors(case: Case, wanted: list[Tensor]) -> Eager:
    """Those of eager PyTorch, by orders of the same operation."""
    return Eager(errors_of(run, wanted) for run in eager_runs(case))


def eager_runs(case: Case) -> Iterator[list[Tensor]]:
    for layout in LAYOUTS:
        yield expected(case.laid_out(layout))
    back = Case(case.y.flip(0), case.parameters, case.grad.flip(0))
    out, grad_y, *rest = expected(back)
    yield [out.flip(0), grad_y.flip(0), *rest]
    for dims in MIRRORS:
        *mlp, spatial = case.parameters
        mirrored = Case(case.y.flip(dims), [*mlp, spatial.flip(dims)], case.grad.flip(dims))
        out, grad_y, *rest, grad_spatial = expected(mirrored)
        yield [out.flip(dims), grad_y.flip(dims), *rest, grad_spatial.flip(dims)]


def check(
    attention, device: str, dtype: torch.dtype, layout, shape, seed=0, tile=None, draws=3, **options
) -> None:
    """Asserts the rule for the output and all gradients; ``tile``: statistics per so many pixels.

    As check_block in tests/accuracy.py: errors in units in the last place of the largest magnitude,
    the largest over the draws; tensors of few elements together, by the median draw.
    """
    errors = Errors(dtype)
    for draw in range(draws):
        case = draw_case(shape, dtype=dtype, seed=seed + 101 * draw, **options)
        wanted = [t.to(device) for t in expected(case)]
        low = case.to(dtype, device)
        eager = eager_errors(low, wanted)
        low = low.laid_out(layout)
        got = computed(attention, low, None if tile is None else tile_statistics(low.y, tile))
        names = ["out", "y"]
        names += [n for n, p in zip(ATTENTION, case.parameters, strict=True) if p is not None]
        errors.add(names, got, wanted, eager)
    errors.check()


@st.composite
def shapes(draw):
    return {
        "shape": (
            draw(st.integers(1, 2)),
            draw(st.integers(1, 40)),
            draw(st.integers(1, 9)),
            draw(st.integers(1, 12)),
        ),
        "hidden": draw(st.sampled_from([1, 2, 5, 17])),
        "k": draw(st.sampled_from([1, 3, 7, 11])),
        "biases": draw(st.booleans()),
        "tile": draw(st.sampled_from([None, 7, 64, 1000])),
        "seed": draw(st.integers(0, 100)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EXAMPLES
@given(arguments=shapes(), layout=st.sampled_from(LAYOUTS))
def test_random_shapes(attention, device, dtype, arguments, layout):
    check(attention, device, dtype, layout, **arguments)


# Several tiles per image in both directions, every tile of the MLP and several of each.
CONFIGURATIONS = [
    ("tiny", (2, 150, 3, 6), {"hidden": 9}),
    ("small", (1, 40, 9, 10), {"hidden": 3}),
    ("large", (1, 130, 11, 6), {"hidden": 40}),
    ("large, last choice", (1, 130, 11, 6), {"hidden": 40}),
    ("rows", (1, 20, 11, 13), {"hidden": 4}),
    ("short rows", (2, 40, 9, 8), {"hidden": 20}),
    ("channels", (1, 135, 4, 5), {"hidden": 8}),
    ("few channels", (1, 70, 5, 8), {"hidden": 35, "biases": False}),
]


# With given statistics the rest is as without; once per plan, and in the tiles of test_ops.py.
GIVEN = [(*one, 32) for one in CONFIGURATIONS if one[0] in ("small", "rows")]


@pytest.mark.parametrize(
    ("name", "shape", "options", "tile"),
    [*[(*one, None) for one in CONFIGURATIONS], *GIVEN],
    ids=lambda v: str(v),
)
def test_every_configuration(attention, device, force, monkeypatch, name, shape, options, tile):
    if name == "short rows":  # several blocks of parts, and of images, in the sums over them
        monkeypatch.setitem(attention.PARAMETER_BLOCKS, "BLOCK_R", 2)
        monkeypatch.setitem(attention.PARAMETER_BLOCKS, "UNROLL", 1)
    force(name)
    layout = LAYOUTS["channels" in name]
    dtype = DTYPES[len(name) % 3]
    check(attention, device, dtype, layout, shape, tile=tile, draws=2, **options)


def test_the_choice_by_shape(attention):
    """The image plan for small images only; the tile by which axis is the fastest."""
    for c, hw, channels_last, image, name in [
        (512, 16, False, True, "tiny"),
        (64, 64, False, True, "small"),
        (256, 64, True, True, "large"),
        (2048, 49, True, True, "large"),
        (1024, 196, False, False, "short rows"),
        (64, 3136, False, False, "rows"),
        (64, 3136, True, False, "few channels"),
        (512, 784, True, False, "channels"),
    ]:
        tiles = attention.IMAGE_TILES if image else attention.PIXEL_TILES
        assert attention.choose(c, hw, channels_last) == (image, tiles[name])


@pytest.mark.parametrize(
    ("shape", "k", "layout"),
    [
        ((2, 5, 1, 1), 7, LAYOUTS[0]),
        ((2, 6, 3, 4), 21, LAYOUTS[1]),
        ((1, 4, 2, 20), 35, LAYOUTS[0]),
        ((1, 6, 16, 17), 3, LAYOUTS[0]),  # the tiles plan
    ],
    ids=str,
)
def test_spatial_kernels_larger_than_the_map(attention, device, shape, k, layout):
    check(attention, device, torch.float32, layout, shape, k=k)


# --- what is saved ----------------------------------------------------------------------------


def tied_case(shape) -> Case:
    """Few values, so that every maximum is shared, and gates that keep ties ties."""
    torch.manual_seed(3)
    c = shape[1]
    parameters = [
        torch.zeros(2, c),
        torch.ones(2),
        torch.zeros(c, 2),
        torch.zeros(c),
        torch.randn(1, 2, 3, 3),
    ]
    parameters[0][0, :] = 0.25
    return Case(torch.randint(-2, 3, shape).float(), parameters, torch.randn(shape))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tile", [None, 50], ids=["no statistics", "statistics"])
def test_ties_go_to_the_first_element(attention, device, plan, layout, tile):
    """All channel gates are 1/2 exactly, so y's ties are z's; -0.0 ties with 0.0."""
    case = tied_case((2, 34, 9, 10)).to(torch.float32, device).laid_out(layout)
    case.y[:, :, 1] = -case.y[:, :, 1].abs()
    given_statistics = None
    if tile is not None:
        firsts = [
            (part == part.amax(2, keepdim=True)).int().argmax(2) + t * tile
            for t, part in enumerate(case.y.flatten(2).split(tile, dim=2))
        ]
        given_statistics = tile_statistics(case.y, tile, torch.stack(firsts, 2))
    _, mean, max, max_index, _, channel_index = forward(attention, case, given_statistics)
    flat = case.y.flatten(2)
    torch.testing.assert_close(mean, flat.mean(2))
    assert torch.equal(max, flat.amax(2))
    first_pixel = (flat == flat.amax(2, keepdim=True)).int().argmax(2)
    first_channel = (case.y == case.y.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(max_index.long(), first_pixel)
    assert torch.equal(channel_index.long(), first_channel)
    for a, b in zip(computed(attention, case, given_statistics), expected(case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_pass_through(attention, device, plan, value):
    """They appear where PyTorch has them, and in no other image."""
    case = draw_case((2, 20, 9, 10)).to(torch.float32, device)
    case.y[1, 3, 2, 2] = value
    case.y[1, 3, 2, 4] = value
    case.y[1, 5, 2, 2] = value
    out, _, max, max_index, _, channel_index = forward(attention, case)
    top = case.y.flatten(2).max(2)
    assert torch.equal(max.isnan(), top.values.isnan())
    _, z, _ = reference.attention_gates(case.y, *case.parameters)
    for i in (0, 1):  # where a maximum is NaN or infinite its first place counts
        first = z[i].max(0)
        assert torch.equal(channel_index[i].long(), first.indices)
    if not value < 0:
        assert max_index[1, 3] == max_index[1, 5] == 2 * 10 + 2
    wanted = expected(case)
    got = computed(attention, case)
    assert torch.equal(got[0], out) or out.isnan().any()
    for a, b in zip(got[:2], wanted[:2], strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("tile", [None, 64], ids=["no statistics", "statistics"])
def test_without_save_only_the_output_is_written(attention, device, plan, tile):
    case = draw_case((2, 20, 9, 10)).to(torch.bfloat16, device)
    given_statistics = None if tile is None else tile_statistics(case.y, tile)
    out, *_ = forward(attention, case, given_statistics)
    (alone,) = forward(attention, case, given_statistics, save=False)
    assert torch.equal(out, alone)


# --- what is asked for ------------------------------------------------------------------------


def test_only_the_gradients_that_are_needed(attention, device, plan):
    case = draw_case((2, 20, 9, 10), biases=False).to(torch.float32, device)
    _, *saved = forward(attention, case)
    everything = backward(attention, case, saved, True, True)
    assert [g.numel() for g in everything[2:5:2]] == [0, 0]
    for needs in ((True, False), (False, True), (False, False)):
        found = backward(attention, case, saved, *needs)
        for i, (some, full) in enumerate(zip(found, everything, strict=True)):
            if needs[i > 0]:
                assert torch.equal(some, full)
            else:
                assert some.shape == (0,) and some.dtype == full.dtype


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_empty_batch(attention, device, plan, layout):
    case = draw_case((0, 8, 9, 10)).to(torch.bfloat16, device).laid_out(layout)
    out, *grads = computed(attention, case)
    assert out.shape == grads[0].shape == case.y.shape
    for g, p in zip(grads[1:], case.parameters, strict=True):
        assert torch.equal(g, torch.zeros_like(p))


# --- layouts ----------------------------------------------------------------------------------


def strided(t: Tensor, how: str) -> Tensor:
    """The same values with other strides."""
    if how == "slice":
        big = t.new_full([s + 2 for s in t.shape], float("nan"))
        big[tuple(slice(1, s + 1) for s in t.shape)] = t
        return big[tuple(slice(1, s + 1) for s in t.shape)]
    if how == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "images inside":
        return t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return t.contiguous(memory_format=torch.channels_last)


def test_any_strides(attention, device, plan):
    case = draw_case((2, 20, 9, 10)).to(torch.float32, device)
    wanted = computed(attention, case)
    for of_y, of_grad in (
        ("slice", "transposed"),
        ("transposed", "channels_last"),
        ("images inside", "slice"),
        ("channels_last", "images inside"),
    ):
        other = replace(case, y=strided(case.y, of_y), grad=strided(case.grad, of_grad))
        got = computed(attention, other)
        for t in got[:2]:
            assert t.is_contiguous(memory_format=LAYOUTS[of_y == "channels_last"]), of_y
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b), (of_y, of_grad)


def test_a_gradient_without_memory_of_its_own(attention, device):
    """As that of a sum: one element, all strides zero."""
    case = draw_case((2, 9, 5, 6)).to(torch.float32, device)
    one = torch.ones((), device=device)
    plain = computed(attention, replace(case, grad=one.expand(case.y.shape).contiguous()))
    expanded = computed(attention, replace(case, grad=one.expand(case.y.shape)))
    for a, b in zip(plain, expanded, strict=True):
        assert torch.equal(a, b)


def test_parameters_of_any_strides(attention, device):
    """Gradients come back in the strides of the parameters."""
    case = draw_case((3, 10, 5, 4)).to(torch.float32, device)
    wanted = computed(attention, case)
    fc1, b1, fc2, b2, spatial = case.parameters
    other = replace(
        case,
        parameters=[
            fc1.t().contiguous().t(),
            torch.stack([b1, b1 + 1], 1)[:, 0],
            torch.stack([fc2, fc2 + 1], 2)[:, :, 0],
            b2,
            spatial.contiguous(memory_format=torch.channels_last),
        ],
    )
    got = computed(attention, other)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    assert got[2].stride() == other.parameters[0].stride()
    assert got[-1].stride() == other.parameters[4].stride()


# --- the same every time ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bits_do_not_depend_on_the_run_or_on_the_batch(attention, device, plan, layout):
    case = draw_case((2, 20, 9, 10)).to(torch.bfloat16, device).laid_out(layout)
    first, again = computed(attention, case), computed(attention, case)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    alone = computed(attention, Case(case.y[1:], case.parameters, case.grad[1:]))
    for a, b in zip(alone[:2], first[:2], strict=True):
        assert torch.equal(a, b[1:])
