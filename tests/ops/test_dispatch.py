"""Without PyTorch's private names: slower, the same results."""

import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mfef_ext
from mfef_ext.ops import dispatch

# What a torch that lacks some names does is seen in a process of its own, since they are looked up
# when the package is imported. PyTorch itself keeps them: it would not work without.
PROGRAM = """
import pkgutil, sys
resolve, hidden = pkgutil.resolve_name, set(sys.argv[1:])
def hide(name):
    if name in hidden:
        raise AttributeError(name)
    return resolve(name)
pkgutil.resolve_name = hide

import torch
from torch.autograd import forward_ad
from mfef_ext import MFEFBlock, explain, functional, reference
from mfef_ext.ops import dispatch
pkgutil.resolve_name = resolve
assert hidden <= set(dispatch.NAMES)

def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

torch.manual_seed(0)
block = MFEFBlock(8, kernel_sizes=(3, 5), groups=(1, 2), reduction=2)
x = torch.randn(2, 8, 5, 4, requires_grad=True)
conv, leaves = block.conv, [x, *block.parameters()]
attention = block.attention._arguments()
bias = torch.randn(8, requires_grad=True)
calls = {
    "mfef_block": lambda f, x: f.mfef_block(x, conv.weights, conv.groups, *attention),
    "dual_attention": lambda f, x: f.dual_attention(x, *attention),
    "multi_scale_conv2d": lambda f, x: f.multi_scale_conv2d(
        x, conv.weights, conv.groups, True, bias
    ),
}

def results(f, call):
    out = call(f, x)
    grads = torch.autograd.grad(out.square().sum(), [*leaves, bias], allow_unused=True)
    with torch.no_grad():
        assert torch.equal(call(f, x), out)
    mapped = torch.vmap(lambda y: call(f, y))(torch.stack([x, 2 * x]))
    of_func = torch.func.grad(lambda y: call(f, y).square().sum())(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = call(f, x)
    return [out, *(g for g in grads if g is not None), mapped, of_func], low

for op, call in calls.items():
    (got, low), (wanted, _) = results(functional, call), results(reference, call)
    for a, b in zip(got, wanted, strict=True):
        close(a, b)
    assert low.dtype == torch.bfloat16 and (low.float() - wanted[0]).abs().max() < 0.1

    def twice():
        (grad,) = torch.autograd.grad(call(functional, x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()

    def jvp(f=functional):
        return torch.func.jvp(lambda y: call(f, y), (x.detach(),), (x.detach(),))[1]

    def dual(f=functional):
        with forward_ad.dual_level():
            out = call(f, forward_ad.make_dual(x.detach(), x.detach()))
            return forward_ad.unpack_dual(out).tangent

    for run in (twice, jvp, dual):
        try:
            tangent = run()
        except RuntimeError as error:
            assert str(error).startswith(f"{op} cannot be differentiated"), error
        else:
            assert not dispatch.OWN_AUTOGRAD
            close(tangent, run(reference))

out = block(x)
close(out, calls["mfef_block"](reference, x))
assert ("called one after the other" in explain(x, block)) != dispatch.CAN_TELL
if not dispatch.OWN_AUTOGRAD:
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    close(compiled, out)
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (compiled, out)), strict=True):
        close(a, b)
mine, theirs = (str(n.mfef_block.default._schema) for n in (torch.ops.mfef, torch.ops.mfef_triton))
assert mine.split("::")[1] == theirs.split("::")[1]
"""


@pytest.mark.parametrize(
    "hidden", [dispatch.NAMES, dispatch.NAMES[5:]], ids=["all", "all but those of autograd"]
)
def test_private_names_may_be_missing(hidden):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *hidden]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", dispatch.NAMES)
def test_one_private_name_may_be_missing(name, monkeypatch):
    """Then what it is part of is switched off as a whole, which the test above has run."""

    def hide(wanted, resolve=pkgutil.resolve_name):
        if wanted == name:
            raise AttributeError(wanted)
        return resolve(wanted)

    monkeypatch.setattr(pkgutil, "resolve_name", hide)
    spec = importlib.util.spec_from_file_location("mfef_ext.ops.another", dispatch.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    index = another.NAMES.index(name)
    there = another.OWN_AUTOGRAD, another.CAN_SKIP, another.CAN_TELL
    assert there == (index >= 5, index >= 11, "_global_" not in name)
    x = torch.ones(1, requires_grad=True)
    assert another.records((x,)) and not another.records((x.detach(), None))
    assert another.is_direct((x, None)) == another.CAN_SKIP
    assert another.allow_tf32() == dispatch.allow_tf32()
    conv = torch.ops.aten.convolution.default
    wanted = str(conv._schema).removeprefix("aten::")
    assert another.schema(conv) == dispatch.schema(conv) == wanted
    assert another.redefined() == ""


def test_private_names_are_in_one_file():
    """But for attributes of instances, such as the hooks of a layer."""
    package, private = (
        Path(mfef_ext.__file__).parent,
        re.compile(r"\btorch(\.\w+)*\.(_(?!_)|_C\b)|from torch\S* import (.*, )?_|\.redispatch\("),
    )
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(private.search(line) for line in path.read_text().splitlines())
    }
    assert found == {"ops/dispatch.py"}


def test_constants_are_marked_as_pytorch_does_it():
    def mine():
        pass

    def theirs():
        pass

    dispatch.constant_when_compiled(mine)
    torch.compiler.assume_constant_result(theirs)
    assert vars(mine) == vars(theirs) != {}
