"""Launches, with a driver that only writes them down: what is remembered, and for which tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
PRELUDE = """
import sys
import torch
sys.path.insert(0, "benchmarks")
import bench_host
from mfef_ext import MFEFBlock
import triton

launched, bound = [], []

class Launcher:
    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        assert min(x, y, z) > 0
        launched.append((self.name, x, stream))

class Driver(bench_host._Driver):
    launcher_cls = Launcher
    device = stream = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream

bench_host._pretend()
driver = Driver()
triton.runtime.driver.set_active(driver)
from mfef_ext.backends.triton import attention, conv, launch

jit_run = triton.JITFunction.run

def run(self, *arguments, **options):
    assert options["enable_fp_fusion"] is True
    bound.append(self.__name__)
    return jit_run(self, *arguments, **options)

triton.JITFunction.run = run

def names():
    found = [name for name, *_ in launched]
    launched.clear()
    return found

def again():
    found = list(bound)
    bound.clear()
    return found

block = MFEFBlock(8, kernel_sizes=(3,), groups=[1], backend="triton")
IMAGE = ["_convolve", "image_forward_kernel"]
"""


def run(code):
    """In a process of its own, in which kernels are compiled, for sm_90, and not interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PRELUDE + code]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_what_is_remembered():
    """Bound once per problem; odd addresses, other dtypes and other devices are other code."""
    run(
        """
x = torch.randn(2, 8, 4, 4)
with torch.no_grad():
    block(x)
    assert names() == again() == IMAGE
    driver.stream = 7
    block(x.clone())  # another tensor, another stream
    assert launched == [("_convolve", 1, 7), ("image_forward_kernel", 2, 7)], launched
    assert names() == IMAGE and again() == []

    odd = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert not launch.aligned(x.dtype, odd) and launch.aligned(x.dtype, x, None)
    for _ in range(2):  # the convolution reads it, and is bound anew each time
        block(odd)
        assert names() == IMAGE and again() == ["_convolve"]
    block(x)
    assert names() == IMAGE and again() == []

    block.bfloat16()(x.bfloat16())
    assert names() == again() == IMAGE
    block.float()(x)
    assert names() == IMAGE and again() == []

    weights = conv.Weights(list(block.conv.weights), list(block.conv.groups), True)
    y, _ = conv.forward(x, weights, None, False, False)
    assert names() == again() == ["_convolve"]  # no statistics
    assert not launch.aligned(torch.float64, x.double(), *weights.tensors)

    # The same shapes on another device have their own code, which is loaded there.
    layout = x.shape, x.stride()
    rest = (x.dtype, weights.branches(), False, False, True, "ieee", True, True)
    calls = [conv._convolution(layout, layout, torch.device("cuda", i), *rest) for i in (0, 1, 0)]
    assert calls[0] is calls[2] and calls[0].launch is not calls[1].launch
"""
    )


@pytest.mark.slow
def test_backward_and_large_maps():
    run(
        """
IMAGE_BACKWARD = ["image_backward_kernel", "parameter_gradient_kernel"]
PIXELS = ["_convolve", "gate_kernel", "pool_kernel", "output_kernel"]
PIXELS_BACKWARD = [
    "gate_kernel", "pool_backward_kernel", "spatial_backward_kernel", "input_gradient_kernel",
    "parameter_gradient_kernel",
]
CONV_BACKWARD = ["_convolve", "_weight_partials", "_weight_sums"]
for side, forward, backward in ((4, IMAGE, IMAGE_BACKWARD), (40, PIXELS, PIXELS_BACKWARD)):
    for first in (True, False):
        x = torch.randn(2, 8, side, side, requires_grad=True)
        out = block(x)
        assert names() == forward and again() == (forward if first else [])
        out.sum().backward()  # of an expanded gradient
        assert names() == backward + CONV_BACKWARD
        assert again() == (backward + CONV_BACKWARD if first else [])
empty = block(torch.randn(0, 8, 4, 4, requires_grad=True))
assert names() == []
empty.sum().backward()
assert names() == ["parameter_gradient_kernel", "_weight_sums"]
"""
    )
