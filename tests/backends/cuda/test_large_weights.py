"""The weight gradient of large maps on tensor cores: long sums, pieces in turn, and TF32."""

import itertools
from dataclasses import replace

import pytest
import torch

from mfef_ext import _C, functional, reference
from mfef_ext.problem import describe_multi_scale_conv2d
from tests.accuracy import Errors, largest, make_case
from tests.backends.cuda.test_plan import problem
from tests.backends.cuda.tf32 import rounded
from tests.ptx.cuda import ALIGNED, H200, NEAREST, TRUNCATED

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def weight_gradient(x, grad, weight, groups, backend):
    leaf = weight.detach().requires_grad_()
    out = functional.multi_scale_conv2d(x, [leaf], [groups], backend=backend)
    return torch.autograd.grad(out, leaf, grad)[0]


@pytest.mark.parametrize(
    ("adding", "shape"),
    [(ALIGNED, (1, 8, 1024, 1024)), (TRUNCATED, (2, 8, 256, 256))],
    ids=["aligned", "truncated"],
)
def test_long_sums_that_tensor_cores_cut(machine, adding, shape):
    """A slice of 65,536 products of matrices, added as an A100 does, in one chain wrong by 2.6
    units in float16; and of 8,192, all of whose 2^17 products are cut one by one: 5.7 units."""
    dtype = torch.float16
    errors = Errors(dtype)
    for seed in range(2):
        torch.manual_seed(seed)
        x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
        weight = torch.randn(8, 8, 1, 1).to(dtype)
        wanted = torch.einsum("nchw,ndhw->cd", grad.double(), x.double())[..., None, None]
        machine.set(adding=adding, one_slice=True)
        got = weight_gradient(x, grad, weight, 1, "cuda")
        machine.set()
        eager = largest(weight_gradient(x, grad, weight, 1, "reference").double() - wanted)
        errors.add(["weight"], [got], [wanted], [eager])
    errors.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "groups", "buffers"),
    [((40, 8, 4, 24), 1, 1), ((3, 32, 24, 40), 1, 2), ((3, 64, 24, 40), 8, 2)],
    ids=["one", "two", "two of pairs of taps"],
)
def test_pieces_in_turn(machine, dtype, shape, groups, buffers):
    """A slice of all pieces, loaded and multiplied in turn or at once: integers, whose sums are
    exact, from both layouts, one of which is copied in the background, in either order of
    threads."""
    torch.manual_seed(0)
    x, grad = torch.randint(-2, 3, (2, *shape)).to(dtype)
    weight = torch.zeros(shape[1], shape[1] // groups, 3, 3, dtype=dtype)
    leaf = weight.double().requires_grad_()
    out = reference.multi_scale_conv2d(x.double(), [leaf], [groups])
    wanted = torch.autograd.grad(out, leaf, grad.double())[0].to(dtype)
    described = describe_multi_scale_conv2d(x, [weight], [groups], True, None)
    plan = _C.cuda_plan(described.sizes(), tf32=True, shared_limit=H200)
    assert plan["weight_gradient_buffers"] == buffers
    for layout, backwards in itertools.product(LAYOUTS, (False, True)):
        machine.set(backwards=backwards, one_slice=True)
        maps = (t.contiguous(memory_format=layout) for t in (grad, x))
        _, (got,), _ = torch.ops.mfef_ptx.multi_scale_conv2d_backward(
            *maps, [weight], [groups], True, None, False, True, True
        )
        assert torch.equal(got, wanted)


def test_pieces_of_wide_kernels(machine):
    """No piece of 45 x 45 taps leaves room for two other thread blocks: the smallest, one at a
    time, takes what it needs."""
    torch.manual_seed(0)
    x, grad = torch.randint(-2, 3, (2, 1, 8, 20, 40)).float()
    weight, groups = torch.zeros(8, 8, 45, 45), [1]
    leaf = weight.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.multi_scale_conv2d(x, [leaf], groups), leaf, grad)
    described = describe_multi_scale_conv2d(x, [weight], groups, True, None)
    plan = _C.cuda_plan(described.sizes(), tf32=True, shared_limit=H200)
    assert plan["weight_gradient_buffers"] == 1
    assert 74 * 1024 < plan["weight_gradient_shared_bytes"] < 80 * 1024
    _, (got,), _ = torch.ops.mfef_ptx.multi_scale_conv2d_backward(
        grad, x, [weight], groups, True, None, False, True, True
    )
    assert torch.equal(got, wanted)
    small = _C.cuda_plan(described.sizes(), tf32=True, shared_limit=74 * 1024)
    assert "the weight gradient takes 80 KiB" in small["reason"]


@pytest.mark.parametrize("shape", [(32, 64, 56), (32, 128, 28), (32, 256, 14), (32, 512, 7)])
@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_imagenets_pieces_are_loaded_in_the_background(shape, allow, dtype):
    """With every branch's share of shared memory, where tensor cores have a branch at all."""
    sizes = problem(*shape, dtype=dtype).sizes()
    plan = _C.cuda_plan(sizes, tf32=allow, shared_limit=H200)
    on_tensor_cores = allow or dtype != torch.float32
    assert plan["weight_gradient_buffers"] == 2 * on_tensor_cores
    assert bool(plan["weight_gradient_tensor_core_branches"]) == on_tensor_cores
    assert 0 < plan["weight_gradient_shared_bytes"] <= 74 * 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layouts_give_the_blocks_weights_the_same_bits(device, dtype):
    """The attention leaves the gradient of y in float32, in the layout of y: copied from one and
    gathered from the other, it is rounded once."""
    case = make_case((2, 64, 11, 20), dtype=dtype, kernel_sizes=(3, 5), groups=(1, 2))
    low = case.cast(dtype, device)
    found = []
    for layout in LAYOUTS:
        x, grad = (t.detach().contiguous(memory_format=layout) for t in (low.x, low.grad))
        out = functional.mfef_block(x, low.weights, low.groups, *low.attention, backend="cuda")
        found.append(torch.autograd.grad(out, low.weights, grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def weight_gradients(f, case, dtype, layout=torch.contiguous_format):
    """By a function of the reference, in ``dtype``."""
    at = case.cast(dtype)
    out = f(at.x.contiguous(memory_format=layout), at.weights, at.groups, at.split)
    return torch.autograd.grad(out, at.weights, case.grad.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("shape", "options", "branches"),
    [
        # Several images and pieces, whole and partial spans.
        ((2, 32, 21, 40), {"kernel_sizes": (3, 5), "groups": (1, 1)}, [0, 1]),
        # Groups that fill no chunk of 8 channels; one not on tensor cores.
        ((1, 78, 9, 18), {"kernel_sizes": (3, 5, 1), "groups": (1, 2, 13)}, [0, 1]),
        # One slot in several tiles; branches that see the same channels.
        ((2, 16, 10, 17), {"kernel_sizes": (7, 9), "groups": (1, 1), "split": False}, [0, 1]),
    ],
    ids=str,
)
def test_tf32(device, layout, shape, options, branches):
    """Sums in float32 of products of rounded operands, no worse than eager's of the same; where
    tensor cores have no part, of operands as they are."""
    namespace = torch.ops.mfef if device == "cuda" else torch.ops.mfef_ptx
    errors = Errors(torch.float32)
    for seed in range(3):
        case = make_case(shape, dtype=torch.float32, seed=seed, **options)
        low = replace(case, x=rounded(case.x), grad=rounded(case.grad))
        at = case.cast(torch.float32, device)
        described = describe_multi_scale_conv2d(at.x, at.weights, at.groups, at.split, None)
        plan = _C.cuda_plan(described.sizes(), tf32=True, shared_limit=H200)
        assert plan["plan"] == "large-map"
        assert plan["weight_gradient_tensor_core_branches"] == branches
        x, grad = (t.detach().contiguous(memory_format=layout) for t in (at.x, at.grad))
        weights = [w.detach() for w in at.weights]
        _, got, _ = namespace.multi_scale_conv2d_backward(
            grad, x, weights, at.groups, at.split, None, False, True, True
        )
        for b, ours in enumerate(got):
            of = low if b in branches else case
            wanted = weight_gradients(reference.multi_scale_conv2d, of, torch.float64)[b]
            eager = max(
                largest(e[b].double() - wanted)
                for one in LAYOUTS
                for e in [weight_gradients(reference.multi_scale_conv2d, of, torch.float32, one)]
            )
            errors.add([f"weights[{b}]"], [ours.cpu()], [wanted], [eager])
    errors.check()


@pytest.mark.parametrize("adding", [NEAREST, ALIGNED, TRUNCATED])
def test_long_sums_in_tf32(machine, adding):
    """32,768 products of matrices in a slice. To the nearest the sums are as good as float32's of
    rounded operands; where tensor cores cut them, the rule has the error of eager PyTorch in TF32,
    of which there is at least that of rounding the operands. One long chain has three times that.
    """
    dtype = torch.float32
    torch.manual_seed(0)
    x, grad = torch.randn(2, 1, 8, 512, 512)
    if adding == NEAREST:
        x, grad = rounded(x), rounded(grad)
    weight = torch.randn(8, 8, 1, 1)

    def exact(x, grad):
        return torch.einsum("nchw,ndhw->cd", grad.double(), x.double())[..., None, None]

    wanted = exact(x, grad)
    machine.set(adding=adding, one_slice=True)
    _, (got,), _ = torch.ops.mfef_ptx.multi_scale_conv2d_backward(
        grad, x, [weight], [1], True, None, False, True, True
    )
    machine.set()
    if adding == NEAREST:
        eager = weight_gradient(x, grad, weight, 1, "reference").double()
    else:
        eager = exact(rounded(x), rounded(grad))
    errors = Errors(dtype)
    errors.add(["weight"], [got], [wanted], [largest(eager - wanted)])
    errors.check()
