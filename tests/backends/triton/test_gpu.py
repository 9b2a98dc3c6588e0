"""Of Triton on a GPU what ../test_gpu.py has not: numbers, tuning, losses.

Where a body means something without a GPU it also runs on CPU tensors, interpreted, smaller.
"""

import pytest
import torch

import mfef_ext
from mfef_ext import functional
from tests.accuracy import check_block
from tests.backends.test_gpu import (
    GPU,
    LAYOUTS,
    Place,
    block_on,
    gradients,
    needs,
    same_bits,
)

# --- numbers ----------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("split", [True, False], ids=["split", "pyramid"])
def test_block_obeys_the_rule(dtype, layout, split, monkeypatch):
    """On small odd maps; without a GPU test_ops.py, test_conv.py and test_attention.py do that."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check_block(
        dtype, layout, backend="triton", device="cuda",
        shape=(2, 12, 4, 5), kernel_sizes=(3, 5), split=split, biases=split,
    )  # fmt: skip


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(8, 64, 8, 8), (2, 64, 33, 31)], ids=str)
def test_blocks_of_the_paper_and_large_maps(dtype, layout, shape, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check_block(dtype, layout, backend="triton", device="cuda", shape=shape)


# --- tuning -----------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("shape", [(4, 8, 5, 4), (128, 64, 8, 8), (4, 64, 33, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_call_that_tunes_has_the_bits_of_those_after(shape, dtype):
    """Out of deterministic mode, with real timings; a smaller batch of the class, too, runs what
    was chosen."""
    torch.use_deterministic_algorithms(False)
    block = block_on(Place("triton", "cuda"), dtype, shape[1])
    x = torch.randn(shape, device="cuda", dtype=dtype)
    first = gradients(block, x)
    for _ in range(3):
        same_bits(first, gradients(block, x))
    assert "microseconds at its first call" in mfef_ext.explain(x, block)
    assert "microseconds at its first call" in mfef_ext.explain(x[1:], block)


# --- losses -----------------------------------------------------------------------------------


def logits_on(device):
    """Three students' and their targets', several tiles of each."""
    torch.manual_seed(0)
    return [torch.randn(40, 100).to(device) for _ in range(6)]


def losses(logits):
    """[losses, gradients of the logits] of a step; targets have gradients too."""
    leaves = [x.detach().requires_grad_() for x in logits]
    found = torch.stack(
        functional.kd_losses(leaves[:3], leaves[3:], backend="triton", detach_target=False)
    )
    weights = torch.tensor([1.0, 2.0, 3.0], device=found.device)
    return [found.detach(), *torch.autograd.grad(found @ weights, leaves)]


@GPU
def test_losses_on_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    first = losses(logits_on("cuda:0"))
    with torch.cuda.device(0):
        second = losses(logits_on("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


@GPU
def test_losses_on_a_non_default_stream():
    logits = logits_on("cuda")
    wanted = losses(logits)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(x) for x in logits]
        torch.cuda._sleep(100_000_000)
        for x, y in zip(late, logits, strict=True):
            x.copy_(y)
        got = losses(late)
    stream.synchronize()
    same_bits(wanted, got)


@GPU
def test_losses_in_a_cuda_graph():
    logits = logits_on("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        losses(logits)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = losses(logits)
    for _ in range(3):
        for x in logits:
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        same_bits(losses(logits), captured)


# Where a tile has no class, the interpreter subtracts infinities, whose difference is masked.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_many_logits(device, untuned):
    """Gradients of the last images of more than 2^31 logits; their number is a power of two, so
    that the mean over another batch scales exactly."""
    images, few, classes = 8, 4, 1025
    if device == "cuda":
        images = 2**21
        needs(24)

    def gradient(student, target):
        student = student.detach().requires_grad_()
        loss = functional.kd_loss(student, target, backend="triton")
        return torch.autograd.grad(loss, student)[0]

    like = {"device": device, "dtype": torch.bfloat16}
    student, target = (torch.zeros(images, classes, **like) for _ in range(2))
    for logits in (student, target):
        logits[-few:].normal_()
    assert device == "cpu" or student.numel() > 2**31
    many = gradient(student, target)[-few:]
    alone = gradient(student[-few:].clone(), target[-few:].clone())
    same_bits([many * (images // few)], [alone])
