"""The weight gradient of large maps on tensor cores: long sums."""

import pytest
import torch

from mfef_ext import functional
from tests.accuracy import Errors, largest
from tests.backends.cuda.conftest import ALIGNED, TRUNCATED


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
