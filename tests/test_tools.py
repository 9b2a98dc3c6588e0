"""Tools that look at a network find in these layers what they would find in plain ones."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import mfef_ext
from mfef_ext import DualAttention, FeatureFusion, MFEFBlock, MultiScaleConv2d, functional

MODES = ("split", "pyramid", "hierarchical")
N, H, W = 2, 5, 4
PIXELS = N * H * W


def make(mode="split", **options):
    return MFEFBlock(8, kernel_sizes=(3, 5), groups=(1, 2), reduction=2, mode=mode, **options)


def images(grad=False):
    return torch.randn(N, 8, H, W, requires_grad=grad)


def call(block, x):
    """The block as one function, without a module that a counter could hook."""
    return functional.mfef_block(
        x,
        block.conv.weights,
        block.conv.groups,
        *block.attention._arguments(),
        split=block.conv.mode == "split",
        backend=block.backend,
    )


def count(f):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


# Worked out by hand, 2 for a product and its sum: a convolution has 2 Cout (Cin / groups) k^2 for
# every pixel, whether its taps are on the map or not. 4 channels from 4 at 3x3, from 2 at 5x5.
CONV = 2 * PIXELS * (4 * 4 * 9 + 4 * 2 * 25)
# PyTorch counts the gradient of a grouped convolution's weight as if it had no groups.
CONV_WEIGHT = 2 * PIXELS * (4 * 4 * 9 + 4 * 4 * 25)
LINEAR = 2 * N * 8 * 4  # 8 to 4 or back, of the mean or of the maximum
SPATIAL = 2 * PIXELS * 2 * 49  # 2 channels to 1 at 7x7
ATTENTION = 4 * LINEAR + SPATIAL
BACKENDS = ("cpu", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_by_hand(backend):
    block = make(backend=backend)
    conv, attention = block.conv, block.attention
    assert count(lambda: call(block, images())) == CONV + ATTENTION
    assert count(lambda: attention(images())) == ATTENTION
    f = functional.multi_scale_conv2d
    assert count(lambda: f(images(), conv.weights, conv.groups, backend=backend)) == CONV
    # Backward, each with and without the gradients of the input and of the parameters.
    for x_grad, p_grad, conv_flops, attention_flops in (
        (True, True, CONV + CONV_WEIGHT, 8 * LINEAR + 2 * SPATIAL),
        (False, True, CONV_WEIGHT, 6 * LINEAR + 2 * SPATIAL),
        (True, False, CONV, 4 * LINEAR + SPATIAL),
    ):
        block.requires_grad_(p_grad)
        out = f(images(x_grad), conv.weights, conv.groups, backend=backend)
        assert count(lambda out=out: out.sum().backward()) == conv_flops
        out = attention(images(x_grad))
        assert count(lambda out=out: out.sum().backward()) == attention_flops
        # The attention's input has a gradient in any case.
        attention_flops = (8 if p_grad else 4) * LINEAR + (1 + p_grad) * SPATIAL
        out = call(block, images(x_grad))
        assert count(lambda out=out: out.sum().backward()) == conv_flops + attention_flops


@pytest.mark.parametrize("mode", MODES)
def test_layers_have_the_flops_of_their_specification(mode):
    counts = []
    for backend in BACKENDS:
        block = make(mode, backend=backend)
        counts.append(count(lambda block=block: block(images(True)).sum().backward()))
        if mode != "hierarchical":
            counts.append(count(lambda block=block: call(block, images(True)).sum().backward()))
    assert len(set(counts)) == 1 and counts[0] > 0


def test_flops_of_an_empty_batch():
    assert count(lambda: call(make(), torch.randn(0, 8, 5, 4, requires_grad=True)).sum()) == 0


def test_flops_are_counted_by_module():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        make()(images())
    by_module = {name: sum(c.values()) for name, c in counter.get_flop_counts().items()}
    assert by_module["MFEFBlock.conv"] == CONV
    assert by_module["MFEFBlock.attention"] == ATTENTION


def test_flops_of_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    block = make(backend="triton")
    step = count(lambda: call(block, images(True)).sum().backward())
    assert step == 2 * CONV + CONV_WEIGHT + ATTENTION + 8 * LINEAR + 2 * SPATIAL


@pytest.mark.parametrize("first", ["mfef_ext", "torch.utils.flop_counter"])
def test_formulas_are_there_whatever_is_imported_first(first):
    """Importing the counter imports Triton: that this package is imported is no reason for it."""
    program = f"""
import sys, torch, {first}
if {first!r} == "mfef_ext":
    assert "torch.utils.flop_counter" not in sys.modules
import mfef_ext
from torch.utils.flop_counter import FlopCounterMode
assert torch.ops.mfef.mfef_block in FlopCounterMode(display=False).flop_registry
assert torch.ops.mfef_triton.mfef_block_backward in FlopCounterMode(display=False).flop_registry
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def targets(graph):
    """What is called, by name."""
    calls = [n.target for n in graph.nodes if n.op.startswith("call")]
    return [t if isinstance(t, str) else t.__name__ for t in calls]


@pytest.mark.parametrize("mode", MODES)
def test_symbolic_trace(mode):
    """The same results and parameters, the fused operator where there is one, and it learns."""
    block, x = make(mode), images()
    traced = fx.symbolic_trace(block)
    if mode != "hierarchical":
        assert targets(traced.graph) == ["mfef_block"]
    assert sorted(traced.state_dict()) == sorted(block.state_dict())
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(graph(x), block(x))
    before = traced(x).detach()
    optimiser = torch.optim.SGD(traced.parameters(), lr=0.5)
    traced(x).square().sum().backward()
    assert all(p.grad is not None for p in traced.parameters())
    optimiser.step()
    assert not torch.equal(traced(x), before)
    with pytest.raises(ValueError, match=r"C=7 channels|x must be \(N, 8, H, W\)"):
        traced(torch.randn(2, 7, 5, 4))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [False, True])
def test_symbolic_trace_of_the_convolution(mode, bias):
    conv = MultiScaleConv2d(8, kernel_sizes=(3, 5), groups=(1, 2), mode=mode, bias=bias)
    net, x = nn.Sequential(conv, nn.ReLU()), images()
    traced = fx.symbolic_trace(net)
    assert torch.equal(traced(x), net(x))
    assert sorted(traced.state_dict()) == sorted(net.state_dict())
    conv.branches[0].register_forward_hook(lambda m, i, o: o * 2)
    traced = fx.symbolic_trace(net)
    assert torch.equal(traced(x), net(x))
    assert "0.branches.0" in targets(traced.graph)


def test_symbolic_trace_of_the_rest():
    class Losses(nn.Module):
        def forward(self, a, b, c):
            first, second = functional.kd_losses([a, b], [b, c], 2.0)
            return functional.kd_loss(a, c) + first + second

    class Fusion(nn.Module):
        def __init__(self):
            super().__init__()
            self.fusion = FeatureFusion((4, 6), 5).eval()

        def forward(self, a, b):
            return self.fusion([a, b])

    logits = [torch.randn(4, 10) for _ in range(3)]
    assert torch.equal(fx.symbolic_trace(Losses())(*logits), Losses()(*logits))
    fusion, maps = Fusion(), [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)]
    assert torch.equal(fx.symbolic_trace(fusion)(*maps), fusion(*maps))
    assert torch.equal(fx.symbolic_trace(fusion.fusion)(maps), fusion(*maps))
    attention = DualAttention(8)
    traced = fx.symbolic_trace(attention)
    assert targets(traced.graph) == ["dual_attention"]
    assert torch.equal(traced(y := images()), attention(y))


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), make(), nn.ReLU())


def test_feature_extraction():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    net, x = network(), torch.randn(N, 3, H, W)
    y = net[0](x)
    extractor = extraction.create_feature_extractor(net, {"1": "block", "2": "last"})
    found = extractor(x)
    assert torch.equal(found["block"], net[1](y)) and torch.equal(found["last"], net(x))
    # Parts that a tracer is told not to look into are called, and so have a name.
    leaves = {"leaf_modules": [MultiScaleConv2d, DualAttention]}
    for mode in ("train", "eval"):
        getattr(net, mode)()
        extractor = extraction.create_feature_extractor(net, ["1.conv"], tracer_kwargs=leaves)
        assert torch.equal(extractor(x)["1.conv"], net[1].conv(y))


def test_subclasses_of_tensors_come_back():
    class Image(torch.Tensor):
        pass

    block, x = make(), images()
    out = block(x.as_subclass(Image))
    assert type(out) is Image and torch.equal(out.as_subclass(torch.Tensor), block(x))


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_and_jit_trace(mode):
    block, x = make(mode), images(True)
    wanted = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    for reentrant in (True, False):
        block.zero_grad()
        x.grad = None
        checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
        for p, gradient in zip([x, *block.parameters()], wanted, strict=True):
            assert torch.equal(p.grad, gradient)
    traced = torch.jit.trace(block, (images(),), check_trace=False)
    for n in (1, 3):
        y = torch.randn(n, 8, 6, 6)
        torch.testing.assert_close(traced(y), block(y))


def test_a_summary_by_hooks_lists_every_layer():
    net, shapes = network(), {}
    for name, layer in net.named_modules():
        layer.register_forward_hook(lambda m, i, o, name=name: shapes.update({name: o.shape}))
    net(torch.randn(N, 3, H, W))
    containers = {"1.conv.branches"}
    assert set(shapes) == {name for name, _ in net.named_modules()} - containers
    assert shapes["1.conv.branches.1"] == (N, 4, H, W)


def test_the_profiler_names_the_operators():
    block, x = make(), images()
    with torch.profiler.profile() as profile:
        block(x)
    assert "mfef::mfef_block" in {event.key for event in profile.key_averages()}
    assert mfef_ext.explain(x, block).startswith("mfef_block")
