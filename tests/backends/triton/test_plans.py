"""What is said of the Triton backend, with Triton and without it."""

import os
import subprocess
import sys

import pytest
import torch

import mfef_ext
from mfef_ext import inspection
from mfef_ext.modules import DualAttention, MFEFBlock, MultiScaleConv2d

SIZES = {"kernel_sizes": (3, 5), "groups": "auto", "backend": "triton"}
LAYERS = {
    "block": lambda: MFEFBlock(8, **SIZES),
    "pyramid": lambda: MFEFBlock(8, mode="pyramid", **SIZES),
    "convolution": lambda: MultiScaleConv2d(8, **SIZES),
    "attention": lambda: DualAttention(8, backend="triton"),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("side", [4, 17])
@pytest.mark.parametrize("layer", LAYERS)
def test_explained_is_what_is_launched(monkeypatch, layer, side, layout):
    """Kernels, grids, tiles and warps of a forward and a backward, in their order."""
    from mfef_ext.backends.triton.launch import Launch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = LAYERS[layer]().to(device)
    x = torch.randn(2, 8, side, side, device=device).contiguous(memory_format=layout)
    said = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: said.append(str(self)))
    out = module(x.requires_grad_())
    forward = len(said)
    out.backward(torch.ones_like(out))
    text = mfef_ext.explain(x, module).splitlines()
    assert [line.strip() for line in text if "program(s)" in line] == said
    assert f"    forward: {forward} launch(es)" in text
    assert f"    backward: {len(said) - forward} launch(es)" in text
    assert any("not yet run on hardware" in line for line in text)


def test_explain_names_the_way_of_each_branch():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = MFEFBlock(64, backend="triton").to(device)
    text = mfef_ext.explain(torch.zeros(1, 64, 8, 8, device=device), block)
    assert "k=3 tl.dot, k=5 direct taps, k=7 direct taps, k=9 direct taps" in text


def test_explain_says_why_not(monkeypatch):
    """The first reason, and what would run; the kernels themselves are not asked for."""
    from mfef_ext.backends import triton

    block, x = MFEFBlock(8, groups="auto"), torch.zeros(1, 8, 4, 4)

    def reason(block, x):
        lines = mfef_ext.explain(x, block).splitlines()
        assert not any("program(s)" in line for line in lines)
        (line,) = [line.strip() for line in lines if line.strip().startswith("triton: ")]
        return line

    if not torch.cuda.is_available():
        dtypes = "float32, bfloat16, float16"
        doubles = f"triton: no, dtype torch.float64 is not one of {dtypes}"
        assert reason(MFEFBlock(8, groups="auto", dtype=torch.float64), x.double()) == doubles
        with monkeypatch.context() as old:
            old.setattr(triton, "_capability", lambda problem: (7, 5))
            assert reason(block, x) == "triton: no, cpu has compute capability (7, 5), below 8.0"
        wide = torch.empty(1, device="cpu").expand(1, 8, 2**16, 2**15)
        assert reason(block, wide) == "triton: no, a map of 65536 x 32768 has 2^31 pixels or more"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    elsewhere = "triton: no, its tensors must be on a CUDA device, not on cpu"
    assert reason(block, x) == elsewhere


def test_doctor_says_which_triton_and_how_it_runs(monkeypatch):
    import triton

    text = inspection.doctor()
    (line,) = [line for line in text.splitlines() if line.startswith("Triton: ")]
    assert triton.__version__ in line and "not yet run on hardware" in line
    if not torch.cuda.is_available():
        assert "interpreted, on CPU tensors" in line
        monkeypatch.delenv("TRITON_INTERPRET")
        assert "no GPU to compile kernels for" in inspection.doctor()


WITHOUT = {
    "absent": "sys.modules['triton'] = None",
    "refused": """
import torch  # which itself does not bear being refused
class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton':
            raise ImportError('no triton here')
sys.meta_path.insert(0, Refuses())""",
}
SCRIPT = """
import torch, mfef_ext
from mfef_ext import functional, inspection
x = torch.randn(2, 8, 5, 4, requires_grad=True)
block = mfef_ext.MFEFBlock(8, groups="auto")
block(x).sum().backward()
assert x.grad is not None
functional.kd_loss(torch.randn(3, 5), torch.randn(3, 5))
(line,) = [line for line in inspection.doctor().splitlines() if line.startswith("Triton: ")]
assert line == "Triton: not installed (pip install triton); everything else works without it"
text = mfef_ext.explain(x, block)
assert "triton: no, Triton is not installed (pip install triton)" in text, text
block.backend = "triton"
try:
    block(x)
except RuntimeError as error:
    assert "Triton is not installed" in str(error) and "\\n" not in str(error)
else:
    raise AssertionError("it ran")
assert "refused" in mfef_ext.explain(x, block)
"""


@pytest.mark.parametrize("how", WITHOUT)
def test_without_triton_everything_else_works(how):
    code = f"import sys\n{WITHOUT[how]}\n{SCRIPT}"
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
