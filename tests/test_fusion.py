"""A fused layer cannot be told from its parts: what is done to a part, the layer does too."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from mfef_ext import DualAttention, MFEFBlock, MultiScaleConv2d, explain
from mfef_ext.distill.tap import find_tap, forward_with_map

MODES = ("split", "pyramid", "hierarchical")
modes = pytest.mark.parametrize("mode", MODES)


def make(mode="split", **options):
    return MFEFBlock(8, kernel_sizes=(3, 5), groups=(1, 2), reduction=2, mode=mode, **options)


def images():
    return torch.randn(2, 8, 5, 4)


def conv_by_calls(conv, x):
    """What the convolution is, by calls of its branches alone."""
    inputs = [x, x] if conv.mode == "pyramid" else x.split(4, 1)
    first = conv.branches[0](inputs[0])
    second = inputs[1] + first if conv.mode == "hierarchical" else inputs[1]
    return torch.cat([first, conv.branches[1](second)], 1)


def by_calls(block, x):
    return block.attention(conv_by_calls(block.conv, x))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def replace(block):
    block.attention = nn.Identity()


def wrap(block):
    block.attention = nn.Sequential(block.attention, nn.ReLU())


def override(layer):
    forward = layer.forward
    layer.forward = lambda y: 3 * forward(y)


def override_convolution(branch):
    convolve = branch._conv_forward
    branch._conv_forward = lambda y, *parameters: 3 * convolve(y, *parameters)


def override_call(layer):
    call = layer._call_impl
    layer._call_impl = lambda *inputs: 3 * call(*inputs)


class Subclass(MultiScaleConv2d):
    def forward(self, x):
        return 3 * super().forward(x)


def dilate(block):
    block.conv.branches[1].dilation, block.conv.branches[1].padding = (2, 2), (4, 4)


def other_biases(block):
    block.conv = MultiScaleConv2d(
        8, kernel_sizes=(3, 5), groups=(1, 2), mode=block.conv.mode, bias=True
    )


def branch(block):
    block.conv.branches[1] = nn.Conv2d(block.conv.branch_channels[1], 4, 1)


def compiled(block):
    block.attention.compile(backend="eager")


CHANGES = {
    "nothing": lambda b: None,
    "prune fc1": lambda b: prune.l1_unstructured(b.attention, "fc1_weight", 0.5),
    "prune spatial": lambda b: prune.random_unstructured(b.attention, "spatial_weight", 0.5),
    "prune branch": lambda b: prune.l1_unstructured(b.conv.branches[0], "weight", 0.5),
    "prune filters": lambda b: prune.ln_structured(b.conv.branches[1], "weight", 0.5, 2, 0),
    "weight norm": lambda b: weight_norm(b.attention, "fc1_weight"),
    "weight norm of a branch": lambda b: weight_norm(b.conv.branches[0]),
    "spectral norm": lambda b: spectral_norm(b.attention, "fc2_weight").eval(),
    "spectral norm of a branch": lambda b: spectral_norm(b.conv.branches[0]).eval(),
    "parametrized": lambda b: parametrizations.weight_norm(b.attention, "fc1_weight"),
    "parametrized branch": lambda b: parametrizations.weight_norm(b.conv.branches[0]),
    "hook of attention": lambda b: b.attention.register_forward_hook(lambda m, i, o: o * 2),
    "hook of a branch": lambda b: b.conv.branches[0].register_forward_hook(lambda m, i, o: o * 2),
    "forward of attention": lambda b: override(b.attention),
    "forward of a branch": lambda b: override(b.conv.branches[1]),
    "_conv_forward of a branch": lambda b: override_convolution(b.conv.branches[1]),
    "call of a branch": lambda b: override_call(b.conv.branches[0]),
    "call of attention": lambda b: override_call(b.attention),
    "replaced attention": replace,
    "replaced branch": branch,
    "wrapped": wrap,
    "dilated branch": dilate,
    "conv with bias": other_biases,
    "compiled": compiled,
}


@modes
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_changed_part_is_called(mode, change):
    """Forward, two steps of training, and a load into a block that was changed alike."""
    block, again = make(mode), make(mode)
    for b in (block, again):
        change(b)
    x = images()
    close(block(x), by_calls(block, x))
    optimiser = torch.optim.SGD(block.parameters(), lr=0.5)
    before = block(x).detach()
    for _ in range(2):
        optimiser.zero_grad()
        block(x).square().sum().backward()
        optimiser.step()
    assert not torch.equal(block(x), before)
    again.load_state_dict(block.state_dict())
    block.eval(), again.eval()
    assert torch.equal(again(x), block(x))


@modes
@pytest.mark.parametrize("name", ["conv", "attention", "conv.branches.1"])
def test_every_kind_of_hook_fires(mode, name):
    block = make(mode)
    part, fired = block.get_submodule(name), []
    part.register_forward_pre_hook(lambda *a: fired.append("before"))
    part.register_forward_hook(lambda *a: fired.append("after"))
    part.register_full_backward_pre_hook(lambda *a: fired.append("before backward"))
    part.register_full_backward_hook(lambda *a: fired.append("after backward"))
    block(images().requires_grad_()).sum().backward()
    assert fired == ["before", "after", "before backward", "after backward"]


@modes
def test_hooks_of_all_modules_see_every_module(mode):
    block, seen = make(mode), []
    handle = register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        block(images())
    finally:
        handle.remove()
    assert seen == ["Conv2d", "Conv2d", "MultiScaleConv2d", "DualAttention", "MFEFBlock"]


@modes
def test_hooks_come_and_go(mode):
    """The fused operator is back, to the bit, when the last hook is gone."""
    block, x = make(mode), images()
    before = block(x)
    handle = block.conv.branches[0].register_forward_hook(lambda m, i, o: o + 1)
    close(block(x), by_calls(block, x))
    assert not torch.allclose(block(x), before)
    handle.remove()
    assert torch.equal(block(x), before)


@modes
def test_conv_alone_calls_changed_branches(mode):
    x = images()
    for bias in (False, True):
        conv = MultiScaleConv2d(8, kernel_sizes=(3, 5), groups=(1, 2), mode=mode, bias=bias)
        close(conv(x), conv_by_calls(conv, x))
        prune.l1_unstructured(conv.branches[0], "weight", 0.5)
        close(conv(x), conv_by_calls(conv, x))
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
    conv.branches[1] = nn.Identity()
    close(conv(x), conv_by_calls(conv, x))
    with pytest.raises(ValueError, match=r"x must be \(N, 8, H, W\), got shape"):
        conv(torch.randn(2, 6, 5, 4))
    conv.branches.append(nn.Identity())
    with pytest.raises(ValueError, match=r"branches holds 3 modules but kernel_sizes=\(3, 5\)"):
        conv(x)


def test_a_part_of_a_subclass_is_called():
    block, x = make(), images()
    wanted = block.attention(3 * block.conv(x))
    conv = Subclass(8, kernel_sizes=(3, 5), groups=(1, 2))
    conv.load_state_dict(block.conv.state_dict())
    block.conv = conv
    close(block(x), wanted)


def test_a_class_with_another_forward_is_called(monkeypatch):
    block, x = make(), images()
    wanted = block.attention(torch.zeros_like(x))
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, y: 0 * forward(self, y))
    close(block(x), wanted)
    monkeypatch.undo()
    convolve = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, *a: 0 * convolve(self, *a))
    close(block(x), wanted)
    close(block.conv(x), torch.zeros_like(x))
    monkeypatch.undo()
    monkeypatch.setattr(MultiScaleConv2d, "forward", lambda self, y: 0 * y)
    close(block(x), wanted)


@modes
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (nn.Module, "__call__"),
        (nn.Module, "_call_impl"),
        (nn.Conv2d, "__call__"),
        (DualAttention, "__call__"),
    ],
)
def test_a_class_that_is_called_in_another_way_is_called(mode, cls, name, monkeypatch):
    """As tracers and profilers replace it, to see every module."""
    block, x, seen = make(mode), images(), []
    wanted, call = by_calls(block, x), getattr(cls, name)

    def watch(self, *inputs):
        seen.append(type(self).__name__)
        return call(self, *inputs)

    monkeypatch.setattr(cls, name, watch)
    close(block(x), wanted)
    everything = ["MFEFBlock", "MultiScaleConv2d", "Conv2d", "Conv2d", "DualAttention"]
    assert seen == [n for n in everything if cls is nn.Module or n == cls.__name__]
    assert mode == "hierarchical" or "called" in explain(x, block)
    monkeypatch.undo()
    assert mode == "hierarchical" or explain(x, block).startswith("mfef_block on")


def test_parts_with_backends_of_their_own_keep_them():
    block, x = make(backend="reference"), images()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        block(dual)  # which kernels refuse
        block.attention.backend = "cpu"
        with pytest.raises(RuntimeError, match="dual_attention cannot be differentiated"):
            block(dual)
        block.backend = "reference"
        block(dual)
    assert block.conv.backend == block.attention.backend == block.backend == "reference"


def test_taps_inside_of_a_block_fire():
    block = MFEFBlock(8, groups="auto")
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    x = torch.randn(2, 3, 6, 6)
    y = net[0](x)
    taps = {
        "1": block(y),
        "1.attention": block(y),
        "1.conv": block.conv(y),
        "1.conv.branches.3": block.conv.branches[3](y[:, 6:]),
    }
    for tap, wanted in taps.items():
        logits, last_map = forward_with_map(net, tap, x)
        close(last_map, wanted)
        close(logits, net(x))
    assert find_tap(net, (3, 6, 6)) == "1"


def test_gates_are_those_of_the_parameters_that_a_forward_uses():
    """A pruned weight is computed when the layer is called; before, the attribute is an old one."""
    block, again, x = make(), make(), images()
    for b in (block, again):
        prune.l1_unstructured(b.attention, "fc1_weight", 0.5)
    again.load_state_dict(block.state_dict())
    for a, b in zip(again.gates(x), block.gates(x), strict=True):
        assert torch.equal(a, b)
    block.attention = nn.Sequential(block.attention)
    close(block.gates(x)[0], again.gates(x)[0])
    block.attention = nn.Identity()
    with pytest.raises(TypeError, match="attention is an Identity, which has no gates"):
        block.gates(x)


def test_explain_says_what_is_called_and_why():
    block, x = make(), images()
    assert str(explain(x, block)).startswith("mfef_block on")
    handle = block.conv.register_forward_hook(lambda *a: None)
    text = str(explain(x, block))
    assert text.startswith("conv and attention are called one after the other: conv has hooks")
    assert "multi_scale_conv2d on" in text and "dual_attention on" in text
    handle.remove()
    block.conv.branches[1] = nn.Identity()
    text = str(explain(x, block))
    assert "the branches are called one by one (Conv2d, Identity): a branch is an Identity" in text
    block.attention = nn.Identity()
    assert "attention is an Identity, which is called" in str(explain(x, block))


def old_state(block):
    """The state of a block before its branches were modules."""
    return {
        k.replace(".weight", "").replace("branches", "weights") if "branches" in k else k: v
        for k, v in block.state_dict().items()
    }


@pytest.mark.parametrize("prefix", ["", "0.", "net.heads.1."])
def test_states_with_the_old_keys_load(prefix):
    block, again, x = make(), make(), images()
    state = {prefix + k: v for k, v in old_state(block).items()}
    assert f"{prefix}conv.weights.0" in state
    outer = again
    for name in reversed(prefix.split(".")[:-1]):
        outer = nn.ModuleDict({name: outer})
    untouched = dict(state)
    outer.load_state_dict(state)
    assert torch.equal(again(x), block(x))
    assert list(state) == list(untouched)
    assert [p.shape for p in again.parameters()] == [v.shape for v in old_state(block).values()]


@pytest.mark.parametrize("assign", [False, True])
def test_an_old_bias_is_divided_among_the_branches(assign):
    def conv(**options):
        return MultiScaleConv2d(8, 6, kernel_sizes=(3, 5), groups="auto", bias=True, **options)

    made, x = conv(), images()
    state = made.state_dict()
    old = {f"weights.{i}": state[f"branches.{i}.weight"] for i in range(2)}
    old["bias"] = torch.cat([state[f"branches.{i}.bias"] for i in range(2)])
    again = conv(device="meta" if assign else None)
    again.load_state_dict(old, assign=assign)
    assert torch.equal(again(x), made(x))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        MultiScaleConv2d(8, 6, kernel_sizes=(3, 5), groups="auto").load_state_dict(old)


@modes
def test_meta_blocks_become_real(mode):
    block, x = make(mode, device="meta").to_empty(device="cpu"), images()
    block.reset_parameters()
    assert block(x).isfinite().all()
    torch.manual_seed(0)
    block.reset_parameters()
    torch.manual_seed(0)
    close(block(x), make(mode)(x))


@modes
def test_compiled_blocks_see_hooks_that_come_later(mode):
    torch._dynamo.reset()  # or the modes before count as recompilations
    block, x = make(mode), images()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    close(compiled(x), block(x))
    for part in (block.conv, block.conv.branches[0]):
        before = block(x)
        part.register_forward_hook(lambda m, i, o: o * 2)
        assert not torch.allclose(block(x), before)
        close(compiled(x), block(x))
    block.attention = nn.Identity()
    close(compiled(x), block(x))


@modes
@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_have_the_parts_that_were_changed(mode, strict):
    block, x = make(mode), images()
    block.conv.branches[1].register_forward_hook(lambda m, i, o: o * 2)
    program = torch.export.export(block, (x,), strict=strict)
    close(program.module()(x), block(x))


@modes
def test_parameters_can_be_given_from_outside(mode):
    block, x = make(mode), images()
    doubled = copy.deepcopy(block)
    with torch.no_grad():
        for p in doubled.parameters():
            p *= 2
    given = {name: 2 * p for name, p in block.named_parameters()}
    assert torch.equal(torch.func.functional_call(block, given, (x,)), doubled(x))


def test_a_wrapped_part_is_called(tmp_path):
    """DistributedDataParallel around one part: its gradients are the part's."""
    block, x = make(), images()
    wanted = torch.autograd.grad(block(x).sum(), list(block.parameters()))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        block.attention = nn.parallel.DistributedDataParallel(block.attention)
        block(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for p, gradient in zip(block.parameters(), wanted, strict=True):
        close(p.grad, gradient)
