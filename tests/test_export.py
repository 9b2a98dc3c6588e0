"""The layer exports: by torch.export with its operators or without, to ONNX without."""

import io

import pytest
import torch

import mfef_ext
from mfef_ext.modules import MFEFBlock


def operators(program):
    """(operator, what it saves for backward) of what is this package's in an exported program."""
    found = []
    for node in program.graph.nodes:
        if str(node.target).startswith("mfef."):
            names = [a.name for a in node.target._schema.arguments]
            arguments = dict(zip(names, node.args, strict=False))
            found.append((node.target, arguments.get("save")))
    return found


@pytest.mark.parametrize("mode", ["split", "pyramid", "hierarchical"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_torch_export_of_the_operators(mode, grad, strict, tmp_path):
    """Whatever it was exported under, a program saves for backward only where one comes."""
    block = MFEFBlock(16, groups="auto", mode=mode)
    x = torch.randn(2, 16, 6, 6)
    batch = ({0: torch.export.Dim.DYNAMIC},)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(block, (x,), strict=strict, dynamic_shapes=batch)
    forwards = torch.ops.mfef.mfef_block.default, torch.ops.mfef.dual_attention.default
    for exported in (program, program.run_decompositions()):
        saves = [save for op, save in operators(exported) if op in forwards]
        assert saves == [False]
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    for n in (2, 5):
        x = torch.randn(n, 16, 6, 6, requires_grad=True)
        with torch.no_grad():
            assert torch.equal(loaded(x), block(x))
        results = []
        for layer in (loaded, block):
            named = dict(layer.named_parameters())
            leaves = [x, *(named[name] for name, _ in block.named_parameters())]
            results.append(torch.autograd.grad(layer(x).square().sum(), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", ["split", "pyramid", "hierarchical"])
def test_torch_export(mode, tmp_path):
    block = MFEFBlock(16, groups="auto", mode=mode).eval()
    x = torch.randn(2, 16, 6, 6)
    with mfef_ext.use_backend("reference"):
        program = torch.export.export(block, (x,))
    assert operators(program) == []
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    torch.testing.assert_close(loaded(x), block(x), rtol=1e-4, atol=1e-5)


def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    block = MFEFBlock(8, kernel_sizes=(3, 5), groups="auto").eval()
    x = torch.randn(2, 8, 5, 5)
    with mfef_ext.use_backend("reference"):
        program = torch.onnx.export(block, (x,), dynamo=True, verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)
    model = onnx.load_from_string(buffer.getvalue())
    onnx.checker.check_model(model)
    name = model.graph.input[0].name
    (out,) = ReferenceEvaluator(model).run(None, {name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), block(x).detach(), rtol=1e-4, atol=1e-5)
