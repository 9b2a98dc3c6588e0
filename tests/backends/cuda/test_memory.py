"""What calls have beside their tensors while they run."""

import itertools

import pytest
import torch

from mfef_ext import _C
from mfef_ext.problem import (
    describe_dual_attention,
    describe_mfef_block,
    describe_multi_scale_conv2d,
)
from tests.accuracy import make_case
from tests.ptx.cuda import H200

OPS = torch.ops.mfef_ptx
YES_NO = (False, True)


def planned(problem, **options) -> list[int]:
    """Bytes of scratch forward and backward, as the planner has them."""
    plan = _C.cuda_plan(problem.sizes(), tf32=problem.tf32, shared_limit=H200, **options)
    return [plan[f"{direction}_scratch_bytes"] for direction in ("forward", "backward")]


# Several images in a thread block, one, and maps that stay in memory.
@pytest.mark.parametrize(
    "shape",
    [(0, 24, 5, 6), (513, 8, 2, 2), (3, 24, 5, 8), (0, 24, 5, 20), (2, 24, 9, 37)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("split", YES_NO)
def test_scratch_is_what_the_planner_says(machine, shape, dtype, split):
    """Byte by byte, whatever of a call's results is wanted."""
    case = make_case(shape, dtype=dtype, kernel_sizes=(3, 5), groups=(1, 4), split=split)
    case = case.cast(dtype)
    x, grad = case.x.detach(), case.grad
    attention = [None if p is None else p.detach() for p in case.attention]
    weights = [w.detach() for w in case.weights]
    bias = torch.zeros(sum(w.shape[0] for w in weights), dtype=dtype)
    machine.scratch()  # of tests before
    block = describe_mfef_block(x, weights, case.groups, *attention, case.split)
    alone = describe_dual_attention(x, *attention)
    for save in YES_NO:
        OPS.mfef_block(x, weights, case.groups, case.split, *attention, save)
        assert machine.scratch() == planned(block, save=save)[0]
        OPS.dual_attention(x, *attention, save)
        assert machine.scratch() == planned(alone, save=save)[0]
    _, *saved = OPS.mfef_block(x, weights, case.groups, case.split, *attention, True)
    _, *saved_alone = OPS.dual_attention(x, *attention, True)
    machine.scratch()
    for need_x, need_parameters in itertools.product(YES_NO, YES_NO):
        if not need_x and not need_parameters:
            continue
        needs = (need_x, need_parameters)
        OPS.mfef_block_backward(
            grad, x, weights, case.groups, case.split, *attention, *saved, *needs
        )
        assert machine.scratch() == planned(block, need_parameters=need_parameters)[1]
        OPS.dual_attention_backward(grad, x, *attention, *saved_alone, *needs)
        assert machine.scratch() == planned(alone, need_parameters=need_parameters)[1]
        for b in (None, bias):
            conv = describe_multi_scale_conv2d(x, weights, case.groups, case.split, b)
            OPS.multi_scale_conv2d(x, weights, case.groups, case.split, b)
            assert machine.scratch() == planned(conv)[0] == 0
            OPS.multi_scale_conv2d_backward(grad, x, weights, case.groups, case.split, b, *needs)
            wanted = planned(conv, need_parameters=need_parameters, bias=b is not None)[1]
            assert machine.scratch() == wanted
