"""The operators put together from Triton's kernels, as users reach them; see the file of each
kernel for its own tests."""

import os
import subprocess
import sys

import pytest
import torch

import mfef_ext
from mfef_ext import backends, functional
from mfef_ext.modules import MFEFBlock
from tests.accuracy import check_block, make_case, run_block

INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="Triton is not interpreted beside a GPU",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def small(device, shape=(2, 8, 3, 4), **options):
    """A block's arguments, as leaves."""
    case = make_case(shape, dtype=torch.float32, **options)
    return case.cast(torch.float32, device)


# The kernels' own tests draw at random; here each is one block that reaches both of them.
SPLIT = {"shape": (2, 12, 3, 4), "kernel_sizes": (3, 1), "biases": False, "reduction": 4}
PYRAMID = {**SPLIT, "shape": (2, 8, 3, 2), "split": False}


@INTERPRETED  # test_gpu.py has them for a GPU
@pytest.mark.parametrize(
    ("dtype", "arguments"),
    [*[(dtype, SPLIT) for dtype in DTYPES], (torch.bfloat16, PYRAMID)],
    ids=[*map(str, DTYPES), "pyramid"],
)
def test_blocks(dtype, arguments):
    check_block(dtype, backend="triton", **arguments)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_repeats_are_bit_identical(device, layout):
    case = small(device, kernel_sizes=(3, 1))
    runs = [run_block(case, functional.mfef_block, layout, backend="triton") for _ in range(2)]
    assert runs[0][0].is_contiguous(memory_format=layout)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_an_image_does_not_depend_on_its_neighbours(device, sums_in_order):
    case = small(device, (4, 8, 3, 5), kernel_sizes=(3, 1))
    arguments = (case.weights, case.groups, *case.attention)
    whole = functional.mfef_block(case.x, *arguments, backend="triton")
    alone = functional.mfef_block(case.x[2:3], *arguments, backend="triton")
    assert torch.equal(alone[0], whole[2])


def test_empty_batch(device):
    block = MFEFBlock(8, kernel_sizes=(3, 5), groups="auto", backend="triton", device=device)
    x = torch.randn(0, 8, 5, 4, device=device, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    for p in block.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))


def test_what_needs_no_gradient_gets_none(device):
    case = small(device, kernel_sizes=(3, 1))
    everything = run_block(case, functional.mfef_block, backend="triton")
    for i, leaf in list(enumerate(case.leaves()))[::4]:  # x, a convolution's weight, fc1's, ...
        for other in case.leaves():
            other.requires_grad_(other is leaf)
        out = functional.mfef_block(
            case.x, case.weights, case.groups, *case.attention, backend="triton"
        )
        (grad,) = torch.autograd.grad(out, [leaf], case.grad)
        assert torch.equal(grad, everything[i + 1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_opcheck(device, layout):
    triton_ops()
    block = MFEFBlock(8, kernel_sizes=(3, 5), groups="auto", device=device)
    a = block.attention
    x = torch.randn(2, 8, 4, 5, device=device).contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(
        torch.ops.mfef_triton.mfef_block.default,
        (
            x, list(block.conv.weights), list(block.conv.groups), True,
            a.fc1_weight, a.fc1_bias, a.fc2_weight, a.fc2_bias, a.spatial_weight, True,
        ),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


def triton_ops():
    """Imported late: the kernels are made as Triton is told to run them."""
    from mfef_ext.backends.triton import ops

    return ops


def test_who_observes_calls_sees_them(device):
    """Calls go without the dispatcher, unless something there would have to do with them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    triton_ops()
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    block = MFEFBlock(8, kernel_sizes=(3,), groups=[1], backend="triton", device=device)
    x = torch.randn(2, 8, 3, 4, device=device, requires_grad=True)
    out = block(x)
    (wanted,) = torch.autograd.grad(out.sum(), x)
    with Mode():
        other = block(x)
        (grad,) = torch.autograd.grad(other.sum(), x)
    assert torch.equal(out, other) and torch.equal(grad, wanted)
    names = [f"mfef_triton.mfef_block{way}.default" for way in ("", "_backward")]
    assert [name for name in seen if "mfef" in name] == names
    with torch.profiler.profile() as profiled:
        block(x)
    assert any(event.key == "mfef_triton::mfef_block" for event in profiled.key_averages())
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
    # A negation that has yet to be done.
    lazy = torch.view_as_complex(torch.stack([x, x], -1).detach()).conj().imag
    assert lazy.is_neg()
    with torch.no_grad():
        assert torch.equal(block(lazy), block(-x))
        assert torch.equal(block(x), out)


def test_double_backward_is_refused(device):
    case = small(device, (1, 4, 3, 3), kernel_sizes=(3,))
    out = functional.mfef_block(
        case.x, case.weights, case.groups, *case.attention, backend="triton"
    )
    (grad,) = torch.autograd.grad(out, case.x, case.grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad.sum().backward()


def test_torch_func(device):
    case = small(device, (1, 4, 3, 3), kernel_sizes=(3,))
    weights, attention = [w.detach() for w in case.weights], [p.detach() for p in case.attention]

    def total(x):
        out = functional.mfef_block(x, weights, case.groups, *attention, backend="triton")
        return out.square().sum()

    x = case.x.detach()
    pair = torch.stack([x, -x])
    for gradient, y in zip(torch.vmap(torch.func.grad(total))(pair), pair, strict=True):
        y = y.clone().requires_grad_()
        assert torch.equal(gradient, torch.autograd.grad(total(y), y)[0])
    with pytest.raises(RuntimeError, match="mfef_block cannot be differentiated in forward mode"):
        torch.func.jvp(total, (x,), (x,))


def test_compiles_without_graph_breaks(device):
    block = MFEFBlock(8, kernel_sizes=(3, 1), groups="auto", backend="triton", device=device)
    x = torch.randn(2, 8, 2, 3, device=device, requires_grad=True)
    out = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (wanted,) = torch.autograd.grad(block(x).square().sum(), x)
    assert torch.equal(grad, wanted)


@INTERPRETED
def test_predicate_says_why_not(monkeypatch):
    case = make_case((1, 4, 3, 3), kernel_sizes=(3,))
    arguments = (case.weights, case.groups, *case.attention)
    with pytest.raises(RuntimeError, match="float64 is not one of"):
        functional.mfef_block(case.x, *arguments, backend="triton")
    low = case.cast(torch.float32)
    arguments = (low.weights, low.groups, *low.attention)
    described = mfef_ext.problem.describe_mfef_block(low.x, *arguments, True)
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match="pip install triton"):
            backends.choose(described, "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="must be on a CUDA device, not on cpu"):
        backends.choose(described, "triton")


@INTERPRETED
def test_automatic_choice_prefers_what_has_run_on_hardware(monkeypatch):
    from mfef_ext.backends import reference as plain
    from mfef_ext.backends import triton

    monkeypatch.setattr(backends, "order", lambda device: (triton.BACKEND, plain.BACKEND))
    case = make_case((1, 4, 3, 3), kernel_sizes=(3,), dtype=torch.float32).cast(torch.float32)
    described = mfef_ext.problem.describe_mfef_block(
        case.x, case.weights, case.groups, *case.attention, True
    )
    assert triton.BACKEND.supports(described) == (True, "")
    assert not triton.BACKEND.verified
    assert backends.choose(described).name == "reference"
    assert backends.choose(described, "triton").name == "triton"
    text = mfef_ext.explain(torch.randn(1, 4, 3, 3), MFEFBlock(4, groups="auto"))
    assert "triton: could, but has not run on hardware yet" in text


def test_importing_the_package_does_not_import_triton():
    code = "import sys, mfef_ext; sys.exit('triton' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_schemas_are_the_native_ones():
    triton_ops()
    for op in mfef_ext.ops.OPERATORS:
        for name in (op, f"{op}_backward"):
            one = str(getattr(torch.ops.mfef, name).default._schema)
            other = str(getattr(torch.ops.mfef_triton, name).default._schema)
            assert other == one.replace("mfef::", "mfef_triton::", 1)
