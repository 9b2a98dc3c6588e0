"""The cases and their work, against counting one by one."""

import pytest
import suites
import torch

from mfef_ext import reference


def count_taps(side: int, kernel_size: int) -> tuple[int, int]:
    """All taps, and those inside the map, pixel by pixel."""
    every = inside = 0
    reach = kernel_size // 2
    for row in range(side):
        for column in range(side):
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    every += 1
                    inside += 0 <= row + dy < side and 0 <= column + dx < side
    return every, inside


@pytest.mark.parametrize("side", [1, 2, 7, 8])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 9])
def test_taps_inside(side, kernel_size):
    assert suites.taps_inside(side, kernel_size) == count_taps(side, kernel_size)[1]


@pytest.mark.parametrize("groups", [(1, 4, 8, 16), (1, 1, 1, 1)])
@pytest.mark.parametrize("side", [2, 8])
def test_forward_operations_by_brute_force(side, groups):
    n, c, hidden = 3, 64, 4
    case = suites.Case("paper", n, c, side, groups, "float32", suites.FORWARD)
    naive = real = 0
    convolutions = [(c // 4, c // 4 // g, k) for g, k in zip(groups, (3, 5, 7, 9), strict=True)]
    for out_channels, in_channels_per_group, k in [*convolutions, (1, 2, 7)]:
        every, inside = count_taps(side, k)
        naive += 2 * n * out_channels * in_channels_per_group * every
        real += 2 * n * out_channels * in_channels_per_group * inside
    mlp = 2 * n * 2 * (hidden * c + c * hidden)  # two vectors, two matrices, product and sum
    work = suites.count_work(case)
    assert (work.naive_ops, work.real_ops) == (naive + mlp, real + mlp)


def test_backward_is_two_more_forwards_and_five_more_maps():
    shape = ("paper", 4, 64, 8, (1, 4, 8, 16))
    forward = suites.count_work(suites.Case(*shape, "float32", suites.FORWARD))
    both = suites.count_work(suites.Case(*shape, "float32", suites.BOTH))
    half = suites.count_work(suites.Case(*shape, "bfloat16", suites.BOTH))
    assert both.naive_ops == 3 * forward.naive_ops
    assert both.real_ops == 3 * forward.real_ops
    parameters = sum(
        p.numel()
        for p in suites.make_operands(
            suites.Case(*shape, "float32", suites.FORWARD), "cpu"
        ).parameters.values()
    )
    one_map = 4 * 64 * 8 * 8
    assert forward.bytes_floor == 4 * (2 * one_map + parameters)
    assert both.bytes_floor == 4 * (7 * one_map + 3 * parameters)
    assert half.bytes_floor * 2 == both.bytes_floor


def test_suites_are_those_of_the_issue():
    shapes = {
        s: [c.shape for c in suites.select((s,), ("float32",), (suites.FORWARD,))]
        for s in suites.SHAPES
    }
    assert shapes["paper"] == [
        "128x64x8x8",
        "128x128x8x8",
        "128x256x8x8",
        "128x132x8x8",
        "128x512x2x2",
    ]
    assert shapes["imagenet"] == ["32x64x56x56", "32x128x28x28", "32x256x14x14", "32x512x7x7"]
    assert shapes["edge"] == ["1x64x8x8", "1x256x14x14", "1x64x56x56"]
    assert all(c.groups == (1, 1, 1, 1) for c in suites.select(("dense",)))
    assert len({c.name for c in suites.select()}) == len(suites.select()) == 64
    assert {c.suite for c in suites.select(quick=True)} == set(suites.SHAPES)


def test_operands_have_the_layout_and_the_same_values_in_both():
    case = suites.Case("edge", 2, 64, 8, (1, 4, 8, 16), "bfloat16", suites.BOTH)
    plain = suites.make_operands(case, "cpu", "contiguous")
    last = suites.make_operands(case, "cpu", "channels_last")
    assert plain.x.is_contiguous()
    assert last.x.is_contiguous(memory_format=torch.channels_last)
    assert last.conv_weights[0].is_contiguous(memory_format=torch.channels_last)
    assert last.x.dtype == last.conv_weights[0].dtype == torch.bfloat16
    for name, leaf in plain.leaves.items():
        assert torch.equal(leaf, last.leaves[name])
        assert leaf.requires_grad and leaf.is_leaf
    some = plain.to(torch.float64, images=torch.tensor([1]))
    assert torch.equal(some.x, plain.x[1:].double())
    assert torch.equal(some.grad_out, plain.grad_out[1:].double())


def test_step_returns_output_and_all_gradients():
    case = suites.Case("edge", 1, 64, 8, (1, 4, 8, 16), "float32", suites.BOTH)
    operands = suites.make_operands(case, "cpu")
    out, grads = suites.make_step(reference.mfef_block, operands, backward=True)()
    assert out.shape == operands.x.shape
    assert grads.keys() == operands.leaves.keys()
    assert all(grads[k].shape == v.shape for k, v in operands.leaves.items())
    out, grads = suites.make_step(reference.mfef_block, operands, backward=False)()
    assert not out.requires_grad and grads == {}
