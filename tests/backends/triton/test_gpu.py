"""The block as a GPU is used: streams, graphs, compilers, several devices, large tensors.

Where a body means something without a GPU it also runs on CPU tensors, interpreted, smaller.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mfef_ext
from mfef_ext import functional
from mfef_ext.modules import MFEFBlock
from tests.accuracy import check_block

CUDA = torch.cuda.is_available()
GPU = pytest.mark.gpu
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(
    params=[
        pytest.param(
            "cpu", marks=pytest.mark.skipif(CUDA, reason="Triton is not interpreted beside a GPU")
        ),
        pytest.param("cuda", marks=GPU),
    ]
)
def device(request):
    return request.param


def block_on(device, dtype=torch.float32, channels=8):
    torch.manual_seed(0)
    sizes = {"kernel_sizes": (3, 5), "groups": "auto", "backend": "triton"}
    return MFEFBlock(channels, **sizes).to(device, dtype)


def gradients(block, x, grad=None):
    """[out, gradient of x, gradients of the parameters]."""
    x = x.detach().requires_grad_()
    out = block(x)
    if grad is None:
        grad = torch.linspace(-1, 1, out.numel(), device=x.device).view_as(out)
    grads = torch.autograd.grad(out, [x, *block.parameters()], grad.to(out.dtype))
    return [out.detach(), *grads]


def same_bits(some, others):
    for a, b in zip(some, others, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


# Maps of both plans, of odd sizes.
SHAPES = [(3, 8, 5, 4), (2, 8, 17, 19)]


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_repeats_are_bit_identical(device, shape, layout):
    if device == "cpu" and shape == SHAPES[1]:
        pytest.skip("minutes in the interpreter; test_attention.py repeats that plan")
    block = block_on(device)
    x = torch.randn(shape, device=device).contiguous(memory_format=layout)
    first = gradients(block, x)
    assert first[0].is_contiguous(memory_format=layout)
    for _ in range(20 if device == "cuda" else 1):
        same_bits(first, gradients(block, x))


def test_autocast(device):
    """float32 in and out of the gradients, and in between the bits of bfloat16."""
    block, low = block_on(device), block_on(device, torch.bfloat16)
    x = torch.randn(SHAPES[0], device=device)
    with torch.autocast(device, torch.bfloat16):
        out, *grads = gradients(block, x)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in grads)
    wanted, *low_grads = gradients(low, x.bfloat16())
    same_bits([out, *grads], [wanted, *(g.float() for g in low_grads)])


# --- where it runs ----------------------------------------------------------------------------


@GPU
def test_second_device():
    """Tensors on the second device while the first is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    block, x = block_on("cuda:0"), torch.randn(SHAPES[1])
    first = gradients(block, x.to("cuda:0"))
    with torch.cuda.device(0):
        second = gradients(block_on("cuda:1"), x.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        same_bits(first, second)


@GPU
def test_non_default_stream():
    """All kernels wait for what the stream did before; on another they would read too early."""
    block, x = block_on("cuda"), torch.randn(64, 8, 17, 19, device="cuda")
    grad = torch.randn_like(x)
    wanted = gradients(block, x, grad)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        got = gradients(block, late, grad)
    stream.synchronize()
    same_bits(wanted, got)


@GPU
def test_threads():
    """One block, and plans made for the first time, from several threads."""
    block = block_on("cuda")
    xs = [torch.randn(n, 8, 6, 7, device="cuda") for n in (1, 2, 3, 4)] * 4
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: gradients(block, x), xs))
    torch.cuda.synchronize()
    for x, got in zip(xs, together, strict=True):
        same_bits(gradients(block, x), got)


# --- tuning -----------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("shape", [(4, 8, 5, 4), (128, 64, 8, 8), (4, 64, 33, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_call_that_tunes_has_the_bits_of_those_after(shape, dtype):
    """Out of deterministic mode, with real timings; a smaller batch of the class, too, runs what
    was chosen."""
    torch.use_deterministic_algorithms(False)
    block = block_on("cuda", dtype, shape[1])
    x = torch.randn(shape, device="cuda", dtype=dtype)
    first = gradients(block, x)
    for _ in range(3):
        same_bits(first, gradients(block, x))
    assert "microseconds at its first call" in mfef_ext.explain(x, block)
    assert "microseconds at its first call" in mfef_ext.explain(x[1:], block)


# --- graphs and compilers ---------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cuda_graph(shape, layout):
    """Forward and backward are captured, and replayed for other values."""
    block = block_on("cuda")
    x = torch.randn(shape, device="cuda").contiguous(memory_format=layout)
    grad = torch.randn(shape, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(block, x, grad)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(block, x, grad)
    for _ in range(3):
        x.copy_(torch.randn(shape, device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        same_bits(gradients(block, x, grad), captured)


def test_compile(device):
    """mode="reduce-overhead" on a GPU: CUDA graphs, whose memory is used again. Three sizes of
    batch, of which compilation may make one symbol."""
    block = block_on(device)
    how = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"}
    compiled = torch.compile(block, fullgraph=True, **how)

    class Compiled:
        parameters = block.parameters
        __call__ = staticmethod(compiled)

    for n in (2, 3, 4) if device == "cuda" else (2,):
        for _ in range(3 if device == "cuda" else 1):
            x = torch.randn(n, *SHAPES[0][1:], device=device)
            if device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            got = [t.clone() for t in gradients(Compiled(), x)]
            same_bits(gradients(block, x), got)


# --- sizes ------------------------------------------------------------------------------------


@pytest.fixture
def untuned(monkeypatch):
    """Batches and maps of any size get the same code; deterministic mode fills memory with NaN,
    which takes too much of it here."""
    monkeypatch.setenv("MFEF_TRITON_AUTOTUNE", "0")
    torch.use_deterministic_algorithms(False)


def needs(gigabytes):
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GB of GPU memory are free, {gigabytes} are needed")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_many_images(device, untuned, layout):
    """The last images of more than 2^31 elements have the bits that they have alone, and the
    convolution's weights, to which the others give nothing, the gradient."""
    images, channels = 5, 8
    if device == "cuda":
        images, channels = 2**19 + 8, 64
        needs(32)
    block = block_on(device, torch.bfloat16, channels)
    like = {"device": device, "dtype": torch.bfloat16, "memory_format": layout}
    many = torch.empty((images, channels, 8, 8), **like).zero_()
    x = many[-4:].normal_().clone()
    assert device == "cpu" or many.numel() > 2**31
    grad = torch.ones((), device=device, dtype=torch.bfloat16)
    out, grad_x, *grads = gradients(block, many, grad.expand_as(many))
    alone, alone_x, *alone_grads = gradients(block, x, grad.expand_as(x))
    same_bits([out[-4:], grad_x[-4:]], [alone, alone_x])
    # The same few terms in another order.
    for a, b in list(zip(grads, alone_grads, strict=True))[: len(block.conv.weights)]:
        assert a.any()
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-4)


def test_large_image(device, untuned):
    """The last rows of one image of more than 2^31 elements, and of its gradient."""
    side = 40
    if device == "cuda":
        side = 11_600
        needs(20)
    groups, rows = [16], 12
    weights = [torch.randn(16, 1, 5, 5, device=device, dtype=torch.bfloat16)]
    x = torch.zeros(1, 16, side, side, device=device, dtype=torch.bfloat16)
    x[:, :, -rows:] = torch.randn(1, 16, rows, side, device=device)
    assert device == "cpu" or x.numel() > 2**31

    def last_rows(x):
        x = x.detach().requires_grad_()
        y = functional.multi_scale_conv2d(x, weights, groups, backend="triton")
        (grad_x,) = torch.autograd.grad(y, x, y.detach())
        return y.detach()[:, :, -4:], grad_x[:, :, -4:]

    same_bits(last_rows(x), last_rows(x[:, :, -rows:]))


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
