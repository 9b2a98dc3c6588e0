"""The weight gradient of large maps on tensor cores: long sums, and TF32."""

from dataclasses import replace

import pytest
import torch

from mfef_ext import _C, functional, reference
from mfef_ext.problem import describe_multi_scale_conv2d
from tests.accuracy import Errors, largest, make_case
from tests.backends.cuda.conftest import ALIGNED, H200, NEAREST, TRUNCATED
from tests.backends.cuda.test_mma import tf32 as to_tf32

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
def test_long_sums_that_tensor_cores_cut(host, adding, shape):
    """A slice of 65,536 products of matrices, added as an A100 does, in one chain wrong by 2.6
    units in float16; and of 8,192, all of whose 2^17 products are cut one by one: 5.7 units."""
    dtype = torch.float16
    errors = Errors(dtype)
    for seed in range(2):
        torch.manual_seed(seed)
        x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
        weight = torch.randn(8, 8, 1, 1).to(dtype)
        wanted = torch.einsum("nchw,ndhw->cd", grad.double(), x.double())[..., None, None]
        host.set(adding=adding, one_slice=True)
        got = weight_gradient(x, grad, weight, 1, "cuda")
        host.set()
        eager = largest(weight_gradient(x, grad, weight, 1, "reference").double() - wanted)
        errors.add(["weight"], [got], [wanted], [eager])
    errors.check()


def rounded(t):
    """What tensor cores take float32 for in TF32."""
    return torch.from_numpy(to_tf32(t.detach().numpy())).contiguous()


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
    namespace = torch.ops.mfef if device == "cuda" else torch.ops.mfef_cuda_host
    errors = Errors(torch.float32)
    for seed in range(3):
        case = make_case(shape, dtype=torch.float32, seed=seed, **options)
        low = replace(case, x=rounded(case.x), grad=rounded(case.grad))
        at = case.cast(torch.float32, device)
        problem = describe_multi_scale_conv2d(at.x, at.weights, at.groups, at.split, None)
        plan = _C.cuda_plan(**problem.sizes(), tf32=True, shared_limit=H200)
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
def test_long_sums_in_tf32(host, adding):
    """32,768 products of matrices in a slice."""
    dtype = torch.float32
    torch.manual_seed(0)
    x, grad = (rounded(t) for t in torch.randn(2, 1, 8, 512, 512))
    weight = torch.randn(8, 8, 1, 1)
    wanted = torch.einsum("nchw,ndhw->cd", grad.double(), x.double())[..., None, None]
    host.set(adding=adding, one_slice=True)
    _, (got,), _ = torch.ops.mfef_cuda_host.multi_scale_conv2d_backward(
        grad, x, [weight], [1], True, None, False, True, True
    )
    host.set()
    eager = largest(weight_gradient(x, grad, weight, 1, "reference").double() - wanted)
    errors = Errors(dtype)
    errors.add(["weight"], [got], [wanted], [eager])
    errors.check()
