"""Under the reference backend the layer exports: torch.export and ONNX."""

import io

import pytest
import torch

import mfef_ext
from mfef_ext.modules import MFEFBlock

onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize("mode", ["split", "pyramid", "hierarchical"])
def test_torch_export(mode, tmp_path):
    block = MFEFBlock(16, groups="auto", mode=mode).eval()
    x = torch.randn(2, 16, 6, 6)
    with mfef_ext.use_backend("reference"):
        program = torch.export.export(block, (x,))
    assert "mfef" not in " ".join(
        str(n.target) for n in program.graph.nodes if n.op != "placeholder"
    )
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    torch.testing.assert_close(loaded(x), block(x), rtol=1e-4, atol=1e-5)


def test_onnx(tmp_path):
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
