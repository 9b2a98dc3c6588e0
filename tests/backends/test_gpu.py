"""The block as a GPU is used, by every backend for one: streams, graphs, compilers, several
devices, large tensors.

Where a body means something without a GPU it also runs on CPU tensors, smaller: Triton's kernels
interpreted, CUDA's on the PTX machine (tests/ptx).
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch

from mfef_ext import functional
from mfef_ext.modules import MFEFBlock

CUDA = torch.cuda.is_available()
GPU = pytest.mark.gpu
LAYOUTS = [torch.contiguous_format, torch.channels_last]


class Place(NamedTuple):
    backend: str
    device: str

    @property
    def channels(self) -> int:
        """On a GPU groups wide enough for tensor cores, which take seconds without one."""
        return 32 if self.device.startswith("cuda") else 8


def places(*devices):
    found = []
    for backend in ("triton", "cuda"):
        for device in devices:
            marks = [GPU] if device == "cuda" else []
            if (backend, device) == ("triton", "cpu"):
                reason = "Triton is not interpreted beside a GPU"
                marks.append(pytest.mark.skipif(CUDA, reason=reason))
            found.append(
                pytest.param(Place(backend, device), id=f"{backend}-{device}", marks=marks)
            )
    return found


def prepare(request):
    place = request.param
    if place.device == "cpu" and place.backend == "triton":
        request.getfixturevalue("interpreted")
    elif place.device == "cpu":
        request.getfixturevalue("machine")
    return place


@pytest.fixture(params=places("cuda"))
def gpu(request):
    """A GPU."""
    return prepare(request)


@pytest.fixture(params=places("cpu", "cuda"))
def place(request):
    """A GPU, or what stands for one."""
    return prepare(request)


def block_on(place, dtype=torch.float32, channels=None):
    torch.manual_seed(0)
    sizes = {"kernel_sizes": (3, 5), "groups": (1, 2), "backend": place.backend}
    return MFEFBlock(channels or place.channels, **sizes).to(place.device, dtype)


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
SMALL, LARGE = (5, 6), (17, 19)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_repeats_are_bit_identical(place, size, layout):
    if place == ("triton", "cpu") and size == LARGE:
        pytest.skip("minutes in the interpreter; triton/test_attention.py repeats that plan")
    block = block_on(place)
    x = torch.randn(3, place.channels, *size, device=place.device).to(memory_format=layout)
    first = gradients(block, x)
    assert first[0].is_contiguous(memory_format=layout)
    for _ in range(20 if place.device == "cuda" else 1):
        same_bits(first, gradients(block, x))


def test_autocast(place):
    """float32 in and out of the gradients, and in between the bits of bfloat16."""
    block, low = block_on(place), block_on(place, torch.bfloat16)
    x = torch.randn(3, place.channels, *SMALL, device=place.device)
    with torch.autocast(place.device, torch.bfloat16):
        out, *grads = gradients(block, x)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in grads)
    wanted, *low_grads = gradients(low, x.bfloat16())
    same_bits([out, *grads], [wanted, *(g.float() for g in low_grads)])


# --- where it runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=str)
def test_second_device(gpu, size):
    """Tensors on the second device while the first is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    first_place, second_place = (gpu._replace(device=f"cuda:{i}") for i in (0, 1))
    x = torch.randn(2, gpu.channels, *size)
    first = gradients(block_on(first_place), x.to("cuda:0"))
    with torch.cuda.device(0):
        second = gradients(block_on(second_place), x.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        same_bits(first, second)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=str)
def test_non_default_stream(gpu, size):
    """All kernels wait for what the stream did before; on another they would read too early."""
    block, x = block_on(gpu), torch.randn(64, gpu.channels, *size, device="cuda")
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


def test_threads(gpu):
    """One block, and plans made for the first time, from several threads."""
    block = block_on(gpu)
    xs = [torch.randn(n, gpu.channels, 6, 7, device="cuda") for n in (1, 2, 3, 4)] * 4
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: gradients(block, x), xs))
    torch.cuda.synchronize()
    for x, got in zip(xs, together, strict=True):
        same_bits(gradients(block, x), got)


# --- graphs and compilers ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cuda_graph(gpu, size, layout):
    """Forward and backward are captured, and replayed for other values."""
    block, shape = block_on(gpu), (3, gpu.channels, *size)
    x = torch.randn(shape, device="cuda").contiguous(memory_format=layout)
    grad = torch.randn(shape, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(block, x, grad)  # Triton compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(block, x, grad)
    for _ in range(3):
        x.copy_(torch.randn(shape, device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        same_bits(gradients(block, x, grad), captured)


def test_compile(place):
    """mode="reduce-overhead" on a GPU: CUDA graphs, whose memory is used again. Three sizes of
    batch, of which compilation may make one symbol."""
    block = block_on(place)
    on_gpu = place.device == "cuda"
    how = {"mode": "reduce-overhead"} if on_gpu else {"backend": "aot_eager"}
    compiled = torch.compile(block, fullgraph=True, **how)

    class Compiled:
        parameters = block.parameters
        __call__ = staticmethod(compiled)

    for n in (2, 3, 4) if on_gpu else (2,):
        for _ in range(3 if on_gpu else 1):
            x = torch.randn(n, place.channels, *SMALL, device=place.device)
            if on_gpu:
                torch.compiler.cudagraph_mark_step_begin()
            got = [t.clone() for t in gradients(Compiled(), x)]
            same_bits(gradients(block, x), got)


# --- sizes ------------------------------------------------------------------------------------


def needs(gigabytes):
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GB of GPU memory are free, {gigabytes} are needed")


@pytest.mark.parametrize("side", [8, 24])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_many_images(place, untuned, layout, side):
    """The last images of more than 2^31 elements have the bits that they have alone, and the
    convolution's weights, to which the others give nothing, the gradient."""
    images, channels = 5, 8
    if place.device == "cuda":
        channels = 64
        images = 2**31 // (channels * side**2) + 8
        needs(40)
    elif place.backend == "triton" and side > 8:
        pytest.skip("minutes in the interpreter")
    block = block_on(place, torch.bfloat16, channels)
    like = {"device": place.device, "dtype": torch.bfloat16, "memory_format": layout}
    many = torch.empty((images, channels, side, side), **like).zero_()
    x = many[-4:].normal_().clone()
    assert place.device == "cpu" or many.numel() > 2**31
    grad = torch.ones((), device=place.device, dtype=torch.bfloat16)
    out, grad_x, *grads = gradients(block, many, grad.expand_as(many))
    alone, alone_x, *alone_grads = gradients(block, x, grad.expand_as(x))
    same_bits([out[-4:], grad_x[-4:]], [alone, alone_x])
    # The same few terms in another order.
    for a, b in list(zip(grads, alone_grads, strict=True))[: len(block.conv.weights)]:
        assert a.any()
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("in_group", [1, 8], ids=["direct", "matrices"])
def test_large_image(place, untuned, in_group):
    """The last rows of one image of more than 2^31 elements, and of its gradient."""
    side, rows = 40, 12
    if place.device == "cuda":
        side = 11_606
        needs(20)
    groups = [16 // in_group]
    weight = torch.randn(16, in_group, 5, 5, device=place.device, dtype=torch.bfloat16)
    x = torch.zeros(1, 16, side, side, device=place.device, dtype=torch.bfloat16)
    x[:, :, -rows:] = torch.randn(1, 16, rows, side, device=place.device)
    assert place.device == "cpu" or x.numel() > 2**31

    def last_rows(x):
        x = x.detach().requires_grad_()
        y = functional.multi_scale_conv2d(x, [weight], groups, backend=place.backend)
        (grad_x,) = torch.autograd.grad(y, x, y.detach())
        return y.detach()[:, :, -4:], grad_x[:, :, -4:]

    same_bits(last_rows(x), last_rows(x[:, :, -rows:]))
