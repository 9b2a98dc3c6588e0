"""Every element is right to the rounding of its own products, whatever else is in its map.

A bound on the largest error, in units of the largest magnitude, says nothing of ordinary values
beside large ones. Here outliers over nine orders of magnitude are planted in x, in the incoming
gradient and in weights, and each element is held to the sum of the magnitudes of the products that
it is made of; where those are all 0, it is 0.
"""

import pytest
import torch

from mfef_ext import _C, functional, reference
from tests.accuracy import check_own_products, make_case, run_block, specification

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SCALES = [1.0, 30.0, 1e3, 1e6, 1e9]


def pixel(t, scale):
    t[:, :, 0, 0] *= scale


def pixel_of_one_channel(t, scale):
    t[:, 1, 3, 2] *= scale


def row(t, scale):
    t[:, :, 0] *= scale


def column(t, scale):
    t[..., t.shape[3] // 2] *= scale


def channel(t, scale):
    t[:, 1] *= scale


def half_of_a_channel(t, scale):
    t[:, 0, t.shape[2] // 2 :] *= scale


def image(t, scale):
    t[t.shape[0] // 2] *= scale


def object_on_nothing(t, scale):
    t[..., 3:] = 0
    t[:, :, 1, 1] *= scale


def rectified(t, scale):
    t.clamp_(min=0)
    t[:, :, -1, -1] *= scale


def sparse(t, scale):
    t[torch.rand_like(t, dtype=torch.float32) < 0.95] = 0
    t[:, :, -1, 0] *= scale


MAPS = [
    pixel,
    pixel_of_one_channel,
    row,
    column,
    channel,
    half_of_a_channel,
    image,
    object_on_nothing,
    rectified,
    sparse,
]


def tap(w, scale):
    w[:, :, 0, 0] *= scale


def output_channel(w, scale):
    w[1] *= scale


def input_channel(w, scale):
    w[:, 1] *= scale


def pair_of_channels(w, scale):
    w[1, 1] *= scale


def one_tap(w, scale):
    w[:, :, 1:] = w[:, :, :, 1:] = 0
    w *= scale


def pruned(w, scale):
    w[torch.rand_like(w, dtype=torch.float32) < 0.5] = 0
    w[:, :, 0, 0] *= scale


WEIGHTS = [tap, output_channel, input_channel, pair_of_channels, one_tap, pruned]


def check_convolution(x, weights, groups, grad, dtype):
    """Output and all gradients of a convolution, element by element."""

    def run(f, to, magnitudes=False, **kw):
        tensors = [t.to(dtype).to(to) for t in (x, *weights, grad)]
        if magnitudes:
            tensors = [t.abs() for t in tensors]
        *leaves, of_out = tensors
        leaves = [t.requires_grad_() for t in leaves]
        out = f(leaves[0], leaves[1:], groups, **kw)
        return [out.detach(), *torch.autograd.grad(out, leaves, of_out)]

    got = run(functional.multi_scale_conv2d, dtype, backend="cpu")
    with specification(dtype, bits=150):  # outliers have 30 each, their product 60
        wanted = run(reference.multi_scale_conv2d, torch.float64)
    own = run(reference.multi_scale_conv2d, torch.float64, magnitudes=True)
    names = ["out", "x", *(f"weights[{i}]" for i in range(len(weights)))]
    check_own_products(names, got, wanted, own)


def drawn(side, images=9):
    torch.manual_seed(side)
    x, grad = (torch.randn(images, 12, side, side).double() for _ in range(2))
    weights = [torch.randn(8, 8, 3, 3).double(), torch.randn(4, 2, 9, 9).double()]
    return x, weights, [1, 2], grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plant", MAPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("side", [7, 8, 14])
def test_large_and_ordinary_pixels(fft, side, plant, dtype):
    scales = SCALES if dtype == torch.float32 and side == 8 else SCALES[2::2]
    for scale in scales:
        x, weights, groups, grad = drawn(side)
        plant(x, scale)
        plant(grad, scale)
        check_convolution(x, weights, groups, grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plant", WEIGHTS, ids=lambda f: f.__name__)
def test_large_and_ordinary_weights(fft, plant, dtype):
    for scale in SCALES if dtype == torch.float32 else SCALES[2::2]:
        x, weights, groups, grad = drawn(8)
        for w in weights:
            plant(w, scale)
        check_convolution(x, weights, groups, grad, dtype)


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e15, 1e25])
def test_squares_that_leave_the_range_of_float32(fft, scale):
    x, weights, groups, grad = drawn(8)
    for t, by in ((x, scale), (grad, 1 / scale)):
        t *= by
        pixel(t, 1e6)
    check_convolution(x, weights, groups, grad, torch.float32)


@pytest.mark.parametrize("maps", ["dense", "rectified", "sparse"])
def test_ffts_serve_ordinary_gradients_of_weights(fft, maps):
    """What is not an outlier is not summed directly, or the guard costs more than it saves."""
    _C.force_cpu_plan("images")
    x, weights, groups, grad = drawn(8, images=16)
    if maps != "dense":
        x = (x - (0.0 if maps == "rectified" else 0.5)).clamp(min=0)
    x, grad, weights = x.float(), grad.float(), [w.float().requires_grad_() for w in weights]
    got = {}
    for convolution in ("fft", "direct"):
        _C.force_cpu_convolution(convolution)
        out = functional.multi_scale_conv2d(x, weights, groups, backend="cpu")
        got[convolution] = torch.autograd.grad(out, weights, grad)
    for a, b in zip(got["fft"], got["direct"], strict=True):
        # Sums in another order: all pairs of channels of the first branch, most of the second.
        changed = (a != b).flatten(2).any(2).float().mean()
        assert changed > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pyramids_add_their_branches(fft, dtype):
    """The gradient of x is added up over branches, each with outputs of its own that are weak."""
    x, _, _, grad = drawn(8)
    weights = [torch.randn(6, 12, 3, 3), torch.randn(6, 6, 9, 9)]
    rectified(x, 1e6)
    rectified(grad, 1e6)

    def run(f, to, magnitudes=False, **kw):
        tensors = [t.to(dtype).to(to) for t in (x, *weights, grad)]
        if magnitudes:
            tensors = [t.abs() for t in tensors]
        *leaves, of_out = tensors
        leaves = [t.requires_grad_() for t in leaves]
        out = f(leaves[0], leaves[1:], [1, 2], split=False, **kw)
        return [out.detach(), *torch.autograd.grad(out, leaves, of_out)]

    with specification(dtype, bits=150):  # outliers have 30 each, their product 60
        wanted = run(reference.multi_scale_conv2d, torch.float64)
    own = run(reference.multi_scale_conv2d, torch.float64, magnitudes=True)
    got = run(functional.multi_scale_conv2d, dtype, backend="cpu")
    check_own_products(["out", "x", "weights[0]", "weights[1]"], got, wanted, own)


@pytest.mark.parametrize("plant", [pixel, row, image, sparse], ids=lambda f: f.__name__)
def test_an_image_among_large_ones_is_as_it_is_alone(fft, plant):
    """To the bit, in one plan: lanes do not mix, and what one falls back to, others do not."""
    _C.force_cpu_plan("images")
    x, weights, groups, _ = drawn(8, images=16)
    x[::2] = x[::2].clone()
    plant(x[::2], 1e6)
    x, weights = x.float(), [w.float() for w in weights]
    together = functional.multi_scale_conv2d(x, weights, groups, backend="cpu")
    for i in (0, 1, 15):
        alone = functional.multi_scale_conv2d(x[i : i + 1], weights, groups, backend="cpu")
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_the_block_pools_what_direct_sums_give(fft, scale):
    """Maxima are not taken with the slack of a map that an outlier fills."""
    case = make_case((9, 16, 8, 8), (3, 9), (1, 2), dtype=torch.float32)
    case.x = case.x.detach().clone()
    case.x[:, :, 0, 0] *= scale
    saved = {}
    for convolution in ("fft", "direct"):
        _C.force_cpu_convolution(convolution)
        low = case.cast(torch.float32)
        saved[convolution] = torch.ops.mfef.mfef_block(
            low.x, low.weights, low.groups, True, *low.attention, True
        )
        assert all(t.isfinite().all() for t in run_block(low, functional.mfef_block, backend="cpu"))
    _C.force_cpu_convolution("fft")
    for at in (2, 3):  # mean and maximum over pixels
        a, b = (saved[convolution][at] for convolution in ("fft", "direct"))
        # A maximum beside large negative values is ordinary itself; a mean is not.
        own = a.abs() if at == 3 else saved["direct"][1].abs().mean((2, 3))
        assert bool(((a - b).abs() <= 1e-4 * own + 1e-5).all())
