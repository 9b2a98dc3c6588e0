"""Determinism, empty batches, tiny and huge maps, ties, NaN and infinity."""

import ctypes
import dataclasses
import gc
import mmap

import pytest
import torch
from torch.nn.utils import parametrize

from mfef_ext import _C, functional, reference
from mfef_ext.modules import MFEFBlock
from tests.accuracy import make_case, run_block

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 24, 8, 8), (3, 24, 19, 21)])
def test_bit_identical_over_repeats_and_threads(engine, threads, dtype, shape):
    case = make_case(shape, dtype=dtype).cast(dtype)
    runs = []
    for count in (1, 2, 3, 1, 2):
        threads(count)
        runs.append(run_block(case, functional.mfef_block, backend="cpu"))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 32, 23, 20), (5, 32, 20, 23), (40, 64, 8, 8), (1, 64, 17, 2)]
)
def test_fewer_units_than_threads(engine, threads, shape, layout):
    """Branches of a unit run apart from each other there, with the same result to the bit."""
    case = make_case(shape, kernel_sizes=(3, 5, 7, 9), dtype=torch.float32).cast(torch.float32)
    bias = torch.randn(shape[1])
    grad = torch.randn(shape).contiguous(memory_format=layout)
    x = case.x.detach().contiguous(memory_format=layout)
    weights = [w.detach() for w in case.weights]
    runs = []
    for count in (1, 2, 3, 4, 16):
        threads(count)
        out = run_block(case, functional.mfef_block, layout, backend="cpu")
        out.append(functional.multi_scale_conv2d(x, weights, case.groups, bias=bias, backend="cpu"))
        for need_x, need_parameters in ((True, True), (True, False), (False, True)):
            grad_x, grads, grad_bias = torch.ops.mfef.multi_scale_conv2d_backward(
                grad, x, weights, case.groups, True, bias, need_x, need_parameters
            )
            out += [grad_x, *grads, grad_bias]
        runs.append(out)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(18, 16, 8, 8), (18, 16, 2, 2), (3, 16, 3, 5)])
def test_weights_of_any_strides(engine, dtype, shape):
    """Read and their gradients written where they are, whatever the order of their dimensions."""
    case = make_case(shape, kernel_sizes=(3, 9), groups=(1, 2), dtype=dtype).cast(dtype)
    wanted = run_block(case, functional.mfef_block, backend="cpu")

    def gaps(w):
        return torch.stack([w, w + 1], dim=-1)[..., 0]

    orders = {
        "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
        "in before out": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
        "gaps": gaps,
    }
    for name, order in orders.items():
        weights = [order(w.detach()).requires_grad_() for w in case.weights]
        attention = [
            p if p is None or p.dim() != 4 else order(p.detach()).requires_grad_()
            for p in case.attention
        ]
        assert not weights[0].is_contiguous(), name
        other = dataclasses.replace(case, weights=weights, attention=attention)
        for a, b in zip(
            wanted, run_block(other, functional.mfef_block, backend="cpu"), strict=True
        ):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_image_does_not_depend_on_its_neighbours(engine, dtype):
    case = make_case((19, 16, 8, 8), dtype=dtype).cast(dtype)
    arguments = (case.weights, case.groups, *case.attention)
    whole = functional.mfef_block(case.x, *arguments, backend="cpu")
    for image in (0, 7, 16, 18):
        alone = functional.mfef_block(case.x[image : image + 1], *arguments, backend="cpu")
        assert torch.equal(alone[0], whole[image])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_empty_batch(engine, dtype, layout):
    block = MFEFBlock(8, kernel_sizes=(3, 5), groups="auto", backend="cpu", dtype=dtype)
    x = torch.randn(0, 8, 5, 4, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    out = block(x)
    assert out.shape == (0, 8, 5, 4)
    out.sum().backward()
    assert x.grad.shape == x.shape
    for p in block.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))


def test_empty_batch_of_the_halves(engine):
    weights = [torch.randn(4, 4, 3, 3, requires_grad=True)]
    bias = torch.randn(4, requires_grad=True)
    out = functional.multi_scale_conv2d(
        torch.randn(0, 4, 5, 5), weights, [1], bias=bias, backend="cpu"
    )
    out.sum().backward()
    assert torch.equal(weights[0].grad, torch.zeros_like(weights[0]))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_parameters_are_those_that_the_layer_has_now():
    """Computed by torch.nn.utils.parametrize, registered again, replaced."""
    block = MFEFBlock(8, kernel_sizes=(3, 5), groups="auto", backend="cpu")
    x = torch.randn(2, 8, 5, 4)
    before = block(x)
    places = ((block.attention, "fc2_bias"), (block.conv.branches[0], "weight"))
    for layer, name in places:
        parametrize.register_parametrization(layer, name, Doubled())
    doubled = block(x)
    assert not torch.equal(doubled, before)
    for layer, name in places:
        parametrize.remove_parametrizations(layer, name)
    # The parameters stand in another order now.
    torch.testing.assert_close(block(x), doubled, rtol=1e-4, atol=1e-6)
    for p in (block.attention.fc2_bias, block.conv.weights[0]):
        p.data /= 2
    assert torch.equal(block(x), before)
    block.conv.branches[0].weight = torch.nn.Parameter(torch.zeros(4, 4, 3, 3))
    assert not torch.equal(block(x), before)


class Doubled(torch.nn.Module):
    def forward(self, t):
        return 2 * t


def tied_case(dtype):
    """A map of few values, so that every maximum is shared; gates that keep ties ties."""
    torch.manual_seed(3)
    y = torch.randint(-2, 3, (18, 6, 4, 5)).to(dtype).requires_grad_()
    parameters = [
        torch.zeros(2, 6, dtype=dtype),
        torch.ones(2, dtype=dtype),
        torch.zeros(6, 2, dtype=dtype),
        torch.zeros(6, dtype=dtype),
        torch.randn(1, 2, 3, 3, dtype=torch.float64).to(dtype),
    ]
    # Gradients of the pooled maxima reach y only where fc1 is not zero.
    parameters[0][0, :] = 0.25
    parameters[2][:, 0] = 0.0
    return y, [p.requires_grad_() for p in parameters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_go_to_the_first_element(engine, dtype):
    """All gates are 1/2 exactly, so y's ties are z's: the first pixel, the lowest channel."""
    y, parameters = tied_case(dtype)
    grad = torch.randn(y.shape, dtype=dtype)

    def run(f, **kw):
        out = f(y, *parameters, **kw)
        return torch.autograd.grad(out, [y, *parameters], grad)

    for a, b in zip(
        run(functional.dual_attention, backend="cpu"),
        run(reference.dual_attention),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_saved_indices_are_the_first_of_their_ties(engine):
    y, parameters = tied_case(torch.float32)
    _, _, _, max_index, _, channel_index = torch.ops.mfef.dual_attention(y, *parameters, True)
    flat = y.detach().flatten(2)
    first_pixel = (flat == flat.amax(2, keepdim=True)).int().argmax(2)
    first_channel = (y == y.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(max_index.long(), first_pixel)
    assert torch.equal(channel_index.long(), first_channel)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_pass_through(engine, dtype, value):
    """They appear where PyTorch has them, and in no other image."""
    case = make_case((18, 12, 6, 6), kernel_sizes=(3, 5), dtype=dtype).cast(dtype)
    x = case.x.detach().clone()
    x[5, 3, 2, 2] = value
    arguments = (case.weights, case.groups, *case.attention)
    got = functional.mfef_block(x, *arguments, backend="cpu")
    wanted = reference.mfef_block(x.float(), *(_floats(a) for a in arguments))
    assert torch.equal(got.isnan(), wanted.isnan())
    clean = functional.mfef_block(case.x, *arguments, backend="cpu")
    others = [i for i in range(18) if i != 5]
    assert torch.equal(got[others], clean[others])


def _floats(a):
    if isinstance(a, list):
        return [_floats(v) for v in a]
    return a.detach().float() if torch.is_tensor(a) else a


def test_nan_of_a_parameter_reaches_the_gradients(engine):
    case = make_case((5, 8, 4, 4), kernel_sizes=(3, 5), dtype=torch.float32).cast(torch.float32)
    with torch.no_grad():
        case.weights[0][0, 0, 1, 1] = float("nan")
    got = run_block(case, functional.mfef_block, backend="cpu")
    wanted = run_block(case, reference.mfef_block)
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g.isnan().any(), w.isnan().any())


def test_extreme_logits_saturate(engine):
    """Gates of huge logits are 0 and 1, without overflow in the exponential."""
    y = torch.randn(3, 4, 3, 3)
    for scale in (1e4, -1e4, 1e30, -1e30):
        parameters = [
            torch.zeros(1, 4),
            torch.ones(1),
            torch.full((4, 1), scale),
            torch.zeros(4),
            torch.zeros(1, 2, 3, 3),
        ]
        got = functional.dual_attention(y, *parameters, backend="cpu")
        torch.testing.assert_close(got, reference.dual_attention(y, *parameters))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(18, 64, 8, 8), (3, 24, 19, 21), (9, 24, 7, 7)])
def test_inference_gives_the_bits_of_training(engine, dtype, shape):
    """Though it keeps no places of maxima: ties, zeros of either sign, NaN and infinity too."""
    case = make_case(shape, dtype=dtype).cast(dtype)
    plain = case.x.detach().clone()
    odd = plain.round()
    odd[0] = -0.0
    odd[1, :, 1::2] = torch.inf
    odd[2, 3, 2, 2] = torch.nan
    for x in (plain, odd):
        x.requires_grad_()
        arguments = (case.weights, case.groups, *case.attention)
        trained = functional.mfef_block(x, *arguments, backend="cpu")
        with torch.no_grad():
            used = functional.mfef_block(x, *arguments, backend="cpu")
        assert trained.requires_grad and not used.requires_grad
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[used.element_size()]
        assert torch.equal(trained.detach().view(integers), used.view(integers))


@pytest.fixture
def kept_memory():
    """What is freed stays with this process: several GB of fresh pages take a minute."""
    libc = ctypes.CDLL(None)
    trim, mappings = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    assert libc.mallopt(mappings, 0) and libc.mallopt(trim, -1)
    yield
    assert libc.mallopt(mappings, 65536) and libc.mallopt(trim, 2**17)
    gc.collect()
    libc.malloc_trim(0)


@pytest.mark.slow
def test_more_than_2_31_elements(plan, much_memory, kept_memory):
    """Offsets are 64 bits wide: the last images of 2^31 + elements come out right."""
    channels, height, width = 64, 8, 8
    image = channels * height * width
    n = 2**31 // image + 40
    torch.manual_seed(0)
    weights = [torch.randn(channels, 1, 1, 1, dtype=torch.bfloat16)]
    last = torch.randn(20, channels, height, width, dtype=torch.bfloat16)

    # An input of 20 images far from each other, in memory that is reserved and hardly touched.
    reserved = mmap.mmap(-1, 2 * (2**31 + 19 + image))
    apart = torch.frombuffer(reserved, dtype=torch.bfloat16).as_strided(
        last.shape, (-(-(2**31) // 19), height * width, width, 1)
    )
    apart.copy_(last)
    assert 19 * apart.stride(0) >= 2**31

    def backward(grad):
        arguments = (weights, [channels], True, None, True, False)
        return torch.ops.mfef.multi_scale_conv2d_backward(grad, grad, *arguments)[0]

    def forward(x):
        return functional.multi_scale_conv2d(x, weights, [channels], backend="cpu")

    wanted = reference.multi_scale_conv2d(last, weights, [channels])
    for f in (forward, backward):
        expected = f(last)
        torch.testing.assert_close(expected, wanted, rtol=2e-2, atol=2e-2)
        assert torch.equal(f(apart), expected)
        # An output of n images, all of one that has no memory of its own.
        out = f(last[:1].expand(n, -1, -1, -1))
        assert out.numel() > 2**31 and out.is_contiguous()
        for i in (0, 1, n // 2, n - 18, n - 1):
            assert torch.equal(out[i], expected[0]), i
        del out


def test_forcing_what_is_not_there_says_what_is():
    with pytest.raises(ValueError, match=r"avx1024.*this processor runs"):
        _C.force_cpu_isa("avx1024")
    with pytest.raises(ValueError, match="'images', 'pixels'"):
        _C.force_cpu_plan("rows")
