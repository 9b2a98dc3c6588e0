"""The layers: shapes, parameters, state, modes, copies, training."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import mfef_ext
from mfef_ext import reference
from mfef_ext.modules import DualAttention, FeatureFusion, MFEFBlock, MultiScaleConv2d


@pytest.mark.parametrize("channels", [64, 128, 132, 256, 342, 456])
@pytest.mark.parametrize("mode", ["split", "pyramid"])
def test_block_keeps_the_shape(channels, mode):
    block = MFEFBlock(channels, groups="auto", mode=mode)
    x = torch.randn(2, channels, 4, 4)
    assert block(x).shape == x.shape


def test_remainder_goes_to_the_first_branches():
    conv = MultiScaleConv2d(342, groups="auto")
    assert [w.shape[0] for w in conv.weights] == [86, 86, 85, 85]
    assert MultiScaleConv2d(132, groups="auto").groups == (1, 1, 1, 1)
    assert MultiScaleConv2d(64, groups="auto").groups == (1, 4, 8, 16)


def test_parameters_that_groups_cost():
    """As docs/recipes.md counts them."""
    for groups, thousands in (("auto", 181), ((1, 3, 11, 11), 34)):
        block = MFEFBlock(132, groups=groups, device="meta")
        assert round(sum(p.numel() for p in block.parameters()) / 1000) == thousands


@pytest.mark.parametrize("mode", ["split", "pyramid"])
def test_block_is_its_specification(mode):
    block = MFEFBlock(32, groups="auto", mode=mode)
    x = torch.randn(5, 32, 8, 8)
    a = block.attention
    wanted = reference.mfef_block(
        x,
        list(block.conv.weights),
        block.conv.groups,
        a.fc1_weight,
        a.fc1_bias,
        a.fc2_weight,
        a.fc2_bias,
        a.spatial_weight,
        split=mode == "split",
    )
    torch.testing.assert_close(block(x), wanted)


def test_hierarchical_mode_adds_the_previous_branch():
    conv = MultiScaleConv2d(
        12, kernel_sizes=(3, 5, 3), groups="auto", mode="hierarchical", bias=True
    )
    x = torch.randn(2, 12, 5, 5)
    y, parts = None, []
    for x_i, branch in zip(x.chunk(3, 1), conv.branches, strict=True):
        y = branch(x_i if y is None else x_i + y)
        parts.append(y)
    torch.testing.assert_close(conv(x), torch.cat(parts, 1))


def test_state_dict_is_plain_and_loads():
    block = MFEFBlock(16, groups="auto")
    state = block.state_dict()
    assert sorted(state) == [
        "attention.fc1_bias",
        "attention.fc1_weight",
        "attention.fc2_bias",
        "attention.fc2_weight",
        "attention.spatial_weight",
        "conv.branches.0.weight",
        "conv.branches.1.weight",
        "conv.branches.2.weight",
        "conv.branches.3.weight",
    ]
    other = MFEFBlock(16, groups="auto")
    other.load_state_dict(state)
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(other(x), block(x))
    assert torch.equal(copy.deepcopy(block)(x), block(x))
    assert torch.equal(pickle.loads(pickle.dumps(block))(x), block(x))


def test_reset_parameters_draws_anew_within_the_bounds():
    block = MFEFBlock(64)
    before = [p.detach().clone() for p in block.parameters()]
    block.reset_parameters()
    for old, new in zip(before, block.parameters(), strict=True):
        assert not torch.equal(old, new)
    w = block.conv.weights[0]
    assert w.abs().max() <= 1 / (w[0].numel() ** 0.5) + 1e-6


def test_init_matches_the_ordinary_layers():
    torch.manual_seed(0)
    conv = MultiScaleConv2d(8, kernel_sizes=(3,), groups=(2,), bias=True)
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 8, 3, groups=2)
    assert torch.equal(conv.weights[0], plain.weight)
    assert torch.equal(conv.branches[0].bias, plain.bias)


def test_repr_names_the_options():
    text = repr(MFEFBlock(64, backend="reference"))
    for part in ("(3, 5, 7, 9)", "(1, 4, 8, 16)", "mode='split'", "hidden=4", "'reference'"):
        assert part in text


def test_device_and_dtype_reach_every_parameter():
    block = MFEFBlock(16, groups="auto", dtype=torch.bfloat16, device="meta")
    assert all(p.dtype == torch.bfloat16 and p.is_meta for p in block.parameters())
    fusion = FeatureFusion((4, 4), 4, dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in fusion.parameters())


@pytest.mark.parametrize("mode", ["split", "pyramid", "hierarchical"])
def test_shapes_are_inferred_on_the_meta_device(mode):
    block = MFEFBlock(16, groups="auto", mode=mode, device="meta")
    assert block(torch.empty(3, 16, 6, 5, device="meta")).shape == (3, 16, 6, 5)


def test_gates_are_those_of_the_forward():
    block = MFEFBlock(16, groups="auto")
    x = torch.randn(3, 16, 6, 6)
    channel, spatial = block.gates(x)
    assert channel.shape == (3, 16) and spatial.shape == (3, 6, 6)
    y = block.conv(x)
    torch.testing.assert_close(
        block(x), y * channel[:, :, None, None] * spatial[:, None], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("integer", [np.int64, np.uint8, torch.tensor])
def test_any_integers_become_ints(integer):
    def check(layer, *names):
        for name in names:
            value = getattr(layer, name)
            for v in value if isinstance(value, tuple) else (value,):
                assert type(v) is int, name

    sizes, groups = [integer(3), integer(5)], [integer(1), integer(4)]
    block = MFEFBlock(
        integer(16),
        kernel_sizes=sizes,
        groups=groups,
        reduction=integer(4),
        spatial_kernel_size=integer(3),
    )
    check(block, "channels")
    check(block.conv, "channels", "out_channels", "kernel_sizes", "groups")
    check(block.attention, "channels", "hidden", "spatial_kernel_size")
    fusion = FeatureFusion([integer(16), integer(16)], integer(8))
    check(fusion, "in_channels", "out_channels")
    check(MultiScaleConv2d(integer(16), integer(8), groups="auto"), "channels", "out_channels")
    plain = MFEFBlock(16, kernel_sizes=(3, 5), groups=(1, 4), reduction=4, spatial_kernel_size=3)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 5, 5)
    assert repr(block) == repr(plain)
    assert torch.equal(block(x), plain(x))
    assert fusion([x, x]).shape == (2, 8, 5, 5)
    weights = list(plain.conv.weights)
    for backend in ("cpu", "reference"):
        assert torch.equal(
            mfef_ext.functional.multi_scale_conv2d(x, weights, groups, backend=backend),
            mfef_ext.functional.multi_scale_conv2d(x, weights, (1, 4), backend=backend),
        )


def test_attention_without_biases():
    attention = DualAttention(16, bias=False)
    assert sorted(attention.state_dict()) == ["fc1_weight", "fc2_weight", "spatial_weight"]
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    attention(x).sum().backward()
    assert all(p.grad is not None for p in attention.parameters())


def test_fusion_brings_maps_of_different_sizes_together():
    fusion = FeatureFusion((4, 6), 5)
    maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)]
    assert fusion(maps).shape == (2, 5, 8, 8)
    assert fusion([maps[0], torch.randn(2, 6, 16, 16)]).shape == (2, 5, 8, 8)


def test_fusion_is_what_its_docstring_says():
    fusion = FeatureFusion((3, 2), 4).eval()
    maps = [torch.randn(2, 3, 5, 5), torch.randn(2, 2, 5, 5)]
    z = nn.functional.conv2d(torch.cat(maps, 1), fusion.depthwise.weight, padding=1, groups=5)
    z = torch.relu(fusion.norm1(z))
    z = torch.relu(fusion.norm2(nn.functional.conv2d(z, fusion.pointwise.weight)))
    torch.testing.assert_close(fusion(maps), z)
    fusion.reset_parameters()


def test_block_learns():
    """A few steps of SGD lower a loss: gradients point the right way, and parameters move."""
    torch.manual_seed(0)
    block = MFEFBlock(16, groups="auto")
    x, target = torch.randn(32, 16, 6, 6), torch.randn(32, 16, 6, 6) * 0.1
    optimiser = torch.optim.SGD(block.parameters(), lr=5.0)
    losses = []
    for _ in range(10):
        loss = (block(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_public_names():
    for name in mfef_ext.__all__:
        assert hasattr(mfef_ext, name)
    assert sorted(mfef_ext.functional.__all__) == [
        "dual_attention",
        "kd_loss",
        "kd_losses",
        "mfef_block",
        "multi_scale_conv2d",
    ]
