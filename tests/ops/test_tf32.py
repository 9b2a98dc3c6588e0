"""PyTorch's switch for TF32, and that the operators are called with what it says."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mfef_ext import MFEFBlock, MultiScaleConv2d, functional, problem


@pytest.fixture(autouse=True)
def switch(monkeypatch):
    """Sets the switch by its older name, which has a value for every operator."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    def set_to(on: bool) -> None:
        torch.backends.cudnn.allow_tf32 = on

    return set_to


class Calls(TorchDispatchMode):
    """The operators that kernels are asked for, with their last argument where that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, bool] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mfef":
            names = [a.name for a in func._schema.arguments]
            given = dict(zip(names, args, strict=False))
            self.found[func._schema.name.removeprefix("mfef::")] = given.get("allow_tf32", False)
        return func(*args, **(kwargs or {}))


def test_both_names_of_the_switch(switch):
    assert problem.allow_tf32()
    switch(False)
    assert not problem.allow_tf32()
    # After this PyTorch refuses to say what `allow_tf32` is.
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert problem.allow_tf32()
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert not problem.allow_tf32()


@pytest.mark.parametrize("layer", [MFEFBlock, MultiScaleConv2d])
def test_the_backward_has_the_precision_of_its_forward(layer, switch):
    name = "mfef_block" if layer is MFEFBlock else "multi_scale_conv2d"
    block = layer(8, kernel_sizes=(3, 5), groups="auto", backend="cpu")
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    for on in (True, False, True):
        switch(on)
        with Calls() as calls:
            out = block(x)
            switch(not on)
            out.sum().backward()
        assert calls.found == {name: on, f"{name}_backward": on}


def test_only_problems_of_float32_may_be_rounded(switch):
    weights, groups = [torch.randn(4, 4, 3, 3)], [1]
    x = torch.randn(1, 4, 5, 5)
    arguments = x, weights, groups, True, None
    assert problem.describe_multi_scale_conv2d(*arguments).tf32
    half = [w.bfloat16() for w in weights]
    assert not problem.describe_multi_scale_conv2d(x.bfloat16(), half, groups, True, None).tf32
    switch(False)
    assert not problem.describe_multi_scale_conv2d(*arguments).tf32


def test_the_switch_is_part_of_what_was_checked_before(monkeypatch, switch):
    """A backend is asked with the precision of the call, whatever the calls before had."""
    asked = []
    choose = functional.backends.choose
    monkeypatch.setattr(
        functional.backends, "choose", lambda p, name: asked.append(p.tf32) or choose(p, name)
    )
    monkeypatch.setattr(functional, "_described", {})
    weights = [torch.randn(4, 4, 3, 3)]
    for on in (True, True, False, False, True):
        switch(on)
        functional.multi_scale_conv2d(torch.ones(1, 4, 5, 5), weights, [1])
    assert asked == [True, True, False, False, True]


def test_a_compiled_program_keeps_what_it_was_compiled_with(switch):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    block = MFEFBlock(8, kernel_sizes=(3, 5), groups="auto")
    compiled = torch.compile(block, fullgraph=True, backend=keep)
    for on in (True, False):
        switch(on)
        compiled(torch.randn(2, 8, 5, 6))
    (graph,) = graphs
    (call,) = (n for n in graph.graph.nodes if "mfef_block" in str(n.target))
    assert call.args[-1] is True


def test_the_switch_does_not_break_a_compiled_graph():
    block = MFEFBlock(8, kernel_sizes=(3, 5), groups="auto")
    x = torch.randn(2, 8, 5, 6)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), block(x))
